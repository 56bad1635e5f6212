"""How training is shown: the numbers behind the view, the view itself, the lines of a pipe, and stopping."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from rankscope.cli.progress import LiveProgress, PlainProgress, open_listener, stop_on_signal
from rankscope.cli.progress_state import Metric, ProgressState, Speed, format_duration, summarize_group
from rankscope.train.events import (
    GridPlanned,
    Listener,
    RunEnded,
    RunEvaluated,
    RunStarted,
    Silent,
    StepsTaken,
    TrainingNote,
)
from rankscope.train.runs import Run, RunRecord

LOSS, ACCURACY = Metric("loss", False), Metric("accuracy", True)
ERASED = "\x1b[2K"
BASE = Run(method="base", seed=0)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lora(rank: int = 1, lr: float = 0.01, seed: int = 0, method: str = "lora", targets: str | None = None) -> Run:
    return Run(method=method, seed=seed, targets=targets, rank=rank, alpha=2.0 * rank, lr=lr)  # type: ignore[arg-type]


def record(
    run: Run, score: float | None = None, status: str = "done", steps: int = 10, metric: str = "loss"
) -> RunRecord:
    metrics = {} if score is None else {"validation": {metric: score}, "test": {metric: -1.0}}
    return RunRecord(run=run, status=status, steps=steps, metrics=metrics)  # type: ignore[arg-type]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(clock: Clock) -> ProgressState:
    return ProgressState(lambda: LOSS, clock=clock)


# Speed


def test_speed_is_tokens_over_the_time_they_took(clock: Clock) -> None:
    speed = Speed(clock)
    assert speed.per_second() is None
    speed.add(0)
    assert speed.per_second() is None
    for _ in range(40):
        clock.now += 0.5
        speed.add(1000)
    assert speed.per_second() == 2000
    for _ in range(12):  # 6 s, longer than the window
        clock.now += 0.5
        speed.add(100)
    assert speed.per_second() == 200
    assert len(speed.stamps) < 15


def test_speed_of_steps_longer_than_the_window(clock: Clock) -> None:
    speed = Speed(clock)
    for _ in range(3):
        speed.add(3000)
        clock.now += 30
    assert speed.per_second() == 100


# Steps and time


def test_steps_of_a_group_and_time_left(state: ProgressState, clock: Clock) -> None:
    runs = [lora(r) for r in (1, 2, 4)]
    state.tell(GridPlanned([BASE, *runs], []))
    assert (state.done_count, state.run_count, state.done_share) == (0, 3, 0)
    for run in runs[:2]:
        state.tell(RunStarted(run, 10, 0))
    for _ in range(4):
        clock.now += 1
        state.tell(StepsTaken(runs[:2], 50))
    assert state.training_groups() == [(runs[:2], 4)]
    assert state.speed.per_second() == 50
    # 8 of 30 steps in 4 s.
    assert state.done_share == pytest.approx(8 / 30)
    assert state.seconds_left() == pytest.approx(22 * 4 / 8)
    state.tell(RunEnded(record(runs[0], 0.5, steps=10)))
    state.tell(RunEnded(record(runs[1], status="diverged", steps=4)))
    assert state.training_groups() == []
    assert (state.done_count, state.done_share) == (2, pytest.approx(20 / 30))


def test_what_was_done_before_does_not_count_as_pace(state: ProgressState, clock: Clock) -> None:
    runs = [lora(r) for r in (1, 2, 4)]
    state.tell(GridPlanned(runs, [record(runs[0], 0.5)]))
    state.tell(RunStarted(runs[1], 10, 6))
    assert state.seconds_left() is None
    for _ in range(2):
        clock.now += 3
        state.tell(StepsTaken([runs[1]], 50))
    assert state.training_groups() == [([runs[1]], 8)]
    assert state.seconds_left() == pytest.approx(12 * 3)
    assert state.done_share == pytest.approx(18 / 30)


def test_several_steps_in_one_report(state: ProgressState, clock: Clock) -> None:
    run = lora()
    state.tell(GridPlanned([run], []))
    state.tell(RunStarted(run, 100, 0))
    clock.now += 4
    state.tell(StepsTaken([run], 2000, steps=20))
    assert state.training_groups() == [([run], 20)]
    assert state.speed.per_second() == 500
    assert state.seconds_left() == pytest.approx(16)
    state.tell(RunEvaluated(run, 50, {"loss": 1.0}))  # an evaluation knows where it stands
    assert state.training_groups() == [([run], 50)]


def test_an_end_knows_how_many_steps_there_were(state: ProgressState, clock: Clock) -> None:
    runs = [lora(1), lora(2)]
    state.tell(GridPlanned(runs, []))
    state.tell(RunStarted(runs[0], 10, 0))
    clock.now += 20
    state.tell(RunEnded(record(runs[0], 0.5, steps=10)))  # its steps were never reported
    assert state.seconds_left() == pytest.approx(20)


def test_planned_may_come_often_and_grow(state: ProgressState) -> None:
    runs = [lora(r) for r in (1, 2)]
    for _ in range(2):
        state.tell(GridPlanned([BASE, *runs], [record(BASE, 2.0), record(runs[0], 0.5)]))
    assert (state.done_count, state.run_count, state.base_score) == (1, 2, None)
    state.tell(GridPlanned([BASE, *runs, lora(4)], []))
    state.tell(GridPlanned([BASE, *runs], [record(runs[0], 0.5), record(runs[1], 0.4)]))
    assert (state.done_count, state.run_count) == (2, 3)


def test_groups_of_several_workers(clock: Clock) -> None:
    a, b, c, d = (lora(r) for r in (1, 2, 4, 8))
    state = ProgressState(lambda: LOSS, workers=2, clock=clock)
    state.tell(GridPlanned([a, b, c, d], []))
    for run in (a, b, c, d):
        state.tell(RunStarted(run, 10, 0))
    state.tell(StepsTaken([a, b], 1))
    state.tell(StepsTaken([c], 1))
    state.tell(StepsTaken([a, b], 1))
    assert state.training_groups() == [([c], 1), ([a, b], 2)]
    state.tell(StepsTaken([b], 1))  # a has left
    assert state.training_groups() == [([c], 1), ([b], 3)]
    state.tell(StepsTaken([d], 1))  # a worker has gone on to another group; c was left at a rung
    assert state.training_groups() == [([b], 3), ([d], 1)]


def test_a_group_that_begins_again_goes_back(state: ProgressState) -> None:
    run = lora()
    state.tell(GridPlanned([run], []))
    state.tell(RunStarted(run, 10, 0))
    for _ in range(7):
        state.tell(StepsTaken([run], 1))
    state.tell(RunStarted(run, 10, 5))
    state.tell(StepsTaken([run], 1))
    assert state.training_groups() == [([run], 6)]


# Scores


@pytest.mark.parametrize(("metric", "best"), [(LOSS, (0.3, 0.01)), (ACCURACY, (0.6, 0.03))])
def test_leaders_take_the_mean_over_seeds(metric: Metric, best: tuple[float, float]) -> None:
    state = ProgressState(lambda: metric)
    scores = {(0.01, 0): 0.1, (0.01, 1): 0.5, (0.03, 0): 0.6, (0.03, 1): 0.6, (0.1, 0): 0.4}
    runs = {key: lora(8, *key) for key in scores}
    full = Run(method="full", seed=0, lr=0.001)
    state.tell(GridPlanned([*runs.values(), lora(8, 0.1, 1), full], []))
    for key, run in runs.items():
        state.tell(RunEvaluated(run, 0, {metric.name: 2.0}))
        state.tell(RunEvaluated(run, 5, {metric.name: 9.0 if metric is LOSS else 0.0, "other": -5.0}))
        state.tell(RunEnded(record(run, scores[key], metric=metric.name)))
    lead, other = state.leaders()
    assert (lead.label, lead.ended, lead.lost, lead.planned) == ("r = 8", 5, 0, 6)
    assert (lead.score, lead.lr) == (pytest.approx(best[0]), best[1])
    assert other == ("full", None, None, 0, 0, 1)
    assert state.base_score == 2.0


def test_a_rate_that_lost_a_seed_comes_last(state: ProgressState) -> None:
    good, bad = [lora(lr=0.01, seed=s) for s in (0, 1)], [lora(lr=0.1, seed=s) for s in (0, 1)]
    state.tell(GridPlanned(good + bad, []))
    state.tell(RunEvaluated(bad[0], 5, {"loss": 0.3}))
    state.tell(RunEvaluated(bad[1], 5, {"loss": 0.1}))
    (lead,) = state.leaders()
    assert (lead.score, lead.lr) == (0.2, 0.1)
    state.tell(RunEnded(record(bad[0], status="diverged")))
    (lead,) = state.leaders()
    assert (lead.score, lead.lr, lead.ended, lead.lost) == (0.1, 0.1, 1, 1)
    state.tell(RunEnded(record(good[0], 0.7)))
    (lead,) = state.leaders()
    assert (lead.score, lead.lr, lead.ended, lead.lost) == (0.7, 0.01, 2, 1)


def test_base_is_the_mean_over_seeds(state: ProgressState) -> None:
    state.tell(GridPlanned([lora(seed=0), lora(seed=1)], []))
    state.tell(RunEvaluated(lora(seed=0), 0, {"loss": 2.0}))
    before = {"validation": {"loss": 4.0}, "test": {"loss": 9.0}}
    state.tell(RunEnded(RunRecord(run=lora(seed=1), status="diverged", steps=3, before=before)))
    assert state.base_score == 3.0


# Words


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([lora(8, 0.003)], "r = 8  lr 0.003  seed 0"),
        ([lora(r, lr, s) for s in (0, 1) for r in (1, 2) for lr in (0.01, 0.1)], "r = 1,2  lr 0.01,0.1  seed 0,1"),
        ([lora(4), lora(4, method="pissa")], "lora,pissa  r = 4  lr 0.01  seed 0"),
        ([lora(4, targets="q,v"), lora(4, targets="k")], "q,v and k  r = 4  lr 0.01  seed 0"),
        ([Run(method="full", seed=3, lr=1e-4)], "full  lr 0.0001  seed 3"),
    ],
)
def test_summary_of_a_group(runs: list[Run], said: str) -> None:
    assert summarize_group(runs) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 s"), (41.4, "41 s"), (60, "1 min"), (3560, "59 min"), (3590, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, said: str) -> None:
    assert format_duration(seconds) == said


# In a pipe


def sweep(listener: Listener, clock: Clock, seconds: float = 1.0) -> list[Run]:
    """Three runs: two in a group, of which one diverges, then one that is taken up."""
    runs = [lora(1), lora(2), Run(method="full", seed=0, lr=0.001)]
    listener.tell(GridPlanned([BASE, *runs], []))
    for run in runs[:2]:
        listener.tell(RunStarted(run, 10, 0))
        listener.tell(RunEvaluated(run, 0, {"loss": 2.0}))
    for _ in range(10):
        clock.now += seconds
        listener.tell(StepsTaken(runs[:2], 500))
    listener.tell(RunEvaluated(runs[1], 10, {"loss": 0.75}))
    listener.tell(RunEnded(record(runs[0], status="diverged", steps=10)))
    listener.tell(RunEnded(record(runs[1], 0.75)))
    listener.tell(TrainingNote("out of memory with 2 runs in one pass; going on with 1"))
    listener.tell(RunStarted(runs[2], 10, 4))
    clock.now += seconds
    listener.tell(StepsTaken([runs[2]], 500))
    return runs


def test_lines_of_a_log(state: ProgressState, clock: Clock) -> None:
    said: list[str] = []
    lines = PlainProgress(state, said.append, clock)
    runs = sweep(lines, clock)
    lines.tell(RunStarted(runs[2], 10, 5))  # again, in other company
    lines.tell(RunEnded(record(runs[2], status="stopped", steps=5)))
    assert said == [
        "3 runs",
        "base: validation loss 2.0000 (lower is better)",
        "[1/3] lora-r1-lr0.01-s0: diverged at step 10",
        "[2/3] lora-r2-lr0.01-s0: validation loss 0.7500 (base 2.0000)",
        "note: out of memory with 2 runs in one pass; going on with 1",
        "full-lr0.001-s0: taken up at step 4 of 10",
        "[3/3] full-lr0.001-s0: stopped at step 5, in the worse half of its learning rates",
    ]


def test_a_log_has_a_line_a_minute(state: ProgressState, clock: Clock) -> None:
    said: list[str] = []
    sweep(PlainProgress(state, said.append, clock), clock, seconds=25)
    alive = [line for line in said if "tokens/s" in line]
    # Every third step of 25 s, counted from the last line; of 30 steps, 6 lie behind after 75 s.
    assert alive[0] == "0/3 runs, step 3/10 of r = 1,2  lr 0.01  seed 0, 20 tokens/s, about 5 min left"
    assert len(alive) == 3


def test_a_study_taken_up_says_what_has_ended(state: ProgressState, clock: Clock) -> None:
    said: list[str] = []
    lines = PlainProgress(state, said.append, clock)
    for _ in range(2):
        lines.tell(GridPlanned([BASE, lora(1), lora(2)], [record(lora(1), 0.5)]))
    lines.tell(GridPlanned([BASE, lora(1), lora(2), lora(4)], [record(lora(1), 0.5)]))
    assert said == ["2 runs, 1 ended", "3 runs, 1 ended"]


def test_a_log_has_no_control_characters(state: ProgressState, clock: Clock) -> None:
    said: list[str] = []
    PlainProgress(state, said.append, clock).tell(TrainingNote("\x1b[2J and a\nsecond line"))
    assert said == ["note: \ufffd[2J and a\ufffdsecond line"]


def test_without_a_metric_there_are_no_scores(clock: Clock) -> None:
    said: list[str] = []
    sweep(PlainProgress(ProgressState(lambda: None, clock=clock), said.append, clock), clock)
    assert "[2/3] lora-r2-lr0.01-s0: done" in said
    assert not any("validation" in line for line in said)


# On a terminal


def big_grid() -> list[Run]:
    cells = [
        lora(r, lr, s, m)
        for m in ("lora", "pissa", "lora+")
        for r in (1, 2, 4, 8, 64)
        for lr in (1e-3, 1e-2)
        for s in (0, 1)
    ]
    return [
        *cells,
        *(lora(8, 1e-2, s, targets="model.layers.0.self_attn.q_proj,model.layers.11.v_proj") for s in (0, 1)),
    ]


def shown(view: LiveProgress, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(view.frame())
    return console.export_text().splitlines()


def a_view(clock: Clock, height: int, workers: int = 1) -> LiveProgress:
    """In the middle of a grid of 62 runs of 17 labels."""
    view = LiveProgress(
        ProgressState(lambda: LOSS, workers, clock), Console(width=80, height=height, file=io.StringIO())
    )
    runs = big_grid()
    view.tell(GridPlanned([BASE, *runs], []))
    for start in range(0, 30, 6):
        group = runs[start : start + 6]
        for run in group:
            view.tell(RunStarted(run, 10, 0))
            view.tell(RunEvaluated(run, 0, {"loss": 2.0}))
        for _ in range(10 if start < 24 else 3):
            clock.now += 0.5
            view.tell(StepsTaken(group, 1234))
        for run in group if start < 24 else []:
            lost = run.rank == 64
            view.tell(RunEnded(record(run, None if lost else 1.0 / (run.rank or 1), "diverged" if lost else "done")))
    return view


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("height", [6, 10, 24, 60])
@pytest.mark.parametrize("workers", [1, 6])
def test_the_view_fits_the_screen(width: int, height: int, workers: int, clock: Clock) -> None:
    lines = shown(a_view(clock, height, workers), width)
    assert max(map(len, lines)) <= width
    assert len(lines) <= height


@pytest.mark.parametrize("width", [80, 120])
def test_the_view_says_where_the_grid_stands(width: int, clock: Clock) -> None:
    view = a_view(clock, 60)
    lines = shown(view, width)
    assert lines[0].startswith("24/62 runs")
    # 2468 tokens a second; 43 steps of a group of six in 21.5 s, (62·10 − 43·6) left.
    assert lines[0].rstrip().endswith("2,468 tokens/s, about 30 s left")
    assert lines[1].rstrip() == "step 3/10  pissa  r = 2,4  lr 0.001,0.01  seed 0,1"
    rows = {line[:12].strip(): line.split() for line in lines[3:]}
    assert rows["base"][-1] == "2.0000"
    assert rows["r = 4"][-3:] == ["0.2500", "0.001", "4/4"]
    assert rows["r = 64"][-5:] == ["4/4", "4", "diverged", "or", "stopped"]
    assert "(lower is better)" in lines[2]
    assert "loss" in lines[2]


def test_a_short_screen_says_how_much_is_left_out(clock: Clock) -> None:
    lines = shown(a_view(clock, 12), 80)
    labels = len({run.label for run in big_grid()})
    left_out = next(line for line in lines if line.startswith("…"))
    assert len(lines) == 9  # bar, group, header; base, four labels and this line
    assert left_out.split()[2] == str(labels + 1 - (len(lines) - 4))


def test_names_do_not_steer_the_terminal(clock: Clock) -> None:
    view = LiveProgress(ProgressState(lambda: LOSS, clock=clock), Console(height=24, file=io.StringIO()))
    run = lora(targets="q\x1b[31m[red]")
    view.tell(GridPlanned([run], []))
    view.tell(RunStarted(run, 10, 0))
    view.tell(StepsTaken([run], 5))
    text = "\n".join(shown(view, 80))
    assert "\x1b" not in text
    assert text.count("[red]") == 2


def test_drawing_does_not_wait(clock: Clock) -> None:
    view = LiveProgress(ProgressState(lambda: LOSS, clock=clock), Console(height=24, file=io.StringIO()))
    before = shown(view, 80)
    with view.lock:  # a report is being taken in
        view.state.tell(GridPlanned([lora()], []))
        began = time.monotonic()
        assert shown(view, 80) == before
        assert time.monotonic() - began < 0.5
    assert shown(view, 80)[0].startswith("0/1 run ")


@contextmanager
def terminal() -> Iterator[list[bytes]]:
    """stderr on a pseudo-terminal; what was written to it, as it comes."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(master, 65536):
                seen.append(data)
        except OSError:  # the other end is closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        with os.fdopen(slave, "w") as writer:
            patch.setattr(sys, "stderr", writer)
            yield seen
            patch.undo()
    reader.join()
    os.close(master)


