"""The verbs `convert` and `decrypt`."""

from pathlib import Path
from typing import Annotated

import typer

from gptq_belle.cli import console
from gptq_belle.cli.options import WrittenStyle, chosen, optional_local


def decrypt(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The download: a directory, one .enc file, or a name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write to.")],
    key: Annotated[Path, typer.Option(help="Meta's consolidated.00.pth of the first LLaMA, 7B (for 13B, too).")],
    encrypt: Annotated[bool, typer.Option("--encrypt", help="The inverse: make .enc files to publish.")] = False,
    device: Annotated[str, typer.Option(hidden=True)] = "auto",  # every verb takes it
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Decrypt BELLE-LLaMA's .enc files, and print MD5 and SHA-256 for comparison with the published ones.

    After Ctrl-C, a crash or a power cut, the same command goes on where it was.
    """
    from gptq_belle.checkpoint import decryption
    from gptq_belle.checkpoint.hub import DECRYPTABLE, is_name, model_directory

    if is_name(source):
        source = model_directory(source, DECRYPTABLE)
    job = decryption.encrypt if encrypt else decryption.decrypt
    with console.counting("encrypting" if encrypt else "decrypting", is_bytes=True) as progress:
        found = job(source, out, key, progress=progress)
    if as_json:
        console.print_json(found)
        return
    console.print_table(str(out), ["file", "", "MD5 of the plain file", "SHA-256", "bytes"],
                        [(row.name, row.how, row.md5, row.sha256, f"{row.bytes:,}") for row in found], text=4)


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A .pt file of BELLE or GPTQ-for-LLaMa, a folder that "
                                           "holds one, or a directory of AutoGPTQ or GPTQModel.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; appears only when complete.")],
    base: Annotated[Path | None, typer.Option(
        callback=optional_local, show_default=False,
        help="Directory with config.json and tokenizer, where they are not beside the weights.")] = None,
    checkpoint_format: Annotated[str | None, typer.Option(
        "--format", help="gptq (zero points minus one) or gptq_v2; left out, gptq for symmetric weights and gptq_v2 "
        "for others.", show_default=False)] = None,
    repair_zeros: Annotated[bool, typer.Option("--repair-zeros", help="Write 0 for the zero points that old packers "
                                               "wrapped.")] = False,
    prompt_style: WrittenStyle = "auto",
    device: Annotated[str, typer.Option(hidden=True)] = "auto",  # every verb takes it
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Bring an old or another tool's quantized checkpoint into the standard form; codes stay as they are, bit for bit.

    Bits and groups are read from the tensors. What was written is read back and compared with the source.
    """
    from gptq_belle.checkpoint import conversion, conversion_check
    from gptq_belle.checkpoint.hub import CONVERTIBLE, is_name, model_directory

    if is_name(source):
        source = model_directory(source, CONVERTIBLE)
    with console.counting("converting") as progress:
        found = conversion.convert(source, out, base=base, checkpoint_format=checkpoint_format,
                                   repair_zeros=repair_zeros, prompt_style=chosen(prompt_style), progress=progress)
    if as_json:
        console.print_json(found)
    else:
        console.print_table(str(out), ["", ""], conversion_check.lines(found), text=2)
