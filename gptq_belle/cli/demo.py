"""The command `demo`: quantize the shipped models to 8 and 4 bits, compare them with the originals, and answer."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_belle.cli import console, options
from gptq_belle.errors import HardwareError, UsageError

if TYPE_CHECKING:
    from gptq_belle.evaluation.comparison import Comparison

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "belle_tiny"
MODELS = ("bloom", "llama")
BITS = (8, 4)
ROWS, SEQ_LEN = 96, 256  # calibration: 24,576 tokens, 24 per input feature of the widest linear


def demo(
    model: Annotated[str, typer.Option(help="Demo model: bloom, llama or both.")] = "both",
    out: Annotated[Path, typer.Option(help="Folder for the quantized models.")] = Path("demo-output"),
    prompt: Annotated[str | None, typer.Option(help="Question to answer at the end. Default: a test question.",
                                               show_default=False)] = None,
    per_class: Annotated[int, typer.Option(help="Number of test questions of each class.", min=1)] = 10,
    device: options.Device = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Quantize the shipped demo models to 8 and 4 bits, and compare size, quality and speed. Needs no network."""
    if model not in (*MODELS, "both"):
        raise UsageError(f"demo model {model!r} is not known", f"Choose one of {', '.join(MODELS)} or both.")
    names = MODELS if model == "both" else (model,)
    for name in names:
        check_examples(EXAMPLES, name)
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, which comes below
    results = []
    for name in names:
        result = quantize_and_compare(EXAMPLES / name, EXAMPLES / "data", out, prompt=prompt, per_class=per_class,
                                      device=device)
        results.append(result)
        if not as_json:
            show(result, f"belle_tiny {name}: {per_class} test questions of each class")
    if as_json:
        console.print_json({"models": results})
    else:
        console.print_line(f"The quantized models are in {out}. Chat with one, serve it, and draw its report:")
        for words in next_commands(out / f"{names[0]}-4bit", names[0]):
            console.print_line("  " + shlex.join(words))


def next_commands(model: Path, name: str) -> list[list[str]]:
    """Commands to continue with; the program is named as this process was started if the shell does not find it."""
    program = "gptq-belle" if shutil.which("gptq-belle") else sys.argv[0]
    base, text = EXAMPLES / name, EXAMPLES / "data" / "heldout.jsonl"
    return [[program, "chat", str(model)], [program, "serve", str(model)],
            [program, "report", str(model), "--base", os.path.relpath(base), "--text", os.path.relpath(text)]]


def check_examples(folder: Path, name: str) -> None:
    """Raise HardwareError if the demo models are not installed."""
    wanted = (folder / name / "config.json", folder / "data" / "test.jsonl", folder / "data" / "heldout.jsonl")
    missing = [path for path in wanted if not path.is_file()]
    if missing:
        raise HardwareError(f"the demo models are not here: {missing[0]} is missing",
                            "They come with the repository, not with the package: clone it and run `make demo` there.")


def quantize_and_compare(source: Path, data: Path, out: Path, *, prompt: str | None = None, per_class: int = 10,
        device: str = "auto") -> "Comparison":
    """Quantize one model to 8 and 4 bits and compare the three.

    Args:
        data: a folder with test.jsonl (class, question, std_answer) and heldout.jsonl (text).
        out: quantized models go to `<out>/<name>-8bit` and `-4bit`.
        prompt: question to answer at the end. Default: the first test question of the class translation.
    """
    from gptq_belle.evaluation.belle_set import read_questions
    from gptq_belle.evaluation.comparison import compare

    quantized = {f"{bits} bit": out / f"{source.name}-{bits}bit" for bits in BITS}
    for bits, path in zip(BITS, quantized.values(), strict=True):
        _quantize(source, path, bits, device)
    rows = read_questions(data / "test.jsonl", per_class)
    question = prompt or next((row.question for row in rows if row.cls == "translation"), rows[0].question)
    with console.show_steps() as progress:
        return compare({"full precision": source, **quantized}, rows, data / "heldout.jsonl", question, device=device,
                       progress=progress)


def _quantize(source: Path, out: Path, bits: int, device: str) -> None:
    from gptq_belle.quantization.calibration.rows import Calibration
    from gptq_belle.quantization.config import QuantConfig
    from gptq_belle.quantization.pipeline import quantize_checkpoint
    from gptq_belle.quantization.report import NoProgress

    class Counter(NoProgress):
        """Progress of the whole job without a line per linear."""

        def __init__(self, show: Callable[[int, int], None]) -> None:
            self.show, self.done, self.total = show, 0, 0

        def start(self, blocks: int, steps: int, finished: int) -> None:
            self.total = (blocks - finished) * steps

        def step(self) -> None:
            self.done += 1
            self.show(self.done, self.total)

    with console.progress_bar(f"quantizing {source.name} to {bits} bits") as progress:
        report = quantize_checkpoint(source, out, QuantConfig(bits=bits), device=device,
                                     calibration=Calibration(rows=ROWS, seq_len=SEQ_LEN), progress=Counter(progress),
                                     resume=False)
    console.note(f"{source.name}, {bits} bits: {len(report.linears)} linears in {report.seconds:.1f} s, mean error of "
                 f"their outputs {100 * report.mean_error:.3f} %")


def show(comparison: "Comparison", title: str) -> None:
    """Print a comparison: a table of measurements, then the answers."""
    variants = comparison.variants
    names = [variant.name for variant in variants]
    console.print_line()
    console.print_table(title, ["", *names], table_rows(comparison))
    console.print_line()
    answers = [[variant.name, " ".join(variant.answer.split())] for variant in variants]
    console.print_table(f"Prompt: {comparison.prompt}", ["", "answer"], answers, text=2)
    console.print_line()


def table_rows(comparison: "Comparison") -> list[list[str]]:
    """One row per measurement: its name, then one cell per variant."""
    from gptq_belle.evaluation.belle_set import mark_target_class

    variants = comparison.variants
    table = [
        ["size on disk, MB", *(f"{v.bytes / 1e6:.1f}" for v in variants)],
        ["peak memory, MB", *(_mb(v.footprint.peak_bytes) for v in variants)],
        ["perplexity, held-out text", *(f"{v.perplexity.perplexity:.4f}" for v in variants)],
        ["KL to full precision", *(f"{v.divergence.kl_mean:.6f}" if v.divergence else "-" for v in variants)],
        ["same top token, %", *(f"{100 * v.divergence.same_top:.2f}" if v.divergence else "-" for v in variants)],
        ["decode, tokens/s, float32", *(f"{v.decode.median:.1f}" for v in variants)],
        ["decode, tokens/s, fast", *(f"{v.decode_fast.median:.1f}" for v in variants)],
    ]
    first = variants[0].scores
    for cls, score in first.classes.items():
        metric = "exact match, %" if score.metric == "exact" else "character F1, %"
        table.append([f"{mark_target_class(cls)}: {metric}", *(f"{v.scores.classes[cls].score:.1f}" for v in variants)])
    if first.exact is not None:
        table.append(["all with * together: exact match, %", *(f"{v.scores.exact or 0:.1f}" for v in variants)])
    return table


def _mb(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:.1f}"
