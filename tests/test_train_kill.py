"""A study killed without warning goes on where it was and ends with the same numbers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def test_ten_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    config = tmp_path / "study.toml"
    config.write_text(CONFIG)
    finish(start(config, tmp_path / "whole"))
    chance = random.Random(7)
    taken_up = 0
    for _ in range(10):
        process = start(config, tmp_path / "killed")
        assert process.stderr is not None
        first = process.stderr.readline()  # said when a run begins: training is under way
        taken_up += "taken up" in first
        time.sleep(chance.uniform(0.0, 0.8))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(config, tmp_path / "killed"))
    assert taken_up >= 3  # most kills came in the middle of a run, none went back to its start
    whole, killed = Study(tmp_path / "whole"), Study(tmp_path / "killed")
    assert [record.metrics for record in whole.records] == [record.metrics for record in killed.records]
    assert len(whole.done()) == 4
    for record in whole.done()[1:]:
        ours, theirs = whole.store(record.run), killed.store(record.run)
        for name in ours:
            assert torch.equal(ours[name].dense(), theirs[name].dense())


def test_interrupt_saves_and_says_so(tmp_path: Path) -> None:
    config = tmp_path / "study.toml"
    config.write_text(CONFIG.replace("save_seconds = 0.02", "save_seconds = 1000"))
    process = start(config, tmp_path / "study")
    assert process.stderr is not None
    while "step 119" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "the same command" in said
    assert len(list((tmp_path / "study").glob("runs/*/state.pt"))) == 1
    assert "taken up at step" in finish(start(config, tmp_path / "study"))
