"""Measure generation on a CPU: gptq_belle, llama.cpp's Q4_0 and transformers on torch's int4 op, in one run.

    python benchmarks/bench_generate.py      # LLaMA-7B cut to 8 blocks, lm_head in 4 or 8 bits too; minutes

In each repeat the variants take turns: prefill of 512 tokens, then decoding after a short prompt, alone and in a batch
of 8. Results are medians; ratios are ratios of medians of the same run. A decode step is compared with a plain read of
as many bytes as its weights have, measured in the same turns. llama.cpp is skipped if llama-cpp-python and gguf are
missing (see llama_peer.py). Writes benchmarks/results/cpu_generate.json.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import records
import torch
from llama_peer import LlamaCpp, Shape
from make_model import make
from torch_int4 import Int4Linear

from gptq_belle import hf_model, load
from gptq_belle.common.timers import seconds, spread
from gptq_belle.engine.linear import QuantLinear
from gptq_belle.engine.model import Model
from gptq_belle.kernels import cpu_layout, cpu_matmul
from gptq_belle.kernels.layout import CanonicalWeight

CONTEXT, TOKENS, PROMPT, BATCH = 8, 32, 512, 8
OURS, FAST, EIGHT, HF, PEER = "4 bit exact", "4 bit fast", "8 bit exact", "hf_model, torch int4", "llama.cpp Q4_0"
READ, CALLS = "plain read", "4 bit exact, every call from Python"  # measured for decoding only
TURNS = {"decode": 3, "batch": 1, "prefill": 1}  # per variant in each repeat

Timer = Callable[[str], float]


def ours(model: Model, *, replays: bool = True) -> Timer:
    """Seconds of the prefill or of one decode step, with recorded steps or call by call."""
    native = model.use_step_graphs

    def run(what: str) -> float:
        model.use_step_graphs = replays and native
        rows = BATCH if what == "batch" else 1
        ids = torch.randint(32000, (rows, PROMPT if what == "prefill" else CONTEXT))
        began = time.perf_counter()
        logits, session = model.prefill(ids, TOKENS)
        if what == "prefill":
            return time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(TOKENS):
            logits = model.decode(logits.argmax(-1), session)
        return (time.perf_counter() - began) / TOKENS
    return run


def transformers_int4(path: Path) -> Timer:
    """The same for transformers in bfloat16 with linears on torch's int4 op."""
    with patch("gptq_belle.kernels.cpu_matmul.unsupported_reason", lambda *args: "disabled for the comparison"):
        model: Any = hf_model(path, device="cpu", dtype=torch.bfloat16)
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, QuantLinear):
                weight = module.prepared
                assert isinstance(weight, CanonicalWeight)
                setattr(parent, name, Int4Linear(weight, module.bias))

    @torch.inference_mode()
    def run(what: str) -> float:
        rows = BATCH if what == "batch" else 1
        ids = torch.randint(32000, (rows, PROMPT if what == "prefill" else CONTEXT))
        began = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        if what == "prefill":
            return time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(TOKENS):
            out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        return (time.perf_counter() - began) / TOKENS
    return run


def llama_cpp(peer: LlamaCpp) -> Timer:
    """The same for llama.cpp, which has no call for a batch of sequences here: 8 tokens of one sequence replace it."""
    def run(what: str) -> float:
        if what == "prefill":
            return peer.seconds(0, PROMPT)
        return peer.seconds(CONTEXT, BATCH if what == "batch" else 1, TOKENS) / TOKENS
    return run


def plain_read(size: int) -> Timer:
    """Seconds to read `size` bytes."""
    codes = cpu_layout.empty_codes(1, 1, -(-size // 64)).fill_(1)
    return lambda what: seconds(lambda: cpu_matmul.read_memory(codes))


def measure(variants: dict[str, Timer], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by task and variant; the first repeat is a warm-up."""
    times: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in variants if what == "decode" or name not in (READ, CALLS)} for what in TURNS}
    for _ in range(repeats + 1):
        for what, turns in TURNS.items():
            for _ in range(turns):
                for name, values in times[what].items():
                    values.append(variants[name](what))
    return {what: {name: values[TURNS[what]:] for name, values in found.items()} for what, found in times.items()}


def rows_of(times: dict[str, dict[str, list[float]]], sizes: dict[str, int]) -> list[dict[str, Any]]:
    """One row per task and variant; variants with a known size also get their share of a plain read."""
    tokens = {"decode": 1, "batch": BATCH, "prefill": PROMPT}
    speed, rows = sizes[OURS] / spread(times["decode"].pop(READ)).median, []
    print(f"{READ}: {speed / 1e9:.1f} GB/s")
    for what, found in times.items():
        base = spread(found[OURS]).median
        for name, values in found.items():
            s = spread(values)
            row = {"what": what, "variant": name, "seconds": s.median, "low": s.low, "high": s.high,
                   "tokens_per_s": tokens[what] / s.median, "time_of_ours": s.median / base}
            if what == "decode" and name in sizes:
                row |= {"bytes": sizes[name], "Bps": sizes[name] / s.median, "read_Bps": speed,
                        "share_of_read": sizes[name] / s.median / speed}
            rows.append(row)
            share = f", {row['share_of_read']:.2f} of a plain read" if "share_of_read" in row else ""
            print(f"{what:8} {name:35} {1e3 * s.median:9.2f} ms {row['tokens_per_s']:8.1f} tokens/s, "
                  f"{row['time_of_ours']:5.2f} of ours{share}", flush=True)
    return rows


def models(scratch: Path, layers: int) -> tuple[Path, dict[str, Model]]:
    """Write the 4-bit and 8-bit checkpoints; return the 4-bit directory and the loaded models."""
    four, eight = scratch / "4", scratch / "8"
    make("llama-7b", four, layers=layers)
    make("llama-7b", eight, layers=layers, bits=8)
    return four, {OURS: load(four, device="cpu", head_bits=4), EIGHT: load(eight, device="cpu", head_bits=8),
                  FAST: load(four, device="cpu", head_bits=4, precision="fast")}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch, LlamaCpp(Shape(options.layers), options.threads) as peer:
        path, loaded = models(Path(scratch), options.layers)
        exact, sizes = loaded[OURS], {name: model.step_bytes for name, model in loaded.items()}
        variants = {name: ours(model) for name, model in loaded.items()} | {
            CALLS: ours(exact, replays=False), READ: plain_read(exact.step_bytes), HF: transformers_int4(path)}
        times = measure(variants | ({PEER: llama_cpp(peer)} if peer.available else {}), options.repeats)
    rows = rows_of(times, sizes | {CALLS: exact.step_bytes})
    print(records.write("cpu_generate", {"threads": options.threads, "layers": options.layers,
                                         "llama_cpp_python": peer.version or None, "results": rows}))


if __name__ == "__main__":
    main()
