"""The command `chat`."""

import sys

from gptq_belle.cli import console
from gptq_belle.cli.options import (
    Cache,
    ChatStyle,
    HeadBits,
    MaxTokens,
    ModelPath,
    Penalty,
    Precision,
    Seed,
    Temperature,
    TopK,
    TopP,
    load_model,
)


def chat(
    path: ModelPath,
    prompt_style: ChatStyle = "auto",
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
    """Chat with a model over several turns. With --json, answers are streamed to stderr and all turns go to stdout."""
    from gptq_belle.cli.conversation import Conversation, run
    from gptq_belle.engine.sampling import SamplingParams

    params = SamplingParams(max_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    conversation = Conversation(load_model(path, device, precision, head_bits, cache), prompt_style, params)
    turns = run(conversation, sys.stderr if as_json else sys.stdout)
    if as_json:
        console.print_json({"model": path, "turns": turns})
