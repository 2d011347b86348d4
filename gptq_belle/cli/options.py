"""Options that several verbs share, and the loading that they lead to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_belle.cli import console

if TYPE_CHECKING:
    from gptq_belle.engine.model import Model


def local(model: Path) -> Path:
    """Where a model is on this machine: names of the family and hub ids are downloaded; anything else stays as it is.
    """
    if model.exists():
        return model
    from gptq_belle.checkpoint.hub import is_name, model_directory

    return model_directory(model) if is_name(model) else model


def chosen(style: str) -> str | None:
    """What --prompt-style names; None for auto."""
    return None if style == "auto" else style


def optional_local(model: Path | None) -> Path | None:
    """The same for an option that may be left out."""
    return None if model is None else local(model)


ModelPath = Annotated[Path, typer.Argument(metavar="PATH", callback=local,
                                           help="Model directory, quantized or not; a hub id; a name of `models`.")]
Precision = Annotated[str | None, typer.Option(
    help="exact: float32; on a CPU, 16 bits of each activation meet packed weights. fast: 8 bits there, float16 on a "
         "GPU. Left out: exact on a CPU, fast on a GPU.")]
Style = Annotated[str, typer.Option(help="auto, bloom, llama, newline, or none: the text as it is.")]
ChatStyle = Annotated[str, typer.Option("--prompt-style", help="auto, bloom, llama or newline.")]
WrittenStyle = Annotated[str, typer.Option(
    "--prompt-style", help="Write the chat template of bloom, llama or newline; auto keeps the source's, or takes what "
    "suits the architecture.")]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens of an answer, at most; left out, up to 512.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")]
TopK = Annotated[int, typer.Option(help="Draw from the so many likeliest tokens; 0 from all.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1, repeated tokens become less likely.")]
Seed = Annotated[int | None, typer.Option(help="Of the draw.", show_default=False)]
HeadBits = Annotated[int | None, typer.Option(
    help="16, 8 or 4: of the head, and of the embedding where it is the same. Left out, 8 in that case, else 16.")]
Cache = Annotated[str, typer.Option(help="Of keys and values: float16, float32, bfloat16 or int8.")]


def load_model(path: Path, device: str, precision: str | None, head_bits: int | None = None,
               cache: str = "float16") -> "Model":
    """Load a model, and say so on stderr; raises what `gptq_belle.load` raises."""
    with console.step(f"loading {path}"):
        from gptq_belle.engine.model import load

        return load(path, device=device, precision=precision, head_bits=head_bits, cache=cache)
