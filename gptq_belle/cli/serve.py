"""The verb of serving."""

from functools import partial
from typing import Annotated

import typer

from gptq_belle.cli import console
from gptq_belle.cli.options import Cache, ChatStyle, HeadBits, ModelPath, Precision, local


def serve(
    path: ModelPath,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="GPTQ_BELLE_API_KEY", show_default=False,
                                                help="Key that clients must send.")] = None,
    allow_unauthenticated: Annotated[bool, typer.Option(
        "--allow-unauthenticated", help="Listen beyond this machine without a key.")] = False,
    max_batch: Annotated[int, typer.Option(help="Answers that are generated at a time.", min=1, max=256)] = 8,
    max_len: Annotated[int | None, typer.Option(
        help="Tokens of prompt and answer together; left out, the model's context.", min=2, show_default=False)] = None,
    max_queue: Annotated[int, typer.Option(help="Answers that may wait; further ones get 429.", min=0)] = 256,
    ray: Annotated[bool, typer.Option(
        "--ray", help="Several replicas behind one address, through Ray Serve.")] = False,
    replicas: Annotated[int, typer.Option(help="How many, with --ray.", min=1)] = 2,
    prompt_style: ChatStyle = "auto",
    precision: Precision = None,
    head_bits: HeadBits = None,
    cache: Cache = "float16",
    device: console.Device = "auto",
    as_json: console.Json = False,
    verbose: console.Verbose = False,
) -> None:
    """Serve a model to OpenAI's clients, with a chat page at /. Ctrl-C or SIGTERM ends it behind running answers."""
    from gptq_belle.serving.options import Limits, ListenConfig, ServiceConfig
    from gptq_belle.serving.server import serve

    limits = Limits(slots=max_batch, waiting=max_queue, context=max_len)
    config = ServiceConfig(local(path), limits, prompt_style, device, precision, head_bits, cache)
    listen = ListenConfig(host, port, api_key or None, allow_unauthenticated)
    notice = partial(console.note, style=None)
    if ray:
        from gptq_belle.serving.ray_replicas import serve_replicas

        serve_replicas(config, listen, replicas, console.print_json if as_json else None, notice)
    else:
        serve(config, listen, console.print_json if as_json else None, notice)
