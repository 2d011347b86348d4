"""How to quantize: the settings of a job, their validation, and the dictionary that stands in a checkpoint."""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from gptq_belle import __version__
from gptq_belle.errors import UsageError
from gptq_belle.formats.quantize_config import BITS
from gptq_belle.quantization.presets import DISABLED, PRESETS, Techniques, techniques_of

GROUP_SIZES = (32, 64, 128, -1)
HEAD_BITS = (16, 8, 4)
METHODS = ("gptq", "rtn")
EXPRESSION = "Write it as Python's re takes it; a dot in a name is '\\.'."
OVERRIDABLE = ("bits", "group_size", "sym")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Override:
    """Other settings for some linears; see `overrides.parse_override` for the way they are given on the command line.

    Attributes:
        pattern: a regular expression that `re.match` holds against full names of linears, from their start on.
        bits, group_size, sym: as in `QuantConfig`; None leaves the job's.
        skip: leave the linears in float16.

    Raises:
        UsageError: no regular expression, a value that is not allowed, or nothing that it changes.
    """

    pattern: str
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UsageError(f"override {self.pattern!r} is no regular expression: {error}",
                             EXPRESSION) from error
        if self.bits is not None:
            _check("bits", self.bits, BITS)
        if self.group_size is not None:
            _check("group size", self.group_size, GROUP_SIZES)
        if self.sym not in (None, True, False):
            raise UsageError(f"sym {self.sym} is not allowed", "Choose true or false.")
        if self.skip == bool(self.values()):
            raise UsageError(f"override {self.pattern!r} {'changes what it skips' if self.skip else 'changes nothing'}",
                             f"Name at least one of {', '.join(OVERRIDABLE)}, or skip alone.")

    def values(self) -> dict[str, Any]:
        """What it sets, by `QuantConfig`'s names."""
        values = {name: getattr(self, name) for name in OVERRIDABLE}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, init=False)
class QuantConfig:
    """Settings of one quantization job.

    Attributes:
        bits: bits a weight, one of 2, 3, 4, 8.
        group_size: inputs that share a scale and a zero point: 32, 64, 128, or -1 for a whole row.
        sym: one fixed zero point in the middle of the codes, 2**(bits - 1), instead of one a group.
        act_order: solve columns by falling Hessian diagonal; groups follow that order. ``desc_act``, its name on disk,
            can be given and read instead.
        damp: first damping tried, as a share of the Hessian's mean diagonal (GPTQ, section 3.3, step 3).
            ``damp_percent``, its name on disk, can be given and read instead.
        method: "gptq", or "rtn" for rounding to nearest without calibration.
        preset: "best", "fast" for plain GPTQ, or "max", which also tunes the whole model (see
            `quantization.presets.PRESETS`).
        without: ideas of the preset that are switched off (see `quantization.presets.DISABLED`).
        positive_scales: for readers that cannot take negative ones; costs a little quality.
        head_bits: 16 leaves embedding and head in float16, as every reader expects; with 8 or 4 the head (of BLOOM the
            embedding too) is stored packed under names of our own, which `gptq_belle.load` alone reads.
        overrides: other settings for some linears (``dynamic`` on disk); no two may match the same one.
        auto_bits: a budget, in bits a weight on average ("4.5") or as a file size ("3.2GB"), under which the job
            chooses 4 or 8 bits for every stage that no override settles (see `quantization.auto_bits`).

    Raises:
        UsageError: a value is not among the allowed ones, or the two names of a setting have different values.
    """

    bits: int
    group_size: int
    sym: bool
    act_order: bool
    damp: float
    method: str
    preset: str
    without: tuple[str, ...]
    positive_scales: bool
    overrides: tuple[Override, ...]
    head_bits: int
    auto_bits: str | None

    # Written by hand: a generated one cannot tell an alias that contradicts a default from one that was left out.
    def __init__(self, bits: int = 4, group_size: int = 128, sym: bool = True, act_order: bool | None = None,
                 damp: float | None = None, method: str = "gptq", preset: str = "best", without: tuple[str, ...] = (),
                 positive_scales: bool = False, overrides: tuple[Override, ...] = (), head_bits: int = 16,
                 auto_bits: str | None = None, *, desc_act: bool | None = None,
                 damp_percent: float | None = None) -> None:
        values = {"bits": bits, "group_size": group_size, "sym": sym,
                  "act_order": _either("act_order", act_order, "desc_act", desc_act, default=False),
                  "damp": _either("damp", damp, "damp_percent", damp_percent, default=0.01),
                  "method": method, "preset": preset, "without": without, "positive_scales": positive_scales,
                  "overrides": overrides, "head_bits": head_bits, "auto_bits": auto_bits}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check()

    @property
    def desc_act(self) -> bool:
        """The same as `act_order`."""
        return self.act_order

    @property
    def damp_percent(self) -> float:
        """The same as `damp`."""
        return self.damp

    def _check(self) -> None:
        _check("bits", self.bits, BITS)
        _check("head bits", self.head_bits, HEAD_BITS)
        _check("group size", self.group_size, GROUP_SIZES)
        _check("method", self.method, METHODS)
        _check("preset", self.preset, tuple(PRESETS))
        for idea in self.without:
            _check("without", idea, tuple(DISABLED))
        if not 0 < self.damp < 1:
            raise UsageError(f"damp {self.damp} is not allowed", "Choose a number above 0 and below 1, such as 0.01.")

    @property
    def techniques(self) -> Techniques:
        """What the job does beyond plain GPTQ; nothing where it rounds to nearest."""
        return techniques_of("fast") if self.method == "rtn" else techniques_of(self.preset, self.without)

    @property
    def checkpoint_format(self) -> str:
        """"gptq" (zero points stored minus one) where all is symmetric, "gptq_v2" (stored as they are) where not.

        Readers disagree on whether a stored 15 means 16 or 0, and an asymmetric zero point can be 0. It is one for the
        whole file: `of` does not change it.
        """
        return "gptq" if self.sym and all(override.sym is None for override in self.overrides) else "gptq_v2"

    def of(self, name: str) -> "QuantConfig | None":
        """The settings of one linear, by its full name; None where it stays in float16."""
        for override in self.overrides:
            if re.match(override.pattern, name):
                return None if override.skip else replace(self, **override.values())
        return self

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
            "static_groups": self.techniques.static_order and not self.act_order,
            "damp_percent": self.damp,
            **({"dynamic": self._dynamic()} if self.overrides else {}),
            **({"head_bits": self.head_bits} if self.head_bits != 16 else {}),
            "meta": {"quantizer": [f"gptq_belle:{__version__}"], "settings": asdict(self)},
        }

    def _dynamic(self) -> dict[str, dict[str, Any]]:
        """The overrides as GPTQModel writes them: by "+:" or, where nothing is quantized, "-:" and the expression."""
        return {f"{'-' if override.skip else '+'}:{override.pattern}": override.values() for override in self.overrides}


def _check(option: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        names = ", ".join(map(str, allowed))
        raise UsageError(f"{option} {value} is not allowed", f"Choose one of {names}.")


def _either(name: str, value: T | None, alias: str, other: T | None, *, default: T) -> T:
    """The value of a setting that has two names."""
    if value is not None and other is not None and value != other:
        raise UsageError(f"{name} is {value} and its alias {alias} is {other}", f"Give {name} only.")
    return value if value is not None else other if other is not None else default
