"""Sizes of a model from config.json, without reading weights; names and shapes are discovery's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptq_belle.errors import InputError
from gptq_belle.models.architectures import Architecture, LinearShape, Shape, family
from gptq_belle.models.discovery import LARGEST, architecture, model_class

DAMAGED = "config.json is damaged, or the model is of a kind that is not supported."
__all__ = ["DAMAGED", "LARGEST", "Dimensions", "LinearShape", "Shape", "dimensions"]


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of a model.

    Attributes:
        model_type: of config.json.
        num_layers: number of decoder blocks.
        hidden_size: width of the hidden states.
        intermediate_size: width inside the feed-forward network.
        num_heads, head_dim: of attention.
        num_kv_heads: heads of keys and values; fewer than `num_heads` in grouped-query attention.
        vocab_size: rows of the embedding and of the lm_head.
        tied: whether embedding and lm_head are one matrix.
        context: limit of prompt and answer tokens together; None if the configuration does not state one.
        arch: names and shapes of its modules.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    context: int | None
    arch: Architecture

    @property
    def biased(self) -> frozenset[str]:
        """Linears that have a bias, by their path inside a block."""
        return frozenset(name for name in self.arch.shapes if f"{name}.bias" in self.arch.vectors)


def dimensions(config: Mapping[str, Any]) -> Dimensions:
    """Read a model's dimensions from its configuration.

    Raises:
        InputError: the architecture is unknown, or a value is missing or not a positive integer.
    """
    names = getattr(model_class(config).config_class, "attribute_map", {})

    def stated(key: str, *older: str) -> int:
        return _required(config, key, names.get(key, key), *older)

    hidden, heads = stated("hidden_size", "n_embed"), stated("num_attention_heads", "n_head")
    layers, vocabulary = stated("num_hidden_layers", "n_layer"), stated("vocab_size")
    _check_heads(config, hidden, heads)
    for key, value in {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers,
                       "vocab_size": vocabulary, "intermediate_size": _optional(config, "intermediate_size")}.items():
        if value is not None and value > LARGEST[key]:
            raise InputError(f"config.json's {key} {value} is not from 1 to {LARGEST[key]}", DAMAGED)
    contexts = ("max_position_embeddings", names.get("max_position_embeddings", "seq_length"), "max_seq_len")
    context = next((value for key in contexts if (value := _optional(config, key)) is not None), None)
    arch = architecture(config)
    return Dimensions(str(config["model_type"]), arch.num_layers, hidden, arch.shapes[arch.linears[-1]].in_features,
                      heads, arch.num_kv_heads, arch.head_dim, vocabulary, arch.tied, context, arch)


def _check_heads(config: Mapping[str, Any], hidden: int, heads: int) -> None:
    """Refuse numbers of heads with which attention fails when it runs; transformers does not check them."""
    bloom = family(config["model_type"]).native == "bloom"
    kv_heads, head_dim = _optional(config, "num_key_value_heads") or heads, None if bloom else _optional(
        config, "head_dim")
    size = head_dim or hidden // heads
    if heads % kv_heads or (hidden % heads and head_dim is None) or (size % 2 and not bloom):
        raise InputError(f"{heads} heads of dimension {size} with {kv_heads} key-value heads do not fit the hidden "
                         f"size {hidden}", DAMAGED)


def _required(config: Mapping[str, Any], *keys: str) -> int:
    found = next((value for key in keys if (value := _optional(config, key)) is not None), None)
    if found is None:
        raise InputError(f"config.json does not state {keys[0]}",
                         "The file is damaged or describes another kind of model.")
    return found


def _optional(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise InputError(f"{key} {str(value)[:40]} of config.json is not a positive integer", "The file is damaged.")
    return value
