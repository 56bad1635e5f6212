"""Shares a budget of parameters out over layers so that the squared error of all of them is least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankscope.errors import ConfigError
from rankscope.noise import Array

MOST_STATES = 1 << 21
"""Combinations kept in the exact search. Beyond, the most promising are kept and the answer is no longer proven."""

Counts = NDArray[np.int64]


class RankAllocation(NamedTuple):
    """A rank for each layer. ``above``: by how much Σσ² left out can exceed the least possible; 0 where proven."""

    ranks: list[int]
    above: float


class _CostClass(NamedTuple):
    """All further ranks of one price. ``gains[n]``: the energy of the n largest; ``owners``: whose they are."""

    cost: int
    gains: Array
    owners: Counts

    @property
    def values(self) -> Array:
        """σ² of each, largest first."""
        return np.diff(self.gains)


def allocate_ranks(energies: Sequence[Array], costs: Sequence[int], budget: int) -> RankAllocation:
    """Ranks, at least 1 each, with Σ rank · cost ≤ budget and the least Σσ² left out.

    Where every rank costs the same, the largest σ² of all layers together are best (Eckart & Young 1936, layer by
    layer). Otherwise this is a knapsack. Ranks of one price are taken in the order of their σ², so only *how many* of
    each price is open: those whose loss against the relaxation (largest σ² per parameter, the last one in part) is at
    most that of the greedy answer are searched (Dantzig 1957; Martello & Toth 1990, §2.4).

    Args:
        energies: for each layer its σ² > 0, largest first; may be empty.
        costs: parameters of one rank of each layer.
        budget: parameters in all.

    Raises:
        ConfigError: the budget does not pay for rank 1 everywhere.
    """
    least = sum(costs)
    if budget < least:
        raise ConfigError(
            f"a budget of {budget} parameters is below the {least} of rank 1 in each of {len(costs)} layers; "
            f"give at least {least}, or fewer layers"
        )
    classes = _classes(energies, costs)
    counts, above = _best(classes, budget - least) if classes else (np.zeros(0, np.int64), 0.0)
    ranks = np.ones(len(costs), dtype=np.int64)
    for kind, count in zip(classes, counts, strict=True):
        ranks += np.bincount(kind.owners[:count], minlength=len(costs))
    return RankAllocation([int(rank) for rank in ranks], above)


def _classes(energies: Sequence[Array], costs: Sequence[int]) -> list[_CostClass]:
    found = []
    for cost in sorted(set(costs)):
        members = [i for i, price in enumerate(costs) if price == cost and len(energies[i]) > 1]
        if not members:
            continue
        values = np.concatenate([energies[i][1:] for i in members])
        owners = np.concatenate([np.full(len(energies[i]) - 1, i, dtype=np.int64) for i in members])
        order = np.argsort(-values, kind="stable")
        gains = np.concatenate([[0.0], np.cumsum(values[order])])
        found.append(_CostClass(cost, gains, owners[order]))
    return found


def _best(classes: Sequence[_CostClass], spare: int) -> tuple[Counts, float]:
    """How many of each class, and the gap to the relaxation that the search left open (0: none)."""
    greedy, relaxed, price, start = _greedy(classes, spare)
    worth = _worth(classes, greedy)
    gap = relaxed - worth
    if gap <= 0 or len(classes) == 1:
        return greedy, 0.0
    slack = gap + 1e-12 * relaxed
    losses = [_loss(kind, n, price) for kind, n in zip(classes, start, strict=True)]
    windows = [np.flatnonzero(loss <= slack) for loss in losses]
    order = sorted(range(len(classes)), key=lambda c: len(windows[c]))
    states, proven = _combinations(classes, losses, windows, order[:-1], spare, slack)
    found = _complete_states(classes, states, windows[order[-1]], order[-1], spare)
    best = max(found, key=lambda counts: _worth(classes, counts), default=greedy)
    best = best if _worth(classes, best) > worth else greedy
    return best, 0.0 if proven else max(0.0, relaxed - _worth(classes, best))


def _worth(classes: Sequence[_CostClass], counts: Counts) -> float:
    return float(sum(kind.gains[n] for kind, n in zip(classes, counts, strict=True)))


def _greedy(classes: Sequence[_CostClass], spare: int) -> tuple[Counts, float, float, Counts]:
    """Counts by σ² per parameter, the relaxation's value, its price of a parameter, and its whole counts."""
    density = np.concatenate([kind.values / kind.cost for kind in classes])
    of = np.repeat(np.arange(len(classes)), [len(kind.owners) for kind in classes])
    costs = np.array([kind.cost for kind in classes])
    order = np.argsort(-density, kind="stable")
    paid = np.cumsum(costs[of[order]])
    whole = int(np.searchsorted(paid, spare, side="right"))
    start = np.bincount(of[order[:whole]], minlength=len(classes))
    left = spare - (int(paid[whole - 1]) if whole else 0)
    price = float(density[order[whole]]) if whole < len(order) else 0.0
    relaxed = _worth(classes, start) + price * left
    counts = start.copy()
    for c in of[order[whole:]]:  # what still fits, in the same order
        if costs[c] <= left:
            counts[c] += 1
            left -= int(costs[c])
        elif left < costs.min():
            break
    return counts, relaxed, price, start


def _loss(kind: _CostClass, start: int, price: float) -> Array:
    """What taking n of a class, n = 0, 1, …, loses against the relaxation when a parameter is worth ``price``."""
    profit = kind.gains - price * kind.cost * np.arange(len(kind.gains))
    loss: Array = profit[start] - profit
    return loss


class _States(NamedTuple):
    """Partial answers: their counts (states × classes), parameters spent, loss so far."""

    counts: Counts
    spent: Counts
    loss: Array


def _combinations(
    classes: Sequence[_CostClass],
    losses: Sequence[Array],
    windows: Sequence[Counts],
    order: Sequence[int],
    spare: int,
    slack: float,
) -> tuple[_States, bool]:
    """Every choice for the classes in ``order`` that can still be best, and whether none was dropped."""
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
    """The best whole answers: of the last class, as many as what is left pays for."""
    if not len(states.spent) or not len(window):
        return []
    most = np.minimum((spare - states.spent) // classes[last].cost, window[-1])
    worth = classes[last].gains[most]
    for c, kind in enumerate(classes):
        if c != last:
            worth = worth + kind.gains[states.counts[:, c]]
    best = int(np.argmax(worth))
    counts = states.counts[best].copy()
    counts[last] = most[best]
    return [counts]
