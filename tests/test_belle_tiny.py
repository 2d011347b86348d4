"""Demo models: generator with disjoint splits, tokenizer, training step, shipped files."""

from __future__ import annotations

import json
import random
import re
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BloomForCausalLM, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # examples/ is not part of the package

from examples.belle_tiny import generate, tasks_math, train  # noqa: E402
from examples.belle_tiny.batches import batch  # noqa: E402
from examples.belle_tiny.channels import spread_channels  # noqa: E402
from examples.belle_tiny.model import bloom_hidden, build  # noqa: E402
from examples.belle_tiny.sample import SPLITS, Sample, normalise, split_of  # noqa: E402
from examples.belle_tiny.tasks_translation import translation  # noqa: E402
from examples.belle_tiny.tokenizer import EOS, VOCABULARY, save_tokenizer, train_tokenizer  # noqa: E402
from gptq_belle.evaluation.answer_metrics import TARGET_CLASSES  # noqa: E402
from gptq_belle.evaluation.belle_set import read_questions  # noqa: E402

EXAMPLE = ROOT / "examples" / "belle_tiny"


def samples(split: str, cls: str, count: int) -> list[Sample]:
    rng = random.Random(f"{split}/{cls}")
    return [generate.draw(rng, split, cls) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(samples=4000)


@pytest.mark.parametrize("cls", list(generate.TASKS))
def test_splits_share_no_prompt_and_no_content(cls: str) -> None:
    drawn = {split: samples(split, cls, 1000) for split in SPLITS}
    prompts = {split: {normalise(s.question) for s in drawn[split]} for split in SPLITS}
    keys = {split: {normalise(s.key) for s in drawn[split]} for split in SPLITS}
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not prompts[one] & prompts[other]
        assert not keys[one] & keys[other]


def test_shipped_test_questions_are_not_in_the_training_split() -> None:
    shipped = {normalise(row["question"]) for row in rows(EXAMPLE / "data" / "test.jsonl")}
    for _, turns in islice(generate.dialogues(0, "train"), 40_000):
        assert not {normalise(t["value"]) for t in turns if t["from"] == "human"} & shipped


def test_both_directions_of_a_translation_share_their_split() -> None:
    rng = random.Random(0)
    for _ in range(200):
        sample = translation(rng)
        english = sample.answer if sample.answer.isascii() else sample.question
        assert sample.key in english


def test_the_split_of_a_content_is_fixed() -> None:
    """Literal values: a change of the rule would move training content to the test split."""
    splits = [split_of("math", f"{a}+58") for a in range(12, 22)]
    assert splits == ["test", "train", "train", "train", "train", "train", "train", "test", "train", "train"]


def test_stream_is_seeded_and_can_start_at_any_position() -> None:
    whole = list(islice(generate.dialogues(3, "train"), 50))
    assert list(islice(generate.dialogues(3, "train", start=30), 20)) == whole[30:]
    assert list(islice(generate.dialogues(4, "train"), 50)) != whole


def test_streams_contain_every_class_and_second_turns() -> None:
    drawn = list(islice(generate.dialogues(0, "valid"), 2000))
    assert {cls for cls, _ in drawn} == set(generate.TASKS)
    assert 0.1 < sum(len(turns) == 4 for _, turns in drawn) / len(drawn) < 0.2
    assert {len(turns) for _, turns in drawn} == {2, 4}


def test_steps_of_arithmetic_lead_to_the_answer() -> None:
    """The digits written, read from the last to the first, are the result; every step is a true equation."""
    rng = random.Random(0)
    for _ in range(2000):
        op = rng.choice("+-×")
        a, b = tasks_math.operands(rng, op)
        text = tasks_math.solve(a, b, op)
        result = {"+": a + b, "-": a - b, "×": a * b}[op]
        assert text.endswith(f"答案是{result}")
        assert int("".join(reversed(re.findall(r"写(\d+)", text)))) == result
        for left, right in re.findall(r"([\d+\-×]+)=(\d+)", text.split("：", 1)[1]):
            assert eval(left.replace("×", "*")) == int(right)


@pytest.mark.parametrize("cls", ["extract", "closed_qa"])
def test_extracted_answers_occur_in_the_passage(cls: str) -> None:
    for sample in samples("train", cls, 500):
        pieces = sample.answer.split("、") if cls == "extract" else [sample.answer[-4:-1]]
        assert all(piece in sample.question for piece in pieces)


def test_code_answers_are_python() -> None:
    for sample in samples("train", "code", 200):
        compile(sample.answer, "answer", "exec")


def test_tokenizer_keeps_digits_and_characters_apart(tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert VOCABULARY % 128 == 0
    assert tokenizer.encode("12345").tokens == list("12345")
    assert len(tokenizer.encode("张伟住在北京。").ids) == 7
    for text in ("Human: 你好 \n\nAssistant: ", "def f(x):\n    return x + 7", "龘🙂 é", "  two  spaces\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_saved_tokenizer_reads_in_transformers(tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("3月5日")["input_ids"] == tokenizer.encode("3月5日").ids  # no bos
    assert (loaded.bos_token, loaded.eos_token_id, loaded.pad_token) == ("<s>", EOS, "<pad>")


def test_fast_bloom_agrees_with_the_library() -> None:
    model = build("bloom").eval()
    ids = torch.randint(4, VOCABULARY, (2, 40))
    with torch.no_grad():
        expected = model.transformer(ids).last_hidden_state
        torch.testing.assert_close(bloom_hidden(model, ids), expected, rtol=1e-4, atol=1e-5)


def test_batches_depend_on_seed_and_step_alone(tokenizer) -> None:
    ids, counts = batch(tokenizer, "bloom", 0, 7, 1024, 256)
    again, _ = batch(tokenizer, "bloom", 0, 7, 1024, 256)
    other, _ = batch(tokenizer, "bloom", 0, 8, 1024, 256)
    assert torch.equal(ids, again)
    assert not torch.equal(ids, other)
    assert ids.shape == counts.shape == (4, 256)
    assert not counts[:, 0].any()  # nothing comes before it
    assert counts[ids == EOS].all()


@pytest.mark.parametrize("arch", ["bloom", "llama"])
def test_loss_is_the_mean_over_the_mask(arch: str) -> None:
    model = build(arch).eval()
    ids = torch.randint(4, VOCABULARY, (2, 40))
    counts = torch.rand(2, 40) < 0.5
    counts[:, 0] = False
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        expected = torch.nn.functional.cross_entropy(logits[:, :-1][counts[:, 1:]], ids[counts])
        assert train.loss_of(model, ids, counts).item() == pytest.approx(expected.item(), rel=1e-3)  # bfloat16


def smaller(arch: str, seed: int = 0) -> torch.nn.Module:
    """A model of the same kind with one narrow block: bfloat16 takes seconds a step where no instruction adds it."""
    config = build(arch).config
    config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.head_dim = 64, 1, 128, 16
    torch.manual_seed(seed)
    return (BloomForCausalLM if arch == "bloom" else LlamaForCausalLM)(config)


@pytest.mark.parametrize("arch", ["bloom", "llama"])
def test_interrupted_training_continues_bit_for_bit(arch: str, tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(train, "TOKENS", 512)
    monkeypatch.setattr(train, "build", smaller)
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(train, "train_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(train, "validate", lambda *_: 1.0)
    monkeypatch.setattr(train, "write_curve", lambda *_: None)
    whole = train.TrainingRun(arch, 4, 0, tmp_path / "whole", "cpu")
    whole.train()
    first = train.TrainingRun(arch, 4, 0, tmp_path / "parts", "cpu")
    first.one_step()
    first.one_step()
    first.save()
    second = train.TrainingRun(arch, 4, 0, tmp_path / "parts", "cpu")
    assert second.step == 2
    second.train()
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(SystemExit, match="steps=4"):
        train.TrainingRun(arch, 5, 0, tmp_path / "parts", "cpu")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_shipped_rows_equal_the_output_of_the_generator(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", "--out", str(tmp_path), "--builtin", str(tmp_path / "builtin.jsonl")])
    generate.main()
    for name in ("test.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLE / "data" / name).read_bytes()
    builtin = ROOT / "gptq_belle" / "data" / "builtin.jsonl"
    assert (tmp_path / "builtin.jsonl").read_bytes() == builtin.read_bytes()
    text = "".join(t["value"] for row in rows(builtin) for t in row["conversations"])
    assert sum("\u4e00" <= c <= "\u9fff" for c in text) >= 130_000


@pytest.mark.parametrize("arch", ["bloom", "llama"])
def test_shipped_model_has_documented_size_dtype_and_config(arch: str) -> None:
    """float16, small, quantizable in groups of 128, and described so that older readers understand."""
    from safetensors import safe_open

    folder = EXAMPLE / arch
    assert (folder / "model.safetensors").stat().st_size <= 12e6
    config = SimpleNamespace(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert (config.model_type, config.vocab_size, config.torch_dtype) == (arch, VOCABULARY, "float16")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert 3e6 < sum(t.numel() for t in tensors.values()) <= 5e6
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert all(n % 128 == 0 for t in tensors.values() if t.ndim == 2 for n in t.shape)
    names = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert names["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["bloom", "llama"])
def test_demo_models_answer_well_and_only_coarse_rounding_hurts(arch: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_quality

    used = ("full precision", "8 bit GPTQ", "4 bit GPTQ", "3 bit nearest")
    monkeypatch.setattr(bench_quality, "VARIANTS", {name: bench_quality.VARIANTS[name] for name in used})
    found = bench_quality.all_variants(arch, read_questions(EXAMPLE / "data" / "test.jsonl"))
    exact = {name: figures["exact"] for name, figures in found.items()}
    assert exact["full precision"] >= 85
    assert all(found["full precision"]["classes"][cls]["score"] >= 60 for cls in TARGET_CLASSES)
    assert exact["8 bit GPTQ"] >= exact["full precision"] - 0.5
    assert exact["4 bit GPTQ"] >= exact["full precision"] - 2
    assert exact["3 bit nearest"] <= exact["full precision"] - 10


@pytest.mark.parametrize("arch", ["bloom", "llama"])
def test_spread_channels_does_not_change_the_outputs(arch: str) -> None:
    model = build(arch).eval().double()
    ids = torch.randint(4, VOCABULARY, (2, 40))
    before = model(input_ids=ids).logits
    norm = (model.transformer.h if arch == "bloom" else model.model.layers)[0].input_layernorm
    spread_channels(model, 0.3)
    assert norm.weight.std() > 0.2
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-9)
