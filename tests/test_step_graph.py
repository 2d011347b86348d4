"""Replayed decode steps give the same bits as the same calls from Python, for other tokens, slots and lengths."""

import pytest
import torch
from conftest import naming, packed_checkpoint

from gptq_belle import load
from gptq_belle.engine.step_graph import MAX_GRAPH_ROWS
from gptq_belle.kernels.call_recorder import CallRecorder
from gptq_belle.kernels.cpu_elementwise import RmsNorm, silu_and_mul
from gptq_belle.kernels.native_library import load_library

if isinstance(load_library(), str):
    pytest.skip(load_library(), allow_module_level=True)


@pytest.fixture(params=["float32", "float16", "int8"])
def model(request, tiny_model, tmp_path):
    return load(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cpu", cache=request.param)


@torch.inference_mode()
def steps(model, schedule):
    """Logits of decode steps, given as (slots, lengths), with a cache of six slots of twenty tokens each."""
    generator, cache = torch.Generator().manual_seed(3), model.new_cache(6, 40)
    for slot in range(6):
        model.prefill_slot(torch.randint(4, 380, (20,), generator=generator), cache, slot)
    found = []
    for slots, lengths in schedule:
        tokens = torch.randint(4, 380, (len(slots),), generator=generator)
        found.append(model.decode_slots(tokens, cache, slots, lengths))
    return found, cache


@pytest.mark.parametrize("threads", [1, 2])
def test_recorded_steps_equal_steps_called_from_python(model, threads):
    torch.set_num_threads(threads)
    assert model.use_step_graphs
    schedule = [([0], [20]), ([0], [21]), ([4, 1, 2], [20, 20, 19]), ([3], [20]), ([2, 5, 0], [20, 7, 22]),
             ([4, 1, 2], [21, 21, 21]), ([0], [23])]
    found, cache = steps(model, schedule)
    assert set(cache.step_graphs) == {1, 3}
    model.use_step_graphs = False
    wanted, plain = steps(model, schedule)
    assert not plain.step_graphs
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["act-order", "fast", "asymmetric"])
def test_recorded_steps_of_other_weights_and_threads(kind, tiny_model, tmp_path):
    path = packed_checkpoint(tiny_model, tmp_path / "packed", act_order=kind == "act-order", sym=kind != "asymmetric")
    model = load(path, device="cpu", precision="fast" if kind == "fast" else "exact")
    schedule = [([2, 0], [20, 20]), ([2, 5], [21, 20]), ([0, 1], [21, 20])]
    torch.set_num_threads(1)
    found, _ = steps(model, schedule)
    model.use_step_graphs = False
    torch.set_num_threads(3)
    wanted, _ = steps(model, schedule)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    model.use_step_graphs = True
    with torch.inference_mode():
        tokens, cache = torch.tensor([7, 8]), steps(model, schedule)[1]
        several = model.decode_slots(tokens, cache, [3, 4], [20, 20])
        torch.set_num_threads(1)
        assert torch.equal(several, model.decode_slots(tokens, cache, [3, 4], [20, 20]))


def test_replay_reads_no_result_of_the_previous_step(model):
    (_, second), cache = steps(model, [([1], [20]), ([1], [20])])
    recorded = cache.step_graphs[1]
    recorder = recorded.recorder
    free = (tensor for tensors in recorder._free.values() for tensor in tensors)
    for tensor in [*recorder._this_block, *recorder._previous_block, *free]:
        tensor.numpy()[:] = torch.nan
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(4, 380, (count,), generator=generator) for count in (*[20] * 6, 1, 1)][-1]
    with torch.inference_mode():
        assert torch.equal(model.decode_slots(tokens, cache, [1], [20]), second)


def test_steps_of_many_rows_are_not_recorded(model):
    with torch.inference_mode():
        cache = model.new_cache(MAX_GRAPH_ROWS + 1, 8)
        rows = MAX_GRAPH_ROWS + 1
        model.decode_slots(torch.arange(rows) + 4, cache, range(rows), [0] * rows)
    assert not cache.step_graphs


def test_step_graph_does_not_keep_its_cache_alive(model):
    import gc
    import weakref

    gc.disable()
    try:
        _, cache = steps(model, [([0], [20])])
        last = weakref.ref(cache.keys[0])
        del cache, _
        assert last() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("case", ["not packed", "bfloat16", "torch"])
def test_models_with_other_kernels_are_not_recorded(case, tiny_model, tmp_path, monkeypatch):
    path = tiny_model if case == "not packed" else packed_checkpoint(tiny_model, tmp_path / "packed")
    if case == "torch":
        monkeypatch.setattr("gptq_belle.kernels.cpu_matmul.load_library", lambda: "no compiler")
        monkeypatch.setattr("gptq_belle.kernels.cpu_attention.load_library", lambda: "no compiler")
    found = load(path, device="cpu", dtype=torch.bfloat16 if case == "bfloat16" else None)
    assert not found.use_step_graphs
    logits, session = found.prefill(torch.arange(4, 12)[None], 4)
    assert found.decode(logits.argmax(-1), session).isfinite().all()
    assert not session.cache.step_graphs


def test_replay_rejects_indices_out_of_bounds(model):
    _, cache = steps(model, [([0], [20])])
    with torch.inference_mode(), pytest.raises(ValueError, match="slot"):
        model.decode_slots(torch.tensor([5]), cache, [6], [20])
    with torch.inference_mode(), pytest.raises(ValueError, match="slot"):
        model.decode_slots(torch.tensor([5]), cache, [0], [40])
    with torch.inference_mode(), pytest.raises(ValueError, match="slot"):
        model.decode_slots(torch.tensor([5, 6]), cache, [0, 0], [20, 20])


def test_replay_rejects_another_number_of_rows(model):
    (first,), cache = steps(model, [([0], [20])])
    with pytest.raises(ValueError, match=naming(1, 2)):
        cache.step_graphs[1].replay(torch.zeros(2, first.shape[-1]), [0], [20])
    assert model.decode_slots(torch.tensor([5]), cache, [0], [20]).isfinite().all()  # without inference mode around it


def test_recording_rejects_calls_that_are_not_native():
    norm, x = RmsNorm(torch.randn(40), 1e-6), torch.randn(3, 40)
    with pytest.raises(RuntimeError, match="RMS norm"), CallRecorder().recording():
        norm(x.bfloat16())
    with pytest.raises(RuntimeError, match="torch"), CallRecorder().recording():
        silu_and_mul(torch.randn(4, 40).t())
    assert norm(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_recording_does_not_depend_on_the_default_dtype(model, dtype):
    wanted, _ = steps(model, [([0], [20]), ([0], [21])])
    torch.set_default_dtype(dtype)
    try:
        found, _ = steps(model, [([0], [20]), ([0], [21])])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_replay_uses_the_present_contents_of_memory():
    x, norm, recorder = torch.randn(3, 40), RmsNorm(torch.randn(40), 1e-6), CallRecorder()
    with recorder.recording():
        found = norm(x)
    elsewhere = norm(x)  # no longer recorded
    x.copy_(torch.randn(3, 40))
    recorder.replay()
    assert torch.equal(found, norm(x))
    assert not torch.equal(found, elsewhere)
