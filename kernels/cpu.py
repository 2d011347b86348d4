"""Matrix products on a CPU by the kernels in `native/`: any bits, groups, zeros and order of inputs, any M, one layout.

Activations are split per row and group into two parts of 8 bits (16 bits in all: "exact", an error of about 3e-5 of
the result's norm) or one ("fast", about 7e-3); codes are unpacked and multiplied as integers, whose sums are exact. So
row m of y depends, to the bit, on row m of x alone: not on M, threads or the instruction set (but "portable", which
rounds products before it adds them).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import CanonicalWeight
from .library import ISAS, Library, WeightStruct, WordsStruct, library
from .memory import empty_bytes
from .reference import unpack
from .runs import RUNS, cut_runs, wasteful

BLOCK = 16  # outputs of a block of codes
PADDED = 32  # N is padded to multiples of it
CONTAINERS = {2: 2, 3: 4, 4: 4, 8: 8}  # bits of a code in memory, by bits of the checkpoint
PARTS = {"exact": 2, "fast": 1}


class CpuWeight(NamedTuple):
    """A weight in the layout of native/native.h: K inputs, N outputs, G runs of inputs that share a scale."""

    codes: Tensor  # (N / 16, G, run * bits / 32, 64) uint8; N padded to 32
    scales: Tensor  # (N / 16, G, 16) float16, or float32 where the checkpoint's are not float16
    zeros: Tensor | None  # (N / 16, G, 16) int16; None where all are `zero`
    order: Tensor | None  # (G * run,) int32: the input at each place, -1 for padding; None where they stand in order
    g_idx: Tensor  # (K,) int32, as in CanonicalWeight; the product does not read it
    in_features: int
    out_features: int
    run: int  # 32, 64 or 128 inputs
    bits: int  # of a code in memory: 2, 4 or 8
    zero: int
    parts: int  # of the activations: 2 exact, 1 fast
    source: int  # bits of a code in the checkpoint: 2, 3, 4 or 8
    source_groups: int  # groups of the checkpoint
    zero_offset: int  # as in CanonicalWeight


def refusal(g_idx: Tensor, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels do not serve a case, or None where they do; arguments as in `dispatch.choose`."""
    if device.type != "cpu":
        return f"the native kernels here are for CPUs, not {device.type}"
    if dtype == torch.float64:
        return "the native kernels keep 16 bits of an activation: too few for torch.float64"
    if isinstance(found := library(), str):
        return found
    if wasteful(g_idx):
        return f"the native kernels take groups that fill runs of {RUNS[-1]} inputs"
    return None


