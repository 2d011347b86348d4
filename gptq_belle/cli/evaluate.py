"""The verbs `eval ppl`, `eval kl` and `eval belle`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_belle.cli import console
from gptq_belle.cli.options import ChatStyle, HeadBits, ModelPath, Precision, load_model, local, optional_local
from gptq_belle.errors import UsageError

if TYPE_CHECKING:
    from gptq_belle.evaluation.belle_answers import Answer
    from gptq_belle.evaluation.belle_set import Row

app = typer.Typer(no_args_is_help=True)
Text = Annotated[Path, typer.Option(help="UTF-8 text, or JSONL rows of any form that calibration takes.")]
Window = Annotated[int, typer.Option(help="Tokens a window.")]
Stride = Annotated[int | None, typer.Option(help="Scored tokens a window; left out, all of it.", show_default=False)]
Limit = Annotated[int | None, typer.Option(help="Use only the first N tokens of the text.", show_default=False)]
Gate = Annotated[list[str] | None, typer.Option(
    help="Exit with code 5 unless it holds; a figure of --json, <, <=, > or >=, a number. May be repeated.")]
Overlap = Annotated[bool, typer.Option("--allow-overlap", help="Take text that the model was calibrated on.")]


@app.command()
def ppl(
    path: ModelPath,
    text: Text,
    window: Window = 512,
    stride: Stride = None,
    limit: Limit = None,
    gate: Gate = None,
    allow_overlap: Overlap = False,
    precision: Precision = None,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Perplexity on a text: by token, UTF-8 byte and character. Gates: ppl, per_byte ..., as in --gate 'ppl<12'."""
    from gptq_belle.evaluation import perplexity
    from gptq_belle.evaluation import quality_gates as gates
    from gptq_belle.evaluation.base_predictions import text_for

    wanted = [gates.parse(one, gates.names(perplexity.Perplexity)) for one in gate or []]
    _, words = text_for(path, text, allow_overlap=allow_overlap)
    model = load_model(path, device, precision)
    with console.counting("windows") as progress:
        found = perplexity.perplexity(model.logits, model.tokenizer, words, length=window, stride=stride, limit=limit,
                                      progress=progress)
    if as_json:
        console.print_json(found)
    else:
        console.print_table("", ["", ""], perplexity.lines(found), text=2)
    for passed in gates.check(wanted, gates.figures(found)):
        console.note(passed)


@app.command()
def kl(
    path: ModelPath,
    base: Annotated[Path, typer.Option(callback=local, help="The full-precision model that PATH was made from.")],
    text: Text,
    window: Window = 512,
    stride: Stride = None,
    limit: Limit = None,
    keep: Annotated[Path | None, typer.Option(
        help="Folder for the base's predictions: left there for the next model, taken from there if they fit. They "
        "take 4 bytes a token and vocabulary entry.", show_default=False)] = None,
    gate: Gate = None,
    allow_overlap: Overlap = False,
    precision: Precision = None,
    head_bits: HeadBits = None,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """KL divergence from a base model; only one of the two is in memory at a time.

    Gates: kl, kl_max, same_top, ppl, kl_99% ..., as in --gate 'kl<0.05'.
    """
    from gptq_belle.evaluation import base_predictions, kl_statistics
    from gptq_belle.evaluation import quality_gates as gates
    from gptq_belle.evaluation.kl_divergence import token_figures

    wanted = [gates.parse(one, gates.names(kl_statistics.Divergence)) for one in gate or []]
    tokenizer, words = base_predictions.text_for(path, text, allow_overlap=allow_overlap)
    cut = base_predictions.cut(base, tokenizer, words, window, stride, limit)
    with base_predictions.base_predictions(base, cut, lambda place: load_model(place, device, precision),
                                           console.counting, keep=keep, device=device,
                                           precision=precision) as predictions:
        model = load_model(path, device, precision, head_bits)
        with console.counting("windows") as progress:
            found = kl_statistics.summarize(token_figures(predictions, model.logits, progress), len(cut))
    if as_json:
        console.print_json(found)
    else:
        console.print_table("", ["", ""], kl_statistics.lines(found), text=2)
    for passed in gates.check(wanted, gates.figures(found)):
        console.note(passed)


@app.command()
def belle(
    path: ModelPath,
    test: Annotated[Path, typer.Option(help="JSONL rows with class, question and std_answer.")],
    base: Annotated[Path | None, typer.Option(
        callback=optional_local,
        help="The full-precision model that PATH was made from: measures agreement with its greedy answers.",
        show_default=False)] = None,
    per_class: Annotated[int | None, typer.Option(help="Use only the first N questions of each class.", min=1)] = None,
    prompt_style: ChatStyle = "auto",
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 160,
    batch: Annotated[int, typer.Option(help="Questions answered at a time.", min=1)] = 32,
    judge: Annotated[Path | None, typer.Option(
        help="Write a request a line for a judging model, as BELLE asks ChatGPT.", show_default=False)] = None,
    judge_prompts: Annotated[Path | None, typer.Option(
        help="BELLE's eval_prompt.json, for --judge.", show_default=False)] = None,
    gate: Gate = None,
    allow_overlap: Overlap = False,
    precision: Precision = None,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Answers to test questions, scored by class.

    Gates: exact, f1, rouge_l, nll, agreement, identical, of all or of one class, as in --gate 'exact>85' or
    --gate 'f1.math>50'.
    """
    from gptq_belle.evaluation import belle_set as test_set
    from gptq_belle.evaluation import judge_requests as judging
    from gptq_belle.evaluation import quality_gates as gates

    if (judge is None) != (judge_prompts is None):
        raise UsageError("--judge and --judge-prompts belong together",
                         "Give eval/eval_prompt.json of the BELLE project as --judge-prompts.")
    rows = test_set.read_rows(test, per_class)
    wanted = [gates.parse(one, gates.belle_names(row.cls for row in rows)) for one in gate or []]
    instructions = judging.read_instructions(judge_prompts) if judge_prompts else {}
    if not allow_overlap:
        _refuse_overlap(path, test, rows)
    asked = _ask_base(base, rows, max_tokens, batch, prompt_style, precision, device) if base else None
    model = load_model(path, device, precision)
    with console.counting("answers") as progress:
        found = test_set.evaluate(model, rows, limit=max_tokens, batch=batch, style=prompt_style, base=asked,
                                  progress=progress)
    if judge:
        judging.write_requests(judge, judging.requests(rows, found.answers, instructions))
    if as_json:
        console.print_json(found)
    else:
        console.print_table("", test_set.COLUMNS, test_set.lines(found))
    for passed in gates.check(wanted, gates.belle_figures(found)):
        console.note(passed)


def _refuse_overlap(path: Path, test: Path, rows: "list[Row]") -> None:
    from gptq_belle.evaluation.calibration_overlap import refuse_overlap
    from gptq_belle.prompts.styles import Turn

    refuse_overlap([path], test, [[Turn(row.question, row.std_answer)] for row in rows])


def _ask_base(base: Path, rows: "list[Row]", limit: int, batch: int, style: str, precision: str | None,
              device: str) -> "list[Answer]":
    """The base's answers; it is out of memory afterwards."""
    from gptq_belle.evaluation.belle_answers import ask

    model = load_model(base, device, precision)
    with console.counting("answers of the base") as progress:
        return ask(model, [row.question for row in rows], limit, batch, style, progress)
