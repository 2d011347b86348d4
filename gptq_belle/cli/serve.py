"""The command `serve`."""

from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gptq_belle.cli import console, options


class LogFormat(StrEnum):
    """Values of --log-format."""

    TEXT = "text"
    JSON = "json"


def serve(
    context: typer.Context,
    path: options.ModelPath,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 chooses a free one.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[list[str] | None, options.advanced(
        help="Model name for clients, repeatable; responses contain the first. Default: the name of the directory.",
        show_default=False)] = None,
    api_key: Annotated[str | None, typer.Option(envvar="GPTQ_BELLE_API_KEY", show_default=False,
                                                help="API key that clients must send.")] = None,
    api_key_file: Annotated[Path | None, options.advanced(
        help="File with one API key per line, in addition to --api-key.", show_default=False)] = None,
    metrics_key: Annotated[str | None, options.advanced(envvar="GPTQ_BELLE_METRICS_KEY", show_default=False, help=(
        "The only key for /metrics. Default: the API keys."))] = None,
    cors_origin: Annotated[list[str] | None, options.advanced(
        help="Origin of web pages that may use the server, such as https://chat.example; repeatable.",
        show_default=False)] = None,
    ssl_certfile: Annotated[Path | None, options.advanced(
        help="Certificate for TLS (PEM).", show_default=False)] = None,
    ssl_keyfile: Annotated[Path | None, options.advanced(help="Private key of it (PEM).", show_default=False)] = None,
    log_format: Annotated[LogFormat, options.advanced(help="Format of the log on stderr.")] = LogFormat.TEXT,
    allow_unauthenticated: Annotated[bool, options.advanced(
        "--allow-unauthenticated", help="Allow other machines to connect without an API key.")] = False,
    max_batch: Annotated[int, typer.Option(help="Maximum number of requests answered at a time.", min=1, max=256)] = 8,
    max_len: Annotated[int | None, typer.Option(
        "--max-len", "--ctx-size", "-c", help="Maximum number of prompt and answer tokens. Default: the context.",
        min=2, show_default=False)] = None,
    prefix_cache: Annotated[str | None, typer.Option(
        metavar="SIZE", show_default=False, help="Host memory for earlier prompts, such as 2GiB: what a new prompt "
        "shares with them is not read again. Default: only the last prompts.")] = None,
    max_queue: Annotated[int, options.advanced(
        help="Maximum number of waiting requests; others get 429.", min=0)] = 256,
    request_timeout: Annotated[float, options.advanced(
        help="Seconds until a request is answered with 504; 0 for no limit.", min=0)] = 0,
    queue_timeout: Annotated[float, options.advanced(
        help="Seconds until a request that has not started is answered with 503; 0 for no limit.", min=0)] = 600,
    engine_timeout: Annotated[float, options.advanced(
        help="Seconds that one step of the model may take before the server exits with an error; 0 for no limit.",
        min=0)] = 600,
    ray: Annotated[bool, options.advanced(
        "--ray", help="Run several replicas at one address with Ray Serve.")] = False,
    replicas: Annotated[int, options.advanced(help="Number of replicas with --ray.", min=1)] = 2,
    prompt_style: options.ChatStyle = "auto",
    precision: options.Precision = None,
    head_bits: options.HeadBits = None,
    cache: options.Cache = "float16",
    threads: options.Threads = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Serve an OpenAI-compatible API and a chat page. Ctrl-C or SIGTERM stops it after running requests finish."""
    if not ray:
        options.note_unused(context, "without --ray", "replicas")
    if api_key:
        options.note_unused(context, "with --api-key", "allow_unauthenticated")
    options.check_engine_options(device, precision, head_bits, cache)
    from gptq_belle.common.memory import parse_memory
    from gptq_belle.serving.queued_request import Timeouts
    from gptq_belle.serving.request_guard import Access
    from gptq_belle.serving.server import serve
    from gptq_belle.serving.server_config import Limits, ListenConfig, ServiceConfig, is_loopback, read_keys

    timeouts = Timeouts(request_timeout or None, queue_timeout or None, engine_timeout or None)
    limits = Limits(slots=max_batch, waiting=max_queue, context=max_len, timeouts=timeouts)
    config = ServiceConfig(path, limits, prompt_style, device, precision, head_bits, cache,
                           parse_memory(prefix_cache) if prefix_cache else None,
                           tuple(filter(None, served_model_name or ())))
    keys = (*filter(None, [api_key]), *(read_keys(api_key_file) if api_key_file is not None else ()))
    access = Access(keys, metrics_key or None, is_loopback(host) and not keys, tuple(cors_origin or ()))
    listen = ListenConfig(host, port, access, allow_unauthenticated, ssl_certfile, ssl_keyfile, log_format.value)
    listen.check()
    listen.check_port()
    config = replace(config, path=options.local(path))
    notice = partial(console.note, style=None)
    if ray:
        from gptq_belle.serving.ray_replicas import serve_replicas

        serve_replicas(config, listen, replicas, console.print_json if as_json else None, notice)
    else:
        serve(config, listen, console.print_json if as_json else None, notice)
