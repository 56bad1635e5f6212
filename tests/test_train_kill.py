"""A study killed without warning goes on where it was and ends with the same numbers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rankscope.train.study import Study

CONFIG = """
task = "planted"
ranks = [1, 4]
steps = 2500
batch = 64
dropout = 0.1
evaluations = 20
save_seconds = 0.02
"""


def start(config: Path, study: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rankscope", "train", "--config", str(config), "-o", str(study)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def wait_for_a_state(study: Path, process: subprocess.Popen[str]) -> None:
    """Until a run in progress is saved anew, or nothing is left to run."""
    began = time.time()
    while process.poll() is None and not any(saved_at(path) > began for path in study.glob("runs/*/state.pt")):
        time.sleep(0.01)


def saved_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # the run has just ended
        return 0.0


@pytest.mark.parametrize("together", [1, 2])
def test_ten_kills_at_random_moments_change_nothing(tmp_path: Path, together: int) -> None:
    """Alone a run ends with the same bits; in company that a kill has changed, with the same numbers to rounding."""
    config = tmp_path / "study.toml"
    config.write_text(f"{CONFIG}tokens = {64 * together}")
    finish(start(config, tmp_path / "whole"))
    chance = random.Random(7)
    taken_up = 0
    ended: dict[Path, int] = {}
    for attempt in range(10):
        taken_up += any((tmp_path / "killed").glob("runs/*/state.pt"))
        process = start(config, tmp_path / "killed")
        assert process.stderr is not None
        process.stderr.readline()  # said when the runs are known: training is about to begin
        if attempt % 2:  # on a busy machine a kill by the clock alone would never meet a run in progress
            wait_for_a_state(tmp_path / "killed", process)
        time.sleep(chance.uniform(0.1, 1.2) / (1 + attempt % 2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert all(path.stat().st_mtime_ns == at for path, at in ended.items())  # nothing finished was run again
        ended |= {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("runs/*/run.json")}
    finish(start(config, tmp_path / "killed"))
    assert taken_up >= 3  # most kills came in the middle of a run, none went back to its start
    whole, killed = Study(tmp_path / "whole"), Study(tmp_path / "killed")
    assert len(whole.done()) == len(killed.done()) == 4
    for ours, theirs in zip(whole.done(), killed.done(), strict=True):
        assert ours.metrics["test"] == pytest.approx(theirs.metrics["test"], rel=0 if together == 1 else 1e-3)
        if together == 1 and ours.run.method != "base":
            a, b = whole.store(ours.run), killed.store(theirs.run)
            assert all(torch.equal(a[name].dense(), b[name].dense()) for name in a)


def test_interrupt_saves_and_says_so(tmp_path: Path) -> None:
    config = tmp_path / "study.toml"
    config.write_text(CONFIG.replace("save_seconds = 0.02", "save_seconds = 1000"))
    process = start(config, tmp_path / "study")
    while not any(text.read_text().count("\n") > 1 for text in (tmp_path / "study").glob("runs/*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "the same command" in said
    assert len(list((tmp_path / "study").glob("runs/*/state.pt"))) == 2  # both ranks were in one pass
    assert "taken up at step" in finish(start(config, tmp_path / "study"))
