"""`plan`: what a model takes in memory, from config.json alone: weights, head, keys and values, workspace.

Every function states its formula; K = inputs, N = outputs, T = tokens of context, B = sequences at a time. Nothing is
measured here: benchmarks/bench_plan.py holds the sums against what processes really take.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from gptq_belle.errors import UsageError
from gptq_belle.models.architectures import architecture
from gptq_belle.models.dimensions import Dimensions, dimensions, linear_shapes, outer_shapes, vector_shapes

FULL = 16  # "bits" of what is not packed
BITS = (FULL, 8, 4)
CHUNK, QUERIES, KV_HEADS = 192, 64, 4  # of the engine: tokens of a prompt read at a time, and what meets keys at a time
COLUMNS = {"cpu": 32, "cuda": 128}  # outputs are padded to multiples of these
CONTAINERS = {2: {"cpu": 2, "cuda": 4}, 3: {"cpu": 4, "cuda": 4}, 4: {"cpu": 4, "cuda": 4}, 8: {"cpu": 8, "cuda": 8}}
PROGRAM = {"cpu": 270_000_000, "cuda": 0}  # anonymous memory behind importing everything, as measured
ACTIVATION = {"cpu": 4, "cuda": 2}  # bytes of a number that is not packed: float32, float16
CACHES = {"float16": 2, "bfloat16": 2, "int8": 1, "float32": 4}
INNER_COPIES = {"bloom": 2, "llama": 3}  # tensors of the feed-forward's inner size alive at a time: gate, up and silu


@dataclass(frozen=True, slots=True)
class Setting:
    """What a plan is made for.

    Attributes:
        bits: of the linears; FULL where they are not packed.
        head_bits: of embedding and head; FULL where they are not packed.
        group_size: inputs that share a scale.
        cache: what keys and values are kept in, a key of CACHES.
        device: "cpu" or "cuda".
    """

    bits: int = 4
    head_bits: int = FULL
    group_size: int = 128
    cache: str = "float16"
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes, by what they are for.

    Attributes:
        program: interpreter and libraries, on a CPU; the context that CUDA takes of a GPU is not counted.
        blocks: linears, norms and biases of all blocks.
        head: embedding and head; one matrix where they are tied.
        cache: keys and values of `batch` sequences of `context` tokens.
        workspace: activations of a chunk of prompt, or of a step of decoding, at their fullest.
    """

    program: int
    blocks: int
    head: int
    cache: int
    workspace: int

    @property
    def model(self) -> int:
        """What is taken above the program."""
        return self.blocks + self.head + self.cache + self.workspace

    @property
    def total(self) -> int:
        """All of them."""
        return self.program + self.model


@dataclass(frozen=True, slots=True)
class Row:
    """One setting against the budget.

    Attributes:
        setting: what was planned.
        needs: with the context and batch that were asked for.
        fits: whether they are within the budget.
        longest: the most tokens of context that fit, up to the model's own limit; 0 where none do.
    """

    setting: Setting
    needs: Needs
    fits: bool
    longest: int


