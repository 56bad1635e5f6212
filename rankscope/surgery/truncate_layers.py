"""Truncates many updates by one choice of ranks: what resize, extract and the sums of adapters have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rankscope.errors import prefix_errors
from rankscope.formats.peft_write import FactorLayout
from rankscope.spectra import Spectrum
from rankscope.surgery.budget import allocate_ranks
from rankscope.surgery.operation import Operation
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
from rankscope.track import Track
from rankscope.updates import LowRank, Update


@dataclass(frozen=True)
class LayerUpdate:
    """One update that is to be stored as factors.

    Attributes:
        name: path of the module.
        shape: (out, in) of the update.
        place: how PEFT stores the factors.
        dtype: dtype of the written factors.
        read: reads the update.
        parameters: how many numbers hold the update in the input.
        rank: its rank in the input; None: a full matrix.
    """

    name: str
    shape: tuple[int, int]
    place: FactorLayout
    dtype: torch.dtype
    read: Callable[[], Update]
    parameters: int
    rank: int | None

    @property
    def keeps_factors(self) -> bool:
        """Whether the factors can only be copied: a truncation would mix the groups of a convolution."""
        return self.place.groups > 1


class TruncatedLayers(NamedTuple):
    """``factors`` of each layer, (out, r) and (r, in) with scale 1; ``changes``: what the truncation did to each."""

    factors: dict[str, LowRank]
    changes: tuple[LayerChange, ...]
    notes: list[str]


def truncate_layers(layers: Sequence[LayerUpdate], operation: Operation, keep_zeros: bool = True) -> TruncatedLayers:
    """Factors of every layer by the operation's choice of ranks; without a choice all are kept, with the scale in B.

    A layer whose update is zero gets rank 1 of zeros, since PEFT has no rank 0; without ``keep_zeros`` it is left out.

    One update at a time is in memory, beside the factors that are kept. A budget reads each update twice, since its
    ranks depend on the singular values of all layers.

    Raises:
        RankscopeError: a layer that cannot be read, a budget below rank 1 in every layer, or a choice by noise where
            nothing tells noise from signal.
    """
    choice = operation.choice
    notes = [
        f"{layer.name}: a convolution with groups, whose factors are kept as they are"
        for layer in layers
        if layer.keeps_factors and choice is not None
    ]
    ranks: Mapping[str, int] = {}
    if isinstance(choice, Budget):
        ranks, budget_notes = _allocate_budget(layers, choice, operation.track, keep_zeros)
        notes += budget_notes
    factors: dict[str, LowRank] = {}
    changes = []
    for layer in operation.track(list(layers)):
        with prefix_errors(f"layer {layer.name}"):
            after, change = _truncate_layer(layer, choice, ranks.get(layer.name))
        if change.norm or keep_zeros:
            factors[layer.name] = after
            changes.append(change)
    return TruncatedLayers(factors, tuple(changes), notes)


def _allocate_budget(
    layers: Sequence[LayerUpdate], choice: Budget, track: Track, keep_zeros: bool
) -> tuple[dict[str, int], list[str]]:
    """The rank of each layer that can be truncated, and a note where the ranks are not proven to be the best."""
    fixed = sum(layer.parameters for layer in layers if layer.keeps_factors)
    truncatable, energies = [], []
    for layer in track([layer for layer in layers if not layer.keeps_factors]):
        with prefix_errors(f"layer {layer.name}"):
            update = layer.read()
            squares = signal_energies(update, Spectrum.of(update))
        if keep_zeros or len(squares):
            truncatable.append(layer)
            energies.append(squares)
    costs = [layer.place.parameters(layer.shape, 1) for layer in truncatable]
    allocation = allocate_ranks(energies, costs, choice.parameters - fixed)
    notes = []
    if allocation.above:
        share = allocation.above / sum(float(energy.sum()) for energy in energies)
        notes.append(f"the ranks that the budget gave keep at most {share:.2g} of the energy less than the best ranks")
    return dict(zip((layer.name for layer in truncatable), allocation.ranks, strict=True)), notes


def _truncate_layer(layer: LayerUpdate, choice: RankChoice | None, rank: int | None) -> tuple[LowRank, LayerChange]:
    """The factors of one layer, of ``rank`` where a budget gave one, and what that did to the update."""
    update = layer.read()
    svd = decompose(update, choice.r if isinstance(choice, Rank) else rank)
    spectrum = Spectrum.from_values(update, svd.s)
    if is_zero(update, spectrum):
        return _zero_factors(layer, update)
    if isinstance(choice, LayerChoice):
        rank = choice.rank(update, spectrum)
    if isinstance(update, LowRank) and (layer.keeps_factors or rank is None):
        after = fold_scale_and_round(update, layer.dtype)
    else:
        after = truncate_svd(svd, rank or 1, layer.dtype)
    norm, error = math.sqrt(spectrum.energy), distance(update, after)
    return after, _change(layer, after, norm, error, retained_energy(spectrum, after.nominal_rank))


def _zero_factors(layer: LayerUpdate, update: Update) -> tuple[LowRank, LayerChange]:
    """The smallest factors of a layer that does not change: rank 1, or rank 1 for each group of a convolution."""
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
