"""Statistics of the KL divergence of a text, under the names of llama.cpp's llama-perplexity.

Means are over tokens; every `_error` is a standard error, with tokens taken as independent. The standard errors of
functions of means are propagated to first order (the delta method), with the covariance of the two models' losses on
the same tokens. The ratio of two perplexities therefore has a much smaller error than either perplexity.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from gptq_belle.common.text import count
from gptq_belle.evaluation.perplexity import exp_or_inf, standard_error

KL_QUANTILES = (0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01)
CHANGE_QUANTILES = (0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001)


class TokenDivergence(NamedTuple):
    """Comparison of two models' predictions at S positions."""

    kl: Tensor  # (S,) float64, KL(base || model) in nats, at least 0
    same_top: Tensor  # (S,) bool, whether the most likely token is the same
    base_loss: Tensor  # (S,) float64, -ln p of the next token under the base
    loss: Tensor  # (S,) float64, the same under the model

    @property
    def change(self) -> Tensor:
        """(S,) float64, change of the probability of the next token, -1 to 1; negative is worse."""
        return (-self.loss).exp() - (-self.base_loss).exp()


@dataclass(frozen=True, slots=True)
class Divergence:
    """Divergence of a model from its base on a text.

    Attributes:
        perplexity, base_perplexity: perplexity of the model and of the base.
        correlation: correlation of the two models' losses per token, -1 to 1; NaN if one of them is constant.
        log_ratio: ln(perplexity / base_perplexity).
        ratio, difference: ratio and difference of the two perplexities.
        kl_mean, kl_max, kl_min: KL(base || model) in nats per token.
        kl_quantiles: quantiles of KL by their share of tokens ("99.9%" to "1%").
        probability_change, probability_rms: mean and root mean square of the change of the probability of the next
            token, from -1 to 1; negative is worse.
        probability_max, probability_min, probability_quantiles: maximum, minimum and quantiles of that change.
        same_top: top-1 agreement: share of positions whose most likely token is the same, 0 to 1.
        tokens, windows: number of scored tokens and of windows.
    """

    perplexity: float
    perplexity_error: float
    base_perplexity: float
    base_perplexity_error: float
    correlation: float
    log_ratio: float
    log_ratio_error: float
    ratio: float
    ratio_error: float
    difference: float
    difference_error: float
    kl_mean: float
    kl_error: float
    kl_max: float
    kl_min: float
    kl_quantiles: dict[str, float]
    probability_change: float
    probability_change_error: float
    probability_rms: float
    probability_rms_error: float
    probability_max: float
    probability_min: float
    probability_quantiles: dict[str, float]
    same_top: float
    same_top_error: float
    tokens: int
    windows: int


def summarize_divergence(tokens: TokenDivergence, windows: int) -> Divergence:
    """Statistics of S tokens that were scored in `windows` windows."""
    change, log_ratio, same = tokens.change, tokens.loss - tokens.base_loss, tokens.same_top.double()
    mine, base = float(tokens.loss.mean()), float(tokens.base_loss.mean())
    mine_error, base_error, log_error = map(standard_error, (tokens.loss, tokens.base_loss, log_ratio))
    # Var(a - b) = Var a + Var b - 2 Cov(a, b), of means
    covariance = (mine_error**2 + base_error**2 - log_error**2) / 2
    perplexity, base_perplexity, ratio = exp_or_inf(mine), exp_or_inf(base), exp_or_inf(mine - base)
    spread = (perplexity * mine_error) ** 2 + (base_perplexity * base_error) ** 2
    rms = float(change.square().mean().sqrt())
    return Divergence(
        perplexity=perplexity,
        perplexity_error=perplexity * mine_error,
        base_perplexity=base_perplexity,
        base_perplexity_error=base_perplexity * base_error,
        correlation=covariance / (mine_error * base_error) if mine_error and base_error else math.nan,
        log_ratio=mine - base,
        log_ratio_error=log_error,
        ratio=ratio,
        ratio_error=ratio * log_error,
        difference=perplexity - base_perplexity,
        difference_error=math.sqrt(max(0.0, spread - 2 * perplexity * base_perplexity * covariance)),
        kl_mean=float(tokens.kl.mean()),
        kl_error=standard_error(tokens.kl),
        kl_max=float(tokens.kl.max()),
        kl_min=float(tokens.kl.min()),
        kl_quantiles=_quantiles(tokens.kl, KL_QUANTILES),
        probability_change=float(change.mean()),
        probability_change_error=standard_error(change),
        probability_rms=rms,
        probability_rms_error=standard_error(change.square()) / (2 * rms) if rms else 0.0,
        probability_max=float(change.max()),
        probability_min=float(change.min()),
        probability_quantiles=_quantiles(change, CHANGE_QUANTILES),
        same_top=float(same.mean()),
        same_top_error=standard_error(same),
        tokens=len(tokens.kl),
        windows=windows,
    )


def format_divergence(f: Divergence) -> Sequence[tuple[str, str]]:
    """The statistics as (name, value) texts, with the names and the order of llama-perplexity."""
    return [
        ("Mean PPL(Q)", f"{f.perplexity:.6f} ± {f.perplexity_error:.6f}"),
        ("Mean PPL(base)", f"{f.base_perplexity:.6f} ± {f.base_perplexity_error:.6f}"),
        ("Cor(ln(PPL(Q)), ln(PPL(base)))", f"{100 * f.correlation:.2f} %"),
        ("Mean ln(PPL(Q)/PPL(base))", f"{f.log_ratio:.6f} ± {f.log_ratio_error:.6f}"),
        ("Mean PPL(Q)/PPL(base)", f"{f.ratio:.6f} ± {f.ratio_error:.6f}"),
        ("Mean PPL(Q)-PPL(base)", f"{f.difference:.6f} ± {f.difference_error:.6f}"),
        ("Mean KLD", f"{f.kl_mean:.6f} ± {f.kl_error:.6f}"),
        ("Maximum KLD", f"{f.kl_max:.6f}"),
        *((f"{_quantile_name(name)} KLD", f"{value:.6f}") for name, value in f.kl_quantiles.items()),
        ("Minimum KLD", f"{f.kl_min:.6f}"),
        ("Mean Δp", f"{100 * f.probability_change:.3f} ± {100 * f.probability_change_error:.3f} %"),
        ("Maximum Δp", f"{100 * f.probability_max:.3f} %"),
        *((f"{_quantile_name(name)} Δp", f"{100 * value:.3f} %") for name, value in f.probability_quantiles.items()),
        ("Minimum Δp", f"{100 * f.probability_min:.3f} %"),
        ("RMS Δp", f"{100 * f.probability_rms:.3f} ± {100 * f.probability_rms_error:.3f} %"),
        ("Same top p", f"{100 * f.same_top:.3f} ± {100 * f.same_top_error:.3f} %"),
        ("tokens", f"{f.tokens} in {count(f.windows, 'window')}"),
    ]


def _quantiles(values: Tensor, shares: Sequence[float]) -> dict[str, float]:
    # not torch.quantile, which refuses more than 16 million values
    found = numpy.quantile(values.to(torch.float64).numpy(), shares)
    return {f"{100 * share:g}%": float(value) for share, value in zip(shares, found, strict=True)}


def _quantile_name(share: str) -> str:
    return "Median" if share == "50%" else f"{float(share[:-1]):.1f}%"
