"""A stored weight plus updates, rounded once, and what the rounding did: rows at a time, in the working precision."""

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
    """``norm``: ‖Σ updates‖_F. ``error``: ‖rounded sum − exact sum‖_F. ``left``: see ``expected_squared_error``."""

    norm: float
    error: float
    left: float


def add_and_round(stored: Tensor, updates: Sequence[Update], dtype: torch.dtype) -> tuple[Tensor, Rounding]:
    """stored (rows, columns) + Σ updates, in ``dtype``; one block of rows at a time is held in float64.

    Raises:
        ShapeError: an update of another shape.
        NonFiniteError: the stored weight holds NaN or infinity, or the sum is too large for ``dtype``.
    """
    for update in updates:
        if update.shape != tuple(stored.shape):
            raise ShapeError(f"an update of shape {update.shape} does not fit a weight of shape {tuple(stored.shape)}")
    check_finite(stored, "the weight")
    working = working_dtype(stored.device)
    blocks = [_rows(update, working) for update in updates]
    result = torch.empty(stored.shape, dtype=dtype, device=stored.device)
    step = max(1, CHUNK // stored.shape[1])
    squares = []
    for i in range(0, len(stored), step):
        rows = slice(i, i + step)
        start = stored[rows].to(working)
        change = sum((block(rows) for block in blocks), torch.zeros_like(start))
        part = (start + change).to(dtype)
        check_finite(part, f"the sum in {str(dtype).removeprefix('torch.')}")
        result[rows] = part
        error = part.to(working) - start - change
        squares.append(
            (float(change.square().sum()), float(error.square().sum()), expected_squared_error(stored[rows], part))
        )
    return result, Rounding(*(math.sqrt(math.fsum(parts)) for parts in zip(*squares, strict=True)))


def _rows(update: Update, working: torch.dtype) -> Callable[[slice], Tensor]:
    thin = update.product
    if thin is not None:
        left, right = thin.left, thin.right
        return lambda rows: left[rows] @ right
    matrix = update.dense() if isinstance(update, Dense) else update.working_matrix
    return lambda rows: matrix[rows].to(working)


def in_float64(tensor: Tensor) -> Tensor:
    """The same numbers, to be summed.

    Raises:
        FormatError: they are complex, which no update is.
    """
    if tensor.is_complex():
        raise FormatError("holds complex numbers, which are not added here")
    return tensor.double()


def expected_squared_error(merged: Tensor, back: Tensor) -> float:
    """Expected ‖back − original‖²_F where ``merged`` was rounded once and the original was a number of that dtype.

    An entry comes back exactly unless the merged number is coarser spaced (ulp m) than the original (ulp w < m). Then
    its rounding, uniform in ±m/2, is itself rounded to a multiple of w: E = (m² + 2w²)/12.
    """
    coarse, fine = ulp(merged, merged.dtype), ulp(back, back.dtype)
    working = working_dtype(merged.device)
    lost = coarse > fine
    return float(torch.where(lost, (coarse.to(working) ** 2 + 2 * fine.to(working) ** 2) / 12, 0.0).sum())
