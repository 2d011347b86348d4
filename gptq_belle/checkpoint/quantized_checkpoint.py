"""Open quantized checkpoints of other tools, and find their quantization settings.

Directories of AutoGPTQ, GPTQModel, auto-round, llm-compressor and AutoAWQ state their settings. The pickled state
dictionaries of BELLE and GPTQ-for-LLaMa do not: they contain ``qweight`` (K * bits / 32, N), ``qzeros`` (G, N * bits /
32) minus one, ``scales`` (G, N) and ``bias`` (N) of each linear (github.com/qwopqwop200/GPTQ-for-LLaMa, quant.py),
where K = in_features according to config.json, N = out_features and G = groups. Bits and group size follow from these
shapes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import nn

from gptq_belle.checkpoint.packed_reader import check_packed_linear, read_quantization
from gptq_belle.checkpoint.reader import CheckpointReader, read_json, unconverted_checkpoint_error, weight_files
from gptq_belle.errors import InputError, UsageError
from gptq_belle.formats.foreign_config import METHODS
from gptq_belle.formats.quantize_config import BITS, Quantization
from gptq_belle.formats.zero_points import V1

POWERS_OF_TWO = tuple(1 << power for power in range(4, 16))
NEEDS_BASE = "Give a directory with config.json and tokenizer of the model: --base DIR."
STATE_DICT, DIRECTORY = "state dictionary", "GPTQ directory"


class QuantizedCheckpoint(NamedTuple):
    """A quantized checkpoint of any kind."""

    reader: CheckpointReader  # its configuration and tensors
    kind: str  # "state dictionary" or "GPTQ directory"
    folder: Path  # directory of the tokenizer

    @property
    def described(self) -> str:
        """The kind for a report, which names the method of a directory."""
        stated = self.reader.config.get("quantization_config") or {}
        return self.kind if self.kind == STATE_DICT else f"{METHODS[stated.get('quant_method', 'gptq')]} directory"


def open_quantized(path: Path, base: Path | None = None) -> QuantizedCheckpoint:
    """Open a weight file, a directory that contains one, or a directory that states its quantization.

    Args:
        base: directory with config.json and tokenizer; default: the directory of the weights.
    Raises:
        InputError: weights or config.json are missing or damaged.
        UsageError: the directory contains several .pt files.
    """
    if path.suffix == ".enc" and (error := unconverted_checkpoint_error(path)):
        raise error
    if path.is_file():
        weights, kind = [path], DIRECTORY if _states_quantization(path) else STATE_DICT
    elif states := sorted(path.glob("*.pt")):
        if len(states) > 1:
            raise UsageError(f"{path} contains {len(states)} checkpoints: {', '.join(state.name for state in states)}",
                             "Give the path of one of them.")
        weights, kind = states, STATE_DICT
    elif path.is_dir():
        weights, kind = weight_files(path), DIRECTORY
    else:
        raise InputError(f"{path} does not exist", "Give a .pt file, or a directory with a quantized model.")
    if base is not None and not base.is_dir():
        raise InputError(f"the base {base} is not a directory", NEEDS_BASE)
    folder = path if path.is_dir() else path.parent
    configured = folder if kind == DIRECTORY else base or folder  # a directory's config.json has the settings
    if not (configured / "config.json").is_file():
        raise InputError(f"there is no config.json {f'next to {weights[0]}' if base is None else f'in {base}'}",
                         NEEDS_BASE)
    return QuantizedCheckpoint(CheckpointReader(configured, weights), kind, base or folder)


def _states_quantization(file: Path) -> bool:
    """Whether a weight file belongs to a GPTQ directory that states its settings; never true for .pt files."""
    config = file.parent / "config.json"
    return file.suffix in (".safetensors", ".bin") and (
        (file.parent / "quantize_config.json").is_file()
        or (config.is_file() and read_json(config).get("quantization_config") is not None))


def packed_linears(reader: CheckpointReader, model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield names and modules (of the empty model) of the packed linears of a checkpoint.

    Raises:
        InputError: there are none, or the model does not have one of them.
    """
    names = reader.packed_linear_names
    if not names:
        older = any(name.endswith(".zeros") for name in reader)
        raise InputError(f"{reader.path} contains no qweight tensors" + (
            ", but zeros tensors: 3-bit weights in the format before March 2023" if older else ": it is not quantized"),
                         "Quantize the full-precision model instead: gptq-belle quantize.")
    modules = dict(model.named_modules())
    for name in names:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise InputError(f"the model of config.json has no linear {name}", "config.json belongs to other weights.")
        yield name, linear


def find_quantization(source: QuantizedCheckpoint, model: nn.Module) -> Quantization:
    """Find the quantization settings of a checkpoint, stated or derived from the shapes, and check every linear.

    Raises:
        InputError: the shapes match no bits and group size, or contradict each other or the stated settings; or a
            linear is packed that the settings exclude.
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
                         "config.json belongs to another model: give the right one with --base DIR.")
    sizes = [(linear.in_features, reader.shape(f"{name}.scales")[0]) for name, linear in linears]
    return Quantization(int(bits), _group_size(sizes), None, False, V1, "")


def _group_size(sizes: list[tuple[int, int]]) -> int:
    """Find the group size that gives every linear (K, G) its G groups; -1 if every linear has one group.

    Raises:
        InputError: no group size does.
    """
    if all(groups == 1 for _, groups in sizes):
        return -1
    exact = [inputs // groups for inputs, groups in sizes if groups > 1 and inputs % groups == 0]
    for size in (*exact[:1], *POWERS_OF_TWO):
        if all(-(-inputs // size) == groups for inputs, groups in sizes):
            return size
    raise InputError(f"no group size matches all linears: {sizes[0][1]} groups for {sizes[0][0]} inputs in the first",
                     "The checkpoint mixes group sizes, or config.json belongs to another model.")
