"""Both ends of a decode step in Triton's interpreter: embedding, lm_head, greedy and sampled tokens.

Embedding and logits are compared with float64 arithmetic on the same weights, sampled tokens with engine/sampling.py.
`test_triton_decode.py` runs this file in a separate process: TRITON_INTERPRET has to be set before Triton is
imported.
"""

from typing import NamedTuple

import pytest
import torch
from bfloat16_interpreter import teach
from conftest import naming
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_format import formula, random_words
from shuffled_programs import Shuffled
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from gptq_belle.engine.logit_rules import apply_repetition_penalty
from gptq_belle.engine.sampling import sample_inverse_cdf
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.kernels import triton_embedding, triton_head, triton_layout
from gptq_belle.kernels.layout import checked_weight
from gptq_belle.kernels.triton_embedding import embedding_launch
from gptq_belle.kernels.triton_head import head_launches
from gptq_belle.kernels.triton_launch import Workspace
from gptq_belle.kernels.triton_norm import FoldedNorm, NextNorm
from gptq_belle.kernels.triton_sampling import CANDIDATES, TILE, new_sampling_state, sampling_launch

teach()

HALF, BRAIN = torch.float16, torch.bfloat16
ERRORS = {HALF: 5e-4, BRAIN: 4e-3}  # relative; measured up to 3.6e-4 and 2.9e-3
EPS = 1e-5
ROOM = 16
SYMMETRIC = {4: 0x77777777, 8: 0x7F7F7F7F}  # stored zeros of version 1: the zero points are 8 and 128


class Ends(NamedTuple):
    """Random weights of both ends; `exact` is the matrix (V, width) in float64."""

    matrix: triton_layout.SlicedWeight | Tensor
    exact: Tensor
    gamma: Tensor
    beta: Tensor | None
    embedding_norm: tuple[Tensor, Tensor, float] | None


