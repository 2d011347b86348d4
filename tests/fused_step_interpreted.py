"""Whole fused decode steps in Triton's interpreter, compared with the engine on a CPU.

`test_fused_step.py` runs this file in a separate process, because TRITON_INTERPRET must be set before Triton is
imported.
"""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from bfloat16_interpreter import teach
from conftest import packed_checkpoint
from decoders import dequantized
from torch.utils._python_dispatch import TorchDispatchMode

import gptq_belle
from gptq_belle.engine import fused_step, lm_head
from gptq_belle.engine.batching import Engine
from gptq_belle.engine.fused_decoder import fuse, fusion_obstacle
from gptq_belle.engine.fused_sampling import write_samplers
from gptq_belle.engine.kv_cache import KVCache
from gptq_belle.engine.linear import PackedLinear
from gptq_belle.engine.sampling import Sampler, SamplingParams
from gptq_belle.kernels import dispatch, triton_layout, triton_matmul
from gptq_belle.kernels.triton_config import LaunchPlan, TileConfig
from gptq_belle.kernels.triton_sampling import new_sampling_state

teach()

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "belle_tiny"
FORMATS = {"bloom": {"bits": 4, "group_size": 64, "act_order": True}, "llama": {"bits": 8, "group_size": 32}}


def load_for_triton(path, monkeypatch, cache="float16", dtype=torch.float16, head_bits=8):
    """A model on the CPU whose weights are laid out for the Triton kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "choose_kernel", lambda *args, **kwargs: dispatch.KernelChoice("triton", ""))
        patch.setattr(lm_head, "choose_kernel", lambda *args, **kwargs: dispatch.KernelChoice("groupwise", ""))
        model = gptq_belle.load(path, device="cpu", dtype=dtype, head_bits=head_bits, cache=cache)
    if head_bits == 8:
        weight = triton_layout.prepare(model.decoder.head.weight)
        model.decoder.head = PackedLinear(weight._replace(out_features=model.vocabulary_size), None)
    if isinstance(model.decoder.embedding, lm_head.PackedEmbedding):
        model.decoder.embedding.weight = model.decoder.head.weight
    assert fusion_obstacle(model.decoder) is None
    model.use_step_graphs = True
    return model


def generate(engine, prompts, new_tokens, sampling=({},) * 5):
    """Submit prompts one step after another, so that requests join and leave; returns their answers."""
    requests, waiting = [], list(prompts)
    while waiting or not engine.idle:
        if waiting:
            number = len(requests)
            params = SamplingParams(max_new_tokens=new_tokens[number], seed=number, ignore_eos=True, **sampling[number])
            requests.append(engine.submit(waiting.pop(0), params, engine.model.constraint(params)))
        assert all(event.error is None for event in engine.step())
    return [request.answer for request in requests]


def compare(path, monkeypatch, prompts, new_tokens, cache="float16", sampling=({},) * 5):
    """Answers of the fused engine equal those of the CPU engine in float32 on the same weights."""
    model = gptq_belle.load(path, device="cpu", head_bits=8, cache=cache)
    expected = generate(Engine(model, 5), prompts, new_tokens, sampling)
    engine = Engine(load_for_triton(path, monkeypatch, cache), 5)
    assert generate(engine, prompts, new_tokens, sampling) == expected
    assert engine.cache.fused is not None


@pytest.mark.parametrize(("kind", "rules"), [
    ("bloom", {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3, "temperature": 0.01}),
    ("llama", {"logit_bias": {7: 2.0, 90: -1.0}, "logprobs": 2, "min_tokens": 2, "regex": "[0-9]*"})], ids=str)
def test_tokens_equal_those_of_the_cpu_engine(kind, rules, request, tmp_path, monkeypatch):
    """One request joins later, ends earlier, and samples (nearly always the most likely token); then one joins whose
    tokens the host chooses."""
    path = packed_checkpoint(request.getfixturevalue(f"tiny_{kind}"), tmp_path / "packed", **FORMATS[kind])
    sampling = {}, {"temperature": 0.01}, rules, {"min_tokens": 2, "temperature": 0.01}
    compare(path, monkeypatch, [[5, 17, 200], [9, 8], [31, 4], [30]], [7, 3, 4, 3], sampling=sampling)


def test_sampled_tokens_equal_those_of_the_host(tiny_llama, tmp_path, monkeypatch):
    """On the logits of the same steps. The steps are those of greedy decoding only if all rows need the host."""
    model = load_for_triton(packed_checkpoint(tiny_llama, tmp_path / "packed", **FORMATS["llama"]), monkeypatch)
    prompts, answers, keys = [[5, 17, 200], [9, 8], [7, 7, 7], [30]], [], []
    defaults = {"temperature": 0.35, "top_k": 30, "top_p": 0.85, "repetition_penalty": 1.2}
    sampling = [defaults, {"temperature": 1.5, "min_p": 0.01}, {"logit_bias": {3: 9.0}, "temperature": 1.0},
                {"repetition_penalty": 1.9}]
    for needs_host in (False, True):
        if needs_host:
            monkeypatch.setattr(Sampler, "needs_host", True)
        engine = Engine(model, 3)
        answers.append(generate(engine, prompts, [7, 4, 2, 2], sampling))
        keys.append({is_sampled for _, _, is_sampled in engine.cache.fused._steps})
    assert answers[0] == answers[1]
    assert keys == [{True}, {False}]


def test_rows_replace_what_was_there_before():
    """Tokens of prompt and answer occurred, parameters are within their bounds, numbers begin at `lengths`."""
    samplers = [Sampler(SamplingParams(temperature=1e-30, top_k=1 << 31, repetition_penalty=penalty, seed=7), [5, 17],
                        torch.device("cpu")) for penalty in (1.2, 1.0)]
    samplers[0].accept(40)
    state = new_sampling_state(3, 50, 16, torch.device("cpu"))
    state.seen.fill_(1)
    write_samplers(state, samplers, [3, 4], [2, 1])
    assert [row.nonzero().flatten().tolist() for row in state.seen] == [[5, 17, 40], [], [*range(50)]]
    assert (state.top_k.tolist(), state.temperatures.tolist()) == ([50, 50, 0], [pytest.approx(1e-10)] * 2 + [0])
    numbers = torch.zeros(3, 16)
    numbers[0, 3:5] = torch.tensor(samplers[0].next_numbers(2))
    numbers[1, 4] = samplers[1].next_numbers(1)[0]
    assert torch.equal(state.numbers, numbers)


def test_numbers_are_taken_once_per_token():
    samplers = [Sampler(SamplingParams(temperature=1.0, seed=7), [], torch.device("cpu")) for _ in range(2)]
    expected = [samplers[1].random.random() for _ in range(4)]
    assert samplers[0].next_numbers(4) == samplers[0].next_numbers(4) == expected
    samplers[0].accept(5)
    assert samplers[0].next_numbers(3) == expected[1:]


@pytest.mark.parametrize(("kind", "cache"), [("bloom", "int8"), ("llama", "bfloat16")])
def test_logits_are_those_of_a_forward_pass(kind, cache, request, tmp_path, monkeypatch):
    """A fused step after a prefill, and the CPU's forward pass without a cache."""
    path = packed_checkpoint(request.getfixturevalue(f"tiny_{kind}"), tmp_path / "packed", **FORMATS[kind])
    model, exact = load_for_triton(path, monkeypatch, cache), gptq_belle.load(path, head_bits=8, device="cpu")
    ids = torch.tensor([[5, 17, 200, 31], [9, 8, 300, 77]])
    _, state = model.prefill(ids)
    found = model.decode(torch.tensor([3, 250]), state)
    expected = exact.logits(torch.cat((ids, torch.tensor([[3], [250]])), 1))[:, -1]
    error = float((found - expected).norm() / expected.norm())
    assert error < {"int8": 2e-2, "bfloat16": 1e-2}[cache]


