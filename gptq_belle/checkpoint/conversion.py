"""Convert a quantized checkpoint of any kind into a standard directory: codes bit for bit, the rest in float16.

One block is in memory at a time; what was written is read back and held against the source before it appears.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gptq_belle import __version__
from gptq_belle.checkpoint.config_files import corrected_token_ids, write_configuration
from gptq_belle.checkpoint.conversion_check import Conversion, largest_deviation
from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.checkpoint.model_card import converted_card
from gptq_belle.checkpoint.packed_reader import PARTS, linear_quantization, read_packed, stated_quantization
from gptq_belle.checkpoint.quantized_checkpoint import (
    STATE,
    QuantizedCheckpoint,
    open_quantized,
    packed_linears,
    quantization_of,
)
from gptq_belle.checkpoint.reader import read_json
from gptq_belle.checkpoint.source_model import SourceModel
from gptq_belle.checkpoint.tokenizer_files import GENERATION, copy_tokenizer, load_tokenizer
from gptq_belle.checkpoint.validation import is_act_ordered
from gptq_belle.checkpoint.writer import CheckpointWriter, check_output
from gptq_belle.errors import GptqBelleError, InputError, UsageError
from gptq_belle.formats.quantize_config import Quantization
from gptq_belle.formats.zero_points import (
    V1,
    V2,
    ZeroPointCounts,
    choose_format,
    count_zero_points,
    read_zeros,
    repaired,
    write_zeros,
)
from gptq_belle.models.architectures import COMPUTED, HEAD
from gptq_belle.prompts.styles import choose_style

Progress = Callable[[int, int], None]

KEPT = ("damp_percent", "static_groups", "true_sequential", "dynamic")  # of what the source states


class _Job(NamedTuple):
    source: QuantizedCheckpoint
    model: SourceModel
    packed: Quantization
    linears: dict[str, nn.Linear]
    zeros: ZeroPointCounts
    repair: bool
    report: Conversion


def convert(source: str | Path, out: str | Path, *, base: str | Path | None = None,
            checkpoint_format: str | None = None, repair_zeros: bool = False, prompt_style: str | None = None,
            progress: Progress = lambda done, total: None) -> Conversion:
    """Write a standard GPTQ directory of a legacy checkpoint, or of another tool's directory.

    Args:
        source: a .pt (or .safetensors) file, a directory that holds one, or a GPTQ directory.
        out: the directory to write.
        base: where config.json and tokenizer are, if not beside the weights.
        checkpoint_format: "gptq" or "gptq_v2"; left out, gptq for symmetric weights and gptq_v2 for others, except
            where zero points were wrapped: such a file stays as it is.
        repair_zeros: write 0 for wrapped zero points.
        prompt_style: "bloom", "llama" or "newline", to be written as the chat template; left out, the source's template
            or what suits its architecture.
        progress: called with steps done and in all.
    Raises:
        InputError: a damaged or hostile source, one that fits no configuration, values beyond float16, zero points that
            the format cannot hold.
        UsageError: `out` exists and is not ours, an unknown format or style, several checkpoints in one folder.
        GptqBelleError: what was read back is not what was to be written; nothing is left behind then.
    """
    began = time.perf_counter()
    if checkpoint_format not in (None, V1, V2):
        raise UsageError(f"format {checkpoint_format!r} is not known", f"Choose {V1} or {V2}.")
    check_output(Path(out))
    job = _set_up(open_quantized(Path(source), None if base is None else Path(base)), Path(source), Path(out),
                  checkpoint_format, repair_zeros)
    choose_style(job.source.reader.config, prompt_style)
    tokenizer = load_tokenizer(job.source.folder)
    total = 2 * job.model.count
    with CheckpointWriter(out) as writer:
        _write_unquantized(job, writer)
        for index in range(job.model.count):
            writer.add(f"block-{index:05d}.safetensors", _block(job, index))
            progress(index + 1, total)
        writer.merge()
        model, settings = job.source.reader.config, _settings(job)
        if job.source.kind == STATE:
            job.report.mended_ids = corrected_token_ids(model, tokenizer)
        write_configuration(writer, model | job.report.mended_ids, settings, tied=job.report.tied)
        copy_tokenizer(writer, job.source.folder, tokenizer, model)
        _correct_generation_config(job, writer, tokenizer)
        writer.write_text("README.md", converted_card(Path(source), model["model_type"], settings))
        _read_back(job, writer.files, lambda index: progress(job.model.count + index, total))
        job.report.bytes_written = sum(file.stat().st_size for file in writer.files.glob("*.safetensors"))
        writer.publish()
    job.report.seconds = time.perf_counter() - began
    return job.report


def _set_up(source: QuantizedCheckpoint, path: Path, out: Path, asked: str | None, repair: bool) -> _Job:
    """Everything that can be known before a weight is read."""
    model = SourceModel(source.reader, torch.device("cpu"))
    packed = quantization_of(source, model.model)
    linears = dict(packed_linears(source.reader, model.model))
    _check_unknown_tensors(source, model, linears)
    read = packed.checkpoint_format
    own = {name: linear_quantization(source.reader, packed, name) for name in linears}
    zeros = count_zero_points((read_zeros(source.reader.tensor(f"{name}.qzeros"), each.bits, read), each.bits)
                   for name, each in own.items())
    report = Conversion(
        path, out, source.kind, source.reader.config["model_type"], len(linears), packed.bits, packed.group_size,
        zeros.symmetric, is_act_ordered(source.reader), read,
        choose_format(zeros, asked, repair=repair), zeros.wrapped, zeros.overwritten, zeros.wrapped if repair else 0,
        mixed=sum((each.bits, each.group_size) != (packed.bits, packed.group_size) for each in own.values()),
        tied=model.tied(), bytes_read=source.reader.bytes_on_disk())
    return _Job(source, model, packed, linears, zeros, repair, report)


def _correct_generation_config(job: _Job, writer: CheckpointWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    path = job.source.folder / GENERATION
    stated = read_json(path) if job.source.kind == STATE and path.is_file() else {}
    if changed := corrected_token_ids(stated, tokenizer):
        writer.write_json(GENERATION, stated | changed)


def _write_unquantized(job: _Job, writer: CheckpointWriter) -> None:
    """What stands outside of the blocks, in float16 and some rows at a time; a tied head not again."""
    model = job.model
    for number, name in enumerate(model.tensors_outside_blocks()):
        rows: Iterable[Tensor] = (model.float16(name, chunk) for chunk in model.reader.chunks(name))
        writer.add_rows(f"rest-{number}.safetensors", name, model.shape(name), rows)


def _block(job: _Job, index: int) -> dict[str, Tensor]:
    """All tensors of one block as they are to be written."""
    root = f"{job.model.arch.blocks}.{index}"
    tensors: dict[str, Tensor] = {}
    for name, module in job.model.blocks.get_submodule(str(index)).named_modules():
        path = f"{root}.{name}"
        if path in job.linears:
            tensors |= _linear(job, path)
            continue
        for leaf, _ in module.named_parameters(recurse=False):
            full = f"{path}.{leaf}"
            job.model.shape(full)
            tensors[full] = job.model.float16(full, job.source.reader.tensor(full))
    return tensors


def _linear(job: _Job, name: str) -> dict[str, Tensor]:
    """One packed linear: words of codes as they are, zero points in the format to be written, the rest in float16."""
    reader, linear, report = job.source.reader, job.linears[name], job.report
    words = read_packed(reader, job.packed, name, linear.in_features, linear.out_features)
    scales = job.model.float16(f"{name}.scales", words.scales)
    report.vanished_scales += int(((scales == 0) & (words.scales != 0)).sum())
    qzeros = words.qzeros
    if job.repair or report.written_format != job.packed.checkpoint_format:
        zeros = read_zeros(qzeros, words.bits, job.packed.checkpoint_format)
        zeros = repaired(zeros, words.bits) if job.repair else zeros
        qzeros = write_zeros(zeros, words.bits, report.written_format)
    tensors = {f"{name}.qweight": words.qweight, f"{name}.qzeros": qzeros, f"{name}.scales": scales,
               f"{name}.g_idx": words.g_idx}
    if f"{name}.bias" in reader:
        bias = job.model.float16(f"{name}.bias", reader.tensor(f"{name}.bias"))
        if linear.bias is not None or bool(bias.any()):
            tensors[f"{name}.bias"] = bias
        else:
            report.dropped_biases += 1
    elif linear.bias is not None:
        raise InputError(f"{reader.path} lacks the tensor {name}.bias", "The file is incomplete: fetch it again.")
    return tensors


def _check_unknown_tensors(source: QuantizedCheckpoint, model: SourceModel, linears: dict[str, nn.Linear]) -> None:
    known = {f"{name}.{part}" for name in linears for part in PARTS} | {f"{HEAD}.weight"}
    known |= {name for name, _ in model.model.named_parameters()}
    extra = [name for name in source.reader if name not in known and not name.endswith(COMPUTED)]
    if extra:
        raise InputError(f"{source.reader.path}: {len(extra)} tensors that the model has no place for, such as "
                         f"{extra[0]}", "config.json belongs to another model, or the kind is unsupported.")


def _settings(job: _Job) -> dict[str, Any]:
    """The quantization_config: what the source states, with what was found in the tensors put right."""
    stated = stated_quantization(job.source.reader) if job.source.kind != STATE else None
    report, before = job.report, (stated or {}).get("meta")
    kept = {key: value for key, value in (stated or {}).items() if key in KEPT}
    return kept | {
        "quant_method": "gptq", "bits": report.bits, "group_size": report.group_size, "desc_act": report.act_order,
        "sym": report.symmetric, "checkpoint_format": report.written_format, "format": report.written_format,
        "pack_dtype": "int32", "lm_head": False,
        "meta": {"quantizer": [f"gptq_belle:{__version__}"], "converted_from": report.kind,
                 **({} if before is None else {"source": before})},
    }


def _read_back(job: _Job, files: Path, step: Callable[[int], None]) -> None:
    """Hold what was written against the source.

    Raises:
        GptqBelleError: it does not load, or a weight is another one.
    """
    if problems := inspect(files).problems:
        raise GptqBelleError(f"the converted directory is not sound: {problems[0]}",
                             "The files were removed. The source may be damaged; if not, report it.")
    job.report.deviation = largest_deviation(job.source.reader, files, job.packed, job.linears,
                                             job.repair, step)
