"""Both ends of a decode step in Triton's interpreter: embedding, lm_head and greedy tokens, compared with float64.

`test_triton_decode.py` runs this file in a separate process: TRITON_INTERPRET has to be set before Triton is
imported.
"""

from typing import NamedTuple

import pytest
import torch
from bfloat16_interpreter import teach
from conftest import naming
from covering import covering_cases, random_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_format import formula, random_words
from shuffled_programs import Shuffled
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from gptq_belle.kernels import triton_embedding, triton_head, triton_layout
from gptq_belle.kernels.layout import checked_weight
from gptq_belle.kernels.triton_embedding import embedding_launch
from gptq_belle.kernels.triton_head import head_launches
from gptq_belle.kernels.triton_launch import Workspace
from gptq_belle.kernels.triton_norm import FoldedNorm, NextNorm

teach()

HALF, BRAIN = torch.float16, torch.bfloat16
ERRORS = {HALF: 5e-4, BRAIN: 4e-3}  # relative; measured up to 3.6e-4 and 2.9e-3
EPS = 1e-5
SYMMETRIC = {4: 0x77777777, 8: 0x7F7F7F7F}  # stored zeros of version 1: the zero points are 8 and 128


class Ends(NamedTuple):
    """Random weights of both ends; `exact` is the matrix (V, width) in float64."""

    matrix: triton_layout.SlicedWeight | Tensor
    exact: Tensor
    gamma: Tensor
    beta: Tensor | None
    embedding_norm: tuple[Tensor, Tensor, float] | None


