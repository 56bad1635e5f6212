"""A budget of parameters over layers: never more error than any other shares, found by brute force."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest

from rankscope.errors import ConfigError
from rankscope.noise import Array
from rankscope.surgery import budget as module
from rankscope.surgery.budget import allocate_ranks


def left_out(energies: Sequence[Array], ranks: Sequence[int]) -> float:
    return float(sum(values[rank:].sum() for values, rank in zip(energies, ranks, strict=True)))


def cost(ranks: Sequence[int], costs: Sequence[int]) -> int:
    return sum(rank * price for rank, price in zip(ranks, costs, strict=True))


def least(energies: Sequence[Array], costs: Sequence[int], budget: int) -> float:
    """By trying every combination of ranks."""
    choices = [range(1, max(1, len(values)) + 1) for values in energies]
    return min(left_out(energies, ranks) for ranks in itertools.product(*choices) if cost(ranks, costs) <= budget)


def by_density(energies: Sequence[Array], costs: Sequence[int], budget: int) -> list[int]:
    """The plain greedy rule: largest σ² per parameter first, whatever still fits."""
    ranks, left = [1] * len(costs), budget - sum(costs)
    items = sorted(
        (
            (value / price, i)
            for i, (values, price) in enumerate(zip(energies, costs, strict=True))
            for value in values[1:]
        ),
        reverse=True,
    )
    for _, i in items:
        if costs[i] <= left:
            ranks[i], left = ranks[i] + 1, left - costs[i]
    return ranks


def case(rng: np.random.Generator, equal: bool) -> tuple[list[Array], list[int], int]:
    layers = int(rng.integers(1, 5))
    energies = [
        np.sort(rng.exponential(size=int(rng.integers(0, 5))) ** rng.integers(1, 4))[::-1] for _ in range(layers)
    ]
    costs = [int(price) for price in rng.integers(2, 9, size=layers)]
    costs = costs[:1] * layers if equal else costs
    return energies, costs, sum(costs) + int(rng.integers(0, 30))


@pytest.mark.parametrize("equal", [True, False])
def test_no_shares_of_the_budget_leave_out_less(equal: bool) -> None:
    rng = np.random.default_rng(1)
    worse = 0
    for _ in range(400):
        energies, costs, budget = case(rng, equal)
        found = allocate_ranks(energies, costs, budget)
        best = least(energies, costs, budget)
        assert found.above == 0
        assert min(found.ranks) >= 1
        assert cost(found.ranks, costs) <= budget
        assert left_out(energies, found.ranks) <= best + 1e-12 * left_out(energies, [0] * len(costs))
        worse += left_out(energies, by_density(energies, costs, budget)) > best + 1e-9
    # Negative control: for equal prices the greedy rule is optimal, for unequal ones it is not.
    assert (worse == 0) == equal


def test_uniform_ranks_are_worse() -> None:
    rng = np.random.default_rng(2)
    energies = [np.sort(rng.exponential(size=16) * 10.0**i)[::-1] for i in range(4)]
    costs = [24, 24, 40, 40]
    found = allocate_ranks(energies, costs, 6 * sum(costs))
    assert left_out(energies, found.ranks) < 0.5 * left_out(energies, [6] * 4)
    assert found.ranks[0] < 6 < found.ranks[3]


def test_ranks_that_gain_nothing_are_not_bought() -> None:
    assert allocate_ranks([np.array([4.0, 1.0]), np.array([]), np.array([9.0])], [3, 5, 7], 10**9) == ([2, 1, 1], 0)
    assert allocate_ranks([np.array([]), np.array([])], [3, 5], 8) == ([1, 1], 0)


def test_a_budget_below_rank_1() -> None:
    with pytest.raises(ConfigError, match="a budget of 7 parameters is below the 8 of rank 1 in each of 2 layers"):
        allocate_ranks([np.ones(2), np.ones(2)], [3, 5], 7)


def test_a_large_model_is_shared_out_at_once_and_proven() -> None:
    rng = np.random.default_rng(3)
    shapes = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)] * 40
    energies = [np.sort(rng.exponential(size=64) * np.exp(-np.arange(64) / 20))[::-1] ** 2 for _ in shapes]
    costs = [out + into for out, into in shapes]
    began = time.perf_counter()
    found = allocate_ranks(energies, costs, 123_456_789)
    assert time.perf_counter() - began < 5
    assert found.above == 0
    left = 123_456_789 - cost(found.ranks, costs)
    assert 0 <= left < max(costs)


def test_where_the_search_is_cut_short_the_gap_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_STATES", 1)
    rng = np.random.default_rng(4)
    open_gaps = 0
    for _ in range(300):
        energies, costs, budget = case(rng, equal=False)
        found = allocate_ranks(energies, costs, budget)
        best, total = least(energies, costs, budget), left_out(energies, [0] * len(costs))
        assert cost(found.ranks, costs) <= budget
        assert left_out(energies, found.ranks) <= best + found.above + 1e-12 * total
        open_gaps += found.above > 0
    assert open_gaps > 0


def test_a_search_that_could_be_endless_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter is worth the same, so that every combination could be best."""
    monkeypatch.setattr(module, "MOST_STATES", 1 << 12)
    energies = [np.full(500, float(price)) for price in (7, 11, 13, 17)]
    found = allocate_ranks(energies, [7, 11, 13, 17], 9001)
    worth = sum(price * (rank - 1) for price, rank in zip((7, 11, 13, 17), found.ranks, strict=True))
    assert found.above == pytest.approx(9001 - 48 - worth)
