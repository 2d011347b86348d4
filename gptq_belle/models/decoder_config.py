"""Decoder configuration from config.json: sizes, positions, norms. Validated before any weight is read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_belle.errors import InputError
from gptq_belle.models.architectures import family
from gptq_belle.models.dimensions import DAMAGED, Dimensions, dimensions

DEFAULT_ROPE_THETA = 10000.0


def rotary_frequencies(config: Mapping[str, Any], head_dim: int) -> Tensor:
    """Rotary frequencies (head_dim / 2,) float32: angle per position for each pair of dimensions of a head.

    Args:
        config: config.json with ``rope_parameters``, or ``rope_scaling`` and ``rope_theta`` before transformers 5.
        head_dim: size of a head, even.
    Raises:
        InputError: the kind of scaling is not in SCALINGS, or a value is invalid.
    """
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(stated, dict):
        raise InputError(f"config.json's rope_parameters {str(stated)[:40]!r} are not a JSON object", "It is damaged.")
    kind = next((value for value in stated.values() if isinstance(value, dict)),  # one for each kind of attention
                stated.get("rope_type", stated.get("type", "default")))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise InputError(f"rope_type {str(kind)[:40]!r} is not supported", f"It must be one of {', '.join(SCALINGS)}.")
    rotary_share = stated.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotary_share not in (None, 1, 1.0):
        raise InputError(f"partial_rotary_factor {str(rotary_share)[:40]} is not supported",
                         "Only models that rotate all dimensions of a head can be run.")
    theta = _number({"rope_theta": DEFAULT_ROPE_THETA} | dict(config) | stated, "rope_theta")
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return SCALINGS[kind](plain, {"max_position_embeddings": config.get("max_position_embeddings")} | stated)


def _unscaled(plain: Tensor, stated: Mapping[str, Any]) -> Tensor:
    """Kinds "default" and "dynamic": the latter changes nothing within max_position_embeddings, our context limit."""
    return plain


def _linear(plain: Tensor, stated: Mapping[str, Any]) -> Tensor:
    return plain / _number(stated, "factor")


def _llama3(plain: Tensor, stated: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: low frequencies divided by the factor, high ones unchanged, a smooth transition between."""
    factor, low, high = (_number(stated, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    before = stated.get("original_max_position_embeddings") or stated.get("max_position_embeddings")
    original = _number({"original_max_position_embeddings": before}, "original_max_position_embeddings")
    turns = original * plain / (2 * math.pi)  # rotations within the original context
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - share) + plain * share


SCALINGS: dict[str, Callable[[Tensor, Mapping[str, Any]], Tensor]] = {
    "default": _unscaled, "dynamic": _unscaled, "linear": _linear, "llama3": _llama3}


def _number(stated: Mapping[str, Any], key: str) -> float:
    value = stated.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 < value < 1e12:
        raise InputError(f"config.json's {key} {str(value)[:40]} is not a number above 0", "It is damaged.")
    return float(value)


ATTENTION_KINDS = {"full_attention", "sliding_attention"}  # within the window both give the same result
ACTIVATIONS = {"bloom": ("gelu",), "llama": ("silu",)}


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Configuration of a decoder.

    Attributes:
        dimensions: sizes of its tensors.
        context: limit of prompt and answer tokens together; None if the configuration does not state one. For a sliding
            window (Mistral) it is the window: within it, full attention gives the same result.
        eps: epsilon of the norms. This and what follows, except eos, are the native decoders': transformers reads its
            own where its forward pass runs.
        frequencies: rotary frequencies (head_dim / 2,) float32; None with ALiBi.
        slopes: ALiBi slopes (heads,) float32; None with rotary embeddings.
        normed_residual: BLOOM's apply_residual_connection_post_layernorm.
        eos: eos token ids of config.json.
    """

    dimensions: Dimensions
    context: int | None
    eps: float
    frequencies: Tensor | None
    slopes: Tensor | None
    normed_residual: bool
    eos: frozenset[int]


def read_decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the decoder configuration of a config.json.

    Raises:
        InputError: a value is missing, has a wrong type, or is not supported for this architecture.
    """
    native = family(config.get("model_type")).native
    bloom = native == "bloom"
    window = _window(config) if native == "llama" else None
    if native == "llama":
        rotary_frequencies(config, 2)  # refused before transformers meets the same value
    figures = dimensions(config)
    if not native:
        return DecoderConfig(figures, figures.context, 0.0, None, None, False, token_ids(config, "eos_token_id"))
    _check_activation(config, native)
    if unknown := set(_layer_types(config)) - ATTENTION_KINDS:
        raise InputError(f"layer_types of config.json holds {str(min(unknown, key=str))[:40]!r}",
                         f"It must be {' or '.join(sorted(ATTENTION_KINDS))}.")
    limits = [limit for limit in (figures.context, window) if limit is not None]
    return DecoderConfig(
        dimensions=figures,
        context=min(limits) if limits else None,
        eps=_fraction(config, "layer_norm_epsilon" if bloom else "rms_norm_eps", 1e-5 if bloom else 1e-6),
        frequencies=None if bloom else rotary_frequencies(config, figures.head_dim),
        slopes=alibi_slopes(figures.num_heads) if bloom else None,
        normed_residual=bloom and bool(config.get("apply_residual_connection_post_layernorm")),
        eos=token_ids(config, "eos_token_id"),
    )


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi slopes (heads,) float32 (arXiv 2108.12409): the powers of 2**(-8 / n), where n is the largest power of two
    up to `heads`, then every second one for 2 n."""
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 / n * (i + 1)) for i in range(n)]
    return torch.tensor(slopes + [2 ** (-4 / n * (2 * i + 1)) for i in range(heads - n)])


def token_ids(config: Mapping[str, Any], key: str) -> frozenset[int]:
    """Read a token id or a list of them; empty if the key is missing.

    Raises:
        InputError: the value is not a token id or a list of them.
    """
    value = config.get(key)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and abs(token) < 1 << 31 for token in found):
        raise InputError(f"{key} {str(value)[:40]!r} is not a token id", DAMAGED)
    return frozenset(found)


def check_token_ids(config: Mapping[str, Any], vocabulary: int, where: str) -> None:
    """Refuse eos tokens that the model cannot generate, since its answers would not end there, and other wrong ids.

    Raises:
        InputError: an id of eos_token_id is outside of the vocabulary, one of pad_token_id is above it, or one of
            bos_token_id is not an integer.
    """
    token_ids(config, "bos_token_id")
    if wrong := [token for token in token_ids(config, "pad_token_id") if token >= vocabulary]:
        raise InputError(f"{where} pad_token_id {wrong[0]} is not among the {vocabulary} tokens of the model",
                         "Correct pad_token_id, or remove it.")
    if wrong := [token for token in token_ids(config, "eos_token_id") if not 0 <= token < vocabulary]:
        raise InputError(f"{where} eos_token_id {wrong[0]} is not among the {vocabulary} tokens of the model",
                         "Correct eos_token_id, or remove it: the tokenizer's eos token is used as well.")


def _check_activation(config: Mapping[str, Any], native: str) -> None:
    found = config.get("hidden_act", ACTIVATIONS[native][0])
    if found not in ACTIVATIONS[native]:
        raise InputError(f"hidden_act {str(found)[:40]!r} is not supported", f"It must be {ACTIVATIONS[native][0]}.")


def _layer_types(config: Mapping[str, Any]) -> list[Any]:
    value = config.get("layer_types") or []
    return value if isinstance(value, list) and all(isinstance(kind, str) for kind in value) else [str(value)]


def _window(config: Mapping[str, Any]) -> int | None:
    """Sliding window: of Mistral (default 4096), and of Qwen2 if use_sliding_window is set; else None."""
    value = config.get("sliding_window", 4096)
    if value is None or (config.get("model_type") != "mistral" and not config.get("use_sliding_window")):
        return None
    if type(value) is not int or value < 1:
        raise InputError(f"sliding_window {str(value)[:40]!r} is not a positive integer", DAMAGED)
    return value


def _fraction(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"{key} {str(value)[:40]!r} is not a number from 0 to 1", DAMAGED)
    return float(value)
