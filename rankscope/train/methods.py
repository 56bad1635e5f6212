"""What a run trains and what it saves: LoRA in its variants, parts of the base, or all of it.

A method is a small declaration on one loop: which parameters the optimizer moves, at what multiple of the rate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from rankscope.formats.store import write_updates
from rankscope.lora import AdapterSpec, Bank
from rankscope.train.config import StudyConfig, make_generator
from rankscope.train.costs import total_bytes
from rankscope.train.method_table import TrainingMethod, find_method
from rankscope.train.process_group import SINGLE_PROCESS, TrainingProcesses, gather_tensor
from rankscope.train.random_subspace import MODULE_NAME, RandomSubspace
from rankscope.train.runs import Run, base_parameter_names, is_trained
from rankscope.train.target_roles import expand_targets
from rankscope.train.task import Task
from rankscope.train.weights import to_matrix


class TrainableModel(ABC):
    """A model made ready for some runs: one, or several in one pass, run i taking chunk i of a joined batch."""

    model: nn.Module
    base_size: int
    """Numbers that the base has."""
    team: TrainingProcesses = SINGLE_PROCESS

    @abstractmethod
    def __init__(self, task: Task, config: StudyConfig, runs: Sequence[Run]) -> None: ...

    @abstractmethod
    def parameters(self, i: int) -> dict[str, Tensor]:
        """What the optimizer of run i moves, by name, in a fixed order; the model is where it is trained."""

    def learning_rate_factor(self, i: int, name: str) -> float:
        """Multiple of the run's rate that a parameter is trained at."""
        return 1.0

    def share_gradients(self) -> None:  # noqa: B027 (only stacked parameters have to share)
        """After a backward pass, give each parameter of ``parameters`` its gradient."""

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def seed_dropout(self, seeds: Sequence[int]) -> None:  # noqa: B027 (only LoRA's dropout draws)
        """Before a pass: what run i draws in it depends on ``seeds[i]`` alone."""

    def train(self) -> None:
        """All runs side by side, ready for a training step."""
        self.model.train()

    def select(self, i: int) -> None:  # noqa: B027 (with one run there is nothing to choose)
        """The model computes run i alone."""

    def trim(self, i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the shapes of ``parameters`` in shapes that do not depend on the other runs."""
        return dict(tensors)

    def pad(self, i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of ``trim``."""
        return dict(tensors)

    @abstractmethod
    def save(self, i: int, folder: Path) -> int:
        """Write the result of run i into its folder; the number of its bytes."""

    def save_initial(self, i: int, folder: Path) -> None:  # noqa: B027 (most methods start from the base alone)
        """Write what run i starts from, where it is not the base."""


class TrainableAdapters(TrainableModel):
    """Adapters on one frozen base, one a run, and for each run its own heads that are new to the base."""

    def __init__(self, task: Task, config: StudyConfig, runs: Sequence[Run]) -> None:
        self.task, self.config, self.runs = task, config, runs
        self.model = task.model(runs[0].seed)
        self.base_size = sum(weight.numel() for weight in self.model.parameters())
        specs = [make_lora_spec(task, config, run, self.model) for run in runs]
        self.bank = Bank.attach(self.model, specs, [make_generator(*init_seed_parts(run)) for run in runs])
        self._start_heads()

    @torch.no_grad()
    def _start_heads(self) -> None:
        """Heads of other seeds than the first run's, which the model came with."""
        for i, run in enumerate(self.runs):
            if run.seed == self.runs[0].seed or not self.bank.heads:
                continue
            model = self.task.model(run.seed)
            for path in self.bank.heads:
                self.bank.head(i, path).load_state_dict(model.get_submodule(path).state_dict())

    def parameters(self, i: int) -> dict[str, Tensor]:
        variant = find_method(self.runs[i].method).variant
        parameters = self.bank.parameters(i)
        if variant.trains_a:
            return parameters
        return {name: p for name, p in parameters.items() if not self._is_factor(name, "A")}

    def learning_rate_factor(self, i: int, name: str) -> float:
        plus = find_method(self.runs[i].method).variant.plus and self._is_factor(name, "B")
        return self.config.lora_plus_ratio if plus else 1.0

    def _is_factor(self, name: str, which: str) -> bool:
        path, _, last = name.rpartition(".")
        return last == which and path in self.bank.layers

    def share_gradients(self) -> None:
        self.bank.share_gradients()

    def zero_grad(self) -> None:
        self.bank.zero_grad()

    def seed_dropout(self, seeds: Sequence[int]) -> None:
        self.bank.route.seeds = seeds

    def train(self) -> None:
        self.model.train()
        self.bank.select(0 if len(self.runs) == 1 else None)

    def select(self, i: int) -> None:
        self.bank.select(i)

    def trim(self, i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.bank.trim(i, tensors)

    def pad(self, i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.bank.pad(i, tensors)

    def save(self, i: int, folder: Path) -> int:
        target = folder / "adapter"
        self.bank.save(i, target, base_name=self.task.base_name, task_type=self.task.peft_task)
        return (target / "adapter_model.safetensors").stat().st_size

    def save_initial(self, i: int, folder: Path) -> None:
        self.bank.save_initial(i, folder / "initial", base_name=self.task.base_name, task_type=self.task.peft_task)


def init_seed_parts(run: Run) -> tuple[object, ...]:
    """What the initial factors of a run are drawn from: the same at each of its rates.

    Each rank draws its own: from one seed, A at rank 64 would begin with A at rank 8. So does each method and each
    set of targets, or a small set's first matrix would be a large one's.
    """
    others = [part for part in (run.method if run.method != "lora" else None, run.targets) if part is not None]
    return (run.seed, "init", run.rank, *others)


def make_lora_spec(task: Task, config: StudyConfig, run: Run, model: nn.Module) -> AdapterSpec:
    """The adapter of one run of the grid."""
    if run.rank is None or run.alpha is None:
        raise ValueError(f"{run.name} is not a LoRA run")
    variant = find_method(run.method).variant
    targets = run.targets if run.targets is not None else ",".join(task.targets)
    return AdapterSpec(
        rank=run.rank,
        alpha=run.alpha,
        targets=expand_targets(model, targets),
        init=variant.init or config.init,  # type: ignore[arg-type]
        dropout=config.dropout,
        rslora=variant.rslora,
        bias=config.bias,
        modules_to_save=task.heads,
    )


class TrainableWeights(TrainableModel):
    """Weights of the base itself: all, its biases, or its head. The float32 update of each is the result."""

    def __init__(self, task: Task, config: StudyConfig, runs: Sequence[Run]) -> None:
        (run,) = runs
        self.task, self.run = task, run
        self.model = task.model(run.seed)
        self.base_size = sum(weight.numel() for weight in self.model.parameters())
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(is_trained(find_method(run.method), task, name))

    def parameters(self, i: int) -> dict[str, Tensor]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def updates(self) -> dict[str, Tensor]:
        """tuned − base of every trained weight in float32 on the CPU, matrices (out, in) by module path."""
        base = dict(self.task.model(self.run.seed).named_parameters())
        trained = {
            name: gather_tensor(weight.detach()).cpu() for name, weight in self.parameters(0).items() if name in base
        }
        return changes_by_layer(
            self.model, {name: w.float() - base[name].detach().float() for name, w in trained.items()}
        )

    def save(self, i: int, folder: Path) -> int:
        path = folder / "update.safetensors"
        updates = self.updates()
        if self.team.is_main_process:
            write_updates(path, updates)
        return total_bytes(updates.values())


def changes_by_layer(model: nn.Module, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Changes of parameters as a file of updates names them: matrices (out, in) by module path, the rest as they are.

    A tied weight has one name here, its first.
    """
    layers: dict[str, Tensor] = {}
    for name, change in changes.items():
        path, _, last = name.rpartition(".")
        matrix = last == "weight" and change.ndim >= 2
        layers[path if matrix else name] = to_matrix(model.get_submodule(path), change) if matrix else change
    return layers


class TrainableSubspace(TrainableWeights):
    """A random subspace of all weights of the base, new heads whole; P·z is saved as the update of each weight."""

    def __init__(self, task: Task, config: StudyConfig, runs: Sequence[Run]) -> None:
        super().__init__(task, config, runs)
        run = self.run
        if run.dim is None:
            raise ValueError(f"{run.name} is not a run in a subspace")
        # As with LoRA's initial factors the rates of a run share one subspace, and nothing else does.
        source = make_generator(run.seed, run.method, run.dim)
        chosen = base_parameter_names(self.model, task)
        self.subspace = RandomSubspace(self.model, chosen, run.dim, source, layered=find_method(run.method).layered)

    def learning_rate_factor(self, i: int, name: str) -> float:
        return self.subspace.learning_rate_factor if name == f"{MODULE_NAME}.z" else 1.0

    @torch.no_grad()
    def updates(self) -> dict[str, Tensor]:
        changes = {name: change.cpu() for name, change in self.subspace.changes().items()}
        return {**changes_by_layer(self.model, changes), **super().updates()}


def load_trainer(method: TrainingMethod) -> type[TrainableModel]:
    """The class that trains runs of a method."""
    module, _, name = method.trainer.partition(":")
    trainer: type[TrainableModel] = getattr(import_module(module), name)
    return trainer


def make_trainable(task: Task, config: StudyConfig, runs: Sequence[Run]) -> TrainableModel:
    """The base made ready for these runs, which are of one family: any number with adapters, else one."""
    return load_trainer(find_method(runs[0].method))(task, config, runs)
