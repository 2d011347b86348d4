"""The commands `eval ppl`, `eval kl` and `eval belle`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_belle.cli import console, options
from gptq_belle.errors import UsageError

if TYPE_CHECKING:
    from gptq_belle.evaluation.belle_answers import GreedyAnswer
    from gptq_belle.evaluation.belle_set import BelleQuestion
    from gptq_belle.evaluation.quality_gates import QualityGate

app = typer.Typer(no_args_is_help=True)
Text = Annotated[Path, typer.Option(help="UTF-8 text, or JSONL rows in any form that calibration accepts.")]
Stride = Annotated[int | None, typer.Option(help="Scored tokens per window. Default: all of them.", min=1,
                                            show_default=False)]
Gate = Annotated[list[str] | None, typer.Option(
    "--gate", help="Exit with code 5 if it is missed: a metric of --json, then <, <=, > or >=, then a number. "
    "Repeatable.")]


@app.command()
def ppl(
    path: options.ModelPath,
    text: Text,
    window: options.WindowTokens = 512,
    stride: Stride = None,
    limit: options.TextLimit = None,
    gate: Gate = None,
    allow_overlap: options.AllowOverlap = False,
    precision: options.Precision = None,
    head_bits: options.HeadBits = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Perplexity on a text: per token, UTF-8 byte and character. Gates: ppl, per_byte ..., as in --gate 'ppl<12'."""
    options.check_engine_options(device, precision, head_bits)
    from gptq_belle.evaluation import perplexity
    from gptq_belle.evaluation import quality_gates as gates
    from gptq_belle.evaluation.base_predictions import read_text_for

    wanted = gates.parse_gates(gate, gates.metric_names(perplexity.Perplexity))
    perplexity.check_windows(window, stride)
    path = options.local(path)
    _, words = read_text_for(path, text, allow_overlap=allow_overlap)
    model = options.load_model(path, device, precision, head_bits)
    with console.progress_bar("windows") as progress:
        found = perplexity.perplexity(model.logits, model.tokenizer, words, length=window, stride=stride, limit=limit,
                                      progress=progress)
    console.print_result(found, as_json, "", ["", ""], perplexity.format_perplexity(found))
    _check_gates(wanted, gates.metric_values(found))


