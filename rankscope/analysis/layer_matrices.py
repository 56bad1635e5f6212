"""One layer of several sources: overlap, chance, inner product and distance of every pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from rankscope.analysis.common_layers import CommonLayers
from rankscope.analysis.layer_comparison import (
    MAX_DIRECTIONS,
    SIDES,
    ComparisonSettings,
    DecomposedUpdate,
    MatrixKind,
    difference_norm,
    select_matrix,
)
from rankscope.analysis.sources import Source
from rankscope.analysis.worker_threads import compute_items, job_on_sources
from rankscope.errors import ShapeError, prefix_errors
from rankscope.formats.abstract_store import SkippedItem
from rankscope.inference import holm
from rankscope.linalg import transpose_matmul
from rankscope.noise import Array
from rankscope.subspace import Side, chance_of_cells
from rankscope.updates import Update

IntArray = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, eq=False, repr=False)
class LayerMatrices:
    """One layer of all sources, (n, n): ``overlap``, ``expected`` and ``p`` by side, ``inner``, ``apart`` ‖a − b‖."""

    name: str
    norms: Array
    overlap: dict[Side, Array]
    expected: dict[Side, Array]
    p: dict[Side, Array]
    inner: Array | None
    apart: Array | None
    capped: bool


def measure_layers(
    shared: CommonLayers, titles: Sequence[str], settings: ComparisonSettings
) -> tuple[list[LayerMatrices], list[SkippedItem]]:
    """Compare every common layer of all sources; layers that cannot be compared are skipped."""

    def measure_layer(names: tuple[str, ...], updates: Sequence[Update]) -> LayerMatrices | SkippedItem:
        try:
            parts = list(_decompose_updates(names, updates, shared.sources, titles, settings))
            return _combine(names[0], parts, settings.of)
        except ShapeError as error:
            return SkippedItem(names[0], str(error))

    job = job_on_sources(shared.sources, measure_layer)
    outcomes = compute_items(shared.layers, job, shared.sources[0].device, settings.workers, settings.track)
    measured = [outcome for outcome in outcomes if isinstance(outcome, LayerMatrices)]
    return measured, [outcome for outcome in outcomes if isinstance(outcome, SkippedItem)]


@dataclass(frozen=True, eq=False, repr=False)
class _UpdateDirections:
    """The parts of a decomposed update that stay in memory.

    ``columns``: orthonormal directions of each side, (d, c), of which the first ``k`` are compared. A product keeps all
    of them and their σ ``values`` (c,), from which inner products follow; any other update keeps k, without values.
    """

    update: Update
    norm: float
    k: int
    columns: dict[Side, Tensor]
    values: Array | None


def _decompose_updates(
    names: Sequence[str],
    updates: Sequence[Update],
    sources: Sequence[Source],
    titles: Sequence[str],
    settings: ComparisonSettings,
) -> Iterator[_UpdateDirections]:
    """Decompose each update; of a full one only the compared directions stay in memory."""
    for name, update, source, title in zip(names, updates, sources, titles, strict=True):
        if update.shape != updates[0].shape:
            raise ShapeError(f"its shape is {update.shape} in {title} and {updates[0].shape} in {titles[0]}")
        try:
            with prefix_errors(source.layer_label(name)):
                matrix = select_matrix(update, settings.of)
                decomposed = DecomposedUpdate.of(matrix, settings.top)
        except ShapeError as error:
            raise ShapeError(f"in {title}: {error.__cause__ or error}") from error
        svd = {"left": decomposed.svd.U, "right": decomposed.svd.V}
        columns: dict[Side, Tensor] = {
            side: svd[side].to_dense() if decomposed.thin else decomposed.sides[side].basis
            for side in SIDES[settings.of]
        }
        values = decomposed.svd.s.double().cpu().numpy() if decomposed.thin else None
        yield _UpdateDirections(matrix, decomposed.norm, decomposed.sides["left"].k, columns, values)


def _combine(name: str, parts: Sequence[_UpdateDirections], of: MatrixKind) -> LayerMatrices:
    widths = [next(iter(part.columns.values())).shape[1] for part in parts]
    starts: IntArray = np.cumsum([0, *widths[:-1]])
    products = {side: _products([part.columns[side] for part in parts]) for side in SIDES[of]}
    k: IntArray = np.array([part.k for part in parts])
    norms = np.array([part.norm for part in parts])
    smaller = np.minimum.outer(k, k).astype(float)
    overlap: dict[Side, Array] = {side: _overlaps(product, starts, k) for side, product in products.items()}
    chance = {
        side: chance_of_cells(smaller, smaller, overlap[side], parts[0].columns[side].shape[0]) for side in products
    }
    inner = _inner(parts, products, starts) if of == "update" else None
    full = [part for part in parts if part.values is None]
    return LayerMatrices(
        name=name,
        norms=norms,
        overlap=overlap,
        expected={side: level.expected for side, level in chance.items()},
        p={side: level.p for side, level in chance.items()},
        inner=inner,
        apart=None if inner is None else _apart(parts, inner, norms),
        capped=any(part.k == MAX_DIRECTIONS < min(part.update.shape) for part in full),
    )


def _products(columns: Sequence[Tensor]) -> Array:
    """UᵀV of all pairs as blocks of one matrix on the host; one large product is faster than many small ones."""
    stacked = torch.cat(list(columns), dim=1)
    product: Array = transpose_matmul(stacked, stacked).double().cpu().numpy()
    return product


def _block_sums(matrix: Array, starts: IntArray) -> Array:
    """(n, n): sums over the blocks of rows and columns that begin at ``starts``."""
    sums: Array = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    return sums


def _overlaps(product: Array, starts: IntArray, k: IntArray) -> Array:
    """φ(k, k) of all pairs, k the smaller number of directions of the two; symmetric, 1 on the diagonal."""
    squared = product**2
    position = np.arange(len(product)) - np.repeat(starts, np.diff([*starts, len(product)]))
    smaller = np.minimum.outer(k, k)
    overlaps = np.ones((len(k), len(k)))
    for size in np.unique(k):
        kept = position < size
        sums = _block_sums(squared * np.outer(kept, kept), starts) / size
        overlaps = np.where(smaller == size, sums, overlaps)
    overlaps = np.minimum((overlaps + overlaps.T) / 2, 1.0)
    np.fill_diagonal(overlaps, 1.0)
    return overlaps


def _inner(parts: Sequence[_UpdateDirections], products: dict[Side, Array], starts: IntArray) -> Array:
    """⟨a, b⟩ of all pairs; for two products Σ_ij σ_i·σ'_j·(UᵀU')_ij·(VᵀV')_ij."""
    widths = np.diff([*starts, len(products["left"])])
    sigma = np.concatenate(
        [np.zeros(width) if part.values is None else part.values for part, width in zip(parts, widths, strict=True)]
    )
    inner = _block_sums(products["left"] * products["right"] * np.outer(sigma, sigma), starts)
    inner = (inner + inner.T) / 2
    for i, j in combinations(range(len(parts)), 2):
        if parts[i].values is None or parts[j].values is None:
            inner[i, j] = inner[j, i] = parts[i].update.inner(parts[j].update)
    np.fill_diagonal(inner, [part.norm**2 for part in parts])
    return inner


def _apart(parts: Sequence[_UpdateDirections], inner: Array, norms: Array) -> Array:
    """‖a − b‖_F of all pairs."""
    distances = np.zeros_like(inner)
    for i, j in combinations(range(len(parts)), 2):
        pair = float(norms[i]), float(norms[j])
        distances[i, j] = distances[j, i] = difference_norm(parts[i].update, parts[j].update, float(inner[i, j]), pair)
    return distances


def combine_p_values(p: Sequence[Array]) -> list[Array]:
    """Combine the p of layers, for each side: (layers, n, n) → (n, n), NaN on the diagonal.

    With k = ⌊L/2⌋ + 1, more than half of the L layers, the combined p is L/k·p_(k), which holds however the layers
    depend on each other (Rüger 1978). Then Holm's correction for all pairs and sides follows.
    """
    combined = []
    for side in p:
        count = len(side)
        k = count // 2 + 1
        combined.append(np.minimum(np.sort(side, axis=0)[k - 1] * (count / k), 1.0))
    n = combined[0].shape[0]
    upper = np.triu_indices(n, 1)
    corrected = np.split(holm(np.concatenate([matrix[upper] for matrix in combined])), len(combined))
    for matrix, values in zip(combined, corrected, strict=True):
        matrix[upper] = values
        matrix.T[upper] = values
        np.fill_diagonal(matrix, np.nan)
    return combined
