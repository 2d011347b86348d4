"""Stored predictions: results equal those without storing bit for bit, and outdated predictions are not used."""

import shutil
from collections import namedtuple

import numpy
import pytest
import torch
from conftest import naming, packed_checkpoint, tiny_tokenizer

from gptq_belle import load
from gptq_belle.errors import HardwareError, InputError, UsageError
from gptq_belle.evaluation.base_predictions import load_predictions, prediction_key, record_predictions
from gptq_belle.evaluation.kl_divergence import compare_with_predictions, divergence
from gptq_belle.evaluation.kl_statistics import summarize_divergence
from gptq_belle.evaluation.perplexity import encode, split_windows

TEXT = "人工智能正在改变我们的生活,语言模型可以回答问题、翻译文章、编写程序。The quick brown fox. " * 4


@pytest.fixture(scope="module")
def models(tiny_llama, tmp_path_factory):
    packed = packed_checkpoint(tiny_llama, tmp_path_factory.mktemp("predictions") / "packed")
    return tuple(load(path, device="cpu", dtype=torch.float32) for path in (tiny_llama, packed))


@pytest.fixture
def windows():
    return list(split_windows(encode(tiny_tokenizer(), TEXT), 48, 20))


def test_results_with_and_without_storing_are_equal(models, windows, tmp_path):
    base, model = models
    stored = record_predictions(tmp_path, prediction_key(base.path, windows), base.logits, windows)
    found = summarize_divergence(compare_with_predictions(stored, model.logits), len(windows))
    assert found == divergence(base.logits, model.logits, base.tokenizer, TEXT, length=48, stride=20)
    assert found.kl_mean > 0.01
    again = load_predictions(tmp_path, prediction_key(base.path, windows), windows)
    assert summarize_divergence(compare_with_predictions(again, model.logits), len(windows)) == found


def test_kl_from_stored_predictions_equals_a_direct_computation(models, windows, tmp_path):
    """KL by NumPy from probabilities, position by position, without the code under test."""
    base, model = models
    stored = record_predictions(tmp_path, prediction_key(base.path, windows), base.logits, windows)
    found, ids = compare_with_predictions(stored, model.logits), encode(tiny_tokenizer(), TEXT).tolist()
    end, place = 0, 0
    while end < len(ids):
        first, end = max(end, 1), min(len(ids), 48 if end == 0 else end + 20)
        begin = max(0, end - 48)
        p, q = (numpy.exp(rows - rows.max(1, keepdims=True)) for rows in
                (m.logits(torch.tensor([ids[begin:end]]))[0].double().numpy() for m in (base, model)))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        for position in range(first - begin - 1, end - begin - 1):
            kl = (p[position] * numpy.log(p[position] / q[position])).sum()
            assert float(found.kl[place]) == pytest.approx(kl, rel=1e-4)
            following = ids[begin + position + 1]
            assert float(found.loss[place]) == pytest.approx(-numpy.log(q[position, following]), rel=1e-4)
            place += 1
    assert place == len(found.kl) == len(ids) - 1


def test_stored_predictions_of_other_settings_are_not_used(models, windows, tmp_path, tiny_llama):
    base, _ = models
    key = prediction_key(base.path, windows, precision=None)
    record_predictions(tmp_path, key, base.logits, windows)
    assert load_predictions(tmp_path, key, windows) is not None
    assert load_predictions(tmp_path, prediction_key(base.path, windows[:-1], precision=None), windows[:-1]) is None
    assert load_predictions(tmp_path, prediction_key(base.path, windows, precision="fast"), windows) is None
    copy = tmp_path.parent / "copy"
    shutil.copytree(tiny_llama, copy)
    assert load_predictions(tmp_path, prediction_key(copy, windows, precision=None), windows) is None
    (tmp_path / "about.json").unlink()  # as after a crash
    assert load_predictions(tmp_path, key, windows) is None
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=naming(tmp_path)):
        load_predictions(tmp_path, key, windows)


def test_too_little_disk_space_is_rejected(models, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(HardwareError, match=naming(tmp_path)):
        record_predictions(tmp_path, {}, models[0].logits, windows)


def test_interrupted_recording_is_not_reused(models, windows, tmp_path):
    base, _ = models
    key = prediction_key(base.path, windows)
    record_predictions(tmp_path, key, base.logits, windows)
    with pytest.raises(InputError, match=naming("NaN")):
        record_predictions(tmp_path, key, lambda ids: torch.full((1, ids.shape[1], 384), float("nan")), windows)
    assert load_predictions(tmp_path, key, windows) is None
