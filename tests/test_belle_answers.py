"""Greedy answers in batches equal single answers; likelihoods of given answers equal the loss of transformers."""

import pytest
import torch
from conftest import naming
from transformers import AutoModelForCausalLM

from gptq_belle import load
from gptq_belle.errors import UsageError
from gptq_belle.evaluation import belle_answers
from gptq_belle.evaluation.belle_answers import answer_likelihoods, answer_questions, prompt_ids, reference_ids

QUESTIONS = ["一加一等于几?", "What is the capital of France?", "写一首关于春天的诗。", "a", "北京" * 8]


@pytest.fixture(scope="module", params=["bloom", "llama"])
def model(request):
    return load(request.getfixturevalue(f"tiny_{request.param}"), device="cpu", dtype=torch.float32)


def test_batched_answers_equal_single_answers(model):
    together = answer_questions(model, QUESTIONS, 12, 8)
    for index, question in enumerate(QUESTIONS):
        alone = model.generate(question, prompt_style="auto", max_new_tokens=12)
        assert together[index].text == alone.strip()


def test_answers_are_in_the_order_of_the_questions(model):
    found = answer_questions(model, QUESTIONS, 6, 2)
    assert [one.text for one in found] == [answer_questions(model, [question], 6, 1)[0].text for question in QUESTIONS]
    assert all(1 <= len(one.ids) <= 6 for one in found)


def test_an_answer_ends_with_eos(model, monkeypatch):
    alone = answer_questions(model, QUESTIONS[:1], 8, 1)[0]
    eos = alone.ids[4]
    monkeypatch.setattr(model, "eos_ids", frozenset({eos}))
    found = answer_questions(model, QUESTIONS, 8, 8)
    assert found[0].ids == alone.ids[: alone.ids.index(eos) + 1]
    assert all(eos not in one.ids[:-1] for one in found)


def test_a_question_beyond_the_context_is_refused(model):
    with pytest.raises(UsageError, match=naming(256)):
        answer_questions(model, ["字" * 300], 8, 1)


def test_loss_of_given_answers_equals_transformers(model, monkeypatch):
    """Rows of different lengths share batches; each is compared with a separate forward pass with labels."""
    monkeypatch.setattr(belle_answers, "LOGITS_BYTES", 4 * 384 * 60 * 2)
    texts = ["巴黎", "Paris is the capital of France.", "", "春风" * 5, "b"]
    prompts, references = prompt_ids(model, QUESTIONS), reference_ids(model, texts)
    references[2] = []
    found = answer_likelihoods(model, prompts, references)
    hf = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    for prompt, answer, one in zip(prompts, references, found, strict=True):
        assert len(one.loss) == len(one.same_top) == len(answer)
        if not answer:
            continue
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.inference_mode():
            output = hf(ids, labels=labels)
        assert float(one.loss.mean()) == pytest.approx(float(output.loss), rel=1e-4)
        most_likely = output.logits[0, len(prompt) - 1 : -1].argmax(1)
        assert torch.equal(one.same_top, most_likely == torch.tensor(answer))


def test_given_answers_beyond_the_context_are_truncated(model):
    prompt = prompt_ids(model, ["a"])[0]
    (found,) = answer_likelihoods(model, [prompt], [[7] * 400])
    assert len(found.loss) == model.context - len(prompt)
