"""Model: prefill and decode equal one forward pass; generation equals transformers'; stop strings and limits."""

import json
import shutil

import numpy
import pytest
import torch
from conftest import naming, packed_checkpoint

import gptq_belle
from gptq_belle.checkpoint.tokenizer_files import load_tokenizer
from gptq_belle.errors import InputError, UsageError
from gptq_belle.models.sizes import PREFILL_CHUNK
from gptq_belle.prompts.styles import STYLES, chat_template

IDS = torch.tensor([[5, 300, 17, 42, 8, 250, 99, 4, 61], [1, 2, 3, 4, 5, 6, 7, 8, 9]])


@pytest.fixture
def model(tiny_model):
    return gptq_belle.load(tiny_model, device="cpu")


@pytest.fixture
def packed(tiny_model, tmp_path):
    return gptq_belle.load(packed_checkpoint(tiny_model, tmp_path / "packed"), device="cpu", cache="float32",
                           head_bits=16)


def test_model_attributes(model, tiny_model):
    assert (model.path, model.device, model.dtype) == (tiny_model, torch.device("cpu"), torch.float32)
    assert (model.context, model.eos_ids) == (256, {2})
    assert model.prompt_style == model.config["model_type"]
    assert model.tokenizer.eos_token == "</s>"


def test_logits_equal_transformers(packed):
    logits = packed.logits(IDS)
    assert (logits.shape, logits.dtype) == ((2, 9, 384), torch.float32)
    with torch.inference_mode():
        expected = gptq_belle.hf_model(packed.path, device="cpu")(IDS).logits
    assert float((logits - expected).norm() / expected.norm()) < 1e-4  # 16 bits of an activation: 3e-5 each time
    torch.testing.assert_close(packed.logits(IDS[1:]), logits[1:], rtol=1e-3, atol=2e-3)


def test_logits_are_float32_for_every_dtype(tiny_model):
    assert gptq_belle.load(tiny_model, device="cpu", dtype=torch.bfloat16).logits(IDS).dtype == torch.float32


def test_prefill_and_decode_equal_one_forward_pass(packed):
    whole = packed.logits(IDS)
    logits, cache = packed.prefill(IDS[:, :4])
    torch.testing.assert_close(logits, whole[:, 3], rtol=1e-3, atol=2e-3)
    for t in range(4, 9):
        logits = packed.decode(IDS[:, t], cache)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-3, atol=2e-3)
    assert cache.length == 9


@pytest.mark.parametrize(("cache", "most"), [("float16", 1e-3), ("bfloat16", 1e-2), ("int8", 4e-2)])
def test_narrow_cache_dtypes_have_small_errors(tiny_model, cache, most):
    ids = torch.randint(384, (2, 90))
    model = gptq_belle.load(tiny_model, device="cpu", cache=cache)
    whole = model.logits(ids)
    logits, session = model.prefill(ids[:, :70], room=20)
    for t in range(70, 90):
        assert 1e-6 < float((logits - whole[:, t - 1]).norm() / whole[:, t - 1].norm()) < most
        logits = model.decode(ids[:, t], session)
    with pytest.raises(UsageError, match=naming(91, 90)):
        model.decode(ids[:, 0], session)


def test_unknown_cache_dtype_is_refused_before_reading(tmp_path):
    with pytest.raises(UsageError, match=naming("int3")):
        gptq_belle.load(tmp_path / "absent", device="cpu", cache="int3")


def test_greedy_generation_equals_transformers(packed):
    ids = packed.tokenizer("人工智能")["input_ids"]
    hf = gptq_belle.hf_model(packed.path, device="cpu")
    theirs = hf.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids):]
    expected = packed.tokenizer.decode(theirs, skip_special_tokens=True)
    assert packed.generate("人工智能", max_new_tokens=12) == expected
    assert packed.generate(ids, max_new_tokens=12) == expected
    assert packed.generate(torch.tensor(ids), max_new_tokens=12) == expected


def test_stream_yields_the_text_of_generate(packed):
    sampling = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "max_new_tokens": 30}
    pieces = list(packed.stream("北京", **sampling))
    assert len(pieces) > 2
    assert all(pieces)
    assert "".join(pieces) == packed.generate("北京", **sampling)


