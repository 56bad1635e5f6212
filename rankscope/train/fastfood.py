"""The Fastfood product: a random matrix of D rows and d columns that is multiplied with in O(D log d), never stored.

Le, Sarlós & Smola, ICML 2013; as the projection of a random subspace Li et al., ICLR 2018.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def hadamard_transform(x: Tensor) -> Tensor:
    """H·x for the Walsh–Hadamard matrix H of entries ±1 in Sylvester's order: H = Hᵀ, H·H = size·I.

    log2(size) passes over the numbers of x, each of sums and differences. No gradient is kept of them: Fastfood, which
    calls this, has its own.

    Args:
        x: (size, n), contiguous; each column is transformed. The result has the same shape.

    Raises:
        ValueError: size is not a power of two.
    """
    size = x.shape[0]
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Walsh–Hadamard transform needs a power of two, not {size}")
    spare = (torch.empty_like(x), torch.empty_like(x))
    now = x
    for stage in range(size.bit_length() - 1):
        half = 1 << stage
        before, after = (y.view(size // (2 * half), 2, -1) for y in (now, spare[stage % 2]))
        torch.add(before[:, 0], before[:, 1], out=after[:, 0])
        torch.sub(before[:, 0], before[:, 1], out=after[:, 1])
        now = spare[stage % 2]
    return now


class Fastfood(nn.Module):
    """P, shape (D, d): blocks H·G·Π·H·B one below the other, as high as d padded to a power of two; the last is cut.

    B are random signs, Π a random permutation, G standard normal, all of each block its own. The scale makes
    E‖P·e‖² = 1 for each column, and so E‖P·z‖² = ‖z‖²; each number of P·z has the variance ‖z‖²/D. Kept are the three
    diagonals: 13 bytes a row of P.

    Args:
        rows: D.
        columns: d.
        generator: of the CPU, what the blocks are drawn from.
    """

    signs: Tensor
    order: Tensor
    gains: Tensor

    def __init__(self, rows: int, columns: int, generator: torch.Generator) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.size = 1 << (columns - 1).bit_length()
        self.blocks = -(-rows // self.size)
        shape = (self.size, self.blocks)  # a block is a column: neighbours in memory are treated alike
        scale = 1 / math.sqrt(rows * self.size)
        self.register_buffer("signs", torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1)
        place = torch.rand(shape, generator=generator).argsort(dim=0)
        self.register_buffer("order", (place * self.blocks + torch.arange(self.blocks)).flatten())
        self.register_buffer("gains", torch.randn(shape, generator=generator) * scale)

    def forward(self, z: Tensor) -> Tensor:
        """P·z (D,) of z (d,), with a gradient."""
        out: Tensor = _Product.apply(z, self)  # type: ignore[no-untyped-call]
        return out

    def product(self, z: Tensor) -> Tensor:
        """P·z (D,) of z (d,)."""
        padded = z.new_zeros(self.size)
        padded[: self.columns] = z
        mixed = hadamard_transform(self.signs * padded[:, None])
        shuffled = mixed.flatten().index_select(0, self.order).view_as(mixed)
        return hadamard_transform(self.gains * shuffled).T.flatten()[: self.rows]

    def transposed_product(self, y: Tensor) -> Tensor:
        """Pᵀ·y (d,) of y (D,)."""
        padded = y.new_zeros(self.size * self.blocks)
        padded[: self.rows] = y
        mixed = self.gains * hadamard_transform(padded.view(self.blocks, self.size).T.contiguous())
        unshuffled = torch.empty_like(mixed).flatten().scatter_(0, self.order, mixed.flatten())
        return (self.signs * hadamard_transform(unshuffled.view_as(mixed))).sum(dim=1)[: self.columns]


class _Product(torch.autograd.Function):
    """P·z as a function of z: linear, so nothing but P is kept for the gradient Pᵀ·g."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, fastfood: Fastfood) -> Tensor:
        ctx.fastfood = fastfood
        return fastfood.product(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.fastfood.transposed_product(gradient), None
