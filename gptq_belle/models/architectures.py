"""What is known about a decoder: its structure, which discovery.py finds, and its family, which nothing else tells."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

Shape = tuple[int, ...]
LM_HEAD = "lm_head"


class LinearShape(NamedTuple):
    """Size of a linear. Its weight has the shape (out_features, in_features)."""

    in_features: int  # K
    out_features: int  # N


@dataclass(frozen=True, slots=True)
class Family:
    """What the module tree of a ``model_type`` does not tell.

    Attributes:
        prompt_style: default prompt style without a chat template, see prompts/styles.py.
        native: name of the decoder of engine/ that runs it; "" if transformers' own forward does.
        fused: name of the single linear that vLLM and SGLang run in place of the linears of a stage.
        norms: path of the norm whose output a stage with this linear reads and, with the usual settings, nothing else.
        residual_attention: path of an attention module that adds its second argument (the residual) to its result.
        head: name of the lm_head in files.
    """

    prompt_style: str = "newline"
    native: str = ""
    fused: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    residual_attention: str = ""
    head: str = LM_HEAD


_GATED = {("mlp.gate_proj", "mlp.up_proj"): "mlp.gate_up_proj",
          ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "self_attn.qkv_proj"}
_NORMS = dict.fromkeys(("self_attn.q_proj", "self_attention.query_key_value"), "input_layernorm") | dict.fromkeys(
    ("mlp.gate_proj", "mlp.dense_h_to_4h"), "post_attention_layernorm")
OTHER = Family(fused=_GATED)
FAMILIES = {"bloom": Family("bloom", "bloom", norms=_NORMS, residual_attention="self_attention"),
            "gpt_neox": Family(head="embed_out"),
            **dict.fromkeys(("llama", "mistral", "qwen2"), Family("llama", "llama", _GATED, _NORMS))}
# Tensors in files of older transformers that are computed instead of read.
COMPUTED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")


@dataclass(frozen=True, slots=True)
class Architecture:
    """Names and shapes in a transformers model.

    Attributes:
        prefix: attribute of the base model, and prefix of its tensor names in a checkpoint.
        blocks: dotted path of the list of decoder blocks; its parent is the module that runs them.
        modules_before: modules with parameters that run before the first block; the first one is the embedding.
        modules_after: modules with parameters that run after the last block, except the lm_head.
        stages: linears of a block in execution order; those of one stage have the same input.
        attention: the module of a block that ends with `output`, so that its result can be replayed; "" if there is
            none.
        output: the linear that ends the attention.
        attention_results: length of the tuple that the attention module returns; 0 if it returns a tensor.
        returns_tuple: whether a block returns a tuple.
        shapes: (K, N) of a block's linears.
        vectors: shapes of a block's other parameters: norms and biases.
        outer: shapes of the parameters outside the blocks, without a tied lm_head.
        num_layers: number of blocks.
        num_kv_heads, head_dim: shape of the keys and values of a token.
        tied: whether the lm_head is the embedding.
        family: what the module tree does not tell.
    """

    prefix: str
    blocks: str
    modules_before: tuple[str, ...]
    modules_after: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    attention: str
    output: str
    attention_results: int
    returns_tuple: bool
    shapes: Mapping[str, LinearShape]
    vectors: Mapping[str, Shape]
    outer: Mapping[str, Shape]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    family: Family

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of all quantized linears in a block, in execution order of their stages."""
        return tuple(name for stage in self.stages for name in stage)

    @property
    def output_stage(self) -> int:
        """Number of the stage of `output`; -1 if there is none."""
        return next((index for index, stage in enumerate(self.stages) if self.output in stage), -1)

    @property
    def fused(self) -> tuple[str, ...]:
        """For each stage, the name of the single linear that vLLM and SGLang run; "" if they run the stage's own."""
        return tuple(self.family.fused.get(stage, "") for stage in self.stages)

    @property
    def norms(self) -> tuple[str, ...]:
        """For each stage, the norm whose output it reads (`Family.norms`); "" where channel scales have no place."""
        return tuple(next((self.family.norms[name] for name in stage if name in self.family.norms), "")
                     for stage in self.stages)

    @property
    def inner_copies(self) -> int:
        """Tensors of the feed-forward's inner size in memory during a forward pass: 2 for one linear, 4 for a gated
        one, as measured."""
        last = self.linears[-1]
        beside = [name for name in self.linears[:-1] if name.rpartition(".")[0] == last.rpartition(".")[0]]
        width = sum(self.shapes[name].out_features for name in beside)
        return max(2, 2 * width // self.shapes[last].in_features)


def family(model_type: object) -> Family:
    """Return what is known about a ``model_type`` beyond its module tree."""
    return FAMILIES.get(model_type, OTHER) if isinstance(model_type, str) else OTHER
