"""Configuration of a server: the model and its limits, the address and access."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.engine.model import load
from gptq_belle.errors import HardwareError, UsageError
from gptq_belle.models.decoder_config import read_decoder_config
from gptq_belle.serving.metrics import Metrics
from gptq_belle.serving.service import Limits, Service


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """A model and the limits of requests; plain values that can be sent to another process.

    Attributes:
        path: a model directory, quantized or full precision.
        limits: limits of requests.
        prompt_style: prompt style of chats; "auto" for that of the model.
        device, precision, head_bits, cache: see `engine.model.load`.
    """

    path: Path
    limits: Limits = field(default_factory=Limits)
    prompt_style: str = "auto"
    device: str = "auto"
    precision: str | None = None
    head_bits: int | None = None
    cache: str = "float16"

    @property
    def name(self) -> str:
        """Model name for clients: the name of the directory."""
        return self.path.resolve().name

    def check(self) -> None:
        """Validate the model directory without reading weights.

        Raises:
            InputError: files are missing or damaged, or the architecture is not supported.
        """
        read_decoder_config(CheckpointReader(self.path).config)

    def service(self, metrics: Metrics) -> Service:
        """Load the model and create its service.

        Raises:
            GptqBelleError: the model cannot be loaded.
        """
        model = load(self.path, device=self.device, precision=self.precision, head_bits=self.head_bits,
                     cache=self.cache)
        return Service(model, self.name, self.limits, metrics, self.prompt_style)


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """Address and access of a server.

    Attributes:
        host, port: the address.
        api_key: key that clients must send; None for no authentication.
        allow_unauthenticated: allow a host other than loopback without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allow_unauthenticated: bool = False

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

    def unavailable(self) -> HardwareError:
        """Build the error for an address that is not available."""
        return HardwareError(f"cannot listen on {self.host}:{self.port}", "Choose another --port or --host.")


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