def ends(bits, width, vocab, group, bloom, dtype=HALF, sym=True):
    if bits == 16:
        matrix = torch.randn(vocab, width).to(dtype)
        exact = matrix.double()
    else:
        words = random_words(bits, width, -(-vocab // 32) * 32, group)
        if sym:
            words["qzeros"].fill_(SYMMETRIC[bits])
        exact = formula(**words, bits=bits, v1=True)[:vocab].double()
        matrix = triton_layout.prepare(checked_weight(**words, bits=bits, zero_offset=1))._replace(out_features=vocab)
    norm = (torch.rand(width) + 0.5, torch.randn(width) * 0.1, EPS) if bloom else None
    return Ends(matrix, exact, torch.rand(width) + 0.2, torch.randn(width) * 0.1 if bloom else None, norm)


def relative_error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def embed(model, tokens, dtype, places=None):
    """Stream, scaled stream and moments, as the launch writes them."""
    rows, width = len(tokens), model.exact.shape[1]
    stream = torch.full((rows, width), torch.nan, dtype=dtype)
    x = torch.zeros(rows, width if places is None else int(places.max()) + 1, dtype=dtype)
    moments = torch.full((2, -(-width // triton_embedding.TILE), rows), torch.nan)
    embedding_launch(tokens, model.matrix, model.embedding_norm, stream,
                     NextNorm(model.gamma, places, x, moments))()
    return stream, x, moments


@settings(max_examples=10, deadline=None, derandomize=True)
@given(bits=st.sampled_from([4, 8, 16]), width=st.sampled_from([128, 256, 384]), group=st.sampled_from([32, 64, 128]),
       dtype=st.sampled_from([HALF, BRAIN]), bloom=st.booleans(), sort=st.booleans())
def test_embedding_equals_float64(bits, width, group, dtype, bloom, sort):
    check_embedding(ends(bits, width, 203, group, bloom), dtype, sort, torch.tensor([0, 202, 7, 7]).int())


def check_embedding(model, dtype, sort, tokens):
    width, bloom = model.exact.shape[1], model.embedding_norm is not None
    places = torch.randperm(width + 5)[:width].int() if sort else None
    stream, x, moments = embed(model, tokens, dtype, places)
    expected = model.exact[tokens.long()].to(dtype).double()
    if bloom:
        weight, bias, eps = model.embedding_norm
        expected = layer_norm(expected, (width,), weight.double(), bias.double(), eps)
    assert relative_error(stream, expected) < ERRORS[dtype]
    scaled = x if places is None else x[:, places.long()]
    assert relative_error(scaled, stream.double() * model.gamma) < ERRORS[dtype]
    assert (x != 0).sum() == (scaled != 0).sum(), "padding was written"
    check_moments(moments, stream)


def check_moments(moments, stream):
    tiles = stream.double().split(triton_embedding.TILE, 1)
    sums = torch.stack([tile.sum(1) for tile in tiles])
    squares = torch.stack([(tile - tile.mean(1, keepdim=True)).square().sum(1) for tile in tiles])
    torch.testing.assert_close(moments.double(), torch.stack([sums, squares]), rtol=1e-5, atol=1e-4)


def test_embedding_with_a_narrow_last_tile():
    model = ends(16, 100, 50, 128, True)
    stream, _, moments = embed(model, torch.tensor([3, 49]).int(), HALF)
    check_moments(moments, stream)


def workspace(rows):
    return Workspace(torch.empty(0), torch.zeros(triton_head.workspace_size(rows)[1], dtype=torch.int32))


def final_norm(model, moments):
    """The final norm and the bias (V,) that it adds, as a loader prepares them."""
    width = model.exact.shape[1]
    if model.beta is None:
        return FoldedNorm(moments, None, EPS, width, triton_embedding.TILE), None
    product, bias = model.exact @ model.gamma.double(), model.exact @ model.beta.double()
    return FoldedNorm(moments, product.float(), EPS, width, triton_embedding.TILE), bias.float()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(bits=st.sampled_from([4, 8, 16]), width=st.sampled_from([128, 256]), group=st.sampled_from([32, 128]),
       dtype=st.sampled_from([HALF, BRAIN]), bloom=st.booleans(), rows=st.sampled_from([1, 5, 9, 40]))
def test_head_equals_float64_and_tokens_go_round(bits, width, group, dtype, bloom, rows):
    check_head(ends(bits, width, 203, group, bloom, dtype), dtype, rows)


GRID = {"bits": (4, 8, 16), "width": (128, 384, 1152), "group": (32, 64, 128), "dtype": (HALF, BRAIN),
        "bloom": (False, True), "sort": (False, True), "rows": (1, 2, 7, 8, 9, 16, 17, 32, 33, 63, 64),
        "sym": (False, True), "vocab": (40, 203, 512)}


def check_grid(bits, width, group, dtype, bloom, sort, rows, sym, vocab):
    """With zero points of each group, too."""
    model = ends(bits, width, vocab, group, bloom, dtype, sym)
    check_embedding(model, dtype, sort, torch.randint(0, vocab, (rows,)).int())
    check_head(model, dtype, rows)


@pytest.mark.slow
@pytest.mark.parametrize("case", covering_cases(GRID, 2, 0), ids=lambda case: "-".join(map(str, case.values())))
def test_two_properties_at_a_time(case):
    check_grid(**case)


@pytest.mark.slow
def test_random_cases():
    seed, cases = random_cases(GRID, 20)
    torch.manual_seed(seed)
    for case in cases:
        print(f"GRID_SEED={seed}", case)
        check_grid(**case)


@pytest.mark.slow
@pytest.mark.parametrize("rows", range(1, 65))
def test_every_number_of_rows(rows):
    check_grid(8, 128, 64, HALF, rows % 2 == 0, False, rows, True, 100)


def check_head(model, dtype, rows):
    vocab, width = model.exact.shape
    tokens = torch.randint(0, vocab, (rows,)).int()
    lengths = torch.tensor([3, -1, 0, 16, 15] * 13)[:rows].int()
    stream, x, moments = embed(model, tokens, dtype)
    norm, bias = final_norm(model, moments)
    expected = (rms_norm(stream.double(), (width,), model.gamma.double(), EPS) if model.beta is None else
                layer_norm(stream.double(), (width,), model.gamma.double(), model.beta.double(), EPS)) @ model.exact.t()
    first = None
    for seed in range(2):
        space = workspace(rows)
        logits, next_tokens, next_lengths = torch.empty(rows, vocab), tokens.clone(), lengths.clone()
        launches = head_launches(x, model.matrix, bias, norm, logits, next_tokens, next_lengths, space)
        assert len(launches) == 1
        with Shuffled(seed):
            launches[0]()
        assert not space.tickets.any()
        first = logits if first is None else first
        assert torch.equal(logits, first)
    assert relative_error(logits, expected) < ERRORS[dtype]
    active = lengths >= 0
    assert torch.equal(next_tokens, torch.where(active, logits.argmax(-1).int(), tokens))
    assert torch.equal(next_lengths, lengths + active.int())


def test_first_of_equal_logits_is_the_greedy_token():
    table = torch.zeros(300, 128).half()
    table[[130, 70, 290], 0] = 1
    model = Ends(table, table.double(), torch.ones(128), None, None)
    _, x, moments = embed(model, torch.tensor([70]).int(), HALF)
    norm, _ = final_norm(model, moments)
    token, logits = torch.zeros(1).int(), torch.empty(1, 300)
    with Shuffled(3):
        head_launches(x, table, None, norm, logits, token, torch.zeros(1).int(), workspace(1))[0]()
    assert token.item() == 70


def test_mismatched_tensors_are_refused():
    model = ends(8, 128, 100, 128, False)
    tokens, stream = torch.zeros(2).int(), torch.zeros(2, 128).half()
    moments = torch.zeros(2, 2, 2)
    after = NextNorm(model.gamma, None, stream.clone(), moments)
    with pytest.raises(ValueError, match=naming("tokens")):
        embedding_launch(tokens.long(), model.matrix, None, stream, after)
    with pytest.raises(ValueError, match=naming("128", "256")):
        embedding_launch(tokens, model.matrix, None, torch.zeros(2, 256).half(), after._replace(
            moments=torch.zeros(2, 4, 2)))
    with pytest.raises(ValueError, match=naming("lengths")):
        head_launches(stream, model.matrix, None, final_norm(model, moments)[0], torch.zeros(2, 100), tokens,
                      torch.zeros(3).int(), workspace(2))
