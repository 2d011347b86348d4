"""Settings of a quantization job: validation, presets, and the dictionary that is written to config.json."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from gptq_belle import __version__
from gptq_belle.errors import UsageError
from gptq_belle.formats.quantize_config import BITS, HEAD_BITS
from gptq_belle.formats.readers import TARGETS

GROUP_SIZES = (128, 64, 32, -1)
AUTO = "auto"  # the group size that a job replaces by the first of GROUP_SIZES that divides its linears' inputs
METHODS = ("gptq", "rtn")
REGEX_REMEDY = "Use the syntax of Python's re; a dot in a name is '\\.'."
OVERRIDABLE = ("bits", "group_size", "sym")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Techniques:
    """Techniques beyond plain GPTQ, which is all defaults.

    Attributes:
        search: search the scales by weighted rounding error instead of min-max (`grid.searched_grid`).
        static_order: quantize inputs in order of decreasing activation, in static groups (`solver.candidate_weights`).
        fold: fold channel scales into norms (`channel_scales`).
        sweeps: number of sweeps of scale refit and coordinate descent after GPTQ (`refine.refine`).
        alpha: how far targets move towards the full-precision model's outputs, 0 .. 1
            (`candidate_selection.full_precision_target`); 2 and 3 bits take 1.
        held_out_every: one in this many calibration rows is held out of the Hessians and decides between solutions
            (`candidate_selection.best_solution`); 0 for none.
        rounds: number of rounds of block refinement after the linears of a block are quantized (`block_refinement`).
    """

    search: bool = False
    static_order: bool = False
    fold: bool = False
    sweeps: int = 0
    alpha: float = 0.0
    held_out_every: int = 0
    rounds: int = 0

    @property
    def full_precision(self) -> bool:
        """Whether the activations of the full-precision model are needed."""
        return bool(self.alpha or self.rounds)

    def disable(self, names: Iterable[str]) -> "Techniques":
        """The techniques without those named, keys of `DISABLED_VALUES`."""
        techniques = self
        for name in names:
            techniques = replace(techniques, **DISABLED_VALUES[name])
        return techniques


_BEST = Techniques(search=True, static_order=True, fold=True, sweeps=6, alpha=0.5, held_out_every=16)
PRESETS = {"fast": Techniques(), "best": _BEST, "max": replace(_BEST, rounds=3)}
DISABLED_VALUES: dict[str, dict[str, Any]] = {  # values that disable a technique, by its name in `QuantConfig.without`
    "search": {"search": False},
    "order": {"static_order": False},
    "fold": {"fold": False},
    "refine": {"sweeps": 0},
    "targets": {"alpha": 0.0},
    "veto": {"held_out_every": 0},
    "block": {"rounds": 0},
}


@dataclass(frozen=True, slots=True)
class Override:
    """Different settings for some linears; `overrides.parse_override` parses them.

    Attributes:
        pattern: regular expression that is matched against full names of linears, from their start (`re.match`).
        bits, group_size, sym: as in `QuantConfig`; None keeps the job's value.
        skip: keep the linears in float16.

    Raises:
        UsageError: an invalid regular expression or value, or an override that changes nothing.
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
            raise UsageError(f"override {self.pattern!r} is not a regular expression: {error}",
                             REGEX_REMEDY) from error
        if self.bits is not None:
            _check("bits", self.bits, BITS)
        if self.group_size is not None:
            _check("group size", self.group_size, GROUP_SIZES)
        if self.sym not in (None, True, False):
            raise UsageError(f"sym {self.sym} is not allowed", "Choose true or false.")
        if self.skip == bool(self.values()):
            problem = "skips linears and changes them" if self.skip else "changes nothing"
            raise UsageError(f"override {self.pattern!r} {problem}",
                             f"Give at least one of {', '.join(OVERRIDABLE)}, or skip alone.")

    def values(self) -> dict[str, Any]:
        """The overridden values, by `QuantConfig`'s names."""
        values = {name: getattr(self, name) for name in OVERRIDABLE}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, init=False)
