"""One layer of several sources, each with each: overlap, chance, inner product and distance of every pair."""

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
    DecomposedUpdate,
    MatrixKind,
    difference_norm,
    select_matrix,
)
from rankscope.analysis.sources import Source, Track
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
    shared: CommonLayers, titles: Sequence[str], top: int | None, of: MatrixKind, track: Track, workers: int | None
) -> tuple[list[LayerMatrices], list[SkippedItem]]:
    def measure_layer(names: tuple[str, ...], updates: Sequence[Update]) -> LayerMatrices | SkippedItem:
        try:
            parts = list(_decompose_updates(names, updates, shared.sources, titles, top, of))
            return _combine(names[0], parts, of)
        except ShapeError as error:
            return SkippedItem(names[0], str(error))

    job = job_on_sources(shared.sources, measure_layer)
    outcomes = compute_items(shared.layers, job, shared.sources[0].device, workers, track)
    measured = [outcome for outcome in outcomes if isinstance(outcome, LayerMatrices)]
    return measured, [outcome for outcome in outcomes if isinstance(outcome, SkippedItem)]


@dataclass(frozen=True, eq=False, repr=False)
class _UpdateDirections:
    """What is kept of one update once it is decomposed.

    ``columns``: orthonormal directions of each side, (d, c); the first ``k`` of them are compared. Of a product these
    are all, with their σ ``values`` (c,), from which inner products follow; of any other update k, without values.
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
    top: int | None,
    of: MatrixKind,
) -> Iterator[_UpdateDirections]:
    """Decompose each update; of a full one only the directions that are compared stay in memory."""
    for name, update, source, title in zip(names, updates, sources, titles, strict=True):
        if update.shape != updates[0].shape:
            raise ShapeError(f"its shape is {update.shape} in {title} and {updates[0].shape} in {titles[0]}")
        try:
            with prefix_errors(source.layer_label(name)):
                matrix = select_matrix(update, of)
                whole = DecomposedUpdate.of(matrix, top)
        except ShapeError as error:
            raise ShapeError(f"in {title}: {error.__cause__ or error}") from error
        svd = {"left": whole.svd.U, "right": whole.svd.V}
        columns: dict[Side, Tensor] = {
            side: svd[side].to_dense() if whole.thin else whole.sides[side].basis for side in SIDES[of]
        }
        values = whole.svd.s.double().cpu().numpy() if whole.thin else None
        yield _UpdateDirections(matrix, whole.norm, whole.sides["left"].k, columns, values)


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
    """UᵀV of all pairs as blocks of one matrix, on the host: one multiplication, which fills the machine better than
    many small ones."""
    stacked = torch.cat(list(columns), dim=1)
    product: Array = transpose_matmul(stacked, stacked).double().cpu().numpy()
    return product


def _block_sums(matrix: Array, starts: IntArray) -> Array:
    """(n, n): the sums over the blocks that begin at ``starts`` in both directions."""
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
    """⟨a, b⟩ of all pairs; of two products Σ_ij σ_i·σ'_j·(UᵀU')_ij·(VᵀV')_ij."""
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
    """p of every pair, from those of its layers, for each side: (layers, n, n) → (n, n), NaN on the diagonal.

    That k = ⌊L/2⌋ + 1 of L layers, more than half, are p_(k) or less by chance has a probability of at most L/k·p_(k),
    however the layers depend on each other (Rüger 1978); then Holm's correction for all pairs and sides.
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
