"""The numbers of a result as tables: a column is described once, for terminal, CSV files, pages and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

Cell = str | float | int | None
Item = TypeVar("Item")
SMALLEST_P = 1e-12
"""Below it a p-value has no meaning, since it was computed with rounding errors of that size."""


@dataclass(frozen=True)
class Column(Generic[Item]):
    """One column of a result's tables, for all places that show it.

    ``value`` gives the cell of one item (a layer, a pair, …). ``titles`` maps each place that shows the column to its
    title there; a place is "terminal", "csv" or the name of a table of the page. ``text`` is how the terminal writes a
    float: a format specification, "p" for a p-value, or "" for the digits of the table. ``total`` is the cell in the
    row for all items together.
    """

    value: Callable[[Item], Cell]
    titles: Mapping[str, str]
    text: str = ""
    total: Cell = None

    @classmethod
    def of(cls, value: Callable[[Item], Cell], text: str = "", total: Cell = None, **titles: str) -> Column[Item]:
        """A column with its titles as keyword arguments: ``Column.of(get_norm, csv="norm", terminal="norm")``."""
        return cls(value, titles, text, total)

    def only(self, place: str) -> Column[Item]:
        """The same column, shown at one place alone or, where it has no title there, nowhere."""
        return replace(self, titles={name: title for name, title in self.titles.items() if name == place})


@dataclass(frozen=True)
class Table:
    """Named columns and rows. Numbers stay numbers with all their digits; ``digits`` significant ones are shown.

    ``name`` is the stem of its file. A table longer than a screen can be filtered and sorted in the page. ``texts`` are
    the columns' own formats on the terminal (see ``Column``), none where it is empty; ``total`` is a last row for
    everything together, which only the terminal and notebooks show.
    """

    name: str
    caption: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    digits: int = 4
    texts: tuple[str, ...] = ()
    total: tuple[Cell, ...] | None = None

    @classmethod
    def of(
        cls,
        columns: Iterable[Column[Item]],
        items: Iterable[Item],
        place: str,
        caption: str = "",
        name: str | None = None,
        has_total: bool = False,
    ) -> Table:
        """The table of one place, with those of the columns that are shown there and a row for each item.

        Args:
            place: a key of ``Column.titles``.
            name: the stem of its file; by default the place.
            has_total: whether the columns' totals make a last row.
        """
        shown = [column for column in columns if place in column.titles]
        return cls(
            name=name or place,
            caption=caption,
            header=tuple(column.titles[place] for column in shown),
            rows=[[column.value(item) for column in shown] for item in items],
            texts=tuple(column.text for column in shown),
            total=tuple(column.total for column in shown) if has_total else None,
        )

    def text_rows(self) -> list[list[str]]:
        """The rows as the terminal writes them, with that of the total."""
        texts = self.texts or ("",) * len(self.header)
        rows = [*self.rows, *([] if self.total is None else [self.total])]
        return [[format_cell(cell, text, self.digits) for cell, text in zip(row, texts, strict=True)] for row in rows]


def format_cell(cell: Cell, text: str = "", digits: int = 4) -> str:
    """A cell as text: None is empty, and a float is written as ``Column.text`` says."""
    if isinstance(cell, str):
        return cell
    if not text or cell is None or isinstance(cell, int):
        return format_number(cell, digits)
    return format_p_value(cell) if text == "p" else format(cell, text)


def format_number(value: float | int | None, digits: int = 4) -> str:
    """A count as it is, another number to ``digits`` digits, nothing for None."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"


def format_p_value(p: float) -> str:
    """A p-value to two digits, and no smaller than ``SMALLEST_P``."""
    return "<1e-12" if p < SMALLEST_P else f"{p:.2g}"
