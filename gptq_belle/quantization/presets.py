"""What a preset does beyond plain GPTQ: one table, and the names under which its ideas are switched off."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Techniques:
    """Which ideas a job follows; all at their zeros is plain GPTQ.

    Attributes:
        search: scales by weighted search instead of by the largest weight (`grid.searched_grid`).
        static_order: solve the most active inputs first, in groups that stay as they are (`solver.gptq`).
        sweeps: of scale refit and coordinate descent behind GPTQ (`refine.refine`).
        alpha: how far targets move towards the full-precision model's outputs, 0 .. 1
            (`solution_choice.full_precision_target`).
        held_out: every so manieth calibration row is seen by no Hessian, and decides between solutions
            (`candidates.best_solution`); 0 where there is nothing to decide.
        steps: of tuning the whole model behind its last block (`distill.distill`), at most.
    """

    search: bool = False
    static_order: bool = False
    sweeps: int = 0
    alpha: float = 0.0
    held_out: int = 0
    steps: int = 0


_BEST = Techniques(search=True, static_order=True, sweeps=2, alpha=0.5, held_out=16)
PRESETS = {
    "fast": Techniques(),
    "best": _BEST,
    "max": replace(_BEST, steps=100),
}
DISABLED: dict[str, dict[str, Any]] = {  # what is set where an idea is switched off
    "search": {"search": False},
    "order": {"static_order": False},
    "refine": {"sweeps": 0},
    "targets": {"alpha": 0.0},
    "veto": {"held_out": 0},
    "tuning": {"steps": 0},
}


def techniques_of(preset: str, without: Iterable[str] = ()) -> Techniques:
    """The recipe of a preset, some of its ideas switched off.

    Args:
        preset: a key of `PRESETS`.
        without: keys of `DISABLED`.
    """
    chosen = PRESETS[preset]
    for name in without:
        chosen = replace(chosen, **DISABLED[name])
    return chosen
