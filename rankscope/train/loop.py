"""Training one run: AdamW, a schedule, evaluations, and a state on disk to go on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rankscope.errors import FormatError, TrainingError
from rankscope.formats.files import write_atomic
from rankscope.linalg import may_copy_ahead
from rankscope.train.config import StudyConfig, seeded
from rankscope.train.costs import optimizer_bytes, peak_memory, reset_peak_memory, total_bytes
from rankscope.train.methods import METHODS, Trained
from rankscope.train.runs import Cost, Record, Run
from rankscope.train.tasks import Batch, Split, Task

STATE = "state.pt"
# What torch.load and reading its result raise on a file that is damaged or not ours.
BROKEN_STATE = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, UnpicklingError)


class InterruptedTrainingError(TrainingError):
    """The run was asked to stop and has saved its state."""


class Listener(Protocol):
    """Who is told how training goes; the command line draws progress from it."""

    def started(self, run: Run, steps: int, at: int) -> None: ...

    def stepped(self, run: Run, step: int) -> None: ...

    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None: ...

    def ended(self, record: Record) -> None: ...


@dataclass
class Progress:
    """Where a run in progress stands; with the weights and the optimizer this is its whole state."""

    step: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    peak: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def rate(step: int, steps: int, config: StudyConfig) -> float:
    """Share of the peak rate at a step: linear warm-up, then the schedule down to 0 after the last step."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0 - done if config.schedule == "linear" else 1.0


def evaluation_steps(steps: int, count: int) -> set[int]:
    """After which steps held-out data is looked at: before the first, ``count`` times between, after the last."""
    return {round(steps * i / (count + 1)) for i in range(count + 2)}


