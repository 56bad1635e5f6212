"""Training some runs in one pass: each with its own data, loss, clipping, schedule, optimizer; one is the case N = 1.

Run i is chunk i of a joined batch. What it computes depends on nothing but itself, up to the rounding of larger
matrix products: its batches, its dropout and its schedule are functions of the run and the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rankscope.errors import ConfigError, TrainingError
from rankscope.linalg import supports_non_blocking
from rankscope.train.config import StudyConfig, stream_seed
from rankscope.train.costs import peak_memory, reset_peak_memory
from rankscope.train.events import RunEnded, RunEvaluated, RunStarted, StepsTaken
from rankscope.train.methods import make_trainable
from rankscope.train.randomness import use_run_streams
from rankscope.train.run_state import RunState
from rankscope.train.runs import Run, RunRecord, Status
from rankscope.train.session import Session
from rankscope.train.task import Batch, Split, Task

AUTOCAST_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Metrics = Mapping[str, Mapping[str, float]]


class InterruptedTrainingError(TrainingError):
    """The runs were asked to stop and have saved their state."""


def evaluation_steps(steps: int, count: int) -> set[int]:
    """After which steps held-out data is looked at: before the first, ``count`` times between, after the last."""
    return {round(steps * i / (count + 1)) for i in range(count + 2)}


class RunGroup:
    """Runs that are trained side by side on one model.

    Args:
        before: metrics of the untouched base by seed.
        until: train no further than this step, and leave the state there; None is to the end.
    """

    def __init__(
        self, session: Session, runs: Sequence[Run], before: Mapping[int, Metrics], until: int | None = None
    ) -> None:
        self.session, self.before = session, before
        self.task, self.config, self.device, self.team = session.task, session.config, session.device, session.team
        self.until = session.steps if until is None else until
        self._attach_runs(runs)

    def _attach_runs(self, runs: Sequence[Run]) -> None:
        """Make the model ready for these runs."""
        self.trained = make_trainable(self.task, self.config, runs)
        self.trained.team = self.team
        self.model = self.trained.model.to(self.device)
        if self.config.checkpointing:
            self.task.checkpoint(self.model, self.config.compile)
        self.wrapped = self.team.wrap(self.model)
        # The losses too: what is fused of them is a tenth of a step.
        self.losses: Any = torch.compile(self._losses) if self.config.compile else self._losses
        self.states = [
            RunState(self.session, self.trained, i, run, self.before[run.seed]) for i, run in enumerate(runs)
        ]

    def train(self) -> None:
        """Train each run to the end, to ``until``, or to the point where its loss is no longer finite.

        Raises:
            InterruptedTrainingError: the session's ``stop`` said so; the states are saved.
        """
        for i, state in enumerate(self.states):
            if not state.resume() and self.team.is_main_process:
                self.trained.save_initial(i, state.folder)
            self.session.listener.tell(RunStarted(state.run, self.session.steps, state.progress.step))
        reset_peak_memory(self.device)
        saved = time.monotonic()
        while self._evaluate_due():
            asked = self.team.any(self.session.stop())
            if asked or self.team.any(time.monotonic() - saved > self.config.save_seconds):
                self._save_states()
                saved = time.monotonic()
            if asked:
                raise InterruptedTrainingError(f"stopped at {self._where()}")
            self._step()

    def try_step(self) -> None:
        """A forward and backward pass and a step of the optimizer, of which nothing is kept."""
        self._step()

    def _where(self) -> str:
        first, *others = self.states
        more = f" and {len(others)} more" if others else ""
        return f"step {first.progress.step} of {first.run.name}{more}"

    def _save_states(self) -> None:
        self._note_costs()
        for state in self.states:
            state.save_state()

    def _note_costs(self) -> None:
        peak = peak_memory(self.device) or 0
        for state in self.states:
            state.progress.peak = max(state.progress.peak, peak)
            state.progress.together = max(state.progress.together, len(self.states))

    # A step

    def _step(self) -> None:
        began = time.monotonic()
        self.trained.train()
        tokens = sum(self._backward(micro) for micro in range(self.config.accumulate))
        self.trained.share_gradients()
        for state in self.states:
            state.step()
        self.trained.zero_grad()
        share = (time.monotonic() - began) / len(self.states)
        for state in self.states:
            state.progress.step_seconds += share
            state.progress.seconds += share
        self.session.listener.tell(StepsTaken([state.run for state in self.states], tokens))

    def _backward(self, micro: int) -> int:
        """Add the gradients of one batch for each run; the number of their tokens."""
        size, accumulate = self.session.batch_size, self.config.accumulate
        indices = [state.progress.step * accumulate + micro for state in self.states]
        batches = [self.task.batch(t.run.seed, at, size) for t, at in zip(self.states, indices, strict=True)]
        joined = self.team.share(self.task.join(batches))
        batch = move_batch(joined, self.device)
        self.trained.seed_dropout(
            [stream_seed(t.run.seed, "dropout", at) for t, at in zip(self.states, indices, strict=True)]
        )
        with self._streams(indices), autocast(self.device, self.config):
            losses = self.losses(batch)
        scaled = [t.scale_loss(loss / accumulate) for t, loss in zip(self.states, losses, strict=True)]
        torch.autograd.backward(scaled)
        return self.task.tokens(joined)

    @contextmanager
    def _streams(self, indices: Sequence[int]) -> Iterator[None]:
        """For models of others, such as BERT with its dropout, which draw from torch's global stream and no other."""
        if not self.task.draws:
            yield
            return
        others = [self.team.rank] if self.team.rank else []
        seeds = [stream_seed(t.run.seed, "model", at, *others) for t, at in zip(self.states, indices, strict=True)]
        with use_run_streams(self.device, seeds):
            yield

    def _losses(self, batch: Batch) -> list[Tensor]:
        """The loss of each run, a scalar, on its chunk (size, …) of the batch (runs · size, …)."""
        n = len(self.states)
        outputs = self.task.outputs(self.wrapped, batch).chunk(n)
        parts = {name: tensor.chunk(n) for name, tensor in batch.items()}
        return [self.task.loss(outputs[i], {name: chunks[i] for name, chunks in parts.items()}) for i in range(n)]

    # Evaluations

    def _evaluate_due(self) -> bool:
        """Evaluate the runs that are due and drop those that have ended; True where some are left."""
        due = evaluation_steps(self.session.steps, self.config.evaluations) | {self.until}
        left = []
        for state in self.states:
            step = state.progress.step
            if step in due and not state.is_evaluated and not self._evaluate(state):
                self._end(state, "diverged")
            elif step >= self.session.steps:
                self._end(state, "done")
            elif step >= self.until:
                self._note_costs()
                state.save_state()
            else:
                left.append(state)
        if left and len(left) < len(self.states):
            self._keep(left)
        return bool(left)

    def _keep(self, left: Sequence[RunState]) -> None:
        """Continue with these runs alone."""
        saved = [state.state_dict() for state in left]
        self._attach_runs([state.run for state in left])
        for state, values in zip(self.states, saved, strict=True):
            state.load_state_dict(values)

    def _evaluate(self, state: RunState) -> bool:
        """Evaluate on held-out data and record it; False where the loss is no longer finite."""
        began = time.monotonic()
        step = state.progress.step
        line: dict[str, Any] = {"step": step, "seconds": round(state.progress.seconds, 3)}
        if losses := state.new_losses():
            line |= {"train_loss": sum(losses) / len(losses), "train_losses": losses}
            if not math.isfinite(line["train_loss"]):
                return False
        # Every method starts as the base, which has been measured.
        line |= state.before if step == 0 else self._measure(state)
        if not all(math.isfinite(value) for value in line["validation"].values()):
            return False
        state.record_evaluation(line)
        state.progress.seconds += time.monotonic() - began
        self.session.listener.tell(RunEvaluated(state.run, step, line["validation"]))
        return True

    def _measure(self, state: RunState) -> dict[str, dict[str, float]]:
        at_end = state.progress.step >= self.session.steps
        splits: tuple[Split, ...] = ("validation", "test") if at_end else ("validation",)
        self.trained.select(state.i)
        return evaluate_splits(self.task, self.model, splits, self.config, self.device)

    def _end(self, state: RunState, status: Status) -> None:
        self._note_costs()
        self.session.listener.tell(RunEnded(state.end(status)))
        self.team.wait()


