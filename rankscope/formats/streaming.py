"""Writing a safetensors file one tensor at a time: what is written need not fit into memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from rankscope.errors import FormatError, prefix_errors
from rankscope.formats.file_io import DTYPES, TensorInfo, write_atomic

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # bytes; readers map the tensors in place


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read or computed when it is written; its shape and dtype are known before."""

    info: TensorInfo
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """A tensor of any shape that is in memory already."""
        return cls(TensorInfo.of(tensor), lambda: tensor)

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return torch.Size(self.info.shape).numel() * self.info.dtype.itemsize


def write_streamed(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically, holding one tensor at a time.

    The order is that of the safetensors library, wider dtypes first, so that every tensor is aligned.

    Raises:
        FormatError: the file cannot be written, a tensor cannot be made, is not what its header says, or is of a dtype
            that safetensors does not have.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].info.dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in ordered:
        start, end = end, end + tensors[name].size
        info = tensors[name].info
        if info.dtype not in DTYPE_NAMES:
            raise FormatError(f"{path.name}: {name} is {info.dtype}, which safetensors cannot hold; convert it")
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which a pickle can hold
        raise FormatError(f"{path.name}: a name in it is no Unicode text ({error.reason}); rename it") from error
    text += b" " * (-len(text) % ALIGNMENT)

    def write(target: Path) -> None:
        with target.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in ordered:
                with prefix_errors(f"{path.name}: {name}"):
                    _write_tensor(file, tensors[name])

    write_atomic(path, write)


def _write_tensor(file: BinaryIO, pending: LazyTensor) -> None:
    try:
        tensor = pending.read().detach().to("cpu").contiguous()
    except (OSError, RuntimeError, ValueError, MemoryError) as error:  # its source is at fault, not the written file
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise FormatError(f"cannot be computed ({reason})") from error
    info = TensorInfo.of(tensor)
    if info != pending.info:
        raise FormatError(f"is {info}, where {pending.info} was announced; has the file changed meanwhile?")
    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
