"""A study on the terminal and as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from rankscope.train.results import MEASURE, Row, baseline
from rankscope.train.study import Study

if TYPE_CHECKING:
    from rankscope.plots import PerformancePoint

HEADER = ("method", "lr", "seed", "trainable", "validation", "test", "entropy", "stable", "k90", "s/step")


def print_study(study: Study, found: list[Row], as_json: bool) -> None:
    """The table of runs on stdout, or the same as JSON."""
    if as_json:
        described = {
            "schema": "rankscope.study-table/1",
            "study": str(study.folder),
            "metric": study.metric,
            "higher_is_better": study.higher_is_better,
            "runs": [row.to_json() for row in found],
        }
        click.echo(json.dumps(described, indent=2, allow_nan=False))
        return
    from rankscope.cli.common import print_table

    way = "higher" if study.higher_is_better else "lower"
    print_table(HEADER, [_cells(row) for row in found], left=1)
    click.echo(
        f"\nvalidation, test: {study.metric} ({way} is better); * the best rate of its method, rank and seed by "
        "validation.\nentropy, stable, k90: effective ranks of the update, median over layers.",
        err=True,
    )


def _cells(row: Row) -> tuple[str, ...]:
    run, cost = row.record.run, row.record.cost

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    several = "*" if row.best and run.lr is not None else ""
    return (
        run.label,
        number(run.lr, "g") + several,
        str(run.seed),
        f"{cost.trainable:,}" if cost else "0",
        number(row.chosen_by, ".4f") if row.score is not None else row.record.status,
        number(row.score, ".4f"),
        *(number(row.ranks.get(name), ".1f") for name in ("entropy_rank", "stable_rank", "k90")),
        number(cost.seconds_per_step if cost else None, ".3f"),
    )


def write_plots(study: Study, found: list[Row]) -> list[Path]:
    """``spectra.png`` and ``performance.png`` in the study's folder, where there are runs to draw."""
    from rankscope import plots

    drawn = [row for row in found if row.best and row.spectra]
    if not drawn:
        return []
    first = min(row.record.run.seed for row in drawn)
    one_seed = [row.spectra for row in drawn if row.spectra and row.record.run.seed == first]
    spectra, performance = study.folder / "spectra.png", study.folder / "performance.png"
    plots.save(plots.plot_spectra(one_seed), spectra)
    figure = plots.plot_performance(
        [_point(row) for row in drawn],
        metric=study.metric,
        measure=MEASURE,
        baseline=baseline(study),
        higher_is_better=study.higher_is_better,
    )
    plots.save(figure, performance)
    return [spectra, performance]


def _point(row: Row) -> PerformancePoint:
    """A run at its best rate as the performance plot takes it."""
    from rankscope.plots import PerformancePoint

    run = row.record.run
    method: Literal["lora", "full"] = "lora" if run.method == "lora" else "full"
    return PerformancePoint(run.label, method, run.rank, row.ranks[MEASURE], row.score or 0.0, run.seed)
