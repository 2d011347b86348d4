"""Run the server by uvicorn until SIGINT or SIGTERM."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from gptq_belle.common.text import count
from gptq_belle.errors import GptqBelleError, HardwareError

try:
    import uvicorn

    from gptq_belle.serving.access_log import configure
    from gptq_belle.serving.app import create_app
    from gptq_belle.serving.connections import Connections, GuardedProtocol, available_connections
    from gptq_belle.serving.server_config import ListenConfig, ServiceConfig, address
    from gptq_belle.serving.service import AppState, Service
except ImportError as error:
    if (error.name or "gptq_belle").startswith("gptq_belle"):  # not a missing extra, but a defect of this package
        raise
    raise HardwareError(f"serving needs a package that is not installed: {error.name}",
                        "Install it: pip install 'gptq-belle[serve]'") from error
SHUTDOWN_TIMEOUT = 60  # seconds for running requests to finish after SIGTERM
FAILURE_DELAY = 2.0  # seconds between the end of the engine and that of the process, for clients to read their errors
FAILURE_TIMEOUT = 3  # seconds for open requests to end after that


class _Server(uvicorn.Server):
    """A uvicorn server that reports its URL, and stores the exception that stopped it."""

    failure: BaseException | None = None
    notice: Callable[[str], None]
    interrupted = False
    url = ""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop the server on SIGTERM and SIGINT; uvicorn's version raises the signals again after the shutdown."""
        def interrupt(number: int, frame: Any) -> None:
            self.interrupted = True
            self.handle_exit(number, frame)

        before = [signal.signal(signal.SIGTERM, self.handle_exit), signal.signal(signal.SIGINT, interrupt)]
        try:
            yield
        finally:
            for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
                signal.signal(number, handler)

    def fail(self, error: BaseException) -> None:
        """Stop the server with an error; open requests cannot be answered, so they get little time."""
        self.config.timeout_graceful_shutdown = FAILURE_TIMEOUT
        self.failure, self.should_exit = error, True

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.url = address(self.config.host, self.servers[0].sockets[0].getsockname()[1], self.config.is_ssl)
            self.notice(f"Listening on {self.url}; loading the model.")


def serve(config: ServiceConfig, listen: ListenConfig, on_ready: Callable[[Any], None] | None = None,
          notice: Callable[[str], None] = lambda text: None) -> None:
    """Serve a model directory until SIGINT or SIGTERM; running requests are finished.

    Args:
        config: the model and the limits of requests.
        listen: address and access; port 0 selects a free port.
        on_ready: called with {"url", "model", "slots", "context"} when the model is loaded.
        notice: called with a message when the server listens, and when the model is loaded.
    Raises:
        UsageError: the address is not loopback, and there is no API key.
        HardwareError: the address is not available.
        GptqBelleError: the model cannot be loaded, or the engine has stopped because of an error.
    """
    listen.check()
    sockets = listen.open()  # before the model is loaded: a busy port is not worth the wait

    def load(state: AppState) -> Service:
        service = config.service(state.metrics, notice)
        service.scheduler.on_failure = end
        if on_ready is not None:
            on_ready({"url": server.url, "model": service.name, "slots": config.limits.slots,
                      "context": service.context})
        notice(f"{service.name} is ready: {count(config.limits.slots, 'request')} at a time, "
               f"contexts of {service.context} tokens.")
        return service

    def end(error: BaseException) -> None:  # in the engine's thread
        time.sleep(FAILURE_DELAY)
        stopped = GptqBelleError(f"The engine stopped because of an error: {type(error).__name__}.",
                                 "Start the server again, and report the traceback in its log.")
        stopped.__cause__ = error
        server.fail(stopped)

    configure(listen.log_format)
    app = create_app(load, config.limits, listen.access, on_failure=lambda error: server.fail(error))
    connections = Connections(available_connections())
    protocol: Any = partial(GuardedProtocol, connections)
    server_config = uvicorn.Config(app, host=listen.host, port=listen.port, log_level=logging.WARNING, lifespan="on",
                                   timeout_graceful_shutdown=SHUTDOWN_TIMEOUT, access_log=False, server_header=False,
                                   http=protocol, ws="none", timeout_keep_alive=connections.keep_alive, log_config=None,
                                   ssl_certfile=listen.certificate, ssl_keyfile=listen.private_key)
    server = _Server(server_config)
    server.notice = notice
    try:
        server.run(sockets)
    except SystemExit as error:
        raise listen.unavailable(error) from error
    finally:
        for one in sockets:
            one.close()
    if server.failure is not None:
        raise server.failure
    if server.interrupted:
        raise KeyboardInterrupt
