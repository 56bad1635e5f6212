"""The runs of a study: the grid of methods, ranks, rates and seeds, and what is recorded of each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
from torch import nn

from rankscope.errors import ConfigError, FormatError
from rankscope.formats.file_io import write_json
from rankscope.lora.targets import is_within
from rankscope.train.config import StudyConfig, parse_alpha
from rankscope.train.method_table import TrainingMethod, find_method
from rankscope.train.random_subspace import count_parameters_and_modules
from rankscope.train.target_roles import expand_targets, parameters_per_rank
from rankscope.train.task import Task

RUN_SCHEMA = "rankscope.run/1"
Status = Literal["done", "diverged", "stopped"]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One training: its method, and where it stands in the grid.

    ``rank``, ``alpha`` and ``targets`` are LoRA's; ``targets`` None is the task's own. ``dim`` is the number of trained
    numbers of a random subspace.

    Raises:
        ConfigError: the table of methods has none of this name.
    """

    method: str
    seed: int
    targets: str | None = None
    rank: int | None = None
    alpha: float | None = None
    dim: int | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        find_method(self.method)

    @property
    def name(self) -> str:
        """Folder name: unique in a study, readable, the same at every start."""
        targets = f"-{slug(self.targets)}" if self.targets is not None else ""
        rank = f"-r{self.rank}" if self.rank is not None else ""
        dim = f"-d{self.dim}" if self.dim is not None else ""
        lr = f"-lr{self.lr!r}" if self.lr is not None else ""
        return f"{self.method}{targets}{rank}{dim}{lr}-s{self.seed}"

    @property
    def label(self) -> str:
        """Its name in tables and plots, without learning rate and seed: ``base``, ``r = 8``, ``said d = 64``."""
        parts: list[str] = [self.method] if self.method != "lora" else []
        parts += [self.targets] if self.targets is not None else []
        parts += [f"r = {self.rank}"] if self.rank is not None else []
        parts += [f"d = {self.dim}"] if self.dim is not None else []
        return " ".join(parts)

    @property
    def is_lora(self) -> bool:
        return find_method(self.method).family == "lora"

    @property
    def is_subspace(self) -> bool:
        return find_method(self.method).family == "subspace"


def slug(targets: str) -> str:
    """Targets as part of a folder name; a hash keeps names apart that would otherwise become equal."""
    plain = re.sub(r"[^\w.+-]", "_", targets.replace(",", "+"))[:40]
    return (
        plain if plain == targets.replace(",", "+") else f"{plain}-{hashlib.sha256(targets.encode()).hexdigest()[:8]}"
    )


def plan_runs(config: StudyConfig, task: Task) -> list[Run]:
    """Every run of the study in the order they are trained: the untouched base, then seed by seed each method."""
    cells = [cell for name in config.methods for cell in _cells(config, task, find_method(name))]
    runs = [Run(method="base", seed=seed) for seed in config.seeds]
    for seed in config.seeds:
        for cell in cells:
            runs += [
                msgspec.structs.replace(cell, seed=seed, lr=lr)
                for lr in config.lrs or default_learning_rates(task, cell)
            ]
        full_lrs = (config.full_lrs or task.learning_rates(full=True)) if config.full else ()
        runs += [Run(method="full", seed=seed, lr=lr) for lr in full_lrs]
    return runs


def default_learning_rates(task: Task, run: Run) -> list[float]:
    """Learning rates to try with a method where the settings name none."""
    factor = find_method(run.method).rate_over_full
    if factor is None:
        return list(task.learning_rates(full=False))
    return [float(f"{factor * rate:.1g}") for rate in task.learning_rates(full=True)]


