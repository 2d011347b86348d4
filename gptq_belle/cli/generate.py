"""The command `generate`."""

import sys
import time
from typing import Annotated

import typer

from gptq_belle.cli import console, options
from gptq_belle.engine.sampling_params import DEFAULT_SAMPLING, SamplingParams


def generate(
    context: typer.Context,
    path: options.ModelPath,
    prompt: Annotated[str, typer.Option(help="The question, or the text to continue with --prompt-style none.")],
    prompt_style: options.PromptStyle = "auto",
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = DEFAULT_SAMPLING.temperature,
    top_p: options.TopP = DEFAULT_SAMPLING.top_p,
    top_k: options.TopK = DEFAULT_SAMPLING.top_k,
    repetition_penalty: options.Penalty = DEFAULT_SAMPLING.repetition_penalty,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    min_tokens: options.MinTokens = 0,
    seed: options.Seed = None,
    precision: options.Precision = None,
    head_bits: options.HeadBits = None,
    cache: options.Cache = "float16",
    device: options.Device = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Answer one prompt and stream the answer to stdout."""
    if prompt_style != "none":
        options.check_chat_style(prompt_style)
    params = SamplingParams(max_tokens, temperature, top_k, top_p, repetition_penalty, seed,
                            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
                            min_tokens=min_tokens)
    options.note_unused_sampling(context, temperature)
    options.check_engine_options(device, precision, head_bits, cache)
    model = options.load_generator(path, device, precision, head_bits, cache)
    style = None if prompt_style == "none" else prompt_style
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