def autocast(device: torch.device, config: StudyConfig) -> torch.autocast | nullcontext[None]:
    """Mixed precision where the settings ask for it; weights and optimizer stay float32."""
    if config.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[config.dtype])


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, in the same shapes; from pinned memory, where the host continues while it is copied."""
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=supports_non_blocking(device)) for name, tensor in batch.items()}


@contextmanager
def set_precision(device: torch.device, config: StudyConfig) -> Iterator[None]:
    """torch's settings for the arithmetic of a study; as before afterwards.

    TF32 is used in float32 matrix products on CUDA if, and only if, the settings ask for it. Compiled code takes
    adapters of any rank: they are parameters, which torch would otherwise compile for one shape each.
    """
    if config.tf32 and device.type != "cuda":
        raise ConfigError(f"tf32 = true: only CUDA has it, and the device is {device}; leave it out")
    with ExitStack() as stack:
        if config.compile:
            from torch._dynamo import config as dynamo

            stack.enter_context(dynamo.patch(force_parameter_static_shapes=False))
        if device.type == "cuda":
            backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
            for backend in backends:
                stack.callback(setattr, backend, "allow_tf32", backend.allow_tf32)
                backend.allow_tf32 = config.tf32
        yield


def evaluate_splits(
    task: Task, model: nn.Module, splits: Sequence[Split], config: StudyConfig, device: torch.device
) -> dict[str, dict[str, float]]:
    """Metrics of each split, in the arithmetic of the settings."""
    model.eval()
    with torch.no_grad(), autocast(device, config):
        return {split: task.evaluate(model, split, device) for split in splits}


def evaluate_base(session: Session, run: Run) -> RunRecord:
    """The untouched base as a run of no steps: what every method starts from."""
    model = session.task.model(run.seed).to(session.device)
    metrics = evaluate_splits(session.task, model, ("validation", "test"), session.config, session.device)
    if not all(math.isfinite(value) for split in metrics.values() for value in split.values()):
        raise TrainingError("the base's own metrics are not finite; are its weights whole?")
    record = RunRecord(run=run, status="done", steps=0, metrics=metrics, before=metrics)
    record.write(session.path(run))
    return record
