"""Convert quantized checkpoints of other tools to a standard GPTQ directory.

Codes are copied bit for bit; all other tensors are written in float16. One block is in memory at a time. The output is
read back and compared with the source before the directory gets its final name.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gptq_belle import __version__
from gptq_belle.checkpoint.config_files import GENERATION, corrected_token_ids, write_configuration
from gptq_belle.checkpoint.conversion_report import ConversionReport, largest_deviation
from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.checkpoint.model_card import converted_card
from gptq_belle.checkpoint.packed_reader import linear_quantization, raw_quantization_config, read_packed_linear
from gptq_belle.checkpoint.quantized_checkpoint import (
    STATE_DICT,
    QuantizedCheckpoint,
    find_quantization,
    open_quantized,
    packed_linears,
)
from gptq_belle.checkpoint.reader import read_json
from gptq_belle.checkpoint.source_model import SourceModel
from gptq_belle.checkpoint.tokenizer_files import copy_tokenizer, load_tokenizer
from gptq_belle.checkpoint.validation import check_model, is_act_ordered
from gptq_belle.checkpoint.writer import CheckpointWriter, check_output_directory
from gptq_belle.errors import GptqBelleError, UsageError
from gptq_belle.formats.quantize_config import Quantization
from gptq_belle.formats.zero_points import (
    V1,
    V2,
    choose_checkpoint_format,
    count_zero_points,
    pack_zeros,
    repair_wrapped_zeros,
    unpack_zeros,
)
from gptq_belle.models.architectures import LM_HEAD
from gptq_belle.prompts.conversation import chat_format
from gptq_belle.prompts.styles import set_prompt_style

Progress = Callable[[int, int], None]

KEPT_KEYS = ("damp_percent", "static_groups", "true_sequential", "dynamic")  # copied from the source's configuration


class _Conversion(NamedTuple):
    """State of one conversion."""

    source: QuantizedCheckpoint  # the checkpoint to convert
    model: SourceModel  # its tensors, and the empty model of its config.json
    quantization: Quantization  # how the source is packed
    linears: dict[str, nn.Linear]  # modules of the packed linears, by name
    repair_zeros: bool  # whether zero points that wrapped around are written as 0
    report: ConversionReport  # filled during the conversion


def convert(source: str | Path, out: str | Path, *, base: str | Path | None = None,
            checkpoint_format: str | None = None, repair_zeros: bool = False, prompt_style: str | None = None,
            progress: Progress = lambda done, total: None) -> ConversionReport:
    """Convert a legacy checkpoint, or a directory of another tool, to a standard GPTQ directory.

    Args:
        source: a .pt (or .safetensors) file, a directory that contains one, or a GPTQ directory.
        out: output directory.
        base: directory with config.json and tokenizer; default: the directory of the weights.
        checkpoint_format: "gptq" or "gptq_v2". Default: gptq for symmetric weights and gptq_v2 for asymmetric ones;
            files with wrapped zero points keep gptq unless `repair_zeros` is set.
        repair_zeros: write 0 for zero points that wrapped around.
        prompt_style: "bloom", "llama" or "newline", written as the chat template. Default: the source's template, else
            the usual style of the architecture.
        progress: progress callback, called with the number of completed and of all steps.
    Raises:
        InputError: a damaged or malicious source, a config.json that does not match the tensors, values beyond float16,
            or zero points that the format cannot represent.
        UsageError: `out` exists and was not written by gptq_belle, an unknown format or style, or several checkpoints
            in one directory.
        GptqBelleError: the written weights differ from the source; all output is removed.
    """
    start = time.perf_counter()
    if checkpoint_format not in (None, V1, V2):
        raise UsageError(f"format {checkpoint_format!r} is not known", f"Choose {V1} or {V2}.")
    check_output_directory(Path(out))
    conversion = _prepare(open_quantized(Path(source), None if base is None else Path(base)), Path(source), Path(out),
                          checkpoint_format, repair_zeros)
    checkpoint, report, blocks = conversion.source, conversion.report, conversion.model.count
    config = checkpoint.reader.config
    set_prompt_style(config, prompt_style)
    tokenizer = load_tokenizer(checkpoint.folder)
    chat_format(config, tokenizer)  # refuses a chat template that cannot be used
    with CheckpointWriter(out) as writer:
        _write_tensors_outside_blocks(conversion, writer)
        for index in range(blocks):
            writer.add(f"block-{index:05d}.safetensors", _converted_block(conversion, index))
            progress(index + 1, 2 * blocks)
        writer.merge()
        quantization_config = _quantization_config(conversion)
        if checkpoint.kind == STATE_DICT:
            report.corrected_ids = corrected_token_ids(config, tokenizer)
        write_configuration(writer, config | report.corrected_ids, quantization_config, tied=report.tied)
        copy_tokenizer(writer, checkpoint.folder, tokenizer, config)
        _correct_generation_config(checkpoint, writer, tokenizer)
        writer.write_text("README.md", converted_card(Path(source), config["model_type"], quantization_config))
        _verify(conversion, writer.files, lambda done: progress(blocks + done, 2 * blocks))
        report.bytes_written = sum(file.stat().st_size for file in writer.files.glob("*.safetensors"))
        writer.publish()
    report.seconds = time.perf_counter() - start
    return report


def _prepare(source: QuantizedCheckpoint, path: Path, out: Path, checkpoint_format: str | None,
             repair_zeros: bool) -> _Conversion:
    """Check the source's headers and zero points before any weight is read."""
    model = SourceModel(source.reader, torch.device("cpu"))
    found = find_quantization(source, model.model)
    linears = dict(packed_linears(source.reader, model.model))
    check_model(source.reader, found)
    each = {name: linear_quantization(source.reader, found, name) for name in linears}
    zeros = count_zero_points(
        (unpack_zeros(source.reader.tensor(f"{name}.qzeros"), own.bits, found.checkpoint_format), own.bits)
        for name, own in each.items())
    report = ConversionReport(
        path, out, source.described, source.reader.config["model_type"], len(linears), found.bits, found.group_size,
        zeros.symmetric, is_act_ordered(source.reader), found.checkpoint_format,
        choose_checkpoint_format(zeros, checkpoint_format, repair=repair_zeros), zeros.wrapped, zeros.overwritten,
        zeros.wrapped if repair_zeros else 0,
        mixed=sum((own.bits, own.group_size) != (found.bits, found.group_size) for own in each.values()),
        tied=model.tied(), bytes_read=source.reader.bytes_on_disk())
    return _Conversion(source, model, found, linears, repair_zeros, report)


