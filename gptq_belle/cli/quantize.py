"""The command `quantize`: its options, its output, and the command line that resumes an interrupted job."""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from gptq_belle.cli import console, options
from gptq_belle.common.text import count
from gptq_belle.errors import UsageError

if TYPE_CHECKING:
    from gptq_belle.cli.progress import ConsoleProgress
    from gptq_belle.quantization.config import QuantConfig
    from gptq_belle.quantization.job import QuantizationJob
    from gptq_belle.quantization.report import Report

WORST = 3  # number of linears in the table at the end

Source = Annotated[str, typer.Argument(metavar="MODEL", help="Full-precision model: a directory or a hub id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; it appears only when complete.")]
Bits = Annotated[int, typer.Option("--bits", "--wbits", help="Bits per weight: 2, 3, 4 or 8.")]
Sym = Annotated[bool, options.advanced("--sym/--asym", help="Symmetric, or with a zero point per group.")]
ActOrder = Annotated[bool, options.advanced(
    "--act-order", help="Quantize columns in order of decreasing activation (act-order, desc_act). vLLM refuses such "
    "files, OpenVINO misreads them; preset best has the gain without it.")]
Damp = Annotated[float, options.advanced(help="Damping as a share of the Hessian's mean diagonal.")]
Method = Annotated[Literal["gptq", "rtn"], typer.Option(help="rtn is rounding to nearest, without calibration.")]
Preset = Annotated[Literal["fast", "best", "max"], typer.Option(
    help="fast is plain GPTQ; max also refines all linears of a block together, for 2 bits; several times as slow.")]
Without = Annotated[str, options.advanced(
    metavar="NAME,...", help="Techniques of the preset to disable: search, order, fold, refine, targets, veto, block.")]
PositiveScales = Annotated[bool, options.advanced(
    "--positive-scales", help="Only positive scales, for readers that do not accept negative ones; slightly lower "
    "quality.")]
Overrides = Annotated[list[str] | None, options.advanced(
    metavar="REGEX=KEY:VALUE,...", show_default=False, help="Different bits, group_size or sym for the linears whose "
    "name matches REGEX, such as 'mlp.dense_4h_to_h=bits:8', or REGEX=skip to keep them in float16. Repeatable. "
    "GPTQModel reads all of these, vLLM symmetric 4 and 8 bits and skip, transformers and llama.cpp skip only.")]
AutoBits = Annotated[str | None, typer.Option(
    "--auto-bits", metavar="BUDGET", show_default=False, help="Choose 4 or 8 bits for each stage of each block by its "
    "measured loss in 4 bits, within average bits per weight (4.5) or a file size (3.2GB). Linears that an --override "
    "matches keep its settings.")]
For = Annotated[Literal["vllm", "transformers", "llama.cpp", "any"] | None, typer.Option(
    "--for", show_default=False, help="Choose settings that this program reads, or any of the three, and say what they "
    "cost; options that it does not read are refused.")]
CalibrationSource = Annotated[str, typer.Option(help="Calibration data: builtin, or a text, JSON or Parquet file.")]
Rows = Annotated[int, options.advanced(help="Maximum number of calibration rows.")]
SeqLen = Annotated[int, options.advanced(help="Tokens per calibration row.")]
AllowShort = Annotated[bool, options.advanced(
    "--allow-short", help="Allow fewer than 4 calibration tokens per input feature.")]
CalibrationSeed = Annotated[int, options.advanced(help="Random seed for the order of calibration documents.")]
Lora = Annotated[Path | None, typer.Option(
    metavar="DIR", show_default=False, help="Directory of a LoRA adapter to merge into MODEL's weights.")]
Memory = Annotated[str | None, typer.Option(
    metavar="SIZE", show_default=False, help="Limit of anonymous memory, such as 8GiB: calibration activations are "
    "kept on disk where they do not fit. By default the free memory.")]
PackedHeadOnly = Annotated[bool, options.advanced(
    "--packed-head-only", help="Store the LM head (of BLOOM the embedding too) only packed in --head-bits: a smaller "
    "file that only gptq-belle reads.")]
