"""Sizes in bytes of a model on disk and in memory, computed from its dimensions.

K = in_features, N = out_features, T = tokens of context, B = sequences in a batch. Every function states its formula.
Nothing is measured here: tests compare the formulas with written files and prepared layouts, and
benchmarks/bench_plan.py compares the sums with the memory of processes.
"""

import math
from dataclasses import dataclass, replace

from gptq_belle.kernels import cpu_layout, triton_layout
from gptq_belle.kernels.layout import RUN_LENGTHS
from gptq_belle.models.dimensions import Dimensions, LinearShape

UNPACKED = 16  # "bits" of a matrix that is not packed
GROUP_SIZE = 128  # default of quantize, and the group size of a packed head

# The engine's buffers. Measured on BELLE-7B: chunks of 256 tokens take 38 MB more than 192 and are not faster, and
# converting 8 heads of the cache at a time takes 13 MB more than 4.
PREFILL_CHUNK = {"cpu": 192, "cuda": 2048}  # prompt tokens per forward pass; a GPU reads the weights once per chunk
QUERY_BLOCK = 64  # queries whose attention scores are in memory at a time on a CPU
KV_HEADS_PER_PASS = 4  # heads of the cache that are converted to the dtype of activations at a time on a CPU

CACHE_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "int8": 1, "float32": 4}
ACTIVATION_BYTES = {"cpu": 4, "cuda": 2}  # float32 on a CPU, float16 on a GPU
PROGRAM_BYTES = {"cpu": 270_000_000, "cuda": 0}  # anonymous memory after all imports, as measured
INNER_COPIES = {"bloom": 2, "llama": 3, "": 4}  # tensors of the inner size alive at a time in the engine's feed-forward


def parameter_count(d: Dimensions) -> int:
    """Number of parameters; a tied matrix counts once."""
    block = sum(map(math.prod, d.arch.shapes.values())) + _vector_parameters(d)
    return d.num_layers * block + sum(map(math.prod, d.arch.outer.values()))


def linear_file_bytes(shape: LinearShape, bits: int, group_size: int = GROUP_SIZE) -> int:
    """Tensors of one linear in a GPTQ file without its bias: K N bits / 8 for codes, and for G groups G N bits / 8 for
    zero points, 2 G N for scales and 4 K for the group index. UNPACKED: 2 K N."""
    k, n = shape
    if bits == UNPACKED:
        return 2 * k * n
    groups = 1 if group_size == -1 else math.ceil(k / group_size)
    return (k + groups) * n * bits // 8 + 2 * groups * n + 4 * k


