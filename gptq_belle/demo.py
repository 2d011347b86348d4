"""`demo`: the whole way on the shipped models: quantize to 8 and 4 bits, load what was written, measure, answer."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_belle import console
from gptq_belle.errors import HardwareError, UsageError

if TYPE_CHECKING:
    from gptq_belle.evaluation.comparison import Comparison

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "belle_tiny"
MODELS = ("bloom", "llama")
BITS = (8, 4)
ROWS, SEQ_LEN = 96, 256  # of calibration: 24,576 tokens, 24 for every input of the widest linear


def command(
    model: Annotated[str, typer.Option(help="bloom, llama or both.")] = "both",
    out: Annotated[Path, typer.Option(help="Folder for the quantized models.")] = Path("demo-output"),
    prompt: Annotated[str | None, typer.Option(help="What to ask at the end.", show_default=False)] = None,
    per_class: Annotated[int, typer.Option(help="Test questions of each class.", min=1)] = 10,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Quantize the shipped demo models to 8 and 4 bits, and show what that saves and costs. No network."""
    if model not in (*MODELS, "both"):
        raise UsageError(f"demo model {model!r} is not known", f"Choose one of {', '.join(MODELS)} or both.")
    names = MODELS if model == "both" else (model,)
    for name in names:
        check_examples(EXAMPLES, name)
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, which comes below
    results = []
    for name in names:
        result = run(EXAMPLES / name, EXAMPLES / "data", out, prompt=prompt, per_class=per_class, device=device)
        results.append(result)
        if not as_json:
            from gptq_belle.evaluation.comparison import show

            show(result, f"belle_tiny {name}: {per_class} test questions of each class")
    if as_json:
        console.print_json({"models": results})
    else:
        console.say(f"The quantized models are in {out}. Talk with one: gptq-belle chat {out / f'{names[0]}-4bit'}")


def check_examples(folder: Path, name: str) -> None:
    """Raises HardwareError where the demo models are not installed."""
    wanted = (folder / name / "config.json", folder / "data" / "test.jsonl", folder / "data" / "heldout.jsonl")
    missing = [path for path in wanted if not path.is_file()]
    if missing:
        raise HardwareError(f"the demo models are not here: {missing[0]} is missing",
                            "They come with the repository, not with the package: clone it and run `make demo` there.")


def run(source: Path, data: Path, out: Path, *, prompt: str | None = None, per_class: int = 10,
        device: str = "auto") -> "Comparison":
    """Quantize one model to 8 and 4 bits and compare the three.

    Args:
        source: the full-precision model.
        data: a folder with test.jsonl (class, question, std_answer) and heldout.jsonl (text).
        out: quantized models go to `<out>/<name>-8bit` and `-4bit`.
        prompt: asked at the end; left out, the first test question of the class translation.
        per_class, device: as the options.
    """
    from gptq_belle.evaluation.belle import read_rows
    from gptq_belle.evaluation.comparison import compare

    quantized = {f"{bits} bit": out / f"{source.name}-{bits}bit" for bits in BITS}
    for bits, path in zip(BITS, quantized.values(), strict=True):
        _quantize(source, path, bits, device)
    rows = read_rows(data / "test.jsonl", per_class)
    question = prompt or next((row.question for row in rows if row.cls == "translation"), rows[0].question)
    return compare({"full precision": source, **quantized}, rows, data / "heldout.jsonl", question, device=device)


def _quantize(source: Path, out: Path, bits: int, device: str) -> None:
    from gptq_belle.config import QuantConfig
    from gptq_belle.quantization.calibration import Calibration
    from gptq_belle.quantization.pipeline import quantize_checkpoint
    from gptq_belle.quantization.progress import Silent

    class Counter(Silent):
        """One bar for the whole job; the lines of every linear are for the verb quantize."""

        def __init__(self, show: Callable[[int, int], None]) -> None:
            self.show, self.done, self.total = show, 0, 0

        def start(self, blocks: int, steps: int, finished: int) -> None:
            self.total = (blocks - finished) * steps

        def step(self) -> None:
            self.done += 1
            self.show(self.done, self.total)

    with console.counting(f"quantizing {source.name} to {bits} bits") as progress:
        report = quantize_checkpoint(source, out, QuantConfig(bits=bits), device=device,
                                     calibration=Calibration(rows=ROWS, seq_len=SEQ_LEN), progress=Counter(progress),
                                     resume=False)
    console.note(f"{source.name}, {bits} bits: {len(report.linears)} linears in {report.seconds:.1f} s, mean error of "
                 f"their outputs {100 * report.mean_error:.3f} %")
