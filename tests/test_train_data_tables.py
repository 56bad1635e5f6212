"""Data files: what is written comes back, and each way a file can be broken has its own sentence."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rankscope.errors import ConfigError, FormatError
from rankscope.train.data_tables import read_table

# Everything that naive splitting gets wrong.
TEXTS = ["plain", 'a "quoted" word', "comma, tab\tend", "two\nlines", "naïve – 日本", "\u2028 separator", "x" * 200_000]
LABELS = ["b", "a", "a", "b", "a", "b", "a"]
WANTED = ["text", "label"]


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, dialect="excel-tab" if path.suffix == ".tsv" else "excel")
        writer.writerows(
            [("id", "label", "text"), *((i, *row) for i, row in enumerate(zip(LABELS, TEXTS, strict=True)))]
        )


def write_jsonl(path: Path) -> None:
    rows = [json.dumps({"text": t, "more": None, "label": y}) for t, y in zip(TEXTS, LABELS, strict=True)]
    path.write_text("\n".join(rows) + "\n\n", encoding="utf-8")


def write_parquet(path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    labels = pa.array(LABELS).dictionary_encode()  # as pandas writes a categorical
    parquet.write_table(pa.table({"label": labels, "id": list(range(len(TEXTS))), "text": TEXTS}), path)


WRITERS = {
    "t.csv": write_csv,
    "t.tsv": write_csv,
    "t.jsonl": write_jsonl,
    "t.parquet": write_parquet,
    "T.CSV": write_csv,
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_comes_back(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    limit = csv.field_size_limit()
    assert read_table(tmp_path / name, WANTED) == {"text": TEXTS, "label": LABELS}
    assert read_table(str(tmp_path / name), ["text"]) == {"text": TEXTS}
    assert csv.field_size_limit() == limit


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\none,0\r\n\r\ntwo,1\r\n")
    assert read_table(path, WANTED) == {"text": ["one", "two"], "label": ["0", "1"]}


def test_json_keeps_types(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "one", "label": 0}\n{"text": "two", "label": false}')
    assert read_table(path, WANTED) == {"text": ["one", "two"], "label": [0, False]}


BROKEN = {
    "unknown kind": ("t.xlsx", b"", "one of .csv, .tsv, .jsonl, .parquet"),
    "no column": ("t.csv", b"a,b\n1,2\n", "no column 'text'; there are 'a', 'b'"),
    "column twice": ("t.csv", b"text,label,text\n1,2,3\n", "2 columns are called 'text'"),
    "empty file": ("t.csv", b"", "no column 'text'; there are none"),
    "empty jsonl": ("t.jsonl", b"\n", "no rows"),
    "no rows": ("t.tsv", b"text\tlabel\n", "no rows"),
    "short row": ("t.csv", b"text,label\na,b\nc\n", "line 3: expected 2 fields as in the header, found 1"),
    "long row": ("t.csv", b"text,label\na,b,c\n", "line 2: expected 2 fields as in the header, found 3"),
    "open quote": ("t.csv", b'text,label\n"a,b\nc,d\n', "line 3: broken quoting"),
    "text after quote": ("t.tsv", b'text\tlabel\n"a" b\tc\n', "line 2: broken quoting"),
    "blank cell": ("t.csv", b'text,label\n"a\nb",x\n" ",y\n', "line 4: column 'text' is empty"),
    "blank label": ("t.csv", b"text,label\na,\n", "line 2: column 'label' is empty"),
    "not UTF-8": ("t.csv", "text,label\né,b\n".encode("latin-1"), "line 2: not UTF-8"),
    "UTF-16": ("t.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: not UTF-8"),
    "broken JSON": ("t.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", \n', "line 2: not valid JSON"),
    "deep JSON": ("t.jsonl", b"[" * 200_000, "line 1: not valid JSON"),
    "JSON array": ("t.jsonl", b'["a", 1]\n', "line 1: expected a JSON object, found list"),
    "JSON null": ("t.jsonl", b'{"text": null, "label": 1}\n', "line 1: column 'text' is empty"),
    "JSON key": (
        "t.jsonl",
        b'{"text": "a", "label": 1}\n{"text": "b"}\n',
        "line 2: no column 'label'; there are 'text'",
    ),
    "not parquet": ("t.parquet", b"PAR1 and no more", "not a whole parquet file"),
    "empty parquet": ("t.parquet", b"", "not a whole parquet file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_closed(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, content, _ = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    files, opens = [], Path.open

    def noted(path: Path, *how: Any) -> Any:
        files.append(opens(path, *how))
        return files[-1]

    monkeypatch.setattr(Path, "open", noted)
    with pytest.raises(FormatError) as caught:
        read_table(tmp_path / name, WANTED)
    assert caught.value  # its traceback holds on to whatever was left half-way
    assert all(file.closed for file in files)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_name_the_place(tmp_path: Path, case: str) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_table(tmp_path / name, WANTED)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_missing_files_and_folders(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(FormatError, match="no such file"):
        read_table(tmp_path / f"t.{suffix}", WANTED)
    (tmp_path / f"t.{suffix}").mkdir()
    with pytest.raises(FormatError, match=r"t\.\w+: cannot be read"):
        read_table(tmp_path / f"t.{suffix}", WANTED)


def test_parquet_damaged_null_and_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"text": ["a", None], "label": [0, 1]}), path)
    with pytest.raises(FormatError, match="row 2: column 'text' is empty"):
        read_table(path, WANTED)
    with pytest.raises(FormatError, match="no column 'genre'; there are 'text', 'label'"):
        read_table(path, ["text", "genre"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + whole[-8:])
    with pytest.raises(FormatError, match="not a whole parquet file"):
        read_table(path, WANTED)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r'pip install "rankscope\[hf\]"'):
        read_table(path, WANTED)
