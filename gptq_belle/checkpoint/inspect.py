"""What a model directory is, from its headers and its small tensors: the words of the weights stay unread."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_belle.checkpoint.directory import load_tokenizer
from gptq_belle.checkpoint.mixture import average_bits, mixture
from gptq_belle.checkpoint.packing import V1, unpack_rows
from gptq_belle.checkpoint.quantization import Quantization, check_geometry, read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.errors import GptqBelleError
from gptq_belle.models.registry import HEAD
from gptq_belle.models.skeleton import empty_model
from gptq_belle.runtime.chat import detect_style

PACKED = ("qweight", "qzeros", "scales", "g_idx")
CONTEXT_KEYS = ("max_position_embeddings", "seq_length", "n_positions")  # LLaMA's name, then BLOOM's
MANY = 5  # problems of one kind that are named; the rest is counted


@dataclass(slots=True)
class Part:
    """Tensors of one kind: how many, their bytes in the file, and the model's parameters that they hold."""

    tensors: int = 0
    bytes: int = 0
    parameters: int = 0


@dataclass(slots=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        path: the directory.
        architecture, blocks, hidden_size, vocabulary, context: from config.json; context is None where it says none.
        parameters: of the model, packed weights counted as the weights they stand for.
        dtypes: tensors by their type in the file.
        quantization: what the configuration states; None for a full-precision model.
        average_bits: a weight, over all linears of the blocks; None where nothing is packed.
        mixture: where linears differ, how many of a kind have which bits: {"mlp.down_proj": {"4 bits": 2}}.
        act_order: whether a group index is really out of order; None where nothing is packed.
        tied: the head is the embedding.
        bytes: size of the weight files.
        parts: tensors by kind.
        prompt_style: as `generate` would choose it.
        problems: what would keep the model from loading or answering well; empty for a sound one.
    """

    path: Path
    architecture: str
    blocks: int = 0
    hidden_size: int = 0
    vocabulary: int = 0
    context: int | None = None
    parameters: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    quantization: Quantization | None = None
    average_bits: float | None = None
    mixture: dict[str, dict[str, int]] = field(default_factory=dict)
    act_order: bool | None = None
    tied: bool = False
    bytes: int = 0
    parts: dict[str, Part] = field(default_factory=dict)
    prompt_style: str = ""
    problems: list[str] = field(default_factory=list)


def inspect(path: str | Path) -> Inspection:
    """Look into a model directory, quantized or not.

    Raises:
        InputError: so damaged that nothing can be said: no directory, config.json or weight files.
    """
    reader = CheckpointReader(path)
    found = Inspection(reader.path, str(reader.config["model_type"]), bytes=reader.bytes_on_disk())
    try:
        found.quantization = read_quantization(reader)
        found.prompt_style = detect_style(reader.config)
        model = empty_model(reader.path)
        _describe_config(found, model)
        _describe_tensors(found, reader)
        if found.quantization is not None:
            found.average_bits = average_bits(reader, found.quantization)
            found.mixture = mixture(reader, found.quantization)
    except GptqBelleError as error:
        found.problems.append(error.cause)
        return found
    found.problems += _few(_missing(found, reader, model))
    found.problems += _few(_packed_problems(found, reader, model))
    found.problems += _tokenizer_problems(reader.path, found.vocabulary)
    return found


def lines(found: Inspection) -> list[tuple[str, str]]:
    """What was found as (name, value) pairs for reading; the problems are not among them."""
    q = found.quantization
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(found.dtypes.items()))
    rows = [
        ("architecture", f"{found.architecture}, {found.blocks} blocks, hidden size {found.hidden_size}"),
        ("vocabulary", f"{found.vocabulary} tokens, head {'tied to the embeddings' if found.tied else 'of its own'}"),
        ("context", f"{found.context} tokens" if found.context else "no limit in the configuration"),
        ("parameters", f"{found.parameters:,}"),
        ("prompt style", found.prompt_style),
    ]
    if q is None:
        rows.append(("quantization", "none"))
    else:
        group = "a whole row" if q.group_size == -1 else str(q.group_size)
        order = {None: "unknown", True: "yes", False: "no"}
        rows += [
            ("quantization", f"{q.bits} bits, group size {group}, format {q.checkpoint_format}"),
            *_mixture(found),
            ("symmetric", order[q.sym]),
            ("act-order", order[found.act_order]),
            ("written by", q.producer or "unknown"),
        ]
    rows.append(("size on disk", f"{found.bytes / 1e6:,.2f} MB in {kinds} tensors"))
    share = max(1, sum(part.bytes for part in found.parts.values()))
    for name, part in sorted(found.parts.items(), key=lambda item: -item[1].bytes):
        rows.append((f"  {name}", f"{part.bytes / 1e6:,.2f} MB, {100 * part.bytes / share:.1f} %"))
    return rows


def _describe_config(found: Inspection, model: nn.Module) -> None:
    config: Any = model.config
    found.blocks, found.hidden_size = config.num_hidden_layers, config.hidden_size
    found.vocabulary = config.vocab_size
    found.context = next((limit for key in CONTEXT_KEYS if (limit := getattr(config, key, None))), None)
    found.tied = bool(config.tie_word_embeddings)


def _describe_tensors(found: Inspection, reader: CheckpointReader) -> None:
    dtypes: Counter[str] = Counter()
    for name in reader:
        shape, dtype = reader.shape(name), reader.dtype(name)
        kind, leaf = _part(name, reader), name.rsplit(".", 1)[-1]
        part = found.parts.setdefault(kind, Part())
        part.tensors += 1
        part.bytes += reader.nbytes(name)
        if leaf == "qweight" and found.quantization:
            part.parameters += math.prod(shape) * 32 // (found.quantization.of(name.removesuffix(".qweight"))
                                                         or found.quantization).bits
        elif leaf not in PACKED:
            part.parameters += math.prod(shape)
        dtypes[str(dtype).removeprefix("torch.")] += 1
    found.parameters = sum(part.parameters for part in found.parts.values())
    found.dtypes = dict(dtypes)


def _mixture(found: Inspection) -> Iterator[tuple[str, str]]:
    """Lines for linears that differ."""
    if found.mixture:
        yield "bits on average", f"{found.average_bits:.2f}"
    for kind, counts in found.mixture.items():
        yield f"  {kind}", "; ".join(f"{count} of {text}" for text, count in sorted(counts.items()))


def _part(name: str, reader: CheckpointReader) -> str:
    module, _, leaf = name.rpartition(".")
    if leaf in PACKED:
        return {"qweight": "packed weights", "g_idx": "group indices"}.get(leaf, "scales and zero points")
    if module == HEAD:
        return "head"
    if module == reader.arch.before[0]:
        return "embeddings"
    linear = leaf == "weight" and module.endswith(reader.arch.linears)
    return "unpacked linears" if linear else "norms and biases"


def _missing(found: Inspection, reader: CheckpointReader, model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        packed = leaf == "weight" and f"{module}.qweight" in reader
        if name not in reader and not packed and not (module == HEAD and found.tied):
            yield f"tensor {name} is missing"
        elif name in reader and (reader.shape(name) != tuple(parameter.shape) or
                                 not reader.dtype(name).is_floating_point):
            yield (f"tensor {name} is {reader.dtype(name)} {reader.shape(name)}, config.json needs floating point "
                   f"{tuple(parameter.shape)}")


def _packed_problems(found: Inspection, reader: CheckpointReader, model: nn.Module) -> Iterator[str]:
    names = [name.removesuffix(".qweight") for name in reader if name.endswith(".qweight")]
    if names and found.quantization is None:
        yield f"{len(names)} packed linears, but no configuration says how they are packed"
    if found.quantization is None:
        return
    if not names:
        yield "the configuration says GPTQ, but nothing is packed"
        return
    found.act_order = False
    for name in names:
        try:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            own = found.quantization.of(name)
            if own is None:
                yield f"{name}: packed, although dynamic leaves it unquantized"
                continue
            check_geometry(reader, name, own, linear.in_features, linear.out_features)
        except (GptqBelleError, AttributeError, AssertionError) as error:
            yield error.cause if isinstance(error, GptqBelleError) else f"the model has no linear {name}"
            continue
        yield from _values(found, own, reader, name)


def _values(found: Inspection, stated: Quantization, reader: CheckpointReader, name: str) -> Iterator[str]:
    """Problems in the small tensors of one packed linear of the right shapes."""
    scales = reader.tensor(f"{name}.scales")
    if not torch.isfinite(scales).all():
        yield f"{name}: scales hold NaN or infinity"
    if f"{name}.g_idx" in reader:
        g_idx = reader.tensor(f"{name}.g_idx")
        if len(g_idx) == 0 or int(g_idx.min()) < 0 or int(g_idx.max()) >= len(scales):
            yield f"{name}: g_idx names groups outside of 0..{len(scales) - 1}"
        elif bool((g_idx[1:] < g_idx[:-1]).any()):
            found.act_order = True
    elif stated.desc_act:
        yield f"{name}: the configuration says act-order, but there is no g_idx"
    zeros = unpack_rows(reader.tensor(f"{name}.qzeros").t(), stated.bits).int() + stated.zero_offset
    middle = 1 << (stated.bits - 1)
    if stated.sym and bool((zeros != middle).any()):
        other = "gptq_v2" if stated.checkpoint_format == V1 else "gptq (v1)"
        off_by_one = bool((zeros == middle + (1 if stated.checkpoint_format == V1 else -1)).all())
        yield f"{name}: zero points are not the {middle} of symmetric weights" + (
            f"; they would be under format {other}, so the file is probably labelled wrongly" if off_by_one else "")


def _tokenizer_problems(path: Path, vocabulary: int) -> list[str]:
    try:
        tokenizer = load_tokenizer(path)
    except GptqBelleError as error:
        return [error.cause]
    if len(tokenizer) > vocabulary:
        return [f"the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary}"]
    return []


def _few(problems: Iterator[str]) -> list[str]:
    """The first few, and how many more there are."""
    found = list(problems)
    return found[:MANY] + ([f"... and {len(found) - MANY} more like these"] if len(found) > MANY else [])
