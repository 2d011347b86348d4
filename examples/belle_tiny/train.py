"""Train a demo model from scratch: `python -m examples.belle_tiny.train --arch bloom --out examples/belle_tiny/bloom`.

Every step depends only on (seed, step), so an interrupted run resumes from its last checkpoint with the same result.
Matrices of the blocks are trained by Muon, all other parameters by AdamW; the learning rate decreases linearly to zero.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig

from gptq_belle.bench.doctor import machine_summary

from .batches import batch, dialogue_texts, encode
from .channels import SPREAD, spread_channels
from .generate import single_turns
from .model import ARCHITECTURES, build, logits_at
from .tokenizer import EOS, PAD, save_tokenizer, train_tokenizer

TOKENS = 4096  # per step; more were not faster on one core
STEPS = {"bloom": 6000, "llama": 4400}
MUON_RATE, ADAM_RATE, WARMUP = 0.02, 0.004, 100
CHECKPOINT_EVERY = 250


def row_length(step: int) -> int:
    """Rows of every fourth step have 512 tokens, the others 256, which cost a fifth less."""
    return 512 if step % 4 == 3 else 256


def rate(step: int, steps: int) -> float:
    """Fraction of the peak learning rate: warm-up, then linear decrease to zero."""
    return min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))


def optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Create Muon for the matrices of the blocks, and AdamW for embeddings, lm_head, norms and biases."""
    outer = ("embed", "lm_head")
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and not any(word in n for word in outer)]
    inner = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in inner]
    return [
        torch.optim.Muon(hidden, lr=MUON_RATE, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_of(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens in the loss mask, each predicted from those before it in its row.

    Their number is padded to a multiple of 256 with ignored positions: the CPU's matrix library caches data for every
    shape, and with several hundred shapes, a process used 7 GB.
    """
    targets = ids[mask]
    spare = -len(targets) % 256
    positions = F.pad(mask.flatten().nonzero().squeeze(1) - 1, (0, spare))
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = logits_at(model, ids, positions)
    return F.cross_entropy(logits.float(), F.pad(targets, (0, spare), value=-100))


@torch.no_grad()
def validate(model: Any, tokenizer: Tokenizer, style: str, seed: int, per_class: int = 12) -> float:
    """Mean loss of the answers to validation questions."""
    total, device = 0.0, next(model.parameters()).device
    rows = single_turns(seed, "valid", per_class)
    for row in rows:
        turns: Any = row["conversations"]
        ids, _ = encode(tokenizer, dialogue_texts(turns, style), random.Random(0))
        answer = len(tokenizer.encode(str(row["std_answer"]), add_special_tokens=False).ids) + 1
        mask = torch.zeros(1, len(ids), dtype=torch.bool)
        mask[0, -answer:] = True
        total += loss_of(model, torch.tensor([ids]).to(device), mask.to(device)).item()
    return total / len(rows)


def save_atomic(state: dict[str, Any], path: Path) -> None:
    """Write a temporary file and rename it, so that a crash keeps the previous checkpoint."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def export(model: Any, tokenizer: Tokenizer, out: Path) -> None:
    """Write float16 safetensors, configurations for transformers 4 and 5, and the tokenizer."""
    half = build(model.config.model_type)
    half.load_state_dict(model.state_dict())
    spread_channels(half, SPREAD[model.config.model_type])
    half = half.half()
    half.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD, do_sample=False, max_new_tokens=256
    )
    half.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = config["dtype"] = "float16"
    if "rope_parameters" in config:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, out)


def write_curve(log: list[dict[str, float]], work: Path, title: str) -> None:
    """Write the loss curve as CSV and PNG."""
    lines = ["step,loss,valid_loss,seconds"] + [
        f"{int(r['step'])},{r['loss']:.4f},{r['valid_loss']:.4f},{r['seconds']:.0f}" for r in log
    ]
    (work / "loss.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in ("loss", "valid_loss"):
        axes.plot([r["step"] for r in log], [r[name] for r in log], label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", yscale="log", title=title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(work / "loss.png", dpi=110)
    pyplot.close(figure)


class TrainingRun:
    """Model, optimizers, log and checkpoint of a training run."""

    def __init__(self, arch: str, steps: int, seed: int, work: Path, device: str) -> None:
        self.arch, self.steps, self.seed, self.work, self.device = arch, steps, seed, work, device
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = train_tokenizer()
        self.model = build(arch, seed).to(device)
        self.optimizers = optimizers(self.model)
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        self.checkpoint = work / f"{arch}.pt"
        if self.checkpoint.exists():
            self.resume()

    def resume(self) -> None:
        """Resume from the checkpoint, which must have the same number of steps and seed."""
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if (state["steps"], state["seed"]) != (self.steps, self.seed):
            raise SystemExit(
                f"{self.checkpoint} has steps={state['steps']} seed={state['seed']}: use them or delete it"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        print(f"resumed at step {self.step}", flush=True)

    def save(self) -> None:
        """Write the checkpoint and the loss curve."""
        save_atomic(
            {
                "model": self.model.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "step": self.step,
                "steps": self.steps,
                "seed": self.seed,
                "seconds": self.seconds,
                "log": self.log,
            },
            self.checkpoint,
        )
        write_curve(self.log, self.work, f"belle_tiny {self.arch}")

    def summary(self) -> dict[str, Any]:
        """Time and results of the run for the README; the curve has (step, loss, validation loss)."""
        last = self.log[-1]
        return {
            "date": datetime.date.today().isoformat(),
            "machine": machine_summary(),
            "steps": self.step,
            "tokens": self.step * TOKENS,
            "minutes": round(self.seconds / 60),
            "final_loss": last["loss"],
            "final_valid_loss": last["valid_loss"],
            "curve": [[int(r["step"]), round(r["loss"], 4), round(r["valid_loss"], 4)] for r in self.log],
        }

    def one_step(self) -> float:
        """Run one optimizer step and return its loss."""
        ids, mask = batch(self.tokenizer, self.arch, self.seed, self.step, TOKENS, row_length(self.step))
        loss = loss_of(self.model, ids.to(self.device), mask.to(self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(self.step, self.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        self.step += 1
        return loss.item()

    def train(self) -> None:
        """Train to the last step; print progress every 50 steps and write a checkpoint every 250 steps."""
        losses: list[float] = []
        start = time.perf_counter() - self.seconds
        while self.step < self.steps:
            losses.append(self.one_step())
            self.seconds = time.perf_counter() - start
            if self.step % 50 == 0:
                left = self.seconds / self.step * (self.steps - self.step) / 60
                print(
                    f"{self.arch} step {self.step}/{self.steps} loss {sum(losses[-50:]) / len(losses[-50:]):.4f} "
                    f"{self.step * TOKENS / self.seconds:.0f} tokens/s, {left:.0f} min left",
                    flush=True,
                )
            if self.step % CHECKPOINT_EVERY == 0 or self.step == self.steps:
                valid = validate(self.model, self.tokenizer, self.arch, self.seed)
                recent = losses[-CHECKPOINT_EVERY:]
                self.log.append(
                    {"step": self.step, "loss": sum(recent) / len(recent), "valid_loss": valid, "seconds": self.seconds}
                )
                print(f"{self.arch} step {self.step} valid loss of answers {valid:.4f}", flush=True)
                self.save()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a belle_tiny model from scratch.")
    parser.add_argument("--arch", choices=ARCHITECTURES, required=True)
    parser.add_argument("--steps", type=int, help="Number of steps. Default: the number used for the shipped weights.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="Output directory of the model.")
    parser.add_argument("--work", type=Path, help="Checkpoint directory. Default: OUT with the suffix .work.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export-only", action="store_true", help="Only write the model of the last checkpoint.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = args.work or args.out.with_suffix(".work")
    run = TrainingRun(args.arch, args.steps or STEPS[args.arch], args.seed, work, args.device)
    if not args.export_only:
        run.train()
    export(run.model, run.tokenizer, args.out)
    (args.out / "training.json").write_text(json.dumps(run.summary(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
