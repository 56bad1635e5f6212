"""Several processes at work on one study on this machine, and what they report put together in one place."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rankscope.errors import ConfigError, RankscopeError, TrainingError
from rankscope.train.config import StudyConfig
from rankscope.train.loop import InterruptedTrainingError, Listener
from rankscope.train.runs import Run, RunRecord
from rankscope.train.study import Study, run_study

REPORT_SECONDS = 0.2  # seconds between looks at the workers, and between their reports of steps


class Reporter:
    """A listener in a worker that passes on what it hears; steps are added up and passed on a few times a second."""

    def __init__(self, send: Callable[[tuple[str, tuple[Any, ...]]], None]) -> None:
        self._send = send
        self.runs: list[Run] = []
        self.tokens, self.steps, self.sent = 0, 0, 0.0

    def send(self, what: str, *arguments: Any) -> None:
        """Pass something on, after the steps that came before it."""
        if self.steps:
            self._send(("stepped", (self.runs, self.tokens, self.steps)))
            self.tokens, self.steps, self.sent = 0, 0, time.monotonic()
        self._send((what, arguments))

    def planned(self, runs: Sequence[Run], ended: Sequence[RunRecord]) -> None:
        self.send("planned", list(runs), list(ended))

    def started(self, run: Run, steps: int, at: int) -> None:
        self.send("started", run, steps, at)

    def stepped(self, runs: Sequence[Run], tokens: int, steps: int = 1) -> None:
        self.runs, self.tokens, self.steps = list(runs), self.tokens + tokens, self.steps + steps
        if time.monotonic() - self.sent > REPORT_SECONDS:
            self._send(("stepped", (self.runs, self.tokens, self.steps)))
            self.tokens, self.steps, self.sent = 0, 0, time.monotonic()

    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        self.send("evaluated", run, step, dict(metrics))

    def ended(self, record: RunRecord) -> None:
        self.send("ended", record)

    def noted(self, text: str) -> None:
        self.send("noted", text)


def run_study_with_workers(
    config: StudyConfig, folder: Path | str, workers: int, listener: Listener, stop: Callable[[], bool]
) -> Study:
    """As ``run_study``, in ``workers`` processes that share out the runs; a lost one's runs are taken by the others.

    Each has its share of the processor's threads: on a CPU, small steps use two cores better as two steps of one
    thread than as one step of two.

    Raises:
        ConfigError: ``workers`` is less than 1.
        TrainingError: a worker failed, or all of them were killed.
    """
    if workers < 1:
        raise ConfigError(f"workers = {workers}: expected at least 1")
    if workers == 1:
        return run_study(config, folder, listener, stop)
    context = multiprocessing.get_context("spawn")
    reports: Any = context.Queue()
    asked = context.Event()
    threads = max(1, torch.get_num_threads() // workers)
    given = (config, str(folder), threads, reports, asked, os.getpid())
    processes = [context.Process(target=_run_worker, args=given, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    failures: list[str] = []
    said: set[Any] = set()
    while any(process.is_alive() for process in processes) or not reports.empty():
        if stop() or failures:
            asked.set()
        _forward(reports, listener, failures, said)
    if failures:
        raise TrainingError(failures[0])
    if stop():
        raise InterruptedTrainingError("stopped")
    if all(process.exitcode for process in processes):
        raise TrainingError(f"the workers ended with code {processes[0].exitcode}; the same command goes on")
    return Study(folder)


def _forward(reports: Any, listener: Listener, failures: list[str], said: set[Any]) -> None:
    """Pass on one report, if one comes; what every worker notes is passed on once."""
    try:
        what, arguments = reports.get(timeout=REPORT_SECONDS)
    except queue.Empty:
        return
    if what == "failed":
        failures.append(arguments[0])
    elif what != "noted" or arguments not in said:
        said.add(arguments if what == "noted" else None)
        getattr(listener, what)(*arguments)


def _run_worker(config: StudyConfig, folder: str, threads: int, reports: Any, asked: Any, parent: int) -> None:
    """What a worker does."""
    # Ctrl-C reaches all processes of a terminal; the parent asks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        run_study(config, folder, Reporter(reports.put), lambda: asked.is_set() or os.getppid() != parent)
    except InterruptedTrainingError:
        pass
    except RankscopeError as error:
        reports.put(("failed", (str(error),)))