def ends(bits, width, vocab, group, bloom, dtype=HALF):
    if bits == 16:
        matrix = torch.randn(vocab, width).to(dtype)
        exact = matrix.double()
    else:
        words = random_words(bits, width, -(-vocab // 32) * 32, group)
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
    model = ends(bits, width, 203, group, bloom)
    tokens = torch.tensor([0, 202, 7, 7]).int()
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
    vocab = 203
    model = ends(bits, width, vocab, group, bloom, dtype)
    tokens = torch.randint(0, vocab, (rows,)).int()
    lengths = torch.tensor([3, -1, 0, ROOM, 15] * 8)[:rows].int()
    stream, x, moments = embed(model, tokens, dtype)
    norm, bias = final_norm(model, moments)
    expected = (rms_norm(stream.double(), (width,), model.gamma.double(), EPS) if model.beta is None else
                layer_norm(stream.double(), (width,), model.gamma.double(), model.beta.double(), EPS)) @ model.exact.t()
    first = None
    for seed in range(2):
        space, answers = workspace(rows), torch.full((rows, ROOM), -1).int()
        logits, next_tokens, next_lengths = torch.empty(rows, vocab), tokens.clone(), lengths.clone()
        launches = head_launches(x, model.matrix, bias, norm, logits, next_tokens, next_lengths, answers, space)
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
    fits = active & (lengths < ROOM)
    assert torch.equal(answers[fits, lengths[fits].long()], next_tokens[fits])
    assert (answers != -1).sum() == fits.sum()


def test_first_of_equal_logits_is_the_greedy_token():
    table = torch.zeros(300, 128).half()
    table[[130, 70, 290], 0] = 1
    model = Ends(table, table.double(), torch.ones(128), None, None)
    _, x, moments = embed(model, torch.tensor([70]).int(), HALF)
    norm, _ = final_norm(model, moments)
    token, logits = torch.zeros(1).int(), torch.empty(1, 300)
    with Shuffled(3):
        head_launches(x, table, None, norm, logits, token, torch.zeros(1).int(), torch.zeros(1, ROOM).int(),
                      workspace(1))[0]()
    assert token.item() == 70


class Row(NamedTuple):
    """Sampling parameters of a row, a random number and the tokens that occurred."""

    params: SamplingParams
    number: float
    seen: list[int]


def sampled(logits, rows, lengths=None):
    """Tokens of the kernel for logits (n, V), by way of a dense head whose columns are the logits."""
    count, vocab = logits.shape
    state = new_sampling_state(count, vocab, ROOM, logits.device)
    lengths = torch.zeros(count).int() if lengths is None else lengths
    for i, (params, number, seen) in enumerate(rows):
        state.temperatures[i], state.penalties[i] = params.temperature, params.repetition_penalty
        state.top_k[i], state.top_p[i], state.min_p[i] = params.top_k, params.top_p, params.min_p
        state.numbers[i, max(lengths[i].item(), 0) % ROOM] = number
        state.seen[i, seen] = 1
    tokens, answers = torch.full((count,), -1).int(), torch.full((count, ROOM), -1).int()
    moments = torch.tensor([count, 0.0])[:, None, None].expand(2, 1, count).contiguous()  # of rows with norm 1
    launches = head_launches(torch.eye(count).half(), logits.t().contiguous(), None,
                             FoldedNorm(moments, None, 1e-12, count, 64), torch.empty(count, vocab), tokens, lengths,
                             answers, workspace(count), state)
    assert len(launches) == 2
    for launch in launches:
        launch()
    return tokens, lengths, answers, state


def expected_token(logits, row):
    params, number, seen = row
    logits = apply_repetition_penalty(logits.float(), torch.tensor(sorted(set(seen)), dtype=torch.long),
                                      params.repetition_penalty)
    if params.temperature == 0:
        return int(logits.argmax())
    return int(sample_inverse_cdf(logits[None], [params], [number]))


@st.composite
def rows_of(draw, vocab):
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.35, 1.0, 1.7])), top_k=draw(st.sampled_from([0, 1, 30, 64, 65, 150])),
        top_p=draw(st.sampled_from([1.0, 0.85, 0.5, 0.01])), min_p=draw(st.sampled_from([0.0, 0.0, 0.05])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2, 0.7])))
    seen = draw(st.lists(st.integers(0, vocab - 1), max_size=20))
    return Row(params, draw(st.floats(0, 0.999)), seen)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data(), vocab=st.sampled_from([33, 300, 1000]), spread=st.sampled_from([0.2, 1.0, 4.0]),
       seed=st.integers(0, 2**16))
def test_sampled_tokens_are_those_of_the_definition(data, vocab, spread, seed):
    torch.manual_seed(seed)
    rows = data.draw(st.lists(rows_of(vocab), min_size=1, max_size=4))
    logits = (torch.randn(len(rows), vocab) * spread).half()
    tokens, lengths, answers, state = sampled(logits, rows)
    assert tokens.tolist() == [expected_token(one, row) for one, row in zip(logits, rows, strict=True)]
    assert torch.equal(answers[:, 0], tokens)
    assert (lengths == 1).all()
    for row, token in enumerate(tokens.tolist()):
        assert set(state.seen[row].nonzero().flatten().tolist()) == {*rows[row].seen, token}


def test_tokens_beyond_the_candidates():
    """Flat distributions, where most tokens that a number selects are not among the candidates."""
    limits = [{"top_p": 0.9}, {}, {"top_k": 500}, {"top_k": 90, "top_p": 0.9}, {"top_p": 0.95, "min_p": 0.3}]
    logits = (torch.randn(1, 600) * 0.3).half().expand(2 * len(limits), -1)
    rows = [Row(SamplingParams(temperature=1.0, **limit), number, [])
            for limit in limits for number in (0.3, 0.9999999)]
    tokens = sampled(logits, rows)[0].tolist()
    assert tokens == [expected_token(logits[0], row) for row in rows]
    ranks = logits[0].argsort(descending=True, stable=True).argsort()[tokens]
    assert (ranks[1::2] >= CANDIDATES).all()


