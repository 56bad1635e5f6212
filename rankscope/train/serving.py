"""What serving an adapter of a study costs: measured once, kept in the study's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from rankscope.errors import FormatError
from rankscope.formats.file_io import write_json
from rankscope.lora.loading import load
from rankscope.train.claims import lock_study, open_claims
from rankscope.train.config import resolve_device
from rankscope.train.latency import Latency, measure_latency
from rankscope.train.loop import move_batch
from rankscope.train.runs import RunRecord
from rankscope.train.study import Study
from rankscope.train.tasks import make_task

LATENCY_SCHEMA = "rankscope.latency/1"
LATENCY_NAME = "latency.json"
BATCH_SIZES = (1, 32)
REPEATS = 10


class ServingLatency(msgspec.Struct, frozen=True, kw_only=True):
    """``latency.json``: forward times of the base with one adapter of the study, that of largest rank."""

    run: str
    device: str
    latency: list[Latency]
    schema: str = LATENCY_SCHEMA


def serving_latency(study: Study) -> ServingLatency | None:
    """The latency of the study's adapter of largest rank, from the folder or measured now; None without adapters.

    Raises:
        FormatError: ``latency.json`` is damaged.
    """
    record = largest_adapter(study)
    if record is None:
        return None
    # Processes that shared out the study end together: one measures, undisturbed by the others, which read that.
    with open_claims(study.folder) as claims, lock_study(claims):
        path = study.folder / LATENCY_NAME
        kept = _read_stored(path)
        if kept is not None and kept.run == record.run.name:
            return kept
        measured = _measure(study, record)
        write_json(path, msgspec.to_builtins(measured))
        return measured


def _read_stored(path: Path) -> ServingLatency | None:
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=ServingLatency)
    except msgspec.DecodeError as error:
        raise FormatError(f"{path}: not a record of latencies ({error}); delete it to measure again") from error


def largest_adapter(study: Study) -> RunRecord | None:
    """The run of largest rank among those at their best rate that keep their weights; plain LoRA first."""
    adapters = [record for record in study.best() if record.run.is_lora and study.has_weights(record.run)]
    return max(adapters, key=lambda r: (r.run.method == "lora", r.run.rank or 0, -r.run.seed), default=None)


def _measure(study: Study, record: RunRecord) -> ServingLatency:
    task = make_task(study.config)
    device = resolve_device(study.config.device)
    model = task.model(record.run.seed).to(device)
    bank = load(model, study.path(record.run) / "adapter")
    batches = {size: move_batch(task.batch(0, 0, size), device) for size in BATCH_SIZES}

    def run(called: nn.Module, size: int) -> Any:
        return task.outputs(called, batches[size])

    with torch.no_grad():
        latency = measure_latency(model, bank, run, BATCH_SIZES, REPEATS)
    return ServingLatency(run=record.run.name, device=str(device), latency=latency)
