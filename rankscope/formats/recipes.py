"""From headers to an update: what the tensors of one module make is known before any of them is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.abstract_store import UpdateInfo
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.peft_config import MethodConfig
from rankscope.updates import Update

Headers = Mapping[str, TensorInfo]
Tensors = Mapping[str, Tensor]
BASE_WEIGHT = "the base weight"
"""The name under which a recipe reads the module's weight (out, in) in the base."""

UNKNOWN_SHAPE_REASON = "its file does not tell the shape of the weight"
WRONG_BASE_HINT = "is this the base that was tuned?"


class SkippedPartError(FormatError):
    """A part of an adapter that is skipped; the message is the reason."""


class AdaptedModule(NamedTuple):
    """One adapted module: its path, the headers of its tensors (and of those that all modules share) by part, the
    adapter's configuration, and the shape (out, in) of its weight in the base, None without one."""

    name: str
    headers: Headers
    config: MethodConfig
    shape: tuple[int, int] | None

    def base_shape(self, why: str) -> tuple[int, int]:
        """(out, in) of the weight in the base.

        Raises:
            SkippedPartError: it is not known; ``why`` says what it is needed for.
        """
        if self.shape is None:
            raise SkippedPartError(f"{why}; give its base model (--base), which must hold this weight")
        return self.shape

    def stored_dtype(self, part: str) -> torch.dtype:
        """The stored dtype of a part."""
        return self.headers[part].dtype


class Recipe(NamedTuple):
    """``build`` makes the update that ``info`` describes, from the tensors by the names that ``reads`` lists."""

    info: UpdateInfo
    reads: tuple[str, ...]
    build: Callable[[Tensors], Update]


def float_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for eight-bit floats, which torch promotes with no other dtype; any other dtype as it is."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize == 1 else dtype


def upcast_float8(tensor: Tensor) -> Tensor:
    """A tensor of any shape, in float32 where it holds eight-bit floats, which torch can hardly compute with."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def check_floating(headers: Headers) -> None:
    """Raise FormatError where a factor holds no floating-point numbers, or has an empty side."""
    for name, info in headers.items():
        if not info.dtype.is_floating_point:
            stored = str(info.dtype).removeprefix("torch.")
            raise FormatError(f"{name} is stored as {stored}; factors are floating-point numbers")
        if 0 in info.shape:
            raise FormatError(f"{name} {info.shape} has an empty side")


def check_indices(headers: Headers, *names: str) -> None:
    """Raise FormatError where a tensor of indices does not hold whole numbers."""
    for name in names:
        dtype = headers[name].dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            stored = str(dtype).removeprefix("torch.")
            raise FormatError(f"{name} is stored as {stored}; places are whole numbers")


def check_complete(headers: Headers, needed: Iterable[str]) -> None:
    """Raise FormatError where some of the tensors that belong together are missing."""
    needed = tuple(needed)
    missing = [name for name in needed if name not in headers]
    if missing:
        there = ", ".join(name for name in needed if name in headers) or ", ".join(headers)
        raise FormatError(f"half of the factors is missing: {', '.join(missing)} (there is {there})")


def check_shapes(headers: Headers, **expected: tuple[int | None, ...]) -> None:
    """Raise FormatError where a tensor has another shape than expected; None stands for any size."""
    for name, shape in expected.items():
        stored = headers[name].shape
        if len(stored) != len(shape) or any(want not in (None, size) for want, size in zip(shape, stored, strict=True)):
            wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
            raise FormatError(f"{name} is {stored}, which does not fit its neighbours; expected {wanted}")


def check_base_shape(module: AdaptedModule, shape: tuple[int, int]) -> None:
    """Raise FormatError where the base's weight has another shape than the adapter's tensors make."""
    if module.shape is not None and module.shape != shape:
        raise FormatError(f"the adapter is of a weight {shape}, the base has {module.shape}; {WRONG_BASE_HINT}")


def to_float64(tensor: Tensor) -> Tensor:
    """A tensor of any shape in float64, in which small factors are multiplied."""
    return tensor.double()


def matrix_sides(module: AdaptedModule, part: str) -> tuple[int, int]:
    """Both sides of a part that must be a matrix."""
    shape = module.headers[part].shape
    if len(shape) != 2:
        raise FormatError(f"{part} is {shape}; expected a matrix")
    return shape[0], shape[1]


def element_count(shape: Iterable[int]) -> int:
    """The product of the sides."""
    return torch.Size(tuple(shape)).numel()
