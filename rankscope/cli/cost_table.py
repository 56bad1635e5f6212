"""What each method and rank cost, against full fine-tuning: the table that LoRA is argued from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankscope.train.results import RunResult
from rankscope.train.runs import RunCost

MIB = 2**20
RATIO_KEYS = ("trainable", "trained_bytes", "peak_memory", "seconds_per_step", "saved_bytes")
SHARED_MARK = "~"
HEADER = ("method", "params", "of all", "/full", "state", "/full", "peak", "/full", "s/step", "/full", "saved", "/full")


def cost_entries(found: Sequence[RunResult]) -> list[dict[str, Any]]:
    """One entry a label: its run at the best rate with the first seed.

    Bytes of ``trained_bytes`` are parameters, gradients and the optimizer's state of what is trained. ``of_full`` holds
    the ratios to full fine-tuning's run, None where there is none; the peak of runs that were trained together with
    others is not theirs alone, and has no ratio.
    """
    first: dict[str, tuple[RunResult, RunCost]] = {}
    for row in found:
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


def cost_rows(entries: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of the table; without full fine-tuning there is nothing to divide by."""
    ratios = any(entry["of_full"] for entry in entries)
    kept = [i for i, name in enumerate(HEADER) if ratios or name != "/full"]
    cells = [_cells(entry) for entry in entries]
    return tuple(HEADER[i] for i in kept), [tuple(row[i] for i in kept) for row in cells]


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    of_full = entry["of_full"] or dict.fromkeys(RATIO_KEYS)
    shared = SHARED_MARK if entry["together"] > 1 and entry["peak_memory"] is not None else ""
    return (
        entry["label"],
        _short(entry["trainable"]),
        _percent(entry["trainable_share"]),
        _percent(of_full["trainable"]),
        _mebibytes(entry["trained_bytes"]),
        _percent(of_full["trained_bytes"]),
        _mebibytes(entry["peak_memory"]) + shared,
        _percent(of_full["peak_memory"]),
        _digits(entry["seconds_per_step"]),
        _percent(of_full["seconds_per_step"]),
        _mebibytes(entry["saved_bytes"]),
        _percent(of_full["saved_bytes"]),
    )


def cost_legend(entries: Sequence[dict[str, Any]], device: str) -> list[str]:
    """What the columns are; ``device`` is the study's."""
    whose = "the GPU that was allocated" if device.startswith("cuda") else "the whole process (resident)"
    lines = [
        "Of the run at the best rate, first seed. params: trained, and their share of all of the model;",
        "state: MiB of parameters, gradients and optimizer state of what is trained; peak: MiB of memory",
        f"of {whose}; saved: MiB of the update on disk; /full: against full fine-tuning.",
    ]
    if any(entry["together"] > 1 for entry in entries):
        lines.append(f"{SHARED_MARK} trained in one pass with other runs: the peak is that of all, the time its share.")
    return lines


def _short(count: int) -> str:
    """Three digits and a unit: 998, 12.3k, 109M."""
    value, unit = float(count), ""
    for larger in ("k", "M", "G", "T"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g}{unit}"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else _digits(count / MIB)


def _digits(value: float) -> str:
    """Three digits, and whole numbers above a hundred."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    """Two digits, and whole numbers above ten."""
    if share is None:
        return ""
    value = 100 * share
    return f"{value:.0f}%" if value >= 9.95 else f"{value:.2g}%"
