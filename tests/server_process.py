"""A server process for tests: `gptq-belle serve` on a free port of this machine."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

READY = 120  # seconds


class Served:
    """A running server.

    Attributes:
        url: of its root.
        process: it.
        log: what it has written to stderr so far; whole once it has ended.
    """

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self._log = process, log
        self.url = self._address()

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"not ready after {READY} s: {self.log}")

    def end(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(READY)

    def _address(self) -> str:
        deadline = time.monotonic() + READY
        while time.monotonic() < deadline:
            if found := re.search(r"https?://\S+:\d+", self.log):
                return found[0]
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        raise AssertionError(f"no address after {READY} s: {self.log}")


@contextmanager
def serving(path: Path, log: Path, *options: str, ready: bool = True,
            program: Sequence[str] = ("-m", "gptq_belle.cli")) -> Iterator[Served]:
    """Run `gptq-belle serve path --port 0 options`, and stop it on exit."""
    command = [sys.executable, *program, "serve", str(path), "--port", "0", "--device", "cpu", *options]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        server = Served(process, log)
        if ready:
            server.wait_until_ready()
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
