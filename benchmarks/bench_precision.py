"""Measure the effect of the CPU kernels' precision: KL of the demo models with `exact` and `fast` activations.

    python benchmarks/bench_precision.py          # both models; a few minutes

KL is computed on examples/belle_tiny/data/heldout.jsonl, from the full-precision model to the 4-bit and 8-bit models
with each precision, and from the same packed weights, expanded and multiplied by torch in float32, to `exact` and
`fast`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import records
import torch
from torch import Tensor, nn

from gptq_belle import Calibration, QuantConfig, hf_model, load, quantize_checkpoint
from gptq_belle.engine.linear import QuantLinear
from gptq_belle.evaluation.kl_divergence import divergence
from gptq_belle.evaluation.perplexity import LogitsFunction, read_text
from gptq_belle.kernels import reference
from gptq_belle.kernels.cpu_layout import CpuWeight
from gptq_belle.kernels.layout import checked_weight

TINY = records.ROOT / "examples" / "belle_tiny"
WINDOW = 256
LIMIT = 20_000  # tokens


class Expanded(nn.Module):
    """A packed linear expanded to float32 and multiplied by torch."""

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        state, prepared = linear.state_dict(), linear.prepared
        assert isinstance(prepared, CpuWeight)
        words = checked_weight(state["qweight"], state["qzeros"], state["scales"], state["g_idx"],
                               prepared.checkpoint_bits, prepared.zero_offset)
        self.weight = reference.dequantize(words).t().contiguous()
        self.bias = None if linear.bias is None else linear.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., K) to (..., N)."""
        return nn.functional.linear(x, self.weight, self.bias)


def expanded(path: Path) -> LogitsFunction:
    """The logits of the packed model with every linear expanded."""
    model: Any = hf_model(path, device="cpu")
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, Expanded(module))

    @torch.inference_mode()
    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(ids, use_cache=False).logits
        return found

    return logits


def measure(source: Path, bits: int) -> dict[str, Any]:
    """KL, top-1 agreement and perplexity of one model quantized to `bits`."""
    base = load(source, device="cpu")
    text = read_text(TINY / "data" / "heldout.jsonl", base.chat_format())

    def kl(one: LogitsFunction, other: LogitsFunction) -> dict[str, float]:
        found = divergence(one, other, base.tokenizer, text, length=WINDOW, limit=LIMIT)
        return {"kl": found.kl_mean, "same_top": found.same_top, "perplexity": found.perplexity}

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model"
        quantize_checkpoint(source, path, QuantConfig(bits=bits), calibration=Calibration(seq_len=WINDOW))
        models = {"float32": expanded(path)} | {name: load(path, device="cpu", precision=name).logits
                                                for name in ("exact", "fast")}
    figures: dict[str, Any] = {f"{name} to full precision": kl(base.logits, model) for name, model in models.items()}
    return figures | {f"{name} to float32": kl(models["float32"], models[name]) for name in ("exact", "fast")}


def main() -> None:
    """Run the command line."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    models: dict[str, Any] = {}
    for architecture in ("bloom", "llama"):
        for bits in (4, 8):
            found = models[f"{architecture} {bits} bit"] = measure(TINY / architecture, bits)
            for name, figures in found.items():
                print(f"{architecture} {bits} bit, {name:24} KL {figures['kl']:.3e}  same top "
                      f"{100 * figures['same_top']:.2f} %  perplexity {figures['perplexity']:.4f}", flush=True)
    print(records.write("cpu_precision", {"tokens": LIMIT, "models": models}))


if __name__ == "__main__":
    main()
