"""Decoder configuration: values read from config.json, and configurations refused before reading weights."""

import math

import pytest
import torch
from conftest import naming
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from gptq_belle.errors import InputError
from gptq_belle.models.decoder_config import alibi_slopes, read_decoder_config

LLAMA = {"model_type": "llama", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
         "eos_token_id": [2, 7]}
BLOOM = {"model_type": "bloom", "vocab_size": 384, "n_embed": 64, "n_layer": 2, "num_attention_heads": 4}


def test_decoder_configuration_is_read():
    found = read_decoder_config(LLAMA)
    assert (found.context, found.eps, found.eos, found.slopes) == (256, 1e-5, {2, 7}, None)
    assert found.frequencies[0] == 1
    assert float(found.frequencies[4]) == pytest.approx(10000 ** -(8 / 16))
    bloom = read_decoder_config(BLOOM | {"seq_length": 2048})
    assert (bloom.context, bloom.eos, bloom.frequencies, bloom.dimensions.hidden_size) == (2048, frozenset(), None, 64)


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 12, 32, 112])
def test_alibi_slopes(heads):
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), theirs, rtol=1e-6, atol=0)


def test_llama3_scaling_changes_low_frequencies_only():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128}
    plain = read_decoder_config(LLAMA | {"rope_parameters": {"rope_theta": 5e5}}).frequencies
    found = read_decoder_config(LLAMA | {"rope_parameters": rope}).frequencies
    waves = 2 * math.pi / plain
    assert torch.equal(found[waves < 32], plain[waves < 32])
    assert torch.equal(found[waves > 128], plain[waves > 128] / 8)
    between = (waves > 32) & (waves < 128)
    assert between.any()
    assert (found[between] < plain[between]).all()


@pytest.mark.parametrize(("change", "named"), [
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type", "yarn"]),
    ({"rope_scaling": {"type": "longrope"}}, ["rope_type", "longrope"]),
    ({"rope_scaling": {"type": ["linear"]}}, ["rope_type", "linear"]),
    ({"rope_scaling": "linear"}, ["rope_parameters", "linear"]),
    ({"rope_parameters": {"rope_type": "linear"}}, ["factor", None]),
    ({"rope_parameters": {"rope_type": "linear", "factor": -2}}, ["factor", -2]),
    ({"rope_theta": float("nan")}, ["rope_theta", "nan"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ({"num_key_value_heads": 3}, [4, 16, 3]),
    ({"num_attention_heads": 5}, [5, 12]),
    ({"head_dim": 7}, ["heads", 7]),
    ({"hidden_size": 1 << 30}, ["hidden_size", 1 << 30]),
    ({"hidden_size": "64"}, ["hidden_size", 64]),
    ({"hidden_act": "relu"}, ["hidden_act", "relu"]),
    ({"rms_norm_eps": None}, ["rms_norm_eps", None]),
    ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
    ({"model_type": "mistral", "sliding_window": 0}, ["sliding_window", 0]),
])
def test_unsupported_configuration_is_refused(change, named):
    with pytest.raises(InputError, match=naming(*named)) as caught:
        read_decoder_config(LLAMA | change)
    assert caught.value.remedy


def test_sliding_window_limits_the_context():
    mistral, qwen2 = LLAMA | {"model_type": "mistral"}, LLAMA | {"model_type": "qwen2", "sliding_window": 100}
    assert read_decoder_config(mistral).context == 256
    assert read_decoder_config(mistral | {"sliding_window": 100}).context == 100
    assert read_decoder_config(qwen2).context == 256
    assert read_decoder_config(qwen2 | {"use_sliding_window": True}).context == 100
