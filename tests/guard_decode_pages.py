"""Run one kernel of the decode step in the interpreter with inaccessible memory around its tensors: see guard_pages.py.

    TRITON_INTERPRET=1 python guard_decode_pages.py attention
"""

import faulthandler
import itertools
import sys

import torch
from guard_pages import guarded, random_weight

from gptq_belle.kernels import triton_attention, triton_head, triton_sampling
from gptq_belle.kernels.triton_attention import HeadLayout
from gptq_belle.kernels.triton_embedding import TILE, embedding_launch
from gptq_belle.kernels.triton_launch import Workspace
from gptq_belle.kernels.triton_norm import FoldedNorm, NextNorm

CAPACITY, VOCABULARY, ROOM = 40, 203, 8


def guarded_launch(launch, before):
    """The launch on guarded copies of all its tensors, which are returned by name."""
    copies = {name: guarded(value, before) if isinstance(value, torch.Tensor) and value.numel() else value
              for name, value in launch.arguments.items()}
    launch._replace(arguments=copies)()
    return copies


def attend(layout, kind, rotary, lengths, before):
    """One decode attention with the last slot and the last position of the cache, and an idle row."""
    rows, d = len(lengths), layout.head_dim
    shape = (rows, layout.kv_heads, CAPACITY, d)
    is_int8 = kind == torch.int8
    cache = [torch.zeros(shape, dtype=kind) if is_int8 else torch.randn(shape).to(kind) for _ in range(2)]
    scales = [torch.rand(*shape[:3], 1).half() if is_int8 else None for _ in range(2)]
    floats, tickets = triton_attention.workspace_size(rows, layout, CAPACITY, 16)
    rotation = torch.randn(CAPACITY, d) if rotary else None
    launch = triton_attention.attention_launch(
        torch.randn(rows, (layout.heads + 2 * layout.kv_heads) * d).half(), (*cache, *scales),
        torch.arange(rows).flip(0).int(), torch.tensor(lengths).int(), torch.zeros(rows, layout.heads * d).half(),
        Workspace(torch.zeros(floats), torch.zeros(tickets).int()), layout, rotation=rotation,
        slopes=None if rotary else torch.rand(layout.heads), places=torch.randperm(layout.heads * d).int(),
        bucket=CAPACITY, piece=16, step=16)
    assert guarded_launch(launch, before)["out"].isfinite().all()


def attention():
    """All kinds of caches and positions."""
    layouts = (HeadLayout(2, 2, 64, True), HeadLayout(3, 1, 80, False))
    for layout, kind, rotary, before in itertools.product(
            layouts, (torch.float16, torch.int8), (False, True), (False, True)):
        yield attend, layout, kind, rotary, (39, 0, -1, 16), before


def look_up(bits, width, before):
    """The last token of the vocabulary."""
    weight = torch.randn(VOCABULARY, width).half() if bits == 16 else random_weight(
        bits, 64, "one", width // 128, before, outputs=VOCABULARY)
    if bits != 16:  # nothing after the last token: the padded columns are guarded as well
        weight = weight._replace(out_features=weight.words.shape[1])
    rows, last = 3, (VOCABULARY if bits == 16 else weight.words.shape[1]) - 1
    norm = torch.rand(width), torch.rand(width), 1e-5
    after = NextNorm(torch.rand(width), torch.randperm(width).int(), torch.zeros(rows, width).half(),
                     torch.zeros(2, -(-width // TILE), rows))
    tokens = torch.tensor([0, last, 5]).int()
    launch = embedding_launch(tokens, weight, norm, torch.zeros(rows, width).half(), after)
    assert guarded_launch(launch, before)["x"].isfinite().all()


def embedding():
    """Packed and dense embeddings; a width that is no multiple of a tile."""
    for bits, before in itertools.product((4, 8, 16), (False, True)):
        yield look_up, bits, 100 if bits == 16 else 256, before


def choose(bits, rows, before, is_sampled):
    """lm_head and next tokens."""
    width = 256
    weight = torch.randn(VOCABULARY, width).half() if bits == 16 else random_weight(
        bits, 128, "one", width // 128, before, outputs=VOCABULARY)
    state = triton_sampling.new_sampling_state(rows, VOCABULARY, ROOM, torch.device("cpu")) if is_sampled else None
    if state is not None:
        state.temperatures.fill_(1.0)
        state.penalties.fill_(1.2)
        state.top_p[::2] = 0.99
        state.numbers.fill_(0.99)
    tickets = torch.zeros(triton_head.workspace_size(rows)[1]).int()
    launches = triton_head.head_launches(
        torch.randn(rows, width).half(), weight, torch.rand(VOCABULARY),
        FoldedNorm(torch.rand(2, 4, rows), torch.rand(VOCABULARY), 1e-5, width, 64), torch.zeros(rows, VOCABULARY),
        torch.zeros(rows).int(), torch.arange(rows).int() - 1, Workspace(torch.zeros(0), tickets), state)
    written = guarded_launch(launches[0], before)
    assert written["logits"].isfinite().all()
    if state is not None:
        launches = [launches[1]._replace(arguments=launches[1].arguments | {
            name: written[name] for name in ("adjusted", "maxima")})]
        written = guarded_launch(launches[0], before)
    assert ((written["tokens"] >= 0) & (written["tokens"] < VOCABULARY)).all()


def head():
    """Greedy decoding and sampling, one and several tiles of rows, and rows without a random number."""
    for bits, rows, before, is_sampled in itertools.product((8, 16), (3, 10), (False, True), (False, True)):
        yield choose, bits, rows, before, is_sampled


CASES = {"attention": attention, "embedding": embedding, "head": head}

if __name__ == "__main__":
    faulthandler.enable()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for function, *arguments in CASES[sys.argv[1]]():
        print(function.__name__, *arguments, flush=True)
        function(*arguments)