def use_large_tiles(monkeypatch):
    """Interpreted, fewer programs are faster."""
    tile = LaunchPlan("skinny", TileConfig(8, 128, 128, 1, 4, 4))
    monkeypatch.setattr(fused_step, "plan_for", lambda *args: tile)
    monkeypatch.setattr(triton_matmul, "plan_for", lambda *args: tile)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", FORMATS)
def test_demo_models_answer_as_on_the_cpu(kind, cache, tmp_path, monkeypatch):
    """64 tokens alone, then with four other requests that join and leave."""
    path = packed_checkpoint(EXAMPLES / kind, tmp_path / "packed", bits=4, group_size=128)
    use_large_tiles(monkeypatch)
    prompts = [[40 + i, 900, 77 * i + 3, 12, 2000] for i in range(5)]
    compare(path, monkeypatch, prompts, [64, 3, 20, 60, 9], cache)


@pytest.mark.parametrize(("kind", "dtype", "blocks"), [
    ("bloom", torch.float16, 2), ("llama", torch.float16, 2),
    *(pytest.param(kind, dtype, 4, marks=pytest.mark.slow)
      for kind in FORMATS for dtype in (torch.float16, torch.bfloat16))], ids=str)
def test_logits_are_as_exact_as_those_of_transformers(kind, dtype, blocks, tmp_path, monkeypatch):
    """Steps of three sequences, beside transformers in float32 on the same dequantized weights.

    A row may have twice the largest error that transformers has in the dtype of the activations. Both round to it after
    every operation, which makes errors of 2e-4 to 1e-3 in float16; single rows differ by chance.
    """
    path = packed_checkpoint(EXAMPLES / kind, tmp_path / "packed", bits=4, group_size=128, act_order=kind == "bloom")
    use_large_tiles(monkeypatch)
    model = load_for_triton(path, monkeypatch, str(dtype).removeprefix("torch."), dtype, head_bits=16)
    del model.decoder.blocks[blocks:]
    rows = torch.randint(4, model.vocabulary_size, (3, 12))
    logits = []
    for number in (torch.float32, dtype):
        theirs = dequantized(EXAMPLES / kind, path, number)
        del (theirs.transformer.h if kind == "bloom" else theirs.model.layers)[blocks:]
        with torch.inference_mode():
            logits.append(theirs(rows).logits[:, -2:].float())
    _, batch = model.prefill(rows[:, :-2], room=2)
    found = torch.stack([model.decode(rows[:, place], batch) for place in (-2, -1)], 1)
    exact, rounded = logits
    ours, allowed = ((each - exact).norm(dim=-1) / exact.norm(dim=-1) for each in (found, rounded))
    assert ours.max() < 2 * allowed.max()


