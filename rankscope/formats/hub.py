"""Names of the Hugging Face hub (``org/name``) as folders on disk: the cache first, then a download."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

from rankscope.errors import FormatError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
WEIGHT_SUFFIXES = (".safetensors", ".json", ".bin", ".pt", ".pth")
SAFETENSORS_PATTERNS = ("*.safetensors", "*.json")  # fetched first; the pickles only where these hold no weights
PICKLE_PATTERNS = ("*.bin", "*.json")
IGNORED_PATTERNS = ("original/*", "consolidated*")  # the same weights once more, in their authors' format


def local_path(name: str | os.PathLike[str]) -> Path:
    """The path with ``~`` resolved; where nothing exists there and it can be an id of the hub, that model's folder.

    ``./org/name`` is never an id, nor is ``org/name`` where there is a folder ``org``.

    Raises:
        FormatError: the hub's model is not in the cache and cannot be fetched.
    """
    text, path = os.fspath(name), Path(name).expanduser()
    if text.startswith("."):
        return Path(os.path.abspath(path)) if not _exists(path) else path
    if not HUB_ID.fullmatch(text) or text.endswith(WEIGHT_SUFFIXES) or _exists(path) or _exists(path.parent):
        return path
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise FormatError(
            f'{text}: no such file or folder; if it is a model of the hub, pip install "rankscope[hf]"'
        ) from error
    return _find_cached(hub, text) or _download(hub, text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no file can have this name; opening it raises the error
        return True


def _find_cached(hub: Any, name: str) -> Path | None:
    """The folder in the cache, None where it is not there or without weights."""
    try:
        folder = Path(hub.snapshot_download(name, local_files_only=True))
    except Exception:  # each release of the library has its own classes for "not there"
        return None
    return folder if _has_weights(folder) else None


def _download(hub: Any, name: str) -> Path:
    if hub.constants.HF_HUB_OFFLINE:
        raise FormatError(f"{name}: no such file or folder, and not in the hub's cache (HF_HUB_OFFLINE is set)")
    try:
        for patterns in (SAFETENSORS_PATTERNS, PICKLE_PATTERNS):
            folder = Path(
                hub.snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(IGNORED_PATTERNS))
            )
            if _has_weights(folder):
                return folder
    except Exception as error:  # no network, no such repository, a gated one: dozens of classes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(lines[0].split()).rstrip(".")
        raise FormatError(
            f"{name}: no such file or folder, and it cannot be fetched from the hub ({reason})"
        ) from error
    raise FormatError(f"{name}: the hub has it, without weights that are read (.safetensors, .bin)")


def _has_weights(folder: Path) -> bool:
    return any(next(folder.rglob(pattern), None) is not None for pattern in ("*.safetensors", "*.bin"))
