"""The command `chat`."""

import sys

import typer

from gptq_belle.cli import console, environment, options
from gptq_belle.engine.sampling_params import DEFAULT_SAMPLING, SamplingParams


def chat(
    context: typer.Context,
    path: options.ModelPath,
    prompt_style: options.ChatStyle = "auto",
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
    ctx_size: options.ContextSize = None,
    threads: options.Threads = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Chat with a model over several turns. With --json, answers are streamed to stderr and all turns go to stdout."""
    environment.require_stdin()
    params = SamplingParams(max_tokens, temperature, top_k, top_p, repetition_penalty, seed,
                            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
                            min_tokens=min_tokens)
    options.note_unused_sampling(context, temperature)
    options.check_engine_options(device, precision, head_bits, cache)
    from gptq_belle.cli.chat_loop import chat_loop
    from gptq_belle.cli.conversation import Conversation

    model = options.load_generator(path, device, precision, head_bits, cache, ctx_size)
    conversation = Conversation(model, prompt_style, params)
    turns = chat_loop(conversation, sys.stderr if as_json else sys.stdout)
    if as_json:
        console.print_json({"model": path, "turns": turns})
