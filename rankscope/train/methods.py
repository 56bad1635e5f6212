"""How a run changes the base: what is trained, what is saved. LoRA and full fine-tuning."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rankscope.formats.store import write_updates
from rankscope.lora import AdapterSpec, Bank
from rankscope.lora.kinds import Conv1DLayer
from rankscope.lora.spec import ALL_LINEAR
from rankscope.lora.targets import layer_class
from rankscope.train.config import StudyConfig, generator
from rankscope.train.runs import Run
from rankscope.train.tasks import Task


class Trained(ABC):
    """A model made ready for one run."""

    model: nn.Module

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name, in a fixed order."""

    @abstractmethod
    def save(self, folder: Path) -> int:
        """Write the result into the run's folder; its bytes."""

    def save_initial(self, folder: Path) -> None:  # noqa: B027 (most methods start from the base alone)
        """Write what the run starts from, where chance had a part in it."""

    def generators(self) -> list[torch.Generator]:
        """Streams whose state a run in progress must keep."""
        return []


class LoraTrained(Trained):
    """One adapter on the frozen base, and the heads that are new to it."""

    def __init__(self, task: Task, config: StudyConfig, run: Run) -> None:
        self.task = task
        self.model = task.model(run.seed)
        self.spec = lora_spec(task, config, run)
        # Each rank draws its own: from one seed, A at rank 64 would begin with A at rank 8.
        self.generator = generator(run.seed, "init", run.rank)
        self.bank = Bank.attach(self.model, self.spec, self.generator)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def generators(self) -> list[torch.Generator]:
        return [self.generator]

    def save(self, folder: Path) -> int:
        return self._save(folder / "adapter")

    def save_initial(self, folder: Path) -> None:
        self._save(folder / "initial")

    def _save(self, folder: Path) -> int:
        self.bank.save(0, folder, base_name=self.task.base_name, task_type=self.task.peft_task)
        return (folder / "adapter_model.safetensors").stat().st_size


def lora_spec(task: Task, config: StudyConfig, run: Run) -> AdapterSpec:
    """The adapter of one run of the grid."""
    targets = pattern(config.targets or task.targets)
    if run.rank is None or run.alpha is None:
        raise ValueError(f"{run.name} is not a LoRA run")
    return AdapterSpec(
        rank=run.rank,
        alpha=run.alpha,
        targets=targets,
        init=config.init,
        dropout=config.dropout,
        rslora=config.rslora,
        bias=config.bias,
        modules_to_save=task.heads,
    )


def pattern(targets: tuple[str, ...]) -> str | tuple[str, ...]:
    """Names as they are; "all-linear", or one entry that is more than a dotted name, as the expression it is."""
    alone = len(targets) == 1 and (targets[0] == ALL_LINEAR or not re.fullmatch(r"[\w.]+", targets[0]))
    return targets[0] if alone else targets


class FullTrained(Trained):
    """Every weight of the base is trained; the float32 update of each is the result."""

    def __init__(self, task: Task, config: StudyConfig, run: Run) -> None:
        self.task, self.run = task, run
        self.model = task.model(run.seed)
        self.model.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def updates(self) -> dict[str, Tensor]:
        """tuned − base of every weight in float32 on the CPU, matrices (out, in) by module path."""
        base = self.task.model(self.run.seed)
        found = {}
        seen: set[int] = set()
        for path, module in self.model.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                if id(weight) in seen:  # tied: its change is counted once, under its first name
                    continue
                seen.add(id(weight))
                start = base.get_parameter(f"{path}.{name}" if path else name)
                difference = weight.detach().cpu().float() - start.detach().float()
                if name == "weight" and difference.ndim >= 2:
                    # transformers' Conv1D stores (in, out); a convolution is flattened as adapters are.
                    transposed = layer_class(module) is Conv1DLayer
                    difference = difference.T if transposed else difference.flatten(1)
                    found[path] = difference
                else:
                    found[f"{path}.{name}" if path else name] = difference
        return found

    def save(self, folder: Path) -> int:
        path = folder / "update.safetensors"
        write_updates(path, self.updates())
        return path.stat().st_size


METHODS: dict[str, Callable[[Task, StudyConfig, Run], Trained]] = {"lora": LoraTrained, "full": FullTrained}
