"""``inspect``: what a file or folder is, from its headers and its configuration alone."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import torch

from rankscope.formats.abstract_store import SkippedItem, Store, StoredTensors, UpdateInfo
from rankscope.formats.checkpoint import Checkpoint
from rankscope.formats.file_formats import CHECKPOINT, NoBaseError, format_title
from rankscope.formats.file_io import as_text, read_json
from rankscope.formats.hub import local_path
from rankscope.formats.loralib import NoAlphaError
from rankscope.formats.names import layer_kind
from rankscope.formats.opening import Opening
from rankscope.formats.recipes import element_count
from rankscope.formats.store import open_source
from rankscope.result import Result

SCHEMA = "rankscope.inspect/1"
STUDY, RUN = "study.json", "run.json"


class TargetGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that are alike: of one name within their block, one shape (out, in), rank, scale, dtype and method.

    ``alpha``, ``scale`` and ``nominal_rank`` are None where there is none.
    """

    name: str
    layers: int
    shape: tuple[int, int]
    nominal_rank: int | None
    alpha: float | None
    scale: float | None
    dtype: str
    method: str


class Inspection(Result, frozen=True, kw_only=True):
    """What ``path`` is. ``parameters`` counts the numbers of every tensor, ``dtypes`` those of each stored dtype,
    ``size`` the bytes of the files. ``says`` is one sentence; ``training`` what the file names as its making."""

    schemas: ClassVar = (SCHEMA,)
    schema: str = SCHEMA
    path: str
    format: str
    says: str
    methods: tuple[str, ...] = ()
    base: str | None = None
    training: str | None = None
    layers: int = 0
    targets: tuple[TargetGroup, ...] = ()
    tensors: int = 0
    parameters: int = 0
    dtypes: dict[str, int] = msgspec.field(default_factory=dict)
    size: int = 0
    skipped: tuple[SkippedItem, ...] = ()
    notes: tuple[str, ...] = ()


def _count_tensors(stored: StoredTensors) -> dict[str, Any]:
    """The fields of ``Inspection`` that only count."""
    dtypes: Counter[str] = Counter()
    for info in stored.infos.values():
        dtypes[_name(info.dtype)] += element_count(info.shape)
    return {
        "tensors": len(stored.infos),
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes.most_common()),
        "size": sum(path.stat().st_size for path in stored.paths),
    }


def inspect(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, alpha: float | None = None
) -> Inspection:
    """What a path holds: an adapter of any format, full weights with or without their base, a run, a study.

    Args:
        path: file or folder.
        base: the pre-trained model, where it decides what can be read.
        alpha: α where the file has none.

    Raises:
        FormatError: nothing there, nothing that is known, or damaged.
    """
    return describe_source(path, Opening(base, alpha))


def describe_source(path: str | os.PathLike[str], opening: Opening) -> Inspection:
    """``inspect`` with the settings of how the path is opened as one value.

    Raises:
        FormatError: as for ``inspect``.
    """
    place = local_path(path)
    if (place / STUDY).is_file():
        return _study(place, str(path))
    notes: list[str] = []
    try:
        store = open_source(place, opening)
    except NoBaseError:
        return _weights(Checkpoint(place), place, str(path))
    except NoAlphaError:
        store = open_source(place, replace(opening, alpha=1.0))
        store.notes.clear()
        notes.append("the file gives no α, so neither scale nor size of its updates is known; give it (--alpha)")
    inspection = _source(store, known=not notes)
    run = _run(place)
    says, all_notes = run or inspection.says, (*inspection.notes, *notes)
    return msgspec.structs.replace(inspection, path=str(path), says=says, notes=all_notes)


def _study(folder: Path, label: str) -> Inspection:
    read_json(folder / STUDY)
    runs = [path for path in folder.glob("runs/*") if path.is_dir()]
    ended = sum((run / RUN).is_file() for run in runs)
    says = f"a study of {len(runs)} runs that have begun, {ended} of them ended; spectrum and report read it whole"
    return Inspection(path=label, format="study", says=says)


def _run(folder: Path) -> str | None:
    """One sentence on a run of a study; None for anything else."""
    if not (folder / RUN).is_file():
        return None
    told = read_json(folder / RUN)
    inner = told.get("run")
    run = inner if isinstance(inner, dict) else told
    settings = [f"{key} {run[key]}" for key in ("method", "rank", "alpha", "lr", "seed") if run.get(key) is not None]
    return f"a run of a study: {', '.join(settings) or folder.name}; status {told.get('status', 'unknown')}"


def _weights(checkpoint: Checkpoint, place: Path, label: str) -> Inspection:
    """Full weights without a base."""
    config = place / "config.json" if place.is_dir() else place.parent / "config.json"
    told = read_json(config) if config.is_file() else {}
    model = as_text(str(told.get("model_type") or ", ".join(map(str, told.get("architectures") or ()))))
    base = told.get("_name_or_path")
    return Inspection(
        path=label,
        format=CHECKPOINT.title,
        says=f"full weights{f' of a {model} model' if model else ''}; their update is known with their base (--base)",
        methods=("full",),
        base=as_text(base) if isinstance(base, str) and base else None,
        **_count_tensors(StoredTensors(checkpoint.infos, checkpoint.paths)),
    )


def _source(store: Store, known: bool) -> Inspection:
    rows = Counter(_row(store, name, store.info(name), known) for name in store.names())
    targets = tuple(TargetGroup(layers=count, **dict(row)) for row, count in rows.items())
    methods = tuple(dict.fromkeys(target.method for target in targets))
    return Inspection(
        path=str(store.path),
        format=format_title(store.kind),
        says=f"{format_title(store.kind)}: {len(store)} update{'s' * (len(store) > 1)}, {', '.join(methods)}",
        methods=methods,
        base=None if (base := store.base_name()) is None else as_text(base),
        training=store.training_script(),
        layers=len(store),
        targets=targets,
        skipped=tuple(store.skipped),
        notes=tuple(store.notes),
        **_count_tensors(store.stored_tensors()),
    )


def _row(store: Store, name: str, info: UpdateInfo, known: bool) -> tuple[tuple[str, Any], ...]:
    """What layers that are alike have in common, as the fields of a ``TargetGroup``."""
    return tuple(
        {
            "name": _target(name),
            "shape": info.shape,
            "nominal_rank": info.nominal_rank,
            "alpha": store.layer_alpha(name) if known else None,
            "scale": info.scale if known else None,
            "dtype": _name(info.dtype),
            "method": info.method,
        }.items()
    )


def _target(name: str) -> str:
    """What a layer is called within its block, in names with dots or with underscores."""
    if "." in name:
        return layer_kind(name)
    return [part for part in re.split(r"_\d+(?=_|$)", name) if part][-1].strip("_") or name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
