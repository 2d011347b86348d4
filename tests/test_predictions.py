"""Predictions on the disk: figures of two passes are those of one, bit for bit; what does not fit is made anew."""

import shutil
from collections import namedtuple

import numpy
import pytest
import torch
from conftest import naming, packed_checkpoint, tiny_tokenizer

from gptq_belle import load
from gptq_belle.errors import HardwareError, InputError, UsageError
from gptq_belle.evaluation.base_predictions import about, kept, record
from gptq_belle.evaluation.kl_divergence import divergence, token_figures
from gptq_belle.evaluation.kl_statistics import summarize
from gptq_belle.evaluation.perplexity import encode, windows

TEXT = "人工智能正在改变我们的生活,语言模型可以回答问题、翻译文章、编写程序。The quick brown fox. " * 4


@pytest.fixture(scope="module")
def models(tiny_llama, tmp_path_factory):
    packed = packed_checkpoint(tiny_llama, tmp_path_factory.mktemp("predictions") / "packed")
    return tuple(load(path, device="cpu", dtype=torch.float32) for path in (tiny_llama, packed))


@pytest.fixture
def cut():
    return list(windows(encode(tiny_tokenizer(), TEXT), 48, 20))


def test_two_passes_equal_one_pass(models, cut, tmp_path):
    base, model = models
    stored = record(tmp_path, about(base.path, cut), base.logits, cut)
    found = summarize(token_figures(stored, model.logits), len(cut))
    assert found == divergence(base.logits, model.logits, base.tokenizer, TEXT, length=48, stride=20)
    assert found.kl_mean > 0.01
    again = kept(tmp_path, about(base.path, cut), cut)
    assert summarize(token_figures(again, model.logits), len(cut)) == found


def test_two_pass_kl_equals_a_direct_computation(models, cut, tmp_path):
    """KL written out in numpy over probabilities, position by position, without any of the code under test."""
    base, model = models
    stored = record(tmp_path, about(base.path, cut), base.logits, cut)
    found, ids = token_figures(stored, model.logits), encode(tiny_tokenizer(), TEXT).tolist()
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


def test_stored_predictions_of_other_settings_are_not_used(models, cut, tmp_path, tiny_llama):
    base, _ = models
    content = about(base.path, cut, precision=None)
    record(tmp_path, content, base.logits, cut)
    assert kept(tmp_path, content, cut) is not None
    assert kept(tmp_path, about(base.path, cut[:-1], precision=None), cut[:-1]) is None
    assert kept(tmp_path, about(base.path, cut, precision="fast"), cut) is None
    copy = tmp_path.parent / "copy"
    shutil.copytree(tiny_llama, copy)
    assert kept(tmp_path, about(copy, cut, precision=None), cut) is None
    (tmp_path / "about.json").unlink()  # as after a crash
    assert kept(tmp_path, content, cut) is None
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=naming(tmp_path)):
        kept(tmp_path, content, cut)


def test_too_little_disk_space_is_refused(models, cut, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(HardwareError, match=naming(tmp_path)):
        record(tmp_path, {}, models[0].logits, cut)


def test_interrupted_recording_is_not_reused(models, cut, tmp_path):
    base, _ = models
    content = about(base.path, cut)
    record(tmp_path, content, base.logits, cut)
    with pytest.raises(InputError, match=naming("NaN")):
        record(tmp_path, content, lambda ids: torch.full((1, ids.shape[1], 384), float("nan")), cut)
    assert kept(tmp_path, content, cut) is None
