"""Reading and writing single files: JSON and safetensors, with one clear error each.

A file's header is read first, and a tensor only when it is asked for. A file is written beside its target and then
renamed, so that the target is either the old file or the new one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankscope.errors import FormatError

MAX_JSON_BYTES = 256 * 2**20  # an index of a 10 000-shard checkpoint is a few MiB


@dataclass(frozen=True)
class TensorInfo:
    """Shape and stored dtype of one tensor, as in a file's header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        """Shape and dtype of a tensor of any shape."""
        return cls(tuple(tensor.shape), tensor.dtype)


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFile:
    """One safetensors file: its header now, its tensors one at a time.

    Raises:
        FormatError: the file is missing, truncated, or its header does not fit its length.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with wrap_read_errors(path):
            self._file = cast(Any, safe_open(path, framework="pt"))
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            self.infos = {name: self._info(name) for name in self._file.keys()}  # noqa: SIM118 (not a mapping)

    def _info(self, name: str) -> TensorInfo:
        part = self._file.get_slice(name)
        stored = part.get_dtype()
        if stored not in DTYPES:
            raise FormatError(f"tensor {name!r} has the dtype {stored}, which cannot be read; save it as float32")
        return TensorInfo(tuple(part.get_shape()), DTYPES[stored])

    def read(self, name: str) -> Tensor:
        """The tensor as stored, in its shape and dtype, backed by the mapped file."""
        with wrap_read_errors(self.path):
            tensor: Tensor = self._file.get_tensor(name)
            return tensor

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor as stored, (stop − start, …), read into memory of their own.

        The pages of a mapped file count as memory of the process until the file is closed; these rows do not.
        """
        info = self.infos[name]
        tensor = torch.empty(stop - start, *info.shape[1:], dtype=info.dtype)
        size = tensor[:1].numel() * tensor.element_size()
        with wrap_read_errors(self.path), self.path.open("rb", buffering=0) as file:
            file.seek(self._offsets[name] + start * size)
            buffer = memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))
            while len(buffer):
                count = file.readinto(buffer)
                if not count:
                    raise FormatError("ends within a tensor; copy or download it again")
                buffer = buffer[count:]
        return tensor

    @cached_property
    def _offsets(self) -> dict[str, int]:
        """Where each tensor begins in the file, in bytes."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        offsets = {name: 8 + length + part["data_offsets"][0] for name, part in header.items() if name in self.infos}
        if offsets.keys() != self.infos.keys():
            raise FormatError("has changed since it was opened; open it again")
        return offsets


@contextmanager
def wrap_read_errors(path: Path) -> Iterator[None]:
    """Turn what the system and the libraries raise on a bad file into one FormatError."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (SafetensorError, RuntimeError, ValueError, MemoryError) as error:
        raise FormatError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FormatError: missing, unreadable, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FormatError(f"{path}: larger than any configuration ({path.stat().st_size} bytes)")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, copied off the mapping so that the file may change."""
    file = TensorFile(path)
    return {name: file.read(name).clone() for name in file.infos}


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a new path beside ``path``, then rename that file; an error leaves no half-written file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise FormatError(f"{path}: cannot be written ({error.strerror or error})") from error
    try:
        write(Path(name))
        os.chmod(name, 0o666 & ~umask())
        os.replace(name, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FormatError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        Path(name).unlink(missing_ok=True)


def umask() -> int:
    """The process's umask, which the system only tells when it is set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, atomically.

    Raises:
        FormatError: it cannot be written, or holds NaN or infinity, which JSON does not have.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be written as JSON ({error}); correct what it is made of") from error
    write_atomic(path, lambda target: _write_text(target, text))


def as_text(text: str) -> str:
    """A path or a command line as text: bytes that are no UTF-8 (surrogates in Python) are written as ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; tensors are brought to the CPU and made contiguous."""
    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    tags = {"format": "pt", **(metadata or {})}
    write_atomic(path, lambda target: save_file(ready, target, metadata=tags))