def _correct_generation_config(source: QuantizedCheckpoint, writer: CheckpointWriter,
                               tokenizer: PreTrainedTokenizerBase) -> None:
    path = source.folder / GENERATION
    stated = read_json(path) if source.kind == STATE_DICT and path.is_file() else {}
    if changed := corrected_token_ids(stated, tokenizer):
        writer.write_json(GENERATION, stated | changed)


def _write_tensors_outside_blocks(conversion: _Conversion, writer: CheckpointWriter) -> None:
    """Write embeddings, norms and lm_head in float16, some rows at a time; a tied lm_head is not written again.

    A packed lm_head stays packed.
    """
    model = conversion.model
    if LM_HEAD in conversion.linears:
        writer.add("packed-head.safetensors", _converted_linear(conversion, LM_HEAD))
    for number, name in enumerate(model.tensors_outside_blocks()):
        rows: Iterable[Tensor] = (model.float16(name, chunk) for chunk in model.reader.chunks(name))
        writer.add_rows(f"outside-blocks-{number}.safetensors", name, model.shape(name), rows)


def _converted_block(conversion: _Conversion, index: int) -> dict[str, Tensor]:
    """All tensors of one block in the output's format."""
    model = conversion.model
    root = f"{model.arch.blocks}.{index}"
    tensors: dict[str, Tensor] = {}
    for name, module in model.blocks.get_submodule(str(index)).named_modules():
        path = f"{root}.{name}"
        if path in conversion.linears:
            tensors |= _converted_linear(conversion, path)
            continue
        for leaf, _ in module.named_parameters(recurse=False):
            full = f"{path}.{leaf}"
            model.shape(full)
            tensors[full] = model.float16(full, model.reader.tensor(full))
    return tensors


def _converted_linear(conversion: _Conversion, name: str) -> dict[str, Tensor]:
    """One packed linear: qweight unchanged, zero points in the output's format, scales and bias in float16."""
    model, linear, report = conversion.model, conversion.linears[name], conversion.report
    reader, read_format = model.reader, conversion.quantization.checkpoint_format
    packed = read_packed_linear(reader, conversion.quantization, name, linear.in_features, linear.out_features)
    scales = model.float16(f"{name}.scales", packed.scales)
    report.vanished_scales += int(((scales == 0) & (packed.scales != 0)).sum())
    qzeros = packed.qzeros
    if conversion.repair_zeros or report.written_format != read_format:
        zeros = unpack_zeros(qzeros, packed.bits, read_format)
        zeros = repair_wrapped_zeros(zeros, packed.bits) if conversion.repair_zeros else zeros
        qzeros = pack_zeros(zeros, packed.bits, report.written_format)
    tensors = {f"{name}.qweight": packed.qweight, f"{name}.qzeros": qzeros, f"{name}.scales": scales,
               f"{name}.g_idx": packed.g_idx}
    if f"{name}.bias" in reader:
        bias = model.float16(f"{name}.bias", reader.tensor(f"{name}.bias"))
        if linear.bias is not None:
            tensors[f"{name}.bias"] = bias
        else:
            report.dropped_biases += 1
    return tensors


def _quantization_config(conversion: _Conversion) -> dict[str, Any]:
    """The output's quantization_config: the source's, corrected by what the tensors contain."""
    source, report = conversion.source, conversion.report
    stated = raw_quantization_config(source.reader) if source.kind != STATE_DICT else None
    meta = (stated or {}).get("meta")
    kept = {key: value for key, value in (stated or {}).items() if key in KEPT_KEYS}
    return kept | {
        "quant_method": "gptq", "bits": report.bits, "group_size": report.group_size, "desc_act": report.act_order,
        "sym": report.symmetric, "checkpoint_format": report.written_format, "format": report.written_format,
        "pack_dtype": "int32", "lm_head": LM_HEAD in conversion.linears,
        "meta": {"quantizer": [f"gptq_belle:{__version__}"], "converted_from": report.kind,
                 **({} if meta is None else {"source": meta})},
    }


def _verify(conversion: _Conversion, files: Path, progress: Callable[[int], None]) -> None:
    """Compare the written weights with the source.

    Raises:
        GptqBelleError: the output does not load, or a weight differs.
    """
    if problems := inspect(files).problems:
        raise GptqBelleError(f"the converted directory is not valid: {problems[0]}",
                             "The files were removed. The source may be damaged; otherwise report this.")
    conversion.report.deviation = largest_deviation(
        conversion.source.reader, files, conversion.quantization, conversion.linears, conversion.repair_zeros, progress)
