"""What a server is asked to be: the model and its limits, the address and who may come to it."""

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
    """A model, and what is taken at a time; plain values, so that another process can make the same.

    Attributes:
        path: a model directory, quantized or not.
        limits: see there.
        prompt_style: of chats; "auto" for the model's own.
        device, precision, head_bits, cache: as `engine.model.load`.
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
        """What clients call the model."""
        return self.path.resolve().name

    def check(self) -> None:
        """Look at what can be known without the weights.

        Raises:
            InputError: files that are missing or damaged, an architecture that is not ours.
        """
        read_decoder_config(CheckpointReader(self.path).config)

    def service(self, metrics: Metrics) -> Service:
        """Load the model.

        Raises:
            GptqBelleError: it cannot be loaded.
        """
        model = load(self.path, device=self.device, precision=self.precision, head_bits=self.head_bits,
                     cache=self.cache)
        return Service(model, self.name, self.limits, metrics, self.prompt_style)


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """Where to listen, and who may ask.

    Attributes:
        host, port: of the address.
        api_key: that clients have to send; None where everybody may ask.
        allow_unauthenticated: listen beyond loopback without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allow_unauthenticated: bool = False

    @property
    def local(self) -> bool:
        """Whether only this machine reaches it."""
        return is_loopback(self.host)

    def check(self) -> None:
        """Refuse to be open by mistake.

        Raises:
            UsageError: beyond loopback without a key.
        """
        if not self.local and not self.api_key and not self.allow_unauthenticated:
            raise UsageError(f"listening on {self.host} without an API key would let everybody there use this model",
                             "Give --api-key, or say --allow-unauthenticated.")

    def refused(self) -> HardwareError:
        """What is said where the address cannot be listened on."""
        return HardwareError(f"cannot listen on {self.host}:{self.port}", "Choose another --port or --host.")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def address(host: str, port: int) -> str:
    """The URL of a server."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
