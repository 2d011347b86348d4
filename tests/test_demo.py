"""demo, on tiny models instead of the shipped ones: quantizes, measures, prints and answers."""

import json
import shlex

import pytest

from gptq_belle.bench.footprint import Footprint
from gptq_belle.bench.workload import Workload
from gptq_belle.cli import demo
from gptq_belle.evaluation import comparison

ROWS = [("math", "1+1?", "2"), ("math", "2+2?", "4"), ("extract", "北京的首都?", "x"), ("code", "print", "print()")]
TEXT = "人工智能正在改变我们的生活,语言模型可以回答问题、翻译文章、编写程序。The quick brown fox. " * 4


@pytest.fixture
def examples(tiny_bloom, tiny_llama, tmp_path, monkeypatch):
    """A folder laid out like examples/belle_tiny; memory in other processes is not measured here (see test_bench)."""
    folder = tmp_path / "belle_tiny"
    (folder / "data").mkdir(parents=True)
    (folder / "bloom").symlink_to(tiny_bloom)
    (folder / "llama").symlink_to(tiny_llama)
    lines = (json.dumps({"class": c, "question": q, "std_answer": a}) + "\n" for c, q, a in ROWS)
    (folder / "data" / "test.jsonl").write_text("".join(lines))
    (folder / "data" / "heldout.jsonl").write_text(json.dumps({"text": TEXT}))
    monkeypatch.setattr(demo, "EXAMPLES", folder)
    monkeypatch.setattr(demo, "ROWS", 20)
    monkeypatch.setattr(comparison, "SPEED", Workload(prompt=4, tokens=2, repeats=1))
    monkeypatch.setattr(comparison, "MAX_ANSWER", 8)
    seen = Footprint(0.1, 10**6, 2 * 10**6, None, None)
    monkeypatch.setattr("gptq_belle.bench.footprint.measure_in_new_process", lambda path, **rest: seen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return folder


def test_both_models_in_json(examples, tmp_path, belle):
    code, out, _ = belle("demo", "--json", "--per-class", "1")
    assert code == 0
    found = json.loads(out)["models"]
    assert len(found) == 2
    for model, name in zip(found, ("bloom", "llama"), strict=True):
        full, eight, four = model["variants"]
        assert full["divergence"] is None
        assert 0 < eight["divergence"]["kl_mean"] < four["divergence"]["kl_mean"]
        assert four["bytes"] < eight["bytes"] < full["bytes"]
        assert four["divergence"]["base_perplexity"] == pytest.approx(full["perplexity"]["perplexity"], rel=1e-6)
        assert {one["scores"]["classes"]["math"]["answers"] for one in model["variants"]} == {1}
        assert model["prompt"] == "1+1?"
        for bits in (8, 4):
            config = json.loads((tmp_path / "demo-output" / f"{name}-{bits}bit" / "config.json").read_text())
            assert config["quantization_config"]["bits"] == bits


def test_one_model_in_a_table_and_again_into_the_same_folder(examples, tmp_path, belle):
    for _ in range(2):
        code, printed, _ = belle("demo", "--model", "llama", "--out", tmp_path / "out", "--prompt", "你是谁?")
        assert code == 0
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    for name in ("size on disk, MB", "peak memory, MB", "perplexity, held-out text", "KL to full precision",
                 "same top token, %", "decode, tokens/s, float32", "math *: exact match, %", "code: character F1, %",
                 "all with * together: exact match, %"):
        assert name in lines
    assert "full precision     8 bit     4 bit" in printed
    assert "Prompt: 你是谁?" in printed
    assert "llama-4bit" in printed
    assert not (tmp_path / "out" / "bloom-4bit").exists()
    chat, serve, report = (shlex.split(line)[1:] for line in printed.splitlines()[-3:])
    assert chat[1:] == serve[1:] == [str(tmp_path / "out" / "llama-4bit")]
    assert belle(*report, "--window", "64")[0] == 0


def test_demo_without_the_repository_exits_3(monkeypatch, tmp_path, belle):
    monkeypatch.setattr(demo, "EXAMPLES", tmp_path)
    code, _, err = belle("demo")
    assert code == 3
    assert err.strip()


def test_shipped_models_are_found():
    for name in demo.MODELS:
        demo.check_examples(demo.EXAMPLES, name)
