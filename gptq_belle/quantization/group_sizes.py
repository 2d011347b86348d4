"""Which group sizes fit the linears of a model."""

from collections.abc import Iterable

from gptq_belle.errors import UsageError
from gptq_belle.quantization.config import GROUP_SIZES


def fitting_group_sizes(inputs: Iterable[int]) -> list[int]:
    """The group sizes that divide all of these numbers of inputs, the largest first; the last is -1, which fits any."""
    widths = set(inputs)
    return [size for size in GROUP_SIZES if size == -1 or not any(width % size for width in widths)]


def group_size_error(size: int, inputs: int, name: str, fitting: list[int]) -> UsageError:
    """The refusal of a group size that does not divide the inputs of the linear `name`; `fitting` are allowed."""
    return UsageError(f"group size {size} does not divide the {inputs} inputs of {name}",
                      f"Choose auto, which means {fitting[0]} here, or one of {', '.join(map(str, fitting))}; -1 is "
                      "one group per output channel.")
