"""Which runs of a study are trained when, by which process, and how many in one pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rankscope.errors import TrainingError, prefix_errors
from rankscope.train.claims import Claims
from rankscope.train.costs import memory_capacity
from rankscope.train.events import GridPlanned, RunEnded, TrainingNote
from rankscope.train.loop import InterruptedTrainingError, RunGroup, evaluate_base, evaluation_steps
from rankscope.train.process_group import SINGLE_PROCESS
from rankscope.train.run_state import STATE_NAME, last_evaluated_step, read_metrics_at
from rankscope.train.runs import Run, RunRecord
from rankscope.train.session import Session

CPU_TOKENS = 2048
"""Tokens in one pass on a CPU: more runs in a pass stop paying there (measured, docs/benchmarks.md)."""
MAX_RANK_RATIO = 4
"""Ranks in one pass differ by this factor at most: factors are padded to the largest."""
POLL_SECONDS = 0.2  # seconds between looks at what other processes have done
RUNG_SHARE = 1 / 3
"""Share of a run after which successive halving drops the worse half of the rates."""


class Sweep:
    """Trains the runs of a study that have not ended, group by group; several processes may do it at once."""

    def __init__(self, session: Session, claims: Claims) -> None:
        self.session, self.claims = session, claims
        self.task, self.config, self.device, self.team = session.task, session.config, session.device, session.team
        self.path = session.path
        self.shares: bool | None = None
        self.limit: int | None = None  # runs in one pass, known once the first adapters are trained

    def train(self, runs: Sequence[Run], until: int | None = None) -> None:
        """Train these runs to the end, or to step ``until``, together with other processes at work on the study.

        Returns when none is left. A run that another process holds is waited for, and continued if that process dies.
        """
        joint = [run for run in runs if self._is_joint(run)]
        while left := [run for run in runs if run not in joint and not self._is_through(run, until)]:
            group = self._claim(left, until)
            if not group:
                if self.session.stop():
                    raise InterruptedTrainingError("stopped while other processes are at work on the study")
                time.sleep(POLL_SECONDS)
                self.announce(runs)  # what others have ended meanwhile
                continue
            try:
                self._train_group(group, until)
            finally:
                self.claims.release(run.name for run in group)
        for run in joint:
            self._train_jointly(run, until)

    def _is_joint(self, run: Run) -> bool:
        return self.team.size > 1 and run.method == "full"

    def _train_jointly(self, run: Run, until: int | None) -> None:
        """Train one run with all processes of the team, unless it is done."""
        self.team.wait()
        if self.team.any(self._is_through(run, until)):
            return
        while self.team.any(self.team.is_main_process and not self.claims.try_claim(run.name)):
            time.sleep(POLL_SECONDS)
        try:
            self._train_group([run], until)
        finally:
            self.claims.release([run.name])

    def announce(self, runs: Sequence[Run]) -> None:
        """Tell the listener which runs there are and which have ended."""
        ended = [RunRecord.read(self.path(run)) for run in runs if self.has_ended(run)]
        self.session.listener.tell(GridPlanned(runs, ended))

    def has_ended(self, run: Run) -> bool:
        return (self.path(run) / "run.json").exists()

    def _is_through(self, run: Run, until: int | None) -> bool:
        return self.has_ended(run) or (until is not None and last_evaluated_step(self.path(run)) >= until)

    # Which runs, how many

    def _claim(self, left: Sequence[Run], until: int | None) -> list[Run]:
        """Claim the next runs that can be trained together and that no other process holds."""
        group: list[Run] = []
        for run in left:
            if group and (not self._goes_with(group, run) or len(group) >= self._limit(group[0])):
                break
            if run.method != "base" and not self.has_ended(base_run(run)):
                continue
            if self.claims.try_claim(run.name):
                if self._is_through(run, until):  # another process has just done it
                    self.claims.release([run.name])
                else:
                    remove_leftovers(self.path(run))
                    group.append(run)
        return group

    def _goes_with(self, group: Sequence[Run], run: Run) -> bool:
        """Whether a run can share a pass with these, and without much padding."""
        if not (run.is_lora and group[0].is_lora) or self.config.bias != "none":
            return False
        if self.task.draws and (self.config.compile or run.seed != group[0].seed):
            # Compiled code ignores ``use_run_streams``. Runs of one seed have the same batches; a text that is padded
            # to another run's longest text would get other dropout.
            return False
        ranks = [other.rank or 1 for other in (*group, run)]
        return max(ranks) <= MAX_RANK_RATIO * min(ranks) and self._can_share()

    def _can_share(self) -> bool:
        """Whether what the model computes for a run is the same beside others; tried once."""
        if self.shares is None:
            self.shares = self.task.can_share(self.task.model(0).to(self.device), self.device)
        return self.shares

    def _limit(self, run: Run) -> int:
        """How many runs are trained together: as many as fit the budget of tokens, or on a GPU the memory."""
        if self.limit is None:
            tokens = self.task.tokens_per_example() * self.session.batch_size
            if self.config.tokens is not None or self.device.type != "cuda":
                self.limit = max(1, (self.config.tokens or CPU_TOKENS) // tokens)
            else:
                self.limit = max(1, self._room(run))
        return self.limit

    def _room(self, run: Run) -> int:
        """How many runs like this one the free memory holds."""
        try:
            return memory_capacity(self.device, lambda: self._probe(run))
        except RuntimeError as error:
            if is_out_of_memory(error):
                return 1
            raise

    def _probe(self, run: Run) -> None:
        """Take one step of one run, of which nothing is kept, to measure its memory."""
        base = RunRecord.read(self.path(base_run(run)))
        before = {run.seed: base.metrics}
        RunGroup(replace(self.session, team=SINGLE_PROCESS), [run], before).try_step()

    # Training them

    def _train_group(self, group: list[Run], until: int | None) -> None:
        name = group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"
        with prefix_errors(name):
            try:
                if group[0].method == "base":
                    evaluate_base(self.session, group[0])
                else:
                    self._train_together(group, until)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(len(group), error)

    def _train_together(self, group: list[Run], until: int | None) -> None:
        before = {run.seed: RunRecord.read(self.path(base_run(run))).metrics for run in group}
        session = self.session if self._is_joint(group[0]) else replace(self.session, team=SINGLE_PROCESS)
        RunGroup(session, group, before, until).train()

    def _halve(self, size: int, error: BaseException) -> None:
        """Halve the number of runs in one pass; they continue from the states they saved last."""
        if size == 1:
            raise TrainingError("out of memory; try a smaller --batch with more --accumulate") from error
        self.limit = size // 2
        text = f"out of memory with {size} runs in one pass; going on with {self.limit}"
        self.session.listener.tell(TrainingNote(text))
        # The traceback holds the group's tensors.
        error.__traceback__ = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Successive halving

    def halve_learning_rates(self, runs: Sequence[Run], score: Callable[[Mapping[str, float]], float]) -> None:
        """Train all to a rung, then record the worse half of each cell's rates as stopped (Jamieson & Talwalkar 2016).

        Args:
            score: of the metrics of the validation split, higher is better.
        """
        steps = self.session.steps
        due = sorted(evaluation_steps(steps, self.config.evaluations))
        rung = min((step for step in due if 0 < step < steps), key=lambda s: abs(s - RUNG_SHARE * steps), default=0)
        rung = rung or max(1, round(RUNG_SHARE * steps))
        self.train(runs, until=rung)
        cells: dict[tuple[str, int], list[tuple[float, Run]]] = {}
        for run in runs:
            # Of the rung itself: another process may have decided already and gone on.
            if run.lr is not None and (metrics := read_metrics_at(self.path(run), rung)):
                cells.setdefault((run.label, run.seed), []).append((score(metrics), run))
        for rivals in cells.values():
            rivals.sort(key=lambda rival: -rival[0])
            for _, run in rivals[math.ceil(len(rivals) / 2) :]:
                if not self.has_ended(run):
                    self._stop_run(run, rung)

    def _stop_run(self, run: Run, rung: int) -> None:
        before = RunRecord.read(self.path(base_run(run))).metrics
        record = RunRecord(run=run, status="stopped", steps=rung, before=before)
        record.write(self.path(run))
        (self.path(run) / STATE_NAME).unlink(missing_ok=True)
        self.session.listener.tell(RunEnded(record))


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing in a run's folder; the names are ours alone (see ``write_atomic``)."""
    for path in folder.glob("**/.*.tmp"):
        path.unlink(missing_ok=True)


def base_run(run: Run) -> Run:
    """The untouched base that a run starts from."""
    return Run(method="base", seed=run.seed)


def is_out_of_memory(error: BaseException) -> bool:
    """What torch and Python raise when memory runs out: the CPU's allocator a bare RuntimeError."""
    text = str(error)
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "allocate memory" in text or "enough memory" in text
