"""Tensors in files of torch.save (.bin, .pt): read without running code that they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.file_io import TensorFile, TensorInfo

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
STATE_DICT_KEYS = ("state_dict", "model_state_dict")  # under which training scripts save a state dict


class PickledFile:
    """A state dict saved by torch.save, with the interface of ``TensorFile``.

    A pickle can run code when it is loaded; only torch's restricted loader is used, which builds tensors and
    plain containers and refuses the rest. The tensors stay on disk until read (mapped) where the file is a zip.

    Raises:
        FormatError: missing, damaged, refused by the restricted loader, or not a flat dictionary of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        state = _load(path)
        for wrapper in STATE_DICT_KEYS:
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        if not isinstance(state, dict) or not all(_is_plain_tensor(value) for value in state.values()):
            raise FormatError(f"{path}: not a flat dictionary of tensors; save the model's state_dict as safetensors")
        self._tensors: dict[str, Tensor] = {str(name): value.detach() for name, value in state.items()}
        self.infos = {name: TensorInfo.of(value) for name, value in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor as stored, in its shape and dtype, backed by the mapped file."""
        return self._tensors[name]


def open_tensors(path: Path) -> TensorFile | PickledFile:
    """A file of tensors by its suffix: .bin, .pt and .pth by the restricted loader, all else as safetensors."""
    return PickledFile(path) if path.suffix in PICKLE_SUFFIXES else TensorFile(path)


def _is_plain_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # older files are plain pickles and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # damaged bytes can make the unpickler raise almost anything
        raise FormatError(
            f"{path}: damaged, or holds more than tensors, which is refused because a pickle can run code; "
            "save it as safetensors"
        ) from error
