"""Catalogue of the published BELLE models: hub id, configuration, form of publication, and the next command."""

from typing import Any, NamedTuple

from gptq_belle.errors import UsageError

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_act": "silu",
          "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
          "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "belle-7b": {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "vocab_size": 250880,  # BLOOM-7B1
                 "hidden_size": 4096, "n_layer": 30, "n_head": 32, "seq_length": 2048, "layer_norm_epsilon": 1e-5,
                 "apply_residual_connection_post_layernorm": False, "tie_word_embeddings": True,
                 "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    "llama-7b": _LLAMA | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                          "num_attention_heads": 32, "num_key_value_heads": 32},
    "llama-13b": _LLAMA | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                           "num_attention_heads": 40, "num_key_value_heads": 40},
}
FULL, STATES, ENCRYPTED, ENCRYPTED_STATES = "full precision", ".pt files", "encrypted", "encrypted .pt files"
ON_BLOOM = "research only (BELLE); BLOOM's RAIL licence"
ON_LLAMA = "research only (BELLE); gpl-3.0 for the difference; Meta's terms for LLaMA"


class BelleModel(NamedTuple):
    """One published model."""

    name: str  # name in this catalogue and of the repository ``BelleGroup/name`` on the hub
    config: str  # key of CONFIGS
    kind: str  # form of publication: FULL, STATES, ENCRYPTED or ENCRYPTED_STATES
    published: str | None  # size of the published weights in GB, for each file if there are several; None if unknown
    licence: str  # note on the licence, not legal advice
    files: tuple[str, ...] = ()  # its .pt files, if one of them must be chosen

    @property
    def hub_id(self) -> str:
        """Hub id."""
        return f"BelleGroup/{self.name}"

    @property
    def architecture(self) -> str:
        """model_type of config.json."""
        return str(CONFIGS[self.config]["model_type"])

    @property
    def next_step(self) -> str:
        """The command to run after downloading the model."""
        place = f"{self.name}/{self.files[0]}" if self.files else self.name
        verb = {FULL: "quantize", STATES: "convert"}.get(self.kind, "decrypt")
        return f"gptq-belle {verb} {place} OUT" + (" --key consolidated.00.pth" if verb == "decrypt" else "")


def _pt(prefix: str) -> tuple[str, str]:
    return f"{prefix}-4bit-128g.pt", f"{prefix}-8bit-128g.pt"


# Sizes: models/gptq/README.md of BELLE and the pages of the models, in GiB and rounded as there.
BELLE_MODELS = (
    BelleModel("BELLE-7B-0.2M", "belle-7b", FULL, "27", ON_BLOOM),
    BelleModel("BELLE-7B-0.6M", "belle-7b", FULL, "27", ON_BLOOM),
    BelleModel("BELLE-7B-1M", "belle-7b", FULL, "27", ON_BLOOM),
    BelleModel("BELLE-7B-2M", "belle-7b", FULL, "27", ON_BLOOM),
    BelleModel("BELLE-7B-gptq", "belle-7b", STATES, "6.9 (4 bit), 9.7 (8 bit)", ON_BLOOM,
               (*_pt("bloom7b-2m"), *_pt("bloom7b-0.2m"))),
    BelleModel("BELLE-LLaMA-7B-0.6M-enc", "llama-7b", ENCRYPTED, None, ON_LLAMA),
    BelleModel("BELLE-LLaMA-7B-2M-enc", "llama-7b", ENCRYPTED, "26", ON_LLAMA),
    BelleModel("BELLE-LLaMA-7B-2M-gptq-enc", "llama-7b", ENCRYPTED_STATES, "3.8 (4 bit), 6.8 (8 bit)", ON_LLAMA,
               _pt("llama7b-2m")),
    BelleModel("BELLE-LLaMA-13B-2M-enc", "llama-13b", ENCRYPTED, None, ON_LLAMA),
)


def find_belle_model(name: str) -> BelleModel | None:
    """Find a model by its name or hub id, ignoring case; None if it is not in the catalogue."""
    bare = name.lower().removeprefix("bellegroup/")
    return next((each for each in BELLE_MODELS if each.name.lower() == bare), None)


def check_release_kind(found: BelleModel, kinds: tuple[str, ...]) -> None:
    """Check that a model was published in one of some forms.

    Raises:
        UsageError: it was not; the remedy is the command to run first.
    """
    if found.kind not in kinds:
        raise UsageError(f"{found.name} is published as {found.kind}",
                         f"Run first: {found.next_step}")
