"""The evaluations behind a report: each is run once and kept beside it, until models, text or settings change."""

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from gptq_belle.bench import footprint
from gptq_belle.common.files import write_json_atomically
from gptq_belle.engine.model import Model
from gptq_belle.evaluation import base_predictions, perplexity
from gptq_belle.evaluation.base_predictions import Predictions, identity
from gptq_belle.evaluation.belle_answers import Answer, ask
from gptq_belle.evaluation.belle_set import Row, read_rows, score
from gptq_belle.evaluation.calibration_overlap import refuse_overlap
from gptq_belle.evaluation.kl_divergence import token_figures
from gptq_belle.evaluation.kl_statistics import summarize
from gptq_belle.prompts.styles import Turn

FILE = "evaluations.json"
FORMAT = 1  # of what is kept; another one is not read
EDGES = numpy.array([0.0, *numpy.logspace(-9, 2, 56)])  # of the histogram of KL: five bins a decade, one below them


@dataclass(frozen=True, slots=True)
class Options:
    """What to evaluate on, and how.

    Attributes:
        text, test: for perplexity and KL, and for answers by class; None leaves that out.
        window, limit: as of `eval kl`.
        per_class, max_tokens, batch: as of `eval belle`.
        device, precision: where and how the models run.
        allow_overlap: take text that was calibrated on.
    """

    text: Path | None = None
    test: Path | None = None
    window: int = 512
    limit: int | None = None
    per_class: int | None = None
    max_tokens: int = 160
    batch: int = 32
    device: str = "auto"
    precision: str | None = None
    allow_overlap: bool = False


@dataclass(slots=True)
class Results:
    """What was found of one model, in the plain values that the file keeps; None where it was not looked for.

    Attributes:
        text: `perplexity`; against a base also `divergence` and `histogram`, counts of KL between EDGES.
        test: fields of `belle.BelleScores`, and `ids`, the answers' tokens.
        footprint: fields of `footprint.Footprint`.
    """

    text: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    footprint: dict[str, Any] | None = None


class Tools(NamedTuple):
    """How models are loaded and progress is shown."""

    load: base_predictions.Loader
    counting: base_predictions.Counting


