"""Batched greedy answers of a model to questions in its prompt style, and its likelihood of given answers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptq_belle.engine.batching import Engine
from gptq_belle.engine.model import Model
from gptq_belle.engine.sampling_params import SamplingParams
from gptq_belle.errors import UsageError
from gptq_belle.evaluation.perplexity import Progress, check_finite, negative_log_likelihood
from gptq_belle.prompts.stop_strings import StopStrings

LOGITS_BYTES = 1 << 28  # of one forward pass over given answers; with BLOOM's vocabulary one row of 256 tokens
MAX_ROWS = 64  # given answers per forward pass


class GreedyAnswer(NamedTuple):
    """The text of a greedy answer, and its token ids up to the limit or including eos."""

    text: str
    ids: list[int]


class AnswerLikelihood(NamedTuple):
    """A model's predictions for the L tokens of a given answer (teacher forcing)."""

    loss: Tensor  # (L,) float64, -ln p of each token after the tokens before it
    same_top: Tensor  # (L,) bool, whether the token is the model's most likely one


def answer_questions(model: Model, questions: Sequence[str], limit: int, batch: int, style: str = "auto",
                     progress: Progress = lambda done, total: None) -> list[GreedyAnswer]:
    """The greedy answers to questions, in their order; arguments as for `belle_set.evaluate`. Raises InputError if
    logits are not finite."""
    prompts, params = prompt_ids(model, questions, style), SamplingParams(limit)
    stops = model.chat_format(style).stops
    if not prompts:
        return []
    width = max(map(len, prompts))
    if model.context is not None and width + limit > model.context:
        raise UsageError(f"a question of {width} tokens and an answer of {limit} exceed the context {model.context}",
                         "Lower --max-tokens, or remove the longest questions.")
    engine = Engine(model, min(batch, len(prompts)), width + limit)
    requests = [engine.submit(ids, params) for ids in prompts]
    while not engine.idle:
        events = engine.step()
        if error := next((event.error for event in events if event.error is not None), None):
            raise error
        if any(event.finished for event in events):
            progress(sum(request.finished is not None for request in requests), len(requests))
    rows = [request.answer + ([] if request.end is None else [request.end]) for request in requests]
    texts = (str(model.tokenizer.decode(row, skip_special_tokens=True)) for row in rows)
    return [GreedyAnswer(_cut_at_stops(text, stops), row) for text, row in zip(texts, rows, strict=True)]


def prompt_ids(model: Model, questions: Sequence[str], style: str = "auto") -> list[list[int]]:
    """Token ids of questions in the model's prompt style."""
    chat = model.chat_format(style)
    return [chat.question(question).ids for question in questions]


def reference_ids(model: Model, answers: Sequence[str]) -> list[list[int]]:
    """Token ids of answers as they follow a prompt, eos included."""
    tokenizer = model.tokenizer
    ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers)
    return [[*row, tokenizer.eos_token_id] for row in ids]


def answer_likelihoods(model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
                       progress: Progress = lambda done, total: None) -> list[AnswerLikelihood]:
    """Run a model on prompts followed by given answers; tokens beyond its context are ignored.

    Args:
        prompts, answers: token ids, one row each; an empty answer is not run.
        progress: called with (answers done, number of answers).
    """
    rows = [list(prompt) + list(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    rows = [row[: model.context] for row in rows]
    order = sorted((i for i in range(len(rows)) if answers[i]), key=lambda i: len(rows[i]))
    nothing = AnswerLikelihood(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool))
    found, done = {}, 0
    while done < len(order):
        width = len(rows[order[min(done + MAX_ROWS, len(order)) - 1]])  # of the longest row: `order` is by length
        members = order[done : done + max(1, min(MAX_ROWS, LOGITS_BYTES // (4 * width * model.vocabulary_size)))]
        logits = check_finite(model.logits(_padded([rows[i] for i in members])))
        for index, row in zip(members, logits, strict=True):
            start, ids = len(prompts[index]), torch.tensor(rows[index], device=row.device)
            found[index] = _likelihood(row[start - 1 : len(ids) - 1], ids[start:])
        done += len(members)
        progress(done, len(order))
    return [found.get(index, nothing) for index in range(len(rows))]


def _likelihood(logits: Tensor, targets: Tensor) -> AnswerLikelihood:
    return AnswerLikelihood(negative_log_likelihood(logits, targets).cpu(), (logits.argmax(1) == targets).cpu())


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows padded on the right with token 0, which a causal model's earlier positions do not see."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _cut_at_stops(text: str, stops: Sequence[str]) -> str:
    stream = StopStrings(stops)
    return (stream.feed(text) + stream.finish()).strip()
