"""Perplexity equals a direct computation; every token but the first is scored once with the right context."""

import math
import statistics

import pytest
import torch
from conftest import naming, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_belle.errors import InputError, UsageError
from gptq_belle.evaluation.perplexity import encode, perplexity, read_text, split_windows, summarize_losses
from gptq_belle.prompts.conversation import ChatFormat

TEXT = "The quick brown fox 北京是中国的首都,有三千多年的历史。 jumps over the lazy dog. 一加一等于二。" * 3


@pytest.fixture(scope="module")
def reference(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with torch.inference_mode():
        yield (lambda ids: model(ids, use_cache=False).logits.float()), tokenizer


def direct(logits, ids, length, stride):
    """The loss of every token but the first, by a loop over positions with one forward pass per window."""
    losses, end = [], 0
    while end < len(ids):
        start = max(end, 1)
        end = min(len(ids), length if end == 0 else end + stride)
        begin = max(0, end - length)
        with torch.inference_mode():
            probabilities = logits(ids[None, begin:end])[0].double().softmax(-1)
        losses += [-math.log(probabilities[i - begin - 1, ids[i]]) for i in range(start, end)]
    return losses


@pytest.mark.parametrize(("length", "stride"), [(32, None), (32, 8), (1000, None), (2, 1)])
def test_perplexity_equals_a_direct_computation(reference, length, stride):
    logits, tokenizer = reference
    ids = encode(tokenizer, TEXT)
    losses = direct(logits, ids, length, length - 1 if stride is None else stride)
    found = perplexity(logits, tokenizer, TEXT, length=length, stride=stride)
    assert found.tokens == len(losses) == len(ids) - 1
    mean = sum(losses) / len(losses)
    assert math.log(found.perplexity) == pytest.approx(mean, rel=1e-4)
    scatter = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1) / len(losses))
    assert found.standard_error == pytest.approx(math.exp(mean) * scatter, rel=1e-4)
    rest = TEXT[len(tokenizer.decode(ids[:1])):]
    assert math.log(found.per_byte) == pytest.approx(sum(losses) / len(rest.encode()), rel=1e-4)
    assert math.log(found.per_character) == pytest.approx(sum(losses) / len(rest), rel=1e-4)


def test_standard_error_equals_a_bootstrap():
    losses = torch.rand(600, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) ** 2 * 4
    draws = [summarize_losses(losses[torch.randint(600, (600,))], "text", 1).perplexity for _ in range(1000)]
    # a standard deviation of 1,000 draws is known to 2.2 %
    assert summarize_losses(losses, "text", 1).standard_error == pytest.approx(statistics.stdev(draws), rel=0.09)


@pytest.mark.parametrize(("total", "length", "stride"), [(2, 2, 1), (7, 4, None), (8, 4, 3), (100, 16, 5), (5, 9, 2)])
def test_every_token_but_the_first_is_scored_once(total, length, stride):
    ids = torch.arange(total)
    windows = list(split_windows(ids, length, stride))
    assert [int(i) for window in windows for i in window.ids[-window.scored :]] == list(range(1, total))
    assert all(len(window.ids) <= length and window.scored < len(window.ids) for window in windows)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(reference):
    _, tokenizer = reference
    found = perplexity(lambda ids: torch.zeros(*ids.shape, 384), tokenizer, TEXT, length=16, limit=50)
    assert found.perplexity == pytest.approx(384)
    assert found.standard_error == pytest.approx(0, abs=1e-9)
    assert found.tokens == 49


def test_unusable_windows_and_nan_logits_are_rejected(reference):
    _, tokenizer = reference
    with pytest.raises(UsageError, match=naming("window", 1)):
        list(split_windows(torch.arange(5), 1))
    with pytest.raises(UsageError, match=naming("stride", 8)):
        list(split_windows(torch.arange(5), 8, 8))
    with pytest.raises(InputError, match=naming(1)):
        list(split_windows(torch.arange(1), 8))
    with pytest.raises(InputError, match="NaN"):
        perplexity(lambda ids: torch.full((*ids.shape, 384), math.nan), tokenizer, TEXT)


def test_text_and_chat_files(tmp_path):
    chat = ChatFormat(tiny_tokenizer(), "bloom")
    plain, chats = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("一些文字", encoding="utf-8")
    chats.write_text('{"question": "一加一?", "std_answer": "二"}\n{"text": "rest"}\n', encoding="utf-8")
    assert read_text(plain, chat) == "一些文字"
    assert read_text(chats, chat) == "Human: 一加一?\n\nAssistant:二</s>rest"
    plain.write_bytes(b"\xff\xfe\xfa")
    for path in (plain, tmp_path / "absent"):
        with pytest.raises(InputError, match=naming(path)):
            read_text(path, chat)
