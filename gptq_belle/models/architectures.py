"""Table of supported architectures: module names, linears in execution order, prompt style."""

from dataclasses import dataclass

from gptq_belle.errors import InputError


@dataclass(frozen=True, slots=True)
class Architecture:
    """Names in a transformers model of one ``model_type``.

    Attributes:
        prefix: attribute of the base model, and prefix of its tensor names in a checkpoint.
        blocks: dotted path of the list of decoder blocks.
        modules_before: modules that run before the first block; the first one is the embedding.
        modules_after: modules that run after the last block, except the lm_head.
        stages: linears of a block in execution order; those of one stage have the same input. The second stage is the
            output projection of attention.
        attention: the attention module of a block, which ends with that projection.
        residual_in_attention: whether that module adds its second argument (the residual) to its result.
        inner_copies: measured number of tensors of the feed-forward's inner size in memory during a forward pass.
        prompt_style: default prompt style of BELLE models with this architecture, see prompts/styles.py.
        fused: for each stage, the name of the single linear that vLLM and SGLang run; "" if the stage is one linear.
    """

    prefix: str
    blocks: str
    modules_before: tuple[str, ...]
    modules_after: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    attention: str
    residual_in_attention: bool
    inner_copies: int
    prompt_style: str
    fused: tuple[str, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of all quantized linears in a block, in execution order."""
        return tuple(name for stage in self.stages for name in stage)

    @property
    def output(self) -> str:
        """Path of the output projection of attention in a block."""
        return self.stages[1][0]


_LLAMA = Architecture(
    prefix="model",
    blocks="model.layers",
    modules_before=("model.embed_tokens",),
    modules_after=("model.norm",),
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    attention="self_attn",
    residual_in_attention=False,
    inner_copies=4,
    prompt_style="llama",
    fused=("self_attn.qkv_proj", "", "mlp.gate_up_proj", ""),
)
ARCHITECTURES = {
    "bloom": Architecture(
        prefix="transformer",
        blocks="transformer.h",
        modules_before=("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
        modules_after=("transformer.ln_f",),
        stages=(
            ("self_attention.query_key_value",),
            ("self_attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        attention="self_attention",
        residual_in_attention=True,
        inner_copies=2,
        prompt_style="bloom",
        fused=("", "", "", ""),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
# Tensors in files of older transformers that are computed instead of read.
COMPUTED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias")
LM_HEAD = "lm_head"


def architecture(model_type: object) -> Architecture:
    """Return the architecture of a ``model_type``.

    Raises:
        InputError: the architecture is not supported.
    """
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise InputError(f"architecture {model_type!r} is not supported", f"config.json's model_type must be: {names}.")
    return ARCHITECTURES[model_type]
