"""How training is shown while it goes, and how it is stopped."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import FrameType

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rankscope.cli.output import format_count, remove_control_characters
from rankscope.cli.progress_state import Leader, Metric, ProgressState, format_duration, summarize_group
from rankscope.formats.file_io import read_json
from rankscope.train.events import (
    Event,
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

FRAMES_PER_SECOND = 4  # times the view is drawn
HEARTBEAT_SECONDS = 60.0  # seconds without a line after which a log gets one
OTHER_LINES = 5  # lines of the view that are not the table's
MAX_GROUPS = 4
LONGEST = 36  # characters of a label


class PlainProgress:
    """Plain lines for pipes and logs: one for each run that has ended, and one a minute in between.

    Args:
        say: writes a line.
        clock: seconds that never go back.
    """

    def __init__(self, state: ProgressState, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self.state, self._write, self.clock = state, say, clock
        self.total, self.spoke, self.based = 0, clock(), False

    def tell(self, event: Event) -> None:
        # A run that is started for the second time has only changed the runs beside it.
        if isinstance(event, RunStarted) and event.at and event.run.name not in self.state.first:
            self.say(f"{event.run.name}: taken up at step {event.at} of {event.steps}")
        self.state.tell(event)
        match event:
            case GridPlanned():
                self._say_count()
            case StepsTaken():
                self._say_pace()
            case RunEvaluated():
                self._say_base()
            case RunEnded(record=record) if record.run.method != "base":
                done = f"{self.state.done_count}/{self.state.run_count}"
                self.say(f"[{done}] {record.run.name}: {self._outcome(record)}")
            case TrainingNote(text=text):
                self.say(f"note: {text}")

    def _say_count(self) -> None:
        if self.state.run_count != self.total:
            self.total = self.state.run_count
            ended = f", {self.state.done_count} ended" if self.state.done_count else ""
            self.say(f"{format_count(self.state.run_count, 'run')}{ended}")

    def _say_pace(self) -> None:
        if self.clock() - self.spoke >= HEARTBEAT_SECONDS:
            state = self.state
            groups = "; ".join(
                f"step {at}/{state.steps} of {summarize_group(group)}" for group, at in state.training_groups()
            )
            self.say(", ".join([f"{state.done_count}/{state.run_count} runs", groups, *pace_texts(state)]))

    def _say_base(self) -> None:
        metric, base = self.state.metric, self.state.base_score
        if not self.based and metric is not None and base is not None:
            self.based = True
            self.say(f"base: validation {metric.name} {base:.4f} ({metric.direction_text})")

    def _outcome(self, record: RunRecord) -> str:
        metric, base = self.state.metric, self.state.bases.get(record.run.seed)
        if record.status == "diverged":
            return f"diverged at step {record.steps}"
        if record.status == "stopped":
            return f"stopped at step {record.steps}, in the worse half of its learning rates"
        score = self.state.scores.get(record.run.name)
        if metric is None or score is None:
            return "done"
        return f"validation {metric.name} {score:.4f}" + ("" if base is None else f" (base {base:.4f})")

    def say(self, line: str) -> None:
        self.spoke = self.clock()
        self._write(remove_control_characters(line))


class LiveProgress:
    """What a terminal shows in place, at most a screen of it: bar, pace, groups in training, the best so far.

    It is told events in one thread and drawn in another. Drawing never waits for the lock: a frame that cannot have it
    shows the numbers of the last frame. Otherwise the two threads could wait for each other at the terminal.
    """

    def __init__(self, state: ProgressState, console: Console) -> None:
        self.state, self.console = state, console
        self.lock = Lock()
        self.shown: RenderableType = ""

    def tell(self, event: Event) -> None:
        """A note stays on the terminal, above the view."""
        if isinstance(event, TrainingNote):
            text = remove_control_characters(event.text)
            self.console.print(f"note: {text}", highlight=False, markup=False)
            return
        with self.lock:
            self.state.tell(event)

    def frame(self) -> RenderableType:
        if self.lock.acquire(blocking=False):
            try:
                self.shown = render_progress(self.state, self.console.height)
            finally:
                self.lock.release()
        return self.shown


def render_progress(state: ProgressState, height: int) -> RenderableType:
    """The view of these numbers in at most ``height`` lines; each line is cut at the width of the console."""
    if not state.run_count:
        return Text("getting ready", style="dim")
    bar = Table.grid(padding=(0, 2), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    done = f"{state.done_count}/{format_count(state.run_count, 'run')}"
    bar.add_row(
        done, ProgressBar(total=1.0, completed=state.done_share), Text(", ".join(pace_texts(state)), style="cyan")
    )
    groups = state.training_groups()[-MAX_GROUPS:]
    room = max(0, height - OTHER_LINES - max(1, len(groups)))
    return Group(bar, _groups(state, groups), *([_leaders(state, room)] if room > 1 else []))


def pace_texts(state: ProgressState) -> list[str]:
    """Tokens per second and time remaining, as far as they are known."""
    speed, left = state.speed.per_second(), state.seconds_left()
    return [
        *([] if speed is None else [f"{speed:,.0f} tokens/s"]),
        *([] if left is None else [f"about {format_duration(left)} left"]),
    ]


def _groups(state: ProgressState, groups: Sequence[tuple[list[Run], int]]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, overflow="ellipsis")
    for runs, at in groups:
        table.add_row(f"step {at}/{state.steps}", Text(remove_control_characters(summarize_group(runs))))
    return table if groups else Text("no run in training yet" if not state.done_count else "between runs", style="dim")


def _leaders(state: ProgressState, room: int) -> RenderableType:
    """The best learning rate of each label so far, in ``room`` lines besides the header."""
    metric = state.metric
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    # On a narrow terminal only the first and the last column are cut: the others may not wrap.
    table.add_column(_cut(f"best so far{f' ({metric.direction_text})' if metric else ''}"))
    for header in (metric.name if metric else "", "lr", "runs"):
        table.add_column(header, no_wrap=True, justify="right")
    table.add_column("")
    leaders = [Leader("base", state.base_score, None, 0, 0, 0), *state.leaders()]
    shown = leaders if len(leaders) <= room else leaders[: room - 1]
    for leader in shown:
        score, lr = "" if leader.score is None else f"{leader.score:.4f}", "" if leader.lr is None else f"{leader.lr:g}"
        runs = f"{leader.ended}/{leader.planned}" if leader.planned else ""
        notes = f"{leader.lost} diverged or stopped" if leader.lost else ""
        # The end of a long label, its rank, tells it from others.
        label = leader.label if len(leader.label) <= LONGEST else f"…{leader.label[1 - LONGEST :]}"
        table.add_row(_cut(remove_control_characters(label)), score, lr, runs, _cut(notes, "dim"))
    if len(shown) < len(leaders):
        table.add_row(_cut(f"… and {len(leaders) - len(shown)} more", "dim"))
    return table


def _cut(text: str, style: str = "") -> Text:
    """Text that stays on one line and is cut where the line ends."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


@contextmanager
def open_listener(quiet: bool, study: Path | str | None = None, workers: int = 1) -> Iterator[Listener]:
    """The listener for this stderr: none when quiet, a view in place on a terminal, lines in a pipe.

    Args:
        study: folder of the study; what runs are compared by is read there once they are planned. Without it no
            scores are shown.
        workers: processes at work whose reports come here.
    """
    state = ProgressState(lambda: None if study is None else study_metric(Path(study)), workers)
    console = Console(stderr=True)
    if quiet:
        yield Silent()
    elif sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal:
        view = LiveProgress(state, console)
        # stdout may go elsewhere, and is not ours to divert.
        with Live(
            get_renderable=view.frame,
            console=console,
            refresh_per_second=FRAMES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            vertical_overflow="crop",
        ):
            yield view
    else:
        yield PlainProgress(state, lambda line: click.echo(line, err=True))


def study_metric(study: Path) -> Metric:
    description = read_json(study / "study.json")
    return Metric(str(description["metric"]), bool(description["higher_is_better"]))


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask for a stop at the next step, where the state is whole; a second one stops at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # print, since click.echo would get past the view, which then could not keep this line above itself.
        print("stopping: saving the runs in progress (once more to stop at once)", file=sys.stderr, flush=True)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
