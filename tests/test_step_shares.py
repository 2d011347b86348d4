"""Shares of a decode step: linears, lm_head and attention are timed, and the model stays unchanged."""

import pytest
import torch
from conftest import packed_checkpoint

from gptq_belle import load
from gptq_belle.bench import step_shares
from gptq_belle.bench.step_shares import clock_parts, measure_step_shares
from gptq_belle.common.timers import PhaseClock


def test_clocks_change_no_output(tiny_model, tmp_path):
    model = load(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cpu")
    ids = torch.randint(384, (1, 12))
    before, attributes = model.logits(ids), [dict(vars(block)) for block in model.decoder.blocks]
    clock, calls = PhaseClock(), []
    with clock_parts(model, lambda name: calls.append(name) or clock(name)):
        assert torch.equal(model.logits(ids), before)
    linears = sum(1 for name in vars(model.decoder.blocks[0]) if name in ("qkv", "out", "up", "down", "gate_up"))
    assert calls == (["linears", "attention"] + ["linears"] * (linears - 1)) * 2 + ["head"]
    assert all(clock.seconds[name] > 0 for name in ("linears", "attention", "head"))
    assert [dict(vars(block)) for block in model.decoder.blocks] == attributes
    assert "run_blocks" not in vars(model.decoder)
    assert torch.equal(model.logits(ids), before)


@pytest.mark.parametrize("batch", [1, 9])  # recorded, and not
def test_shares_of_packed_models(tiny_model, tmp_path, batch):
    model = load(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cpu")
    head, replays = model.decoder.head, model.use_step_graphs
    found = measure_step_shares(model, batch, 4, 10.0)  # all parts are a small share of 10 seconds
    assert 0 < found.linears < 0.1
    assert 0 < found.attention < 0.1
    assert 0 < found.head < 0.1
    assert (model.decoder.head, model.use_step_graphs) == (head, replays)


def test_shares_follow_the_time(tiny_llama, monkeypatch):
    import time

    model = load(tiny_llama, device="cpu")
    head = model.decoder.head
    monkeypatch.setattr(step_shares, "STEPS", 3)
    monkeypatch.setattr(model.decoder, "head", lambda x: (time.sleep(0.05), head(x))[1])
    found = measure_step_shares(model, 1, 4, 0.06)
    assert 0.8 < found.head < 0.95
    assert sum(found) <= 1 + 1e-9
