"""A study on the terminal and as pictures."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from rankscope.cli.cost_table import cost_entries, cost_legend, cost_table
from rankscope.cli.output import print_table
from rankscope.formats.study_layout import PERFORMANCE_PLOT_NAME, SPECTRA_PLOT_NAME
from rankscope.measures import measures_shown
from rankscope.table import Column, Table, format_cell
from rankscope.train.latency import Latency
from rankscope.train.results import RunResult
from rankscope.train.serving import ServingLatency
from rankscope.train.study import Study


def print_study(
    study: Study, results: list[RunResult], as_json: bool, verbose: bool = False, serving: ServingLatency | None = None
) -> None:
    """The runs and what they cost: tables on stdout with their legend on stderr, or the same as JSON.

    Args:
        verbose: a row for each run, not one for each label; JSON has every run.
        serving: what serving an adapter costs, where it was measured.
    """
    entries = cost_entries(results)
    if as_json:
        described = {
            "schema": "rankscope.study-table/1",
            "study": str(study.folder),
            "metric": study.metric,
            "higher_is_better": study.higher_is_better,
            "runs": [row.to_json() for row in results],
            "peak_memory_of": "allocator" if _device(study).startswith("cuda") else "process",
            "costs": entries,
            "serving": None if serving is None else msgspec.to_builtins(serving),
        }
        click.echo(json.dumps(described, indent=2, allow_nan=False))
        return
    print_table(Table.of(run_columns(), results, "terminal") if verbose else labels_table(results))
    _print_legend(_runs_legend(study, results, verbose))
    if entries:
        click.echo()
        print_table(cost_table(entries))
        _print_legend(cost_legend(entries, _device(study)))
    if serving:
        click.echo()
        print_table(Table.of(SERVING_COLUMNS, serving.latency, "terminal"))
        where = f"milliseconds of a forward pass on {serving.device}, {serving.run}"
        _print_legend([f"{where}; ± is the base's interquartile range."])


def _device(study: Study) -> str:
    return str(study.description.get("machine", {}).get("device", "cpu"))


def _print_legend(lines: Sequence[str]) -> None:
    click.echo("\n" + "\n".join(lines), err=True)


def _runs_legend(study: Study, results: Sequence[RunResult], verbose: bool) -> list[str]:
    way = "higher" if study.higher_is_better else "lower"
    averaged = "" if verbose or len({row.record.run.seed for row in results}) == 1 else ", mean ± standard deviation"
    lines = [f"validation, test: {study.metric} ({way} is better){averaged}."]
    if any(_mark(row) for row in results):
        lines.append("* the best learning rate of its method, targets and rank: best validation, mean over seeds.")
    titles = ", ".join(measure.title for measure in measures_shown("study"))
    lines.append(f"{titles}: effective ranks of the update, median over layers.")
    if any(row.choice and row.choice.edge for row in results):
        lines += [
            "! the best learning rate is the lowest or the highest that was tried: a better one may lie",
            "  beyond, and the rank may look worse than it is; --extend-lrs tries further ones.",
        ]
    return lines


class LabelResults(NamedTuple):
    """The runs of one label, those of them at its best rate, and how many did not get to the end, by status."""

    label: str
    best: list[RunResult]
    lost: Counter[str]


def labels_table(results: Sequence[RunResult]) -> Table:
    """One row for each label, its runs at the best rate averaged over seeds; a column of lost runs if there are any."""
    labels: dict[str, list[RunResult]] = {}
    for row in results:
        labels.setdefault(row.record.run.label, []).append(row)
    items = [
        LabelResults(
            label,
            [row for row in rows if row.is_best],
            Counter(row.record.status for row in rows if row.record.status != "done"),
        )
        for label, rows in labels.items()
    ]
    lost = [LOST_COLUMN] if any(item.lost for item in items) else []
    return Table.of([*label_columns(), *lost], items, "terminal")


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _mean(values: Sequence[float | None]) -> str:
    """Mean, and the sample standard deviation where there are several."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return format_cell(_average(known), ".4f")
    return f"{statistics.fmean(known):.4f} ± {statistics.stdev(known):.4f}"


