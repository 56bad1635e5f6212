"""Several processes on this machine that train one study, and their events passed on to one listener."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from rankscope.errors import ConfigError, RankscopeError, TrainingError
from rankscope.train.config import StudyConfig
from rankscope.train.events import Event, Listener, StepsTaken, TrainingNote
from rankscope.train.loop import InterruptedTrainingError
from rankscope.train.study import Study, run_study

REPORT_SECONDS = 0.2  # seconds between looks at the workers, and between their reports of steps


class WorkerFailed(msgspec.Struct, frozen=True):
    """A worker ended with an error; the others are asked to stop."""

    text: str


class Reporter:
    """A listener in a worker that sends on what it is told; steps are added up and sent a few times a second."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send
        self._steps: StepsTaken | None = None  # not sent yet
        self._sent = 0.0

    def tell(self, event: Event) -> None:
        if isinstance(event, StepsTaken):
            earlier = self._steps or StepsTaken((), 0, 0)
            self._steps = StepsTaken(list(event.runs), earlier.tokens + event.tokens, earlier.steps + event.steps)
            if time.monotonic() - self._sent > REPORT_SECONDS:
                self._send_steps()
        else:
            self._send_steps()
            self._send(event)

    def _send_steps(self) -> None:
        if self._steps is not None:
            self._send(self._steps)
            self._steps, self._sent = None, time.monotonic()


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
    notes: set[TrainingNote] = set()
    while any(process.is_alive() for process in processes) or not reports.empty():
        if stop() or failures:
            asked.set()
        _forward(reports, listener, failures, notes)
    if failures:
        raise TrainingError(failures[0])
    if stop():
        raise InterruptedTrainingError("stopped")
    if all(process.exitcode for process in processes):
        raise TrainingError(
            f"the workers ended with code {processes[0].exitcode}; the same command continues the study"
        )
    return Study(folder)


def _forward(reports: Any, listener: Listener, failures: list[str], notes: set[TrainingNote]) -> None:
    """Pass on one report, if one comes; a note that every worker makes is passed on once."""
    try:
        event: Event | WorkerFailed = reports.get(timeout=REPORT_SECONDS)
    except queue.Empty:
        return
    if isinstance(event, WorkerFailed):
        failures.append(event.text)
    elif not isinstance(event, TrainingNote):
        listener.tell(event)
    elif event not in notes:
        notes.add(event)
        listener.tell(event)


def _run_worker(config: StudyConfig, folder: str, threads: int, reports: Any, asked: Any, parent: int) -> None:
    """Train in a worker process until the study is complete, or the parent asks for a stop or is gone."""
    # Ctrl-C reaches all processes of a terminal; the parent asks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        run_study(config, folder, Reporter(reports.put), lambda: asked.is_set() or os.getppid() != parent)
    except InterruptedTrainingError:
        pass
    except RankscopeError as error:
        reports.put(WorkerFailed(str(error)))
