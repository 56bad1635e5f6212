"""``inspect``: what a file or folder is, from its headers and its configuration alone."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import msgspec
import torch

from rankscope.errors import FormatError
from rankscope.formats.abstract_store import SkippedItem, Store, UpdateInfo
from rankscope.formats.adapter_file import FileStore
from rankscope.formats.checkpoint import Checkpoint
from rankscope.formats.checkpoint_store import CheckpointStore, UpdateStore
from rankscope.formats.diffusers import DiffusersStore, component_config, split_component
from rankscope.formats.file_io import TensorInfo, as_text, read_json
from rankscope.formats.hub import local_path
from rankscope.formats.kohya import MODULE_KEY
from rankscope.formats.loralib import NoAlphaError
from rankscope.formats.names import layer_kind
from rankscope.formats.opening import Opening
from rankscope.formats.peft_config import resolve_pattern
from rankscope.formats.peft_lora import PeftStore
from rankscope.formats.peft_store import AdapterStore
from rankscope.formats.pickle_file import open_tensors
from rankscope.formats.recipes import element_count
from rankscope.formats.store import NoBaseError, open_source
from rankscope.result import Result

SCHEMA = "rankscope.inspect/1"
STUDY, RUN = "study.json", "run.json"
# Where kohya's scripts and model hubs say what an adapter was trained on, the most telling first.
BASE_TAGS = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
FORMATS = {
    "peft": "PEFT adapter",
    "kohya": "kohya or LyCORIS file",
    "diffusers": "diffusers file",
    "loralib": "loralib file",
    "update": "updates written by rankscope",
    "checkpoint": "full weights",
}


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


class _Files(NamedTuple):
    """The tensors of a source, and the files that they lie in."""

    infos: Mapping[str, TensorInfo]
    paths: tuple[Path, ...]

    def fields(self) -> dict[str, Any]:
        """Those of ``Inspection`` that only count."""
        dtypes: Counter[str] = Counter()
        for info in self.infos.values():
            dtypes[_name(info.dtype)] += element_count(info.shape)
        return {
            "tensors": len(self.infos),
            "parameters": sum(dtypes.values()),
            "dtypes": dict(dtypes.most_common()),
            "size": sum(path.stat().st_size for path in self.paths),
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
    found = _source(store, known=not notes)
    run = _run(place)
    return msgspec.structs.replace(found, path=str(path), says=run or found.says, notes=(*found.notes, *notes))


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
        format=FORMATS["checkpoint"],
        says=f"full weights{f' of a {model} model' if model else ''}; their update is known with their base (--base)",
        methods=("full",),
        base=as_text(base) if isinstance(base, str) and base else None,
        **_Files(checkpoint.infos, checkpoint.paths).fields(),
    )


def _source(store: Store, known: bool) -> Inspection:
    rows = Counter(_row(store, name, store.info(name), known) for name in store.names())
    targets = tuple(TargetGroup(layers=count, **dict(row)) for row, count in rows.items())
    methods = tuple(dict.fromkeys(target.method for target in targets))
    return Inspection(
        path=str(store.path),
        format=FORMATS[store.kind],
        says=f"{FORMATS[store.kind]}: {len(store)} update{'s' * (len(store) > 1)}, {', '.join(methods)}",
        methods=methods,
        base=_base(store),
        training=store.file.metadata.get(MODULE_KEY) if isinstance(store, FileStore) else None,
        layers=len(store),
        targets=targets,
        skipped=tuple(store.skipped),
        notes=tuple(store.notes),
        **_files(store).fields(),
    )


def _row(store: Store, name: str, info: UpdateInfo, known: bool) -> tuple[tuple[str, Any], ...]:
    """What layers that are alike have in common, as the fields of a ``TargetGroup``."""
    return tuple(
        {
            "name": _target(name),
            "shape": info.shape,
            "nominal_rank": info.nominal_rank,
            "alpha": _alpha(store, name) if known else None,
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


def _alpha(store: Store, name: str) -> float | None:
    if isinstance(store, FileStore):
        return store.layers[name].alpha if name in store.layers else None
    if isinstance(store, PeftStore) and store.info(name).method in ("lora", "dora-product"):
        alpha: float = resolve_pattern(store.config.alpha_pattern, name, store.config.lora_alpha)
        return alpha
    return None


def _base(store: Store) -> str | None:
    """The base that the source itself names."""
    named: Sequence[object] = ()
    if isinstance(store, AdapterStore):
        named = (store.folder.config.get("base_model_name_or_path"),)
    elif isinstance(store, DiffusersStore):
        components = {split_component(name)[0] for name in store.layers}
        named = [
            component_config(store.file.metadata, one).get("base_model_name_or_path") for one in sorted(components)
        ]
    elif isinstance(store, FileStore):
        named = [store.file.metadata.get(tag) for tag in BASE_TAGS]
    return next((as_text(name) for name in named if isinstance(name, str) and name), None)


def _files(store: Store) -> _Files:
    if isinstance(store, FileStore):
        return _Files(store.file.infos, (store.file.path,))
    if isinstance(store, AdapterStore):
        return _Files(store.folder.file.infos, (store.folder.file.path,))
    if isinstance(store, CheckpointStore):
        checkpoint = Checkpoint(store.path)
        return _Files(checkpoint.infos, checkpoint.paths)
    if isinstance(store, UpdateStore):
        file = open_tensors(store.path)
        return _Files(file.infos, (file.path,))
    raise FormatError(f"{store.path}: is not in files")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