class QuantConfig:
    """Settings of one quantization job.

    Attributes:
        bits: bits per weight: 2, 3, 4 or 8.
        group_size: inputs that share a scale and a zero point: 32, 64, 128, -1 for one group per output channel, or
            "auto", which a job replaces by the largest of these that divides the inputs of the linears.
        sym: symmetric quantization: the zero point is always 2**(bits - 1).
        act_order: quantize columns in order of decreasing activation; groups follow that order. ``desc_act``, its name
            on disk, is an alias.
        damp: first damping, as a share of the Hessian's mean diagonal (GPTQ, section 3.3, step 3). ``damp_percent``,
            its name on disk, is an alias.
        method: "gptq", or "rtn" for rounding to nearest without calibration.
        preset: "fast" for plain GPTQ, "best", or "max", which also refines blocks as a whole (`PRESETS`).
        without: techniques of the preset to disable (`DISABLED_VALUES`).
        positive_scales: for readers that do not accept negative scales; costs a little quality.
        head_bits: 16 keeps embedding and head in float16, as every reader expects; with 8 or 4 the head (of BLOOM the
            embedding too) is stored packed, in a format that only `gptq_belle.load` reads.
        overrides: different settings for some linears (``dynamic`` on disk); no two may match the same linear.
        auto_bits: a budget, in average bits per weight ("4.5") or as a file size ("3.2GB"), within which the job
            chooses 4 or 8 bits for every stage that no override matches (see `auto_bits.choose_bits`).
        reader: a program that shall read the result: a key of `readers.TARGETS`, or None. A job adds the overrides that
            the program needs, and refuses settings that it does not read (`reader_settings`).

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
    reader: str | None

    # A generated __init__ could not distinguish an omitted setting from one that contradicts its alias.
    def __init__(self, bits: int = 4, group_size: int | str = 128, sym: bool = True,
                 act_order: bool | None = None, damp: float | None = None, method: str = "gptq", preset: str = "best",
                 without: tuple[str, ...] = (), positive_scales: bool = False, overrides: tuple[Override, ...] = (),
                 head_bits: int = 16, auto_bits: str | None = None, reader: str | None = None, *,
                 desc_act: bool | None = None, damp_percent: float | None = None) -> None:
        values = {"bits": bits, "group_size": group_size, "sym": sym,
                  "act_order": _either("act_order", act_order, "desc_act", desc_act, default=False),
                  "damp": _either("damp", damp, "damp_percent", damp_percent, default=0.01),
                  "method": method, "preset": preset, "without": without, "positive_scales": positive_scales,
                  "overrides": overrides, "head_bits": head_bits, "auto_bits": auto_bits,
                  "reader": reader}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check()

    @property
    def desc_act(self) -> bool:
        """Alias of `act_order`."""
        return self.act_order

    @property
    def damp_percent(self) -> float:
        """Alias of `damp`."""
        return self.damp

    def _check(self) -> None:
        _check("bits", self.bits, BITS)
        _check("head bits", self.head_bits, HEAD_BITS)
        _check("group size", self.group_size, (*GROUP_SIZES, AUTO))
        _check("method", self.method, METHODS)
        _check("for", self.reader, (None, *TARGETS))
        _check("preset", self.preset, tuple(PRESETS))
        for name in self.without:
            _check("without", name, tuple(DISABLED_VALUES))
        if not 0 < self.damp < 1:
            raise UsageError(f"damp {self.damp} is not allowed", "Choose a number above 0 and below 1, such as 0.01.")

    @property
    def techniques(self) -> Techniques:
        """The preset's techniques without those that are disabled; none for rounding to nearest.

        With 2 and 3 bits targets move the whole way: there the errors to correct are large beside the sample's noise.
        """
        chosen = Techniques() if self.method == "rtn" else PRESETS[self.preset].disable(self.without)
        return replace(chosen, alpha=1.0) if chosen.alpha and self.bits <= 3 else chosen

    @property
    def checkpoint_format(self) -> str:
        """"gptq" (zero points stored minus one) where all linears are symmetric, else "gptq_v2" (stored unchanged).

        Readers disagree on whether a stored 15 means 16 or 0, and an asymmetric zero point can be 0. The format holds
        for the whole file: `for_linear` does not change it.
        """
        return "gptq" if self.sym and all(override.sym is None for override in self.overrides) else "gptq_v2"

    def for_linear(self, name: str) -> "QuantConfig | None":
        """The settings of one linear, by its full name; None where it stays in float16."""
        for override in self.overrides:
            if re.match(override.pattern, name):
                return None if override.skip else replace(self, **override.values())
        return self

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` of config.json, which is also the content of quantize_config.json."""
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
            "meta": {"quantizer": [f"gptq_belle:{__version__}"], "settings": asdict(self),
                     "channel_scales": self.techniques.fold},
        }

    def _dynamic(self) -> dict[str, dict[str, Any]]:
        """The overrides in GPTQModel's format: "+:" before a pattern, "-:" before one to skip."""
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
