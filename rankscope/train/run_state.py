"""One run in progress: its optimizer, its progress, and a state on disk from which it continues."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from rankscope.errors import FormatError
from rankscope.formats.file_io import write_atomic
from rankscope.train.config import StudyConfig
from rankscope.train.costs import optimizer_bytes, total_bytes
from rankscope.train.methods import TrainableModel
from rankscope.train.process_group import distribute_like, gather_tensor
from rankscope.train.runs import Run, RunCost, RunRecord, Status
from rankscope.train.session import Session

STATE_NAME = "state.pt"
METRICS_NAME = "metrics.jsonl"
# What torch.load and reading its result raise on a file that is damaged or not ours.
STATE_ERRORS = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, UnpicklingError)


@dataclass
class Progress:
    """The progress of a run; with the weights and the optimizer this is its whole state."""

    step: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    peak: int = 0
    together: int = 1
    history: list[dict[str, Any]] = field(default_factory=list)


def schedule_factor(step: int, steps: int, config: StudyConfig) -> float:
    """Share of the peak rate at a step: linear warm-up, then the schedule down to 0 after the last step."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0 - done if config.schedule == "linear" else 1.0


class RunState:
    """Run i of the runs that ``trained`` holds: its own optimizer, progress and losses."""

    def __init__(
        self,
        session: Session,
        trained: TrainableModel,
        i: int,
        run: Run,
        before: Mapping[str, Mapping[str, float]],
    ) -> None:
        self.session, self.trained, self.i, self.run, self.before = session, trained, i, run, before
        self.team, self.folder = session.team, session.path(run)
        config, device = session.config, session.device
        self.parameters = trained.parameters(i)
        self.optimizer = make_optimizer(trained, i, self.parameters, run, config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
        self.progress = Progress()
        # Kept on the device: reading a loss at each step would make the host wait.
        self.losses = torch.zeros(session.steps, device=device)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The scalar to go backward from, whose gradients ``step`` unscales to those of ``loss``, a scalar."""
        self.losses[self.progress.step] += loss.detach()
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def step(self) -> None:
        """One step of the optimizer with the gradients that the parameters have."""
        share = schedule_factor(self.progress.step, self.session.steps, self.session.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters.values(), self.session.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.progress.step += 1

    # Evaluations

    @property
    def is_evaluated(self) -> bool:
        return bool(self.progress.history) and self.progress.history[-1]["step"] == self.progress.step

    def new_losses(self) -> list[float]:
        """Training losses since the last evaluation."""
        start = self.progress.history[-1]["step"] if self.progress.history else 0
        losses: list[float] = self.team.mean(self.losses[start : self.progress.step].cpu()).tolist()
        return losses

    def record_evaluation(self, line: Mapping[str, Any]) -> None:
        """Add an evaluation to the history, on disk too."""
        self.progress.history.append(dict(line))
        if not self.team.is_main_process:
            return
        text = "".join(json.dumps(line) + "\n" for line in self.progress.history)
        write_atomic(self.folder / METRICS_NAME, lambda path: _write(path, text))

    def end(self, status: Status) -> RunRecord:
        """Save the result, then the record, then delete the state: a kill between any two of them loses nothing."""
        saved = self.trained.save(self.i, self.folder) if status == "done" else 0
        last = self.progress.history[-1]
        record = RunRecord(
            run=self.run,
            status=status,
            steps=self.progress.step,
            metrics={split: last[split] for split in ("validation", "test") if split in last} if saved else {},
            before={split: dict(metrics) for split, metrics in self.before.items()},
            cost=self._cost(saved),
        )
        if self.team.is_main_process:
            record.write(self.folder)
            (self.folder / STATE_NAME).unlink(missing_ok=True)
        return record

    def _cost(self, saved: int) -> RunCost:
        own = self.trained.trim(self.i, self.parameters).values()
        parameter_bytes = total_bytes(own)
        return RunCost(
            parameters=self.trained.base_size,
            trainable=sum(weight.numel() for weight in own),
            parameter_bytes=parameter_bytes,
            gradient_bytes=parameter_bytes,
            optimizer_bytes=optimizer_bytes(self._own_moments()),
            saved_bytes=saved,
            peak_memory=self.progress.peak or None,
            seconds=round(self.progress.seconds, 3),
            seconds_per_step=round(self.progress.step_seconds / max(1, self.progress.step), 5),
            together=self.progress.together,
        )

    # The state

    def _own_moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state by parameter name, in the run's own shapes."""
        states = {name: self.optimizer.state[weight] for name, weight in self.parameters.items()}
        kinds = dict.fromkeys(kind for state in states.values() for kind in state)
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for kind in kinds:
            values = {name: gather_tensor(state[kind]) for name, state in states.items() if kind in state}
            values = values if kind == "step" else self.trained.trim(self.i, values)
            for name, value in values.items():
                moments[name][kind] = value
        return moments

    def state_dict(self) -> dict[str, Any]:
        """All there is to know of the run, whatever other runs are trained beside it."""
        return {
            "progress": vars(self.progress),
            "losses": self.team.mean(self.losses[: self.progress.step].cpu()),
            "parameters": self.trained.trim(
                self.i, {name: gather_tensor(p.detach()) for name, p in self.parameters.items()}
            ),
            "optimizer": self._own_moments(),
            "scaler": self.scaler.state_dict(),
        }

    def save_state(self) -> None:
        state = self.state_dict()
        if self.team.is_main_process:
            write_atomic(self.folder / STATE_NAME, lambda path: torch.save(state, path))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.progress = Progress(**{**state["progress"], "history": list(state["progress"]["history"])})
        self.losses[: self.progress.step] = state["losses"].to(self.losses.device)
        for name, value in self.trained.pad(self.i, state["parameters"]).items():
            self.parameters[name].copy_(distribute_like(value, self.parameters[name]))
        moments: dict[str, dict[str, Tensor]] = state["optimizer"]
        for kind in dict.fromkeys(kind for each in moments.values() for kind in each):
            values = {name: each[kind] for name, each in moments.items() if kind in each}
            if kind != "step":
                values = self.trained.pad(self.i, values)
            for name, value in values.items():
                self.optimizer.state[self.parameters[name]][kind] = self._place_moment(
                    kind, value, self.parameters[name]
                )
        self.scaler.load_state_dict(state["scaler"])

    def _place_moment(self, kind: str, value: Tensor, weight: Tensor) -> Tensor:
        """A moment where its weight is; a fused optimizer counts its steps on the device, any other on the host."""
        if kind != "step":
            return distribute_like(value, weight).clone()
        return value.to(weight.device if self.optimizer.defaults["fused"] else "cpu", copy=True)

    def resume(self) -> bool:
        """Continue from the state on disk; False where there is none."""
        path = self.folder / STATE_NAME
        if not path.exists():
            return False
        try:
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except STATE_ERRORS as error:
            raise FormatError(f"{path}: not the state of this run; delete it to start the run again") from error
        return True


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run so far; none where the file is missing or damaged."""
    try:
        return [json.loads(line) for line in (folder / METRICS_NAME).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


def last_evaluated_step(folder: Path) -> int:
    """The step of the last evaluation of a run, 0 where there is none."""
    return max((int(line["step"]) for line in read_history(folder)), default=0)


def read_metrics_at(folder: Path, step: int) -> dict[str, float] | None:
    """Metrics of the validation split after a step, if the run was evaluated there."""
    return next((line["validation"] for line in read_history(folder) if line["step"] == step), None)


def make_optimizer(
    trained: TrainableModel,
    i: int,
    parameters: Mapping[str, Tensor],
    run: Run,
    config: StudyConfig,
    device: torch.device,
) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, as transformers does it: not on biases and norms."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, weight in parameters.items():
        decay = config.weight_decay if weight.ndim >= 2 else 0.0
        groups.setdefault(((run.lr or 0.0) * trained.learning_rate_factor(i, name), decay), []).append(weight)
    described = [
        {"params": weights, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), weights in groups.items()
    ]
    sharded = any(hasattr(weight, "device_mesh") for weight in parameters.values())
    return torch.optim.AdamW(described, fused=device.type == "cuda" or (device.type == "cpu" and not sharded))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