PackedHeadBits = Annotated[int | None, options.advanced(
    help="Bits of the packed head with --packed-head-only: 8 or 4. Default: 8.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Estimate time, memory and disk without writing anything.")]
Resume = Annotated[bool, options.advanced(
    "--resume/--restart", help="Resume an interrupted job of the same source and settings from OUT.partial, or start "
    "again.")]


def quantize(context: typer.Context, model: Source, out: Out, bits: Bits = 4,
             group_size: options.GroupSize = 128, sym: Sym = True, act_order: ActOrder = False,
             damp: Damp = 0.01, method: Method = "gptq", preset: Preset = "best", without: Without = "",
             positive_scales: PositiveScales = False, override: Overrides = None, auto_bits: AutoBits = None,
             reader: For = None, calibration: CalibrationSource = "builtin", rows: Rows = 128,
             seq_len: SeqLen = 2048, allow_short: AllowShort = False, seed: CalibrationSeed = 0, lora: Lora = None,
             memory: Memory = None, prompt_style: options.WrittenStyle = "auto",
             packed_head_only: PackedHeadOnly = False, head_bits: PackedHeadBits = None, dry_run: DryRun = False,
             resume: Resume = True, overwrite: options.Overwrite = False, device: options.Device = "auto",
             as_json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Quantize MODEL to OUT: packed safetensors in the GPTQ format, with a report of every layer's error.

    Finished blocks are kept in OUT.partial: after Ctrl-C, a crash or a power cut, the same command resumes there.
    """
    if head_bits is not None and not packed_head_only:
        raise UsageError(f"--head-bits {head_bits} has no effect without --packed-head-only",
                         "Add --packed-head-only, or give --head-bits to generate, chat or serve, which quantize the "
                         "lm_head while they load it.")
    if not dry_run:
        options.check_output(out, overwrite)
    options.import_engine()
    from gptq_belle.common.devices import resolve_device
    from gptq_belle.quantization.config import QuantConfig
    from gptq_belle.quantization.overrides import parse_override

    resolve_device(device)
    config = QuantConfig(bits=bits, group_size=group_size, sym=sym, act_order=act_order, damp=damp, method=method,
                         preset=preset, without=tuple(filter(None, without.split(","))),
                         positive_scales=positive_scales, overrides=tuple(map(parse_override, override or ())),
                         head_bits=(head_bits or 8) if packed_head_only else 16, auto_bits=auto_bits, reader=reader)
    _note_unused(context, config)
    from gptq_belle.cli.progress import ConsoleProgress
    from gptq_belle.common.memory import parse_memory
    from gptq_belle.quantization.calibration.rows import Calibration
    from gptq_belle.quantization.job import prepare_job
    from gptq_belle.quantization.pipeline import quantize_checkpoint

    data = Calibration(calibration, rows, seq_len, seed, allow_short)
    limit, style = None if memory is None else parse_memory(memory), options.style_or_none(prompt_style)
    if dry_run:
        _print_estimate(prepare_job(model, config, data, device, lora, style), limit, as_json)
        return
    with ConsoleProgress(console.err()) as progress, resumable(out, progress):
        report = quantize_checkpoint(model, out, config, calibration=data, device=device, progress=progress,
                                     resume=resume, memory=limit, lora=lora, prompt_style=style)
    if as_json:
        console.print_json(report.to_dict())
    else:
        _print_report(out, report)


def _note_unused(context: typer.Context, config: "QuantConfig") -> None:
    """Say which options have no effect on this job."""
    from gptq_belle.quantization.config import PRESETS

    if config.method == "rtn":
        options.note_unused(context, "with --method rtn, which reads no calibration data and rounds each weight alone",
                            "calibration", "rows", "seq_len", "allow_short", "seed", "preset", "without", "damp",
                            "act_order", "positive_scales")
    preset = PRESETS[config.preset]
    if config.method != "rtn" and (unused := [name for name in config.without if preset.disable([name]) == preset]):
        console.note(f"No effect with --preset {config.preset}: --without {','.join(unused)}.", style=None)


def _print_report(out: Path, report: "Report") -> None:
    from gptq_belle.quantization.report import REPORT

    if report.choice is not None:
        _print_bit_allocation(report.choice)
    peak = f", peak memory {report.peak_memory / 2**20:,.0f} MiB" if report.peak_memory is not None else ""
    console.print_line(f"{out}: {report.average_bits:.3g} bits, {report.bytes_on_disk / 1e6:,.1f} MB of weights, mean "
                       f"error {report.mean_error:.2e}, {report.seconds:.1f} s{peak}")
    if report.winners:
        console.print_line("held-out rows chose " + ", ".join(f"{name}: {n}" for name, n in report.winners.items()))
    if report.refined:
        console.print_line(f"block refinement: {report.refined}")
    worst = sorted(report.linears, key=lambda row: -row.error)[:WORST]
    console.print_table(f"largest errors of {count(len(report.linears), 'linear')}", ["linear", "error", "bits"],
                        [(row.name, f"{row.error:.2e}", str(row.bits)) for row in worst])
    console.print_line(f"All errors are in {out / REPORT}. A page with charts: "
                       + shlex.join(["gptq-belle", "report", str(out), "--base", report.source, "--text", "FILE"]))


def _print_bit_allocation(choice: dict[str, Any]) -> None:
    """Print the bits and the measured loss of every stage."""
    rows = [(str(row["block"]), ", ".join(row["linears"]), f"{row['loss']:.3e}",
             f"{1e6 * row['loss'] / row['weights']:.3e}", str(row["bits"])) for row in choice["stages"]]
    columns = ["block", "stage", "KL in 4 bits", "per million weights", "bits"]
    console.print_table(f"--auto-bits {choice['budget']}: {choice['average_bits']:.3f} bits per weight on average",
                        columns, rows, text=2)


def _print_estimate(job: "QuantizationJob", limit: int | None, as_json: bool) -> None:
    """Estimate and print time, memory and disk of a job."""
    from gptq_belle.common.memory import lower_mmap_threshold
    from gptq_belle.quantization.auto_bits import describe_estimate
    from gptq_belle.quantization.cost_estimate import estimate

    auto = describe_estimate(job)
    with console.show_step("measuring one block"):
        lower_mmap_threshold()
        found = estimate(job, limit)
    if as_json:
        console.print_json(found)
        return
    where = "on disk" if found.spilled else "in memory"
    console.print_line(f"{count(found.blocks, 'block')}, {count(found.linears, 'linear')}, "
                       f"{count(found.tokens, 'calibration token')}")
    console.print_line(f"time    {found.seconds:,.0f} s on this machine")
    console.print_line(f"memory  {found.memory / 2**20:,.0f} MiB at the peak, activations {where}")
    console.print_line(f"disk    {found.disk / 1e6:,.1f} MB at the peak, of which {found.output / 1e6:,.1f} MB are the "
                       "output")
    if auto:
        console.print_line(f"bits    {auto}")


@contextmanager
def resumable(out: Path, progress: "ConsoleProgress") -> Iterator[None]:
    """A context in which SIGTERM acts like Ctrl-C; after an interruption it prints the command that resumes the job.

    Before the job has opened its journal, finished blocks in OUT.partial may be those of a job with other settings,
    which this command would not resume.
    """
    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except UsageError:  # the same command would fail again
        raise
    except BaseException:
        from gptq_belle.checkpoint.writer import partial_directory
        from gptq_belle.quantization.journal import finished_blocks

        if finished := finished_blocks(partial_directory(out.absolute())):
            kept = f"{count(finished, 'finished block')} {'is' if finished == 1 else 'are'} kept"
            console.note(f"{kept}. Resume with: {_this_command()}" if progress.blocks else
                         f"{kept} of an earlier job. The command of that job resumes it.", style=None)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _this_command() -> str:
    """The command line that resumes the job of this process."""
    program = Path(sys.argv[0])
    start = ["python", "-m", f"gptq_belle.{program.stem}"] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *(word for word in sys.argv[1:] if word != "--restart")])


def main() -> None:
    """Run this command alone, for `python -m gptq_belle.quantize`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(quantize)
    console.run(app)