def prepare(weight: CanonicalWeight, precision: str = "exact") -> CpuWeight:
    """Lay out a weight that `refusal` lets through; its tensors are on the CPU.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PARTS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PARTS)}")
    runs = cut_runs(weight.g_idx)
    bits, outputs = CONTAINERS[weight.bits], weight.out_features
    blocks = -(-outputs // PADDED) * PADDED // BLOCK
    only = _only_zero(weight.qzeros, weight.bits)
    zeros = None if only is not None else unpack(weight.qzeros.t(), weight.bits).t() + weight.zero_offset
    scales = weight.scales if weight.scales.dtype == torch.float16 else weight.scales.float()
    codes = empty_codes(blocks, len(runs.groups), runs.run * bits // 32)
    words, lib = weight.qweight.contiguous(), native()
    lib.pack(
        WordsStruct(words.data_ptr(), _pointer(runs.order), weight.in_features, outputs, len(runs.groups), weight.bits,
                    runs.run, bits), codes.data_ptr(), torch.get_num_threads(), ISAS.index(lib.isa))
    return CpuWeight(
        codes=codes,
        scales=_blocks(scales, runs.groups, blocks),
        zeros=None if zeros is None else _blocks(zeros.to(torch.int16), runs.groups, blocks),
        order=runs.order,
        g_idx=weight.g_idx.clone(),
        in_features=weight.in_features,
        out_features=outputs,
        run=runs.run,
        bits=bits,
        zero=0 if only is None else only + weight.zero_offset,
        parts=PARTS[precision],
        source=weight.bits,
        source_groups=weight.scales.shape[0],
        zero_offset=weight.zero_offset,
    )


def restore(weight: CpuWeight) -> tuple[Tensor, Tensor, Tensor]:
    """What `prepare` was given: codes (K, N) uint8, true zeros (groups, N) int32 and scales (groups, N)."""
    runs, places = cut_runs(weight.g_idx), unpack_codes(weight.codes, weight.bits)
    codes = places[: weight.in_features]
    if weight.order is not None:
        filled = weight.order >= 0
        codes = torch.empty_like(codes)
        codes[weight.order[filled].long()] = places[filled]
    zeros = weight.zeros if weight.zeros is not None else torch.full(weight.scales.shape, weight.zero)

    def table(values: Tensor) -> Tensor:
        whole = values.new_zeros(weight.source_groups, places.shape[1])  # a group without inputs keeps zeros
        whole[runs.groups] = by_run(values)
        return whole[:, : weight.out_features].contiguous()

    return codes[:, : weight.out_features].contiguous(), table(zeros.int()), table(weight.scales)


def unpack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (N / 16, G, run * bits / 32, 64) of the layout, or of some of its runs: (G * run, N) uint8, N padded."""
    blocks, groups, vectors, _ = codes.shape
    fields = torch.stack([codes >> shift & 2**bits - 1 for shift in range(0, 8, bits)])
    return fields.view(-1, blocks, groups, vectors, BLOCK, 4).permute(2, 3, 0, 5, 1, 4).reshape(-1, blocks * BLOCK)


def by_run(values: Tensor) -> Tensor:
    """Scales or zeros (N / 16, G, 16) of the layout as a table (G, N), N padded."""
    return values.transpose(0, 1).flatten(1)


def empty_codes(blocks: int, groups: int, vectors: int) -> Tensor:
    """Memory for codes (blocks, groups, vectors, 64)."""
    return empty_bytes(blocks * groups * vectors * 64).view(blocks, groups, vectors, 64)


def quant_matmul(x: Tensor, weight: CpuWeight, bias: Tensor | None = None, *, isa: str | None = None) -> Tensor:
    """x (..., K) times the weight (K, N), plus bias (N,): (..., N) in x's dtype, through float32. Has no gradient.

    Args:
        x, weight, bias: on the CPU.
        isa: one of `library().usable`; left out, the fastest.
    Raises:
        ValueError: tensors that do not fit together; nothing was read or written.
    """
    lib = native()
    rows = _plain(x if x.dim() == 2 else x.reshape(-1, weight.in_features))
    bias = None if bias is None else _plain(bias)
    _check(rows, weight, bias)
    if isa is not None and isa not in lib.usable:
        raise ValueError(f"instruction set {isa!r} is not one of {', '.join(lib.usable)}")
    y = torch.empty(rows.shape[0], weight.out_features)
    struct = WeightStruct(
        weight.codes.data_ptr(), weight.scales.data_ptr(), _pointer(weight.zeros), _pointer(weight.order),
        _pointer(bias), weight.in_features, weight.out_features, weight.codes.shape[1], weight.run, weight.bits,
        weight.scales.dtype == torch.float16, weight.zero)
    outcome = lib.matmul(struct, rows.data_ptr(), rows.shape[0], weight.parts, y.data_ptr(),
                         torch.get_num_threads(), ISAS.index(isa or lib.isa))
    if outcome:
        raise ValueError(f"order holds inputs that are not -1..{weight.in_features - 1}") if outcome == 1 else (
            MemoryError(f"no memory for the activations of {rows.shape[0]} rows"))
    y = y if x.dtype is torch.float32 else y.to(x.dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.out_features)


