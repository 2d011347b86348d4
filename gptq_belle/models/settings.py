"""What a decoder needs to know besides shapes, read from config.json and checked before any weight is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_belle.errors import InputError
from gptq_belle.models.rope import frequencies
from gptq_belle.models.shapes import Dimensions, dimensions
from gptq_belle.models.skeleton import LARGEST

ACTIVATIONS = {"bloom": ("gelu",), "llama": ("silu",)}
DAMAGED = "config.json is damaged, or the model is of a kind that is not supported."
LIMITS = {"blocks": "num_hidden_layers", "width": "hidden_size", "inner": "intermediate_size",
          "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
          "vocabulary": "vocab_size"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Figures of one model.

    Attributes:
        sizes: its dimensions.
        context: the most tokens of prompt and answer together; None where the configuration does not say. With a
            sliding window (Mistral), the window: within it attention sees everything, as it does here.
        eps: of the norms.
        frequencies: of rotary embeddings, (head_dim / 2,) float32; None where positions come by ALiBi.
        slopes: of ALiBi, (heads,) float32; None where there are rotary embeddings.
        normed_residual: BLOOM's apply_residual_connection_post_layernorm.
        eos: token ids that config.json names as the end of an answer.
    """

    sizes: Dimensions
    context: int | None
    eps: float
    frequencies: Tensor | None
    slopes: Tensor | None
    normed_residual: bool
    eos: frozenset[int]


def read_settings(config: Mapping[str, Any]) -> Settings:
    """Settings of a configuration.

    Raises:
        InputError: a figure that is missing, of a wrong kind, or that fits no model of this architecture.
    """
    sizes = dimensions(config)
    _check_sizes(sizes, config)
    bloom = sizes.model_type == "bloom"
    window = None if bloom else _window(config)
    limits = [limit for limit in (sizes.context, window) if limit is not None]
    return Settings(
        sizes=sizes,
        context=min(limits) if limits else None,
        eps=_small(config, "layer_norm_epsilon" if bloom else "rms_norm_eps", 1e-5 if bloom else 1e-6),
        frequencies=None if bloom else frequencies(config, sizes.head_dim),
        slopes=alibi_slopes(sizes.heads) if bloom else None,
        normed_residual=bloom and bool(config.get("apply_residual_connection_post_layernorm")),
        eos=token_ids(config, "eos_token_id"),
    )


def alibi_slopes(heads: int) -> Tensor:
    """Slopes (heads,) float32 of Press et al. (2108.12409): powers of 2**(-8 / n) for n, the power of two at or below
    `heads`, then every second one of those for 2 n."""
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 / n * (i + 1)) for i in range(n)]
    return torch.tensor(slopes + [2 ** (-4 / n * (2 * i + 1)) for i in range(heads - n)])


def token_ids(config: Mapping[str, Any], key: str) -> frozenset[int]:
    """One token id or a list of them; none where the key is not there.

    Raises:
        InputError: something else.
    """
    value = config.get(key)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and abs(token) < 1 << 31 for token in found):
        raise InputError(f"{key} {str(value)[:40]!r} is not a token id", DAMAGED)
    return frozenset(found)


def _check_sizes(sizes: Dimensions, config: Mapping[str, Any]) -> None:
    for name, key in LIMITS.items():
        if not 1 <= getattr(sizes, name) <= LARGEST[key]:
            raise InputError(f"config.json's {key} {getattr(sizes, name)} is not from 1 to {LARGEST[key]}", DAMAGED)
    bloom = sizes.model_type == "bloom"
    given = not bloom and config.get("head_dim") is not None
    if sizes.heads % sizes.kv_heads or (sizes.width % sizes.heads and not given) or (sizes.head_dim % 2 and not bloom):
        raise InputError(f"{sizes.heads} heads of {sizes.head_dim}, {sizes.kv_heads} of keys, do not fit a width of "
                         f"{sizes.width}", DAMAGED)
    kind = "bloom" if bloom else "llama"
    found = config.get("hidden_act", ACTIVATIONS[kind][0])
    if found not in ACTIVATIONS[kind]:
        raise InputError(f"hidden_act {str(found)[:40]!r} is not supported", f"It must be {ACTIVATIONS[kind][0]}.")


def _window(config: Mapping[str, Any]) -> int | None:
    """The sliding window: Mistral's, 4096 where nothing is stated, and Qwen2's where it is switched on."""
    value = config.get("sliding_window", 4096)
    if value is None or (config.get("model_type") != "mistral" and not config.get("use_sliding_window")):
        return None
    if type(value) is not int or value < 1:
        raise InputError(f"sliding_window {str(value)[:40]!r} is not a count", DAMAGED)
    return value


def _small(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"{key} {str(value)[:40]!r} is not a small number", DAMAGED)
    return float(value)
