"""Attention of a chunk of a prompt: one fused call, as on GPUs, against blocks of queries and float64."""

from contextlib import nullcontext

import pytest
import torch

from gptq_belle import load
from gptq_belle.common.devices import current_device
from gptq_belle.engine import attention
from gptq_belle.engine.attention import AttentionConfig, CausalAttention, FusedCausalAttention
from gptq_belle.models.decoder_config import alibi_slopes
from gptq_belle.models.sizes import PREFILL_CHUNK

CONFIGS = {
    "rotary": AttentionConfig(4, 4, 16, torch.ones(8), None),
    "grouped": AttentionConfig(6, 2, 16, torch.ones(8), None),
    "alibi": AttentionConfig(4, 4, 16, None, alibi_slopes(4)),
}


def reference(config, query, keys, values, start):
    """Softmax of masked and biased scores in float64, head by head."""
    outputs, group = [], config.heads // config.kv_heads
    positions = torch.arange(start, start + len(query))[:, None]
    distance = torch.arange(keys.shape[1]) - positions
    for head in range(config.heads):
        scores = query[:, head].double() @ keys[head // group].double().T / config.head_dim**0.5
        if config.slopes is not None:
            scores = scores + config.slopes[head].double() * distance
        weights = scores.masked_fill(distance > 0, -torch.inf).softmax(-1)
        outputs.append(weights @ values[head // group].double())
    return torch.stack(outputs, 1).flatten(1)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 3), (0, 200), (5, 1), (64, 70), (130, 129)])
def test_fused_attention_equals_the_reference_and_that_in_blocks(kind, start, length):
    config, stop = CONFIGS[kind], start + length
    draw = torch.Generator().manual_seed(start + length)
    query = torch.randn(length, config.heads, config.head_dim, generator=draw)
    keys, values = (torch.randn(config.kv_heads, stop, config.head_dim, generator=draw) for _ in range(2))
    arguments = (config, start, stop, torch.device("cpu"), torch.float32)
    expected = reference(config, query, keys, values, start)
    for attend in (FusedCausalAttention(*arguments), CausalAttention(*arguments)):
        found = attend(query, keys, values)
        assert found.shape == expected.shape
        assert float((found.double() - expected).abs().max()) < 2e-6


@pytest.mark.parametrize("kind", CONFIGS)
def test_fused_attention_is_one_call_per_block(kind, monkeypatch):
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("gptq_belle.engine.attention.scaled_dot_product_attention",
                        lambda *args, **options: calls.append(1) or attend(*args, **options))
    config = CONFIGS[kind]
    fused = FusedCausalAttention(config, 0, 2048, torch.device("cpu"), torch.float32)
    fused(torch.randn(2048, config.heads, 16), *torch.randn(2, config.kv_heads, 2048, 16))
    assert calls == [1]


def test_prefill_as_on_a_gpu_gives_the_logits_of_the_cpu_path(tiny_model, monkeypatch):
    ids = torch.arange(3, 203).view(1, -1)
    model = load(tiny_model, device="cpu", cache="float32")
    expected, _ = model.prefill(ids)
    kinds = []
    monkeypatch.setattr(type(model), "prefill_chunk", PREFILL_CHUNK["cuda"])
    monkeypatch.setattr(attention, "causal_attention",
                        lambda *args: kinds.append(1) or FusedCausalAttention(*args))
    monkeypatch.setattr(attention, "KV_HEADS_PER_PASS", model.decoder.attention_config.kv_heads)
    found, _ = model.prefill(ids)
    assert kinds == [1]
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-4


def test_current_device_selects_a_cuda_device_only(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: chosen.append(device.index) or nullcontext())
    with current_device(torch.device("cuda", 1)), current_device(torch.device("cpu")):
        assert chosen == [1]
