"""Frequencies of rotary position embeddings (Su et al., 2104.09864), as a configuration states them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gptq_belle.errors import InputError

THETA = 10000.0  # where the configuration does not say


def frequencies(config: Mapping[str, Any], head_dim: int) -> Tensor:
    """Angle a position of each pair of a head's dimensions: (head_dim / 2,) float32.

    Args:
        config: config.json; ``rope_parameters``, or ``rope_scaling`` and ``rope_theta`` of files before transformers 5.
        head_dim: even.
    Raises:
        InputError: a kind of scaling that is not in SCALINGS, or a figure that cannot be.
    """
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(stated, dict):
        raise InputError(f"config.json's rope_parameters {str(stated)[:40]!r} are not an object", "It is damaged.")
    kind = stated.get("rope_type", stated.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise InputError(f"rope_type {str(kind)[:40]!r} is not supported", f"It must be one of {', '.join(SCALINGS)}.")
    if stated.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise InputError("partial_rotary_factor other than 1 is not supported", "Use another model.")
    theta = _number({"rope_theta": THETA} | dict(config) | stated, "rope_theta")
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return SCALINGS[kind](plain, {"max_position_embeddings": config.get("max_position_embeddings")} | stated)


def _as_they_are(plain: Tensor, stated: Mapping[str, Any]) -> Tensor:
    """"default", and "dynamic", which changes nothing up to max_position_embeddings, where the context ends here."""
    return plain


def _linear(plain: Tensor, stated: Mapping[str, Any]) -> Tensor:
    return plain / _number(stated, "factor")


def _llama3(plain: Tensor, stated: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long waves stretched by the factor, short ones left, and a smooth passage between."""
    factor, low, high = (_number(stated, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    before = stated.get("original_max_position_embeddings") or stated.get("max_position_embeddings")
    original = _number({"original_max_position_embeddings": before}, "original_max_position_embeddings")
    turns = original * plain / (2 * math.pi)  # of each wave within the original context
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - share) + plain * share


SCALINGS: dict[str, Callable[[Tensor, Mapping[str, Any]], Tensor]] = {
    "default": _as_they_are, "dynamic": _as_they_are, "linear": _linear, "llama3": _llama3}


def _number(stated: Mapping[str, Any], key: str) -> float:
    value = stated.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 < value < 1e12:
        raise InputError(f"config.json's {key} {str(value)[:40]} is not a number above 0", "It is damaged.")
    return float(value)