def study_of(folder: Path, metric: Metric = LOSS) -> Path:
    described = {"metric": metric.name, "higher_is_better": metric.higher_is_better}
    (folder / "study.json").write_text(json.dumps(described))
    return folder


def test_a_terminal_gets_a_view_that_goes_away(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    with terminal() as heard, open_listener(False, study_of(tmp_path)) as listener:
        assert isinstance(listener, LiveProgress)
        sweep(listener, clock)
        time.sleep(0.7)
        sys.stdout.write("data\n")
    seen = b"".join(heard).decode()
    assert 1 <= seen.count("best so far") <= 5 * (time.monotonic() - began) + 2
    assert "2/3 runs" in seen
    assert "0.7500" in seen
    # The last thing is the removal of the view's lines; above them, the note has stayed.
    note, _, after = seen.partition("going on with 1")
    assert "out of memory" in note
    assert after.rpartition(ERASED)[2] == ""
    assert after.rpartition("2/3 runs")[2].count(ERASED) >= 6
    # stdout may lead elsewhere.
    assert capsys.readouterr().out == "data\n"


def test_a_dumb_terminal_gets_lines() -> None:
    with terminal(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "dumb")
        with open_listener(False) as listener:
            assert isinstance(listener, PlainProgress)


def test_a_pipe_gets_lines_and_quiet_nothing(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with open_listener(False, study_of(tmp_path, ACCURACY)) as listener:
        listener.tell(GridPlanned([BASE, lora()], []))
        listener.tell(RunEnded(record(lora(), 0.5, metric="accuracy")))
    said = capsys.readouterr()
    assert said.err == "1 run\n[1/1] lora-r1-lr0.01-s0: validation accuracy 0.5000\n"
    with open_listener(True, tmp_path) as listener:
        assert isinstance(listener, Silent)
        sweep(listener, clock)
    assert capsys.readouterr() == ("", "")


# Stopping


def test_a_signal_asks_and_a_second_one_insists(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        assert "stopping" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_word_of_stopping_stays_above_the_view(tmp_path: Path, clock: Clock) -> None:
    with terminal() as heard, stop_on_signal() as stop, open_listener(False, study_of(tmp_path)) as listener:
        sweep(listener, clock)
        time.sleep(0.4)
        signal.raise_signal(signal.SIGINT)
        assert stop()
    # The view is taken away before the line is written.
    before, _, _ = b"".join(heard).decode().partition("stopping")
    assert "2/3 runs" in before
    assert before.rpartition("2/3 runs")[2].count(ERASED) >= 6