def file_bytes(d: Dimensions, bits: int, head_bits: int = UNPACKED, group_size: int = GROUP_SIZE) -> int:
    """Tensors of a model's GPTQ file: linears as `linear_file_bytes`, all others in float16.

    With `head_bits` below UNPACKED, embedding and lm_head have the size of the packed layout in memory.
    """
    linears = sum(linear_file_bytes(shape, bits, group_size) for shape in d.arch.shapes.values())
    outer = 2 * sum(map(math.prod, d.arch.outer.values()))
    if head_bits != UNPACKED:
        matrices = 1 if d.tied else 2
        shape = LinearShape(d.hidden_size, d.vocab_size)
        outer += matrices * (matrix_bytes(shape, head_bits, MemorySettings()) - 2 * math.prod(shape))
    return d.num_layers * (linears + 2 * _vector_parameters(d)) + outer


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """What determines the memory of a loaded model besides its dimensions."""

    bits: int = 4  # of the linears; UNPACKED if they are not packed
    head_bits: int = UNPACKED  # of embedding and lm_head; UNPACKED if they are not packed
    group_size: int = GROUP_SIZE  # inputs that share a scale
    cache: str = "float16"  # dtype of the KV cache, a key of CACHE_ITEM_BYTES
    device: str = "cpu"  # "cpu" or "cuda"


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of memory by purpose."""

    program: int  # interpreter and libraries on a CPU; the CUDA context of a GPU is not counted
    blocks: int  # linears, norms and biases of all blocks
    head: int  # embedding and lm_head; one matrix if they are tied
    cache: int  # KV cache
    workspace: int  # peak of the activations of a prefill chunk or a decode step

    @property
    def model(self) -> int:
        """Everything except the program."""
        return self.blocks + self.head + self.cache + self.workspace

    @property
    def total(self) -> int:
        """Everything."""
        return self.program + self.model


def memory_use(d: Dimensions, settings: MemorySettings, context: int, batch: int) -> MemoryUse:
    """Memory of a loaded model that answers `batch` sequences of `context` tokens."""
    return MemoryUse(
        program=PROGRAM_BYTES[settings.device],
        blocks=d.num_layers * block_bytes(d, settings),
        head=head_bytes(d, settings),
        cache=cache_bytes(d, settings.cache, context, batch),
        workspace=workspace_bytes(d, settings, context, batch))


def matrix_bytes(shape: LinearShape, bits: int, settings: MemorySettings) -> int:
    """One matrix in memory. Unpacked: K N numbers of the activations' dtype. Packed, with K and N padded to K' and N':
    K' N' bits / 8 for codes, 2 bytes of scale per run of at most 128 inputs and output, 4 bytes of group index per
    input, and 4 bytes of order per place if there is padding."""
    if bits == UNPACKED:
        return math.prod(shape) * ACTIVATION_BYTES[settings.device]
    k, n = shape
    group = k if settings.group_size == -1 else settings.group_size
    if settings.device == "cpu":
        code, columns = cpu_layout.CONTAINERS[bits], _pad(n, cpu_layout.OUTPUT_MULTIPLE)
        run, places = _runs(k, group, 1)
        order = 0 if places == k else 4 * places
    else:
        code, columns = triton_layout.CONTAINERS[bits], _pad(n, triton_layout.COLUMNS)
        run, places = _runs(k, group, triton_layout.BLOCK)
        order = 0 if places == k else 4 * places
        places = _pad(places, triton_layout.block_inputs(code, run))
    return places * columns * code // 8 + 2 * (places // run) * columns + 4 * k + order


def block_bytes(d: Dimensions, settings: MemorySettings) -> int:
    """A block: linears as `matrix_bytes`, norms and biases in the activations' dtype. Linears with the same input are
    fused along N, so that they are padded once."""
    shapes = d.arch.shapes
    fused = [LinearShape(shapes[stage[0]].in_features, sum(shapes[name].out_features for name in stage))
             for stage in d.arch.stages]
    return (sum(matrix_bytes(shape, settings.bits, settings) for shape in fused)
            + ACTIVATION_BYTES[settings.device] * _vector_parameters(d))


def head_bytes(d: Dimensions, settings: MemorySettings) -> int:
    """Embedding, lm_head and the norms outside the blocks. A tied matrix counts once; otherwise the embedding has the
    file's dtype (float16)."""
    norms = sum(math.prod(shape) for shape in d.arch.outer.values() if len(shape) == 1)
    embedding = 0 if d.tied else 2 * d.vocab_size * d.hidden_size
    head = matrix_bytes(LinearShape(d.hidden_size, d.vocab_size), settings.head_bits,
                        replace(settings, group_size=GROUP_SIZE))
    return embedding + head + ACTIVATION_BYTES[settings.device] * norms


def cache_bytes(d: Dimensions, cache: str, context: int, batch: int) -> int:
    """KV cache: 2 * layers * KV heads * head_dim * B * T numbers; int8 adds a float16 scale per head and token."""
    per_head = d.head_dim * CACHE_ITEM_BYTES[cache] + (2 if cache == "int8" else 0)
    return 2 * d.num_layers * d.num_kv_heads * per_head * batch * context


def workspace_bytes(d: Dimensions, settings: MemorySettings, context: int, batch: int) -> int:
    """Activations of both halves of a block with R = min(PREFILL_CHUNK, T) rows, and twice the logits of B rows.

    Both halves are added up because the C heap keeps what the first one freed; the sum is what was measured.
    Attention: input, norm, query-key-value and output of R rows; keys and values of the heads of one pass of one
    sequence; with ALiBi, biases of heads * queries * T. On a CPU a pass has KV_HEADS_PER_PASS heads and QUERY_BLOCK
    queries, on a GPU all heads and R queries. Feed-forward: input, norm, output and INNER_COPIES of the intermediate
    size.
    """
    native, on_cpu = d.arch.family.native, settings.device == "cpu"
    rows = max(min(PREFILL_CHUNK[settings.device], context), batch)
    pass_heads = min(KV_HEADS_PER_PASS, d.num_kv_heads) if on_cpu else d.num_kv_heads
    queries = min(QUERY_BLOCK, rows) if on_cpu else rows
    qkv_width = (d.num_heads + 2 * d.num_kv_heads) * d.head_dim
    biases = d.num_heads * queries * context if native == "bloom" else 0
    attention = rows * (3 * d.hidden_size + 2 * qkv_width) + 2 * pass_heads * d.head_dim * context + biases
    mlp = rows * (3 * d.hidden_size + INNER_COPIES[native] * d.intermediate_size)
    return ACTIVATION_BYTES[settings.device] * (attention + mlp) + 2 * 4 * batch * d.vocab_size


def _vector_parameters(d: Dimensions) -> int:
    return sum(map(math.prod, d.arch.vectors.values()))


def _runs(k: int, group_size: int, block: int) -> tuple[int, int]:
    """Length of the runs that groups are cut into, and inputs with padding, as `layout.sort_by_group` chooses them."""
    groups, rest = divmod(k, group_size)
    places = {run: groups * _pad(group_size, run) + _pad(rest, run) for run in RUN_LENGTHS}
    run = min(places, key=lambda length: (-(-places[length] // block), -length))
    return run, places[run]


def _pad(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
