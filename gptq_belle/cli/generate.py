"""The command `generate`."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_belle.cli import console, environment, options
from gptq_belle.cli.prompt_rows import STDIN, answered, read_rows, read_text
from gptq_belle.common.text import count
from gptq_belle.engine.sampling_params import DEFAULT_SAMPLING, SamplingParams
from gptq_belle.errors import InputError, UsageError

if TYPE_CHECKING:
    from gptq_belle.engine.model import Model


def _schema(path: Path) -> dict[str, Any]:
    """The JSON schema of a file; raises InputError if it is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema {path} cannot be read", "Give a file with a JSON object.") from error
    if not isinstance(found, dict):
        raise InputError(f"the JSON schema {path} is not an object", "Give a file with a JSON object.")
    return found


def generate(
    context: typer.Context,
    path: options.ModelPath,
    prompt: Annotated[str | None, typer.Option(
        help="The question, or the text to continue with --prompt-style none; - reads it from stdin.")] = None,
    prompts: Annotated[str | None, typer.Option(
        metavar="FILE", help='JSON Lines of {"prompt": "..."}, - for stdin; each is printed with its answer.')] = None,
    batch: Annotated[int, typer.Option(help="Number of --prompts answered at a time.", min=1)] = 8,
    prompt_style: options.PromptStyle = "auto",
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = DEFAULT_SAMPLING.temperature,
    top_p: options.TopP = DEFAULT_SAMPLING.top_p,
    top_k: options.TopK = DEFAULT_SAMPLING.top_k,
    repetition_penalty: options.Penalty = DEFAULT_SAMPLING.repetition_penalty,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    min_tokens: options.MinTokens = 0,
    json_schema: Annotated[Path | None, typer.Option(
        help="File with a JSON schema that the answer follows.", show_default=False)] = None,
    seed: options.Seed = None,
    precision: options.Precision = None,
    head_bits: options.HeadBits = None,
    cache: options.Cache = "float16",
    ctx_size: options.ContextSize = None,
    threads: options.Threads = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer one prompt and stream the answer to stdout, or answer many prompts in batches."""
    if (prompt is None) == (prompts is None):
        raise UsageError("generate needs either --prompt or --prompts", "Give one of them.")
    if STDIN in (prompt, prompts):
        environment.require_stdin()
    if prompt == STDIN:
        prompt = read_text(STDIN).rstrip("\n")
    rows = read_rows(prompts) if prompts is not None else []
    params = SamplingParams(max_tokens, temperature, top_k, top_p, repetition_penalty, seed,
                            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
                            min_tokens=min_tokens, json_schema=None if json_schema is None else _schema(json_schema))
    options.note_unused_sampling(context, temperature)
    options.check_engine_options(device, precision, head_bits, cache)
    model = options.load_generator(path, device, precision, head_bits, cache, ctx_size)
    style = None if prompt_style == "none" else prompt_style
    if prompt is not None:
        _stream(model, path, prompt, params, style, as_json)
        return
    found = []
    with console.progress_bar("answering") as progress:
        for row in answered(model, rows, params, style, batch):
            found.append(row)
            progress(len(found), len(rows))
            if not as_json:
                print(json.dumps(row, ensure_ascii=False), flush=True)
    if as_json:
        console.print_json({"model": path, "answers": found})
    if failed := sum("error" in row for row in found):
        raise UsageError(f"{count(failed, 'prompt')} could not be answered", "See 'error' in the output.")


def _stream(model: "Model", path: Path, prompt: str, params: SamplingParams, style: str | None, as_json: bool) -> None:
    """Answer one prompt; with --json, the answer is printed when it is complete."""
    start, answer = time.perf_counter(), ""
    for piece in model.stream(prompt, params, prompt_style=style):
        answer += piece
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if as_json:
        console.print_json({"model": path, "prompt": prompt, "answer": answer, "seconds": time.perf_counter() - start})
    else:
        print()
