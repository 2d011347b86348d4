"""LLaMA, Mistral and Qwen2 against transformers in float64: shared keys, biases, RoPE scaling, padding, lengths."""

import pytest
import torch
from conftest import naming
from decoders import assert_padding_changes_nothing, assert_same_logits, edit_config, saved
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import gptq_belle
from gptq_belle.errors import UsageError

SMALL = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.1, "max_position_embeddings": 2048}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("options", [
    {}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1}, {"head_dim": 32}, {"attention_bias": True},
    {"mlp_bias": True}, {"tie_word_embeddings": True}, {"rms_norm_eps": 1e-3},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    {"rope_parameters": LLAMA3}], ids=str)
def test_logits_equal_transformers(tmp_path, options):
    assert_same_logits(saved(LlamaForCausalLM, LlamaConfig(**SMALL | options), tmp_path / "model"))


def test_prompt_longer_than_a_prefill_chunk(tmp_path):
    path = saved(LlamaForCausalLM, LlamaConfig(**SMALL | {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
                 tmp_path / "model")
    assert_same_logits(path, length=1300)


def test_padded_batch_equals_transformers(tmp_path):
    path = saved(LlamaForCausalLM, LlamaConfig(**SMALL | {"num_key_value_heads": 2}), tmp_path / "model")
    assert_padding_changes_nothing(path)


def test_rope_settings_of_older_configs_are_read(tmp_path):
    path = saved(LlamaForCausalLM, LlamaConfig(**SMALL | {"rope_parameters": LLAMA3}), tmp_path / "model")
    old = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    edit_config(path, rope_parameters=None, rope_theta=500000.0, rope_scaling=old | {"type": "llama3"})
    assert_same_logits(path)


def test_qwen2_has_biases_on_query_key_and_value(tmp_path):
    model = assert_same_logits(saved(Qwen2ForCausalLM, Qwen2Config(**SMALL), tmp_path / "model"))
    assert model.context == 2048


@pytest.mark.parametrize(("window", "context"), [(None, 2048), (100, 100)])
def test_mistral_within_its_sliding_window(tmp_path, window, context):
    path = saved(MistralForCausalLM, MistralConfig(**SMALL | {"sliding_window": window}), tmp_path / "model")
    model = assert_same_logits(path, length=80)
    assert model.context == context
    with pytest.raises(UsageError, match=naming(context)):
        gptq_belle.load(path, device="cpu").prefill(torch.ones(1, 2049, dtype=torch.int64))
