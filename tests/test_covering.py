"""Sets of test cases that hold every combination of a few axes."""

from itertools import combinations, product

import pytest
from covering import covering_cases, random_cases

AXES = {"rows": (1, 8, 9, 64), "bits": (2, 3, 4, 8), "dtype": ("half", "brain"), "act_order": (False, True),
        "kind": ("float16", "int8", "bfloat16")}


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_combination_occurs(strength, seed):
    cases = covering_cases(AXES, strength, seed)
    for names in combinations(AXES, strength):
        found = {tuple(case[name] for name in names) for case in cases}
        assert found == set(product(*(AXES[name] for name in names)))
    largest = sorted(map(len, AXES.values()))[-strength:]
    fewest = 1
    for size in largest:
        fewest *= size
    assert fewest <= len(cases) <= 2 * fewest


def test_cases_depend_on_the_seed_only():
    assert covering_cases(AXES, 2, 5) == covering_cases(AXES, 2, 5) != covering_cases(AXES, 2, 6)


def test_random_cases_are_repeated_with_their_seed(monkeypatch):
    seed, cases = random_cases(AXES, 6)
    monkeypatch.setenv("GRID_SEED", str(seed))
    assert random_cases(AXES, 6) == (seed, cases)
    monkeypatch.setenv("GRID_SEED", str(seed + 1))
    assert random_cases(AXES, 6)[1] != cases
