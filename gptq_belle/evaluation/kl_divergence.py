"""KL(base || model): divergence of a quantized model's predictions from those of its base, token by token.

Both models read the same windows of the same text. The metrics are those of llama.cpp's llama-perplexity with
--kl-divergence. Perplexity alone hides damage, because tokens that became more likely cancel tokens that became less
likely.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_belle.errors import InputError
from gptq_belle.evaluation.base_predictions import BasePredictions
from gptq_belle.evaluation.kl_statistics import Divergence, TokenDivergence, summarize_divergence
from gptq_belle.evaluation.perplexity import (
    CHUNK,
    LogitsFunction,
    Progress,
    TextWindow,
    check_finite,
    encode,
    negative_log_likelihood,
    scored_rows,
    split_windows,
)


def compare_tokens(base: Tensor, model: Tensor, targets: Tensor) -> TokenDivergence:
    """Compare two models' logits (S, V) at positions whose following tokens are targets (S,)."""
    base_log, model_log = base.double().log_softmax(1), model.double().log_softmax(1)
    # A mean over p of ln p - ln q cannot be negative, but the rounding of equal distributions can give -1e-17.
    kl = (base_log.exp() * (base_log - model_log)).sum(1).clamp_(min=0)
    same = base.argmax(1) == model.argmax(1)
    return TokenDivergence(kl, same, negative_log_likelihood(base, targets), negative_log_likelihood(model, targets))


def divergence(base: LogitsFunction, model: LogitsFunction, tokenizer: Any, text: str, *, length: int = 512,
               stride: int | None = None, limit: int | None = None,
               progress: Progress = lambda done, total: None) -> Divergence:
    """Compare a model with its base on a text; both are in memory.

    Args:
        base, model: functions from ids (1, T) to logits (1, T, V).
        tokenizer: the tokenizer of both (see `check_same_tokenizer`).
        length, stride, limit, progress: as for `perplexity.perplexity`.
    Raises:
        UsageError: a window that is not allowed.
        InputError: the text is too short, the vocabularies differ in size, or logits are not finite.
    """
    windows = list(split_windows(encode(tokenizer, text, limit), length, stride))

    def base_rows(number: int) -> Tensor:
        window = windows[number]
        return check_finite(base(window.ids[None])[0])[-window.scored - 1 : -1]

    return summarize_divergence(compare_windows(base_rows, model, windows, progress), len(windows))


def compare_with_predictions(base: BasePredictions, model: LogitsFunction,
                             progress: Progress = lambda done, total: None) -> TokenDivergence:
    """Compare a model with stored predictions of its base, which does not need to be in memory.

    The results are bit for bit those of `divergence`, because the base's logits are stored unchanged.

    Raises:
        InputError: as `divergence`.
    """
    return compare_windows(base.rows, model, base.windows, progress)


def compare_windows(base: Callable[[int], Tensor], model: LogitsFunction, windows: Sequence[TextWindow],
                    progress: Progress = lambda done, total: None) -> TokenDivergence:
    """Compare a model with its base window by window.

    Args:
        base: function from a window's number to the base's logits (scored, V) of its scored tokens.
        model: function from ids (1, T) to logits (1, T, V).
        progress: called with (windows done, number of windows).
    """
    parts: list[TokenDivergence] = []
    for number, window in enumerate(windows):
        ours, theirs = check_finite(model(window.ids[None])[0]), base(number)
        if ours.shape[-1] != theirs.shape[-1]:
            raise InputError(f"the models have vocabularies of {theirs.shape[-1]} and {ours.shape[-1]} tokens",
                             "Give as --base the model that was quantized.")
        pairs = zip(theirs.to(ours.device).split(CHUNK), scored_rows(ours, window), strict=True)
        parts += [compare_tokens(base_rows, rows, targets) for base_rows, (rows, targets) in pairs]
        progress(number + 1, len(windows))
    return TokenDivergence(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))
