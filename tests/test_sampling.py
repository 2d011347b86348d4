"""Sampling: filters against their definitions, random seeds, and rejection of values out of range."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_belle.engine.logit_rules import apply_repetition_penalty
from gptq_belle.engine.sampling import Sampler, filter_logits, sample_inverse_cdf, sample_tokens
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.errors import UsageError

CPU = torch.device("cpu")
LOGITS = torch.log(torch.tensor([0.4, 0.1, 0.3, 0.2]))


def kept_tokens(logits, **limits):
    values, order = filter_logits(logits[None], [SamplingParams(**limits)])
    return sorted(order[values.isfinite()].tolist())


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
    ({"min_p": 1.0}, [0]),
    ({"min_p": 0.51}, [0, 2]),
    ({"min_p": 0.49}, [0, 2, 3]),
    ({"top_p": 0.71, "min_p": 0.6}, [0, 2]),
    ({"top_k": 2, "top_p": 0.5}, [0]),  # of the two that are left, the first has 4/7
])
def test_filters_keep_the_expected_tokens(limits, tokens):
    assert kept_tokens(LOGITS, **limits) == tokens


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=20), st.integers(0, 25), st.floats(0.001, 1),
       st.floats(0, 1))
def test_most_likely_token_is_always_kept(values, top_k, top_p, min_p):
    logits = torch.tensor(values)
    left, order = filter_logits(logits[None], [SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)])
    assert left[0, 0] == logits.max()
    assert torch.equal(left[left.isfinite()], logits[order[left.isfinite()]])
    assert top_k == 0 or left.isfinite().sum() <= top_k


def test_repetition_penalty():
    logits = torch.tensor([2.0, -2.0, 3.0, -3.0])
    assert apply_repetition_penalty(logits, torch.tensor([0, 1]), 2.0).tolist() == [1.0, -4.0, 3.0, -3.0]
    assert logits.tolist() == [2.0, -2.0, 3.0, -3.0]


def test_greedy_decoding_selects_the_most_likely_token():
    assert Sampler(SamplingParams(), [], CPU)(LOGITS) == 0


def test_greedy_decoding_with_repetition_penalty_avoids_repeats():
    sampler = Sampler(SamplingParams(repetition_penalty=3.0), [2], CPU)
    logits = torch.tensor([1.0, 0.9, 1.1, 0.5])
    assert [sampler(logits) for _ in range(4)] == [0, 1, 3, 2]


def expected_logits(params, prompt, answer, ends, logits):
    """Logits by the definitions of OpenAI's API (presence, frequency, bias) and of vLLM (their order, min_tokens)."""
    values = logits.double().tolist()
    for token in range(len(values)):
        values[token] += (params.logit_bias or {}).get(token, 0)
        if len(answer) < params.min_tokens and token in ends:
            values[token] = -math.inf
        if token in prompt or token in answer:
            factor = params.repetition_penalty
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        values[token] -= params.frequency_penalty * answer.count(token)
        values[token] -= params.presence_penalty * (token in answer)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("options", [
    {"presence_penalty": 1.5}, {"frequency_penalty": -0.7}, {"presence_penalty": -2.0, "frequency_penalty": 2.0},
    {"logit_bias": {3: 100.0, 0: -4.5}}, {"min_tokens": 6},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {1: 2.0, 7: -100.0}, "min_tokens": 4,
     "repetition_penalty": 1.3}])
def test_logits_are_changed_as_defined(options):
    params, prompt, ends, answer = SamplingParams(**options), [2, 5, 5], [4, 6], []
    sampler = Sampler(params, prompt, CPU, ends)
    for step in range(9):
        logits = 3 * torch.randn(8)
        kept = logits.clone()
        expected = expected_logits(params, prompt, answer, ends, logits)
        assert torch.allclose(sampler.rules.apply(logits).double(), expected, rtol=1e-6, atol=1e-5)
        answer.append(sampler(logits))
        assert answer[-1] == expected.argmax(), step
        assert torch.equal(logits, kept)