def _learning_rate(row: RunResult) -> str:
    return format_cell(row.record.run.lr, "g") + _mark(row)


def _mark(row: RunResult) -> str:
    """What marks the best learning rate where several were compared."""
    if row.choice is None or len(row.choice.tried) < 2:
        return ""
    return "*!" if row.choice.edge else "*"


def _rank_of_run(name: str) -> Callable[[RunResult], float | None]:
    return lambda row: row.ranks.get(name)


def _rank_of_label(name: str) -> Callable[[LabelResults], float | None]:
    return lambda item: _average([row.ranks.get(name) for row in item.best])


def run_columns() -> list[Column[RunResult]]:
    """The columns of a run."""
    return [
        Column.of(lambda row: row.record.run.label, terminal="method"),
        Column.of(_learning_rate, terminal="lr"),
        Column.of(lambda row: row.record.run.seed, terminal="seed"),
        Column.of(lambda row: f"{row.record.cost.trainable:,}" if row.record.cost else "0", terminal="trainable"),
        Column.of(
            lambda row: row.chosen_by if row.score is not None else row.record.status, ".4f", terminal="validation"
        ),
        Column.of(lambda row: row.score, ".4f", terminal="test"),
        *(Column.of(_rank_of_run(measure.name), ".1f", terminal=measure.title) for measure in measures_shown("study")),
        Column.of(lambda row: row.record.cost.seconds_per_step if row.record.cost else None, ".3f", terminal="s/step"),
    ]


def label_columns() -> list[Column[LabelResults]]:
    """The columns of the runs of a label, averaged over seeds."""
    return [
        Column.of(lambda item: item.label, terminal="method"),
        Column.of(lambda item: _learning_rate(item.best[0]) if item.best else None, terminal="lr"),
        Column.of(lambda item: len(item.best), terminal="seeds"),
        Column.of(lambda item: _mean([row.chosen_by for row in item.best]), terminal="validation"),
        Column.of(lambda item: _mean([row.score for row in item.best]), terminal="test"),
        *(
            Column.of(_rank_of_label(measure.name), ".1f", terminal=measure.title)
            for measure in measures_shown("study")
        ),
    ]


LOST_COLUMN: Column[LabelResults] = Column.of(
    lambda item: ", ".join(f"{count} {status}" for status, count in item.lost.items()), terminal="lost"
)
SERVING_COLUMNS: list[Column[Latency]] = [
    Column.of(lambda latency: latency.size, terminal="examples in a pass"),
    Column.of(lambda latency: f"{1000 * latency.base:.2f} ± {1000 * latency.noise:.2f}", terminal="base"),
    Column.of(lambda latency: 1000 * latency.merged, ".2f", terminal="merged"),
    Column.of(lambda latency: 1000 * latency.unmerged, ".2f", terminal="unmerged"),
]


def write_plots(study: Study, results: list[RunResult]) -> list[Path]:
    """``spectra.png`` and ``performance.png`` in the study's folder, where there are runs to draw."""
    from rankscope import plots
    from rankscope.evidence.effective.measure import run_point
    from rankscope.evidence.material import Material
    from rankscope.evidence.performance.figure import plot_rank_curve
    from rankscope.evidence.performance.measure import measure_best_runs

    written = []
    # A dimension is not a rank: the report draws random subspaces on an axis of their own.
    best = [
        row for row in results if row.is_best and row.record.run.method != "base" and not row.record.run.is_subspace
    ]
    if with_spectra := [row for row in best if row.spectra]:
        first = min(row.record.run.seed for row in with_spectra)
        one_seed = [row.spectra for row in with_spectra if row.spectra and row.record.run.seed == first]
        written.append(plots.save(plots.plot_spectra(one_seed), study.folder / SPECTRA_PLOT_NAME))
    if best:
        rows = [row for row in results if not row.record.run.is_subspace]
        points = [run_point(row) for row in best if row.ranks]
        figure = plot_rank_curve(measure_best_runs(Material(study, rows=rows)), points)
        written.append(plots.save(figure, study.folder / PERFORMANCE_PLOT_NAME))
    return written
