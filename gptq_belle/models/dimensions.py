"""Every tensor's name and shape, from config.json alone: no weights are read and no model is built."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptq_belle.errors import InputError
from gptq_belle.models.architectures import HEAD, architecture

# Beyond any model's; a figure within them makes no table larger than some MB (weights are on meta until read).
LARGEST = {"num_hidden_layers": 1024, "hidden_size": 1 << 17, "intermediate_size": 1 << 19, "vocab_size": 1 << 24,
           "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 1 << 14,
           "max_position_embeddings": 1 << 30}
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The figures of a model that its shapes follow from.

    Attributes:
        model_type: a key of `registry.ARCHITECTURES`.
        blocks: how many.
        width: of the hidden states.
        inner: inner size of the feed-forward.
        heads, kv_heads, head_dim: of attention; kv_heads share keys and values between heads where they are fewer.
        vocabulary: rows of the embedding and of the head.
        tied: whether the two are one matrix.
        context: the most tokens of prompt and answer; None where the configuration does not say.
        biased: linears that have a bias, by their path inside a block.
    """

    model_type: str
    blocks: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    context: int | None
    biased: frozenset[str]


def dimensions(config: Mapping[str, Any]) -> Dimensions:
    """The figures of a configuration.

    Raises:
        InputError: an unknown architecture; a figure that is missing or not a positive whole number.
    """
    model_type = config.get("model_type")
    linears = architecture(model_type).linears
    width = _figure(config, "hidden_size", "n_embed")
    heads = _figure(config, "num_attention_heads", "n_head")
    blocks, vocabulary = _figure(config, "num_hidden_layers", "n_layer"), _figure(config, "vocab_size")
    if model_type == "bloom":
        return Dimensions("bloom", blocks, width, 4 * width, heads, heads, width // heads, vocabulary,
                          bool(config.get("tie_word_embeddings", True)), _optional(config, "seq_length"),
                          frozenset(linears))
    return Dimensions(str(model_type), blocks, width, _figure(config, "intermediate_size"), heads,
                      _optional(config, "num_key_value_heads") or heads,
                      _optional(config, "head_dim") or width // heads, vocabulary,
                      bool(config.get("tie_word_embeddings", False)), _optional(config, "max_position_embeddings"),
                      frozenset(name for name in linears if _has_bias(config, name)))


def linear_shapes(d: Dimensions) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear of a block, by its path inside the block, in the order in which they run."""
    names = architecture(d.model_type).linears
    if d.model_type == "bloom":
        shapes = [(d.width, 3 * d.width), (d.width, d.width), (d.width, d.inner), (d.inner, d.width)]
    else:
        queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
        shapes = [(d.width, queries), (d.width, keys), (d.width, keys), (queries, d.width),
                  (d.width, d.inner), (d.width, d.inner), (d.inner, d.width)]
    return dict(zip(names, shapes, strict=True))


def vector_shapes(d: Dimensions) -> dict[str, Shape]:
    """Norms and biases of a block, by their path inside the block."""
    parts = ("weight", "bias") if d.model_type == "bloom" else ("weight",)
    norms: dict[str, Shape] = {f"{name}.{part}": (d.width,) for part in parts
                               for name in ("input_layernorm", "post_attention_layernorm")}
    return norms | {f"{name}.bias": (outputs,) for name, (_, outputs) in linear_shapes(d).items() if name in d.biased}


def outer_shapes(d: Dimensions) -> dict[str, Shape]:
    """Tensors outside of the blocks: embedding, norms, and the head where it is a matrix of its own."""
    matrix, vector = (d.vocabulary, d.width), (d.width,)
    head = {} if d.tied else {f"{HEAD}.weight": matrix}
    if d.model_type == "bloom":
        norms = ("transformer.word_embeddings_layernorm", "transformer.ln_f")
        return {"transformer.word_embeddings.weight": matrix,
                **{f"{name}.{part}": vector for name in norms for part in ("weight", "bias")}, **head}
    return {"model.embed_tokens.weight": matrix, "model.norm.weight": vector, **head}


def _has_bias(config: Mapping[str, Any], linear: str) -> bool:
    """Qwen2 has biases on q, k and v only; LLaMA says for attention and feed-forward each; Mistral has none."""
    if config.get("model_type") == "qwen2":
        return linear.endswith(("q_proj", "k_proj", "v_proj"))
    key = "attention_bias" if linear.startswith("self_attn.") else "mlp_bias"
    return config.get("model_type") == "llama" and bool(config.get(key))


def _figure(config: Mapping[str, Any], *keys: str) -> int:
    found = next((value for key in keys if (value := _optional(config, key)) is not None), None)
    if found is None:
        raise InputError(f"config.json does not state {keys[0]}", "It is damaged or belongs to another kind of model.")
    return found


def _optional(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise InputError(f"{key} {str(value)[:40]} of config.json is not a positive whole number", "It is damaged.")
    return value
