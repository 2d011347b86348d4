"""Drawing a token: each filter against its definition, seeds, and the refusal of values out of range."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_belle.errors import UsageError
from gptq_belle.runtime.sampling import Sampler, SamplingParams, kept, penalized

CPU = torch.device("cpu")
LOGITS = torch.log(torch.tensor([0.4, 0.1, 0.3, 0.2]))


def kept_tokens(logits, **limits):
    return kept(logits, **{"top_k": 0, "top_p": 1.0} | limits).isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize(("limits", "tokens"), [
    ({}, [0, 1, 2, 3]),
    ({"top_k": 1}, [0]),
    ({"top_k": 3}, [0, 2, 3]),
    ({"top_k": 9}, [0, 1, 2, 3]),
    ({"top_p": 0.01}, [0]),
    ({"top_p": 0.39}, [0]),
    ({"top_p": 0.41}, [0, 2]),
    ({"top_p": 0.69}, [0, 2]),
    ({"top_p": 0.71}, [0, 2, 3]),
    ({"top_p": 0.95}, [0, 1, 2, 3]),
    ({"top_k": 2, "top_p": 0.5}, [0]),  # of the two that are left, the first has 4/7
])
def test_what_is_kept(limits, tokens):
    assert kept_tokens(LOGITS, **limits) == tokens


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=20), st.integers(0, 25), st.floats(0.001, 1))
def test_the_likeliest_is_always_kept_and_values_are_not_changed(values, top_k, top_p):
    logits = torch.tensor(values)
    left = kept(logits, top_k, top_p)
    assert left.max() == logits.max()
    assert torch.equal(left[left.isfinite()], logits[left.isfinite()])
    assert top_k == 0 or len(set(values)) < len(values) or left.isfinite().sum() <= top_k


def test_repetition_penalty():
    logits = torch.tensor([2.0, -2.0, 3.0, -3.0])
    assert penalized(logits, torch.tensor([0, 1]), 2.0).tolist() == [1.0, -4.0, 3.0, -3.0]
    assert logits.tolist() == [2.0, -2.0, 3.0, -3.0]


def test_greedy_takes_the_likeliest():
    assert Sampler(SamplingParams(), [], CPU)(LOGITS) == 0


def test_greedy_with_penalty_moves_on():
    sampler = Sampler(SamplingParams(repetition_penalty=3.0), [2], CPU)
    logits = torch.tensor([1.0, 0.9, 1.1, 0.5])
    assert [sampler(logits) for _ in range(4)] == [0, 1, 3, 2]


def test_a_seed_repeats_the_draw_and_others_differ():
    def draw(seed):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [], CPU)
        return [sampler(torch.zeros(1000)) for _ in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_frequencies_follow_temperature():
    sampler = Sampler(SamplingParams(temperature=0.5, seed=0), [], CPU)
    counts = torch.bincount(torch.tensor([sampler(LOGITS) for _ in range(4000)]), minlength=4) / 4000
    expected = (LOGITS / 0.5).softmax(-1)
    assert (counts - expected).abs().max() < 0.03


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    Sampler(SamplingParams(temperature=1.0), [], CPU)(LOGITS)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("option", "value"), [
    ("max_new_tokens", 0), ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1),
    ("top_p", 0.0), ("top_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.nan), ("seed", -1),
    ("seed", 2**63), ("stop", "Human:"),
])
def test_values_out_of_range_are_refused(option, value):
    with pytest.raises(UsageError, match=option) as caught:
        SamplingParams(**{option: value})
    assert caught.value.remedy
