"""The section on effective rank against performance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rankscope.evidence.effective.figure import plot_effective
from rankscope.evidence.effective.measure import EffectiveRanks, measure_names
from rankscope.inference import CONFIDENCE_LEVEL
from rankscope.report.document import Cell, Picture, Section, Table
from rankscope.train.results import DEFAULT_MEASURE
from rankscope.verdict import Verdict, format_interval


def build_section(result: EffectiveRanks, verdicts: Sequence[Verdict]) -> Section:
    """Effective rank against performance, as evidence on how much of its rank an update uses."""
    return Section(
        lead=(
            "The rank that is given is not the rank that is used: every run of the study is set where its update's "
            "effective rank and its score are, and stable rank is followed as r grows."
        ),
        verdicts=verdicts,
        pictures=(_picture(result),),
        tables=(_correlations(result), _ranks(result)),
        notes=tuple(_notes(result)),
    )


def _picture(result: EffectiveRanks) -> Picture:
    return Picture(
        name="effective",
        caption=(
            "Left: a point a run; strong at the best rate of its method and rank, with a line through the means of the "
            "ranks, faint at other rates, hollow where the best rate lies on the edge of those tried. Right: stable "
            "rank Σσ²/σ₁² of the runs at the best rates; hollow is not in the fit. Random factors: products of two "
            "matrices of independent normal entries with the adapters' shapes. Effective ranks are medians over layers."
        ),
        alt=_alt(result),
        draw=partial(plot_effective, result),
        data=Table(
            name="effective",
            caption="Every run that changes matrices.",
            header=("run", "method", "rank", "rate", "seed", "best rate", result.metric, *_titles()),
            rows=[
                (
                    *(point.label, point.method, point.rank, point.lr, point.seed, "yes" if point.best else "no"),
                    *(point.score, *(point.ranks[name] for name in measure_names())),
                )
                for point in result.points
            ],
        ),
    )


def _titles() -> list[str]:
    return [name.removesuffix("_rank") for name in measure_names()]


def _alt(result: EffectiveRanks) -> str:
    ranks = ", ".join(f"{one.measures[DEFAULT_MEASURE].value:.3g} of r = {one.rank}" for one in result.curve)
    full = [point.ranks[DEFAULT_MEASURE] for point in result.points if point.method == "full" and point.best]
    said = [f"The mean entropy rank is {ranks}."]
    if full and result.noise:
        mean = sum(full) / len(full)
        said.append(
            f"Full fine-tuning has {mean:.3g}, noise of its shapes would have {result.noise[DEFAULT_MEASURE]:.3g}."
        )
    rho = next((c.rho for c in result.correlations if c.measure == DEFAULT_MEASURE and c.rho), None)
    if rho:
        said.append(f"Over ranks its correlation with better scores is ρ = {format_interval(rho)}.")
    if result.growth:
        said.append(f"Stable rank grows as r to the power {format_interval(result.growth.beta)}.")
    return " ".join(said)


def _correlations(result: EffectiveRanks) -> Table:
    way = "higher" if result.higher_is_better else "lower"
    return Table(
        name="effective-correlations",
        caption=(
            f"Spearman's ρ of effective rank with better {result.metric} ({way} is better), with its "
            f"{CONFIDENCE_LEVEL:.0%} "
            "interval (Bonett & Wright 2000)."
        ),
        header=("among", "measure", "points", "ρ", "from", "to"),
        rows=[
            (one.among, one.measure.removesuffix("_rank"), one.points, *(one.rho or (None, None, None)))
            for one in result.correlations
        ],
    )


def _ranks(result: EffectiveRanks) -> Table:
    header: list[str] = ["rank", "seeds", "share of gain"]
    for title in _titles():
        header += [title, "from", "to", f"{title}, random"]
    rows: list[list[Cell]] = []
    for one in result.curve:
        row: list[Cell] = [one.rank, one.seeds, one.share.value if one.share else None]
        for name in measure_names():
            row += [*one.measures[name], one.random[name]]
        rows.append(row)
    return Table(
        name="effective-ranks",
        caption=f"LoRA at its best rates: medians over layers, means over seeds with {CONFIDENCE_LEVEL:.0%} intervals.",
        header=tuple(header),
        rows=rows,
    )


def _notes(result: EffectiveRanks) -> list[str]:
    notes = [
        "Runs of one rank are not independent of each other: the interval over runs is too narrow, the one over "
        "ranks, a point each, is not. ρ tells whether the order agrees, not how much is gained: no verdict rests on "
        "it.",
        "Over every run the learning rate moves both the score and the effective rank, so ρ there need not be an "
        "effect of rank.",
        "Fits stable rank ∝ r^β of 2026 report β from .23 to .30. r = 1 has stable rank 1 by definition and is left "
        "out of the fit.",
    ]
    if result.noise:
        noise = ", ".join(f"{name.removesuffix('_rank')} {result.noise[name]:.3g}" for name in measure_names())
        notes.append(f"A noise matrix of the shapes of full fine-tuning's updates would read {noise}.")
    return notes
