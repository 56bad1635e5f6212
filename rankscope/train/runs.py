"""The runs of a study: the grid of methods, ranks, rates and seeds, and what is recorded of each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from rankscope.errors import FormatError
from rankscope.formats.files import write_json
from rankscope.train.config import StudyConfig
from rankscope.train.tasks import Task

SCHEMA = "rankscope.run/1"
Method = Literal["base", "lora", "full"]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One training: its method, and where it stands in the grid. ``rank`` and ``alpha`` are LoRA's."""

    method: Method
    seed: int
    rank: int | None = None
    alpha: float | None = None
    lr: float | None = None

    @property
    def name(self) -> str:
        """Folder name: unique in a study, readable, the same at every start."""
        rank = f"-r{self.rank}" if self.rank is not None else ""
        lr = f"-lr{self.lr!r}" if self.lr is not None else ""
        return f"{self.method}{rank}{lr}-s{self.seed}"

    @property
    def label(self) -> str:
        """What tables and plots call the method: ``base``, ``full`` or ``r = 8``."""
        return f"r = {self.rank}" if self.method == "lora" else self.method


def grid(config: StudyConfig, task: Task) -> list[Run]:
    """Every run of the study in the order they are trained: the untouched base, LoRA by rank, full fine-tuning."""
    full_lrs = (config.full_lrs or (task.rate(None),)) if config.full else ()
    runs = [Run(method="base", seed=seed) for seed in config.seeds]
    for seed in config.seeds:
        for rank in config.ranks:
            alpha = config.alpha if config.alpha is not None else 2.0 * rank
            runs += [
                Run(method="lora", seed=seed, rank=rank, alpha=alpha, lr=lr) for lr in config.lrs or (task.rate(rank),)
            ]
        runs += [Run(method="full", seed=seed, lr=lr) for lr in full_lrs]
    return runs


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What a run took. Bytes are of what is trained, besides ``parameters`` (all) and the saved result.

    ``peak_memory`` is that of the process on a CPU (None where the system does not tell it)
    and of the allocator on a GPU.
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


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """``run.json``: a run that has ended, well or not.

    ``metrics`` holds those of the validation and the test split after the last step, ``before`` those
    of the same model at step 0.
    """

    run: Run
    status: Literal["done", "diverged"]
    steps: int
    metrics: dict[str, dict[str, float]] = {}
    before: dict[str, dict[str, float]] = {}
    cost: Cost | None = None
    schema: str = SCHEMA

    def write(self, folder: Path) -> None:
        flat = msgspec.to_builtins(self)
        write_json(folder / "run.json", {"schema": flat.pop("schema"), "name": self.run.name, **flat})

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The record in a run's folder.

        Raises:
            FormatError: missing, or not a run.json of a schema known here.
        """
        path = folder / "run.json"
        try:
            record = msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError as error:
            raise FormatError(f"{path}: no such file") from error
        except (OSError, msgspec.DecodeError) as error:
            raise FormatError(f"{path}: not a record of a run ({error})") from error
        if record.schema != SCHEMA:
            raise FormatError(f"{path}: its schema is {record.schema!r}, not {SCHEMA!r}")
        return record
