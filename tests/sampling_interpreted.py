"""Sampling of the next tokens in Triton's interpreter: the tokens are those of engine/sampling.py.

`test_triton_decode.py` runs this file in a separate process: TRITON_INTERPRET has to be set before Triton is
imported.
"""

from typing import NamedTuple

import pytest
import torch
from conftest import naming
from hypothesis import given, settings
from hypothesis import strategies as st
from step_ends_interpreted import workspace

from gptq_belle.engine.logit_rules import apply_repetition_penalty
from gptq_belle.engine.sampling import sample_inverse_cdf
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.kernels.triton_head import head_launches
from gptq_belle.kernels.triton_norm import FoldedNorm
from gptq_belle.kernels.triton_sampling import CANDIDATES, TILE, new_sampling_state, sampling_launch

ROOM = 16


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
    tokens = torch.full((count,), -1).int()
    moments = torch.tensor([count, 0.0])[:, None, None].expand(2, 1, count).contiguous()  # of rows with norm 1
    launches = head_launches(torch.eye(count).half(), logits.t().contiguous(), None,
                             FoldedNorm(moments, None, 1e-12, count, 64), torch.empty(count, vocab), tokens, lengths,
                             workspace(count), state)
    assert len(launches) == 2
    for launch in launches:
        launch()
    return tokens, lengths, state


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
    tokens, lengths, state = sampled(logits, rows)
    assert tokens.tolist() == [expected_token(one, row) for one, row in zip(logits, rows, strict=True)]
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
    sampling_launch(state, tokens, torch.zeros(1).int())()
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
    sampling_launch(state, tokens, torch.zeros(len(rows)).int())()
    assert ((tokens >= 0) & (tokens < 100)).all(), tokens


def test_idle_rows_keep_everything():
    rows = [Row(SamplingParams(temperature=1.0), 0.3, []), Row(SamplingParams(temperature=1.0), 0.3, [])]
    tokens, lengths, state = sampled(torch.randn(2, 100).half(), rows, torch.tensor([-1, 5]).int())
    assert tokens[0] == -1
    assert lengths.tolist() == [-1, 6]
    assert state.seen[1].nonzero().flatten().tolist() == [tokens[1]]
    assert not state.seen[0].any()


@pytest.mark.parametrize("field", ["top_k", "numbers", "seen", "maxima"])
def test_mismatched_state_is_refused(field):
    state = new_sampling_state(2, 100, ROOM, torch.device("cpu"))
    state, vector = state._replace(**{field: getattr(state, field)[:1]}), torch.zeros(2).int()
    with pytest.raises(ValueError, match=naming(field)):
        sampling_launch(state, vector, vector)
