"""Quantized checkpoints as they are found: pickled state dictionaries of BELLE and GPTQ-for-LLaMa, which say nothing
about themselves, and directories of AutoGPTQ and GPTQModel.

K = in_features, N = out_features, G = groups. A state dictionary holds ``qweight`` (K * bits / 32, N), ``qzeros`` (G,
N * bits / 32) minus one, ``scales`` (G, N) and ``bias`` (N) of each linear (github.com/qwopqwop200/GPTQ-for-LLaMa,
quant.py); bits and groups follow from the shapes, once config.json has told K.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import nn

from gptq_belle.checkpoint.packed_reader import check_packed_linear, read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader, needs_conversion, read_json, weight_files
from gptq_belle.errors import InputError, UsageError
from gptq_belle.formats.quantize_config import BITS, Quantization
from gptq_belle.formats.zero_points import V1

POWERS_OF_TWO = tuple(1 << power for power in range(4, 16))
BASE = "Name a directory with config.json and tokenizer of the model: --base DIR."
STATE_DICT, DIRECTORY = "state dictionary", "GPTQ directory"


class QuantizedCheckpoint(NamedTuple):
    """A quantized checkpoint of any kind.

    Attributes:
        reader: its configuration and its tensors.
        kind: "state dictionary" or "GPTQ directory".
        folder: where the tokenizer is.
    """

    reader: CheckpointReader
    kind: str
    folder: Path


def open_quantized(path: Path, base: Path | None = None) -> QuantizedCheckpoint:
    """Open a weight file, or a directory that holds one, or a GPTQ directory.

    Args:
        path: what was found.
        base: a directory with config.json and tokenizer; left out, they are looked for beside the weights.
    Raises:
        InputError: no weights or no config.json there, or damaged files. UsageError: several .pt files.
    """
    if path.suffix == ".enc" and (early := needs_conversion(path)):
        raise early
    if path.is_file():
        weights, kind = [path], DIRECTORY if _states_quantization(path) else STATE_DICT
    elif states := sorted(path.glob("*.pt")):
        if len(states) > 1:
            raise UsageError(f"{path} holds {len(states)} checkpoints: {', '.join(state.name for state in states)}",
                             "Name the one that you want.")
        weights, kind = states, STATE_DICT
    elif path.is_dir():
        weights, kind = weight_files(path), DIRECTORY
    else:
        raise InputError(f"{path} is not there", "Give a .pt file, or a directory with a quantized model.")
    if base is not None and not base.is_dir():
        raise InputError(f"the base {base} is no folder", BASE)
    beside = path if path.is_dir() else path.parent
    configured = beside if kind == DIRECTORY else base or beside  # a directory's config.json says how it is packed
    if not (configured / "config.json").is_file():
        raise InputError(f"there is no config.json {f'beside {weights[0]}' if base is None else f'in {base}'}", BASE)
    return QuantizedCheckpoint(CheckpointReader(configured, weights), kind, base or beside)


def _states_quantization(file: Path) -> bool:
    """Whether a weight file is a GPTQ directory's: what stands beside it says how it is packed, v1 or v2. A .pt file is
    older than such statements."""
    config = file.parent / "config.json"
    return file.suffix in (".safetensors", ".bin") and (
        (file.parent / "quantize_config.json").is_file()
        or (config.is_file() and "quantization_config" in read_json(config)))


def packed_linears(reader: CheckpointReader, model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The quantized linears of a checkpoint, as modules of the (empty) model.

    Raises:
        InputError: none at all, or one that the model does not have.
    """
    names = reader.packed_linear_names
    if not names:
        older = any(name.endswith(".zeros") for name in reader)
        raise InputError(f"{reader.path} holds no qweight tensors" + (
            ", but zeros tensors: 3-bit weights of before March 2023" if older else ": nothing is quantized"),
                         "Quantize the full-precision model instead: gptq-belle quantize.")
    modules = dict(model.named_modules())
    for name in names:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise InputError(f"the model of config.json has no linear {name}", "config.json belongs to other weights.")
        yield name, linear


def find_quantization(source: QuantizedCheckpoint, model: nn.Module) -> Quantization:
    """How a checkpoint is packed: as its directory states, or by the shapes of its tensors; every linear is checked.

    Raises:
        InputError: shapes that fit no bits and group size, or that disagree with each other or with what is stated; a
            linear that is packed although it is stated not to be.
    """
    reader = source.reader
    linears = list(packed_linears(reader, model))
    stated = read_quantization(reader) if source.kind == DIRECTORY else None
    found = stated or _derived(reader, linears)
    for name, linear in linears:
        check_packed_linear(reader, found, name, linear.in_features, linear.out_features)
    return found


def _derived(reader: CheckpointReader, linears: list[tuple[str, nn.Linear]]) -> Quantization:
    name, linear = linears[0]
    bits = 32 * reader.shape(f"{name}.qweight")[0] / linear.in_features
    if bits not in BITS:
        raise InputError(f"{name} has {reader.shape(f'{name}.qweight')[0]} rows of words for {linear.in_features} "
                         f"inputs: {bits:g} bits",
                         "config.json belongs to another model: name the right one, --base DIR.")
    sizes = [(linear.in_features, reader.shape(f"{name}.scales")[0]) for name, linear in linears]
    return Quantization(int(bits), _group_size(sizes), None, False, V1, "")


def _group_size(sizes: list[tuple[int, int]]) -> int:
    """The group size that gives every linear of (K, G) its G groups; -1 where each is one group.

    Raises:
        InputError: there is none.
    """
    if all(groups == 1 for _, groups in sizes):
        return -1
    exact = [inputs // groups for inputs, groups in sizes if groups > 1 and inputs % groups == 0]
    for size in (*exact[:1], *POWERS_OF_TWO):
        if all(-(-inputs // size) == groups for inputs, groups in sizes):
            return size
    raise InputError(f"no group size fits all linears: {sizes[0][1]} groups for {sizes[0][0]} inputs in the first",
                     "The checkpoint mixes group sizes, or config.json belongs to another model.")
