"""How to quantize: the settings of a job, their validation, and the dictionary that stands in a checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gptq_belle import __version__
from gptq_belle.errors import UsageError
from gptq_belle.quantization.recipe import IDEAS, RECIPES, Recipe, recipe

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, -1)
METHODS = ("gptq", "rtn")


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """Settings of one quantization job.

    Attributes:
        bits: bits a weight, one of 2, 3, 4, 8.
        group_size: inputs that share a scale and a zero point: 32, 64, 128, or -1 for a whole row.
        sym: one fixed zero point in the middle of the codes, 2**(bits - 1), instead of one a group.
        act_order: solve columns by falling Hessian diagonal; groups follow that order (``desc_act`` on disk).
        damp: first damping tried, as a share of the Hessian's mean diagonal (GPTQ, section 3.3, step 3).
        method: "gptq", or "rtn" for rounding to nearest without calibration.
        preset: "best", or "fast" for plain GPTQ (see `quantization.recipe.RECIPES`).
        without: ideas of the preset that are switched off (see `quantization.recipe.IDEAS`).
        positive_scales: for readers that cannot take negative ones; costs a little quality.

    Raises:
        UsageError: a value is not among the allowed ones; the message names the option and lists them.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    act_order: bool = False
    damp: float = 0.01
    method: str = "gptq"
    preset: str = "best"
    without: tuple[str, ...] = ()
    positive_scales: bool = False

    def __post_init__(self) -> None:
        _check("bits", self.bits, BITS)
        _check("group size", self.group_size, GROUP_SIZES)
        _check("method", self.method, METHODS)
        _check("preset", self.preset, tuple(RECIPES))
        for idea in self.without:
            _check("without", idea, tuple(IDEAS))
        if not 0 < self.damp < 1:
            raise UsageError(f"damp {self.damp} is not allowed", "Choose a number above 0 and below 1, such as 0.01.")

    @property
    def recipe(self) -> Recipe:
        """What the job does beyond plain GPTQ; nothing where it rounds to nearest."""
        return recipe("fast") if self.method == "rtn" else recipe(self.preset, self.without)

    @property
    def checkpoint_format(self) -> str:
        """"gptq" (zero points stored minus one) where symmetric, "gptq_v2" (stored as they are) where not.

        Readers disagree on whether a stored 15 means 16 or 0, and an asymmetric zero point can be 0.
        """
        return "gptq" if self.sym else "gptq_v2"

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` of config.json, which is also the whole of quantize_config.json."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.act_order,
            "sym": self.sym,
            "checkpoint_format": self.checkpoint_format,
            "format": self.checkpoint_format,
            "pack_dtype": "int32",
            "lm_head": False,
            "true_sequential": True,
            "static_groups": self.recipe.static_order and not self.act_order,
            "damp_percent": self.damp,
            "meta": {"quantizer": [f"gptq_belle:{__version__}"], "settings": asdict(self)},
        }


def written_by_us(quantization_config: Mapping[str, Any]) -> bool:
    """True where the dictionary of a checkpoint says that gptq_belle produced it."""
    meta = quantization_config.get("meta")
    names = meta.get("quantizer") if isinstance(meta, Mapping) else None
    return isinstance(names, list) and any(str(name).startswith("gptq_belle:") for name in names)


def _check(option: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        names = ", ".join(map(str, allowed))
        raise UsageError(f"{option} {value} is not allowed", f"Choose one of {names}.")
