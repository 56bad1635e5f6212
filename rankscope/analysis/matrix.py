"""``compare`` of three sources and more: which of them learned the same? Every pair beside its chance level."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, ClassVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from rankscope.analysis.common_layers import CommonLayers, find_common_layers
from rankscope.analysis.comparison import ComparedSource, initial_folder
from rankscope.analysis.display import distinct_names, html_table
from rankscope.analysis.layer_comparison import (
    MATRIX_TITLES,
    MAX_DIRECTIONS,
    SIDES,
    DecomposedUpdate,
    MatrixKind,
    check_comparison,
    difference_norm,
    select_matrix,
)
from rankscope.analysis.matching import Renames
from rankscope.analysis.matrix_tables import overlap_table
from rankscope.analysis.sources import Readable, Source, Track, matches_any, pattern_list
from rankscope.analysis.worker_threads import compute_items
from rankscope.errors import ConfigError, RankscopeError, ShapeError, prefix_errors
from rankscope.formats.abstract_store import SkippedItem, examples
from rankscope.formats.opening import Opening
from rankscope.inference import holm
from rankscope.linalg import transpose_matmul
from rankscope.noise import Array
from rankscope.result import Result
from rankscope.subspace import Side, chance_of_cells
from rankscope.updates import Update

IntArray = np.ndarray[tuple[int], np.dtype[np.int64]]
SCHEMA = "rankscope.matrix/1"
SIGNIFICANCE_LEVEL = 0.05
"""A corrected p below it is beyond chance."""


class SideMatrix(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """One side of every pair, all (n, n) and symmetric.

    ``overlap``: median over layers of φ(k, k), k the smaller number of directions of the two; ``expected``: that of
    random directions, likewise. ``p``: that more than half of the layers overlap so much by chance, corrected for all
    pairs and sides (``combine_p_values``); NaN on the diagonal.
    """

    overlap: Array
    expected: Array
    p: Array


class MatrixResult(Result, frozen=True, eq=False, kw_only=True, dict=True):
    """n sources, each with each, over the ``layers`` that all of them have; ``to_json`` and ``from_json`` are inverses.

    ``titles``: the sources' names, shortened as far as they can be told apart. ``norms``: (n,), ‖·‖_F. ``cosine`` and
    ``relative_difference`` ‖a − b‖/max(‖a‖, ‖b‖): (n, n), of all layers as one vector; None for factors, which are
    known up to a change of basis only. ``distance``: (n, n), 1 − φ, the mean of the sides; ``chance_distance`` the same
    of random directions. ``joins``: (n − 1, 4), the tree of average linkage on ``distance``, as
    ``scipy.cluster.hierarchy`` has it. ``alone``: for each source, its layers that not all have.
    """

    schemas: ClassVar = (SCHEMA,)
    schema: str = SCHEMA
    sources: tuple[ComparedSource, ...]
    titles: tuple[str, ...]
    of: MatrixKind
    layers: tuple[str, ...]
    left: SideMatrix | None
    right: SideMatrix | None
    norms: Array
    cosine: Array | None
    relative_difference: Array | None
    distance: Array
    chance_distance: Array
    joins: Array
    alone: tuple[tuple[str, ...], ...]
    skipped: tuple[SkippedItem, ...]
    notes: tuple[str, ...]

    @property
    def sides(self) -> dict[str, SideMatrix]:
        """Those of left and right that were compared."""
        both = {"left": self.left, "right": self.right}
        return {name: side for name, side in both.items() if side is not None}

    @property
    def order(self) -> list[int]:
        """The sources as the leaves of the tree stand, alike ones side by side."""
        from scipy.cluster.hierarchy import leaves_list

        return [int(leaf) for leaf in leaves_list(self.joins)]

    @property
    def matrices(self) -> str:
        """What ``of`` means, in words."""
        return MATRIX_TITLES[self.of]

    @cached_property
    def beyond_chance(self) -> tuple[bool, ...]:
        """(n − 1): of each join, whether at least half of the pairs that it brings together overlap beyond chance, on
        one side or the other."""
        least = np.fmin.reduce([side.p for side in self.sides.values()])
        return tuple(bool(np.median(least[np.ix_(*both)]) < SIGNIFICANCE_LEVEL) for both in self.branch_members)

    @property
    def branch_members(self) -> list[tuple[list[int], list[int]]]:
        """The sources on both sides of each join, ascending."""
        members = [[leaf] for leaf in range(len(self.titles))]
        found = []
        for a, b in self.joins[:, :2].astype(int):
            one, other = sorted((members[a], members[b]))
            found.append((one, other))
            members.append(sorted(one + other))
        return found

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All of two different sources, i < j."""
        return list(combinations(range(len(self.titles)), 2))

    def __repr__(self) -> str:
        n, sides = len(self.titles), self.sides.items()
        pairs = np.triu_indices(n, 1)
        said = [
            f"{name} overlap {s.overlap[pairs].min():.3f} to {s.overlap[pairs].max():.3f} "
            f"(chance {np.median(s.expected[pairs]):.3f})"
            for name, s in sides
        ]
        return f"MatrixResult({n} sources, {len(self.layers)} layers of {self.matrices}, {', '.join(said)})"

    def _repr_html_(self) -> str:
        return html_table(repr(self), overlap_table(self), self.notes)