@pytest.mark.parametrize(("kind", "is_sampled"), [("bloom", False), ("llama", True)])
def test_launches_of_a_step(kind, is_sampled, request, tmp_path, monkeypatch):
    """5 launches per block and 2 more, or 3 with sampling: no torch operation between them, no choice by data."""
    path = packed_checkpoint(request.getfixturevalue(f"tiny_{kind}"), tmp_path / "packed", **FORMATS[kind])
    model = load_for_triton(path, monkeypatch)
    decoder, cache = fuse(model.decoder), model.new_cache(4, 300)
    step, made = fused_step.FusedStep(fused_step.StepBuffers(decoder, cache, 4), 2, 256, is_sampled), []
    assert len(step.launches) == 5 * len(decoder.blocks) + 2 + is_sampled
    kernels = [(launch.kernel.fn.__name__, launch.grid, launch.constants) for launch in step.launches]
    step.launches = [launch._replace(kernel=RecordedKernel(launch, made)) for launch in step.launches]
    with NoOperations():
        step.run()
        step.run()
    assert [launch.kernel for launch in made] == 2 * [launch.kernel for launch in made[: len(made) // 2]]
    assert len(made) == 2 * len(kernels)

    without_data = fused_step.FusedStep(fused_step.StepBuffers(on_meta(decoder), on_meta(cache), 4), 2, 256, is_sampled)
    assert [(launch.kernel.fn.__name__, launch.grid, launch.constants) for launch in without_data.launches] == kernels


class RecordedKernel:
    """Stands for a kernel in a launch; remembers that it was launched."""

    def __init__(self, launch, made):
        self.launch, self.made = launch, made

    def __getitem__(self, grid):
        return lambda **arguments: self.made.append(self.launch)


class NoOperations(TorchDispatchMode):
    """Within it, every torch operation raises."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} within a step")


def on_meta(value):
    """A copy of an object whose tensors have no data."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, list):
        return [on_meta(item) for item in value]
    if isinstance(value, tuple):
        return type(value)(*map(on_meta, value)) if hasattr(value, "_fields") else tuple(map(on_meta, value))
    if dataclasses.is_dataclass(value):
        fields = {field.name: on_meta(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    if isinstance(value, KVCache):
        copied = copy.copy(value)
        copied.__dict__ = {name: on_meta(item) for name, item in vars(value).items()}
        return copied
    return value