def test_answer_that_can_only_end_ends_before_its_minimum():
    assert Sampler(SamplingParams(min_tokens=5), [], CPU, range(4))(LOGITS) == 0


def test_same_seed_gives_the_same_tokens():
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


@pytest.mark.parametrize(("number", "token"), [(0.0, 0), (0.39, 0), (0.41, 2), (0.69, 2), (0.71, 3), (0.999999, 1)])
def test_inverse_cdf_selects_the_token_of_a_number(number, token):
    assert sample_inverse_cdf(LOGITS[None], [SamplingParams(temperature=1.0)], [number]).tolist() == [token]
    assert sample_inverse_cdf(LOGITS[None], [SamplingParams(temperature=1.0, top_k=2)], [number]).item() in (0, 2)


def test_rows_are_sampled_independently():
    rows = [SamplingParams(), SamplingParams(temperature=0.7, seed=1), SamplingParams(repetition_penalty=1.5),
            SamplingParams(temperature=0.9, presence_penalty=1.0, logit_bias={4: 3.0}, seed=4),
            SamplingParams(temperature=1.3, top_k=5, top_p=0.8, min_p=0.1, repetition_penalty=1.2, seed=2)]
    logits = torch.randn(6, 5, 50)
    together, alone = ([Sampler(params, [1, 2, 3], CPU) for params in rows] for _ in range(2))
    for step in logits:
        expected = [sampler(row) for sampler, row in zip(alone, step.clone(), strict=True)]
        assert sample_tokens(together, step.clone()) == expected


def test_batched_sampling_gives_the_same_tokens():  # the code for GPUs, on the CPU
    rows = [SamplingParams(temperature=0.7), SamplingParams(temperature=1.3, top_k=5, top_p=0.8, min_p=0.1)]
    logits, numbers = torch.randn(2, 50), [0.3, 0.8]
    one_by_one = [sample_inverse_cdf(logits[i : i + 1], rows[i : i + 1], numbers[i : i + 1]).item() for i in (0, 1)]
    assert sample_inverse_cdf(logits, rows, numbers).tolist() == one_by_one


def test_global_random_generator_is_not_used():
    before = torch.get_rng_state()
    Sampler(SamplingParams(temperature=1.0), [], CPU)(LOGITS)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("option", "value"), [
    ("max_new_tokens", 0), ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1),
    ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1),
    ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.nan), ("seed", -1),
    ("seed", 2**63), ("stop", "Human:"), ("presence_penalty", 2.1), ("frequency_penalty", math.nan),
    ("logit_bias", {5: 101}), ("logit_bias", {"5": 1}), ("logit_bias", {5: math.nan}), ("logit_bias", [5]),
    ("min_tokens", -1), ("min_tokens", 1.5), ("stop_token_ids", "5"), ("stop_token_ids", (True,)),
])
def test_values_out_of_range_are_refused(option, value):
    with pytest.raises(UsageError, match=option) as caught:
        SamplingParams(**{option: value})
    assert caught.value.remedy


@pytest.mark.parametrize("extreme", [{"top_p": 5e-324}, {"temperature": 5e-324}, {"temperature": 1e308},
                                     {"repetition_penalty": 5e-324}, {"repetition_penalty": 1e308},
                                     {"top_k": 10**400}, {"min_p": 5e-324}, {"min_p": 1.0}])
def test_values_beyond_float32_still_give_a_token(extreme):
    logits = torch.tensor([0.0, 30.0, -40.0, 3.0])
    sampler = Sampler(SamplingParams(**({"temperature": 1.0, "seed": 1} | extreme)), [0, 2], torch.device("cpu"))
    tokens = {sampler(logits) for _ in range(8)}
    assert tokens <= {0, 1, 2, 3}
    if extreme.keys() & {"top_p", "min_p"} or extreme.get("temperature") == 5e-324:
        assert tokens == {1}
