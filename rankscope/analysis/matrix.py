"""``compare`` of three or more sources: which of them learned the same, every pair beside chance."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import torch

from rankscope.analysis.common_layers import CommonLayers, find_common_layers
from rankscope.analysis.comparison import ComparedSource, initial_folder
from rankscope.analysis.display import distinct_names
from rankscope.analysis.layer_comparison import SIDES, ComparisonSettings, MatrixKind
from rankscope.analysis.layer_matrices import LayerMatrices, combine_p_values, measure_layers
from rankscope.analysis.matching import Renames
from rankscope.analysis.matrix_notes import initial_notes, matrix_notes
from rankscope.analysis.matrix_result import SIGNIFICANCE_LEVEL as SIGNIFICANCE_LEVEL
from rankscope.analysis.matrix_result import MatrixResult as MatrixResult
from rankscope.analysis.matrix_result import SideMatrix as SideMatrix
from rankscope.analysis.sources import Readable, Source, matches_any, pattern_list
from rankscope.errors import ConfigError, RankscopeError
from rankscope.formats.abstract_store import SkippedItem, examples
from rankscope.formats.opening import Opening
from rankscope.noise import Array
from rankscope.track import Track


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
    """Overlap, cosine and distance of every pair of several sources, and the tree that joins similar ones.

    Each source is read and decomposed once. The updates of one layer are in memory together for all sources.

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
    settings = ComparisonSettings(layers, top, of, track, rename, workers)
    openings = Opening(base, alpha, device=device).for_sources(initial, len(sources))
    return compare_each_with_each(sources, openings, settings)


def compare_each_with_each(
    sources: Sequence[Readable], openings: Sequence[Opening], settings: ComparisonSettings
) -> MatrixResult:
    """``compare_all`` of sources, each with its opening.

    Raises:
        RankscopeError: as for ``compare_all``.
    """
    opened = [
        Source.of(source, opening, f"source {number}")
        for number, (source, opening) in enumerate(zip(sources, openings, strict=True), 1)
    ]
    patterns, of = pattern_list(settings.layers), settings.of
    shared = _select_layers(find_common_layers(opened, settings.rename), patterns)
    titles = distinct_names([source.label for source in opened])
    measured, unread = measure_layers(shared, titles, settings)
    if not measured:
        raise RankscopeError(f"no layer can be compared in all sources; {unread[0].name}: {unread[0].reason}")
    listed = [
        SkippedItem(item.name, f"in {title}: {item.reason}")
        for title, source in zip(titles, opened, strict=True)
        for item in source.skipped
    ]
    before = _initial_notes(opened, patterns) if of == "update" else []
    result = _assemble_result(opened, titles, of, measured, shared, [*unread, *shared.skipped, *listed])
    notes = (*matrix_notes(opened, titles, measured, settings.top, result), *before)
    return msgspec.structs.replace(result, notes=notes)


def _select_layers(shared: CommonLayers, patterns: Sequence[str] | None) -> CommonLayers:
    """The layers of which a pattern fits the name in some source."""
    if patterns is None:
        return shared

    kept = [names for names in shared.layers if matches_any(names, patterns)]
    if not kept:
        known = examples([names[0] for names in shared.layers])
        raise RankscopeError(f"no layer that all share fits {', '.join(map(repr, patterns))}; they share {known}")
    alone = [tuple(name for name in names if matches_any([name], patterns)) for names in shared.alone]
    return shared._replace(layers=kept, alone=alone)


def _assemble_result(
    opened: Sequence[Source],
    titles: Sequence[str],
    of: MatrixKind,
    measured: Sequence[LayerMatrices],
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


def _sizes(measured: Sequence[LayerMatrices], norms: Array) -> tuple[Array | None, Array | None]:
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
    """Notes on the factors A before training, if every source is a run that kept them."""
    folders = [folder for folder in map(initial_folder, opened) if folder is not None]
    if len(folders) < len(opened):
        return []
    try:
        before = compare_all(folders, layers=patterns, of="A", device=opened[0].device).right
    except RankscopeError as error:  # only a note depends on them
        return [f"the factors before training cannot be compared: {error}"]
    return initial_notes(before)
