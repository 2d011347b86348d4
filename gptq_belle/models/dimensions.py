"""Names and shapes of all tensors of a model, computed from config.json without reading weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptq_belle.errors import InputError
from gptq_belle.models.architectures import LM_HEAD, architecture

# Upper limits on values of config.json, larger than those of any model. They keep a damaged configuration from
# allocating tables of more than a few MB.
LARGEST = {"num_hidden_layers": 1024, "hidden_size": 1 << 17, "intermediate_size": 1 << 19, "vocab_size": 1 << 24,
           "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 1 << 14,
           "max_position_embeddings": 1 << 30}
Shape = tuple[int, ...]


class LinearShape(NamedTuple):
    """Size of a linear. Its weight has the shape (out_features, in_features)."""

    in_features: int  # K
    out_features: int  # N


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of a model, from which all its shapes follow.

    Attributes:
        model_type: a key of `architectures.ARCHITECTURES`.
        num_layers: number of decoder blocks.
        hidden_size: width of the hidden states.
        intermediate_size: width inside the feed-forward network.
        num_heads, head_dim: of attention.
        num_kv_heads: heads of keys and values; fewer than `num_heads` in grouped-query attention.
        vocab_size: rows of the embedding and of the lm_head.
        tied: whether embedding and lm_head are one matrix.
        context: limit of prompt and answer tokens together; None if the configuration does not state one.
        biased: linears that have a bias, by their path inside a block.
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
    biased: frozenset[str]


def dimensions(config: Mapping[str, Any]) -> Dimensions:
    """Read a model's dimensions from its configuration.

    Raises:
        InputError: the architecture is unknown, or a value is missing or not a positive integer.
    """
    model_type = config.get("model_type")
    linears = architecture(model_type).linears
    hidden, heads = _required(config, "hidden_size", "n_embed"), _required(config, "num_attention_heads", "n_head")
    layers, vocab = _required(config, "num_hidden_layers", "n_layer"), _required(config, "vocab_size")
    if model_type == "bloom":
        return Dimensions("bloom", layers, hidden, 4 * hidden, heads, heads, hidden // heads, vocab,
                          bool(config.get("tie_word_embeddings", True)), _optional(config, "seq_length"),
                          frozenset(linears))
    return Dimensions(str(model_type), layers, hidden, _required(config, "intermediate_size"), heads,
                      _optional(config, "num_key_value_heads") or heads,
                      _optional(config, "head_dim") or hidden // heads, vocab,
                      bool(config.get("tie_word_embeddings", False)), _optional(config, "max_position_embeddings"),
                      frozenset(name for name in linears if _has_bias(config, name)))


def linear_shapes(d: Dimensions) -> dict[str, LinearShape]:
    """Shapes of a block's linears by their path inside the block, in the order in which they run."""
    hidden, inner = d.hidden_size, d.intermediate_size
    if d.model_type == "bloom":
        shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)]
    else:
        queries, keys = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
        shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden),
                  (hidden, inner), (hidden, inner), (inner, hidden)]
    names = architecture(d.model_type).linears
    return {name: LinearShape(*shape) for name, shape in zip(names, shapes, strict=True)}


def vector_shapes(d: Dimensions) -> dict[str, Shape]:
    """Shapes of a block's norms and biases by their path inside the block."""
    parts = ("weight", "bias") if d.model_type == "bloom" else ("weight",)
    norms: dict[str, Shape] = {f"{name}.{part}": (d.hidden_size,) for part in parts
                               for name in ("input_layernorm", "post_attention_layernorm")}
    return norms | {f"{name}.bias": (outputs,) for name, (_, outputs) in linear_shapes(d).items() if name in d.biased}


def outer_shapes(d: Dimensions) -> dict[str, Shape]:
    """Shapes of the tensors outside the blocks: embedding, norms, and the lm_head unless it is tied."""
    matrix, vector = (d.vocab_size, d.hidden_size), (d.hidden_size,)
    head = {} if d.tied else {f"{LM_HEAD}.weight": matrix}
    if d.model_type == "bloom":
        norms = ("transformer.word_embeddings_layernorm", "transformer.ln_f")
        return {"transformer.word_embeddings.weight": matrix,
                **{f"{name}.{part}": vector for name in norms for part in ("weight", "bias")}, **head}
    return {"model.embed_tokens.weight": matrix, "model.norm.weight": vector, **head}


def _has_bias(config: Mapping[str, Any], linear: str) -> bool:
    """Whether a linear has a bias: Qwen2 on q, k and v; LLaMA as the configuration states; Mistral never."""
    if config.get("model_type") == "qwen2":
        return linear.endswith(("q_proj", "k_proj", "v_proj"))
    key = "attention_bias" if linear.startswith("self_attn.") else "mlp_bias"
    return config.get("model_type") == "llama" and bool(config.get(key))


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
