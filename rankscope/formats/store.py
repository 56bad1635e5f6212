"""``open(path, base)``: whatever the path holds, as a store of updates."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rankscope.errors import ConfigError, FormatError, RankscopeError
from rankscope.formats.abstract_store import SkippedItem, Store, UnknownLayerError, UpdateInfo
from rankscope.formats.adapter_file import FileStore
from rankscope.formats.checkpoint import INDEX_SUFFIX, UPDATES_NAME, checkpoint_file, has_checkpoint
from rankscope.formats.checkpoint_store import CheckpointStore, UpdateStore, is_updates, write_updates
from rankscope.formats.diffusers import DiffusersStore, is_diffusers
from rankscope.formats.file_io import TensorFile, read_json
from rankscope.formats.hub import local_path
from rankscope.formats.kohya import KohyaStore, is_kohya
from rankscope.formats.loralib import LoralibStore, is_loralib
from rankscope.formats.opening import Opening
from rankscope.formats.peft_config import peft_type
from rankscope.formats.peft_keys import CONFIG_NAME, OLD_WEIGHTS_NAME, PEFT_PREFIX, WEIGHTS_NAME, parse_key
from rankscope.formats.peft_lora import PeftStore
from rankscope.formats.peft_methods import PeftMethodStore
from rankscope.formats.pickle_file import PICKLE_SUFFIXES, PickledFile, open_tensors

__all__ = [
    "CheckpointStore",
    "Opening",
    "PeftStore",
    "SkippedItem",
    "Store",
    "UnknownLayerError",
    "UpdateInfo",
    "UpdateStore",
    "open",
    "open_source",
    "write_updates",
]

ADAPTER_FOLDER = "adapter"
LOOKED_FOR = (
    f"looked for {CONFIG_NAME}, {ADAPTER_FOLDER}/{CONFIG_NAME}, {UPDATES_NAME}, model.safetensors, "
    "model.safetensors.index.json and any single .safetensors file"
)


class NoBaseError(FormatError):
    """Full weights, whose update is not known without their base."""


def open(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    initial: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
) -> Store:
    """Open a source of updates by what is in it; reads headers, no tensors.

    An adapter (a folder of PEFT's, of any method; a file of kohya's scripts, LyCORIS, diffusers or loralib), a run of
    ours, a file of updates, or full weights (file, folder or shards), which become the tuned weights minus ``base``.

    Args:
        path: file or folder; or an id of the hub (``org/name``), where nothing lies at that path.
        base: checkpoint of the pre-trained model, alike; by default the folder that a PEFT adapter's configuration
            names, where there is one. It is required for full weights and for methods that act through it, used
            for DoRA, for modules that an adapter holds whole, and for ``Store.weight``.
        device: where updates are put.
        initial: a LoRA adapter as it was before training, where its initialisation moved the base (PiSSA and others)
            and it is not beside the adapter.
        alpha: α where the file has none: loralib's never do.

    Raises:
        FormatError: nothing there, nothing that is known, damaged, or full weights without a base.
        ConfigError: the device cannot be used, α is not finite, or ``initial`` for something else than a LoRA adapter.
    """
    return open_source(path, Opening(base, alpha, initial, device))


def open_source(path: str | os.PathLike[str], opening: Opening) -> Store:
    """``open`` with its settings as one value.

    Raises:
        FormatError, ConfigError: as for ``open``.
    """
    place, alpha = local_path(path), opening.alpha
    if alpha is not None and not math.isfinite(alpha):
        raise ConfigError(f"alpha = {alpha}: α is a finite number")
    try:
        store = _open_folder(place, opening) if place.is_dir() else _open_file(place, opening)
    except OSError as error:  # no permission to look; a name too long
        raise FormatError(f"{place}: cannot be read ({error.strerror or error})") from error
    if opening.initial is not None and not isinstance(store, PeftStore):
        raise ConfigError(
            f"{place}: is no LoRA adapter, so an initial adapter ({opening.initial_path}) means nothing for it"
        )
    if alpha is not None and not (isinstance(store, FileStore) and store.given):
        store.notes.append(f"its scale is known from the file; the given α = {alpha:g} is not used")
    return store


def _open_folder(folder: Path, opening: Opening) -> Store:
    for adapter in (folder, folder / ADAPTER_FOLDER):
        if (adapter / CONFIG_NAME).exists():
            return _open_adapter(adapter, opening)
    if (folder / UPDATES_NAME).exists():
        return UpdateStore(folder / UPDATES_NAME, opening.base_path, opening.device)
    for weights in (folder / WEIGHTS_NAME, folder / OLD_WEIGHTS_NAME):
        if weights.exists() and adapter_store_class(open_tensors(weights)) is None:
            raise FormatError(f"{folder}: has an adapter's weights but no {CONFIG_NAME}, which holds its scale; add it")
        if weights.exists():
            return _open_file(weights, opening)
    if (folder / "study.json").exists():
        raise FormatError(f"{folder}: is a study; give one of its runs, such as {_first_run(folder)}")
    if has_checkpoint(folder):
        return _open_weights(folder, checkpoint_file(folder), opening)
    if not any(folder.iterdir()):
        raise FormatError(f"{folder}: is empty; {LOOKED_FOR}")
    raise FormatError(f"{folder}: holds nothing that is known; {LOOKED_FOR}")


def _open_file(file: Path, opening: Opening) -> Store:
    if not file.exists():
        raise FormatError(f"{file}: no such file or folder")
    names = (WEIGHTS_NAME, OLD_WEIGHTS_NAME, CONFIG_NAME)
    if file.name in names and (file.parent / CONFIG_NAME).exists():
        return _open_adapter(file.parent, opening)
    if file.suffix in (".safetensors", *PICKLE_SUFFIXES) or file.name.endswith(INDEX_SUFFIX):
        return _open_weights(file, file, opening)
    raise FormatError(f"{file}: not a kind of file that is read; give an adapter's folder or .safetensors weights")


def _open_weights(path: Path, file: Path, opening: Opening) -> Store:
    """A file of tensors by what they are called."""
    if file.name.endswith(INDEX_SUFFIX):
        return _minus_base(path, opening)
    header = open_tensors(file)
    if isinstance(header, TensorFile) and is_updates(header):
        return UpdateStore(file, opening.base_path, opening.device)
    kind = adapter_store_class(header)
    if kind is not None:
        return kind(path, header, opening.base_path, opening.device, opening.alpha)
    if any(key.startswith(PEFT_PREFIX) or parse_key(key) for key in header.infos):
        raise FormatError(
            f"{file}: holds the factors of an adapter, but not its scale; name it {WEIGHTS_NAME} and put its "
            f"{CONFIG_NAME} beside it"
        )
    return _minus_base(path, opening)


def adapter_store_class(header: TensorFile | PickledFile) -> type[FileStore] | None:
    """How an adapter that is one file is read; None for what is no such adapter."""
    if is_kohya(header.infos):
        return KohyaStore
    if is_diffusers(header.infos, header.metadata):
        return DiffusersStore
    return LoralibStore if is_loralib(header.infos) else None


def _open_adapter(folder: Path, opening: Opening) -> Store:
    """A PEFT adapter, with the base that its configuration names where none was given and it lies on disk."""
    config = read_json(folder / CONFIG_NAME)
    named = config.get("base_model_name_or_path")
    own = Path(named).expanduser() if isinstance(named, str) and named else None
    ours = (folder.parent / "run.json").is_file()  # a run's base is its study's, wherever this is called
    if opening.base_path is not None or own is None or ours or not _is_folder(own):
        return _peft_store(folder, config, opening)
    try:
        found = _peft_store(folder, config, replace(opening, base=own))
        found.notes.append(f"its base was found where its configuration says: {own}")
    except RankscopeError as error:
        found = _peft_store(folder, config, opening)
        found.notes.append(f"its base, {own}, could not be used ({error})")
    return found


def _peft_store(folder: Path, config: Mapping[str, Any], opening: Opening) -> Store:
    if peft_type(folder / CONFIG_NAME, config) == "LORA":
        return PeftStore(folder, opening.base_path, opening.device, opening.initial_path)
    return PeftMethodStore(folder, opening.base_path, opening.device)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _minus_base(path: Path, opening: Opening) -> Store:
    if opening.base_path is None:
        raise NoBaseError(f"{path}: holds full weights; say with --base which model they were tuned from")
    return CheckpointStore(path, opening.base_path, opening.device)


def _first_run(study: Path) -> Path:
    runs = sorted(
        {found.parent for name in ("adapter", "update.safetensors") for found in study.glob(f"runs/*/{name}")}
    )
    return runs[0] if runs else study / "runs" / "NAME"
