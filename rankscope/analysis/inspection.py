"""``inspect``: what a file or folder holds, from its headers and its configuration alone."""

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
from rankscope.formats.adapter_file import NoAlphaError
from rankscope.formats.checkpoint import Checkpoint
from rankscope.formats.file_formats import CHECKPOINT, NoBaseError, format_title
from rankscope.formats.file_io import as_text, read_json
from rankscope.formats.hub import local_path
from rankscope.formats.names import layer_kind
from rankscope.formats.opening import Opening
from rankscope.formats.recipes import element_count
from rankscope.formats.store import open_source
from rankscope.formats.study_layout import RUN_NAME, RUNS_FOLDER, STUDY_NAME
from rankscope.result import Result

SCHEMA = "rankscope.inspect/1"


class TargetGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers with the same name within their block, shape (out, in), rank, scale, dtype and method.

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
    """What ``path`` holds; ``says`` is the answer in one sentence.

    ``parameters`` counts the numbers of all tensors, ``dtypes`` those of each stored dtype, ``size`` the bytes of the
    files. ``training``: the program that the file names as the one that trained it.
    """

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
    """The fields of ``Inspection`` that count tensors, numbers and bytes."""
    dtypes: Counter[str] = Counter()
    for info in stored.infos.values():
        dtypes[_dtype_name(info.dtype)] += element_count(info.shape)
    return {
        "tensors": len(stored.infos),
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes.most_common()),
        "size": sum(path.stat().st_size for path in stored.paths),
    }


def inspect(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, alpha: float | None = None
) -> Inspection:
    """Tell what a path holds: an adapter of any format, full weights with or without their base, a run, or a study.

    Args:
        path: file or folder.
        base: the pre-trained model, which full weights and some adapters need.
        alpha: α where the file has none.

    Raises:
        FormatError: there is nothing, no known format, or a damaged file.
    """
    return describe_source(path, Opening(base, alpha))


def describe_source(path: str | os.PathLike[str], opening: Opening) -> Inspection:
    """``inspect`` with the settings of how the path is opened as one value.

    Raises:
        FormatError: as for ``inspect``.
    """
    local = local_path(path)
    if (local / STUDY_NAME).is_file():
        return _describe_study(local, str(path))
    notes: list[str] = []
    try:
        store = open_source(local, opening)
    except NoBaseError:
        return _describe_weights(Checkpoint(local), local, str(path))
    except NoAlphaError:
        store = open_source(local, replace(opening, alpha=1.0))
        store.notes.clear()
        notes.append("the file gives no α, so the scale and the size of its updates are unknown; give it (--alpha)")
    inspection = _describe_store(store, is_alpha_known=not notes)
    says, all_notes = _describe_run(local) or inspection.says, (*inspection.notes, *notes)
    return msgspec.structs.replace(inspection, path=str(path), says=says, notes=all_notes)


def _describe_study(folder: Path, label: str) -> Inspection:
    read_json(folder / STUDY_NAME)
    runs = [path for path in folder.glob(f"{RUNS_FOLDER}/*") if path.is_dir()]
    ended = sum((run / RUN_NAME).is_file() for run in runs)
    says = f"a study of {len(runs)} runs that have begun, {ended} of them ended; spectrum and report read it whole"
    return Inspection(path=label, format="study", says=says)


def _describe_run(folder: Path) -> str | None:
    """One sentence on a run of a study; None for anything else."""
    if not (folder / RUN_NAME).is_file():
        return None
    record = read_json(folder / RUN_NAME)
    inner = record.get("run")
    run = inner if isinstance(inner, dict) else record
    settings = [f"{key} {run[key]}" for key in ("method", "rank", "alpha", "lr", "seed") if run.get(key) is not None]
    return f"a run of a study: {', '.join(settings) or folder.name}; status {record.get('status', 'unknown')}"


def _describe_weights(checkpoint: Checkpoint, local: Path, label: str) -> Inspection:
    """Full weights without a base."""
    path = (local if local.is_dir() else local.parent) / "config.json"
    config = read_json(path) if path.is_file() else {}
    model = as_text(str(config.get("model_type") or ", ".join(map(str, config.get("architectures") or ()))))
    base = config.get("_name_or_path")
    return Inspection(
        path=label,
        format=CHECKPOINT.title,
        says=f"full weights{f' of a {model} model' if model else ''}; their update is known with their base (--base)",
        methods=("full",),
        base=as_text(base) if isinstance(base, str) and base else None,
        **_count_tensors(StoredTensors(checkpoint.infos, checkpoint.paths)),
    )


def _describe_store(store: Store, is_alpha_known: bool) -> Inspection:
    rows = Counter(_group_fields(store, name, store.info(name), is_alpha_known) for name in store.names())
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


def _group_fields(store: Store, name: str, info: UpdateInfo, is_alpha_known: bool) -> tuple[tuple[str, Any], ...]:
    """The fields of the ``TargetGroup`` that a layer belongs to, without the number of layers."""
    return tuple(
        {
            "name": _name_in_block(name),
            "shape": info.shape,
            "nominal_rank": info.nominal_rank,
            "alpha": store.layer_alpha(name) if is_alpha_known else None,
            "scale": info.scale if is_alpha_known else None,
            "dtype": _dtype_name(info.dtype),
            "method": info.method,
        }.items()
    )


def _name_in_block(name: str) -> str:
    """The name of a layer within its block, in names with dots or with underscores."""
    if "." in name:
        return layer_kind(name)
    return [part for part in re.split(r"_\d+(?=_|$)", name) if part][-1].strip("_") or name


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
