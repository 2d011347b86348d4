"""The faster modules compute the same functions as transformers', up to rounding."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BloomConfig
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu, build_alibi_tensor

from gptq_belle.quantization.bloom_attention import FusedBloomAttention, use_fused_modules


def eager(module, states, residual, slopes):
    """The published formula: scores q k / sqrt(d) + slope (j - i) for keys j up to i (ALiBi, section 3)."""
    rows, length, width = states.shape
    q, k, v = module.query_key_value(states).view(rows, length, len(slopes), 3, -1).permute(3, 0, 2, 1, 4)
    place = torch.arange(length, dtype=torch.float64)
    scores = q @ k.mT * q.shape[-1] ** -0.5 + slopes[:, None, None] * (place - place[:, None])
    weights = scores.masked_fill(place > place[:, None], -torch.inf).softmax(-1)
    return module.dense((weights @ v).transpose(1, 2).reshape(rows, length, width)) + residual


@pytest.mark.parametrize(("heads", "width", "rows", "length"), [(4, 32, 2, 17), (5, 24, 1, 130), (16, 8, 3, 64),
                                                                (2, 64, 1, 1500)])
def test_attention_with_alibi(heads, width, rows, length):
    slow = BloomAttention(BloomConfig(hidden_size=heads * width, n_head=heads), 0).eval().double()
    for parameter in slow.parameters():
        torch.nn.init.normal_(parameter, std=2 * (heads * width) ** -0.5)  # large enough for nearly one-hot attention
    states, residual = torch.randn(2, rows, length, heads * width, dtype=torch.float64)
    alibi = build_alibi_tensor(torch.ones(rows, length), heads, torch.float32)
    slopes = alibi.view(rows, heads, length)[0, :, 1].double()
    places = torch.arange(length, dtype=torch.float64)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    with torch.inference_mode():
        expected = eager(slow, states, residual, slopes)
        exact = FusedBloomAttention(slow)(states, residual, (slopes[:, None] * places).repeat(rows, 1))[0]
        slow.float()
        theirs = slow(states.float(), residual.float(), alibi, mask)[0]
        ours = FusedBloomAttention(slow)(states.float(), residual.float(), alibi, attention_mask=mask)[0]
    assert torch.allclose(exact, expected, rtol=1e-9, atol=1e-9)
    assert (ours - expected).norm() < 2 * (theirs - expected).norm()


def test_attention_is_causal():
    attention = FusedBloomAttention(BloomAttention(BloomConfig(hidden_size=64, n_head=4), 0))
    alibi = build_alibi_tensor(torch.ones(1, 20), 4, torch.float32)
    states = torch.randn(1, 20, 64)
    other = torch.cat([states[:, :12], torch.randn(1, 8, 64)], 1)
    with torch.inference_mode():
        first, second = (attention(x, torch.zeros(1, 20, 64), alibi)[0] for x in (states, other))
    assert torch.equal(first[:, :12], second[:, :12])
    assert not torch.allclose(first[:, 12:], second[:, 12:])


def test_faster_modules_compute_the_same_function(tiny_model):
    slow, quick = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    names = set(slow.state_dict())
    use_fused_modules(quick)
    assert set(quick.state_dict()) == names
    assert not any(isinstance(module, BloomAttention | BloomGelu) for module in quick.modules())
    ids = torch.randint(10, 300, (2, 48))
    with torch.inference_mode():
        expected, logits = (model(ids, use_cache=False).logits for model in (slow, quick))
    assert F.mse_loss(logits, expected) < 1e-10 * expected.square().mean()
