"""The CUDA path of the engine on a simulated GPU (`launch_counter`): no mixing of devices, and few copies."""

import json
import math
import os
import re
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import naming, packed_checkpoint, tiny_tokenizer
from launch_counter import CUDA, GpuTensor, simulate
from oracle_format import random_words
from test_triton import has_working_interpreter
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

import gptq_belle
from gptq_belle.engine.batching import Engine
from gptq_belle.engine.finite_check import nonfinite_cache_block
from gptq_belle.engine.fused_decoder import fuse
from gptq_belle.engine.kv_cache import CACHE_DTYPES
from gptq_belle.engine.sampling import Sampler
from gptq_belle.engine.slots import DecodingRow
from gptq_belle.errors import InputError
from gptq_belle.kernels import reference, triton_layout, triton_matmul, triton_warm_up
from gptq_belle.kernels.layout import checked_weight
from gptq_belle.kernels.triton_config import ROW_BUCKETS, TileConfig
from gptq_belle.serving.metrics import Metrics
from gptq_belle.serving.server_config import ServiceConfig
from gptq_belle.serving.service import Limits

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from gptq_belle.engine import fused_decoding  # noqa: E402

TESTS = Path(__file__).parent
IDS = torch.arange(4, 30)
SAMPLING = [
    {}, {"temperature": 0.7}, {"temperature": 1.1, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 3},
    {"repetition_penalty": 1.2}, {"presence_penalty": 0.5, "frequency_penalty": 0.1, "temperature": 0.5},
    {"logit_bias": {7: 2.0}, "min_tokens": 2, "logprobs": 3},
]


@pytest.fixture
def gpu(monkeypatch):
    """The simulated GPU, in use."""
    with simulate(monkeypatch) as found:
        yield found


@pytest.mark.skipif(not has_working_interpreter(), reason="needs triton 3.9 or newer")
def test_runtime_in_the_interpreter():
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "runtime_interpreted.py"],
                         cwd=TESTS, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def check_runtime(model, gpu):
    """Prefill, decode, logits and log probabilities; one copy to the GPU per step, none to the host."""
    model.warm_up(3, 36)
    _, batch = model.prefill(IDS[None].repeat(3, 1), 10)
    with gpu.counting() as counts, torch.inference_mode():
        model.prefill_slot(IDS.to(CUDA), batch.cache, 0)
        logits = model.decode(torch.tensor([5, 6, 7]).to(CUDA), batch)
    assert (logits.device, logits.dtype, logits.shape) == (CUDA, torch.float32, (3, 384))
    assert (counts.total("to device"), counts.total("to host")) == (3, 0)  # two from `to` above
    assert model.logits(IDS[None]).shape == (1, 26, 384)
    assert len(model.token_logprobs(IDS.tolist(), 2)) == 25


@pytest.mark.parametrize("cache", CACHE_DTYPES)
def test_every_kv_cache(tiny_model, cache, tmp_path, gpu):
    path = packed_checkpoint(tiny_model, tmp_path / "packed")
    model = gptq_belle.load(path, device="cuda:0", cache=cache)
    check_runtime(model, gpu)
    kept = model.new_cache(2, 40)
    kept.copy(0, 1, 20)
    assert {table.dtype for table in (*kept.keys, *kept.values)} == {CACHE_DTYPES[cache]}


@pytest.mark.parametrize("options", [
    {"dtype": torch.bfloat16}, {"precision": "exact"}, {"head_bits": 16}, {"head_bits": 4}], ids=str)
def test_every_dtype_and_head(tiny_model, options, tmp_path, gpu):
    """Activations in float32 take the fallback, dequantize + matmul."""
    path = packed_checkpoint(tiny_model, tmp_path / "packed")
    model = gptq_belle.load(path, device="cuda:0", **options)
    check_runtime(model, gpu)
    assert ("kernel", "skinny_kernel") in gpu.counts or model.dtype is torch.float32


@pytest.mark.parametrize("options", [{"act_order": True}, {"sym": False}, {"bits": 3}, {"bits": 8}, None], ids=str)
def test_every_format_of_weights(tiny_model, options, tmp_path, gpu):
    path = tiny_model if options is None else packed_checkpoint(tiny_model, tmp_path / "packed", **options)
    check_runtime(gptq_belle.load(path, device="cuda:0"), gpu)