@dataclass(slots=True)
class Kept:
    """Earlier results in a folder.

    Attributes:
        folder: the report's.
        entries: by kind and model, what was found and what it follows from.
    """

    folder: Path
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            found = json.loads((self.folder / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("entries"), dict):
            self.entries = found["entries"]

    def get(self, kind: str, path: Path, follows_from: Mapping[str, Any]) -> dict[str, Any] | None:
        """An earlier result, if it still holds."""
        entry = self.entries.get(f"{kind} {path.resolve()}", {})
        return entry.get("found") if entry.get("follows_from") == follows_from else None

    def put(self, kind: str, path: Path, follows_from: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Keep a result, on the disk at once."""
        self.entries[f"{kind} {path.resolve()}"] = {"follows_from": follows_from, "found": found}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(self.folder / FILE, {"format": FORMAT, "entries": self.entries})
        return found


def evaluate(paths: Sequence[Path], base: Path | None, options: Options, tools: Tools,
             folder: Path) -> dict[Path, Results]:
    """Results of every model, the base's first where there is one.

    Args:
        paths: quantized models.
        base: what they were made from; without it there are neither KL nor agreement.
        options, tools: see there.
        folder: where results are kept.
    Raises:
        InputError: text or model that cannot be read; text that was calibrated on.
        UsageError, HardwareError: as `eval kl` and `eval belle`.
    """
    models = [*([base] if base else []), *paths]
    results = {path: Results() for path in models}
    kept = Kept(folder)
    if options.text:
        _on_text(results, paths, base, options, tools, kept)
    if options.test:
        _on_test(results, models, base, options, tools, kept)
    for path in models if options.text or options.test else ():
        follows_from = {"model": identity(path), "device": options.device, "precision": options.precision}
        results[path].footprint = kept.get("footprint", path, follows_from) or kept.put(
            "footprint", path, follows_from, asdict(footprint.fresh(path, device=options.device,
                                                               precision=options.precision)))
    return results


def _on_text(results: dict[Path, Results], paths: Sequence[Path], base: Path | None, options: Options, tools: Tools,
             kept: Kept) -> None:
    """Perplexity, and KL to the base, of which only one pass over the text is made."""
    assert options.text
    about = {"text": _digest(options.text), "window": options.window, "limit": options.limit,
             "device": options.device, "precision": options.precision, "base": identity(base) if base else None}
    with ExitStack() as stack:
        predictions: Predictions | None = None
        for path in paths:
            tokenizer, words = base_predictions.text_for(path, options.text, allow_overlap=options.allow_overlap)
            follows_from = about | {"model": identity(path)}
            found = kept.get("text", path, follows_from)
            if found is None and base:
                cut = base_predictions.cut(base, tokenizer, words, options.window, None, options.limit)
                predictions = predictions or stack.enter_context(base_predictions.base_predictions(
                    base, cut, tools.load, tools.counting))
                found = kept.put("text", path, follows_from, _compared(path, predictions, tokenizer, tools))
            elif found is None:
                found = kept.put("text", path, follows_from, _alone(path, words, options, tools))
            results[path].text = found
            if base:
                results[base].text = {"perplexity": found["base_perplexity"]}


def _compared(path: Path, predictions: Predictions, tokenizer: Any, tools: Tools) -> dict[str, Any]:
    model, windows = tools.load(path), predictions.windows
    with tools.counting(f"windows of {path.name}") as progress:
        tokens = token_figures(predictions, model.logits, progress)
    _forget(model)
    ids = torch.cat([window.ids[-window.scored :] for window in windows])
    scored = str(tokenizer.decode(ids, skip_special_tokens=True))
    return {"perplexity": asdict(perplexity.summarize(tokens.loss, scored, len(windows))),
            "base_perplexity": asdict(perplexity.summarize(tokens.base_loss, scored, len(windows))),
            "divergence": asdict(summarize(tokens, len(windows))), "histogram": histogram(tokens.kl)}


def histogram(kl: Tensor) -> list[int]:
    """Counts of KL between EDGES; what lies above is counted in the last."""
    counts, _ = numpy.histogram(kl.numpy().clip(max=EDGES[-1]), EDGES)
    return [int(count) for count in counts]


def _alone(path: Path, words: str, options: Options, tools: Tools) -> dict[str, Any]:
    model = tools.load(path)
    with tools.counting(f"windows of {path.name}") as progress:
        found = perplexity.perplexity(model.logits, model.tokenizer, words, length=options.window,
                                      limit=options.limit, progress=progress)
    _forget(model)
    return {"perplexity": asdict(found)}


def _on_test(results: dict[Path, Results], models: Sequence[Path], base: Path | None, options: Options, tools: Tools,
             kept: Kept) -> None:
    """Answers by class; the base comes first, since the others are held against its answers."""
    assert options.test
    rows = read_rows(options.test, options.per_class)
    if not options.allow_overlap:
        refuse_overlap(models, options.test, [[Turn(row.question, row.std_answer)] for row in rows])
    about = {"test": _digest(options.test), "per_class": options.per_class, "max_tokens": options.max_tokens,
             "device": options.device, "precision": options.precision, "base": identity(base) if base else None}
    for path in models:
        follows_from = about | {"model": identity(path)}
        found = kept.get("test", path, follows_from)
        if found is None:
            reference = results[base].test if base and path != base else None
            found = kept.put("test", path, follows_from, _asked(path, rows, reference, options, tools))
        results[path].test = found


def _asked(path: Path, rows: Sequence[Row], reference: dict[str, Any] | None, options: Options,
           tools: Tools) -> dict[str, Any]:
    model = tools.load(path)
    with tools.counting(f"answers of {path.name}") as progress:
        answers = ask(model, [row.question for row in rows], options.max_tokens, options.batch, progress=progress)
    base = [Answer("", ids) for ids in reference["ids"]] if reference else None
    found = asdict(score(model, rows, answers, base=base))
    _forget(model)
    found["classes"] = {name: one._asdict() for name, one in found["classes"].items()}
    return found | {"ids": [answer.ids for answer in answers]}


def _forget(model: Model) -> None:
    """Free a model before the next is loaded; nothing else holds its weights."""
    del model.decoder
    gc.collect()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
