"""Logits and cached keys that are NaN or infinite are errors that name the first layer, never an answer."""

import asyncio
import shutil

import httpx
import pytest
import torch
from conftest import naming, packed_checkpoint
from safetensors.torch import load_file, save_file
from server_process import serving

import gptq_belle
from gptq_belle.engine.batching import Engine
from gptq_belle.engine.finite_check import nonfinite_rows
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.engine.slots import CACHE_CHECK_INTERVAL
from gptq_belle.errors import InputError
from gptq_belle.serving.api_errors import from_exception
from gptq_belle.serving.metrics import Metrics
from gptq_belle.serving.scheduler import Scheduler

NAN, INF = float("nan"), float("inf")
PROMPT = list(range(10, 30))
GREEDY = SamplingParams(max_new_tokens=100, ignore_eos=True)


def edited(source, out, **tensors):
    """A copy of a model whose tensors are changed by functions."""
    if not out.exists():
        shutil.copytree(source, out)
    found = load_file(out / "model.safetensors")
    for name, change in tensors.items():
        change(found[name])
    save_file(found, out / "model.safetensors")
    return out


def setter(value, *index):
    return lambda tensor: tensor.__setitem__(index, value)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"precision": "fast"}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize(("layer", "tensor", "change"), [
    ("model.layers.1", "model.layers.1.input_layernorm.weight", setter(NAN, 0)),
    ("model.layers.0", "model.layers.0.post_attention_layernorm.weight", setter(INF, 3)),
    ("model.norm", "model.norm.weight", setter(NAN, 5)),
    ("model.embed_tokens", "model.embed_tokens.weight", setter(-INF, slice(10, 12), 0)),
    ("lm_head", "lm_head.weight", setter(-INF, 7, 0)),
])
def test_first_layer_that_is_not_finite_is_named(tiny_llama, tmp_path, packed, options, layer, tensor, change):
    out = tmp_path / "model"
    path = edited(packed_checkpoint(tiny_llama, out) if packed else tiny_llama, out, **{tensor: change})
    model = gptq_belle.load(path, device="cpu", **options)
    for sampling in ({}, {"temperature": 0.8, "seed": 1}):
        with pytest.raises(InputError, match=naming(layer, tensor)):
            model.generate(PROMPT, max_new_tokens=3, **sampling)
    with pytest.raises(InputError, match=naming(layer, tensor)):
        model.logits(torch.tensor([PROMPT]))
    with pytest.raises(InputError, match=naming(layer, tensor)):
        model.token_logprobs(PROMPT, 1)


def test_token_without_finite_embedding_is_noticed_when_it_is_decoded(tiny_llama, tmp_path):
    packed = packed_checkpoint(tiny_llama, tmp_path / "packed")
    first, *_ = gptq_belle.load(packed, device="cpu").tokens(PROMPT, 1, GREEDY)
    edited(packed, packed, **{"model.embed_tokens.weight": setter(NAN, first)})
    model = gptq_belle.load(packed, device="cpu")
    arriving = model.tokens(PROMPT, 9, GREEDY)
    assert next(arriving) == first
    with pytest.raises(InputError, match=naming("model.embed_tokens")):
        next(arriving)
    assert len(list(model.tokens([9, 8, 7], 1, GREEDY))) == 1  # the model goes on


def test_other_requests_of_a_batch_are_not_affected(tiny_llama, tmp_path):
    path = edited(tiny_llama, tmp_path / "model", **{"model.embed_tokens.weight": setter(NAN, 50)})
    model, params = gptq_belle.load(path, device="cpu"), SamplingParams(max_new_tokens=8, ignore_eos=True)
    good, bad = [3, 5, 8] * 4, [3, 5, 50]
    alone = list(model.tokens(good, 8, params))
    engine = Engine(model, 2)
    requests = [engine.submit(ids, params) for ids in (bad, good)]
    events = []
    while not engine.idle:
        events += engine.step()
    assert [request.finished for request in requests] == ["error", "length"]
    assert [type(event.error) for event in events if event.request is requests[0]] == [InputError]
    assert requests[1].answer == alone
    with pytest.raises(InputError):
        model.generate([good, bad], params)


