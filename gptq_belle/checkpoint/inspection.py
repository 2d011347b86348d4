"""`inspect`: describe a model directory from its headers, and list its problems, for which every value is read once."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gptq_belle.checkpoint.packed_reader import read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.checkpoint.validation import is_act_ordered, list_problems
from gptq_belle.errors import GptqBelleError, InputError
from gptq_belle.formats.packed_lm_head import HEAD_CODES, HEAD_SCALES
from gptq_belle.formats.quantize_config import Quantization
from gptq_belle.models.architectures import LM_HEAD
from gptq_belle.models.decoder_config import read_decoder_config
from gptq_belle.models.dimensions import Dimensions, dimensions
from gptq_belle.prompts.styles import detect_style

PACKED = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(slots=True)
class Part:
    """Tensors of one kind: their number, their bytes in the file, and the number of parameters that they store."""

    tensors: int = 0
    bytes: int = 0
    parameters: int = 0


@dataclass(slots=True)
class Inspection:
    """Description of a model directory.

    Attributes:
        architecture, blocks, hidden_size, vocabulary, context: from config.json; context is None if not stated.
        decoder: "native", or "transformers" where its forward pass runs the model.
        parameters: number of parameters; a packed weight counts as the weights that it stores.
        dtypes: number of tensors by dtype in the file.
        quantization: the stated quantization; None for a full-precision model.
        average_bits: average bits per weight of the blocks' linears; None if nothing is packed.
        mixture: number of linears per kind and setting, if settings differ: {"mlp.down_proj": {"4 bits": 2}}.
        act_order: whether any group index is out of order; None if nothing is packed.
        tied: whether the lm_head is the embedding.
        bytes: size of the weight files.
        parts: tensors by kind.
        prompt_style: the style that `generate` chooses.
        problems: everything that keeps the model from loading or from answering well; empty for a sound one.
    """

    path: Path
    architecture: str
    blocks: int = 0
    hidden_size: int = 0
    vocabulary: int = 0
    context: int | None = None
    decoder: str = ""
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
    """Describe a model directory, quantized or not.

    Raises:
        InputError: there is no directory, config.json or weight file to describe.
    """
    reader = CheckpointReader(path)
    found = Inspection(reader.path, str(reader.config["model_type"]), bytes=reader.bytes_on_disk())
    try:
        found.quantization = read_quantization(reader)
        found.prompt_style = detect_style(reader.config, _template(reader.path))
        d = _dimensions(reader)
        found.blocks, found.hidden_size, found.vocabulary = d.num_layers, d.hidden_size, d.vocab_size
        found.context, found.tied = d.context, d.tied
        found.decoder = "native" if d.arch.family.native else "transformers"
        _describe_tensors(found, reader)
        if found.quantization is not None:
            found.average_bits = average_bits(reader, found.quantization)
            found.mixture = mixture(reader, found.quantization)
            found.act_order = is_act_ordered(reader) if reader.packed_linear_names else None
    except GptqBelleError as error:
        found.problems.append(error.cause)
        return found
    found.problems += list_problems(reader, found.quantization)
    return found


def _dimensions(reader: CheckpointReader) -> Dimensions:
    """The sizes of a model; what keeps transformers from building it is refused for the reason that `load` names."""
    try:
        return dimensions(reader.config)
    except InputError:
        read_decoder_config(reader.config)
        raise


def summary_rows(found: Inspection) -> list[tuple[str, str]]:
    """Format an inspection, without its problems, as (name, value) pairs."""
    q = found.quantization
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(found.dtypes.items()))
    rows = [
        ("architecture", f"{found.architecture}, {found.blocks} blocks, hidden size {found.hidden_size}"),
        ("vocabulary", f"{found.vocabulary} tokens, head {'tied to the embeddings' if found.tied else 'separate'}"),
        ("context", f"{found.context} tokens" if found.context else "no limit in the configuration"),
        ("decoder", {"": "unknown", "native": "native", "transformers": "transformers' forward pass with packed "
                     "linears; one sequence at a time"}[found.decoder]),
        ("parameters", f"{found.parameters:,}"),
        ("prompt style", found.prompt_style),
    ]
    if q is None:
        rows.append(("quantization", "none"))
    else:
        group = "one per output channel" if q.group_size == -1 else str(q.group_size)
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


def average_bits(reader: CheckpointReader, quantization: Quantization) -> float | None:
    """Average bits per weight of the blocks' linears without scales and zero points; None if there are no linears.

    A linear that is not packed counts with the bits of its dtype.
    """
    bits = weights = 0
    for name in reader:
        stem, _, leaf = name.rpartition(".")
        if leaf == "qweight" and (own := quantization.for_linear(stem)) is not None:
            bits += 32 * math.prod(reader.shape(name))
            weights += 32 * math.prod(reader.shape(name)) // own.bits
        elif leaf == "weight" and stem.endswith(reader.arch.linears):
            bits += 8 * reader.nbytes(name)
            weights += math.prod(reader.shape(name))
    return bits / weights if weights else None


def mixture(reader: CheckpointReader, quantization: Quantization) -> dict[str, dict[str, int]]:
    """Number of linears per kind and setting, {"mlp.down_proj": {"4 bits": 2}}; empty if all have the same setting.

    Raises:
        InputError: see `Quantization.for_linear`.
    """
    kinds: dict[str, Counter[str]] = {name: Counter() for name in reader.arch.linears}
    for name in reader:
        stem, _, leaf = name.rpartition(".")
        kind = next((kind for kind in kinds if stem.endswith(f".{kind}")), None)
        if kind is not None and leaf == "qweight":
            own = quantization.for_linear(stem) or quantization
            group = "" if own.group_size == quantization.group_size else f", group size {own.group_size}"
            kinds[kind][f"{own.bits} bits{group}"] += 1
        elif kind is not None and leaf == "weight":
            kinds[kind][str(reader.dtype(name)).removeprefix("torch.")] += 1
    settings = {text for counts in kinds.values() for text in counts}
    return {kind: dict(counts) for kind, counts in kinds.items()} if len(settings) > 1 else {}


def _describe_tensors(found: Inspection, reader: CheckpointReader) -> None:
    dtypes: Counter[str] = Counter()
    for name in reader:
        shape, dtype = reader.shape(name), reader.dtype(name)
        kind, leaf = _part(name, reader), name.rsplit(".", 1)[-1]
        part = found.parts.setdefault(kind, Part())
        part.tensors += 1
        part.bytes += reader.nbytes(name)
        if leaf == "qweight" and found.quantization:
            part.parameters += math.prod(shape) * 32 // (found.quantization.for_linear(name.removesuffix(".qweight"))
                                                         or found.quantization).bits
        elif leaf not in PACKED:
            part.parameters += math.prod(shape)
        dtypes[str(dtype).removeprefix("torch.")] += 1
    found.parameters = sum(part.parameters for part in found.parts.values())
    found.dtypes = dict(dtypes)


def _mixture(found: Inspection) -> Iterator[tuple[str, str]]:
    """Lines for linears with different settings."""
    if found.mixture:
        yield "bits on average", f"{found.average_bits:.2f}"
    for kind, counts in found.mixture.items():
        yield f"  {kind}", "; ".join(f"{count} of {text}" for text, count in sorted(counts.items()))


def _part(name: str, reader: CheckpointReader) -> str:
    module, _, leaf = name.rpartition(".")
    if name in (HEAD_CODES, HEAD_SCALES):
        return "packed head"
    if leaf in PACKED:
        return {"qweight": "packed weights", "g_idx": "group indices"}.get(leaf, "scales and zero points")
    if module == LM_HEAD:
        return "head"
    if module == reader.arch.modules_before[0]:
        return "embeddings"
    linear = leaf == "weight" and module.endswith(reader.arch.linears)
    return "unpacked linears" if linear else "norms and biases"


def _template(path: Path) -> str | None:
    """The chat template of the directory; None without template or tokenizer."""
    try:
        return getattr(load_tokenizer(path), "chat_template", None)
    except GptqBelleError:
        return None
