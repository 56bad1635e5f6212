"""Reading a data file: .csv, .tsv, .jsonl or .parquet -> the columns asked for, every cell filled.

A row that is broken is never skipped: training on part of a file without a word would be worse
than an error that names the line.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rankscope.errors import ConfigError, FormatError

TableRows = Generator[tuple[str, Mapping[str, Any]], None, None]
"""Each row with the place that an error message names: "line 7"."""


def read_table(path: str | Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """The named columns of a table, each a list with one value a row, in the order of the file.

    .csv and .tsv (quoted as by Excel, first line the names) give strings; .jsonl (one object a line)
    and .parquet give what they store. Text is UTF-8.

    Raises:
        FormatError: the file is missing, damaged, of an unknown kind or without rows; a column is not there;
            a row is broken, or its cell is missing, null or blank. The message names the line or row.
        ConfigError: a .parquet file, and pyarrow is not installed.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise FormatError(f"{path}: a data file is one of {', '.join(READERS)}; convert it or rename it")
    table: dict[str, list[Any]] = {column: [] for column in columns}
    # A generator that an error leaves half-way would keep the file open for as long as the error is.
    with closing(reader(path, columns)) as rows:
        for place, row in rows:
            for column, values in table.items():
                values.append(require_value(row.get(column), f"{path}, {place}", column))
    if not next(iter(table.values())):
        raise FormatError(f"{path}: the table has no rows")
    return table


def require_value(value: Any, where: str, column: str) -> Any:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise FormatError(f"{where}: column {column!r} is empty; fill the cell or leave out the row")
    return value


def require_columns(path: Path, wanted: Sequence[str], present: Iterable[str]) -> None:
    names = list(present)
    for column in wanted:
        if column not in names:
            raise FormatError(f"{path}: no column {column!r}; there are {', '.join(map(repr, names)) or 'none'}")
        if names.count(column) > 1:
            raise FormatError(f"{path}: {names.count(column)} columns are called {column!r}; rename all but one")


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Turn what the system raises on a file into one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_text_lines(path: Path) -> Generator[str, None, None]:
    """Decoded lines with their line ends; only \\n ends a line, as the csv module needs it."""
    with explain_read_errors(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise FormatError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from error


@contextmanager
def allow_long_fields() -> Iterator[None]:
    """Lift the csv module's limit of 131 072 characters a field, which is global, for a while."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_delimited_rows(path: Path, columns: Sequence[str], delimiter: str) -> TableRows:
    with closing(read_text_lines(path)) as lines, allow_long_fields():
        # strict: without it a quote that is never closed swallows the rest of the file.
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            require_columns(path, columns, header)
            for row in reader:
                if row and len(row) != len(header):
                    expected = f"{len(header)} fields as in the header, found {len(row)}"
                    raise FormatError(f"{path}, line {reader.line_num}: expected {expected}")
                if row:
                    yield f"line {reader.line_num}", dict(zip(header, row, strict=True))
        except csv.Error as error:
            problem = f"broken quoting ({error}); double each quote inside a quoted field"
            raise FormatError(f"{path}, line {reader.line_num}: {problem}") from error


def read_csv_rows(path: Path, columns: Sequence[str]) -> TableRows:
    return read_delimited_rows(path, columns, ",")


def read_tsv_rows(path: Path, columns: Sequence[str]) -> TableRows:
    return read_delimited_rows(path, columns, "\t")


def read_jsonl_rows(path: Path, columns: Sequence[str]) -> TableRows:
    with closing(read_text_lines(path)) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{path}, line {number}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise FormatError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            require_columns(Path(f"{path}, line {number}"), columns, row)
            yield f"line {number}", row


def read_parquet_rows(path: Path, columns: Sequence[str]) -> TableRows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(f'{path}: reading .parquet needs pyarrow; pip install "rankscope[hf]"') from error
    with explain_read_errors(path), path.open("rb") as file:
        try:
            stored = parquet.ParquetFile(file)
            require_columns(path, columns, stored.schema_arrow.names)
            table = stored.read(columns=list(columns)).to_pydict()
        except (ArrowException, OSError, ValueError) as error:  # damaged pages are OSErrors to Arrow
            raise FormatError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from error
    for number, row in enumerate(zip(*(table[column] for column in columns), strict=True), 1):
        yield f"row {number}", dict(zip(columns, row, strict=True))


READERS = {".csv": read_csv_rows, ".tsv": read_tsv_rows, ".jsonl": read_jsonl_rows, ".parquet": read_parquet_rows}
