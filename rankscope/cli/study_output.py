"""A study on the terminal and as pictures."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from rankscope.cli.cost_table import cost_entries, cost_legend, cost_rows
from rankscope.formats.study_layout import PERFORMANCE_PLOT_NAME, SPECTRA_PLOT_NAME
from rankscope.measures import measures_shown
from rankscope.train.latency import Latency
from rankscope.train.method_table import find_method
from rankscope.train.results import DEFAULT_MEASURE, RunResult, baseline_score
from rankscope.train.runs import Run
from rankscope.train.serving import ServingLatency
from rankscope.train.study import Study

if TYPE_CHECKING:
    from rankscope.plots import PerformancePoint

RANKS = {measure.title: measure.name for measure in measures_shown("study")}
RUNS_HEADER = ("method", "lr", "seed", "trainable", "validation", "test", *RANKS, "s/step")
SERVING_HEADER = ("examples in a pass", "base", "merged", "unmerged")
LABELS_HEADER = ("method", "lr", "seeds", "validation", "test", *RANKS, "lost")


def print_study(
    study: Study, found: list[RunResult], as_json: bool, verbose: bool = False, served: ServingLatency | None = None
) -> None:
    """The runs and what they cost: tables on stdout with their legend on stderr, or the same as JSON.

    Args:
        served: what serving an adapter costs, where it was measured.
        verbose: a row for each run, not one for each label; JSON has every run.
    """
    entries = cost_entries(found)
    if as_json:
        described = {
            "schema": "rankscope.study-table/1",
            "study": str(study.folder),
            "metric": study.metric,
            "higher_is_better": study.higher_is_better,
            "runs": [row.to_json() for row in found],
            "peak_memory_of": "allocator" if _device(study).startswith("cuda") else "process",
            "costs": entries,
            "serving": None if served is None else msgspec.to_builtins(served),
        }
        click.echo(json.dumps(described, indent=2, allow_nan=False))
        return
    from rankscope.cli.output import print_rows

    if verbose:
        print_rows(RUNS_HEADER, [_run_cells(row) for row in found])
    else:
        print_rows(*_labels_table(found))
    _say(_runs_legend(study, found, verbose))
    if entries:
        click.echo()
        print_rows(*cost_rows(entries))
        _say(cost_legend(entries, _device(study)))
    if served:
        click.echo()
        print_rows(SERVING_HEADER, [_serving_cells(latency) for latency in served.latency])
        _say([f"milliseconds of a forward pass on {served.device}, {served.run}; ± is the base's interquartile range."])


def _serving_cells(latency: Latency) -> tuple[str, ...]:
    times = (latency.base, latency.merged, latency.unmerged)
    base, merged, unmerged = (format(1000 * seconds, ".2f") for seconds in times)
    return str(latency.size), f"{base} ± {1000 * latency.noise:.2f}", merged, unmerged


def _device(study: Study) -> str:
    return str(study.description.get("machine", {}).get("device", "cpu"))


def _say(lines: Sequence[str]) -> None:
    click.echo("\n" + "\n".join(lines), err=True)


def _runs_legend(study: Study, found: Sequence[RunResult], verbose: bool) -> list[str]:
    way = "higher" if study.higher_is_better else "lower"
    spread = "" if verbose or len({row.record.run.seed for row in found}) == 1 else ", mean ± standard deviation"
    lines = [f"validation, test: {study.metric} ({way} is better){spread}."]
    if any(_mark(row) for row in found):
        lines.append("* the best rate of its method, targets and rank by validation, the mean over seeds.")
    lines.append(f"{', '.join(RANKS)}: effective ranks of the update, median over layers.")
    if any(row.choice and row.choice.edge for row in found):
        lines += [
            "! the best rate is the lowest or the highest that was tried: a better one may lie beyond,",
            "  and the rank look worse than it is; --extend-lrs goes on.",
        ]
    return lines


def _labels_table(found: Sequence[RunResult]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and one row a label; what was lost has a column where something was."""
    labels: dict[str, list[RunResult]] = {}
    for row in found:
        labels.setdefault(row.record.run.label, []).append(row)
    cells = [_label_cells(label, rows) for label, rows in labels.items()]
    columns = len(LABELS_HEADER) - (not any(row[-1] for row in cells))
    return LABELS_HEADER[:columns], [row[:columns] for row in cells]


