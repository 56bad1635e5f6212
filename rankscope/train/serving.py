"""What serving an adapter of a study costs: measured once, kept in the study's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from rankscope.errors import FormatError
from rankscope.formats.files import write_json
from rankscope.lora.loading import load
from rankscope.train.claims import alone, claiming
from rankscope.train.config import resolve_device
from rankscope.train.latency import Latency, measure_latency
from rankscope.train.loop import move
from rankscope.train.runs import Record
from rankscope.train.study import Study
from rankscope.train.tasks import make_task

SCHEMA = "rankscope.latency/1"
LATENCY = "latency.json"
SIZES = (1, 32)
REPEATS = 10


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """``latency.json``: forward times of the base with one adapter of the study, that of largest rank."""

    run: str
    device: str
    latency: list[Latency]
    schema: str = SCHEMA


def serving(study: Study) -> Serving | None:
    """The latency of the study's adapter of largest rank, from the folder or measured now; None without adapters.

    Raises:
        FormatError: ``latency.json`` is damaged.
    """
    record = largest(study)
    if record is None:
        return None
    # Processes that shared out the study end together: one measures, undisturbed by the others, which read that.
    with claiming(study.folder) as claims, alone(claims):
        path = study.folder / LATENCY
        kept = _kept(path)
        if kept is not None and kept.run == record.run.name:
            return kept
        measured = _measure(study, record)
        write_json(path, msgspec.to_builtins(measured))
        return measured


def _kept(path: Path) -> Serving | None:
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Serving)
    except msgspec.DecodeError as error:
        raise FormatError(f"{path}: not a record of latencies ({error}); delete it to measure again") from error


def largest(study: Study) -> Record | None:
    """The run of largest rank among those at their best rate that keep their weights; plain LoRA first."""
    adapters = [record for record in study.best() if record.run.is_lora and study.keeps(record.run)]
    return max(adapters, key=lambda r: (r.run.method == "lora", r.run.rank or 0, -r.run.seed), default=None)


def _measure(study: Study, record: Record) -> Serving:
    task = make_task(study.config)
    device = resolve_device(study.config.device)
    model = task.model(record.run.seed).to(device)
    bank = load(model, study.path(record.run) / "adapter")
    batches = {size: move(task.batch(0, 0, size), device) for size in SIZES}

    def run(called: nn.Module, size: int) -> Any:
        return task.outputs(called, batches[size])

    with torch.no_grad():
        found = measure_latency(model, bank, run, SIZES, REPEATS)
    return Serving(run=record.run.name, device=str(device), latency=found)
