"""Acts on files of which one is damaged or lies: done, or refused in one sentence, and nothing is left on disk."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from damage import ACTS, make_sources, tried

CASES = 25


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sources")
    make_sources(home)
    return home


@pytest.mark.parametrize("name", ACTS)
def test_sound_files_are_read_and_acted_on(tmp_path: Path, sources: Path, name: str) -> None:
    ACTS[name].run(sources, tmp_path / "out")


@pytest.mark.parametrize("name", ACTS)
def test_damaged_files_give_our_error_or_an_answer(tmp_path: Path, sources: Path, name: str) -> None:
    """A few cases; ``tools/fuzz.py`` tries as many as are asked for."""
    ends: Counter[str] = Counter()
    for number in range(CASES):
        home = tmp_path / str(number)
        home.mkdir()
        damage, found = tried(ACTS[name], sources, home, random.Random(f"{name}:{number}"))
        assert not found.startswith("FAILED"), (number, damage, found)
        ends[found.partition(":")[0]] += 1
        shutil.rmtree(home)
    assert ends["done"] > 0, ends
    # Both ends of the contract were exercised; extract takes along, or leaves out, most of what is odd.
    assert ends["refused"] > 0 or name.startswith("extract"), ends
