"""``compare``: whether two sets of updates point the same way, layer by layer, beside chance."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
import torch

from rankscope.analysis.comparison_tables import layer_table
from rankscope.analysis.display import html_table, short_name
from rankscope.analysis.layer_comparison import (
    CAPPED_NOTE,
    MATRIX_TITLES,
    MAX_DIRECTIONS,
    ComparisonSettings,
    LayerComparison,
    MatrixKind,
    compare_layers,
    cosine_similarity,
)
from rankscope.analysis.matching import MatchedSources, Renames, match_layers
from rankscope.analysis.sources import Readable, Source, matches_any, pattern_list
from rankscope.analysis.worker_threads import compute_items, job_on_sources
from rankscope.errors import RankscopeError, ShapeError, prefix_errors
from rankscope.formats.abstract_store import SkippedItem, examples
from rankscope.formats.names import Pairing
from rankscope.formats.opening import Opening
from rankscope.formats.study_layout import ADAPTER_FOLDER, INITIAL_FOLDER, RUN_NAME
from rankscope.result import Result, find_layer
from rankscope.track import Track
from rankscope.updates import Update

SCHEMA = "rankscope.compare/1"


class ComparedSource(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two sources."""

    path: str
    kind: str


class UnmatchedLayers(msgspec.Struct, frozen=True, kw_only=True):
    """Layers of each source without a partner in the other."""

    a: tuple[str, ...]
    b: tuple[str, ...]


class SideSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over layers: φ(k, k) with k the smaller number of directions, φ of all directions, chance beside each."""

    overlap: float
    expected: float
    whole: float
    whole_expected: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """All layers together; norms, cosine and relative difference take all layers as one vector.

    ``initial``: right side of the factors A before training, where both are runs that kept them.
    """

    left: SideSummary | None
    right: SideSummary | None
    initial: SideSummary | None
    norm_a: float
    norm_b: float
    cosine: float | None
    relative_difference: float | None

    @property
    def sides(self) -> dict[str, SideSummary]:
        """The sides that were compared, by name."""
        both = {"left": self.left, "right": self.right}
        return {name: side for name, side in both.items() if side is not None}


class CompareResult(Result, frozen=True, eq=False, kw_only=True):
    """Two sources, layer by layer; ``of`` tells which matrices were compared."""

    schemas: ClassVar = (SCHEMA,)
    schema: str = SCHEMA
    a: ComparedSource
    b: ComparedSource
    of: MatrixKind
    layers: tuple[LayerComparison, ...]
    summary: Summary
    unmatched: UnmatchedLayers
    skipped: tuple[SkippedItem, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values, with the chance level of each cell beside the grids."""
        value = super().to_json()
        for written, layer in zip(value["layers"], self.layers, strict=True):
            for name, side in layer.sides.items():
                written[name] |= {key: getattr(side, key).tolist() for key in ("expected", "z", "p")}
        return value

    def __getitem__(self, name: str) -> LayerComparison:
        """The layer with this name in a; KeyError where there is none."""
        return find_layer(self.layers, name)

    @property
    def titles(self) -> tuple[str, str]:
        """Short names of a and b."""
        return short_name(self.a.path), short_name(self.b.path)

    @property
    def matrices(self) -> str:
        """What ``of`` means, in words."""
        return MATRIX_TITLES[self.of]

    def __repr__(self) -> str:
        a, b = self.titles
        sides = self.summary.sides.items()
        parts = [f"{name} overlap {side.overlap:.3f} (chance {side.expected:.3f})" for name, side in sides]
        if self.summary.cosine is not None:
            parts.append(f"cosine {self.summary.cosine:.3f}")
        return f"CompareResult({a!r}, {b!r}: {len(self.layers)} layers of {self.matrices}, {', '.join(parts)})"

    def _repr_html_(self) -> str:
        return html_table(repr(self), layer_table(self), self.notes)


