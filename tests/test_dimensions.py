"""Shapes by arithmetic from config.json, against the modules that transformers builds from it."""

import pytest
from conftest import naming
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_belle.checkpoint.reader import read_config
from gptq_belle.errors import InputError
from gptq_belle.models.belle_catalogue import CONFIGS
from gptq_belle.models.dimensions import dimensions

OTHERS = {
    "mistral": {"model_type": "mistral", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "qwen2 tied": {"model_type": "qwen2", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80,
                   "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80,
                          "num_hidden_layers": 2, "num_attention_heads": 4, "attention_bias": True, "mlp_bias": True},
    "bloom, old words": {"model_type": "bloom", "vocab_size": 96, "n_embed": 64, "num_hidden_layers": 2,
                         "num_attention_heads": 4},
}


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_shapes_equal_those_of_transformers(name):
    import torch

    config = (CONFIGS | OTHERS)[name]
    d = dimensions(config)
    words = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(words.pop("model_type"), **words))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    blocks = d.arch.blocks
    found = dict(d.arch.outer)
    for block in range(d.num_layers):
        found |= {f"{blocks}.{block}.{name}": shape for name, shape in d.arch.vectors.items()}
        found |= {f"{blocks}.{block}.{name}.weight": (n, k) for name, (k, n) in d.arch.shapes.items()}
    assert found == expected
    assert d.tied == bool(model.config.tie_word_embeddings)


def test_a_configuration_is_found_by_name_folder_or_file(tiny_bloom):
    assert read_config("belle-7b") == CONFIGS["belle-7b"]
    assert read_config(tiny_bloom) == read_config(tiny_bloom / "config.json")
    with pytest.raises(InputError, match=naming("nowhere")) as raised:
        read_config("nowhere")
    assert "belle-7b" in raised.value.remedy


@pytest.mark.parametrize(("change", "said"), [({"vocab_size": None}, "vocab_size"), ({"n_layer": "30"}, "n_layer 30"),
                                              ({"hidden_size": 0}, "hidden_size 0"), ({"model_type": "gpt2"}, "gpt2")])
def test_figures_that_are_missing_or_no_figures_are_refused(change, said):
    with pytest.raises(InputError, match=naming(said)):
        dimensions(CONFIGS["belle-7b"] | change)
