"""``open(path, base)``: whatever the path holds, as a store of updates."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from rankscope.errors import ConfigError, FormatError
from rankscope.formats.abstract_store import SkippedItem, Store, UnknownLayerError, UpdateInfo
from rankscope.formats.adapter_file import FileStore
from rankscope.formats.checkpoint import INDEX_SUFFIX, checkpoint_file, has_checkpoint
from rankscope.formats.checkpoint_store import CheckpointStore, UpdateStore, write_updates
from rankscope.formats.file_formats import CHECKPOINT, all_formats, format_of
from rankscope.formats.hub import local_path
from rankscope.formats.opening import Opening
from rankscope.formats.peft_keys import CONFIG_NAME, OLD_WEIGHTS_NAME, WEIGHTS_NAME
from rankscope.formats.peft_lora import PeftStore
from rankscope.formats.pickle_file import PICKLE_SUFFIXES, open_tensors
from rankscope.formats.study_layout import ADAPTER_FOLDER, RUNS_FOLDER, STUDY_NAME, UPDATES_NAME

# Files of other tools that are not read, by their ending.
FOREIGN_FILES = {
    ".gguf": "is a GGUF file of llama.cpp, which is not read; give the adapter or model that it was made from",
    ".npz": "is a numpy archive, as mlx-lm once saved adapters; save its arrays as adapters.safetensors",
}

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


def open(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    initial: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
) -> Store:
    """Open a source of updates by what is in it; reads headers, no tensors.

    An adapter (a folder of PEFT's, of any method; a file of kohya's scripts, LyCORIS, diffusers or loralib), a run of
    a study, a file of updates, or full weights (file, folder or shards), which become the tuned weights minus ``base``.

    Args:
        path: file or folder; or an id of the hub (``org/name``), where nothing lies at that path.
        base: checkpoint of the pre-trained model, a path or an id; by default the folder that a PEFT adapter's
            configuration names, where there is one. It is required for full weights and for methods that act through
            it, used for DoRA, for modules that an adapter holds whole, and for ``Store.weight``.
        device: where updates are put.
        initial: a LoRA adapter as it was before training, where its initialisation moved the base (PiSSA and others)
            and it is not beside the adapter.
        alpha: α where the file has none: loralib's never do.

    Raises:
        FormatError: there is nothing, the format is not known, a file is damaged, or full weights have no base.
        ConfigError: the device cannot be used, α is not finite, or ``initial`` for something else than a LoRA adapter.
    """
    return open_source(path, Opening(base, alpha, initial, device))


def open_source(path: str | os.PathLike[str], opening: Opening) -> Store:
    """``open`` with its settings as one value.

    Raises:
        FormatError, ConfigError: as for ``open``.
    """
    local, alpha = local_path(path), opening.alpha
    if alpha is not None and not math.isfinite(alpha):
        raise ConfigError(f"alpha = {alpha}: α is a finite number")
    try:
        store = _open_folder(local, opening) if local.is_dir() else _open_file(local, opening)
    except OSError as error:  # no permission to look; a name too long
        raise FormatError(f"{local}: cannot be read ({error.strerror or error})") from error
    if opening.initial is not None and not isinstance(store, PeftStore):
        raise ConfigError(
            f"{local}: is no LoRA adapter, so an initial adapter ({opening.initial_path}) means nothing for it"
        )
    if alpha is not None and not (isinstance(store, FileStore) and store.given):
        store.notes.append(f"its scale is known from the file; the given α = {alpha:g} is not used")
    return store


def _open_folder(folder: Path, opening: Opening) -> Store:
    for row in all_formats():
        for name in row.paths:
            if (folder / name).exists():
                return row.open(folder / name, None, opening)
    for weights in (folder / WEIGHTS_NAME, folder / OLD_WEIGHTS_NAME):
        if weights.exists() and format_of(open_tensors(weights)) is CHECKPOINT:
            raise FormatError(f"{folder}: has an adapter's weights but no {CONFIG_NAME}, which holds its scale; add it")
        if weights.exists():
            return _open_file(weights, opening)
    if (folder / STUDY_NAME).exists():
        raise FormatError(f"{folder}: is a study; give one of its runs, such as {_first_run(folder)}")
    if has_checkpoint(folder):
        return _open_weights(folder, checkpoint_file(folder), opening)
    paths = ", ".join(name for row in all_formats() for name in row.paths)
    looked_for = f"looked for {paths}, model.safetensors, model.safetensors.index.json and any single .safetensors file"
    if not any(folder.iterdir()):
        raise FormatError(f"{folder}: is empty; {looked_for}")
    raise FormatError(f"{folder}: holds nothing that is known; {looked_for}")


def _open_file(file: Path, opening: Opening) -> Store:
    if not file.exists():
        raise FormatError(f"{file}: no such file or folder")
    for row in all_formats():
        if row.is_part is not None and row.is_part(file):
            return row.open(file, None, opening)
    if file.suffix in (".safetensors", *PICKLE_SUFFIXES) or file.name.endswith(INDEX_SUFFIX):
        return _open_weights(file, file, opening)
    if file.suffix in FOREIGN_FILES:
        raise FormatError(f"{file}: {FOREIGN_FILES[file.suffix]}")
    raise FormatError(f"{file}: not a kind of file that is read; give an adapter's folder or .safetensors weights")


def _open_weights(path: Path, file: Path, opening: Opening) -> Store:
    """Open a file of tensors by its contents."""
    if file.name.endswith(INDEX_SUFFIX):
        return CHECKPOINT.open(path, None, opening)
    tensors = open_tensors(file)
    return format_of(tensors).open(path, tensors, opening)


def _first_run(study: Path) -> Path:
    runs = sorted(
        {path.parent for name in (ADAPTER_FOLDER, UPDATES_NAME) for path in study.glob(f"{RUNS_FOLDER}/*/{name}")}
    )
    return runs[0] if runs else study / RUNS_FOLDER / "NAME"
