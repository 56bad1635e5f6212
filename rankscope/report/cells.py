"""Tables as a page shows them: numbers rounded, names breakable, each cell with what it is sorted by."""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

from markupsafe import Markup

from rankscope.errors import ConfigError
from rankscope.report.document import Cell, Table
from rankscope.report.figure_files import to_python_number

LONG = 16
"""Rows from which a table scrolls in a box of its own on the screen and can be filtered."""
LONG_WORD = 12  # letters; longer ones may be broken where a name has a joint
LONG_PART = 16  # letters; longer parts between joints may be broken, too
SHORT_TEXT = 16  # letters; cells of a column without longer ones are not broken
SHORT_TITLE = 8
SMALLEST_P = 1e-12


class RenderedCell(NamedTuple):
    """``value`` is what numbers are sorted by; None for what is no number."""

    text: str
    value: float | None
    empty: bool = False


class RenderedTable(NamedTuple):
    """``kinds`` are the columns': "n" holds no texts, "s" short ones. Of ``total`` rows some may not be shown."""

    id: str
    number: int | None
    name: str
    caption: str
    header: list[tuple[str, str]]
    kinds: list[str]
    rows: list[list[RenderedCell]]
    total: int

    @property
    def is_long(self) -> bool:
        return len(self.rows) >= LONG

    @property
    def name_width(self) -> int:
        """Letters of the longest name of a row."""
        return max((len(row[0].text) for row in self.rows), default=0)


def render_table(table: Table, key: str, number: int | None, most: int | None = None) -> RenderedTable:
    """A table as it is shown, its first ``most`` rows; ``key`` is its anchor, ``number`` its own in the page.

    Raises:
        ConfigError: a row has more or fewer cells than the header.
    """
    rows = [[to_python_number(cell) for cell in row] for row in table.rows]
    if any(len(row) != len(table.header) for row in rows):
        raise ConfigError(f"table {table.name!r}: a row has more or fewer cells than the header")
    columns = [_column(title, [row[i] for row in rows], table.digits) for i, title in enumerate(table.header)]
    shown = [list(row) for row in itertools.islice(zip(*(cells for _, cells in columns), strict=True), most)]
    kinds = [kind for kind, _ in columns]
    header = [
        (title, f"{kind} {'k' if len(title) <= SHORT_TITLE else ''}".strip())
        for title, kind in zip(table.header, kinds, strict=True)
    ]
    return RenderedTable(key, number, table.name, table.caption, header, kinds, shown, len(rows))


def _column(title: str, values: Sequence[Cell], digits: int) -> tuple[str, list[RenderedCell]]:
    """The kind of a column, and its cells."""
    numbers = [value for value in values if _is_number(value)]
    likely = is_probability(title) and all(0 <= value <= 1 for value in numbers)
    padded = _keeps_zeros((value for value in numbers if isinstance(value, float)), digits)
    cells = [_cell(value, digits, likely, padded) for value in values]
    if all(value is None or _is_number(value) for value in values):
        return "n", cells
    return "s" if all(len(cell.text) <= SHORT_TEXT for cell in cells) else "", cells


def _is_number(value: Cell) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_probability(title: str) -> bool:
    """Whether a column's title has p as a word: ``p``, ``p left``, ``corrected p``."""
    return re.search(r"(?<![^\s(])p(?![^\s),=])", title) is not None


def _keeps_zeros(values: Iterable[float], digits: int) -> bool:
    """Whether numbers keep their trailing zeros: measured ones do, a column of 0.01 and 0.003 does not."""
    mantissas = (f"{abs(value):.{digits - 1}e}".split("e")[0] for value in values)
    return any(len(mantissa.rstrip("0")) > digits for mantissa in mantissas)


def _cell(value: Cell, digits: int, likely: bool, padded: bool) -> RenderedCell:
    if value is None:
        return RenderedCell("–", None, True)
    if isinstance(value, bool):
        return RenderedCell("yes" if value else "no", None)
    if isinstance(value, str):
        return RenderedCell(value, None)
    if not math.isfinite(value):
        return RenderedCell(str(value), None)
    if likely and isinstance(value, float):
        return RenderedCell(format_probability(value), value)
    return RenderedCell(format_significant(value, digits, padded), value)


def format_significant(value: int | float, digits: int, padded: bool = True) -> str:
    """A number to so many significant digits, ``padded`` with zeros or not; integers and whole parts as they are."""
    if isinstance(value, int):
        return str(value).replace("-", "−")
    value += 0.0  # no negative zero
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    small = value != 0 and not -5 < power < 7
    text = mantissa if small else f"{value:.{max(0, digits - 1 - power)}f}"
    if "." in text and not padded:
        text = text.rstrip("0").rstrip(".")
    return (text + (f"×10{superscript(power)}" if small else "")).replace("-", "−")


def superscript(power: int) -> str:
    """An exponent as raised digits."""
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def format_probability(p: float) -> str:
    """A p-value to two digits, as far as it means anything."""
    return "<1e-12" if p < SMALLEST_P else format_significant(p, 2, padded=False)


def strip_control_characters(value: Any) -> Any:
    """Text without control characters, halves of surrogate pairs, and marks that turn the direction of writing."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" and c not in "\n\t" else c for c in value)


def allow_breaks(text: str) -> Markup:
    """Text whose long words may be broken: after dots, slashes and underscores, or anywhere where there are none."""
    pieces = re.split(rf"(\S{{{LONG_WORD + 1},}})", strip_control_characters(text))
    return Markup("").join(_allow_breaks_in_word(piece) if i % 2 else piece for i, piece in enumerate(pieces))


def _allow_breaks_in_word(word: str) -> Markup:
    return Markup("<wbr>").join(re.findall(rf"[^._/]{{0,{LONG_PART}}}[._/]+|[^._/]{{1,{LONG_PART}}}", word))
