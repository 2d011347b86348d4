"""Statistics of KL divergence: values equal NumPy, standard errors equal a bootstrap, names equal llama-perplexity."""

import math

import numpy
import pytest
import torch

from gptq_belle.evaluation.kl_statistics import TokenDivergence, format_divergence, summarize_divergence

# The names that llama-perplexity prints, from a published log, with single spaces. Its second "99.0% KLD" is the 95 %
# quantile under a wrong name, and its list of quantiles has no 90 %.
LLAMA = ("Mean PPL(Q)", "Mean PPL(base)", "Cor(ln(PPL(Q)), ln(PPL(base)))", "Mean ln(PPL(Q)/PPL(base))",
         "Mean PPL(Q)/PPL(base)", "Mean PPL(Q)-PPL(base)", "Mean KLD", "Maximum KLD", "99.9% KLD", "99.0% KLD",
         "Median KLD", "10.0% KLD", "5.0% KLD", "1.0% KLD", "Minimum KLD", "Mean Δp", "Maximum Δp", "99.9% Δp",
         "99.0% Δp", "95.0% Δp", "90.0% Δp", "75.0% Δp", "Median Δp", "25.0% Δp", "10.0% Δp", "5.0% Δp", "1.0% Δp",
         "0.1% Δp", "Minimum Δp", "RMS Δp", "Same top p")


def tokens(count=800, seed=0):
    """Correlated losses of two models, like those of a model and its quantized form."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(count, generator=generator, dtype=torch.float64) * 3
    loss = (base + 0.2 * torch.randn(count, generator=generator, dtype=torch.float64)).clamp(min=0)
    kl = torch.rand(count, generator=generator, dtype=torch.float64) ** 4
    return TokenDivergence(kl, torch.rand(count, generator=generator) < 0.9, base, loss)


def select(tokens, choice):
    return TokenDivergence(*(column[choice] for column in tokens))


@pytest.fixture(scope="module")
def found():
    return summarize_divergence(tokens(), 3)


def test_statistics_equal_numpy(found):
    kl, same, base, loss = (column.double().numpy() for column in tokens())
    change = numpy.exp(-loss) - numpy.exp(-base)
    expected = {
        "perplexity": math.exp(loss.mean()), "base_perplexity": math.exp(base.mean()),
        "correlation": numpy.corrcoef(loss, base)[0, 1], "log_ratio": loss.mean() - base.mean(),
        "ratio": math.exp(loss.mean()) / math.exp(base.mean()),
        "difference": math.exp(loss.mean()) - math.exp(base.mean()), "kl_mean": kl.mean(), "kl_max": kl.max(),
        "kl_min": kl.min(), "probability_change": change.mean(), "probability_max": change.max(),
        "probability_min": change.min(), "probability_rms": math.sqrt((change**2).mean()), "same_top": same.mean(),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    for name, value in found.kl_quantiles.items():
        assert value == pytest.approx(numpy.percentile(kl, float(name[:-1])))
    for name, value in found.probability_quantiles.items():
        assert value == pytest.approx(numpy.percentile(change, float(name[:-1])))
    assert (found.tokens, found.windows) == (800, 3)


ERRORS = {"perplexity_error": "perplexity", "base_perplexity_error": "base_perplexity", "log_ratio_error": "log_ratio",
          "ratio_error": "ratio", "difference_error": "difference", "kl_error": "kl_mean",
          "probability_change_error": "probability_change", "probability_rms_error": "probability_rms",
          "same_top_error": "same_top"}


@pytest.fixture(scope="module")
def resampled():
    """Standard deviation of every statistic over 1,000 samples of the tokens, drawn with replacement."""
    generator, every = torch.Generator().manual_seed(5), tokens()
    draws = [summarize_divergence(select(every, torch.randint(800, (800,), generator=generator)), 1)
             for _ in range(1000)]
    return {name: numpy.std([getattr(draw, name) for draw in draws], ddof=1) for name in ERRORS.values()}


@pytest.mark.parametrize("error", ERRORS)
def test_standard_errors_equal_a_bootstrap(found, resampled, error):
    # a standard deviation of 1,000 draws is known to 1 / sqrt(2,000) = 2.2 %; four times that
    assert getattr(found, error) == pytest.approx(resampled[ERRORS[error]], rel=0.09)


def test_paired_difference_has_a_smaller_standard_error(found):
    assert found.difference_error < 0.5 * found.perplexity_error
    assert found.correlation > 0.9


def test_single_token_has_no_standard_error():
    one = summarize_divergence(select(tokens(), torch.tensor([3])), 1)
    assert one.kl_error == one.ratio_error == one.difference_error == 0
    assert math.isnan(one.correlation)


def test_printed_names_are_those_of_llama_perplexity(found):
    names = [name for name, _ in format_divergence(found)]
    assert [name for name in names if name in LLAMA] == list(LLAMA)
    assert set(names) - set(LLAMA) == {"95.0% KLD", "90.0% KLD", "tokens"}
    block = dict(format_divergence(found))
    assert block["Mean KLD"] == f"{found.kl_mean:.6f} ± {found.kl_error:.6f}"
    assert block["Same top p"].endswith(" %")
