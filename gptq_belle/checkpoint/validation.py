"""Validate a model directory before any work: what its configuration and its tensors must be for every command.

`quantize`, `convert`, `load` and `serve` raise the first problem that `inspect` lists. `check_model` reads headers and
small tensors only; `list_problems` and `quantize` read every value once.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from gptq_belle.checkpoint.config_files import GENERATION, read_generation_config
from gptq_belle.checkpoint.empty_model import empty_model
from gptq_belle.checkpoint.packed_reader import PARTS, check_packed_linear, packed_lm_head_bits
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.checkpoint.source_model import FLOATS
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.checkpoint.weight_values import packed_value_problems, weight_value_problems
from gptq_belle.errors import GptqBelleError, InputError
from gptq_belle.formats.packed_lm_head import HEAD_CODES, HEAD_SCALES
from gptq_belle.formats.quantize_config import Quantization
from gptq_belle.models.architectures import COMPUTED_SUFFIXES, LM_HEAD
from gptq_belle.models.decoder_config import check_token_ids, read_decoder_config
from gptq_belle.models.dimensions import Dimensions, LinearShape
from gptq_belle.prompts.conversation import chat_format

MAX_PER_KIND = 5  # problems of one kind that `inspect` names; the others are counted
INCOMPLETE = "A shard is missing, or config.json belongs to another model: fetch the directory again."
WRONG_MODEL = "config.json belongs to another model, or the file is damaged: fetch the directory again."


def check_model(reader: CheckpointReader, quantization: Quantization | None) -> list[str]:
    """Check everything that loading, quantizing or converting a directory relies on, from headers alone.

    Args:
        quantization: how its packed linears are quantized; None if there are none.
    Returns:
        Names of the tensors that the model does not need and that may be ignored.
    Raises:
        InputError: the first problem. The tensor or key is named.
    """
    d = _checked_dimensions(reader)
    for problem in (*_tensor_problems(reader, d), *_packed_problems(reader, d, quantization),
                    *_generation_problems(reader.path, d)):
        raise problem
    return _ignorable(reader, d)


def list_problems(reader: CheckpointReader, quantization: Quantization | None) -> list[str]:
    """Everything that keeps a directory from loading or from answering well; empty for a sound one.

    Beyond `check_model` this includes the values of scales, zero points and group indices, the tokenizer, and linears
    of a full-precision model that cannot be packed.
    """
    try:
        d = _checked_dimensions(reader)
    except InputError as error:
        return [error.cause]
    kinds = (_tensor_problems(reader, d), _packed_problems(reader, d, quantization),
             _generation_problems(reader.path, d), packed_value_problems(reader, _packable(reader, d), quantization),
             weight_value_problems(reader, half=quantization is None), _tokenizer_problems(reader),
             size_problems(d.arch.shapes) if quantization is None else iter(()))
    return [text for kind in kinds for text in _shortened(kind)]


def _checked_dimensions(reader: CheckpointReader) -> Dimensions:
    """The sizes of a model whose configuration this program and transformers both understand."""
    found = read_decoder_config(reader.config)
    check_token_ids(reader.config, found.dimensions.vocab_size, f"{reader.path}: config.json's")
    empty_model(reader.path)  # transformers checks the types of more keys; 0.1 s
    return found.dimensions


def is_act_ordered(reader: CheckpointReader) -> bool:
    """Whether the group index of any packed linear is out of order."""
    names = (f"{name}.g_idx" for name in reader.packed_linear_names)
    found = (reader.tensor(name) for name in names
             if name in reader and reader.dtype(name) in (torch.int32, torch.int64) and len(reader.shape(name)) == 1)
    return any(bool((g_idx[1:] < g_idx[:-1]).any()) for g_idx in found)


def size_problems(linears: Mapping[str, LinearShape]) -> Iterator[InputError]:
    """Linears that the GPTQ format cannot hold, because their codes do not fill whole 32-bit words."""
    for name, (k, n) in linears.items():
        if k % 32 or n % 32:
            yield InputError(f"{name} has {k} inputs and {n} outputs, and packing needs multiples of 32",
                             f"Leave it unquantized: --override '{name}=skip'.")


def _linears(d: Dimensions) -> dict[str, LinearShape]:
    """(K, N) of all linears of all blocks by full name."""
    blocks = d.arch.blocks
    return {f"{blocks}.{index}.{name}": shape for index in range(d.num_layers)
            for name, shape in d.arch.shapes.items()}


def _packable(reader: CheckpointReader, d: Dimensions) -> dict[str, LinearShape]:
    """The linears of all blocks, and a packed lm_head."""
    head = {LM_HEAD: LinearShape(d.hidden_size, d.vocab_size)} if reader.is_packed(LM_HEAD) else {}
    return _linears(d) | head


def _parameters(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by full name, as in a checkpoint that is not quantized."""
    blocks = d.arch.blocks
    vectors = {f"{blocks}.{index}.{name}": shape for index in range(d.num_layers)
               for name, shape in d.arch.vectors.items()}
    weights = {f"{name}.weight": (shape.out_features, shape.in_features) for name, shape in _linears(d).items()}
    return {**d.arch.outer, **weights, **vectors}


