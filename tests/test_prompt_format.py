"""Prompt format of a model directory: `generate` and the chat template give the same prompt."""

import json
import shutil

import pytest
from conftest import naming, packed_checkpoint
from transformers import AutoTokenizer

from gptq_belle.checkpoint.conversion import convert
from gptq_belle.checkpoint.inspection import inspect
from gptq_belle.checkpoint.prompt_format import read_prompt_format, summary_rows
from gptq_belle.engine.model import load
from gptq_belle.errors import InputError, UsageError
from gptq_belle.prompts.styles import detect_style
from gptq_belle.quantization.config import QuantConfig
from gptq_belle.quantization.pipeline import quantize_checkpoint

TEXTS = {"bloom": "Human: 你好\n\nAssistant:", "llama": "Human: 你好 \n\nAssistant: ",
         "newline": "Human: \n你好\n\nAssistant: \n"}
MESSAGES = [{"role": "user", "content": "你好"}]


def check(path, style):
    """Check that generate and the chat template of a directory use this style."""
    found = read_prompt_format(path)
    assert (found.style, found.text, found.agrees) == (style, TEXTS[style], True)
    assert load(path, device="cpu").prompt_style == style
    assert inspect(path).prompt_style == style
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(MESSAGES, tokenize=False)
    assert theirs == TEXTS[style]


@pytest.mark.parametrize("style", [None, *TEXTS])
def test_quantize_writes_the_style_as_a_chat_template(tiny_model, tmp_path, style):
    quantize_checkpoint(tiny_model, tmp_path / "out", QuantConfig(method="rtn"), prompt_style=style)
    check(tmp_path / "out", style or tiny_model.name)


@pytest.mark.parametrize("style", TEXTS)
def test_convert_replaces_an_existing_template(tiny_llama, tmp_path, style):
    source = packed_checkpoint(tiny_llama, tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    convert(source, tmp_path / "kept")
    assert read_prompt_format(tmp_path / "kept").templated == "你好!"
    convert(source, tmp_path / "out", prompt_style=style)
    check(tmp_path / "out", style)
    convert(tmp_path / "out", tmp_path / "again")  # what was chosen once stays
    check(tmp_path / "again", style)


def test_selected_style_is_used_for_calibration(tiny_llama, tmp_path):
    from gptq_belle.quantization.calibration.rows import Calibration

    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"instruction": "你好" * 9, "output": "好" * 9}) for _ in range(60)))
    hashes = set()
    for style in ("llama", "newline"):
        report = quantize_checkpoint(tiny_llama, tmp_path / style, QuantConfig(), prompt_style=style,
                                     calibration=Calibration(str(data), 8, 64, allow_short=True))
        hashes.add(json.dumps(report.calibration, default=str))
    assert len(hashes) == 2


def test_chat_template_is_used_and_shown(tiny_llama, tmp_path):
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    assert read_prompt_format(path).chat_template is None
    assert ("chat template", "none") in summary_rows(read_prompt_format(path))
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    found = read_prompt_format(path)
    assert (found.style, found.text, found.agrees) == ("template", "你好!", True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"prompt_style": "llama"}))
    found = read_prompt_format(path)
    assert (found.style, found.agrees) == ("llama", False)
    assert "'你好!'" in dict(summary_rows(found)).values()


@pytest.mark.parametrize("template", ["{{ nonsense() }}", "{% if %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
                                      "{{ raise_exception('no') }}"])
def test_unusable_chat_template_is_refused_unless_a_style_is_chosen(tiny_llama, tmp_path, template):
    path = shutil.copytree(tiny_llama, tmp_path / "model")
    (path / "chat_template.jinja").write_text(template)
    for action in (read_prompt_format, lambda path: load(path, device="cpu").generate("a", prompt_style="auto"),
                   lambda path: quantize_checkpoint(path, tmp_path / "out", QuantConfig(method="rtn"))):
        with pytest.raises(InputError):
            action(path)
    assert inspect(path).problems
    assert not (tmp_path / "out").exists()
    assert isinstance(load(path, device="cpu").generate("a", prompt_style="llama", max_new_tokens=1), str)
    quantize_checkpoint(path, tmp_path / "out", QuantConfig(method="rtn"), prompt_style="llama")
    check(tmp_path / "out", "llama")


def test_unknown_style_is_refused(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match=naming("chatml")):
        quantize_checkpoint(tiny_llama, tmp_path / "out", QuantConfig(method="rtn"), prompt_style="chatml")


def test_extended_vocabulary_selects_the_newline_style():
    assert detect_style({"model_type": "llama", "vocab_size": 79458}) == "newline"
    assert detect_style({"model_type": "llama", "vocab_size": 32000}) == "llama"
