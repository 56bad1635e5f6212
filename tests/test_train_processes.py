"""Several processes at one study: workers, torchrun, the same command given twice; and one of them killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankscope.errors import ConfigError, TrainingError
from rankscope.train.claims import Claims, open_claims
from rankscope.train.config import make_study_config
from rankscope.train.events import Event, GridPlanned, RunEnded, Silent, StepsTaken
from rankscope.train.runs import RunRecord
from rankscope.train.study import Study, run_study
from rankscope.train.worker_processes import run_study_with_workers

CONFIG = """
task = "planted"
ranks = [1, 4]
lrs = [0.003, 0.01]
full_lrs = [0.001, 0.003]
seeds = [0, 1]
steps = {steps}
batch = 64
dropout = 0.1
evaluations = 2
save_seconds = 0.05
tokens = 1
"""


def write_config(folder: Path, steps: int = 60, more: str = "") -> Path:
    path = folder / f"study{steps}{len(more)}.toml"
    path.write_text(CONFIG.format(steps=steps) + more)
    return path


def start(launcher: list[str], config: Path, study: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *launcher, "train", "--config", str(config), "-o", str(study)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


PLAIN = ["rankscope"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rankscope"]


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def table(study: Path) -> list[tuple[str, str, int, dict[str, dict[str, float]]]]:
    return [(r.run.name, r.status, r.steps, r.metrics) for r in Study(study).records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the grid."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(PLAIN, write_config(folder), folder / "study"))
    return folder / "study"


def test_a_claim_is_one_processs_and_goes_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from rankscope.train.claims import open_claims\n"
        f"with open_claims(Path({str(tmp_path)!r})) as claims:\n"
        "    print(claims.try_claim('a'), flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline().strip() == "True"
    with open_claims(tmp_path) as claims:
        assert not claims.try_claim("a")
        assert claims.try_claim("b")
        assert claims.try_claim("b")
        other.kill()
        other.communicate()
        assert claims.try_claim("a")


def test_a_released_claim_can_be_taken_by_another(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from rankscope.train.claims import open_claims\n"
        f"with open_claims(Path({str(tmp_path)!r})) as claims: print(claims.try_claim('a'), claims.try_claim('b'))"
    )

    def other() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    with open_claims(tmp_path) as claims:
        assert (claims.try_claim("a"), claims.try_claim("b")) == (True, True)
        assert other() == "False False"
        claims.release(["a"])
        assert other() == "True False"
    assert isinstance(claims, Claims)


def test_the_same_command_twice_shares_out_the_runs(tmp_path: Path, whole: Path) -> None:
    config = write_config(tmp_path)
    both = [start(PLAIN, config, tmp_path / "study") for _ in range(2)]
    tables = [finish(process)[0] for process in both]
    assert table(tmp_path / "study") == table(whole)
    assert tables[0] == tables[1]  # each waits for the other and prints the whole


def test_two_processes_of_torchrun_give_the_table_of_one(tmp_path: Path, whole: Path) -> None:
    out, _ = finish(start(TORCHRUN, write_config(tmp_path), tmp_path / "study"))
    assert table(tmp_path / "study") == table(whole)
    assert out.count("validation") == 1  # one of them prints


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_killing_one_process_of_torchrun_loses_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=700)
    finish(start(PLAIN, config, tmp_path / "whole"))
    process = start(TORCHRUN, config, tmp_path / "study")
    done: set[Path] = set()
    while len(done) < 4 and process.poll() is None:
        time.sleep(0.02)
        done = set((tmp_path / "study").glob("runs/*/run.json"))
    times = {path: path.stat().st_mtime_ns for path in done}
    os.kill(children(process)[-1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(list((tmp_path / "study").glob("runs/*/run.json"))) < len(table(tmp_path / "whole"))
    finish(start(PLAIN, config, tmp_path / "study"))
    assert table(tmp_path / "study") == table(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == times  # what was finished was not run again


@pytest.mark.parametrize("how", ["data_parallel = true", "shard = true"])
def test_full_fine_tuning_split_over_two_processes_is_that_of_one(tmp_path: Path, whole: Path, how: str) -> None:
    finish(start(TORCHRUN, write_config(tmp_path, more=how), tmp_path / "study"))
    ours, theirs = Study(tmp_path / "study"), Study(whole)
    assert [r.run for r in ours.records] == [r.run for r in theirs.records]
    for a, b in zip(ours.records, theirs.records, strict=True):
        # Gradients are sums over two halves of a batch; 60 steps of AdamW carry the rounding on.
        assert a.metrics["test"]["loss"] == pytest.approx(b.metrics["test"]["loss"], rel=1e-4)
        if a.run.method == "full":
            mine, other = ours.store(a.run), theirs.store(b.run)
            for name in mine:
                difference = mine[name].dense() - other[name].dense()
                assert float(difference.norm()) < 1e-3 * float(other[name].dense().norm())


def test_split_training_without_torchrun_is_refused(tmp_path: Path) -> None:
    config = make_study_config({"task": "planted", "steps": 2, "shard": True}, "test")
    with pytest.raises(ConfigError, match="start them with torchrun"):
        run_study(config, tmp_path / "study")


# Workers


class Recorder(Silent):
    def __init__(self) -> None:
        self.records: list[RunRecord] = []
        self.planned_runs: set[str] = set()
        self.tokens = 0

    def tell(self, event: Event) -> None:
        if isinstance(event, GridPlanned):
            self.planned_runs |= {run.name for run in event.runs}
        if isinstance(event, StepsTaken):
            self.tokens += event.tokens
        if isinstance(event, RunEnded):
            self.records.append(event.record)


def settings(**changes: object) -> dict[str, object]:
    grid = {"ranks": (1, 4), "lrs": (0.003, 0.01), "full_lrs": (0.001, 0.003), "seeds": (0, 1), "tokens": 1}
    return {"task": "planted", "steps": 60, "batch": 64, "dropout": 0.1, "evaluations": 2, **grid, **changes}


def test_workers_give_the_table_of_one_process_and_report(tmp_path: Path, whole: Path) -> None:
    recorder = Recorder()
    config = make_study_config(settings(save_seconds=0.05), "test")
    study = run_study_with_workers(config, tmp_path / "study", 2, recorder, lambda: False)
    assert table(study.folder) == table(whole)
    trained = [record.run.name for record in study.records if record.run.lr]
    assert sorted(record.run.name for record in recorder.records) == sorted(trained)
    assert recorder.planned_runs == {record.run.name for record in study.records}
    assert recorder.tokens > 0


def test_what_fails_in_a_worker_is_said_once(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    run_study(make_study_config(settings(steps=2), "test"), folder)
    with pytest.raises(TrainingError, match="steps = 2, not 3"):
        run_study_with_workers(make_study_config(settings(steps=3), "test"), folder, 2, Silent(), lambda: False)


def test_a_number_of_workers_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers = 0"):
        run_study_with_workers(make_study_config(settings(), "test"), tmp_path / "study", 0, Silent(), lambda: False)