def _tensor_problems(reader: CheckpointReader, d: Dimensions) -> Iterator[InputError]:
    """Parameters that are missing or have a wrong shape, and tensors that the model has no place for."""
    expected, linears = _parameters(d), _linears(d)
    packed = {f"{name}.weight" for name in (*linears, LM_HEAD) if reader.is_packed(name)}
    if HEAD_CODES in reader:
        packed.add(f"{reader.arch.modules_before[0] if d.tied else LM_HEAD}.weight")
    missing = [name for name in expected if name not in reader and name not in packed]
    if missing and (prefix := _wrapper_prefix(reader, missing[0])):
        yield InputError(f"{reader.path}: names of tensors begin with {prefix!r}, which a training program added",
                         "Save the unwrapped model (for peft: merge_and_unload), or remove the prefix from the names.")
        return
    for name in missing:
        yield InputError(f"{reader.path} lacks the tensor {name}", INCOMPLETE if name != f"{LM_HEAD}.weight" else
                         "A shard is missing, or the lm_head is the embedding: then set tie_word_embeddings to true in "
                         "config.json.")
    for name, shape in expected.items():
        if name in reader and (reader.shape(name) != shape or reader.dtype(name) not in FLOATS):
            yield InputError(f"tensor {name} is {reader.dtype(name)} {reader.shape(name)}, config.json needs floating "
                             f"point {shape}", WRONG_MODEL)
    known = {f"{name}.{part}" for name in (*linears, LM_HEAD) for part in PARTS if part != "bias"}
    known |= {f"{LM_HEAD}.weight", HEAD_CODES, HEAD_SCALES}
    for name in sorted(packed & set(reader)):
        yield InputError(f"{reader.path} holds {name} both packed and in full", "Remove one of them.")
    for name in reader:
        if name not in expected and name not in known and not _is_ignorable(reader, linears, name):
            yield _unknown_tensor(reader, d, name)


def _unknown_tensor(reader: CheckpointReader, d: Dimensions, name: str) -> InputError:
    linear = _linears(d).get(name.removesuffix(".bias"))
    if linear is not None and reader.shape(name) != (linear.out_features,):
        return InputError(f"tensor {name} is {reader.dtype(name)} {reader.shape(name)}, expected "
                          f"{(linear.out_features,)}", WRONG_MODEL)
    if linear is not None:
        return InputError(f"{reader.path} holds the bias {name}, which config.json does not state",
                          "If the model was trained with it, set attention_bias or mlp_bias to true in config.json.")
    index = name.removeprefix(f"{reader.arch.blocks}.").partition(".")[0]
    if name.startswith(f"{reader.arch.blocks}.") and index.isdecimal() and int(index) >= d.num_layers:
        return InputError(f"{reader.path} holds {name}, but config.json states {d.num_layers} blocks", WRONG_MODEL)
    return InputError(f"{reader.path} holds the tensor {name}, for which the model has no place",
                      "The architecture is not supported, or the tensor is a leftover of training: remove it.")


def _wrapper_prefix(reader: CheckpointReader, missing: str) -> str | None:
    """The prefix that a training wrapper put before all names of tensors; None if there is none."""
    ending = missing.removeprefix(f"{reader.arch.prefix}.")
    wrapped = next((name for name in reader if name.endswith(f".{ending}")), None)
    if wrapped is None:
        return None
    # The reader puts the base model's own prefix before names that lack it.
    return wrapped.removesuffix(missing).removesuffix(ending).removeprefix(f"{reader.arch.prefix}.") or None


def _is_ignorable(reader: CheckpointReader, linears: Mapping[str, LinearShape], name: str) -> bool:
    """Whether the model gives the same answers without a tensor: a computed buffer, or a bias of zeros."""
    if name.endswith(COMPUTED_SUFFIXES):
        return True
    linear = linears.get(name.removesuffix(".bias"))
    return (linear is not None and name.endswith(".bias") and reader.shape(name) == (linear.out_features,)
            and not bool(reader.tensor(name).any()))


def _ignorable(reader: CheckpointReader, d: Dimensions) -> list[str]:
    expected, linears = _parameters(d), _linears(d)
    return [name for name in reader if name not in expected and _is_ignorable(reader, linears, name)]


def _packed_problems(reader: CheckpointReader, d: Dimensions,
                     quantization: Quantization | None) -> Iterator[InputError]:
    """Packed tensors that disagree with the configuration, or that it does not state."""
    try:
        packed_lm_head_bits(reader, d.vocab_size, d.hidden_size)
    except InputError as error:
        yield error
    packed = {name: shape for name, shape in _packable(reader, d).items() if reader.is_packed(name)}
    if quantization is not None and not packed.keys() - {LM_HEAD}:
        yield InputError(f"{reader.path}: the configuration says GPTQ, but no linear is packed",
                         "Remove quantization_config and quantize_config.json, or fetch the directory again.")
    for name, shape in packed.items():
        try:
            check_packed_linear(reader, quantization, name, *shape)
        except InputError as error:
            yield error


def _generation_problems(path: Path, d: Dimensions) -> Iterator[InputError]:
    """A generation_config.json that transformers cannot read, or whose eos the model cannot generate."""
    try:
        if (found := read_generation_config(path)) is not None:
            check_token_ids(found.to_dict(), d.vocab_size, f"{path / GENERATION}:")
    except InputError as error:
        yield error


def _tokenizer_problems(reader: CheckpointReader) -> Iterator[InputError]:
    try:
        chat_format(reader.config, load_tokenizer(reader.path))
    except GptqBelleError as error:
        yield InputError(error.cause, error.remedy)


def _shortened(problems: Iterator[InputError]) -> list[str]:
    """The causes of the first few problems, and how many more there are."""
    causes = [problem.cause for problem in problems]
    more = [f"... and {len(causes) - MAX_PER_KIND} more like these"] if len(causes) > MAX_PER_KIND else []
    return causes[:MAX_PER_KIND] + more
