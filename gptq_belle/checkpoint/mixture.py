"""How many bits the linears of a checkpoint have where they differ, from the files' headers alone."""

import math
from collections import Counter

from gptq_belle.checkpoint.quantization import Quantization
from gptq_belle.checkpoint.reader import CheckpointReader


def average_bits(reader: CheckpointReader, quantization: Quantization) -> float | None:
    """Bits a weight of the blocks' linears on average, scales and zero points not counted, those that are not packed
    with the bits of their type (headers only); None where nothing is packed."""
    bits = weights = 0
    for name in reader:
        stem, _, leaf = name.rpartition(".")
        if leaf == "qweight" and (own := quantization.of(stem)) is not None:
            bits += 32 * math.prod(reader.shape(name))
            weights += 32 * math.prod(reader.shape(name)) // own.bits
        elif leaf == "weight" and stem.endswith(reader.arch.linears):
            bits += 8 * reader.nbytes(name)
            weights += math.prod(reader.shape(name))
    return bits / weights if weights else None


def mixture(reader: CheckpointReader, quantization: Quantization) -> dict[str, dict[str, int]]:
    """How many linears of a kind have which settings, {"mlp.down_proj": {"4 bits": 2}}; empty where all have the same.

    Raises:
        InputError: see `Quantization.of`.
    """
    kinds: dict[str, Counter[str]] = {name: Counter() for name in reader.arch.linears}
    for name in reader:
        stem, _, leaf = name.rpartition(".")
        kind = next((kind for kind in kinds if stem.endswith(f".{kind}")), None)
        if kind is not None and leaf == "qweight":
            own = quantization.of(stem) or quantization
            group = "" if own.group_size == quantization.group_size else f", group size {own.group_size}"
            kinds[kind][f"{own.bits} bits{group}"] += 1
        elif kind is not None and leaf == "weight":
            kinds[kind][str(reader.dtype(name)).removeprefix("torch.")] += 1
    settings = {text for counts in kinds.values() for text in counts}
    return {kind: dict(counts) for kind, counts in kinds.items()} if len(settings) > 1 else {}
