"""What differs between architectures, as a table: where the blocks are, their linears in order, the prompt."""

from dataclasses import dataclass

from gptq_belle.errors import InputError


@dataclass(frozen=True, slots=True)
class Architecture:
    """Names inside a transformers model of one ``model_type``.

    Attributes:
        prefix: the base model's attribute, and the prefix of its tensors' names in a checkpoint.
        blocks: the list of decoder blocks, as a dotted path from the causal model.
        modules_before: modules that run before the first block.
        modules_after: modules that run behind the last one, the head excepted.
        stages: linears of a block by the order in which they run; those of one stage see the same input. The second one
            is attention's output projection.
        attention: the module of a block that ends in it.
        residual_in_attention: that module adds its second argument to its result.
        inner_copies: tensors of the feed-forward's inner size alive at a time in a forward pass, as measured.
        prompt_style: the usual prompt style of BELLE models with this architecture (see prompts/styles.py).
        fused: for each stage, the name under which vLLM and SGLang run it as one linear; "" where it is one.
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
        """All quantized linears of a block, by their path inside it, in the order in which they run."""
        return tuple(name for stage in self.stages for name in stage)

    @property
    def output(self) -> str:
        """Attention's output projection, by its path inside a block."""
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
    """The table's row for config.json's ``model_type``.

    Raises:
        InputError: an architecture that is not in the table.
    """
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise InputError(f"architecture {model_type!r} is not supported", f"config.json's model_type must be: {names}.")
    return ARCHITECTURES[model_type]
