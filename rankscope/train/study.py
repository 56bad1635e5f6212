"""A study: the folder that a sweep leaves, made, taken up again, and read."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch

from rankscope.errors import ConfigError, FormatError, TrainingError, located
from rankscope.formats.files import read_json, write_json
from rankscope.formats.interface import Store
from rankscope.formats.store import open as open_store
from rankscope.train.config import RESUMABLE, StudyConfig, make_config, resolve_device
from rankscope.train.loop import STATE, Listener, Loop, evaluate_base
from rankscope.train.runs import Record, Run, grid
from rankscope.train.tasks import Task, make_task

SCHEMA = "rankscope.study/1"
LOCK = ".lock"


class Study:
    """A study on disk: its settings and the runs that have ended.

    Raises:
        FormatError: the folder is not a study, or a file of it is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.description = read_json(self.folder / "study.json")
        if self.description.get("schema") != SCHEMA:
            found = self.description.get("schema")
            raise FormatError(f"{self.folder / 'study.json'}: its schema is {found!r}, not {SCHEMA!r}")
        for key in ("config", "metric", "higher_is_better"):
            if key not in self.description:
                raise FormatError(f"{self.folder / 'study.json'}: holds no {key!r}; is this a study of rankscope?")
        self.config = make_config(self.description["config"], str(self.folder / "study.json"))
        self.metric: str = self.description["metric"]
        self.higher_is_better: bool = self.description["higher_is_better"]
        folders = sorted(path.parent for path in self.folder.glob("runs/*/run.json"))
        self.records = sorted((self._read(path) for path in folders), key=_order)

    def _read(self, folder: Path) -> Record:
        record = Record.read(folder)
        if folder.name != record.run.name:
            raise FormatError(f"{folder}: holds the run {record.run.name}; give the folder that name back")
        if record.status == "done" and not all(
            self.metric in record.metrics.get(s, {}) for s in ("validation", "test")
        ):
            raise FormatError(
                f"{folder / 'run.json'}: lacks {self.metric} of a split; delete the folder to run it again"
            )
        return record

    def score(self, record: Record, split: str = "test") -> float:
        """The study's metric of a run that is done."""
        return record.metrics[split][self.metric]

    def done(self) -> list[Record]:
        return [record for record in self.records if record.status == "done"]

    def best(self) -> list[Record]:
        """Of each method, rank and seed the run at its best rate, chosen on the validation split."""
        chosen: dict[tuple[str, int], Record] = {}
        for record in self.done():
            key = (record.run.label, record.run.seed)
            if key not in chosen or self._better(record, chosen[key]):
                chosen[key] = record
        return list(chosen.values())

    def _better(self, a: Record, b: Record) -> bool:
        difference = self.score(a, "validation") - self.score(b, "validation")
        return difference > 0 if self.higher_is_better else difference < 0

    def path(self, run: Run) -> Path:
        return self.folder / "runs" / run.name

    def store(self, run: Run) -> Store:
        """The updates that a run learned: its adapter, or the update of full fine-tuning."""
        return open_store(self.path(run))

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{escape(r.run.name)}</td><td>{r.status}</td>"
            f"<td>{format(self.score(r), '.4f') if r.status == 'done' else ''}</td></tr>"
            for r in self.records
        )
        head = f"<tr><th>run</th><th>status</th><th>test {escape(self.metric)}</th></tr>"
        return f"<p><b>{escape(repr(self))}</b></p><table><thead>{head}</thead><tbody>{cells}</tbody></table>"

    def __repr__(self) -> str:
        return f"Study({str(self.folder)!r}, {len(self.records)} runs, {self.metric})"


def _order(record: Record) -> tuple[int, int, float, int]:
    run = record.run
    return ("base", "lora", "full").index(run.method), run.rank or 0, run.lr or 0.0, run.seed


