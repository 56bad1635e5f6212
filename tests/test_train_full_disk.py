"""A disk that fills up while a study is trained: one sentence, nothing half-written; it goes on when there is room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankscope.train.study import Study

OPTIONS = ["--task", "planted", "--ranks", "1,64", "--steps", "20", "--seeds", "0,1,2,3", "--quiet"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 640 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def train(study: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rankscope", "train", *OPTIONS, "-o", str(study)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_full_disk_is_one_sentence_and_nothing_is_half_written(small_disk: Path, tmp_path: Path) -> None:
    ended = train(small_disk / "study")
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "No space left" in ended.stderr
    assert not list(small_disk.glob("**/.*.tmp"))
    for path in small_disk.glob("study/runs/*/run.json"):
        assert json.loads(path.read_text())["status"] == "done"
    before = len(Study(small_disk / "study").records)
    assert before > 0
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert train(small_disk / "study").returncode == 0
    study = Study(small_disk / "study")
    assert len(study.records) == len(study.done()) == 4 * (1 + 2 + 1) > before