def _cells(config: StudyConfig, task: Task, method: TrainingMethod) -> list[Run]:
    """A method at each of its sets of targets and ranks, or dimensions, without a learning rate and with seed 0."""
    if method.family == "subspace":
        return [Run(method=method.name, seed=0, dim=dim) for dim in feasible_dims(config.dims, task, method)]
    if method.family != "lora":
        if not any(is_trained(method, task, name) for name, _ in task.model(0).named_parameters()):
            raise ConfigError(f"method {method.name!r}: this model has nothing of that kind to train")
        return [Run(method=method.name, seed=0)]
    cells = []
    for targets in config.targets or (None,):
        ranks = config.ranks if config.budget is None else (rank_for_budget(config.budget, task, targets),)
        cells += [
            Run(method=method.name, seed=0, targets=targets, rank=rank, alpha=choose_alpha(config, method, rank))
            for rank in ranks
        ]
    return cells


def choose_alpha(config: StudyConfig, method: TrainingMethod, rank: int) -> float:
    """α of a run: what the settings say, or the method's own, or 2r.

    rsLoRA has its own, 16: its scale α/√r is made for an α that does not grow with the rank.
    """
    if config.alpha is None and method.alpha is not None:
        return method.alpha
    value, multiplies = parse_alpha(config.alpha) or (2.0, True)
    return value * rank if multiplies else value


def rank_for_budget(budget: int, task: Task, targets: str | None) -> int:
    """The rank whose adapter on these targets comes nearest to ``budget`` parameters, at least 1 (LoRA's Table 5)."""
    model = task.model(0)
    chosen = targets if targets is not None else ",".join(task.targets)
    return max(1, round(budget / parameters_per_rank(model, expand_targets(model, chosen), task.heads)))


def feasible_dims(dims: Sequence[int], task: Task, method: TrainingMethod) -> list[int]:
    """The dimensions that a random subspace of the base can have; a layered one spends a number on each layer.

    Raises:
        ConfigError: none of them.
    """
    model = task.model(0)
    count, layers = count_parameters_and_modules(model, base_parameter_names(model, task))
    taken = layers if method.layered else 0
    feasible = [dim for dim in dims if taken < dim <= count]
    if not feasible:
        raise ConfigError(
            f"dims = {','.join(map(str, dims))}: {method.name} needs some from {taken + 1} to {count} here"
        )
    return feasible


def base_parameter_names(model: nn.Module, task: Task) -> list[str]:
    """The parameters of the base itself, without its new heads, which every method trains in full."""
    return [name for name, _ in model.named_parameters() if not is_in_head(task, name)]


def is_trained(method: TrainingMethod, task: Task, name: str) -> bool:
    """Whether a method that trains weights of the base itself trains the parameter of this name."""
    return method.trains(name) or is_in_head(task, name)


def is_in_head(task: Task, name: str) -> bool:
    return any(is_within(name, head) for head in task.heads)


class RunCost(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of a run. ``parameters`` are the base's; bytes are of what is trained and of the saved result.

    ``peak_memory`` is that of the process on a CPU (None where the system does not tell it)
    and of the allocator on a GPU. ``together`` runs were trained in one pass: they share the peak,
    and each has its share of the time.
    """

    parameters: int
    trainable: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    peak_memory: int | None
    seconds: float
    seconds_per_step: float
    together: int = 1


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``run.json``: a run that has ended: done, with a loss that is not finite, or stopped as hopeless.

    ``metrics`` holds those of the validation and the test split after the last step, ``before`` those
    of the same model at step 0.
    """

    run: Run
    status: Status
    steps: int
    metrics: dict[str, dict[str, float]] = {}
    before: dict[str, dict[str, float]] = {}
    cost: RunCost | None = None
    schema: str = RUN_SCHEMA

    def write(self, folder: Path) -> None:
        flat = msgspec.to_builtins(self)
        write_json(folder / "run.json", {"schema": flat.pop("schema"), "name": self.run.name, **flat})

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """The record in a run's folder.

        Raises:
            FormatError: missing, or not a run.json of a schema known here.
        """
        path = folder / "run.json"
        try:
            record = msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError as error:
            raise FormatError(f"{path}: no such file") from error
        except (OSError, msgspec.DecodeError, ConfigError) as error:
            raise FormatError(f"{path}: not a record of a run ({error})") from error
        if record.schema != RUN_SCHEMA:
            raise FormatError(f"{path}: its schema is {record.schema!r}, not {RUN_SCHEMA!r}")
        return record
