"""Options that several commands share, each defined once, and the loading of a model from them."""

import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gptq_belle.cli import console
from gptq_belle.errors import UsageError

if TYPE_CHECKING:
    from gptq_belle.engine.model import Model


advanced = partial(typer.Option, rich_help_panel="Advanced options")


def local(model: Path) -> Path:
    """The local path of a model: catalogue names and hub ids are downloaded, paths are returned unchanged."""
    if model.exists():
        return model
    from gptq_belle.checkpoint.hub import is_model_name, resolve_model_path

    return resolve_model_path(model) if is_model_name(model) else model


def optional_local(model: Path | None) -> Path | None:
    """`local` for an option that may be omitted."""
    return None if model is None else local(model)


def style_or_none(style: str) -> str | None:
    """The value of --prompt-style; None for auto."""
    return None if style == "auto" else style


def _use_threads(count: int | None) -> int | None:
    """Set the number of threads of torch and of the CPU kernels, also those of processes that this one starts."""
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
        import_engine()
        sys.modules["torch"].set_num_threads(count)
    return count


# of every command
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Device = Annotated[str, typer.Option("--device", help="Device: auto, cpu, cuda or cuda:N.", show_default=True)]
UnusedDevice = Annotated[str, typer.Option("--device", hidden=True)]  # accepted by commands that run on no device
Verbose = Annotated[bool, typer.Option("--verbose", "-v", callback=console.set_verbose,
                                       help="Print the traceback of an error too.")]

# of commands that write a model
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it holds a finished model.")]

# how a model is loaded
ModelPath = Annotated[Path, typer.Argument(
    metavar="PATH", help="Model directory, quantized or not; a hub id; or a name listed by `models`.")]
Precision = Annotated[Literal["exact", "fast"] | None, advanced(
    help="exact: float32, with 16-bit activations for packed weights on a CPU. fast: 8-bit activations on a CPU, "
         "float16 on a GPU. Default: exact on a CPU, fast on a GPU.")]
HeadBits = Annotated[int | None, advanced(
    help="Bits of the lm_head, and of the embedding if the two are tied: 16, 8 or 4. Default: 8 if tied and quantized, "
         "else 16.")]
Cache = Annotated[Literal["float16", "float32", "bfloat16", "int8"], advanced(help="Data type of the KV cache.")]
Threads = Annotated[int | None, advanced("--threads", "-t", help="Number of CPU threads. Default: one per core.",
                                         min=1, show_default=False, callback=_use_threads)]
ContextSize = Annotated[int | None, typer.Option(
    "--ctx-size", "-c", help="Limit of prompt and answer tokens together. Default: the model's context.", min=2,
    show_default=False)]


