"""The section on truncation: how much of the update the tuned model needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rankscope.evidence.truncation.figure import plot_truncation
from rankscope.evidence.truncation.measure import KindPoint, Truncation, TruncationCurve
from rankscope.report.document import Cell, Picture, Section, Table
from rankscope.verdict import GAIN_SHARE, Verdict


def build_section(found: Truncation, verdicts: Sequence[Verdict]) -> Section:
    """Updates cut to rank k and evaluated."""
    return Section(
        lead=(
            "What is in an update need not matter to the task. So each matrix of the update is replaced by its best "
            "rank-k part and the model is evaluated again: how much rank keeps what was learned?"
        ),
        verdicts=verdicts,
        pictures=(_picture(found),),
        tables=(_kinds(found),),
        notes=tuple(_notes(found)),
    )


def _picture(found: Truncation) -> Picture:
    return Picture(
        name="truncation",
        caption=(
            "Left: means over seeds, bands from the least to the largest; a ring marks the smallest k that keeps "
            f"{GAIN_SHARE:.0%} of the gain, grey what is called low. The control is the update without its best rank k. "
            f"Right: full fine-tuning with one kind of module cut, seed {found.kinds_seed}."
        ),
        alt=_alt(found),
        draw=lambda: plot_truncation(found),
        data=Table(
            name="truncation",
            caption=f"{found.metric} and share of the gain at each k, with 95 % intervals over seeds.",
            header=("update", "part", "k", found.metric, "from", "to", "share of gain", "share from", "share to"),
            rows=[row for cut in _cuts(found) for row in _rows(cut)],
        ),
    )


def _cuts(found: Truncation) -> list[TruncationCurve]:
    return [found.full, *([found.lora] if found.lora is not None else [])]


def _rows(cut: TruncationCurve) -> Iterator[tuple[Cell, ...]]:
    for part, points in (("best rank k", cut.kept), ("without it", cut.removed)):
        for point in points:
            yield (cut.name, part, point.k, *point.score, *(point.share or (None, None, None)))


def _alt(found: Truncation) -> str:
    said = [f"The base has {found.base.value:.4g} {found.metric}."]
    for cut in _cuts(found):
        kept = ", ".join(f"{point.score.value:.4g} at k = {point.k}" for point in cut.kept)
        enough = f"; k = {cut.k90.rank} keeps {GAIN_SHARE:.0%} of the gain" if cut.k90.rank is not None else ""
        said.append(f"The best rank k of {cut.name} has {kept}{enough}.")
    removed = ", ".join(f"{point.score.value:.4g} at k = {point.k}" for point in found.full.removed)
    said.append(f"The control, {found.full.name} without its best rank k, has {removed}.")
    if (most := min(found.kinds, key=lambda point: point.share or 0.0, default=None)) and most.share is not None:
        said.append(f"Of the kinds cut alone, {most.kind} at k = {most.k} loses most: {most.share:.3g} is kept.")
    return " ".join(said)


def _kinds(found: Truncation) -> Table:
    ranks = sorted({point.k for point in found.kinds})
    return Table(
        name="truncation-kinds",
        caption=(
            "Share of full fine-tuning's gain that is kept where the matrices of one kind alone are cut to rank k and "
            f"everything else is whole (seed {found.kinds_seed}, no interval); those that lose most come first."
        ),
        header=("kind", "matrices", *(f"k = {k}" for k in ranks)),
        rows=[
            (kind, points[0].matrices, *(_share(points, k) for k in ranks)) for kind, points in _by_kind(found.kinds)
        ],
        digits=3,
    )


def _by_kind(kinds: Iterable[KindPoint]) -> list[tuple[str, list[KindPoint]]]:
    found: dict[str, list[KindPoint]] = {}
    for point in kinds:
        found.setdefault(point.kind, []).append(point)
    return sorted(found.items(), key=lambda pair: pair[1][0].share or 0.0)


def _share(points: Iterable[KindPoint], k: int) -> float | None:
    return next((point.share for point in points if point.k == k), None)


def _notes(found: Truncation) -> Iterator[str]:
    for cut in _cuts(found):
        others = (
            f", {cut.whole} other tensors (biases, norms, new heads) are kept whole at every k" if cut.whole else ""
        )
        yield (
            f"{cut.name}: {cut.matrices} matrices are cut{others}. The whole stored update gives the score of its run "
            f"to within {cut.reproduction_error:.1g} {found.metric}."
        )
    yield (
        "The share of the gain is a ratio of two means over seeds, its interval Fieller's. It can pass 1: what is cut "
        "off may be noise that the held-out data are better without."
    )
    yield "k is tried at powers of two: the smallest k that keeps enough may lie anywhere above the one before it."
