"""What a model answers, and what it thinks of an answer that it is given: prompts in its own style, in batches."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptq_belle.engine.batching import Engine
from gptq_belle.engine.model import Model
from gptq_belle.engine.sampling import SamplingParams
from gptq_belle.errors import UsageError
from gptq_belle.evaluation.perplexity import finite, negative_log_likelihood
from gptq_belle.prompts.stop_strings import StopStrings
from gptq_belle.prompts.styles import Turn, get_style, render_conversation

LOGITS_BYTES = 1 << 28  # of one forward pass over given answers; with BLOOM's vocabulary one row of 256 tokens
Progress = Callable[[int, int], None]


class Answer(NamedTuple):
    """A greedy answer: as it is shown, and its tokens up to and with eos, or up to the limit."""

    text: str
    ids: list[int]


class Given(NamedTuple):
    """What a model thinks of an answer of L tokens that it is given."""

    loss: Tensor  # (L,) float64, -ln p of each token behind those before it
    same_top: Tensor  # (L,) bool, whether the token is the model's likeliest


def ask(model: Model, questions: Sequence[str], limit: int, batch: int, style: str = "auto",
        progress: Progress | None = None) -> list[Answer]:
    """The greedy answers to questions, in their order; arguments as for `belle.evaluate`."""
    prompts, stops, limited = prompt_ids(model, questions, style), _frame(model, style).stops, SamplingParams(limit)
    if not prompts:
        return []
    width = max(map(len, prompts))
    if model.context is not None and width + limit > model.context:
        raise UsageError(f"a question of {width} tokens and an answer of {limit} exceed the context {model.context}",
                         "Lower --max-tokens, or leave the longest questions out.")
    engine = Engine(model, min(batch, len(prompts)), width + limit)
    requests = [engine.submit(ids, limited) for ids in prompts]
    while not engine.idle:
        if any(event.finished for event in engine.step()) and progress:
            progress(sum(request.finished is not None for request in requests), len(requests))
    rows = [request.answer + ([] if request.end is None else [request.end]) for request in requests]
    texts = (str(model.tokenizer.decode(row, skip_special_tokens=True)) for row in rows)
    return [Answer(_shown(text, stops), row) for text, row in zip(texts, rows, strict=True)]


def prompt_ids(model: Model, questions: Sequence[str], style: str = "auto") -> list[list[int]]:
    """Token ids of questions in the model's prompt."""
    name, tokenizer = model.prompt_style if style == "auto" else style, model.tokenizer
    texts = [render_conversation([Turn(question)], name, tokenizer.eos_token) for question in questions]
    return [tokenizer(text, add_special_tokens=get_style(name).special_tokens)["input_ids"] for text in texts]


def reference_ids(model: Model, answers: Sequence[str], style: str = "auto") -> list[list[int]]:
    """Token ids of answers as they stand behind a prompt, eos included."""
    tokenizer = model.tokenizer
    ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers)
    return [[*row, tokenizer.eos_token_id] for row in ids]


def given_answers(model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
                  progress: Progress | None = None) -> list[Given]:
    """Let a model read prompts with answers behind them; tokens beyond its context are left out.

    Args:
        model: of `gptq_belle.load`.
        prompts, answers: token ids, a row each; an empty answer is not read.
    """
    rows = [list(prompt) + list(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    rows = [row[: model.context] for row in rows]
    order = sorted((i for i in range(len(rows)) if answers[i]), key=lambda i: len(rows[i]))
    nothing = Given(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool))
    found, done = {}, 0
    while done < len(order):
        # the longest of a batch comes last, but rows in order differ little
        width = len(rows[order[min(done + 64, len(order)) - 1]])
        members = order[done : done + max(1, min(64, LOGITS_BYTES // (4 * width * model.vocabulary_size)))]
        logits = finite(model.logits(_padded([rows[i] for i in members])))
        for index, row in zip(members, logits, strict=True):
            start, ids = len(prompts[index]), torch.tensor(rows[index], device=row.device)
            found[index] = _given(row[start - 1 : len(ids) - 1], ids[start:])
        done += len(members)
        if progress:
            progress(done, len(order))
    return [found.get(index, nothing) for index in range(len(rows))]


def _given(logits: Tensor, targets: Tensor) -> Given:
    return Given(negative_log_likelihood(logits, targets).cpu(), (logits.argmax(1) == targets).cpu())


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows filled up to the right with token 0, which a causal model's earlier positions do not see."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _frame(model: Model, style: str) -> Any:
    return get_style(model.prompt_style if style == "auto" else style)


def _shown(text: str, stops: Sequence[str]) -> str:
    stream = StopStrings(stops)
    return (stream.feed(text) + stream.finish()).strip()