def _parse_group_size(text: str) -> int | str:
    """Parse --group-size; raises typer.BadParameter with the choices."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor auto: choose 32, 64, 128, -1 or auto") from None


GroupSize = Annotated[Any, typer.Option(
    "--group-size", "--groupsize", metavar="SIZE", parser=_parse_group_size,
    help="Group size: 32, 64, 128, -1 for one group per output channel, or auto for the largest of these that fits "
    "the model.")]

# prompts and sampling
PromptStyle = Annotated[Literal["auto", "bloom", "llama", "newline", "none"], advanced(
    "--prompt-style", help="Prompt format; auto is the checkpoint's chat template, else its style, and none continues "
    "the text.")]
ChatStyle = Annotated[Literal["auto", "bloom", "llama", "newline"], advanced(
    "--prompt-style", help="Prompt format; auto is the checkpoint's chat template, else its style.")]
WrittenStyle = Annotated[Literal["auto", "bloom", "llama", "newline"], advanced(
    "--prompt-style", help="Chat template to write; auto keeps the source's, or uses the architecture's default. Chats "
    "of the calibration data are rendered alike.")]
MaxTokens = Annotated[int | None, typer.Option(help="Maximum number of new tokens. Default: up to 512.", min=1)]
Temperature = Annotated[float, typer.Option(help="Sampling temperature. 0 means greedy decoding.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling: the most likely tokens with this total probability.")]
TopK = Annotated[int, typer.Option(help="Sample from the k most likely tokens (0 disables the limit).")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1, repeated tokens become less likely.")]
PresencePenalty = Annotated[float, advanced(
    help="Subtracted from the logits of tokens that the answer already contains, from -2 to 2.")]
FrequencyPenalty = Annotated[float, advanced(
    help="The same, multiplied by how often the answer contains the token.")]
MinTokens = Annotated[int, advanced(help="Minimum number of new tokens.", min=0)]
Seed = Annotated[int | None, typer.Option(help="Random seed for sampling. Default: a new one.", show_default=False)]

# evaluation
WindowTokens = Annotated[int, typer.Option("--window", help="Tokens per window.", min=2)]
TextLimit = Annotated[int | None, typer.Option("--limit", help="Use only the first N tokens of the text.", min=2,
                                               show_default=False)]
TEST_HELP = "JSONL rows with class, question and std_answer."
PerClass = Annotated[int | None, typer.Option(help="Use only the first N questions of each class.", min=1)]
AnswerTokens = Annotated[int, typer.Option("--max-tokens", help="Maximum number of tokens per answer.", min=1)]
QuestionBatch = Annotated[int, typer.Option("--batch", help="Number of questions answered at a time.", min=1)]
AllowOverlap = Annotated[bool, typer.Option("--allow-overlap", help="Accept text that the model was calibrated on.")]


def check_output(out: Path, overwrite: bool) -> None:
    """Raise UsageError for an output directory with a finished model, which cost a job of hours."""
    if not overwrite and (out / "quantize_config.json").is_file():
        raise UsageError(f"{out} exists and holds a quantized model",
                         "Choose another output, or add --overwrite to replace it when the new one is finished.")


def note_unused(context: typer.Context, why: str, *names: str) -> None:
    """Say which of these options were given, in one line: they have no effect.

    Args:
        context: of the command.
        why: such as "with --method rtn".
        names: parameters of the command.
    """
    given = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        console.note(f"No effect {why}: {flags}.", style=None)


def note_unused_sampling(context: typer.Context, temperature: float) -> None:
    """Say which sampling options were given that greedy decoding does not use."""
    if temperature == 0:
        note_unused(context, "at temperature 0 (greedy decoding)", "top_p", "top_k", "seed")


def import_engine(module: str = "engine.model") -> None:
    """Import a module of the library and with it PyTorch, which takes seconds, with a progress line on stderr."""
    if "torch" in sys.modules:
        return
    with console.show_step("importing PyTorch"):
        import_module(f"gptq_belle.{module}")


def check_engine_options(device: str, precision: str | None = None, head_bits: int | None = None,
                         cache: str = "float16") -> None:
    """Check the options of a run before its model is looked for.

    Raises:
        UsageError: a value that is not allowed.
        HardwareError: this machine has no such device.
    """
    import_engine()
    from gptq_belle.common.devices import resolve_device, resolve_precision
    from gptq_belle.engine.kv_cache import check_cache_dtype
    from gptq_belle.engine.lm_head import check_head_bits

    resolve_precision(precision, resolve_device(device))
    check_head_bits(head_bits)
    check_cache_dtype(cache)


def load_model(path: Path, device: str, precision: str | None, head_bits: int | None = None,
               cache: str = "float16", context: int | None = None) -> "Model":
    """Load a model with a progress bar on stderr; raises the errors of `gptq_belle.load`."""
    from gptq_belle.engine.model import load

    with console.progress_bar(f"loading {path}") as progress:
        model = load(path, device=device, precision=precision, head_bits=head_bits, cache=cache, context=context,
                     progress=progress)
    if precision == "fast" and model.quantization is None and model.device.type == "cpu":
        console.note("No effect on a model that is not quantized, on a CPU: --precision fast.", style=None)
    return model


def load_generator(path: Path, device: str, precision: str | None, head_bits: int | None, cache: str,
                   context: int | None) -> "Model":
    """`load_model` for generating text: on a GPU, the kernels are compiled too, with a progress bar on stderr; on a
    CPU, one line if there are no native kernels."""
    from gptq_belle.kernels.native_library import load_library

    model = load_model(path, device, precision, head_bits, cache, context)
    if model.device.type != "cpu":
        with console.progress_bar("compiling GPU kernels") as progress:
            model.warm_up(1, model.prefill_chunk, progress)
    elif isinstance(reason := load_library(), str):
        console.note(f"Slower than this machine allows: {reason}.", style=None)
    return model
