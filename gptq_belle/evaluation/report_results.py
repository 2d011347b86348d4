"""The evaluations of a report; results that are stored in its folder and still valid are not computed again."""

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from gptq_belle.bench import footprint
from gptq_belle.common.files import write_json_atomically
from gptq_belle.engine.model import Model
from gptq_belle.evaluation.base_predictions import (
    BasePredictions,
    ModelLoader,
    ProgressBar,
    checkpoint_identity,
    open_predictions,
    read_text_for,
    windows_for,
)
from gptq_belle.evaluation.belle_answers import GreedyAnswer, answer_questions
from gptq_belle.evaluation.belle_set import BelleQuestion, read_questions, score_answers
from gptq_belle.evaluation.kl_divergence import compare_with_predictions
from gptq_belle.evaluation.kl_statistics import summarize_divergence
from gptq_belle.evaluation.perplexity import perplexity, summarize_losses
from gptq_belle.prompts.styles import Turn
from gptq_belle.quantization.calibration.overlap import refuse_overlap

FILE = "evaluations.json"
FORMAT = 1  # of the file; a file of another format is ignored
KL_EDGES = numpy.array([0.0, *numpy.logspace(-9, 2, 56)])  # of the histogram: five bins per decade, one for the rest


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """Data and settings of the evaluations.

    Attributes:
        text: text for perplexity and KL divergence; None skips them.
        test: test questions; None skips them.
        window, limit: as of `eval kl`.
        per_class, max_tokens, batch: as of `eval belle`.
        device, precision: as of `gptq_belle.load`.
        allow_overlap: accept text that a model was calibrated on.
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
class ModelResults:
    """Results of one model as plain values for JSON; None if not evaluated.

    Attributes:
        text: `perplexity`; with a base also `divergence` and `histogram`, the counts of KL between KL_EDGES.
        test: fields of `BelleScores`, and `ids`, the token ids of the answers.
        footprint: fields of `Footprint`.
    """

    text: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    footprint: dict[str, Any] | None = None


@dataclass(slots=True)
class ResultCache:
    """Results in FILE of a folder.

    Attributes:
        entries: by evaluation and model, the result ("found") and what it depends on ("follows_from").
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
        """The result of an evaluation of a model, if it is still valid."""
        entry = self.entries.get(f"{kind} {path.resolve()}", {})
        return entry.get("found") if entry.get("follows_from") == follows_from else None

    def put(self, kind: str, path: Path, follows_from: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Store a result on disk, and return it."""
        self.entries[f"{kind} {path.resolve()}"] = {"follows_from": follows_from, "found": found}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(self.folder / FILE, {"format": FORMAT, "entries": self.entries})
        return found


class ReportEvaluator:
    """Evaluates the models of a report.

    Args:
        base: the full-precision model; without it there is neither KL divergence nor agreement.
        folder: the folder that stores the results.
    """

    def __init__(self, options: EvaluationOptions, base: Path | None, load: ModelLoader, progress_bar: ProgressBar,
                 folder: Path) -> None:
        self.options, self.base, self.load, self.progress_bar = options, base, load, progress_bar
        self.cache = ResultCache(folder)

    def run(self, paths: Sequence[Path]) -> dict[Path, ModelResults]:
        """Results of the base, if there is one, and of all quantized models in `paths`.

        Raises:
            InputError: text or model cannot be read, or text that a model was calibrated on.
            UsageError, HardwareError: as `eval kl` and `eval belle`.
        """
        models = [*([self.base] if self.base else []), *paths]
        results = {path: ModelResults() for path in models}
        if self.options.text:
            self._evaluate_text(self.options.text, paths, results)
        if self.options.test:
            self._evaluate_test(self.options.test, models, results)
        for path in models if self.options.text or self.options.test else ():
            follows_from = {"model": checkpoint_identity(path), **self._loading()}
            results[path].footprint = self.cache.get("footprint", path, follows_from) or self.cache.put(
                "footprint", path, follows_from, asdict(footprint.measure_in_new_process(path, **self._loading())))
        return results

    def _loading(self) -> dict[str, Any]:
        return {"device": self.options.device, "precision": self.options.precision}

    def _evaluate_text(self, text: Path, paths: Sequence[Path], results: dict[Path, ModelResults]) -> None:
        """Perplexity, and KL divergence from the base, which reads the text only once."""
        options, base = self.options, self.base
        shared = {"text": _digest(text), "window": options.window, "limit": options.limit, **self._loading(),
                  "base": checkpoint_identity(base) if base else None}
        with ExitStack() as stack:
            predictions: BasePredictions | None = None
            for path in paths:
                tokenizer, words = read_text_for(path, text, allow_overlap=options.allow_overlap)
                follows_from = shared | {"model": checkpoint_identity(path)}
                found = self.cache.get("text", path, follows_from)
                if found is None and base:
                    windows = windows_for(base, tokenizer, words, options.window, None, options.limit)
                    predictions = predictions or stack.enter_context(
                        open_predictions(base, windows, self.load, self.progress_bar))
                    found = self.cache.put("text", path, follows_from, self._compare(path, predictions, tokenizer))
                elif found is None:
                    found = self.cache.put("text", path, follows_from, self._perplexity(path, words))
                results[path].text = found
                if base:
                    results[base].text = {"perplexity": found["base_perplexity"]}

    def _compare(self, path: Path, predictions: BasePredictions, tokenizer: Any) -> dict[str, Any]:
        """KL divergence of a model from its base, and the perplexity of both."""
        model, windows = self.load(path), predictions.windows
        with self.progress_bar(f"windows of {path.name}") as progress:
            tokens = compare_with_predictions(predictions, model.logits, progress)
        _free(model)
        ids = torch.cat([window.ids[-window.scored :] for window in windows])
        scored = str(tokenizer.decode(ids, skip_special_tokens=True))
        return {"perplexity": asdict(summarize_losses(tokens.loss, scored, len(windows))),
                "base_perplexity": asdict(summarize_losses(tokens.base_loss, scored, len(windows))),
                "divergence": asdict(summarize_divergence(tokens, len(windows))), "histogram": histogram(tokens.kl)}

    def _perplexity(self, path: Path, text: str) -> dict[str, Any]:
        model = self.load(path)
        with self.progress_bar(f"windows of {path.name}") as progress:
            found = perplexity(model.logits, model.tokenizer, text, length=self.options.window,
                               limit=self.options.limit, progress=progress)
        _free(model)
        return {"perplexity": asdict(found)}

    def _evaluate_test(self, test: Path, models: Sequence[Path], results: dict[Path, ModelResults]) -> None:
        """Answers by class; the base is first, because the others are compared with its answers."""
        options, base = self.options, self.base
        questions = read_questions(test, options.per_class)
        if not options.allow_overlap:
            refuse_overlap(models, test, [[Turn(row.question, row.std_answer)] for row in questions])
        shared = {"test": _digest(test), "per_class": options.per_class, "max_tokens": options.max_tokens,
                  **self._loading(), "base": checkpoint_identity(base) if base else None}
        for path in models:
            follows_from = shared | {"model": checkpoint_identity(path)}
            found = self.cache.get("test", path, follows_from)
            if found is None:
                reference = results[base].test if base and path != base else None
                found = self.cache.put("test", path, follows_from, self._answer(path, questions, reference))
            results[path].test = found

    def _answer(self, path: Path, questions: Sequence[BelleQuestion],
                reference: dict[str, Any] | None) -> dict[str, Any]:
        """Answers and scores of one model; `reference` is the base's result."""
        model, options = self.load(path), self.options
        with self.progress_bar(f"answers of {path.name}") as progress:
            answers = answer_questions(model, [row.question for row in questions], options.max_tokens, options.batch,
                                       progress=progress)
        base = [GreedyAnswer("", ids) for ids in reference["ids"]] if reference else None
        found = asdict(score_answers(model, questions, answers, base=base))
        _free(model)
        found["classes"] = {name: score._asdict() for name, score in found["classes"].items()}
        return found | {"ids": [answer.ids for answer in answers]}


def histogram(kl: Tensor) -> list[int]:
    """Counts of KL between KL_EDGES; larger values count in the last bin."""
    counts, _ = numpy.histogram(kl.numpy().clip(max=KL_EDGES[-1]), KL_EDGES)
    return [int(count) for count in counts]


def _free(model: Model) -> None:
    """Free the weights of a model before the next one is loaded."""
    del model.decoder
    gc.collect()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
