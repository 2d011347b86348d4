"""KL divergence compared with sums in plain Python, and its properties."""

import math

import numpy
import pytest
import torch
from conftest import VOCABULARY, naming, tiny_tokenizer

from gptq_belle.errors import InputError
from gptq_belle.evaluation.base_predictions import check_same_tokenizer
from gptq_belle.evaluation.kl_divergence import compare_tokens, divergence
from gptq_belle.evaluation.kl_statistics import summarize_divergence
from gptq_belle.evaluation.perplexity import CHUNK, encode

TEXT = "人工智能正在改变我们的生活,语言模型可以回答问题、翻译文章、编写程序。" * 8


def fake_model(seed, width=3.0):
    """Logits that depend on the token alone, so that context does not matter."""
    table = width * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return lambda ids: table[ids]


def distribution(row):
    weights = [math.exp(value - max(row)) for value in row]
    return [weight / sum(weights) for weight in weights]


def test_kl_equals_a_direct_computation():
    base, model, tokenizer = fake_model(1), fake_model(2), tiny_tokenizer()
    ids = encode(tokenizer, TEXT)
    found = divergence(base, model, tokenizer, TEXT, length=48, stride=20)
    kl, same, base_loss, loss = [], [], [], []
    p_rows, q_rows = (m(ids[None])[0].tolist() for m in (base, model))
    for i in range(len(ids) - 1):
        p, q = distribution(p_rows[i]), distribution(q_rows[i])
        kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        same.append(p.index(max(p)) == q.index(max(q)))
        base_loss.append(-math.log(p[ids[i + 1]]))
        loss.append(-math.log(q[ids[i + 1]]))
    assert len(ids) > CHUNK
    assert found.tokens == len(kl)
    near = {"rel": 1e-4, "abs": 1e-9}
    assert found.kl_mean == pytest.approx(numpy.mean(kl), **near)
    assert found.kl_error == pytest.approx(numpy.std(kl, ddof=1) / math.sqrt(len(kl)), **near)
    assert found.kl_max == pytest.approx(max(kl), **near)
    for name, share in {"1%": 1, "50%": 50, "90%": 90, "95%": 95, "99%": 99, "99.9%": 99.9}.items():
        assert found.kl_quantiles[name] == pytest.approx(numpy.percentile(kl, share), **near)
    assert found.same_top == pytest.approx(numpy.mean(same), **near)
    assert found.base_perplexity == pytest.approx(math.exp(numpy.mean(base_loss)), **near)
    assert found.perplexity == pytest.approx(math.exp(numpy.mean(loss)), **near)
    ratio = numpy.subtract(loss, base_loss)
    assert found.log_ratio == pytest.approx(ratio.mean(), **near)
    assert found.log_ratio_error == pytest.approx(ratio.std(ddof=1) / math.sqrt(len(ratio)), **near)
    change = numpy.exp(numpy.negative(loss)) - numpy.exp(numpy.negative(base_loss))
    assert found.probability_change == pytest.approx(change.mean(), **near)
    assert found.probability_rms == pytest.approx(math.sqrt((change**2).mean()), **near)


def test_a_model_does_not_diverge_from_itself():
    found = divergence(fake_model(1), fake_model(1), tiny_tokenizer(), TEXT, length=64)
    assert found.kl_mean == 0
    assert found.same_top == 1
    assert found.log_ratio == 0


def test_adding_a_constant_to_logits_changes_nothing():
    base, targets = torch.randn(5, 40), torch.arange(5)
    tokens = compare_tokens(base, base + 100, targets)
    assert float(tokens.kl.max()) < 1e-9
    assert torch.allclose(tokens.loss, tokens.base_loss, atol=1e-5)


def test_a_small_perturbation_is_measured_in_float32_logits():
    """KL of 8-bit models is near 1e-5, which the arithmetic must resolve."""
    base = torch.randn(400, 300)
    model = base + 1e-3 * torch.randn(400, 300)
    direct = torch.nn.functional.kl_div(model.double().log_softmax(1), base.double().softmax(1), reduction="batchmean")
    found = summarize_divergence(compare_tokens(base, model, torch.zeros(400, dtype=torch.int64)), 1)
    assert 1e-8 < float(direct) < 1e-5
    assert found.kl_mean == pytest.approx(float(direct), rel=1e-6)


def test_different_vocabularies_and_tokenizers_are_rejected(tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match=naming(384, 10)):
        divergence(fake_model(1), lambda ids: fake_model(1)(ids)[..., :10], tokenizer, TEXT)
    check_same_tokenizer(tokenizer, tiny_tokenizer(), TEXT)
    other = tiny_tokenizer()
    other.add_tokens(["人工智能"])
    with pytest.raises(InputError):
        check_same_tokenizer(tokenizer, other, TEXT)
