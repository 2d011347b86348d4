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
    from gptq_belle.serving.app_state import State
    from gptq_belle.serving.options import Door, Setup, address
    from gptq_belle.serving.service import Service
except ImportError as error:
    raise HardwareError(f"serving needs a package that is not installed: {error.name}",
                        "Install it: pip install 'gptq-belle[serve]'") from error
LAST_WORDS = 60  # seconds that running answers get after SIGTERM


class _Server(uvicorn.Server):
    """Says where it listens once it does, and keeps what ended it."""

    failure: BaseException | None = None
    notice: Callable[[str], None]
    interrupted = False
    url = ""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server; uvicorn's own version raises them again behind a clean end."""
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


def serve(setup: Setup, door: Door, tell: Callable[[Any], None] | None = None,
          notice: Callable[[str], None] = lambda text: None) -> None:
    """Serve a model directory until SIGINT or SIGTERM; answers that run then are finished.

    Args:
        setup: the model, and what is taken at a time.
        door: where to listen, and who may ask; port 0 takes a free one.
        tell: takes {"url", "model", "slots", "context"} once the model is ready.
        notice: called with a sentence once the server listens, and once the model is ready.
    Raises:
        UsageError: beyond loopback without a key.
        HardwareError: the address cannot be listened on.
        GptqBelleError: the model could not be loaded.
    """
    door.check()

    def make(state: State) -> Service:
        service = setup.service(state.metrics)
        if tell is not None:
            tell({"url": server.url, "model": service.name, "slots": setup.limits.slots, "context": service.context})
        notice(f"{service.name} is ready: {setup.limits.slots} answers at a time, "
                     f"contexts of {service.context} tokens.")
        return service

    app = create_app(make, setup.limits, api_key=door.api_key, local_only=door.local,
                     failed=lambda error: server.fail(error))
    config = uvicorn.Config(app, host=door.host, port=door.port, log_level=logging.WARNING, lifespan="on",
                            timeout_graceful_shutdown=LAST_WORDS, access_log=False, server_header=False)
    server = _Server(config)
    server.notice = notice
    try:
        server.run()
    except SystemExit as error:
        raise door.refused() from error
    if server.failure is not None:
        raise server.failure
    if server.interrupted:
        raise KeyboardInterrupt
