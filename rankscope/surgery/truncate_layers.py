"""Truncates many updates by one choice: what resize, extract and the algebra of adapters have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rankscope.errors import prefix_errors
from rankscope.formats.peft_write import FactorLayout
from rankscope.spectra import Spectrum
from rankscope.surgery.budget import allocate_ranks
from rankscope.surgery.surgery_result import LayerChange, error_over_norm
from rankscope.surgery.truncate import (
    Budget,
    LayerChoice,
    Rank,
    RankChoice,
    decompose,
    distance,
    fold_scale_and_round,
    is_zero,
    retained_energy,
    signal_energies,
    truncate_svd,
)
from rankscope.updates import LowRank, Update

Track = Callable[[list[Any]], Iterable[Any]]
"""Hands on the items of a list one by one and may show how far it is: ``iter``, or ``tqdm.tqdm``."""


@dataclass(frozen=True)
class LayerUpdate:
    """One update to be stored as factors. ``before``: parameters and rank (None: full) of what it came from."""

    name: str
    shape: tuple[int, int]
    place: FactorLayout
    dtype: torch.dtype
    read: Callable[[], Update]
    parameters: int
    rank: int | None

    @property
    def whole(self) -> bool:
        """Whether the factors can only go along as they are: a truncation would mix the groups of a convolution."""
        return self.place.groups > 1


class TruncatedLayers(NamedTuple):
    """The factors of each layer, scale 1, and what that changed."""

    factors: dict[str, LowRank]
    changes: tuple[LayerChange, ...]
    notes: list[str]


def truncate_layers(
    layers: Sequence[LayerUpdate], choice: RankChoice | None, track: Track = iter, zeros: bool = True
) -> TruncatedLayers:
    """Factors of every layer by a choice of ranks; without one the factors stay as they are, scale in B.

    A layer whose update is zero gets rank 1 of zeros, since PEFT knows no rank 0; without ``zeros`` it is left out.

    One update is in memory at a time, and the factors that are kept. A budget reads each update twice: its ranks
    depend on the singular values of all.

    Raises:
        RankscopeError: a layer that cannot be read, a budget below rank 1 everywhere, or noise that nothing tells.
    """
    notes = [
        f"{layer.name}: a convolution with groups, whose factors go along as they are"
        for layer in layers
        if layer.whole and choice is not None
    ]
    ranks: Mapping[str, int] = {}
    if isinstance(choice, Budget):
        ranks, more = _allocate_budget(layers, choice, track, zeros)
        notes += more
    factors: dict[str, LowRank] = {}
    changes = []
    for layer in track(list(layers)):
        with prefix_errors(f"layer {layer.name}"):
            after, change = _one(layer, choice, ranks.get(layer.name))
        if change.norm or zeros:
            factors[layer.name] = after
            changes.append(change)
    return TruncatedLayers(factors, tuple(changes), notes)


def _allocate_budget(
    layers: Sequence[LayerUpdate], choice: Budget, track: Track, zeros: bool
) -> tuple[dict[str, int], list[str]]:
    fixed = sum(layer.parameters for layer in layers if layer.whole)
    free, energies = [], []
    for layer in track([layer for layer in layers if not layer.whole]):
        with prefix_errors(f"layer {layer.name}"):
            update = layer.read()
            found = signal_energies(update, Spectrum.of(update))
        if zeros or len(found):
            free.append(layer)
            energies.append(found)
    costs = [layer.place.parameters(layer.shape, 1) for layer in free]
    allotted = allocate_ranks(energies, costs, choice.parameters - fixed)
    notes = []
    if allotted.above:
        share = allotted.above / sum(float(energy.sum()) for energy in energies)
        notes.append(f"the shares of the budget keep at most {share:.2g} of the energy less than the best there are")
    return dict(zip((layer.name for layer in free), allotted.ranks, strict=True)), notes


def _one(layer: LayerUpdate, choice: RankChoice | None, rank: int | None) -> tuple[LowRank, LayerChange]:
    update = layer.read()
    svd = decompose(update, choice.r if isinstance(choice, Rank) else rank)
    spectrum = Spectrum.from_values(update, svd.s)
    if is_zero(update, spectrum):
        return _zero(layer, update)
    if isinstance(choice, LayerChoice):
        rank = choice.rank(update, spectrum)
    if isinstance(update, LowRank) and (layer.whole or rank is None):
        after = fold_scale_and_round(update, layer.dtype)
    else:
        after = truncate_svd(svd, rank or 1, layer.dtype)
    norm, error = math.sqrt(spectrum.energy), distance(update, after)
    return after, _change(layer, after, norm, error, retained_energy(spectrum, after.nominal_rank))


def _zero(layer: LayerUpdate, update: Update) -> tuple[LowRank, LayerChange]:
    """The least factors of a layer that does not change: rank 1, or 1 for each group of a convolution."""
    r, device = layer.place.groups, update.device
    B = torch.zeros(layer.shape[0], r, dtype=layer.dtype, device=device)
    after = LowRank(B, torch.zeros(r, layer.shape[1], dtype=layer.dtype, device=device))
    return after, _change(layer, after, 0.0, 0.0, 1.0)


def _change(layer: LayerUpdate, after: LowRank, norm: float, error: float, retained: float) -> LayerChange:
    return LayerChange(
        name=layer.name,
        kind=layer.place.kind,
        shape=layer.shape,
        rank_before=layer.rank,
        rank_after=after.nominal_rank,
        parameters_before=layer.parameters,
        parameters_after=layer.place.parameters(layer.shape, after.nominal_rank),
        norm=norm,
        retained=retained,
        error=error,
        relative_error=error_over_norm(error, norm),
    )