class Scripted:
    """Makes a model generate given tokens by replacing its logits."""

    def __init__(self, model, monkeypatch, ids):
        self.ids, self.prompts = list(ids), []
        read, step = model.prefill_slot, model.decode_slots
        monkeypatch.setattr(model, "prefill_slot", lambda ids, *where: self.first(read(ids, *where), ids))
        monkeypatch.setattr(model, "decode_slots", lambda *arguments: self.next(step(*arguments)))

    def first(self, logits, prompt):
        self.prompts.append(prompt.tolist())
        return self.next(logits)

    def next(self, logits):
        return torch.nn.functional.one_hot(torch.tensor([self.ids.pop(0)]), logits.shape[-1]).float()


def test_question_is_formatted_and_next_question_is_cut_off(model, monkeypatch):
    said = model.tokenizer.encode("春天。\n\nHuman: 再见")
    script = Scripted(model, monkeypatch, said)
    pieces = list(model.stream("你好", prompt_style="auto", max_new_tokens=50))
    assert "".join(pieces) == "春天。"
    assert script.ids  # it stopped as soon as "Human:" was there
    style = STYLES[model.config["model_type"]]
    assert model.tokenizer.decode(script.prompts[0]) == f"{style.before}你好{style.after}"


def test_eos_ends_the_answer_and_is_not_shown(model, monkeypatch):
    script = Scripted(model, monkeypatch, [*model.tokenizer.encode("好"), 2, 50])
    assert model.generate("你好", max_new_tokens=9) == "好"
    assert script.ids == [50]


def test_eos_of_the_tokenizer_ends_the_answer(tiny_llama, tmp_path, monkeypatch):
    """Conversions of early 2023 state 1 in config.json, the tokenizer has 2."""
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        stated = json.loads((path / name).read_text()) | {"eos_token_id": 1}
        (path / name).write_text(json.dumps(stated))
    model = gptq_belle.load(path, device="cpu")
    script = Scripted(model, monkeypatch, [*load_tokenizer(path).encode("好"), 2, 50])
    assert model.generate("你好", max_new_tokens=9) == "好"
    assert script.ids == [50]


def test_end_of_message_token_of_the_chat_template_ends_the_answer(tiny_llama, tmp_path, monkeypatch):
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    (path / "chat_template.jinja").write_text(
        "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<pad>\n{% endfor %}[assistant]")
    model = gptq_belle.load(path, device="cpu")
    script = Scripted(model, monkeypatch, [*load_tokenizer(path).encode("好"), 3, 50])
    assert model.generate("你好", prompt_style="auto", max_new_tokens=9) == "好"
    assert script.ids == [50]
    assert model.tokenizer.decode(script.prompts[0]) == "[user]你好<pad>\n[assistant]"


def test_eos_can_be_ignored(model, monkeypatch):
    script = Scripted(model, monkeypatch, [2, *model.tokenizer.encode("好"), 2, 2])
    assert model.generate("你好", max_new_tokens=len(script.ids), ignore_eos=True) == "好"
    assert not script.ids


def test_custom_stop_strings_end_the_answer(model, monkeypatch):
    Scripted(model, monkeypatch, model.tokenizer.encode("春天。夏天。"))
    assert model.generate("你好", max_new_tokens=50, stop=("。",)) == "春天"


def test_max_new_tokens_limits_the_answer(model, monkeypatch):
    script = Scripted(model, monkeypatch, [50] * 9)
    model.generate("你好", max_new_tokens=4)
    assert len(script.ids) == 5


def test_style_without_special_tokens_adds_none(model, monkeypatch):
    model.tokenizer.backend_tokenizer.post_processor = _adds_bos()
    script = Scripted(model, monkeypatch, [2, 2, 2])
    for style in ("llama", "newline"):
        model.generate("你好", prompt_style=style)
    assert [prompt[0] == 1 for prompt in script.prompts] == [True, False]


def _adds_bos():
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])


def test_prompt_style_is_detected_from_the_chat_template(tiny_llama, tmp_path):
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    (path / "chat_template.jinja").write_text(chat_template("newline"))
    assert gptq_belle.load(path, device="cpu").prompt_style == "newline"


def test_prompt_style_in_config_is_used(tiny_llama, tmp_path):
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"prompt_style": "bloom"}))
    assert gptq_belle.load(path, device="cpu").prompt_style == "bloom"


@pytest.mark.parametrize(("length", "asked"), [(256, None), (250, 7), (300, 1)])
def test_prompt_and_answer_beyond_the_context_are_refused_before_generation(model, length, asked):
    with pytest.raises(UsageError, match=naming(length, 256, *filter(None, [asked]))):
        model.stream([5] * length, max_new_tokens=asked)


