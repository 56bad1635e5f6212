"""The files beside a page: every picture as png and svg, every table as csv."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from rankscope.errors import ConfigError
from rankscope.formats.file_io import write_atomic
from rankscope.report.document import Cell, Document, Table


def write_figures(document: Document, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``NAME.png``, ``NAME.svg`` and ``NAME.csv`` for each picture, and ``NAME.csv`` for each table.

    Each file is written atomically; the folder is made where there is none.

    Raises:
        ConfigError: a name that cannot be a file's, or that two have.
        FormatError: a file cannot be written.
    """
    target = Path(folder).expanduser()
    pictures = [picture for section in document.sections for picture in section.pictures]
    tables = [table for section in document.sections for table in section.tables]
    _check_names([*(picture.name for picture in pictures), *(table.name for table in tables)])
    written = []
    for picture in pictures:
        written.append(_write_bytes(picture.png, target / f"{picture.name}.png"))
        written.append(_write_bytes(picture.svg, target / f"{picture.name}.svg"))
        written.append(write_csv(picture.data, target / f"{picture.name}.csv"))
    return written + [write_csv(table, target / f"{table.name}.csv") for table in tables]


def _write_bytes(content: bytes, path: Path) -> Path:
    def write(file: Path) -> None:
        file.write_bytes(content)

    write_atomic(path, write)
    return path


def write_csv(table: Table, path: Path) -> Path:
    """Write a table with every digit of its numbers; None is an empty field.

    Raises:
        FormatError: the file cannot be written.
    """

    def write(file: Path) -> None:
        # Names in files may be no Unicode at all.
        with file.open("w", encoding="utf-8", errors="replace", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(table.header)
            writer.writerows([to_python_number(cell) for cell in row] for row in table.rows)

    write_atomic(path, write)
    return path


def to_python_number(cell: Cell) -> Cell:
    """A number of numpy's as Python's own."""
    return cell.item() if isinstance(cell, np.generic) else cell


def _check_names(names: list[str]) -> None:
    for name, count in Counter(names).items():
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise ConfigError(f"a figure or table cannot be saved as {name!r}; use letters, digits, dots and dashes")
        if count > 1:
            raise ConfigError(f"two figures or tables would be saved as {name!r}")
