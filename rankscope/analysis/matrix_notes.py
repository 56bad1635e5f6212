"""Notes on a comparison of several sources: a limit on directions, and overlaps that show where A started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rankscope.analysis.layer_comparison import CAPPED_NOTE
from rankscope.analysis.layer_matrices import LayerMatrices
from rankscope.analysis.matrix_result import MatrixResult, SideMatrix
from rankscope.analysis.sources import Source
from rankscope.noise import Array


def initial_notes(before: SideMatrix | None) -> list[str]:
    """A note on pairs whose factors A overlapped ``before`` training."""
    alike = 0 if before is None else _count_pairs(_excess(before) > 0.1)
    if not alike:
        return []
    return [
        f"in {_format_pairs(alike)} the rows of A overlapped before training: these share initial factors, and their "
        'right side proves nothing; judge by the left (of="B")'
    ]


def matrix_notes(
    opened: Sequence[Source],
    titles: Sequence[str],
    measured: Sequence[LayerMatrices],
    top: int | None,
    result: MatrixResult,
) -> Iterator[str]:
    """The notes of the sources, and what limits the comparison."""
    for title, source in zip(titles, opened, strict=True):
        yield from (f"{title}: {note}" for note in source.notes)
    if top is None and any(layer.capped for layer in measured):
        yield CAPPED_NOTE
    left, right = result.left, result.right
    if right is not None:
        alike = _excess(right) > 0.9
        alike &= True if left is None else _excess(left) < 0.25
        if count := _count_pairs(alike):
            yield (
                f"in {_format_pairs(count)} the A side (right) is the same or nearly so and the left is not: an "
                "overlap of the A side alone proves nothing, they may share their initial factors"
            )


def _excess(side: SideMatrix) -> Array:
    """Overlap of pairs beyond chance: 0 at chance, 1 for equal spans, 0 where chance is 1."""
    room = 1 - side.expected
    excess: Array = np.divide(side.overlap - side.expected, room, out=np.zeros_like(room), where=room > 1e-6)
    return excess


def _count_pairs(alike: Any) -> int:
    """Number of pairs that are marked in a symmetric (n, n) matrix of flags."""
    return int(np.triu(alike, 1).sum())


def _format_pairs(n: int) -> str:
    return f"{n} pair{'' if n == 1 else 's'}"