def test_context_can_be_filled_completely(model, monkeypatch):
    script = Scripted(model, monkeypatch, [50] * 9)
    model.generate([5] * 250)
    # There is room for six tokens, and every chunk of the prompt consumes one of the script.
    assert 9 - len(script.ids) == -(-250 // PREFILL_CHUNK["cpu"]) + 5


@pytest.mark.parametrize(("ids", "named"), [
    (torch.tensor([5]), [(1,)]), (torch.zeros(1, 0).long(), [(1, 0)]), (torch.zeros(1, 257).long(), [257, 256]),
    (torch.tensor([[384]]), ["384..384"]), (torch.tensor([[-1, 3]]), ["-1..3", 384]),
])
def test_invalid_token_ids_are_refused(model, ids, named):
    with pytest.raises(UsageError, match=naming(*named)):
        model.logits(ids)
    with pytest.raises(UsageError, match=naming(*named)):
        model.prefill(ids)


def test_empty_prompt_and_invalid_options_are_refused(model):
    with pytest.raises(UsageError, match=naming((1, 0))):
        model.generate("")
    with pytest.raises(UsageError, match="top_p"):
        model.stream("a", top_p=2)
    with pytest.raises(UsageError, match=naming("prompt style", "'x'")):
        model.stream("a", prompt_style="x")


def test_model_without_tokenizer_takes_token_ids_only(tiny_model, tmp_path):
    path = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    model = gptq_belle.load(path, device="cpu")
    assert model.logits(IDS).shape == (2, 9, 384)
    logits, cache = model.prefill(IDS)
    assert model.decode(logits.argmax(-1), cache).shape == (2, 384)
    with pytest.raises(InputError, match="tokenizer"):
        model.generate("text")


def test_batches_are_never_flattened(model):
    rows = [[5, 300, 17], [42, 8, 250]]
    alone = [model.generate(row, max_new_tokens=4) for row in rows]
    for batch in (torch.tensor(rows), torch.tensor(rows, dtype=torch.int32), numpy.array(rows), rows, tuple(rows),
                  [torch.tensor(row) for row in rows], [numpy.array(rows[0]), tuple(rows[1])]):
        assert model.generate(batch, max_new_tokens=4) == alone
    for row in (torch.tensor(rows[0]), numpy.array(rows[0]), tuple(rows[0]), list(torch.tensor(rows[0]))):
        assert model.generate(row, max_new_tokens=4) == alone[0]
    assert model.generate(torch.tensor(rows[:1]), max_new_tokens=4) == alone[:1]


WRONG_PROMPTS = [None, 5, 2.5, b"text", {"input_ids": [5]}, {5, 6}, iter([5]), [5, None], [5.0, 6.0], [True, False],
                 [5, "text"], ["text", None], [[5], [[6]]], [[[5]]], torch.tensor([5.0]), torch.tensor([True]),
                 torch.tensor(5), torch.ones(1, 1, 2, dtype=torch.int64), numpy.array([0.5]), numpy.array([[True]]),
                 [384], [-1], [2**70], [[5], [384]], torch.tensor([[5, 384]]), [], [[]], [[5], []], "\udcc4\udce3",
                 ["good", "\ud83d"]]


@pytest.mark.parametrize("prompt", WRONG_PROMPTS, ids=lambda prompt: repr(prompt).partition(" object at ")[0])
def test_wrong_prompts_are_refused(model, prompt):
    with pytest.raises(UsageError):
        model.generate(prompt, max_new_tokens=2)


@pytest.mark.parametrize("prompt", [["one", "two"], IDS, IDS[:1], [[5], [6]]], ids=repr)
def test_stream_refuses_several_prompts(model, prompt):
    with pytest.raises(UsageError):
        model.stream(prompt)


@pytest.mark.parametrize("ids", [[[5, 6]], torch.tensor([[0.5]]), torch.tensor([[True, False]])], ids=repr)
def test_logits_refuse_other_types(model, ids):
    with pytest.raises(UsageError):
        model.logits(ids)


@pytest.mark.parametrize("option", [
    {"temperature": "hot"}, {"temperature": None}, {"top_k": 2.5}, {"top_k": None}, {"max_new_tokens": 2.0},
    {"max_new_tokens": True}, {"seed": "1"}, {"stop": "text"}, {"stop": (5,)}, {"stop": None}, {"top_p": [1]},
], ids=repr)
def test_sampling_options_of_another_type_are_refused(model, option):
    with pytest.raises(UsageError, match=naming(*option)):
        model.generate("text", **option)


def test_parameters_of_another_type_are_refused(model):
    with pytest.raises(UsageError, match="dict"):
        model.generate("你好", {"temperature": 1.0})
