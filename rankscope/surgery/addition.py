"""Adds updates to a stored weight and rounds once, in blocks of rows, and measures the rounding error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankscope.errors import FormatError, ShapeError
from rankscope.linalg import ulp, working_dtype
from rankscope.surgery.truncate import CHUNK
from rankscope.updates import Dense, Update, check_finite


class Rounding(NamedTuple):
    """``norm``: ‖Σ updates‖_F. ``error``: ‖rounded sum − exact sum‖_F. ``left``: see ``squared_rounding_error``."""

    norm: float
    error: float
    left: float


def add_and_round(stored: Tensor, updates: Sequence[Update], dtype: torch.dtype) -> tuple[Tensor, Rounding]:
    """stored (rows, columns) + Σ updates, as (rows, columns) in ``dtype``; one block of rows at a time is in float64.

    Raises:
        ShapeError: an update has another shape.
        NonFiniteError: the stored weight holds NaN or infinity, or the sum is too large for ``dtype``.
    """
    for update in updates:
        if update.shape != tuple(stored.shape):
            raise ShapeError(f"an update of shape {update.shape} does not fit a weight of shape {tuple(stored.shape)}")
    check_finite(stored, "the weight")
    working = working_dtype(stored.device)
    readers = [_row_reader(update, working) for update in updates]
    result = torch.empty(stored.shape, dtype=dtype, device=stored.device)
    step = max(1, CHUNK // stored.shape[1])
    squares = []
    for i in range(0, len(stored), step):
        rows = slice(i, i + step)
        start = stored[rows].to(working)
        change = sum((read(rows) for read in readers), torch.zeros_like(start))
        part = (start + change).to(dtype)
        check_finite(part, f"the sum in {str(dtype).removeprefix('torch.')}")
        result[rows] = part
        error = part.to(working) - start - change
        squares.append(
            (float(change.square().sum()), float(error.square().sum()), squared_rounding_error(stored[rows], part))
        )
    return result, Rounding(*(math.sqrt(math.fsum(parts)) for parts in zip(*squares, strict=True)))


def _row_reader(update: Update, working: torch.dtype) -> Callable[[slice], Tensor]:
    """A function that gives a slice of the rows of an update, (rows, columns), in the working precision."""
    thin = update.product
    if thin is not None:
        left, right = thin.left, thin.right
        return lambda rows: left[rows] @ right
    matrix = update.dense() if isinstance(update, Dense) else update.working_matrix
    return lambda rows: matrix[rows].to(working)


def in_float64(tensor: Tensor) -> Tensor:
    """The same tensor (any shape) in float64.

    Raises:
        FormatError: it holds complex numbers, which no update does.
    """
    if tensor.is_complex():
        raise FormatError("holds complex numbers, which cannot be added here")
    return tensor.double()


def squared_rounding_error(merged: Tensor, back: Tensor) -> float:
    """Expected ‖back − original‖²_F, where ``merged`` was rounded once and the original had the same dtype.

    ``merged`` and ``back``, the weight after unmerging, have the same shape.

    An entry comes back exactly unless the merged number is coarser spaced (ulp m) than the original (ulp w < m). Then
    its rounding, uniform in ±m/2, is itself rounded to a multiple of w: E = (m² + 2w²)/12.
    """
    coarse, fine = ulp(merged, merged.dtype), ulp(back, back.dtype)
    working = working_dtype(merged.device)
    lost = coarse > fine
    return float(torch.where(lost, (coarse.to(working) ** 2 + 2 * fine.to(working) ** 2) / 12, 0.0).sum())