class Loop:
    """One run: the model, its optimizer, and where it stands."""

    def __init__(
        self,
        task: Task,
        config: StudyConfig,
        run: Run,
        folder: Path,
        before: Mapping[str, Mapping[str, float]],
        device: torch.device,
        listener: Listener,
    ) -> None:
        self.before = before
        self.task, self.config, self.run, self.folder, self.device = task, config, run, folder, device
        self.listener = listener
        self.steps = config.steps or task.steps
        self.trained: Trained = METHODS[run.method](task, config, run)
        self.model = self.trained.model.to(device)
        self.parameters = self.trained.parameters()
        self.optimizer = make_optimizer(self.parameters, run, config, device)
        self.progress = Progress()
        self.loss_sum = torch.zeros((), device=device)
        self.since_evaluation = 0

    def train(self, stop: Callable[[], bool]) -> Record:
        """Train to the end, or to the point where the loss is no longer finite.

        Raises:
            InterruptedTrainingError: ``stop`` said so; the state is saved.
        """
        if not self._resume():
            self.trained.save_initial(self.folder)
        self.listener.started(self.run, self.steps, self.progress.step)
        reset_peak_memory(self.device)
        due = evaluation_steps(self.steps, self.config.evaluations)
        started = saved = time.monotonic()
        spent = self.progress.seconds
        while True:
            if self.progress.step in due and not self._evaluated() and not self._evaluate():
                return self._end("diverged")
            if self.progress.step >= self.steps:
                return self._end("done")
            asked = stop()
            if asked or time.monotonic() - saved > self.config.save_seconds:
                self.progress.seconds = spent + time.monotonic() - started
                self._save_state()
                saved = time.monotonic()
            if asked:
                raise InterruptedTrainingError(f"stopped at step {self.progress.step} of {self.run.name}")
            began = time.monotonic()
            self._step()
            now = time.monotonic()
            self.progress.step_seconds += now - began
            self.progress.seconds = spent + now - started
            self.listener.stepped(self.run, self.progress.step)

    def _step(self) -> None:
        self.model.train()
        step, config = self.progress.step, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.lr * rate(step, self.steps, config)  # type: ignore[operator]
        with seeded(self.device, self.run.seed, "model", step):
            for micro in range(config.accumulate):
                self._backward(step * config.accumulate + micro)
        nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        self.since_evaluation += 1

    def _backward(self, index: int) -> None:
        """Add the gradients of one batch."""
        batch = self.task.batch(self.run.seed, index, self.config.batch)
        with autocast(self.device, self.config):
            loss = self.task.loss(self.model, move(batch, self.device)) / self.config.accumulate
        torch.autograd.backward(loss)
        # Summed on the device: reading the loss here would make the host wait at every step.
        self.loss_sum += loss.detach()

    def _evaluated(self) -> bool:
        return bool(self.progress.history) and self.progress.history[-1]["step"] == self.progress.step

    def _evaluate(self) -> bool:
        """Measure held-out data and note it; False where the loss is no longer finite."""
        step = self.progress.step
        line: dict[str, Any] = {"step": step, "seconds": round(self.progress.seconds, 3)}
        if self.since_evaluation:
            line["train_loss"] = float(self.loss_sum) / self.since_evaluation
            if not math.isfinite(line["train_loss"]):
                return False
        # Every method starts as the base, which has been measured.
        line |= (
            self.before
            if step == 0
            else self._measure(("validation", "test") if step >= self.steps else ("validation",))
        )
        if not all(math.isfinite(value) for value in line["validation"].values()):
            return False
        self.loss_sum.zero_()
        self.since_evaluation = 0
        self.progress.history.append(line)
        self._write_history()
        self.listener.evaluated(self.run, step, line["validation"])
        return True

    def _measure(self, splits: Sequence[Split]) -> dict[str, dict[str, float]]:
        return evaluate(self.task, self.model, splits, self.config, self.device)

    def _write_history(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self.progress.history)
        write_atomic(self.folder / "metrics.jsonl", lambda path: _write(path, text))

    def _end(self, status: str) -> Record:
        """Save the result, then the record, then drop the state: a kill between any two loses nothing."""
        saved = self.trained.save(self.folder) if status == "done" else 0
        last = self.progress.history[-1]
        record = Record(
            run=self.run,
            status="done" if status == "done" else "diverged",
            steps=self.progress.step,
            metrics={split: last[split] for split in ("validation", "test") if split in last} if saved else {},
            before={split: dict(metrics) for split, metrics in self.before.items()},
            cost=self._cost(saved),
        )
        record.write(self.folder)
        (self.folder / STATE).unlink(missing_ok=True)
        self.listener.ended(record)
        return record

    def _cost(self, saved: int) -> Cost:
        weights = list(self.parameters.values())
        return Cost(
            parameters=sum(weight.numel() for weight in self.model.parameters()),
            trainable=sum(weight.numel() for weight in weights),
            parameter_bytes=total_bytes(weights),
            gradient_bytes=total_bytes(weights),
            optimizer_bytes=optimizer_bytes(self.optimizer),
            saved_bytes=saved,
            peak_memory=self._peak() or None,
            seconds=round(self.progress.seconds, 3),
            seconds_per_step=round(self.progress.step_seconds / max(1, self.progress.step), 5),
        )

    def _peak(self) -> int:
        return max(self.progress.peak, peak_memory(self.device) or 0)

    def _save_state(self) -> None:
        self.progress.peak = self._peak()
        state = {
            "progress": vars(self.progress),
            "loss_sum": self.loss_sum,
            "since_evaluation": self.since_evaluation,
            "parameters": {name: weight.detach() for name, weight in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "generators": [generator.get_state() for generator in self.trained.generators()],
        }
        write_atomic(self.folder / STATE, lambda path: torch.save(state, path))

    def _resume(self) -> bool:
        """Take up the state on disk, if there is one."""
        path = self.folder / STATE
        if not path.exists():
            return False
        try:
            # To the host first: the optimizer moves its moments to the device, and reads its count of steps here.
            state = torch.load(path, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for name, weight in self.parameters.items():
                    weight.copy_(state["parameters"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            for generator, value in zip(self.trained.generators(), state["generators"], strict=True):
                generator.set_state(value)
            self.loss_sum.copy_(state["loss_sum"])
            self.since_evaluation = state["since_evaluation"]
            self.progress = Progress(**state["progress"])
        except BROKEN_STATE as error:
            raise FormatError(f"{path}: not the state of this run; delete it to start the run again") from error
        return True


def make_optimizer(
    parameters: Mapping[str, Tensor], run: Run, config: StudyConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, as transformers does it: not on biases and norms."""
    matrices = [weight for weight in parameters.values() if weight.ndim >= 2]
    vectors = [weight for weight in parameters.values() if weight.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=run.lr or 0.0, fused=device.type in ("cpu", "cuda"))


def autocast(device: torch.device, config: StudyConfig) -> torch.autocast:
    """Mixed precision where the settings ask for it; weights and optimizer stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")


def move(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=may_copy_ahead(device)) for name, tensor in batch.items()}


def evaluate(
    task: Task, model: nn.Module, splits: Sequence[Split], config: StudyConfig, device: torch.device
) -> dict[str, dict[str, float]]:
    """Metrics of each split, in the arithmetic of the settings."""
    model.eval()
    with torch.no_grad(), autocast(device, config):
        return {split: task.evaluate(model, split, device) for split in splits}


def evaluate_base(task: Task, config: StudyConfig, run: Run, folder: Path, device: torch.device) -> Record:
    """The untouched base as a run of no steps: what every method starts from."""
    metrics = evaluate(task, task.model(run.seed).to(device), ("validation", "test"), config, device)
    if not all(math.isfinite(value) for split in metrics.values() for value in split.values()):
        raise TrainingError("the base's own metrics are not finite; are its weights whole?")
    record = Record(run=run, status="done", steps=0, metrics=metrics, before=metrics)
    record.write(folder)
    return record


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
