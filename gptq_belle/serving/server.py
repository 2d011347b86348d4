"""From the command line to a running server, and its end."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gptq_belle.errors import HardwareError

try:
    import uvicorn

    from gptq_belle.serving.app import create_app
    from gptq_belle.serving.server_config import ListenConfig, ServiceConfig, address
    from gptq_belle.serving.service import AppState, Service
except ImportError as error:
    raise HardwareError(f"serving needs a package that is not installed: {error.name}",
                        "Install it: pip install 'gptq-belle[serve]'") from error
SHUTDOWN_TIMEOUT = 60  # seconds that running answers get after SIGTERM


class _Server(uvicorn.Server):
    """Says where it listens once it does, and keeps what ended it."""

    failure: BaseException | None = None
    notice: Callable[[str], None]
    interrupted = False
    url = ""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server; uvicorn's own version raises them again after a clean end."""
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
        self.failure, self.should_exit = error, True

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.url = address(self.config.host, self.servers[0].sockets[0].getsockname()[1])
            self.notice(f"Listening on {self.url}; loading the model.")


def serve(config: ServiceConfig, listen: ListenConfig, on_ready: Callable[[Any], None] | None = None,
          notice: Callable[[str], None] = lambda text: None) -> None:
    """Serve a model directory until SIGINT or SIGTERM; answers that run then are finished.

    Args:
        config: the model, and what is taken at a time.
        listen: where to listen, and who may ask; port 0 takes a free one.
        on_ready: takes {"url", "model", "slots", "context"} once the model is ready.
        notice: called with a sentence once the server listens, and once the model is ready.
    Raises:
        UsageError: beyond loopback without a key.
        HardwareError: the address cannot be listened on.
        GptqBelleError: the model could not be loaded.
    """
    listen.check()

    def make(state: AppState) -> Service:
        service = config.service(state.metrics)
        if on_ready is not None:
            on_ready({"url": server.url, "model": service.name, "slots": config.limits.slots,
                      "context": service.context})
        notice(f"{service.name} is ready: {config.limits.slots} answers at a time, "
               f"contexts of {service.context} tokens.")
        return service

    app = create_app(make, config.limits, api_key=listen.api_key, local_only=listen.local,
                     failed=lambda error: server.fail(error))
    server_config = uvicorn.Config(app, host=listen.host, port=listen.port, log_level=logging.WARNING, lifespan="on",
                                   timeout_graceful_shutdown=SHUTDOWN_TIMEOUT, access_log=False, server_header=False)
    server = _Server(server_config)
    server.notice = notice
    try:
        server.run()
    except SystemExit as error:
        raise listen.refused() from error
    if server.failure is not None:
        raise server.failure
    if server.interrupted:
        raise KeyboardInterrupt