def run_study(
    config: StudyConfig,
    folder: Path | str,
    listener: Listener | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Study:
    """Train every run of the study that has not ended yet.

    Args:
        folder: a new folder, or that of the same study: it is taken up where it was left.
        listener: is told of each step, evaluation and end; nobody is where it is None.
        stop: asked before each step; where it says yes the state is saved and ``InterruptedTrainingError`` raised.

    Raises:
        ConfigError: the folder holds a study with other settings, or something else.
        TrainingError: another process is at work on this study.
        InterruptedTrainingError: ``stop`` said so.
    """
    folder = Path(folder)
    device = resolve_device(config.device)
    task = make_task(config)
    _check_free(folder)
    with locked(folder):
        _sweep_leftovers(folder)
        _describe(folder, config, task, device)
        for run in grid(config, task):
            target = folder / "runs" / run.name
            if (target / "run.json").exists():
                continue
            with located(run.name), memory_errors():
                if run.method == "base":
                    evaluate_base(task, config, run, target, device)
                else:
                    base = Record.read(folder / "runs" / Run(method="base", seed=run.seed).name)
                    Loop(task, config, run, target, base.metrics, device, listener or Silent()).train(stop)
    return Study(folder)


def _check_free(folder: Path) -> None:
    """Refuse a folder that holds something else than a study, before anything is written to it."""
    if (folder / "study.json").exists() or not folder.exists():
        return
    if not folder.is_dir() or any(not path.name.startswith((LOCK, ".study.json.")) for path in folder.iterdir()):
        raise ConfigError(f"{folder} exists and is not a study; choose another folder with -o")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn what torch and Python raise when memory runs out into one TrainingError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The CPU's allocator raises a bare RuntimeError, CUDA's a torch.OutOfMemoryError, which is one too.
        text = str(error)
        if (
            isinstance(error, MemoryError | torch.OutOfMemoryError)
            or "allocate memory" in text
            or "enough memory" in text
        ):
            raise TrainingError("out of memory; try a smaller --batch with more --accumulate") from error
        raise


def _describe(folder: Path, config: StudyConfig, task: Task, device: torch.device) -> None:
    """Write study.json, or check that the one there is of the same study."""
    path = folder / "study.json"
    fingerprint = task.fingerprint()
    made_by = {
        "versions": versions(),
        "machine": machine(device),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    earlier: list[Any] = []
    if path.exists():
        study = Study(folder)
        _check_same(study, config, fingerprint)
        before = {key: study.description.get(key) for key in made_by}
        earlier = list(study.description.get("earlier", [])) + ([before] if before != made_by else [])
    description = {
        "schema": SCHEMA,
        "config": msgspec.to_builtins(config),
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "fingerprint": fingerprint,
        **made_by,
        "earlier": earlier,
    }
    write_json(path, description)


def _check_same(study: Study, config: StudyConfig, fingerprint: Mapping[str, str]) -> None:
    for key in msgspec.structs.asdict(config):
        old, new = getattr(study.config, key), getattr(config, key)
        if key not in RESUMABLE and old != new:
            raise ConfigError(
                f"{study.folder} is a study with {key} = {old!r}, not {new!r}; "
                "give it the same settings to go on with it, or choose another folder with -o"
            )
    begun = study.description.get("fingerprint", {})
    for key in {**begun, **fingerprint}:
        if fingerprint.get(key) != begun.get(key):
            raise ConfigError(
                f"{study.folder} was begun with another {key} ({begun.get(key)}, now {fingerprint.get(key)}); "
                "its runs could not be compared: choose another folder with -o"
            )


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    return {name: version(name) for name in ("rankscope", "torch", "numpy")} | {"python": platform.python_version()}


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader must know to judge times."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold it for this process; the lock goes with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{folder}: cannot be made ({error.strerror or error})") from error
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks, the second process is not noticed
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(f"{folder}: another process is training this study; wait for it or stop it") from error
        yield


def _sweep_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing; the names are ours alone (see ``write_atomic``)."""
    for path in (*folder.glob("runs/**/.*.tmp"), *folder.glob(".study.json.*.tmp")):
        path.unlink(missing_ok=True)
    for path in folder.glob(f"runs/*/{STATE}"):
        if (path.parent / "run.json").exists():
            path.unlink(missing_ok=True)


class Silent:
    """A listener that says nothing."""

    def started(self, run: Run, steps: int, at: int) -> None: ...

    def stepped(self, run: Run, step: int) -> None: ...

    def evaluated(self, run: Run, step: int, metrics: Mapping[str, float]) -> None: ...

    def ended(self, record: Record) -> None: ...
