"""How far a quantized model's predictions are from its base's: KL(base || model), token by token.

The same text, the same windows, both models; the figures are those that llama.cpp's llama-perplexity prints with
--kl-divergence. Perplexity alone hides damage, since errors for better and for worse cancel in it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptq_belle.errors import InputError
from gptq_belle.evaluation.perplexity import (
    Logits,
    encode,
    finite,
    negative_log_likelihood,
    scored_rows,
    standard_error,
    windows,
)

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


class TokenFigures(NamedTuple):
    """For each of S positions, how two models' predictions compare."""

    kl: Tensor  # (S,) float64, KL(base || model) in nats, not below 0
    same_top: Tensor  # (S,) bool, whether both find the same token the most likely
    base_loss: Tensor  # (S,) float64, -ln p of the token that follows, under the base
    loss: Tensor  # (S,) float64, the same under the model


@dataclass(frozen=True, slots=True)
class Divergence:
    """The comparison over a text; every `_error` is a standard error, tokens taken as independent.

    Attributes:
        kl_mean, kl_error, kl_max: KL(base || model) in nats a token.
        kl_quantiles: the values below which the share of tokens lies, by its name ("50%" to "99.9%").
        same_top, same_top_error: share of positions whose most likely token is the same, 0 to 1.
        base_perplexity, perplexity: of the base and of the model.
        log_ratio, log_ratio_error: mean of ln(perplexity / base perplexity), paired by token.
        probability_change, probability_rms: mean and root mean square of the change of the probability of the
            token that follows, from -1 to 1.
        tokens, windows: how many were scored.
    """

    kl_mean: float
    kl_error: float
    kl_max: float
    kl_quantiles: dict[str, float]
    same_top: float
    same_top_error: float
    base_perplexity: float
    perplexity: float
    log_ratio: float
    log_ratio_error: float
    probability_change: float
    probability_rms: float
    tokens: int
    windows: int


def compare_tokens(base: Tensor, model: Tensor, targets: Tensor) -> TokenFigures:
    """Compare two models' logits (S, V) at positions whose following tokens are targets (S,)."""
    base_log, model_log = base.double().log_softmax(1), model.double().log_softmax(1)
    # A mean over p of ln p - ln q cannot be negative; rounding of equal distributions can leave -1e-17.
    kl = (base_log.exp() * (base_log - model_log)).sum(1).clamp_(min=0)
    same = base.argmax(1) == model.argmax(1)
    return TokenFigures(kl, same, negative_log_likelihood(base, targets), negative_log_likelihood(model, targets))


def divergence(base: Logits, model: Logits, tokenizer: Any, text: str, *, length: int = 512,
               stride: int | None = None, limit: int | None = None,
               progress: Callable[[int, int], None] | None = None) -> Divergence:
    """Compare two models over a text.

    Args:
        base, model: functions from ids (1, T) to logits (1, T, V); the base is the one that is right.
        tokenizer: the one that both share (see `check_same_tokenizer`).
        length, stride, limit, progress: as for `perplexity.perplexity`.
    Raises:
        UsageError: a window that is not allowed.
        InputError: too short a text, vocabularies of different sizes, logits that are not finite.
    """
    cut = list(windows(encode(tokenizer, text, limit), length, stride))
    parts: list[TokenFigures] = []
    for done, window in enumerate(cut, 1):
        ours, theirs = finite(model(window.ids[None])[0]), finite(base(window.ids[None])[0])
        if ours.shape != theirs.shape:
            raise InputError(f"the models have vocabularies of {theirs.shape[-1]} and {ours.shape[-1]} tokens",
                             "Give as --base the model that was quantized.")
        pairs = zip(scored_rows(theirs.to(ours.device), window), scored_rows(ours, window), strict=True)
        parts += [compare_tokens(base_rows, rows, targets) for (base_rows, targets), (rows, _) in pairs]
        if progress:
            progress(done, len(cut))
    return summarize(TokenFigures(*(torch.cat(column).cpu() for column in zip(*parts, strict=True))), len(cut))


def summarize(tokens: TokenFigures, count: int) -> Divergence:
    """Figures of S tokens, seen in `count` windows, to the block that is printed."""
    change = (-tokens.loss).exp() - (-tokens.base_loss).exp()
    ratio = tokens.loss - tokens.base_loss
    same = tokens.same_top.double()
    points = torch.quantile(tokens.kl, torch.tensor(QUANTILES, dtype=torch.float64))
    return Divergence(
        kl_mean=float(tokens.kl.mean()),
        kl_error=standard_error(tokens.kl),
        kl_max=float(tokens.kl.max()),
        kl_quantiles={f"{100 * share:g}%": float(value) for share, value in zip(QUANTILES, points, strict=True)},
        same_top=float(same.mean()),
        same_top_error=standard_error(same),
        base_perplexity=math.exp(min(700.0, float(tokens.base_loss.mean()))),
        perplexity=math.exp(min(700.0, float(tokens.loss.mean()))),
        log_ratio=float(ratio.mean()),
        log_ratio_error=standard_error(ratio),
        probability_change=float(change.mean()),
        probability_rms=float(change.square().mean().sqrt()),
        tokens=len(tokens.kl),
        windows=count,
    )


def check_same_tokenizer(base: Any, model: Any, text: str) -> None:
    """Make sure that two tokenizers cut a text alike.

    Raises:
        InputError: they do not, so that predictions cannot be compared position by position.
    """
    sample = text[:20_000]
    if not torch.equal(encode(base, sample), encode(model, sample)):
        raise InputError("the two models cut the text into different tokens",
                         "Give as --base the model that was quantized, with its own tokenizer.")


def lines(figures: Divergence) -> Sequence[tuple[str, str]]:
    """The block of figures as (name, value) pairs, in the order in which llama-perplexity prints them."""
    f = figures
    quantiles = [(f"KL {name}", f"{value:.6f}") for name, value in reversed(f.kl_quantiles.items())]
    return [
        ("perplexity", f"{f.perplexity:.4f}"),
        ("perplexity of the base", f"{f.base_perplexity:.4f}"),
        ("ln(perplexity / base)", f"{f.log_ratio:+.6f} ± {f.log_ratio_error:.6f}"),
        ("KL mean", f"{f.kl_mean:.6f} ± {f.kl_error:.6f}"),
        ("KL maximum", f"{f.kl_max:.6f}"),
        *quantiles,
        ("change of probability, mean", f"{100 * f.probability_change:+.3f} %"),
        ("change of probability, RMS", f"{100 * f.probability_rms:.3f} %"),
        ("same top token", f"{100 * f.same_top:.3f} ± {100 * f.same_top_error:.3f} %"),
        ("tokens", f"{f.tokens}"),
    ]