def read(tensor: Tensor) -> int:
    """Read a contiguous tensor on the CPU with all threads and do nothing else: the sum of its words of 4 bytes.

    Behind the last whole 256 KiB nothing is read.
    """
    if not (tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError("only a contiguous tensor on the CPU can be read")
    lib = native()
    return int(lib.read(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads(), ISAS.index(lib.isa)))


@torch.library.custom_op("gptq_belle::cpu_matmul", mutates_args=())
def _op(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None, bias: Tensor | None,
        in_features: int, out_features: int, run: int, bits: int, zero: int, parts: int) -> Tensor:
    unread = torch.empty(0, dtype=torch.int32)
    return quant_matmul(x, CpuWeight(codes, scales, zeros, order, unread, in_features, out_features, run, bits, zero,
                                     parts, bits, 0, 0), bias)


@_op.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None, bias: Tensor | None,
      in_features: int, out_features: int, run: int, bits: int, zero: int, parts: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def op(x: Tensor, weight: CpuWeight, bias: Tensor | None = None) -> Tensor:
    """`quant_matmul` as an operation that torch.compile can put into its graphs; costs some microseconds more."""
    w = weight
    result: Tensor = _op(x, w.codes, w.scales, w.zeros, w.order, bias, w.in_features, w.out_features, w.run, w.bits,
                         w.zero, w.parts)
    return result


def native() -> Library:
    """The library; RuntimeError where there is none."""
    found = library()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _only_zero(words: Tensor, bits: int) -> int | None:
    """The stored zero of every group and output where they are all alike, else None."""
    if 32 % bits:
        found = unpack(words.t(), bits).unique()
    else:  # a word holds whole zeros: one of them tells
        found = unpack(words[:1, :1], bits).unique() if bool((words == words[0, 0]).all()) else words.new_empty(0)
    return int(found) if len(found) == 1 else None


def _blocks(table: Tensor, groups: Tensor, blocks: int) -> Tensor:
    """A table (groups, N) as (blocks, G, 16), padded with zeros."""
    padded = pad(table[groups], (0, blocks * BLOCK - table.shape[1]))
    return padded.view(len(groups), blocks, BLOCK).transpose(0, 1).contiguous()


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous float32. Even a conversion that does nothing takes 7 microseconds where a product has just been."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.to(torch.float32).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(rows: Tensor, weight: CpuWeight, bias: Tensor | None) -> None:
    """Everything that the library takes for granted, except the range of `order`, which it checks itself."""
    w = weight
    if not rows.is_cpu:
        raise ValueError(f"x is on {rows.device}, the weight is laid out for the CPU")
    if w.run not in RUNS or w.bits not in (2, 4, 8) or w.parts not in (1, 2):
        raise ValueError(f"run {w.run}, bits {w.bits}, parts {w.parts}: not in {RUNS}, (2, 4, 8), (1, 2)")
    if w.in_features < 1 or w.out_features < 1 or rows.shape[1] != w.in_features:
        raise ValueError(f"x of {rows.shape[1]} columns, a weight of {w.in_features} inputs, {w.out_features} outputs")
    blocks, groups = -(-w.out_features // PADDED) * PADDED // BLOCK, w.codes.shape[1] if w.codes.dim() == 4 else 0
    grid = (blocks, groups, BLOCK)
    _tensor("codes", w.codes, (blocks, groups, w.run * w.bits // 32, 64), (torch.uint8,))
    _tensor("scales", w.scales, grid, (torch.float16, torch.float32))
    if w.zeros is not None:
        _tensor("zeros", w.zeros, grid, (torch.int16,))
    if w.order is not None:
        _tensor("order", w.order, (groups * w.run,), (torch.int32,))
    elif not (groups - 1) * w.run < w.in_features <= groups * w.run:
        raise ValueError(f"{groups} runs of {w.run} do not hold {w.in_features} inputs")
    if bias is not None:
        _tensor("bias", bias, (w.out_features,), (torch.float32,))


def _tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, not a contiguous "
                         f"{' or '.join(map(str, dtypes))} {shape} on the CPU")
