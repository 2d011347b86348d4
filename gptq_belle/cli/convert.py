"""The commands `convert` and `decrypt`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gptq_belle.cli import console, options


def decrypt(
    source: Annotated[Path, typer.Argument(
        metavar="SRC", help="Downloaded directory, one .enc file, or a name listed by `models`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output directory.")],
    key: Annotated[Path, typer.Option(help="Meta's consolidated.00.pth of LLaMA-7B, version 1 (also for 13B).")],
    encrypt: Annotated[bool, typer.Option("--encrypt", help="Encrypt instead: write .enc files.")] = False,
    device: options.UnusedDevice = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Decrypt BELLE-LLaMA's .enc files, and show MD5 and SHA-256 to compare with the published ones.

    An interrupted job resumes with the same command.
    """
    options.import_engine("checkpoint.decryption")
    from gptq_belle.checkpoint import decryption
    from gptq_belle.checkpoint.hub import DECRYPTABLE, is_model_name, resolve_model_path

    if is_model_name(source):
        source = resolve_model_path(source, DECRYPTABLE)
    job = decryption.encrypt if encrypt else decryption.decrypt
    with console.progress_bar("encrypting" if encrypt else "decrypting", is_bytes=True) as progress:
        found = job(source, out, key, progress=progress)
    console.print_result(found, as_json, str(out), ["file", "", "MD5 of the plain file", "SHA-256", "bytes"],
                         [(row.name, row.how, row.md5, row.sha256, f"{row.bytes:,}") for row in found], text=4)


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A .pt file of BELLE or GPTQ-for-LLaMa, a folder that "
                                           "contains one, or a directory of AutoGPTQ, GPTQModel, auto-round, "
                                           "llm-compressor (pack-quantized) or AutoAWQ (gemm).")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output directory; it appears only when complete.")],
    base: Annotated[Path | None, typer.Option(
        show_default=False,
        help="Directory with config.json and tokenizer, if they are not beside the weights.")] = None,
    checkpoint_format: Annotated[Literal["gptq", "gptq_v2"] | None, typer.Option(
        "--format", help="Checkpoint format; gptq stores zero points minus one. Default: gptq for symmetric weights, "
        "else gptq_v2.", show_default=False)] = None,
    repair_zeros: Annotated[bool, typer.Option("--repair-zeros", help="Restore zero points of 0 that old packers "
                                               "wrapped around.")] = False,
    prompt_style: options.WrittenStyle = "auto",
    overwrite: options.Overwrite = False,
    device: options.UnusedDevice = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Convert an old or another tool's quantized checkpoint to the standard format; codes are kept bit for bit.

    Bits and group size are read from the tensors. The output is read back and compared with the source.
    """
    options.check_output(out, overwrite)
    options.import_engine("checkpoint.conversion")
    from gptq_belle.checkpoint import conversion, conversion_report
    from gptq_belle.checkpoint.hub import CONVERTIBLE, is_model_name, resolve_model_path

    if is_model_name(source):
        source = resolve_model_path(source, CONVERTIBLE)
    with console.progress_bar("converting") as progress:
        found = conversion.convert(source, out, base=options.optional_local(base), checkpoint_format=checkpoint_format,
                                   repair_zeros=repair_zeros, prompt_style=options.style_or_none(prompt_style),
                                   progress=progress)
    console.print_result(found, as_json, str(out), ["", ""], conversion_report.summary_rows(found))
