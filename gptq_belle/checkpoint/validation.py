"""What would keep a model from loading or answering well, from headers and small tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_belle.checkpoint.packed_reader import PARTS, check_packed_linear
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.errors import GptqBelleError
from gptq_belle.formats.packed_lm_head import HEAD_CODES, HEAD_SCALES
from gptq_belle.formats.packing import unpack_rows
from gptq_belle.formats.quantize_config import Quantization
from gptq_belle.formats.zero_points import V1
from gptq_belle.models.architectures import COMPUTED_SUFFIXES, LM_HEAD

MANY = 5  # problems of one kind that are named; the rest is counted


def problems(reader: CheckpointReader, model: nn.Module, quantization: Quantization | None, tied: bool) -> list[str]:
    """Everything that is wrong with a directory; empty for a sound one.

    Args:
        reader: the directory.
        model: the empty model that its config.json describes.
        quantization: what the configuration states of it.
        tied: the head is the embedding.
    """
    config: Any = model.config
    return [*_first_few(_missing(reader, model, tied)), *_first_few(_packed(reader, model, quantization)),
            *_first_few(_unknown(reader, model)), *_of_tokenizer(reader.path, config.vocab_size)]


def is_act_ordered(reader: CheckpointReader) -> bool:
    """Whether the group index of a packed linear is really out of order; one of another form is not looked at."""
    names = (f"{name}.g_idx" for name in reader.packed_linear_names)
    found = (reader.tensor(name) for name in names
             if name in reader and reader.dtype(name) in (torch.int32, torch.int64) and len(reader.shape(name)) == 1)
    return any(bool((g_idx[1:] < g_idx[:-1]).any()) for g_idx in found)


def _missing(reader: CheckpointReader, model: nn.Module, tied: bool) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        packed = leaf == "weight" and reader.is_packed(module)
        if packed and f"{module}.qweight" not in reader:
            yield f"tensor {module}.qweight is missing"
        packed |= HEAD_CODES in reader and module == (reader.arch.modules_before[0] if tied else LM_HEAD)
        if name not in reader and not packed and not (module == LM_HEAD and tied):
            yield f"tensor {name} is missing"
        elif name in reader and (reader.shape(name) != tuple(parameter.shape) or
                                 not reader.dtype(name).is_floating_point):
            yield (f"tensor {name} is {reader.dtype(name)} {reader.shape(name)}, config.json needs floating point "
                   f"{tuple(parameter.shape)}")


def _unknown(reader: CheckpointReader, model: nn.Module) -> Iterator[str]:
    """What loading refuses: tensors that the model has no place for."""
    known = {name for name, _ in model.named_parameters()} | {f"{LM_HEAD}.weight", HEAD_CODES, HEAD_SCALES}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            known.update(f"{name}.{part}" for part in PARTS)
    yield from (f"the model has no place for tensor {name}" for name in reader
                if name not in known and not name.endswith(COMPUTED_SUFFIXES))


def _packed(reader: CheckpointReader, model: nn.Module, quantization: Quantization | None) -> Iterator[str]:
    names = reader.packed_linear_names
    if names and quantization is None:
        yield f"{len(names)} packed linears, but no configuration says how they are packed"
    if quantization is None:
        return
    if not names:
        yield "the configuration says GPTQ, but nothing is packed"
        return
    for name in names:
        try:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            own = check_packed_linear(reader, quantization, name, linear.in_features, linear.out_features)
        except (GptqBelleError, AttributeError, AssertionError) as error:
            yield error.cause if isinstance(error, GptqBelleError) else f"the model has no linear {name}"
            continue
        yield from _values(own, reader, name)


def _values(stated: Quantization, reader: CheckpointReader, name: str) -> Iterator[str]:
    """Problems in the small tensors of one packed linear of the right shapes."""
    scales = reader.tensor(f"{name}.scales")
    if not torch.isfinite(scales).all():
        yield f"{name}: scales hold NaN or infinity"
    if f"{name}.g_idx" in reader:
        g_idx = reader.tensor(f"{name}.g_idx")
        if len(g_idx) == 0 or int(g_idx.min()) < 0 or int(g_idx.max()) >= len(scales):
            yield f"{name}: g_idx names groups outside of 0..{len(scales) - 1}"
    elif stated.desc_act:
        yield f"{name}: the configuration says act-order, but there is no g_idx"
    zeros = unpack_rows(reader.tensor(f"{name}.qzeros").t(), stated.bits).int() + stated.zero_offset
    middle = 1 << (stated.bits - 1)
    if stated.sym and bool((zeros != middle).any()):
        other = "gptq_v2" if stated.checkpoint_format == V1 else "gptq (v1)"
        off_by_one = bool((zeros == middle + (1 if stated.checkpoint_format == V1 else -1)).all())
        yield f"{name}: zero points are not the {middle} of symmetric weights" + (
            f"; they would be under format {other}, so the file is probably labelled wrongly" if off_by_one else "")


def _of_tokenizer(path: Path, vocabulary: int) -> list[str]:
    try:
        tokenizer = load_tokenizer(path)
    except GptqBelleError as error:
        return [error.cause]
    if len(tokenizer) > vocabulary:
        return [f"the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary}"]
    return []


def _first_few(every: Iterator[str]) -> list[str]:
    """The first few, and how many more there are."""
    found = list(every)
    return found[:MANY] + ([f"... and {len(found) - MANY} more like these"] if len(found) > MANY else [])
