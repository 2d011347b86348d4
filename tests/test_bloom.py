"""BLOOM against transformers in float64: every option, padding, prompts longer than a prefill chunk."""

import pytest
from decoders import assert_padding_changes_nothing, assert_same_logits, saved
from transformers import BloomConfig, BloomForCausalLM

SMALL = {"vocab_size": 384, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}


@pytest.mark.parametrize("options", [
    {}, {"n_head": 2}, {"hidden_size": 96, "n_head": 6}, {"apply_residual_connection_post_layernorm": True},
    {"layer_norm_epsilon": 1e-3}, {"tie_word_embeddings": False}], ids=str)
def test_logits_equal_transformers(tmp_path, options):
    assert_same_logits(saved(BloomForCausalLM, BloomConfig(**SMALL | options), tmp_path / "model"))


def test_prompt_longer_than_a_prefill_chunk(tmp_path):
    assert_same_logits(saved(BloomForCausalLM, BloomConfig(**SMALL), tmp_path / "model"), length=1300)


def test_padded_batch_equals_transformers(tmp_path):
    assert_padding_changes_nothing(saved(BloomForCausalLM, BloomConfig(**SMALL), tmp_path / "model"))