def compare(
    a: Readable,
    b: Readable,
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
) -> CompareResult:
    """Overlap, principal angles and distances of two sources of updates, layer by layer.

    Args:
        a, b: paths (adapter, run, file of updates, checkpoint), stores, or mappings of names to updates.
        base: checkpoint that a path's full weights were tuned from.
        layers: globs of whole names, or dotted parts of them (``q_proj``, ``layers.0``); None takes all.
        top: how many directions of each are compared at most. None takes all that are above rounding, at most
            ``MAX_DIRECTIONS`` of a full update.
        of: "update" compares ΔW, on both sides; "A" the right singular vectors of the factor A, as in the LoRA
            paper; "B" the left ones of B.
        device: where the decompositions run.
        track: wraps the list of pairs and may show progress.
        rename: (from, to): parts of the names in a, and what they are read as.
        alpha: α of a path's layers where the file has none.
        workers: threads that pairs of thin factors are shared out over, as for ``spectrum``.
        initial: the adapters of a and b before training, for those whose initialisation moved the base (PiSSA and
            others); None where there is none.

    A fused projection (``qkv_proj``, ``c_attn``, …) is compared by its blocks of rows, ``NAME:q`` …, where the other
    side has q, k and v of their own.

    Raises:
        RankscopeError: no layer in common, none that can be compared, or one that holds NaN or infinity.
    """
    settings = ComparisonSettings(layers, top, of, track, rename, workers)
    openings = Opening(base, alpha, device=device).for_sources(initial, 2)
    return compare_sources([a, b], openings, settings)


def compare_sources(
    sources: Sequence[Readable], openings: Sequence[Opening], settings: ComparisonSettings
) -> CompareResult:
    """``compare`` two sources, each with its opening.

    Raises:
        RankscopeError: as for ``compare``.
    """
    patterns, of = pattern_list(settings.layers), settings.of
    left, right = (Source.of(*source) for source in zip(sources, openings, "ab", strict=True))
    matched = match_layers(left, right, settings.rename)
    pairing = _select_pairs(matched, patterns)
    compared, skipped = _compare_pairs(matched.a, matched.b, pairing.pairs, settings)
    if not compared:
        raise RankscopeError(
            f"{left.label} and {right.label}: no layer can be compared; {skipped[0].name}: {skipped[0].reason}"
        )
    skipped += matched.skipped
    skipped += [
        SkippedItem(item.name, f"in {name}: {item.reason}")
        for name, source in (("a", left), ("b", right))
        for item in source.skipped
    ]
    before, unread = _initial(left, right, patterns) if of == "update" else (None, [])
    summary = _summary(compared, before)
    return CompareResult(
        a=ComparedSource(path=left.label, kind=left.kind),
        b=ComparedSource(path=right.label, kind=right.kind),
        of=of,
        layers=tuple(compared),
        summary=summary,
        unmatched=UnmatchedLayers(a=tuple(pairing.only_a), b=tuple(pairing.only_b)),
        skipped=tuple(skipped),
        notes=(*_notes(left, right, compared, summary, settings.top), *unread),
    )


def _select_pairs(matched: MatchedSources, patterns: list[str] | None) -> Pairing:
    """The partners of which a pattern fits the name in a or in b."""
    pairing = matched.pairing
    if patterns is None:
        return pairing

    kept = Pairing(
        [names for names in pairing.pairs if matches_any(names, patterns)],
        [name for name in pairing.only_a if matches_any([name], patterns)],
        [name for name in pairing.only_b if matches_any([name], patterns)],
    )
    if not kept.pairs:
        shared = [name for name, _ in pairing.pairs]
        raise RankscopeError(
            f"{matched.a.label} and {matched.b.label}: no layer in common fits {', '.join(map(repr, patterns))}; "
            f"they share {examples(shared)}"
        )
    return kept


def _compare_pairs(
    a: Source, b: Source, pairs: Sequence[tuple[str, ...]], settings: ComparisonSettings
) -> tuple[list[LayerComparison], list[SkippedItem]]:
    def compare_pair(names: Sequence[str], updates: Sequence[Update]) -> LayerComparison | SkippedItem:
        try:
            with prefix_errors(f"{a.layer_label(names[0])} against {b.label}"):
                return compare_layers(names[0], names[1], updates[0], updates[1], settings.top, settings.of)
        except ShapeError as error:
            return SkippedItem(names[0], str(error.__cause__ or error))

    job = job_on_sources([a, b], compare_pair)
    outcomes = compute_items(pairs, job, a.device, settings.workers, settings.track)
    layers = [outcome for outcome in outcomes if isinstance(outcome, LayerComparison)]
    return layers, [outcome for outcome in outcomes if isinstance(outcome, SkippedItem)]


