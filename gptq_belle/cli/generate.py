"""The command `generate`."""

import sys
import time
from typing import Annotated

import typer

from gptq_belle.cli import console
from gptq_belle.cli.options import (
    Cache,
    HeadBits,
    MaxTokens,
    ModelPath,
    Penalty,
    Precision,
    Seed,
    Style,
    Temperature,
    TopK,
    TopP,
    load_model,
)


def generate(
    path: ModelPath,
    prompt: Annotated[str, typer.Option(help="The question, or the text to continue with --prompt-style none.")],
    prompt_style: Style = "auto",
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    precision: Precision = None,
    head_bits: HeadBits = None,
    cache: Cache = "float16",
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Answer one prompt and stream the answer to stdout."""
    model = load_model(path, device, precision, head_bits, cache)
    style = None if prompt_style == "none" else prompt_style
    began, answer = time.perf_counter(), ""
    for piece in model.stream(prompt, prompt_style=style, max_new_tokens=max_tokens, temperature=temperature,
                              top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty, seed=seed):
        answer += piece
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if as_json:
        console.print_json({"model": path, "prompt": prompt, "answer": answer, "seconds": time.perf_counter() - began})
    else:
        print()
