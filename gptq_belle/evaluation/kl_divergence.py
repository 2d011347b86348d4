"""How far a quantized model's predictions are from its base's: KL(base || model), token by token.

The same text, the same windows, both models; the figures are those that llama.cpp's llama-perplexity prints with
--kl-divergence. Perplexity alone hides damage, since errors for better and for worse cancel in it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_belle.errors import InputError
from gptq_belle.evaluation.base_predictions import Predictions
from gptq_belle.evaluation.kl_statistics import Divergence, TokenFigures, summarize
from gptq_belle.evaluation.perplexity import (
    CHUNK,
    Logits,
    Window,
    encode,
    finite,
    negative_log_likelihood,
    scored_rows,
    windows,
)

Progress = Callable[[int, int], None]


def compare_tokens(base: Tensor, model: Tensor, targets: Tensor) -> TokenFigures:
    """Compare two models' logits (S, V) at positions whose following tokens are targets (S,)."""
    base_log, model_log = base.double().log_softmax(1), model.double().log_softmax(1)
    # A mean over p of ln p - ln q cannot be negative; rounding of equal distributions can leave -1e-17.
    kl = (base_log.exp() * (base_log - model_log)).sum(1).clamp_(min=0)
    same = base.argmax(1) == model.argmax(1)
    return TokenFigures(kl, same, negative_log_likelihood(base, targets), negative_log_likelihood(model, targets))


def divergence(base: Logits, model: Logits, tokenizer: Any, text: str, *, length: int = 512,
               stride: int | None = None, limit: int | None = None, progress: Progress | None = None) -> Divergence:
    """Compare two models that are both in memory over a text.

    Args:
        base, model: functions from ids (1, T) to logits (1, T, V); the base is the one that is right.
        tokenizer: the one that both share (see `check_same_tokenizer`).
        length, stride, limit, progress: as for `perplexity.perplexity`.
    Raises:
        UsageError: a window that is not allowed.
        InputError: too short a text, vocabularies of different sizes, logits that are not finite.
    """
    cut = list(windows(encode(tokenizer, text, limit), length, stride))

    def rows(number: int) -> Tensor:
        window = cut[number]
        return finite(base(window.ids[None])[0])[-window.scored - 1 : -1]

    return summarize(compare_windows(rows, model, cut, progress), len(cut))


def token_figures(kept: Predictions, model: Logits, progress: Progress | None = None) -> TokenFigures:
    """Compare a model with predictions of its base that are on the disk; the base is not in memory.

    The figures are those of `divergence` bit for bit: what is kept are the base's logits as they were.

    Raises:
        InputError: as `divergence`.
    """
    return compare_windows(kept.rows, model, kept.windows, progress)


def compare_windows(base: Callable[[int], Tensor], model: Logits, cut: Sequence[Window],
                    progress: Progress | None = None) -> TokenFigures:
    """Compare window by window.

    Args:
        base: from a window's number to the base's logits (scored, V) of the tokens that are scored.
        model: a function from ids (1, T) to logits (1, T, V).
        cut: the windows.
        progress: called with (windows done, windows in all).
    """
    parts: list[TokenFigures] = []
    for number, window in enumerate(cut):
        ours, theirs = finite(model(window.ids[None])[0]), base(number)
        if ours.shape[-1] != theirs.shape[-1]:
            raise InputError(f"the models have vocabularies of {theirs.shape[-1]} and {ours.shape[-1]} tokens",
                             "Give as --base the model that was quantized.")
        pairs = zip(theirs.to(ours.device).split(CHUNK), scored_rows(ours, window), strict=True)
        parts += [compare_tokens(base_rows, rows, targets) for base_rows, (rows, targets) in pairs]
        if progress:
            progress(number + 1, len(cut))
    return TokenFigures(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))
