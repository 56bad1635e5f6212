"""``open(path, base)``: whatever the path holds, as a store of updates."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rankscope.errors import FormatError
from rankscope.formats.checkpoint import INDEX_SUFFIX, UPDATES_NAME, has_checkpoint
from rankscope.formats.files import TensorFile
from rankscope.formats.interface import Skipped, Store, UnknownLayerError, UpdateInfo
from rankscope.formats.peft import PeftStore
from rankscope.formats.peft_keys import CONFIG_NAME, OLD_WEIGHTS_NAME, WEIGHTS_NAME, parse_key
from rankscope.formats.pickled import SUFFIXES
from rankscope.formats.tuned import CheckpointStore, UpdateStore, is_updates, write_updates

__all__ = [
    "CheckpointStore",
    "PeftStore",
    "Skipped",
    "Store",
    "UnknownLayerError",
    "UpdateInfo",
    "UpdateStore",
    "open",
    "write_updates",
]

ADAPTER_FOLDER = "adapter"
LOOKED_FOR = (
    f"looked for {CONFIG_NAME}, {ADAPTER_FOLDER}/{CONFIG_NAME}, {UPDATES_NAME}, model.safetensors, "
    "model.safetensors.index.json and any single .safetensors file"
)


def open(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> Store:
    """Open a source of updates by what is in it; reads headers, no tensors.

    A PEFT adapter (its folder or its weights file), a run of ours, a file of updates, or full weights (file,
    folder or shards), which become the tuned weights minus ``base``.

    Args:
        path: file or folder.
        base: checkpoint of the pre-trained model: required for full weights, used for DoRA and for
            ``Store.weight``.
        device: where updates are put.

    Raises:
        FormatError: nothing there, nothing that is known, damaged, or full weights without a base.
        ConfigError: the device cannot be used.
    """
    place = Path(path).expanduser()
    origin = Path(base).expanduser() if base is not None else None
    try:
        return _open_folder(place, origin, device) if place.is_dir() else _open_file(place, origin, device)
    except OSError as error:  # no permission to look; a name too long
        raise FormatError(f"{place}: cannot be read ({error.strerror or error})") from error


def _open_folder(folder: Path, base: Path | None, device: torch.device | str) -> Store:
    for adapter in (folder, folder / ADAPTER_FOLDER):
        if (adapter / CONFIG_NAME).exists():
            return PeftStore(adapter, base, device)
    if (folder / UPDATES_NAME).exists():
        return UpdateStore(folder / UPDATES_NAME, base, device)
    if (folder / WEIGHTS_NAME).exists() or (folder / OLD_WEIGHTS_NAME).exists():
        raise FormatError(f"{folder}: has an adapter's weights but no {CONFIG_NAME}, which holds its scale; add it")
    if (folder / "study.json").exists():
        raise FormatError(f"{folder}: is a study; give one of its runs, such as {_first_run(folder)}")
    if has_checkpoint(folder):
        return _minus_base(folder, base, device)
    if not any(folder.iterdir()):
        raise FormatError(f"{folder}: is empty; {LOOKED_FOR}")
    raise FormatError(f"{folder}: holds nothing that is known; {LOOKED_FOR}")


def _open_file(file: Path, base: Path | None, device: torch.device | str) -> Store:
    if not file.exists():
        raise FormatError(f"{file}: no such file or folder")
    if file.name in (WEIGHTS_NAME, OLD_WEIGHTS_NAME, CONFIG_NAME):
        return PeftStore(file.parent, base, device)
    if file.suffix == ".safetensors":
        header = TensorFile(file)
        if is_updates(header):
            return UpdateStore(file, base, device)
        if any(parse_key(key) for key in header.infos):
            raise FormatError(
                f"{file}: holds the factors of an adapter, but not its scale; name it {WEIGHTS_NAME} and put its "
                f"{CONFIG_NAME} beside it"
            )
        return _minus_base(file, base, device)
    if file.name.endswith(INDEX_SUFFIX) or file.suffix in SUFFIXES:
        return _minus_base(file, base, device)
    raise FormatError(f"{file}: not a kind of file that is read; give an adapter's folder or .safetensors weights")


def _minus_base(path: Path, base: Path | None, device: torch.device | str) -> Store:
    if base is None:
        raise FormatError(f"{path}: holds full weights; say with --base which model they were tuned from")
    return CheckpointStore(path, base, device)


def _first_run(study: Path) -> Path:
    runs = sorted(
        {found.parent for name in ("adapter", "update.safetensors") for found in study.glob(f"runs/*/{name}")}
    )
    return runs[0] if runs else study / "runs" / "NAME"