def compare_all(
    sources: Sequence[Readable],
    base: str | os.PathLike[str] | None = None,
    layers: str | Iterable[str] | None = None,
    top: int | None = None,
    of: MatrixKind = "update",
    device: torch.device | str = "cpu",
    track: Track = iter,
    rename: Renames = (),
    alpha: float | None = None,
    workers: int | None = None,
    initial: Sequence[str | os.PathLike[str] | None] = (),
) -> MatrixResult:
    """Overlap, cosine and distance of every pair of several sources, and the tree of which are alike.

    Each source is read once and decomposed once. The updates of one layer are in memory together, those of all sources.

    Args:
        sources: paths (adapter, run, file of updates, checkpoint), stores, or mappings of names to updates; at least
            two.
        rename: (from, to): parts of names, and what they are read as, in every source that has them.
        initial: the adapter before training of the first source, of the second …, as for ``formats.store.open``.
        base, layers, top, of, device, track, alpha, workers: as for ``compare``.

    Raises:
        RankscopeError: no layer that all have, none that can be compared, or one that holds NaN or infinity.
    """
    if isinstance(sources, str | os.PathLike) or len(sources) < 2:
        raise ConfigError("a matrix of comparisons needs a list of at least two sources")
    check_comparison(top, of)
    openings = Opening(base, alpha, device=device).for_sources(initial, len(sources))
    return compare_each_with_each(sources, openings, layers, top, of, track, rename, workers)


def compare_each_with_each(
    sources: Sequence[Readable],
    openings: Sequence[Opening],
    layers: str | Iterable[str] | None = None,
    top: int | None = None,
    of: MatrixKind = "update",
    track: Track = iter,
    rename: Renames = (),
    workers: int | None = None,
) -> MatrixResult:
    """``compare_all``, with the settings of how each source is opened as one value.

    Raises:
        RankscopeError: as for ``compare_all``.
    """
    check_comparison(top, of)
    opened = [
        Source.of(source, opening, f"source {number}")
        for number, (source, opening) in enumerate(zip(sources, openings, strict=True), 1)
    ]
    patterns = pattern_list(layers)
    shared = _select_layers(find_common_layers(opened, rename), patterns)
    titles = distinct_names([source.label for source in opened])
    measured, unread = _measure_layers(shared, titles, top, of, track, workers)
    if not measured:
        raise RankscopeError(f"no layer can be compared in all sources; {unread[0].name}: {unread[0].reason}")
    listed = [
        SkippedItem(one.name, f"in {title}: {one.reason}")
        for title, x in zip(titles, opened, strict=True)
        for one in x.skipped
    ]
    started = _initial_notes(opened, patterns) if of == "update" else []
    result = _result(opened, titles, of, measured, shared, [*unread, *shared.skipped, *listed])
    return msgspec.structs.replace(result, notes=(*_notes(opened, titles, measured, top, result), *started))


def _select_layers(shared: CommonLayers, patterns: Sequence[str] | None) -> CommonLayers:
    """The layers that one of the patterns fits under one of their names."""
    if patterns is None:
        return shared

    kept = [names for names in shared.layers if matches_any(names, patterns)]
    if not kept:
        known = examples([names[0] for names in shared.layers])
        raise RankscopeError(f"no layer that all share fits {', '.join(map(repr, patterns))}; they share {known}")
    alone = [tuple(name for name in names if matches_any([name], patterns)) for names in shared.alone]
    return shared._replace(layers=kept, alone=alone)


@dataclass(frozen=True, eq=False, repr=False)
class _LayerMatrices:
    """One layer of all sources, (n, n): ``overlap``, ``expected`` and ``p`` by side, ``inner``, ``apart`` ‖a − b‖."""

    name: str
    norms: Array
    overlap: dict[Side, Array]
    expected: dict[Side, Array]
    p: dict[Side, Array]
    inner: Array | None
    apart: Array | None
    capped: bool


