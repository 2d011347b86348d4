"""Variants of one model side by side: size, memory, quality, speed, and what each answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptq_belle.bench import footprint
from gptq_belle.bench.footprint import Footprint
from gptq_belle.bench.throughput import Workload, fitted, interleaved
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.common.timers import Spread, spread
from gptq_belle.engine.model import Model, load
from gptq_belle.evaluation.belle_set import BelleScores, Row, evaluate
from gptq_belle.evaluation.kl_divergence import Divergence, divergence
from gptq_belle.evaluation.perplexity import Perplexity, perplexity, read_text

TOKENS = 8192  # of held-out text that are scored
WINDOW = 256
ANSWER = 96  # tokens, at most
BATCH = 128
SPEED = Workload(prompt=64, tokens=32, repeats=3)


@dataclass(slots=True)
class Variant:
    """What was measured of one variant.

    Attributes:
        name, path: of the variant.
        bytes: of its weight files.
        footprint: load time and memory in a process of its own.
        perplexity: on the held-out text.
        divergence: from the first variant; None for that one.
        scores: of its answers by class.
        decode: tokens per second in float32.
        decode_fast: tokens per second with precision "fast".
        answer: to the prompt.
    """

    name: str
    path: Path
    bytes: int
    footprint: Footprint
    perplexity: Perplexity
    divergence: Divergence | None
    scores: BelleScores
    decode: Spread
    decode_fast: Spread
    answer: str


@dataclass(slots=True)
class Comparison:
    """Variants of one model, the prompt that all answered, and the text they were scored on."""

    variants: list[Variant]
    prompt: str
    text: Path


def compare(paths: Mapping[str, Path], rows: Sequence[Row], text: Path, prompt: str, *,
            device: str = "auto", progress: Callable[[str], None] = lambda text: None) -> Comparison:
    """Measure variants of one model; the first is what the others are held against.

    Args:
        paths: model directories by name.
        rows: test questions.
        text: held-out text or JSONL, of which the first TOKENS tokens are used.
        prompt: a question that all answer.
        device: where they run.
        progress: called with the name of each step as it starts.
    Raises:
        InputError, UsageError, HardwareError: a variant cannot be loaded or run; the text cannot be read.
    """
    models = {name: load(path, device=device, precision="exact") for name, path in paths.items()}
    base = next(iter(models.values()))
    words = read_text(text, base.prompt_style, base.tokenizer.eos_token)
    progress("decode speed")
    exact = _decode(list(models.values()))
    fast = _decode([load(path, device=device, precision="fast") for path in paths.values()])
    variants = []
    for place, (name, model) in enumerate(models.items()):
        progress(f"measuring {name}: held-out text, {len(rows)} questions, memory")
        variants.append(Variant(
            name=name,
            path=paths[name],
            bytes=CheckpointReader(paths[name]).bytes_on_disk(),
            footprint=footprint.fresh(paths[name], device=device, precision="exact"),
            perplexity=perplexity(model.logits, base.tokenizer, words, length=WINDOW, limit=TOKENS),
            divergence=_divergence(base, model, words) if model is not base else None,
            scores=evaluate(model, rows, limit=ANSWER, batch=BATCH),
            decode=exact[place],
            decode_fast=fast[place],
            answer=model.generate(prompt, prompt_style="auto", max_new_tokens=ANSWER).strip(),
        ))
    return Comparison(variants, prompt, text)


def _divergence(base: Model, model: Model, words: str) -> Divergence:
    return divergence(base.logits, model.logits, base.tokenizer, words, length=WINDOW, limit=TOKENS)


def _decode(models: Sequence[Model]) -> list[Spread]:
    workload = fitted(SPEED, models)
    return [spread([workload.tokens / one.decode for one in times]) for times in interleaved(models, workload)]