def test_every_way_of_sampling(tiny_model, tmp_path, gpu):
    """A batch with one request for each; the host waits for the check of logits and for tokens, and no more."""
    model = gptq_belle.load(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cuda:0")
    engine = Engine(model, 4, 64)
    requests = [engine.submit([*range(4, 12 + number)], gptq_belle.SamplingParams(
        max_new_tokens=4, ignore_eos=True, **options)) for number, options in enumerate(SAMPLING)]
    while not engine.idle:
        engine.step()
    assert [(request.finished, len(request.answer)) for request in requests] == [("length", 4)] * len(SAMPLING)


def test_values_that_are_not_finite_are_located(tiny_llama, tmp_path, gpu):
    model = gptq_belle.load(packed_checkpoint(tiny_llama, tmp_path / "packed"), device="cuda:0")
    cache = model.new_cache(1, 20)
    assert nonfinite_cache_block(cache, 0, 0, 20) is None
    cache.values[1][0, :, 3] = math.inf
    assert nonfinite_cache_block(cache, 0, 0, 20) == 1
    model.decoder.norm.weight.fill_(math.nan)
    with pytest.raises(InputError, match=naming("model.norm")):
        model.logits(IDS[None])


@pytest.mark.parametrize(("options", "to_device", "to_host"), [
    ({}, 2, 2),  # tokens, and slots with positions; whether logits are finite, and tokens
    ({"temperature": 0.7, "top_p": 0.9}, 5, 2),  # rows, and two tables of parameters
    ({"logprobs": 3}, 1, 5),  # of these two the tokens, which the host replaces
    ({"repetition_penalty": 1.2}, 3, 2)])
def test_copies_per_token(tiny_model, options, to_device, to_host, tmp_path, gpu):
    model = gptq_belle.load(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cuda:0")
    engine = Engine(model, 1, 64)
    engine.submit(range(4, 20), gptq_belle.SamplingParams(max_new_tokens=5, ignore_eos=True, **options))
    engine.step()
    engine.step()
    with gpu.counting() as counts:
        engine.step()
    assert counts.total("to device") <= to_device
    assert counts.total("to host") == to_host


# For one decoded token of one sequence, in each block and outside them: with fused steps, and without. K is split in
# every linear, as in BELLE's. Outside of a fused step, tokens and logits are copied.
BLOCK = {("bloom", True): {"operation": 0, "kernel": 5, "graph": 0, "to device": 0, "to host": 0},
         ("llama", True): {"operation": 0, "kernel": 5, "graph": 0, "to device": 0, "to host": 0},
         ("bloom", False): {"operation": 8, "kernel": 4, "graph": 0, "to device": 0, "to host": 0},
         ("llama", False): {"operation": 15, "kernel": 4, "graph": 0, "to device": 0, "to host": 0}}
REST = {("bloom", True): {"operation": 2, "kernel": 2, "graph": 1, "to device": 1, "to host": 0},
        ("llama", True): {"operation": 2, "kernel": 2, "graph": 1, "to device": 1, "to host": 0},
        ("bloom", False): {"operation": 23, "kernel": 1, "graph": 0, "to device": 2, "to host": 0},
        ("llama", False): {"operation": 13, "kernel": 0, "graph": 0, "to device": 2, "to host": 0}}


@pytest.mark.parametrize(("options", "cache", "rows", "reason"), [
    ({}, "float16", 64, None), ({}, "float16", 65, 65), ({}, "float32", 2, "float32"),
    ({"act_order": True}, "float16", 2, "g_idx")])  # query, key and value in orders of their own
def test_steps_that_are_not_fused(options, cache, rows, reason, tiny_llama, tmp_path, gpu):
    model = gptq_belle.load(packed_checkpoint(tiny_llama, tmp_path / "packed", **options), device="cuda:0", cache=cache)
    kept = model.new_cache(rows, 16)
    with gpu.counting() as counts:
        model.decode_slots(torch.full((rows,), 5).to(CUDA), kept, range(rows), [0] * rows)
    assert (model.unfused_reason(rows) is None) == (counts["kernel", "attention_kernel"] > 0) == (reason is None)
    assert reason is None or re.search(naming(reason), model.unfused_reason(rows))


@pytest.fixture(scope="module")
def wide_models(tmp_path_factory):
    """Packed models of two blocks with 1024 wide streams, by type."""
    bloom = BloomConfig(vocab_size=384, hidden_size=1024, n_layer=2, n_head=8)
    llama = LlamaConfig(vocab_size=384, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2,
                        num_attention_heads=8, tie_word_embeddings=False)
    folder, found = tmp_path_factory.mktemp("wide"), {}
    for model in (BloomForCausalLM(bloom), LlamaForCausalLM(llama)):
        name = model.config.model_type
        model.half().save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        found[name] = packed_checkpoint(folder / name, folder / f"{name}-packed", group_size=128)
    return found


@pytest.mark.parametrize(("kind", "fused"), BLOCK)
def test_launches_per_token(kind, fused, wide_models, gpu):
    totals = []
    for count in (1, 2):
        model = gptq_belle.load(wide_models[kind], device="cuda:0")
        model.use_step_graphs &= fused
        del model.decoder.blocks[count:]
        _, batch = model.prefill(IDS[None], 10)
        model.decode(torch.tensor([5]), batch)  # makes the static buffers
        for _ in range(2):  # the graph is captured, and replayed
            with gpu.counting() as counts:
                model.decode(torch.tensor([5]), batch)
        totals.append(counts.totals())
    first, both = totals
    block = {name: both[name] - number for name, number in first.items()}
    rest = {name: number - block[name] for name, number in first.items()}
    assert (block, rest) == (BLOCK[kind, fused], REST[kind, fused])


def test_programmatic_launches_of_all_kernels(tiny_model, tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(fused_decoding, "PROGRAMMATIC_LAUNCH", True)
    model = gptq_belle.load(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cuda:0")
    launches = fused_decoding.decoding_launches(fuse(model.decoder), model.new_cache(1, 32), 1)
    assert all(launch.constants["PDL"] and launch.constants["launch_pdl"] for launch in launches)
    monkeypatch.setattr(triton_matmul, "device_properties", lambda device: (89, 128))
    launches = fused_decoding.decoding_launches(fuse(model.decoder), model.new_cache(1, 32), 1)
    assert not any(launch.constants["PDL"] or "launch_pdl" in launch.constants for launch in launches)


@pytest.mark.parametrize("sampling", [
    {}, {"repetition_penalty": 1.2}, {"temperature": 0.35, "top_k": 30, "top_p": 0.85, "repetition_penalty": 1.2}],
    ids=str)
def test_next_step_is_queued_before_tokens_are_read(sampling, tiny_model, tmp_path, gpu):
    """Steps of the same requests copy nothing to the GPU, allocate nothing there, and read tokens and sums of logits of
    one before."""
    model = gptq_belle.load(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cuda:0")
    engine = Engine(model, 2, 64)
    assert engine.cache.fused is not None  # its memory is allocated before the first request
    for start in (4, 5):
        engine.submit(range(start, 20), gptq_belle.SamplingParams(max_new_tokens=9, ignore_eos=True, **sampling))
    for _ in range(4):
        engine.step()
    with gpu.counting() as counts:
        assert [event.finished for event in engine.step()] == [None, None]
    blocks = len(model.decoder.blocks)
    assert counts.totals() == {"operation": 1, "kernel": 5 * blocks + 2 + bool(sampling), "graph": 1, "to device": 0,
                               "to host": 2}
    assert not counts.total("allocation")


def test_one_row_needs_the_host(tiny_model, tmp_path, gpu):
    """The others take the same launches. All tokens are copied to the GPU; one row's logits are stacked, copied,
    changed and reduced, and its token is read. After the end of that row, steps are queued ahead again."""
    model = gptq_belle.load(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cuda:0")
    engine, found = Engine(model, 2, 64), []
    for new_tokens, bias in ((9, None), (6, {7: 2.0})):
        engine.submit(range(4, 20), gptq_belle.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True,
                                                              logit_bias=bias))
    while not engine.idle:
        with gpu.counting() as counts:
            engine.step()
        found.append(counts.totals())
    launches = {"kernel": 5 * len(model.decoder.blocks) + 2, "graph": 1}
    assert found[4] == launches | {"operation": 6, "to device": 1, "to host": 3}
    assert found[7] == launches | {"operation": 1, "to device": 0, "to host": 2}


@pytest.mark.parametrize(("kind", "act_order"), [("bloom", False), ("llama", True)])
def test_all_launches_are_compiled_before(kind, act_order, request, tmp_path, gpu):
    """And nothing else is, over every number of rows."""
    path = packed_checkpoint(request.getfixturevalue(f"tiny_{kind}"), tmp_path / "packed", act_order=act_order)
    model, finished = gptq_belle.load(path, device="cuda:0"), []
    model.warm_up(16, 2048, lambda done, total: finished.append((done, total)))
    assert finished[-1] == (len(finished), len(gpu.compiled)) == (len(gpu.compiled),) * 2
    with torch.inference_mode():
        cache = model.new_cache(16, ROW_BUCKETS[-1])
        for rows in (1, *ROW_BUCKETS):
            model.prefill_slot(torch.full((rows,), 5).to(CUDA), cache, 0)
        for rows in range(1, 17):
            model.decode_slots(torch.full((rows,), 5).to(CUDA), cache, range(rows), [20] * rows)
            if (fused := model.fused_decoding(cache, rows)) is not None:
                sampler = Sampler(gptq_belle.SamplingParams(temperature=1.0), [], CUDA)
                fused.step([DecodingRow(row, 20, 5, sampler, 9) for row in range(rows)])
    assert gpu.launched == gpu.compiled.keys()


def test_engine_compiles_what_it_launches(tiny_model, tmp_path, gpu):
    model = gptq_belle.load(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cuda:0")
    assert not gpu.compiled
    model.generate([range(4, 20), range(4, 150)], max_new_tokens=2)
    assert gpu.launched
    assert gpu.launched <= gpu.compiled.keys()


def test_command_line_compiles_before_it_generates(tiny_llama, belle, tmp_path, gpu):
    path = packed_checkpoint(tiny_llama, tmp_path / "packed")
    code, out, _ = belle("generate", path, "--prompt", "hello", "--prompt-style", "none", "--max-tokens", "2",
                         "--device", "cuda:0", "--json")
    assert (code, json.loads(out)["prompt"]) == (0, "hello")
    assert gpu.launched
    assert gpu.launched <= gpu.compiled.keys()


@pytest.mark.parametrize(("device", "notices"), [("cpu", 0), ("cuda:0", 1)])
def test_server_says_that_it_compiles(device, notices, tiny_llama, tmp_path, gpu):
    config = ServiceConfig(packed_checkpoint(tiny_llama, tmp_path / "packed"), Limits(slots=2), device=device)
    said = []
    service = config.service(Metrics(), said.append)
    assert (len(said), bool(gpu.compiled)) == (notices, notices == 1)
    assert service.scheduler.close(10)


def test_warm_up_compiles_in_threads(monkeypatch, tmp_path):
    """What Triton compiles then is what later launches find, and nothing is launched."""
    calls, code = [], SimpleNamespace(load_binary=lambda *_: ("module", "function", 32, 0, 1024),
                                      get_device_properties=lambda device: {"max_shared_mem": 227 << 10})
    pretended = SimpleNamespace(
        get_current_device=lambda: 1 << 20, get_current_stream=lambda device: 0, utils=code,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda source, metadata: lambda *arguments: calls.append((source.name, *arguments)))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(triton_matmul, "device_properties", lambda device: (90, 132))
    monkeypatch.setattr(driver, "_active", pretended)
    weight = triton_layout.prepare(checked_weight(**random_words(4, 1024, 64, 128), bits=4, zero_offset=1))
    seen = []
    triton_warm_up.warm_up([triton_warm_up.Product(weight, None, 16)] * 2, torch.float16,
                           lambda done, total: seen.append((done, total, threading.active_count())))
    assert [done for done, *_ in seen] == [*range(1, seen[0][1] + 1)]
    assert max(threads for *_, threads in seen) > threading.active_count()
    assert not calls
    files = sorted(tmp_path.rglob("*.cubin"))
    for rows in (1, 8, 9, 16):
        triton_matmul.quant_matmul(torch.ones(rows, 1024).half(), weight)
    assert [name for name, *_ in calls] == ["skinny_kernel"] * 4
    assert sorted(tmp_path.rglob("*.cubin")) == files
    x, y = torch.ones(1, 1024).half(), torch.empty(1, 64).half()
    [launch] = triton_matmul.product_launches(x, weight, None, y, "skinny", TileConfig(8, 64, 128, 1, 2, 4))
    launch.bind()()
    first, again = ([id(value) if isinstance(value, torch.Tensor) else value for value in call] for call in calls[-2:])
    given = slice(10, None)  # after the name, the grid, the stream, and what belongs to the compiled kernel
    assert (first[1:4], first[given]) == (again[1:4], again[given])
    assert len(first[given]) == len(launch.kernel.arg_names)


@pytest.fixture(params=["none", "tf32"])
def precision(request):
    """The user's setting of float32 products on CUDA."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, request.param
    yield request.param
    settings.fp32_precision = before


def test_reference_on_a_gpu_is_not_computed_in_tf32(precision, gpu, monkeypatch):
    settings, product, seen = torch.backends.cuda.matmul, reference.linear, []
    monkeypatch.setattr(reference, "linear", lambda *args: seen.append(settings.fp32_precision) or product(*args))
    words = {name: tensor.to(CUDA) for name, tensor in random_words(4, 64, 32, 32).items()}
    reference.quant_matmul(torch.ones(1, 64, device=CUDA), checked_weight(**words, bits=4, zero_offset=1))
    assert (seen, settings.fp32_precision) == (["ieee"], precision)
    with pytest.raises(ZeroDivisionError), reference.full_float32():
        raise ZeroDivisionError
    assert settings.fp32_precision == precision


# The simulation itself.


def test_tensors_of_two_devices_are_not_mixed(gpu):
    own, host = torch.ones(3, device=CUDA), torch.ones(3)
    assert isinstance(own, GpuTensor)
    for mixed in (lambda: own + host, lambda: torch.cat((host, own)), lambda: own[torch.tensor([1])],
                  lambda: own[[1, 2]], lambda: torch.add(host, host, out=own)):
        with pytest.raises(RuntimeError, match="device"):
            mixed()
    assert (own + torch.tensor(2.0)).tolist() == [3, 3, 3]  # one number is an argument of the kernel


def test_operations_and_copies_are_counted(gpu):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=CUDA)
    with gpu.counting() as counts:
        y = x.t()[1:].reshape(-1).add_(1)  # the first three are views
        assert float(y.sum()) == 8
        x[:, 0] = 0
        x.copy_(torch.ones(2, 2))
        assert isinstance(x.cpu() + 1, torch.Tensor)
        x[x > 0]
        x.nonzero()
    assert counts.totals() == {"operation": 4, "kernel": 0, "graph": 0, "to device": 1, "to host": 4}
    assert gpu.counts["to device", "copy_"] == 1
    assert counts.total("allocation") == 4  # sum, comparison, indexing, nonzero


def test_allocations_are_counted(gpu):
    x, total = torch.ones(3, 4, device=CUDA), torch.empty(3, device=CUDA)
    with gpu.counting() as counts:
        torch.sum(x, -1, out=total)
        x[1:].add_(1)
    assert not counts.total("allocation")
    with gpu.counting() as counts:
        torch.empty(3, device=CUDA)
        torch.ones(2).to(CUDA)
        x.sum(-1)
    assert counts.total("allocation") == 3


def test_captured_launches_are_counted_when_they_are_replayed(gpu):
    from gptq_belle.kernels.triton_reduce import reduce_kernel

    graph, x = torch.cuda.CUDAGraph(), torch.ones(4, device=CUDA)
    with torch.cuda.device(CUDA):
        with torch.cuda.graph(graph):
            reduce_kernel[1,](x, None, x, 1, 4, HAS_BIAS=False, SPLIT_K=1, WIDTH=256)
        assert not gpu.counts.total("kernel")
        graph.replay()
        graph.replay()
    assert (gpu.counts.total("kernel"), gpu.counts.total("graph")) == (2, 2)


def test_tensor_of_the_cpu_is_no_argument_of_a_kernel(gpu):
    from gptq_belle.kernels.triton_reduce import reduce_kernel

    arguments = torch.ones(2, 1, 4, device=CUDA), torch.ones(4), torch.ones(1, 4, device=CUDA), 1, 4
    with torch.cuda.device(CUDA), pytest.raises(RuntimeError, match=naming("bias")):
        reduce_kernel[1,](*arguments, HAS_BIAS=True, SPLIT_K=2, WIDTH=256)


def test_launch_while_another_gpu_is_selected(gpu):
    from gptq_belle.kernels.triton_reduce import reduce_kernel

    x = torch.ones(4, device=CUDA)
    with pytest.raises(RuntimeError, match=naming("reduce_kernel")):
        reduce_kernel[1,](x, None, x, 1, 4, HAS_BIAS=False, SPLIT_K=1, WIDTH=256)
