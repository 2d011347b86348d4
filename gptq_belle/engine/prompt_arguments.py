"""Validate prompts that are passed to `Model.generate` and `Model.stream`: text, token ids, or several of these."""

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy
import torch
from torch import Tensor

from gptq_belle.common.text import is_unicode
from gptq_belle.engine.sampling_params import DEFAULT_MAX_NEW_TOKENS
from gptq_belle.errors import UsageError

ALLOWED = "Give text, token ids (T,), or for `generate` a list of these or token ids (B, T)."


def split_prompts(prompt: Any) -> list[Any] | None:
    """The prompts if an argument holds several; None if it is a single prompt.

    A tensor or array (B, T), and a list with any text, list or row of ids, hold several.

    Raises:
        UsageError: a tensor or array with more dimensions.
    """
    if isinstance(prompt, Tensor | numpy.ndarray):
        if prompt.ndim > 2:
            raise UsageError(f"token ids of shape {tuple(prompt.shape)} are not a batch of prompts", ALLOWED)
        return list(prompt) if prompt.ndim == 2 else None
    if not isinstance(prompt, list | tuple) or not any(map(_is_prompt, prompt)):
        return None
    return list(prompt)


def check_prompt(prompt: Any, vocabulary: int) -> str | list[int]:
    """Validate one prompt.

    Args:
        prompt: text, or token ids as a list, tuple, range, tensor (T,) or array (T,) of integers.
        vocabulary: number of token ids that the model takes.
    Returns:
        The text, or a list of token ids.
    Raises:
        UsageError: another type; text with lone surrogates; ids outside the vocabulary. The place is named.
    """
    if isinstance(prompt, str):
        if not is_unicode(prompt):
            raise UsageError("the prompt contains bytes or surrogates that are not valid Unicode",
                             "Decode it with the encoding that it was written in, such as GBK.")
        return prompt
    if isinstance(prompt, Tensor | numpy.ndarray):
        prompt = _listed(prompt)
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
        raise UsageError(f"a prompt is neither text nor a sequence of token ids, but {_type_name(prompt)}", ALLOWED)
    return [_token(token, place, vocabulary) for place, token in enumerate(prompt)]


def new_token_limit(prompt: int, wanted: int | None, capacity: int | None) -> int:
    """How many tokens to generate after a prompt of `prompt` tokens.

    Args:
        prompt: its length.
        wanted: the limit that the caller sets, if any.
        capacity: limit of prompt and answer together, if any.
    Raises:
        UsageError: prompt and answer exceed the capacity.
    """
    if capacity is None:
        return wanted or DEFAULT_MAX_NEW_TOKENS
    if capacity - prompt < max(1, wanted or 1):
        answer = f"{wanted} new ones" if wanted else "an answer"
        raise UsageError(f"a prompt of {prompt} tokens and {answer} do not fit into {capacity}",
                         "Shorten the prompt, or ask for fewer new tokens.")
    return wanted or min(capacity - prompt, DEFAULT_MAX_NEW_TOKENS)


def _is_prompt(item: Any) -> bool:
    """Whether an element of a list is a prompt itself, not a token id."""
    return isinstance(item, str | Sequence) or (isinstance(item, Tensor | numpy.ndarray) and item.ndim > 0)


def _listed(ids: Tensor | numpy.ndarray) -> list[int]:
    is_integer = ids.dtype.kind in "iu" if isinstance(ids, numpy.ndarray) else is_integer_dtype(ids.dtype)
    if ids.ndim != 1 or not is_integer:
        raise UsageError(f"a prompt of shape {tuple(ids.shape)} and dtype {ids.dtype} is not a sequence of token ids",
                         ALLOWED)
    found: list[int] = ids.tolist()
    return found


def is_integer_dtype(dtype: torch.dtype) -> bool:
    """Whether a dtype can hold token ids; bool cannot."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _token(token: Any, place: int, vocabulary: int) -> int:
    is_mask = isinstance(token, bool | numpy.bool_) or (isinstance(token, Tensor) and token.dtype is torch.bool)
    try:
        found = None if is_mask else index(token)
    except TypeError:
        found = None
    if found is None:
        raise UsageError(f"element {place} of a prompt is {_type_name(token)}, not a token id", ALLOWED)
    if not 0 <= found < vocabulary:
        raise UsageError(f"element {place} of a prompt, {found}, is not in the vocabulary of {vocabulary} tokens",
                         "Use the tokenizer of this model.")
    return found


def _type_name(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