def _summary(layers: Sequence[LayerComparison], initial: SideSummary | None) -> Summary:
    norm_a = math.sqrt(math.fsum(layer.norm_a**2 for layer in layers))
    norm_b = math.sqrt(math.fsum(layer.norm_b**2 for layer in layers))
    inner = [layer.inner for layer in layers if layer.inner is not None]
    differences = [
        (layer.relative_difference * max(layer.norm_a, layer.norm_b)) ** 2
        for layer in layers
        if layer.relative_difference is not None
    ]
    return Summary(
        left=_side(layers, "left"),
        right=_side(layers, "right"),
        initial=initial,
        norm_a=norm_a,
        norm_b=norm_b,
        cosine=cosine_similarity(math.fsum(inner), norm_a, norm_b) if inner else None,
        relative_difference=math.sqrt(math.fsum(differences)) / max(norm_a, norm_b) if differences else None,
    )


def _side(layers: Sequence[LayerComparison], side: Literal["left", "right"]) -> SideSummary | None:
    sides = [layer.sides[side] for layer in layers if side in layer.sides]
    if not sides:
        return None
    # Read from the grids rather than as cells, which would compute a p that nobody needs.
    sizes = [sorted(grid.overlap.shape) for grid in sides]
    square = [float(grid.overlap[k - 1, k - 1]) for grid, (k, _) in zip(sides, sizes, strict=True)]
    return SideSummary(
        overlap=statistics.median(square),
        expected=statistics.median(k / grid.d for grid, (k, _) in zip(sides, sizes, strict=True)),
        whole=statistics.median(float(grid.overlap[-1, -1]) for grid in sides),
        whole_expected=statistics.median(k / grid.d for grid, (_, k) in zip(sides, sizes, strict=True)),
    )


def _initial(a: Source, b: Source, patterns: list[str] | None) -> tuple[SideSummary | None, list[str]]:
    """Overlap of the factors A of two runs before training, None where it is unknown, and notes.

    There is a note where the runs kept these factors and they cannot be compared.
    """
    folders = [initial_folder(source) for source in (a, b)]
    if folders[0] is None or folders[1] is None:
        return None, []
    try:
        before = compare(folders[0], folders[1], layers=patterns, of="A", device=a.device)
    except RankscopeError as error:  # only a note depends on them
        return None, [f"the factors before training cannot be compared: {error}"]
    return before.summary.right, []


def initial_folder(source: Source) -> Path | None:
    """The folder with the factors of a study's run at step 0; None for any other adapter."""
    if source.kind != "peft" or source.folder is None or source.folder.name != ADAPTER_FOLDER:
        return None
    run = source.folder.parent
    return run / INITIAL_FOLDER if (run / RUN_NAME).is_file() and (run / INITIAL_FOLDER).is_dir() else None


def _notes(a: Source, b: Source, layers: Sequence[LayerComparison], summary: Summary, top: int | None) -> Iterable[str]:
    yield from (f"a: {note}" for note in a.notes)
    yield from (f"b: {note}" for note in b.notes)
    if top is None and any(_is_capped(layer) for layer in layers):
        yield CAPPED_NOTE
    yield from _shared_start_notes(summary)


def _is_capped(layer: LayerComparison) -> bool:
    """Whether a full update had more directions than were compared."""
    ranks = layer.nominal_rank_a, layer.nominal_rank_b
    sizes = next(iter(layer.sides.values())).overlap.shape
    return any(rank is None and n == MAX_DIRECTIONS < min(layer.shape) for rank, n in zip(ranks, sizes, strict=True))


def _shared_start_notes(summary: Summary) -> Iterable[str]:
    """A warning where the right side shows where A started, not what was learned."""
    left, right, initial = summary.left, summary.right, summary.initial
    if initial and _excess(initial) > 0.1:
        yield (
            f"the rows of A overlapped by {initial.whole:.2f} before training (chance {initial.whole_expected:.2f}): "
            "the two share initial factors, and their right side proves nothing; judge by the left"
        )
    elif right and _excess(right) > 0.9 and (left is None or _excess(left) < 0.25):
        beside = f" while the left overlap is {left.whole:.2f} (chance {left.whole_expected:.2f})" if left else ""
        yield (
            f"the right overlap is {right.whole:.2f} (chance {right.whole_expected:.2f}){beside}: an overlap of the A "
            "side alone proves nothing, the two may share their initial factors"
        )


def _excess(side: SideSummary) -> float:
    """Overlap of the whole spans beyond chance: 0 at chance, 1 for equal spans, 0 where chance is 1."""
    room = 1 - side.whole_expected
    return (side.whole - side.whole_expected) / room if room > 1e-6 else 0.0
