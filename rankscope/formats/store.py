"""``open(path, base)``: whatever the path holds, as a store of updates."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rankscope.errors import ConfigError, FormatError
from rankscope.formats.checkpoint import INDEX_SUFFIX, UPDATES_NAME, has_checkpoint
from rankscope.formats.files import TensorFile, read_json
from rankscope.formats.interface import Skipped, Store, UnknownLayerError, UpdateInfo
from rankscope.formats.peft import PeftStore
from rankscope.formats.peft_config import peft_type
from rankscope.formats.peft_keys import CONFIG_NAME, OLD_WEIGHTS_NAME, WEIGHTS_NAME, parse_key
from rankscope.formats.peft_methods import MethodStore
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
    initial: str | os.PathLike[str] | None = None,
) -> Store:
    """Open a source of updates by what is in it; reads headers, no tensors.

    A PEFT adapter of any method (its folder or its weights file), a run of ours, a file of updates, or full weights
    (file, folder or shards), which become the tuned weights minus ``base``.

    Args:
        path: file or folder.
        base: checkpoint of the pre-trained model: required for full weights and for methods that act through it, used
            for DoRA, for modules that an adapter holds whole, and for ``Store.weight``.
        device: where updates are put.
        initial: a LoRA adapter as it was before training, where its initialisation moved the base (PiSSA and others)
            and it is not beside the adapter.

    Raises:
        FormatError: nothing there, nothing that is known, damaged, or full weights without a base.
        ConfigError: the device cannot be used, or ``initial`` for something else than a LoRA adapter.
    """
    place = Path(path).expanduser()
    origin = Path(base).expanduser() if base is not None else None
    start = Path(initial).expanduser() if initial is not None else None
    try:
        found = (
            _open_folder(place, origin, device, start) if place.is_dir() else _open_file(place, origin, device, start)
        )
    except OSError as error:  # no permission to look; a name too long
        raise FormatError(f"{place}: cannot be read ({error.strerror or error})") from error
    if start is not None and not isinstance(found, PeftStore):
        raise ConfigError(f"{place}: is no LoRA adapter, so an initial adapter ({start}) means nothing for it")
    return found


def _open_folder(folder: Path, base: Path | None, device: torch.device | str, initial: Path | None) -> Store:
    for adapter in (folder, folder / ADAPTER_FOLDER):
        if (adapter / CONFIG_NAME).exists():
            return _open_adapter(adapter, base, device, initial)
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


def _open_file(file: Path, base: Path | None, device: torch.device | str, initial: Path | None) -> Store:
    if not file.exists():
        raise FormatError(f"{file}: no such file or folder")
    if file.name in (WEIGHTS_NAME, OLD_WEIGHTS_NAME, CONFIG_NAME):
        return _open_adapter(file.parent, base, device, initial)
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


def _open_adapter(folder: Path, base: Path | None, device: torch.device | str, initial: Path | None) -> Store:
    config = folder / CONFIG_NAME
    if peft_type(config, read_json(config)) == "LORA":
        return PeftStore(folder, base, device, initial)
    return MethodStore(folder, base, device)


def _minus_base(path: Path, base: Path | None, device: torch.device | str) -> Store:
    if base is None:
        raise FormatError(f"{path}: holds full weights; say with --base which model they were tuned from")
    return CheckpointStore(path, base, device)


def _first_run(study: Path) -> Path:
    runs = sorted(
        {found.parent for name in ("adapter", "update.safetensors") for found in study.glob(f"runs/*/{name}")}
    )
    return runs[0] if runs else study / "runs" / "NAME"
