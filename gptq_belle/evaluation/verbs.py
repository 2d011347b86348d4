"""The verbs `eval ppl`, `eval kl` and `eval belle`."""

from pathlib import Path
from typing import Annotated

import typer

from gptq_belle import console
from gptq_belle.options import ChatStyle, ModelPath, Precision, load_model

app = typer.Typer(no_args_is_help=True)

Text = Annotated[Path, typer.Option(help="UTF-8 text, or JSONL rows of any form that calibration takes.")]
Window = Annotated[int, typer.Option(help="Tokens a window.")]
Stride = Annotated[int | None, typer.Option(help="Scored tokens a window; left out, all of it.", show_default=False)]
Limit = Annotated[int | None, typer.Option(help="Look at the first so many tokens only.", show_default=False)]
Gate = Annotated[list[str] | None, typer.Option(help="Exit with code 5 unless it holds; may be repeated.")]


@app.command()
def ppl(
    path: ModelPath,
    text: Text,
    window: Window = 512,
    stride: Stride = None,
    limit: Limit = None,
    gate: Gate = None,
    precision: Precision = None,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Perplexity on a text. Gates: ppl, as in --gate 'ppl<12'."""
    from gptq_belle.evaluation import gate as gates
    from gptq_belle.evaluation import perplexity

    wanted = [gates.parse(one, ["ppl"]) for one in gate or []]
    model = load_model(path, device, precision)
    words = perplexity.read_text(text, model.prompt_style, model.tokenizer.eos_token)
    with console.counting("windows") as progress:
        found = perplexity.perplexity(model.logits, model.tokenizer, words, length=window, stride=stride, limit=limit,
                                      progress=progress)
    if as_json:
        console.print_json(found)
    else:
        console.print_table("", ["", ""], perplexity.lines(found), text=2)
    gates.check(wanted, {"ppl": found.perplexity})


@app.command()
def kl(
    path: ModelPath,
    base: Annotated[Path, typer.Option(help="The full-precision model that PATH was made from.")],
    text: Text,
    window: Window = 512,
    stride: Stride = None,
    limit: Limit = None,
    gate: Gate = None,
    precision: Precision = None,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """KL divergence from a base model. Gates: kl, kl_max, same_top, ppl, as in --gate 'kl<0.05'."""
    from gptq_belle.evaluation import divergence, perplexity
    from gptq_belle.evaluation import gate as gates

    wanted = [gates.parse(one, ["kl", "kl_max", "same_top", "ppl"]) for one in gate or []]
    model, reference = load_model(path, device, precision), load_model(base, device, precision)
    words = perplexity.read_text(text, model.prompt_style, model.tokenizer.eos_token)
    divergence.check_same_tokenizer(reference.tokenizer, model.tokenizer, words)
    with console.counting("windows") as progress:
        found = divergence.divergence(reference.logits, model.logits, model.tokenizer, words, length=window,
                                      stride=stride, limit=limit, progress=progress)
    if as_json:
        console.print_json(found)
    else:
        console.print_table("", ["", ""], divergence.lines(found), text=2)
    gates.check(wanted, {"kl": found.kl_mean, "kl_max": found.kl_max, "same_top": found.same_top,
                         "ppl": found.perplexity})


@app.command()
def belle(
    path: ModelPath,
    test: Annotated[Path, typer.Option(help="JSONL rows with class, question and std_answer.")],
    per_class: Annotated[int | None, typer.Option(help="Only the first so many of a class.", min=1)] = None,
    prompt_style: ChatStyle = "auto",
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 160,
    batch: Annotated[int, typer.Option(help="Questions answered at a time.", min=1)] = 32,
    gate: Gate = None,
    precision: Precision = None,
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Scores by class of greedy answers to test questions. Gates: exact, as in --gate 'exact>85'."""
    from gptq_belle.evaluation import belle as test_set
    from gptq_belle.evaluation import gate as gates

    wanted = [gates.parse(one, ["exact"]) for one in gate or []]
    rows = test_set.read_rows(test, per_class)
    model = load_model(path, device, precision)
    with console.counting("answers") as progress:
        found = test_set.evaluate(model, rows, limit=max_tokens, batch=batch, style=prompt_style, progress=progress)
    if as_json:
        console.print_json(found)
    else:
        console.print_table("", ["class", "measure", "score, %", "answers"], test_set.lines(found), text=2)
    gates.check(wanted, {"exact": float("nan") if found.exact is None else found.exact})