def matrix_bytes(inputs: int, outputs: int, bits: int, s: Setting) -> int:
    """Dense: K N numbers of the activations' size. Packed: K' N' bits / 8 of codes (K', N' padded), 2 bytes of scale a
    run of at most 128 inputs and output, 4 bytes of group index an input, and of its place where there is padding."""
    if bits == FULL:
        return inputs * outputs * ACTIVATION[s.device]
    code, columns = CONTAINERS[bits][s.device], _padded(outputs, COLUMNS[s.device])
    run, places = _runs(inputs, inputs if s.group_size == -1 else s.group_size, 1 if s.device == "cpu" else 128)
    order = 0 if places == inputs else 4 * places
    if s.device == "cuda":
        places = _padded(places, min(128, run * 16 // code))
    return places * columns * code // 8 + 2 * (places // run) * columns + 4 * inputs + order


def block_bytes(d: Dimensions, s: Setting) -> int:
    """Linears as `matrix_bytes`; norms and biases in the activations' type. Linears that meet the same activations lie
    side by side, padded once."""
    shapes = linear_shapes(d)
    sides = [(shapes[stage[0]][0], sum(shapes[name][1] for name in stage))
             for stage in architecture(d.model_type).stages]
    vectors = sum(math.prod(shape) for shape in vector_shapes(d).values())
    return sum(matrix_bytes(k, n, s.bits, s) for k, n in sides) + ACTIVATION[s.device] * vectors


def head_bytes(d: Dimensions, s: Setting) -> int:
    """A tied matrix once, for both uses; else the embedding as it lies in the file (float16) and the head. Norms
    outside of the blocks are counted here."""
    norms = sum(math.prod(shape) for shape in outer_shapes(d).values() if len(shape) == 1)
    lookup = 0 if d.tied else 2 * d.vocab_size * d.hidden_size
    head = replace(s, group_size=128)  # whatever the linears have
    return lookup + matrix_bytes(d.hidden_size, d.vocab_size, s.head_bits, head) + ACTIVATION[s.device] * norms


def cache_bytes(d: Dimensions, cache: str, context: int, batch: int) -> int:
    """2 (keys, values) x blocks x key heads x head_dim x B x T numbers; int8 has a float16 scale a head and token."""
    per_head = d.head_dim * CACHES[cache] + (2 if cache == "int8" else 0)
    return 2 * d.num_layers * d.num_kv_heads * per_head * batch * context


def workspace_bytes(d: Dimensions, s: Setting, context: int, batch: int) -> int:
    """Both halves of a block with R = min(CHUNK, T) rows (the C heap keeps what one of them freed beside what the
    other takes; a sum is what was measured), and the logits of B rows, twice.

    Attention: input, norm, query-key-value and output of R rows; keys and values of KV_HEADS heads of one sequence in
    the activations' type; with ALiBi, biases of heads x min(QUERIES, R) x T. Feed-forward: input, norm, output, and
    INNER_COPIES of the inner size.
    """
    size, rows = ACTIVATION[s.device], max(min(CHUNK, context), batch)
    kv, read = d.num_kv_heads * d.head_dim, min(KV_HEADS, d.num_kv_heads) * d.head_dim
    biases = d.num_heads * min(QUERIES, rows) * context if d.model_type == "bloom" else 0
    attention = rows * (3 * d.hidden_size + 2 * (d.num_heads * d.head_dim + 2 * kv)) + 2 * read * context + biases
    copies = INNER_COPIES["bloom" if d.model_type == "bloom" else "llama"]
    mlp = rows * (3 * d.hidden_size + copies * d.intermediate_size)
    return size * (attention + mlp) + 2 * 4 * batch * d.vocab_size


def needs(d: Dimensions, s: Setting, context: int, batch: int) -> Needs:
    """The parts of one setting."""
    return Needs(PROGRAM[s.device], d.num_layers * block_bytes(d, s), head_bytes(d, s),
                 cache_bytes(d, s.cache, context, batch), workspace_bytes(d, s, context, batch))


def longest_context(d: Dimensions, s: Setting, memory: int, batch: int, limit: int) -> int:
    """The largest T up to `limit` whose total is at most `memory`; the total grows with T, so by halving."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(d, s, middle, batch).total <= memory else (low, middle - 1)
    return low


def plan(config: Mapping[str, Any], memory: int, *, context: int | None = None, batch: int = 1,
         cache: str = "float16", group_size: int = 128, device: str = "cpu",
         bits: Sequence[int] = BITS, head_bits: Sequence[int] = BITS) -> list[Row]:
    """Every pairing of bits and head bits against a budget.

    Args:
        config: config.json. Where it describes a packed model, only its own bits and group size are planned.
        memory: the budget in bytes.
        context: tokens of prompt and answer; left out, the model's limit (2,048 where it states none).
        batch: sequences at a time.
        cache, group_size, device, bits, head_bits: as in `Setting`.
    Raises:
        InputError: figures are missing.
        UsageError: a context beyond the model's, or an option that is not known.
    """
    d = dimensions(config)
    limit = d.context or 2048
    context = limit if context is None else context
    if not 1 <= context <= limit or batch < 1:
        raise UsageError(f"{batch} x {context} tokens cannot be planned", f"The model takes 1 to {limit} tokens.")
    if cache not in CACHES or device not in ACTIVATION:
        raise UsageError(f"a cache in {cache} on {device} is not known",
                         f"Choose one of {', '.join(CACHES)}, and one of {', '.join(ACTIVATION)}.")
    stated = config.get("quantization_config")
    if isinstance(stated, dict) and stated.get("bits") in CONTAINERS:
        bits, group_size = (stated["bits"],), int(stated.get("group_size", group_size))
    return list(_rows(d, memory, context, batch, limit,
                      [Setting(b, h, group_size, cache, device) for b, h in product(bits, head_bits)]))


def best(rows: Sequence[Row]) -> Row | None:
    """Of those that fit, the one with the most bits, the linears' first: quality follows them."""
    fitting = [row for row in rows if row.fits]
    return max(fitting, key=lambda row: (row.setting.bits, row.setting.head_bits), default=None)


def _rows(d: Dimensions, memory: int, context: int, batch: int, limit: int,
          settings: Sequence[Setting]) -> Iterator[Row]:
    for s in settings:
        found = needs(d, s, context, batch)
        yield Row(s, found, found.total <= memory, longest_context(d, s, memory, batch, limit))


def _runs(inputs: int, size: int, block: int) -> tuple[int, int]:
    """Length of the runs that groups of `size` inputs are cut into, and their places together, as the kernels choose
    it: the longest of those that fill the fewest blocks."""
    full, rest = divmod(inputs, size)
    places = {run: full * _padded(size, run) + _padded(rest, run) for run in (128, 64, 32)}
    run = min(places, key=lambda length: -(-places[length] // block))
    return run, places[run]


def _padded(count: int, step: int) -> int:
    return -(-count // step) * step
