"""Parts that the pages of several commands have: remarks, what was skipped, how layers and cuts are counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rankscope.formats.abstract_store import SkippedItem
from rankscope.report.cells import format_significant
from rankscope.report.document import Section
from rankscope.table import Table


def remark_sections(notes: Sequence[str]) -> list[Section]:
    """The notes of a result as a section, if there are any."""
    return [Section(key="remarks", title="Remarks", lead="", notes=notes)] if notes else []


def skipped_tables(skipped: Sequence[SkippedItem], name: str = "skipped") -> list[Table]:
    """The tensors that were skipped as a table, if there are any."""
    rows = [(item.name, item.reason) for item in skipped]
    return [Table(name, "Tensors that were skipped, and why.", ("tensor", "reason"), rows)] if rows else []


def alone_tables(alone: Iterable[tuple[str, str]], name: str, caption: str, where: str) -> list[Table]:
    """Layers that not all sources have, each with its source, as a table, if there are any."""
    rows = list(alone)
    return [Table(name, caption, ("layer", where), rows)] if rows else []


def count_layers(n: int) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{n} layer{'' if n == 1 else 's'}"


def format_short(value: float, padded: bool = True) -> str:
    """A number of a sentence, to three digits."""
    return format_significant(value, 3, padded)


def powers_of_two(last: int) -> list[int]:
    """1, 2, 4, … below ``last``, and ``last``: the cuts and indices that tables behind a picture show."""
    return [*(2**n for n in range((last - 1).bit_length())), last]