def test_ties_are_ordered_by_token():
    """All logits are equal: the number selects its share of the tokens in their order."""
    vocab, numbers = 500, [0.0, 0.2505, 0.7505, 0.9985]
    rows = [Row(SamplingParams(temperature=1.0), number, []) for number in numbers]
    limited = [row._replace(params=SamplingParams(temperature=1.0, top_k=200)) for row in rows]
    tokens = sampled(torch.ones(8, vocab).half(), rows + limited)[0].tolist()
    assert tokens == [0, 125, 375, 499, 0, 50, 150, 199]
    quarters = [row._replace(number=number) for row, number in zip(rows, (0.0, 0.25, 0.5, 0.75), strict=True)]
    assert sampled(torch.ones(4, 4).half(), quarters)[0].tolist() == [0, 1, 2, 3]


def test_candidates_that_suffice_are_all_that_is_read():
    """Logits of the tiles that hold no candidate are the largest: the search in all logits would find them."""
    params, logits = SamplingParams(temperature=1.0, top_k=30, top_p=0.85), 2 * torch.randn(1, 80 * TILE)
    state, tiles = new_sampling_state(1, logits.shape[1], ROOM, logits.device), logits.view(80, TILE)
    largest = tiles.amax(1)
    state.maxima[:, :, 0] = torch.stack([largest, (tiles - largest[:, None]).exp().sum(1)])
    state.adjusted.copy_(logits).view(80, TILE)[largest.argsort()[: 80 - CANDIDATES]] = 50.0
    state.temperatures[0], state.top_k[0], state.top_p[0], state.numbers[0, 0] = 1.0, params.top_k, params.top_p, 0.6
    tokens = torch.zeros(1).int()
    sampling_launch(state, tokens, torch.zeros(1).int(), torch.zeros(1, ROOM).int())()
    assert tokens.item() == expected_token(logits[0], Row(params, 0.6, []))


@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000])
def test_token_is_in_the_vocabulary_whatever_the_logits_are(bits):
    """NaN of both signs: the host finds it later, but the token is an address before."""
    rows = [SamplingParams(temperature=t, **limit) for t in (0.0, 1.0)
            for limit in ({}, {"top_k": 3}, {"top_k": 90, "top_p": 0.5}, {"min_p": 0.1})]
    state = new_sampling_state(len(rows), 100, ROOM, torch.device("cpu"))
    for i, params in enumerate(rows):
        state.temperatures[i], state.top_k[i], state.top_p[i] = params.temperature, params.top_k, params.top_p
        state.min_p[i], state.numbers[i] = params.min_p, 0.5
    for tensor in (state.adjusted, state.maxima):
        tensor.view(torch.int32).fill_(bits)
    tokens = torch.full((len(rows),), -1).int()
    sampling_launch(state, tokens, torch.zeros(len(rows)).int(), torch.zeros(len(rows), ROOM).int())()
    assert ((tokens >= 0) & (tokens < 100)).all(), tokens


def test_idle_rows_keep_everything():
    rows = [Row(SamplingParams(temperature=1.0), 0.3, []), Row(SamplingParams(temperature=1.0), 0.3, [])]
    tokens, lengths, answers, state = sampled(torch.randn(2, 100).half(), rows, torch.tensor([-1, 5]).int())
    assert tokens[0] == -1
    assert lengths.tolist() == [-1, 6]
    assert (answers[0] == -1).all()
    assert answers[1].tolist() == [-1] * 5 + [tokens[1]] + [-1] * 10
    assert not state.seen[0].any()


@pytest.mark.parametrize("field", ["top_k", "numbers", "seen", "maxima"])
def test_mismatched_state_is_refused(field):
    state = new_sampling_state(2, 100, ROOM, torch.device("cpu"))
    state, vector = state._replace(**{field: getattr(state, field)[:1]}), torch.zeros(2).int()
    with pytest.raises(ValueError, match=naming(field)):
        sampling_launch(state, vector, vector, torch.zeros(2, ROOM).int())


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
                      torch.zeros(3).int(), torch.zeros(2, ROOM).int(), workspace(2))
