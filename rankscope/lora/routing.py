"""Which adapter the rows of a batch pass: one for all, one for each of N equal chunks, or one for each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Generator, Tensor

from rankscope.errors import ShapeError
from rankscope.linalg import supports_non_blocking

NO_ADAPTER = -1
"""The entry of a row that passes the base alone."""


class BatchRows:
    """The adapter of each row of a batch; rows with the same adapter form a group and pass it together.

    Attributes:
        rows: the adapter of each row, ``NO_ADAPTER`` for none.
        adapters: the adapter of each group, ascending.
        sizes: number of rows of each group.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        counts = Counter(self.rows)
        self.adapters = tuple(sorted(counts))
        self.sizes = [counts[i] for i in self.adapters]
        order = sorted(range(len(self.rows)), key=self.rows.__getitem__)
        self._order = None if order == sorted(order) else order
        self._orders: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def equal_chunks(cls, length: int, count: int) -> BatchRows:
        """``length`` rows in equal chunks, one for each of ``count`` adapters."""
        check_equal_chunks(length, count)
        return cls([i for i in range(count) for _ in range(length // count)])

    def row_order(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The order that sorts rows into groups, (rows,), and its inverse, (rows,); copied to each device once."""
        if device not in self._orders:
            order = torch.tensor(self._order if self._order is not None else range(len(self.rows)))
            ahead = supports_non_blocking(device)
            self._orders[device] = (
                order.to(device, non_blocking=ahead),
                order.argsort().to(device, non_blocking=ahead),
            )
        return self._orders[device]

    def check(self, length: int) -> None:
        """Raise ShapeError where a batch has another number of rows."""
        if length != len(self.rows):
            raise ShapeError(
                f"an input of {length} rows does not fit the {len(self.rows)} rows that were selected; "
                "select one adapter for each row of the batch, which must be the first axis"
            )

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The rows of each group of x (rows, …), as (size, …); ShapeError as for ``check``."""
        self.check(x.shape[0])
        if self._order is not None:
            x = x.index_select(0, self.row_order(x.device)[0])
        return torch.split(x, self.sizes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of ``split``: groups (size, …) joined to (rows, …) in the original order."""
        joined = torch.cat(list(parts))
        return joined if self._order is None else joined.index_select(0, self.row_order(joined.device)[1])


@dataclass
class Route:
    """Which adapters the rows pass; one object that all layers and heads of a bank share.

    Attributes:
        generators: the random generator of each adapter.
        selection: the adapter that every row passes; or the one of each row; or None: the batch is N equal chunks, one
            per adapter, in order.
        merged: the adapter that is merged into the base weights, if there is one.
        seeds: one number per adapter, to be set before each pass. Dropout then depends on it and on the layer's path
            alone. So it is the same whatever other adapters there are, and when activation checkpointing repeats a
            forward pass; a layer that is called twice in a pass drops the same entries twice. None: each generator
            continues from mask to mask.
    """

    generators: Sequence[Generator]
    selection: int | BatchRows | None = 0
    merged: int | None = None
    seeds: Sequence[int] | None = None

    def dropout_generator(self, i: int, path: str) -> Generator:
        """The generator from which adapter i draws its mask on the layer of this path."""
        generator = self.generators[i]
        if self.seeds is not None:
            generator.manual_seed(dropout_seed(self.seeds[i], path))
        return generator


def dropout_seed(seed: int, path: str) -> int:
    """A seed in [0, 2⁶³) from a seed and a path: the same in every process, on every machine."""
    return int.from_bytes(sha256(f"{seed} {path}".encode()).digest()[:8], "big") >> 1


def check_equal_chunks(length: int, count: int) -> None:
    """Raise ShapeError where ``length`` rows cannot be split into ``count`` equal chunks."""
    if length % count:
        raise ShapeError(
            f"an input of {length} rows cannot be split into equal chunks for {count} adapters; "
            "give each the same number of rows, or select one adapter"
        )
