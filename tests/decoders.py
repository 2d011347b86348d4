"""Helpers for the tests of both decoders: compare logits with transformers in float64."""

import json

import torch
from conftest import _save
from oracle_format import formula
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gptq_belle


def saved(model_class, config, path):
    """Write a random model of a configuration in float16."""
    torch.manual_seed(5)
    return _save(model_class(config), path)


def dequantized(source, packed, dtype=torch.float64):
    """The full-precision model `source` in transformers, with the weights of a packed directory by the formula."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    tensors = load_file(packed / "model.safetensors")
    settings = json.loads((packed / "config.json").read_text())["quantization_config"]
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        parts = [tensors.get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")]
        weight = formula(*parts, settings["bits"], v1=settings["format"] == "gptq", group_size=settings["group_size"])
        model.get_submodule(name).weight.data = weight.to(dtype)
    return model


def theirs(path, ids, mask=None):
    """Logits (B, T, V) of transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
    with torch.inference_mode():
        return model(ids, attention_mask=torch.ones_like(ids) if mask is None else mask).logits


def assert_same_logits(path, length=200):
    """Check logits of one forward pass, of chunks with a cache and of single tokens with transformers in float64."""
    model = gptq_belle.load(path, device="cpu", cache="float32")
    ids = torch.randint(4, model.vocabulary_size, (2, length))
    expected = theirs(path, ids)
    assert expected.std() > 0.1

    def close(found, wanted):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)

    close(model.logits(ids), expected)
    start = length - 20
    logits, session = model.prefill(ids[:, :start], room=20)
    for t in range(start, length):
        close(logits, expected[:, t - 1])
        logits = model.decode(ids[:, t], session)
    close(logits, expected[:, -1])
    return model


def assert_padding_changes_nothing(path):
    """Check rows of different lengths, padded on the right, each in a slot of a cache. (With padding on the left,
    transformers in float64 gives NaN.)"""
    model = gptq_belle.load(path, device="cpu", cache="float32")
    lengths, width = (90, 17, 64), 90
    rows = [torch.randint(4, 384, (n,)) for n in lengths]
    mask = torch.stack([(torch.arange(width) < n).long() for n in lengths])
    padded = torch.stack([torch.cat((row, torch.full((width - len(row),), 3))) for row in rows])
    expected, ours = theirs(path, padded, mask), model.logits(padded)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(ours[i, :n].double(), expected[i, :n], rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        cache = model.new_cache(3, width)
        for i, row in enumerate(rows):
            model.prefill_slot(row[:-1], cache, i)
        last = model.decode_slots(torch.stack([row[-1] for row in rows]), cache, range(3), [n - 1 for n in lengths])
    wanted = torch.stack([expected[i, n - 1] for i, n in enumerate(lengths)])
    torch.testing.assert_close(last.double(), wanted, rtol=1e-4, atol=1e-4)


def edit_config(path, **values):
    """Change keys of config.json."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))
    return path
