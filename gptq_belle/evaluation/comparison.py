"""Comparison of a model with its quantized variants: size, memory, quality, speed, and an answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptq_belle.bench import footprint
from gptq_belle.bench.footprint import Footprint
from gptq_belle.bench.workload import Workload, run_in_turns, with_prompt_length
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.common.timers import Spread, spread
from gptq_belle.engine.model import Model, load
from gptq_belle.evaluation.belle_set import BelleQuestion, BelleScores, evaluate
from gptq_belle.evaluation.kl_divergence import Divergence, divergence
from gptq_belle.evaluation.perplexity import Perplexity, perplexity, read_text

TOKENS = 8192  # scored tokens of the held-out text
WINDOW = 256  # tokens
MAX_ANSWER = 96  # tokens
BATCH = 128  # questions
SPEED = Workload(prompt=64, tokens=32, repeats=3)


@dataclass(slots=True)
class ComparedModel:
    """Measurements of one variant."""

    name: str
    path: Path
    bytes: int  # size of its weight files
    footprint: Footprint  # load time and memory, measured in a new process
    perplexity: Perplexity  # on the held-out text
    divergence: Divergence | None  # from the first variant; None for the first itself
    scores: BelleScores  # scores of its answers by class
    decode: Spread  # tokens per second in float32
    decode_fast: Spread  # tokens per second with precision "fast"
    answer: str  # answer to the prompt


@dataclass(slots=True)
class Comparison:
    """All variants, the prompt that they answered, and the text of perplexity and divergence."""

    variants: list[ComparedModel]
    prompt: str
    text: Path


def compare(paths: Mapping[str, Path], questions: Sequence[BelleQuestion], text: Path, prompt: str, *,
            device: str = "auto", progress: Callable[[str], None] = lambda text: None) -> Comparison:
    """Measure variants of one model; the first is the reference of the others.

    Args:
        paths: model directories by name.
        text: held-out text or JSONL; the first TOKENS tokens are used.
        prompt: a question for all variants.
    Raises:
        InputError, UsageError, HardwareError: a variant cannot be loaded or run, or the text cannot be read.
    """
    models = {name: load(path, device=device, precision="exact") for name, path in paths.items()}
    base = next(iter(models.values()))
    held_out = read_text(text, base.chat_format())
    progress("decode speed")
    exact = _decode_speeds(list(models.values()))
    fast = _decode_speeds([load(path, device=device, precision="fast") for path in paths.values()])
    variants = []
    for place, (name, model) in enumerate(models.items()):
        progress(f"measuring {name}: held-out text, {len(questions)} questions, memory")
        variants.append(ComparedModel(
            name=name,
            path=paths[name],
            bytes=CheckpointReader(paths[name]).bytes_on_disk(),
            footprint=footprint.measure_in_new_process(paths[name], device=device, precision="exact"),
            perplexity=perplexity(model.logits, base.tokenizer, held_out, length=WINDOW, limit=TOKENS),
            divergence=_divergence(base, model, held_out) if model is not base else None,
            scores=evaluate(model, questions, limit=MAX_ANSWER, batch=BATCH),
            decode=exact[place],
            decode_fast=fast[place],
            answer=model.generate(prompt, prompt_style="auto", max_new_tokens=MAX_ANSWER).strip(),
        ))
    return Comparison(variants, prompt, text)


def _divergence(base: Model, model: Model, held_out: str) -> Divergence:
    return divergence(base.logits, model.logits, base.tokenizer, held_out, length=WINDOW, limit=TOKENS)


def _decode_speeds(models: Sequence[Model]) -> list[Spread]:
    workload = with_prompt_length(SPEED, models)
    return [spread([workload.tokens / one.decode for one in times]) for times in run_in_turns(models, workload)]
