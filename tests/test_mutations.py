"""The lines that ``tools/mutate.py`` breaks still stand where it says, and so do the tests that must notice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import mutate
from mutate import ROOT


def test_every_line_stands_once_and_every_change_is_python() -> None:
    offenders = []
    for change in mutate.MUTATIONS:
        text = (ROOT / "rankscope" / change.file).read_text(encoding="utf-8")
        if text.count(change.old) != 1:
            offenders.append(f"{change.name}: {text.count(change.old)} times in {change.file}")
        compile(text.replace(change.old, change.new), change.file, "exec")
    assert offenders == [], "write the line as it stands now into tools/mutate.py"


def test_every_test_is_there() -> None:
    offenders = []
    for change in mutate.MUTATIONS:
        for test in change.tests:
            path, _, name = test.partition("::")
            if not (ROOT / path).is_file() or (
                name and f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")
            ):
                offenders.append(f"{change.name}: {test}")
    assert offenders == [], "write the tests that notice it into tools/mutate.py"


def test_names_are_unique() -> None:
    assert len({change.name for change in mutate.MUTATIONS}) == len(mutate.MUTATIONS)


def test_a_copy_is_changed_and_put_back(tmp_path: Path) -> None:
    (tmp_path / "rankscope").mkdir()
    (tmp_path / "rankscope" / "__init__.py").touch()
    (tmp_path / "rankscope" / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "test_sums.py").write_text(
        "from rankscope.sums import add\n\n\ndef test_add():\n    assert add(2, 2) == 4\n"
    )
    noticed = mutate.Mutation("minus", "sums.py", "a + b", "a - b", ("test_sums.py",))
    survivor = mutate.Mutation("times", "sums.py", "a + b", "a * b", ("test_sums.py",))
    assert mutate.try_mutation(tmp_path, noticed, is_green=True) == "yes"
    assert mutate.try_mutation(tmp_path, survivor, is_green=True) == "SURVIVES"
    assert mutate.try_mutation(tmp_path, noticed, is_green=False) == "its tests fail without it"
    assert (tmp_path / "rankscope" / "sums.py").read_text() == "def add(a, b):\n    return a + b\n"
    with pytest.raises(ValueError, match="stands 0 times"):
        mutate.Mutation("gone", "sums.py", "a / b", "a", ("test_sums.py",)).apply(tmp_path)