def test_scheduler_gives_the_error_to_its_request_and_goes_on(tiny_llama, tmp_path):
    path = edited(tiny_llama, tmp_path / "model", **{"model.embed_tokens.weight": setter(NAN, 50)})
    scheduler = Scheduler(Engine(gptq_belle.load(path, device="cpu"), 1), 4, Metrics())

    async def ask(ids):
        answer, = scheduler.submit([(ids, SamplingParams(max_new_tokens=2, ignore_eos=True))])
        return [(await answer.arrived.get())[1] for _ in range(1 if 50 in ids else 3)]

    async def both():
        return [await ask([50, 4]), await ask([4, 5])]

    (error,), others = asyncio.run(both())
    assert scheduler.close(5)
    assert isinstance(error, InputError)
    assert from_exception(error).status == 500
    assert others[-1] == "length"


def test_nan_weight_is_an_error_of_generate_and_of_the_server(belle, tiny_llama, tmp_path):
    path = edited(tiny_llama, tmp_path / "model", **{"model.layers.1.mlp.gate_proj.weight": setter(NAN, 0, 0)})
    for options in ((), ("--temperature", 0.8, "--seed", 1)):
        code, out, err = belle("generate", path, "--prompt", "你好", "--device", "cpu", *options)
        assert (code, out.strip()) == (4, "")
        assert "model.layers.1" in err
    with serving(path, tmp_path / "log") as server:
        for temperature in (0, 0.8):
            response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "你好", "temperature": temperature})
            assert response.status_code == 500
            assert "model.layers.1" in response.json()["error"]["message"]


def scaled_keys(source, out, factor):
    """A model whose keys are `factor` times larger and whose queries are smaller by it: the same logits."""
    shutil.copytree(source, out)
    found = load_file(out / "model.safetensors")
    name = "model.layers.1.self_attn.{}_proj.weight"
    found[name.format("k")], found[name.format("q")] = (found[name.format("k")].float() * factor,
                                                        found[name.format("q")].float() / factor)
    save_file(found, out / "model.safetensors")
    return out


@pytest.mark.parametrize(("cache", "factor"), [("float16", 2.0**30), ("int8", 2.0**40)])
def test_values_beyond_the_cache_name_the_kinds_that_hold_them(tiny_llama, tmp_path, cache, factor):
    path = scaled_keys(tiny_llama, tmp_path / "model", factor)
    with pytest.raises(InputError, match=naming("model.layers.1", cache, "bfloat16", "float32")):
        gptq_belle.load(path, device="cpu", cache=cache).generate(PROMPT, max_new_tokens=3)
    expected = list(gptq_belle.load(tiny_llama, device="cpu", cache="float32").tokens(PROMPT, 3, GREEDY))
    assert list(gptq_belle.load(path, device="cpu", cache="float32").tokens(PROMPT, 3, GREEDY)) == expected


def test_infinite_key_of_a_decoded_token_is_noticed_although_logits_are_finite(tiny_llama, monkeypatch):
    model = gptq_belle.load(tiny_llama, device="cpu")
    engine = Engine(model, 1)
    request = engine.submit(PROMPT, GREEDY)
    for _ in range(5):
        engine.step()
    monkeypatch.setattr(model, "decode_slots", lambda *_: torch.zeros(1, model.vocabulary_size))
    engine.cache.keys[1][0, :, len(PROMPT) + 2] = -INF
    while not engine.idle:
        events = engine.step()
    assert request.finished == "error"
    assert isinstance(events[-1].error, InputError)
    assert len(request.answer) <= CACHE_CHECK_INTERVAL + 1


def test_rows_of_finite_logits_whose_sum_overflows_are_not_reported():
    logits = torch.full((3, 8), 3e38)
    assert nonfinite_rows(logits) == []
    logits[1, 4] = NAN
    logits[2, 0] = -INF
    assert nonfinite_rows(logits) == [1, 2]
