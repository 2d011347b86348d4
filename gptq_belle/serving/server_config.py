"""Configuration of a server: the model and its limits, the address and access."""

import errno
import ipaddress
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.engine.model import load
from gptq_belle.errors import HardwareError, InputError, UsageError
from gptq_belle.models.decoder_config import read_decoder_config
from gptq_belle.serving.metrics import Metrics
from gptq_belle.serving.request_guard import Access
from gptq_belle.serving.service import Limits, Service

BACKLOG = 2048  # connections that wait to be accepted, as in uvicorn


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """A model and the limits of requests; plain values that can be sent to another process.

    Attributes:
        path: a model directory, quantized or full precision.
        prompt_style: prompt style of chats; "auto" for that of the model.
        device, precision, head_bits, cache, prefix_cache: see `engine.model.load`.
        served_names: model names for clients; default: the name of the directory.
    """

    path: Path
    limits: Limits = field(default_factory=Limits)
    prompt_style: str = "auto"
    device: str = "auto"
    precision: str | None = None
    head_bits: int | None = None
    cache: str = "float16"
    prefix_cache: int | None = None
    served_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Model names for clients."""
        return self.served_names or (os.path.basename(os.path.abspath(self.path)),)

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
                     cache=self.cache, prefix_cache=self.prefix_cache)
        if model.device.type != "cpu":
            notice("Compiling the GPU kernels.")
        return Service(model, self.names, self.limits, metrics, self.prompt_style)


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """Address and access of a server.

    Attributes:
        access: who may use the server.
        allow_unauthenticated: allow a host other than loopback without a key.
        certificate, private_key: files in PEM format for TLS; None for plain HTTP.
        log_format: one of `access_log.FORMATS`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    access: Access = field(default_factory=Access)
    allow_unauthenticated: bool = False
    certificate: Path | None = None
    private_key: Path | None = None
    log_format: str = "text"

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self.host)

    def check(self) -> None:
        """Reject an open server unless it was explicitly requested, and files for TLS that cannot be used.

        Raises:
            UsageError: the host is not loopback, and there is no key; or a certificate without a key, or reversed.
            InputError: the certificate or its key cannot be read, or they do not belong together.
        """
        if not self.local and not self.access.keys and not self.allow_unauthenticated:
            raise UsageError(f"without an API key, everybody who can reach {self.host} could use this model",
                             "Give --api-key, --api-key-file or --allow-unauthenticated.")
        if (self.certificate is None) != (self.private_key is None):
            raise UsageError("TLS needs a certificate and its private key", "Give --ssl-certfile and --ssl-keyfile.")
        if self.certificate is not None and self.private_key is not None:
            try:
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.certificate, self.private_key)
            except OSError as error:  # SSLError too
                raise InputError(f"the certificate {self.certificate} with the key {self.private_key} cannot be used: "
                                 f"{error.strerror or error}",
                                 "Give both as PEM files that belong together.") from error

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


def address(host: str, port: int, tls: bool = False) -> str:
    """URL of a server."""
    return f"http{'s' if tls else ''}://" + (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def read_keys(path: Path) -> tuple[str, ...]:
    """API keys of a file: one per line; empty lines and lines that start with # are skipped.

    Raises:
        InputError: the file cannot be read, or has no keys.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the file of API keys {path} cannot be read",
                         "Give a text file with one key per line.") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise InputError(f"the file {path} has no API keys", "Write one key per line.")
    return keys
