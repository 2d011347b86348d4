"""Small sets of test cases that hold every combination of the values of a few axes."""

import itertools
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any


def covering_cases(axes: Mapping[str, Sequence[Any]], strength: int, seed: int) -> list[dict[str, Any]]:
    """Choose cases in which every combination of values of any `strength` axes occurs.

    Each case begins with a combination that is still missing; then each other axis, in random order, gets the value
    that adds most missing combinations.

    Args:
        axes: values of each axis.
        seed: cases depend on it.
    """
    rng, names = random.Random(seed), list(axes)
    missing = {tuple(zip(chosen, numbers, strict=True)): None for chosen in itertools.combinations(names, strength)
               for numbers in itertools.product(*(range(len(axes[name])) for name in chosen))}
    cases = []
    while missing:
        numbers = dict(rng.choice(list(missing)))
        for name in rng.sample(names, len(names)):
            if name not in numbers:
                numbers[name] = _best(name, numbers, missing, names, strength, rng.sample(
                    range(len(axes[name])), len(axes[name])))
        for chosen in itertools.combinations(names, strength):
            missing.pop(tuple((name, numbers[name]) for name in chosen), None)
        cases.append({name: axes[name][numbers[name]] for name in names})
    return cases


def _best(name: str, numbers: Mapping[str, int], missing: Mapping[Any, None], names: Sequence[str], strength: int,
          values: Sequence[int]) -> int:
    """The value of an axis that completes most missing combinations with the axes that have one."""
    def added(value: int) -> int:
        whole = {**numbers, name: value}
        return sum(tuple((one, whole[one]) for one in names if one in others or one == name) in missing
                   for others in itertools.combinations(numbers, strength - 1))

    return max(values, key=added)


def random_cases(axes: Mapping[str, Sequence[Any]], count: int) -> tuple[int, list[dict[str, Any]]]:
    """Random cases and their seed, which is new in every run; set GRID_SEED to repeat a run."""
    seed = int(os.environ.get("GRID_SEED") or random.SystemRandom().randrange(2**32))
    rng = random.Random(seed)
    return seed, [{name: rng.choice(values) for name, values in axes.items()} for _ in range(count)]
