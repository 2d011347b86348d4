"""Configuration of a server: the model and its limits, the address and access."""

import errno
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.engine.model import load
from gptq_belle.errors import HardwareError, UsageError
from gptq_belle.models.decoder_config import read_decoder_config
from gptq_belle.serving.metrics import Metrics
from gptq_belle.serving.service import Limits, Service

BACKLOG = 2048  # connections that wait to be accepted, as in uvicorn


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """A model and the limits of requests; plain values that can be sent to another process.

    Attributes:
        path: a model directory, quantized or full precision.
        prompt_style: prompt style of chats; "auto" for that of the model.
        device, precision, head_bits, cache: see `engine.model.load`.
        served_names: model names for clients; default: the name of the directory.
    """

    path: Path
    limits: Limits = field(default_factory=Limits)
    prompt_style: str = "auto"
    device: str = "auto"
    precision: str | None = None
    head_bits: int | None = None
    cache: str = "float16"
    served_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Model names for clients."""
        return self.served_names or (self.path.resolve().name,)

    def check(self) -> None:
        """Validate the model directory without reading weights.

        Raises:
            InputError: files are missing or damaged, or the architecture is not supported.
        """
        read_decoder_config(CheckpointReader(self.path).config)

    def service(self, metrics: Metrics, notice: Callable[[str], None] = lambda text: None) -> Service:
        """Load the model and create its service.

        Args:
            metrics: metrics of the server.
            notice: called with a message before GPU kernels are compiled.
        Raises:
            GptqBelleError: the model cannot be loaded.
        """
        model = load(self.path, device=self.device, precision=self.precision, head_bits=self.head_bits,
                     cache=self.cache)
        if model.device.type != "cpu":
            notice("Compiling the GPU kernels.")
        return Service(model, self.names, self.limits, metrics, self.prompt_style)


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """Address and access of a server."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None  # key that clients must send; None for no authentication
    allow_unauthenticated: bool = False  # allow a host other than loopback without a key

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self.host)

    def check(self) -> None:
        """Reject an open server unless it was explicitly requested.

        Raises:
            UsageError: the host is not loopback, and there is no key.
        """
        if not self.local and not self.api_key and not self.allow_unauthenticated:
            raise UsageError(f"without an API key, everybody who can reach {self.host} could use this model",
                             "Give --api-key, or --allow-unauthenticated.")

    def open(self) -> list[socket.socket]:
        """Listen on the address: one socket per IP address of the host, all on the same port.

        Raises:
            HardwareError: the address is not available.
        """
        opened: list[socket.socket] = []
        try:
            for family, *_, where in _resolved(self.host.strip("[]"), self.port):
                port = opened[0].getsockname()[1] if opened else self.port
                opened.append(socket.create_server((where[0], port, *where[2:]), family=family, backlog=BACKLOG))
        except OSError as error:
            if not opened or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # such as no IPv6
                for one in opened:
                    one.close()
                raise self.unavailable(error) from error
        return opened

    def check_port(self) -> None:
        """Check that the address is available; raises HardwareError as `open`."""
        for one in self.open():
            one.close()

    def unavailable(self, error: BaseException) -> HardwareError:
        """Build the error for an address that is not available."""
        system = error.strerror if isinstance(error, OSError) else None  # after it, create_server states the address
        reason = f": {system.partition(' (')[0].lower()}" if system else ""
        return HardwareError(f"cannot listen on {self.host}:{self.port}{reason}", "Choose another --port or --host.")


def _resolved(host: str, port: int) -> list[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def address(host: str, port: int) -> str:
    """URL of a server."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
