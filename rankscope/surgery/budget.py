"""Distributes a budget of parameters over layers so that the total squared error is least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankscope.errors import ConfigError
from rankscope.noise import Array

MOST_STATES = 1 << 21
"""Most combinations in the exact search. With more, the best are kept and the answer is not proven."""

Counts = NDArray[np.int64]


class RankAllocation(NamedTuple):
    """A rank for each layer. ``above``: how far the lost Σσ² can be above the least possible; 0 if proven."""

    ranks: list[int]
    above: float


class _CostClass(NamedTuple):
    """The ranks beyond 1 of all layers in which a rank has the same cost, in parameters.

    ``gains[n]``: the energy of the n largest σ; ``owners``: the layer of each σ. Both largest σ first.
    """

    cost: int
    gains: Array
    owners: Counts

    @property
    def values(self) -> Array:
        """σ², largest first."""
        return np.diff(self.gains)


def allocate_ranks(energies: Sequence[Array], costs: Sequence[int], budget: int) -> RankAllocation:
    """Ranks, at least 1 each, with Σ rank · cost ≤ budget and the least Σσ² left out.

    Where every rank has the same cost, the largest σ² of all layers together are best (Eckart & Young 1936, layer by
    layer). Otherwise this is a knapsack problem. Ranks of one cost are taken in the order of their σ², so only the
    number of ranks of each cost is unknown. The search covers the numbers whose loss against the linear relaxation
    (largest σ² per parameter, the last one in part) is at most that of the greedy answer (Dantzig 1957; Martello &
    Toth 1990, §2.4).

    Args:
        energies: for each layer its σ² > 0, largest first; may be empty.
        costs: for each layer the number of parameters of one rank.
        budget: number of parameters in all layers together.

    Raises:
        ConfigError: the budget is too small for rank 1 in every layer.
    """
    least = sum(costs)
    if budget < least:
        raise ConfigError(
            f"a budget of {budget} parameters is below the {least} of rank 1 in each of {len(costs)} layers; "
            f"give at least {least}, or fewer layers"
        )
    classes = _cost_classes(energies, costs)
    counts, above = _choose_counts(classes, budget - least) if classes else (np.zeros(0, np.int64), 0.0)
    ranks = np.ones(len(costs), dtype=np.int64)
    for kind, count in zip(classes, counts, strict=True):
        ranks += np.bincount(kind.owners[:count], minlength=len(costs))
    return RankAllocation([int(rank) for rank in ranks], above)


def _cost_classes(energies: Sequence[Array], costs: Sequence[int]) -> list[_CostClass]:
    """One class for each cost, ascending; layers without further ranks are left out."""
    classes = []
    for cost in sorted(set(costs)):
        members = [i for i, price in enumerate(costs) if price == cost and len(energies[i]) > 1]
        if not members:
            continue
        values = np.concatenate([energies[i][1:] for i in members])
        owners = np.concatenate([np.full(len(energies[i]) - 1, i, dtype=np.int64) for i in members])
        order = np.argsort(-values, kind="stable")
        gains = np.concatenate([[0.0], np.cumsum(values[order])])
        classes.append(_CostClass(cost, gains, owners[order]))
    return classes


def _choose_counts(classes: Sequence[_CostClass], spare: int) -> tuple[Counts, float]:
    """How many ranks of each class, and the gap to the relaxation that the search could not close (0: none)."""
    greedy, relaxed, price, start = _choose_greedily(classes, spare)
    energy = _energy(classes, greedy)
    gap = relaxed - energy
    if gap <= 0 or len(classes) == 1:
        return greedy, 0.0
    slack = gap + 1e-12 * relaxed
    losses = [_losses(kind, n, price) for kind, n in zip(classes, start, strict=True)]
    windows = [np.flatnonzero(loss <= slack) for loss in losses]
    order = sorted(range(len(classes)), key=lambda c: len(windows[c]))
    states, proven = _extend_states(classes, losses, windows, order[:-1], spare, slack)
    answers = _complete_states(classes, states, windows[order[-1]], order[-1], spare)
    best = max(answers, key=lambda counts: _energy(classes, counts), default=greedy)
    best = best if _energy(classes, best) > energy else greedy
    return best, 0.0 if proven else max(0.0, relaxed - _energy(classes, best))


def _energy(classes: Sequence[_CostClass], counts: Counts) -> float:
    return float(sum(kind.gains[n] for kind, n in zip(classes, counts, strict=True)))


def _choose_greedily(classes: Sequence[_CostClass], spare: int) -> tuple[Counts, float, float, Counts]:
    """The greedy counts by σ² per parameter, then the relaxation: its energy, energy per parameter, whole counts."""
    density = np.concatenate([kind.values / kind.cost for kind in classes])
    class_of = np.repeat(np.arange(len(classes)), [len(kind.owners) for kind in classes])
    costs = np.array([kind.cost for kind in classes])
    order = np.argsort(-density, kind="stable")
    paid = np.cumsum(costs[class_of[order]])
    whole = int(np.searchsorted(paid, spare, side="right"))
    start = np.bincount(class_of[order[:whole]], minlength=len(classes))
    left = spare - (int(paid[whole - 1]) if whole else 0)
    price = float(density[order[whole]]) if whole < len(order) else 0.0
    relaxed = _energy(classes, start) + price * left
    counts = start.copy()
    for c in class_of[order[whole:]]:  # add what still fits, in the same order
        if costs[c] <= left:
            counts[c] += 1
            left -= int(costs[c])
        elif left < costs.min():
            break
    return counts, relaxed, price, start


def _losses(kind: _CostClass, start: int, price: float) -> Array:
    """Loss against the relaxation of taking n = 0, 1, … of a class, when a parameter gains ``price`` of energy."""
    profit = kind.gains - price * kind.cost * np.arange(len(kind.gains))
    loss: Array = profit[start] - profit
    return loss


class _States(NamedTuple):
    """Partial answers: counts (states, classes), parameters spent (states,), loss so far (states,)."""

    counts: Counts
    spent: Counts
    loss: Array


def _extend_states(
    classes: Sequence[_CostClass],
    losses: Sequence[Array],
    windows: Sequence[Counts],
    order: Sequence[int],
    spare: int,
    slack: float,
) -> tuple[_States, bool]:
    """All counts for the classes in ``order`` that can still be best, and whether none was dropped."""
    states = _States(np.zeros((1, len(classes)), np.int64), np.zeros(1, np.int64), np.zeros(1))
    proven = True
    for c in order:
        window = windows[c]
        room = max(1, MOST_STATES // max(1, len(window)))
        if len(states.loss) > room:
            kept = np.argpartition(states.loss, room)[:room]
            states = _States(states.counts[kept], states.spent[kept], states.loss[kept])
            proven = False
        spent = (states.spent[:, None] + classes[c].cost * window[None]).ravel()
        loss = (states.loss[:, None] + losses[c][window][None]).ravel()
        kept = np.flatnonzero((spent <= spare) & (loss <= slack))
        counts = states.counts[kept // len(window)]
        counts[:, c] = window[kept % len(window)]
        states = _States(counts, spent[kept], loss[kept])
    return states, proven


def _complete_states(
    classes: Sequence[_CostClass], states: _States, window: Counts, last: int, spare: int
) -> list[Counts]:
    """The best complete answer: of the last class, as many ranks as the rest of the budget allows."""
    if not len(states.spent) or not len(window):
        return []
    most = np.minimum((spare - states.spent) // classes[last].cost, window[-1])
    energy = classes[last].gains[most]
    for c, kind in enumerate(classes):
        if c != last:
            energy = energy + kind.gains[states.counts[:, c]]
    best = int(np.argmax(energy))
    counts = states.counts[best].copy()
    counts[last] = most[best]
    return [counts]
