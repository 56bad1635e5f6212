"""What an adapter of a study still does after ``rankscope resize``: its metric on the test split, before and after.

python benchmarks/resized.py brown lora-r64-lr0.0003-s0 lora-r16-lr0.001-s0
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rankscope.evidence.material import Material
from rankscope.lora import load
from rankscope.surgery.resize import resize
from rankscope.surgery.truncate import Budget, Energy, Rank, RankChoice
from rankscope.train.runs import Run
from rankscope.train.study import Study


def score(material: Material, run: Run, adapter: Path) -> float:
    """The metric of the run's base with this adapter."""
    model = material.copy_base(run)
    load(model, adapter)
    return material.score(model.to(material.device))


def resize_run(material: Material, run: Run) -> Iterator[tuple[str, str]]:
    """What was asked for, then parameters, retained energy, relative error and the metric, as printed."""
    adapter = material.study.path(run) / "adapter"
    infos = [material.study.store(run).info(name) for name in material.study.store(run)]
    parameters = sum(sum(info.shape) * (info.nominal_rank or 0) for info in infos)
    yield "as trained", f"{parameters:12}{1:10.4f}{0:8.4f}{score(material, run, adapter):16.4f}"
    for title, choice in choices(parameters).items():
        with TemporaryDirectory() as folder:
            done = resize(adapter, choice, Path(folder) / "small").total
            after = score(material, run, Path(folder) / "small")
        yield title, f"{done.parameters_after:12}{done.retained:10.4f}{done.relative_error:8.4f}{after:16.4f}"


def choices(parameters: int) -> dict[str, RankChoice]:
    return {
        "energy .95": Energy(0.95),
        "half the parameters": Budget(parameters // 2),
        "an eighth": Budget(parameters // 8),
        "rank 1": Rank(1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("runs", nargs="+", help="names of runs with an adapter")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    material = Material(Study(arguments.study), arguments.device)
    named = {record.run.name: record.run for record in material.study.records}
    print(f"{'run':26}{'resized to':22}{'parameters':>12}{'retained':>10}{'error':>8}{material.study.metric:>16}")
    for name in arguments.runs:
        for title, numbers in resize_run(material, named[name]):
            print(f"{name:26}{title:22}" + numbers, flush=True)


if __name__ == "__main__":
    main()
