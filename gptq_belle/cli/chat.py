"""The command `chat`."""

import sys

from gptq_belle.cli import console, environment, options


def chat(
    path: options.ModelPath,
    prompt_style: options.ChatStyle = "auto",
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    repetition_penalty: options.Penalty = 1.0,
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
    """Chat with a model over several turns. With --json, answers are streamed to stderr and all turns go to stdout."""
    environment.require_stdin()
    options.check_chat_style(prompt_style)
    options.check_engine_options(device, precision, head_bits, cache)
    from gptq_belle.cli.conversation import Conversation, chat_loop
    from gptq_belle.engine.sampling_params import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_k, top_p, repetition_penalty, seed,
                            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
                            min_tokens=min_tokens)
    conversation = Conversation(options.load_generator(path, device, precision, head_bits, cache), prompt_style, params)
    turns = chat_loop(conversation, sys.stderr if as_json else sys.stdout)
    if as_json:
        console.print_json({"model": path, "turns": turns})