def _label_cells(label: str, rows: Sequence[RunResult]) -> tuple[str, ...]:
    """The runs at the best rate, put together over seeds."""
    chosen = [row for row in rows if row.is_best]
    lost = Counter(row.record.status for row in rows if row.record.status != "done")
    return (
        label,
        _rate(chosen[0]) if chosen else "",
        str(len(chosen)),
        _mean([row.chosen_by for row in chosen]),
        _mean([row.score for row in chosen]),
        *(_number(_average([row.ranks.get(name) for row in chosen]), ".1f") for name in RANKS.values()),
        ", ".join(f"{count} {status}" for status, count in lost.items()),
    )


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _mean(values: Sequence[float | None]) -> str:
    """Mean, and the sample standard deviation where there are several."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return _number(_average(known), ".4f")
    return f"{statistics.fmean(known):.4f} ± {statistics.stdev(known):.4f}"


def _run_cells(row: RunResult) -> tuple[str, ...]:
    run, cost = row.record.run, row.record.cost
    return (
        run.label,
        _rate(row),
        str(run.seed),
        f"{cost.trainable:,}" if cost else "0",
        _number(row.chosen_by, ".4f") if row.score is not None else row.record.status,
        _number(row.score, ".4f"),
        *(_number(row.ranks.get(name), ".1f") for name in RANKS.values()),
        _number(cost.seconds_per_step if cost else None, ".3f"),
    )


def _rate(row: RunResult) -> str:
    return _number(row.record.run.lr, "g") + _mark(row)


def _mark(row: RunResult) -> str:
    """Where rates were compared, which was best."""
    if row.choice is None or len(row.choice.tried) < 2:
        return ""
    return "*!" if row.choice.edge else "*"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def write_plots(study: Study, found: list[RunResult]) -> list[Path]:
    """``spectra.png`` and ``performance.png`` in the study's folder, where there are runs to draw."""
    from rankscope import plots

    written = []
    # A dimension is no rank: random subspaces have an axis of their own, in the report.
    best = [row for row in found if row.is_best and row.record.run.method != "base" and not row.record.run.is_subspace]
    if measured := [row for row in best if row.spectra]:
        first = min(row.record.run.seed for row in measured)
        one_seed = [row.spectra for row in measured if row.spectra and row.record.run.seed == first]
        written.append(plots.save(plots.plot_spectra(one_seed), study.folder / SPECTRA_PLOT_NAME))
    if best:
        figure = plots.plot_performance(
            [_point(row) for row in best],
            metric=study.metric,
            measure=DEFAULT_MEASURE,
            baseline=baseline_score(study),
            higher_is_better=study.higher_is_better,
        )
        written.append(plots.save(figure, study.folder / PERFORMANCE_PLOT_NAME))
    return written


def _point(row: RunResult) -> PerformancePoint:
    """A run at its best rate as the performance plot takes it."""
    from rankscope.plots import PerformancePoint

    run = row.record.run
    return PerformancePoint(
        label=run.label,
        method=run.method,
        nominal_rank=run.rank,
        effective_rank=row.ranks.get(DEFAULT_MEASURE),
        score=row.score or 0.0,
        seed=run.seed,
        series=series_name(run),
        edge=row.choice is not None and row.choice.edge is not None,
    )


def series_name(run: Run) -> str:
    """What the line of a run is called: its method, and its targets where the study names them."""
    name = find_method(run.method).title
    return name if run.targets is None else f"{name} on {run.targets}"
