"""What each method and rank costs, compared with full fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rankscope.table import Column, Table
from rankscope.train.results import RunResult
from rankscope.train.runs import RunCost

MIB = 2**20
RATIO_KEYS = ("trainable", "trained_bytes", "peak_memory", "seconds_per_step", "saved_bytes")
SHARED_MARK = "~"


def cost_entries(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """One entry for each label: its run at the best learning rate with the first seed.

    Bytes of ``trained_bytes`` are parameters, gradients and the optimizer's state of what is trained. ``of_full`` holds
    the ratios to full fine-tuning's run, None where there is none. The peak memory of runs that were trained together
    is that of all of them, so it has no ratio.
    """
    first: dict[str, tuple[RunResult, RunCost]] = {}
    for row in results:
        label, cost = row.record.run.label, row.record.cost
        if row.is_best and cost and (label not in first or row.record.run.seed < first[label][0].record.run.seed):
            first[label] = row, cost
    full = next((_numbers(cost) for row, cost in first.values() if row.record.run.method == "full"), None)
    return [_entry(row, cost, full) for row, cost in first.values()]


def _entry(row: RunResult, cost: RunCost, full: dict[str, Any] | None) -> dict[str, Any]:
    run, numbers = row.record.run, _numbers(cost)
    ratios = {key: _ratio(numbers, full, key) for key in RATIO_KEYS} if full else None
    return {"label": run.label, "name": run.name, "lr": run.lr, "seed": run.seed, **numbers, "of_full": ratios}


def _numbers(cost: RunCost) -> dict[str, Any]:
    return {
        "together": cost.together,
        "parameters": cost.parameters,
        "trainable": cost.trainable,
        "trainable_share": cost.trainable / cost.parameters if cost.parameters else None,
        "parameter_bytes": cost.parameter_bytes,
        "gradient_bytes": cost.gradient_bytes,
        "optimizer_bytes": cost.optimizer_bytes,
        "trained_bytes": cost.parameter_bytes + cost.gradient_bytes + cost.optimizer_bytes,
        "peak_memory": cost.peak_memory,
        "seconds_per_step": cost.seconds_per_step,
        "saved_bytes": cost.saved_bytes,
    }


def _ratio(numbers: dict[str, Any], full: dict[str, Any], key: str) -> float | None:
    shared = key == "peak_memory" and (numbers["together"] > 1 or full["together"] > 1)
    if shared or numbers[key] is None or not full[key]:
        return None
    return float(numbers[key] / full[key])


def cost_table(entries: Sequence[dict[str, Any]]) -> Table:
    """One row for each entry; without full fine-tuning there are no ratios to it."""
    return Table.of(COLUMNS, entries, "with ratios" if any(entry["of_full"] for entry in entries) else "terminal")


def cost_legend(entries: Sequence[dict[str, Any]], device: str) -> list[str]:
    """What the columns are; ``device`` is the study's."""
    whose = "the GPU that was allocated" if device.startswith("cuda") else "the whole process (resident)"
    lines = [
        "Of the run at the best learning rate, first seed. params: trained, and their share of the model;",
        "state: MiB of parameters, gradients and optimizer state of what is trained; peak: MiB of memory",
        f"of {whose}; saved: MiB of the update on disk; /full: against full fine-tuning.",
    ]
    if any(entry["together"] > 1 for entry in entries):
        lines.append(f"{SHARED_MARK} trained in one pass with other runs: the peak is that of all, the time its share.")
    return lines


def _short(count: int) -> str:
    """A count with three digits and a unit: 998, 12.3k, 109M."""
    value, unit = float(count), ""
    for larger in ("k", "M", "G", "T"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g}{unit}"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else _digits(count / MIB)


def _digits(value: float) -> str:
    """A number with three digits; above a hundred a whole number."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    """A share in percent with two digits; above ten a whole number."""
    if share is None:
        return ""
    value = 100 * share
    return f"{value:.0f}%" if value >= 9.95 else f"{value:.2g}%"


def _peak(entry: dict[str, Any]) -> str:
    is_shared = entry["together"] > 1 and entry["peak_memory"] is not None
    return _mebibytes(entry["peak_memory"]) + (SHARED_MARK if is_shared else "")


def _column(title: str, text: Callable[[dict[str, Any]], str]) -> Column[dict[str, Any]]:
    return Column(text, {"terminal": title, "with ratios": title})


def _ratio_column(key: str) -> Column[dict[str, Any]]:
    return Column(lambda entry: _percent((entry["of_full"] or {}).get(key)), {"with ratios": "/full"})


COLUMNS = [
    _column("method", lambda entry: str(entry["label"])),
    _column("params", lambda entry: _short(entry["trainable"])),
    _column("of all", lambda entry: _percent(entry["trainable_share"])),
    _ratio_column("trainable"),
    _column("state", lambda entry: _mebibytes(entry["trained_bytes"])),
    _ratio_column("trained_bytes"),
    _column("peak", _peak),
    _ratio_column("peak_memory"),
    _column("s/step", lambda entry: _digits(entry["seconds_per_step"])),
    _ratio_column("seconds_per_step"),
    _column("saved", lambda entry: _mebibytes(entry["saved_bytes"])),
    _ratio_column("saved_bytes"),
]