def _measure_layers(
    shared: CommonLayers, titles: Sequence[str], top: int | None, of: MatrixKind, track: Track, workers: int | None
) -> tuple[list[_LayerMatrices], list[SkippedItem]]:
    def kind(names: tuple[str, ...]) -> Hashable | None:
        kinds = tuple(source.batch_key(name) for source, name in zip(shared.sources, names, strict=True))
        return None if None in kinds else kinds

    def read(names: tuple[str, ...]) -> list[Update]:
        return [source.read(name) for source, name in zip(shared.sources, names, strict=True)]

    def one(names: tuple[str, ...], updates: Sequence[Update]) -> _LayerMatrices | SkippedItem:
        try:
            parts = list(_parts(names, updates, shared.sources, titles, top, of))
            return _layer(names[0], parts, of)
        except ShapeError as error:
            return SkippedItem(names[0], str(error))

    def cost(names: tuple[str, ...]) -> float:
        return sum(source.cost(name) for source, name in zip(shared.sources, names, strict=True))

    outcomes = compute_items(shared.layers, kind, read, one, shared.sources[0].device, workers, track, cost=cost)
    found = [outcome for outcome in outcomes if isinstance(outcome, _LayerMatrices)]
    return found, [outcome for outcome in outcomes if isinstance(outcome, SkippedItem)]


@dataclass(frozen=True, eq=False, repr=False)
class _UpdateDirections:
    """What is needed of one update once it is decomposed. ``columns``: orthonormal, (d, c), the first ``k`` of them
    compared; of a product all, with their σ ``values`` (c,), so that inner products follow; of another k, without."""

    update: Update
    norm: float
    k: int
    columns: dict[Side, Tensor]
    values: Array | None


def _parts(
    names: Sequence[str],
    updates: Sequence[Update],
    sources: Sequence[Source],
    titles: Sequence[str],
    top: int | None,
    of: MatrixKind,
) -> Iterator[_UpdateDirections]:
    """Each update taken apart; of a full one only the directions that are compared stay in memory."""
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


