"""How training is shown while it goes, and how it is stopped."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rankscope.train.loop import Listener
from rankscope.train.runs import Record, Run
from rankscope.train.study import Silent


class Lines(Silent):
    """Plain lines on stderr: for pipes and logs."""

    def started(self, run: Run, steps: int, at: int) -> None:
        taken_up = f", taken up at step {at}" if at else ""
        self.say(f"{run.name}: {steps} steps{taken_up}")

    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self.say(f"{run.name}: step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    def ended(self, record: Record) -> None:
        if record.status == "diverged":
            self.say(f"{record.run.name}: diverged at step {record.steps}; recorded as such")

    def say(self, line: str) -> None:
        click.echo(line, err=True)


class Bars(Lines):
    """One bar for the run in progress, above it the evaluations so far."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.bar = progress.add_task("", total=None)

    def started(self, run: Run, steps: int, at: int) -> None:
        self.progress.update(self.bar, description=run.name, total=steps, completed=at)

    def stepped(self, run: Run, step: int) -> None:
        self.progress.update(self.bar, completed=step)

    def say(self, line: str) -> None:
        self.progress.console.print(line, highlight=False, markup=False)


@contextmanager
def listen(quiet: bool) -> Iterator[Listener]:
    """The listener that fits: none when quiet, a bar on a terminal, lines in a pipe."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield Bars(progress)
    else:
        yield Lines()


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask for a stop at the next step, where the state is whole; a second one stops at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        click.echo("stopping: saving the run in progress (once more to stop at once)", err=True)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