@app.command()
def kl(
    path: options.ModelPath,
    base: Annotated[Path, typer.Option(help="The full-precision model that PATH was quantized from.")],
    text: Text,
    window: options.WindowTokens = 512,
    stride: Stride = None,
    limit: options.TextLimit = None,
    keep: Annotated[Path | None, typer.Option(
        help="Folder that keeps the predictions of the base for later runs; reused if they fit. Its size is 4 "
        "bytes per token and vocabulary entry.", show_default=False)] = None,
    gate: Gate = None,
    allow_overlap: options.AllowOverlap = False,
    precision: options.Precision = None,
    head_bits: options.HeadBits = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """KL divergence from a base model; only one of the two is in memory at a time.

    Gates: kl, kl_max, same_top, ppl, kl_99% ..., as in --gate 'kl<0.05'.
    """
    options.check_engine_options(device, precision, head_bits)
    from gptq_belle.evaluation import base_predictions, kl_statistics
    from gptq_belle.evaluation import quality_gates as gates
    from gptq_belle.evaluation.kl_divergence import compare_with_predictions
    from gptq_belle.evaluation.perplexity import check_windows

    wanted = gates.parse_gates(gate, gates.metric_names(kl_statistics.Divergence))
    check_windows(window, stride)
    path, base = options.local(path), options.local(base)
    tokenizer, words = base_predictions.read_text_for(path, text, allow_overlap=allow_overlap)
    split = base_predictions.windows_for(base, tokenizer, words, window, stride, limit)
    with base_predictions.open_predictions(base, split, lambda place: options.load_model(place, device, precision),
                                           console.progress_bar, keep=keep, device=device,
                                           precision=precision) as predictions:
        model = options.load_model(path, device, precision, head_bits)
        with console.progress_bar("windows") as progress:
            tokens = compare_with_predictions(predictions, model.logits, progress)
    found = kl_statistics.summarize_divergence(tokens, len(split))
    console.print_result(found, as_json, "", ["", ""], kl_statistics.format_divergence(found))
    _check_gates(wanted, gates.metric_values(found))


@app.command()
def belle(
    path: options.ModelPath,
    test: Annotated[Path, typer.Option(help=options.TEST_HELP)],
    base: Annotated[Path | None, typer.Option(
        show_default=False,
        help="The full-precision model that PATH was quantized from: measure agreement with its greedy answers.",
        )] = None,
    per_class: options.PerClass = None,
    prompt_style: options.ChatStyle = "auto",
    max_tokens: options.AnswerTokens = 160,
    batch: options.QuestionBatch = 32,
    judge: Annotated[Path | None, typer.Option(
        help="File to write: one request per question for a judging model, as BELLE sends them to ChatGPT.",
        show_default=False)] = None,
    judge_prompts: Annotated[Path | None, typer.Option(
        help="BELLE's eval_prompt.json, for --judge.", show_default=False)] = None,
    gate: Gate = None,
    allow_overlap: options.AllowOverlap = False,
    precision: options.Precision = None,
    head_bits: options.HeadBits = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Answers to test questions, scored by class.

    Gates: exact, f1, rouge_l, nll, agreement, identical, of all questions or of one class, as in --gate 'exact>85' or
    --gate 'f1.math>50'.
    """
    options.check_engine_options(device, precision, head_bits)
    from gptq_belle.evaluation import belle_set as test_set
    from gptq_belle.evaluation import judge_requests as judging
    from gptq_belle.evaluation import quality_gates as gates

    if (judge is None) != (judge_prompts is None):
        raise UsageError("--judge and --judge-prompts belong together",
                         "Give eval/eval_prompt.json of the BELLE project as --judge-prompts.")
    rows = test_set.read_questions(test, per_class)
    wanted = gates.parse_gates(gate, gates.belle_metric_names(row.cls for row in rows))
    instructions = judging.read_instructions(judge_prompts) if judge_prompts else {}
    path, base = options.local(path), options.optional_local(base)
    if not allow_overlap:
        _refuse_overlap(path, test, rows)
    asked = _ask_base(base, rows, max_tokens, batch, prompt_style, precision, device) if base else None
    model = options.load_model(path, device, precision, head_bits)
    with console.progress_bar("answers") as progress:
        found = test_set.evaluate(model, rows, limit=max_tokens, batch=batch, style=prompt_style, base=asked,
                                  progress=progress)
    if judge:
        judging.write_requests(judge, judging.judge_requests(rows, found.answers, instructions))
    console.print_result(found, as_json, "", test_set.COLUMNS, test_set.format_scores(found), text=1)
    _check_gates(wanted, gates.belle_metric_values(found))


def _check_gates(gates: "Sequence[QualityGate]", metrics: Mapping[str, float]) -> None:
    from gptq_belle.evaluation.quality_gates import check_gates

    for passed in check_gates(gates, metrics):
        console.note(passed)


def _refuse_overlap(path: Path, test: Path, rows: "list[BelleQuestion]") -> None:
    from gptq_belle.prompts.styles import Turn
    from gptq_belle.quantization.calibration.overlap import refuse_overlap

    refuse_overlap([path], test, [[Turn(row.question, row.std_answer)] for row in rows])


def _ask_base(base: Path, rows: "list[BelleQuestion]", limit: int, batch: int, style: str, precision: str | None,
              device: str) -> "list[GreedyAnswer]":
    """The answers of the base, which is freed afterwards."""
    from gptq_belle.evaluation.belle_answers import answer_questions

    model = options.load_model(base, device, precision)
    with console.progress_bar("answers of the base") as progress:
        return answer_questions(model, [row.question for row in rows], limit, batch, style, progress)