def _layer(name: str, parts: Sequence[_UpdateDirections], of: MatrixKind) -> _LayerMatrices:
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
    return _LayerMatrices(
        name=name,
        norms=norms,
        overlap=overlap,
        expected={side: found.expected for side, found in chance.items()},
        p={side: found.p for side, found in chance.items()},
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
    found = np.ones((len(k), len(k)))
    for size in np.unique(k):
        kept = position < size
        sums = _block_sums(squared * np.outer(kept, kept), starts) / size
        found = np.where(smaller == size, sums, found)
    found = np.minimum((found + found.T) / 2, 1.0)
    np.fill_diagonal(found, 1.0)
    return found


def _inner(parts: Sequence[_UpdateDirections], products: dict[Side, Array], starts: IntArray) -> Array:
    """⟨a, b⟩ of all pairs; of two products Σ_ij σ_i·σ'_j·(UᵀU')_ij·(VᵀV')_ij."""
    widths = np.diff([*starts, len(products["left"])])
    sigma = np.concatenate(
        [np.zeros(width) if part.values is None else part.values for part, width in zip(parts, widths, strict=True)]
    )
    found = _block_sums(products["left"] * products["right"] * np.outer(sigma, sigma), starts)
    found = (found + found.T) / 2
    for i, j in combinations(range(len(parts)), 2):
        if parts[i].values is None or parts[j].values is None:
            found[i, j] = found[j, i] = parts[i].update.inner(parts[j].update)
    np.fill_diagonal(found, [part.norm**2 for part in parts])
    return found


def _apart(parts: Sequence[_UpdateDirections], inner: Array, norms: Array) -> Array:
    """‖a − b‖_F of all pairs."""
    found = np.zeros_like(inner)
    for i, j in combinations(range(len(parts)), 2):
        pair = float(norms[i]), float(norms[j])
        found[i, j] = found[j, i] = difference_norm(parts[i].update, parts[j].update, float(inner[i, j]), pair)
    return found


def combine_p_values(p: Sequence[Array]) -> list[Array]:
    """p of every pair, from those of its layers, for each side: (layers, n, n) → (n, n), NaN on the diagonal.

    That k = ⌊L/2⌋ + 1 of L layers, more than half, are p_(k) or less by chance has a probability of at most L/k·p_(k),
    however the layers depend on each other (Rüger 1978); then Holm's correction for all pairs and sides.
    """
    found = []
    for side in p:
        count = len(side)
        k = count // 2 + 1
        found.append(np.minimum(np.sort(side, axis=0)[k - 1] * (count / k), 1.0))
    n = found[0].shape[0]
    upper = np.triu_indices(n, 1)
    corrected = np.split(holm(np.concatenate([one[upper] for one in found])), len(found))
    for one, values in zip(found, corrected, strict=True):
        one[upper] = values
        one.T[upper] = values
        np.fill_diagonal(one, np.nan)
    return found


def _result(
    opened: Sequence[Source],
    titles: Sequence[str],
    of: MatrixKind,
    measured: Sequence[_LayerMatrices],
    shared: CommonLayers,
    skipped: Sequence[SkippedItem],
) -> MatrixResult:
    names = SIDES[of]
    corrected = combine_p_values([np.stack([layer.p[side] for layer in measured]) for side in names])
    sides = {
        side: SideMatrix(
            overlap=np.median([layer.overlap[side] for layer in measured], axis=0),
            expected=np.median([layer.expected[side] for layer in measured], axis=0),
            p=p,
        )
        for side, p in zip(names, corrected, strict=True)
    }
    norms = np.sqrt(np.sum([layer.norms**2 for layer in measured], axis=0))
    distance = 1 - np.mean([side.overlap for side in sides.values()], axis=0)
    cosines, apart = _sizes(measured, norms)
    return MatrixResult(
        sources=tuple(ComparedSource(path=source.label, kind=source.kind) for source in opened),
        titles=tuple(titles),
        of=of,
        layers=tuple(layer.name for layer in measured),
        left=sides.get("left"),
        right=sides.get("right"),
        norms=norms,
        cosine=cosines,
        relative_difference=apart,
        distance=distance,
        chance_distance=1 - np.mean([side.expected for side in sides.values()], axis=0),
        joins=_joins(distance),
        alone=tuple(shared.alone),
        skipped=tuple(skipped),
        notes=(),
    )


def _sizes(measured: Sequence[_LayerMatrices], norms: Array) -> tuple[Array | None, Array | None]:
    """Cosines and relative differences of all layers as one vector; None for factors."""
    inner = [layer.inner for layer in measured if layer.inner is not None]
    apart = [layer.apart**2 for layer in measured if layer.apart is not None]
    if not inner:
        return None, None
    total = np.sum(inner, axis=0)
    cosines = np.clip(total / np.outer(norms, norms), -1.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    return cosines, np.sqrt(np.sum(apart, axis=0)) / np.maximum.outer(norms, norms)


def _joins(distance: Array) -> Array:
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    joins: Array = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return joins


def _initial_notes(opened: Sequence[Source], patterns: list[str] | None) -> list[str]:
    """Remarks on the factors A before training, where every source is a run that kept them."""
    folders = [folder for folder in map(initial_folder, opened) if folder is not None]
    if len(folders) < len(opened):
        return []
    try:
        before = compare_all(folders, layers=patterns, of="A", device=opened[0].device).right
    except RankscopeError as error:  # they only serve a remark; the adapters themselves can be compared
        return [f"the factors before training cannot be compared: {error}"]
    alike = 0 if before is None else _count(_excess(before) > 0.1)
    if not alike:
        return []
    return [
        f"in {_pairs(alike)} the rows of A overlapped before training: these share initial factors, and their right "
        'side proves nothing; judge by the left (of="B")'
    ]


def _notes(
    opened: Sequence[Source],
    titles: Sequence[str],
    measured: Sequence[_LayerMatrices],
    top: int | None,
    result: MatrixResult,
) -> Iterator[str]:
    for title, source in zip(titles, opened, strict=True):
        yield from (f"{title}: {note}" for note in source.notes)
    if top is None and any(layer.capped for layer in measured):
        yield f"of a full update the top {MAX_DIRECTIONS} directions are compared; top (--top) takes more or fewer"
    left, right = result.left, result.right
    if right is not None:
        alike = _excess(right) > 0.9
        alike &= True if left is None else _excess(left) < 0.25
        if count := _count(alike):
            yield (
                f"in {_pairs(count)} the A side (right) is the same or nearly so and the left is not: an overlap of "
                "the A side alone proves nothing, they may share their initial factors"
            )


def _excess(side: SideMatrix) -> Array:
    """How far pairs overlap beyond chance: 0 at chance, 1 for equal spans; 0 where chance fills all."""
    room = 1 - side.expected
    found: Array = np.divide(side.overlap - side.expected, room, out=np.zeros_like(room), where=room > 1e-6)
    return found


def _count(alike: Any) -> int:
    """How many pairs."""
    return int(np.triu(alike, 1).sum())


def _pairs(n: int) -> str:
    return f"{n} pair{'' if n == 1 else 's'}"
