"""Shapes of LoRA's factors: what kind of layer they belong to, and whether they fit each other."""

from __future__ import annotations

import torch
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.peft_keys import LayerType


def layer_geometry(A: TensorInfo, B: TensorInfo, embedding: bool) -> tuple[LayerType, tuple[int, int]]:
    """Kind of layer and (out, in) of its update, from the shapes of its factors.

    Raises:
        FormatError: they do not multiply, are empty, or are not floating-point.
    """
    shapes = f"A {A.shape} and B {B.shape}"
    for info in (A, B):
        if not info.dtype.is_floating_point:
            raise FormatError(f"{shapes} are stored as {A.dtype} and {B.dtype}; factors are floating-point numbers")
    if 0 in A.shape or 0 in B.shape:
        raise FormatError(f"{shapes} have an empty side")
    if len(A.shape) == len(B.shape) == 2 and A.shape[0] == B.shape[1]:
        return ("embedding", (A.shape[1], B.shape[0])) if embedding else ("linear", (B.shape[0], A.shape[1]))
    if not embedding and _is_convolution(A.shape, B.shape):
        columns = torch.Size(A.shape[1:]).numel()
        return "conv", (B.shape[0], columns)
    raise FormatError(f"{shapes} do not multiply; expected (r, in) and (out, r)")


def _is_convolution(A: tuple[int, ...], B: tuple[int, ...]) -> bool:
    """A (r, in, kh, kw) and B (out, r/groups, 1, 1), or with one, or three, dimensions of kernel."""
    if not 3 <= len(A) <= 5 or len(B) != len(A) or any(size != 1 for size in B[2:]) or A[0] % B[1]:
        return False
    return B[0] % (A[0] // B[1]) == 0


def block_diagonal(B: Tensor, groups: int) -> Tensor:
    """B (out, r/groups) spread to (out, r): the outputs of a group use the r/groups rows of A of that group."""
    blocks = B.reshape(groups, -1, B.shape[1])
    spread = blocks.new_zeros(groups, blocks.shape[1], groups, blocks.shape[2])
    spread.diagonal(dim1=0, dim2=2).copy_(blocks.permute(1, 2, 0))
    return spread.reshape(B.shape[0], -1)


def check_magnitude(info: TensorInfo, shape: tuple[int, int], kind: LayerType) -> None:
    """Raise FormatError unless DoRA's magnitude has one number for each output (each dimension of an embedding)."""
    expected = shape[1] if kind == "embedding" else shape[0]
    if torch.Size(info.shape).numel() != expected or not info.dtype.is_floating_point:
        raise FormatError(f"its magnitude is {info.shape}, but the update {shape} needs {expected} numbers")
