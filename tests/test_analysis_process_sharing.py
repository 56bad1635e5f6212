"""An analysis shared out over the processes of torchrun: the results of one, errors once, and none left waiting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import linear, write_adapter, write_checkpoint
from command_line import run
from makers import normal

from rankscope.analysis.process_sharing import divide_by_cost
from rankscope.analysis.sources import Source
from rankscope.cli import torchrun as cli_processes
from rankscope.formats import abstract_store as interface
from rankscope.formats.store import write_updates
from rankscope.updates import LowRank

HERE = Path(__file__).parent
LAUNCHER = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SIZES = [(60, 40), (30, 50), (200, 90), (60, 40), (25, 25)]


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *LAUNCHER, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def adapter(folder: Path, seed: int = 0, broken: Sequence[int] = ()) -> Path:
    tensors = {}
    for i, (out, into) in enumerate(SIZES):
        tensors |= linear(f"layers.{i}.q", out, into, 4, seed + i)
        if i in broken:
            tensors[f"base_model.model.layers.{i}.q.lora_B.weight"][0, 0] = float("nan")
    return write_adapter(folder, tensors, r=4, lora_alpha=8)


def run_folder(folder: Path, seed: int) -> Path:
    """A run of a study, with the factors it began with: a comparison of two makes another one of those."""
    adapter(folder / "initial", 7)
    (folder / "run.json").write_text("{}")
    return adapter(folder / "adapter", seed)


def checkpoints(folder: Path) -> tuple[Path, Path]:
    """A pair of which one layer is large enough for a sketch."""
    shapes = {"layers.0.q": (700, 640), "layers.1.q": (40, 60), "layers.2.q": (90, 30)}
    base = {f"{name}.weight": normal(*shape, seed=3).float() for name, shape in shapes.items()}
    tuned = {name: weight + 0.01 * normal(*weight.shape, seed=5).float() for name, weight in base.items()}
    return (
        write_checkpoint(folder / "tuned" / "model.safetensors", tuned).parent,
        write_checkpoint(folder / "base" / "model.safetensors", base).parent,
    )


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("processes")
    one, two, three = (adapter(folder / name, seed) for name, seed in (("one", 0), ("two", 100), ("three", 200)))
    runs = [run_folder(folder / f"run{seed}", seed) for seed in (300, 400)]
    tuned, base = checkpoints(folder)
    found = {
        "spectrum": ["spectrum", one, "--json"],
        "several spectra": ["spectrum", one, two, "--csv"],
        "checkpoint": ["spectrum", tuned, "--base", base, "--json"],
        "sketch": ["spectrum", tuned, "--base", base, "--sketch", 1, "--json"],
        "two": ["compare", one, two, "--json"],
        "renamed": ["compare", one, two, three, "--rename", "layers=blocks", "--workers", 2, "--csv"],
        "runs": ["compare", *runs, "--json"],
        "three": ["compare", one, two, three, "--json"],
        "three runs": ["compare", *runs, runs[0], "--json"],
        "of A": ["compare", one, two, three, "--of", "A"],
        "full and thin": ["compare", tuned, tuned, "--base", base, "--layers", "layers.1", "--csv"],
        "bad layers": ["spectrum", adapter(folder / "bad", broken=(1, 2, 3)), "--json"],
        "no file": ["spectrum", folder / "absent"],
        "nothing fits": ["compare", one, two, "--layers", "nowhere"],
        "usage": ["spectrum", one, "--json", "--csv"],
        "plot": ["spectrum", one, "--quiet", "--report", folder / "page.html"],
        "alone": ["resize", one, "--rank", 2, "-o", folder / "smaller"],
        "unknown": ["speculate"],
    }
    return {name: [str(part) for part in parts] for name, parts in found.items()}


@pytest.fixture(scope="module")
def heard(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes made of the commands, and of the calls."""
    folder = tmp_path_factory.mktemp("heard")
    (folder / "commands.json").write_text(json.dumps(list(commands.values())))
    process = start(HERE / "in_torchrun.py", folder)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_the_first_says_what_one_process_says_and_the_other_nothing(
    commands: dict[str, list[str]], heard: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    for (name, arguments), first, second in zip(commands.items(), *(one["commands"] for one in heard), strict=True):
        if name == "alone":
            assert first[0] == 0
            continue
        assert first == list(run(capsys, *arguments)), name
        assert second == [0, "", ""], name
    codes = dict(zip(commands, (code for code, _, _ in heard[0]["commands"]), strict=True))
    failed = {name: code for name, code in codes.items() if code}
    assert failed == {"bad layers": 1, "no file": 1, "nothing fits": 1, "usage": 2, "unknown": 2}


def test_what_is_not_shared_is_done_by_the_first_alone(
    commands: dict[str, list[str]], heard: list[dict[str, Any]]
) -> None:
    first, second = (one["commands"][list(commands).index("alone")] for one in heard)
    assert second == [0, "", ""]
    assert "layers.0.q" in first[1]
    assert (Path(commands["alone"][-1]) / "adapter_config.json").is_file()


def test_calls_within_processes(heard: list[dict[str, Any]]) -> None:
    one, two = (process["calls"] for process in heard)
    assert (one["whole_and_shared"][0], two["whole_and_shared"][0]) == (True, True)
    computed = one["whole_and_shared"][1], two["whole_and_shared"][1]
    assert sorted(computed[0] + computed[1]) == [f"layers.{i}.q" for i in range(5)]
    assert {len(names) for names in computed} == {2, 3}
    expected = {
        "first_by_the_order_of_layers": "FormatError: updates: layer layers.1.q: the second",
        "caught_and_gone_on": 5,
        "in_one_only": "FormatError: only the second cannot read it",
        "after_all_is_computed": "FormatError: only the second has an end like this",
        "different": "ConfigError: the processes differ in what they analyse; give all the same files and settings",
        "open_already": [True, 3.0],
    }
    for name, outcome in expected.items():
        assert (one[name], two[name]) == (outcome, outcome), name
    assert (one["in_a_thread"], two["in_a_thread"]) == (0, 5)


def test_a_bad_layer_is_told_once_and_ends_all(tmp_path: Path) -> None:
    process = start("-m", "rankscope", "spectrum", adapter(tmp_path, broken=(1, 2)))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    assert [line for line in err.splitlines() if line.startswith("rankscope:")] == [
        f"rankscope: {tmp_path}: layer layers.1.q: B (30, 4) holds 1 values that are NaN or infinite"
    ]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_killed_ends_the_other(tmp_path: Path, lost: int) -> None:
    """The one that is left waits for results that never come: its share is the smaller one."""
    huge = {f"layers.{i}": normal(1800, 1800, seed=i).float() for i in range(6)}
    write_updates(tmp_path / "u.safetensors", huge)
    process = start("-m", "rankscope", "spectrum", tmp_path / "u.safetensors")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    reads: dict[int, str] = {}
    while len(reads) < 2 and process.poll() is None:  # until both have the file in hand
        time.sleep(0.02)
        reads = {pid: rank for pid in map(int, children.read_text().split()) if (rank := reading(pid)) is not None}
    os.kill(next(pid for pid, rank in reads.items() if rank == str(lost)), signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert time.monotonic() - began < 40
    told = [line for line in err.splitlines() if line.startswith("rankscope:")]
    assert len(told) <= 1
    if lost == 1:
        assert "another" in told[0]
        assert told[0].endswith("start the command again")


def reading(pid: int) -> str | None:
    """The rank of a process that has the file of updates open or mapped; None of any other."""
    try:
        if "u.safetensors" not in (Path(f"/proc/{pid}/maps").read_text()):
            return None
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((text[5:].decode() for text in variables if text.startswith(b"RANK=")), None)


# By cost


def test_the_dearest_go_first_each_to_whom_has_least() -> None:
    assert divide_by_cost([1, 9, 2, 5, 5, 1], 2) == [[1, 2, 5], [0, 3, 4]]
    assert divide_by_cost([3, 3, 3, 3], 3) == [[0, 3], [1], [2]]
    assert divide_by_cost([], 2) == [[], []]
    assert divide_by_cost([4], 3) == [[0], [], []]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_item_has_one_process_and_none_much_more_than_its_part(size: int) -> None:
    costs = normal(101, seed=size).exp().tolist()
    found = divide_by_cost(costs, size)
    assert sorted(place for places in found for place in places) == list(range(101))
    assert all(places == sorted(places) for places in found)
    loads = [sum(costs[place] for place in places) for places in found]
    assert max(loads) <= max([4 / 3 * sum(costs) / size, *costs])


def test_what_a_layer_costs() -> None:
    thin, wide = LowRank(normal(300, 4), normal(4, 200)), LowRank(normal(300, 8), normal(8, 200))
    source = Source.of({"thin": thin, "wide": wide})
    assert (source.cost("thin"), source.cost("wide")) == (500 * 16, 500 * 64)


def test_what_a_full_layer_costs(tmp_path: Path) -> None:
    write_updates(tmp_path / "u.safetensors", {"a": torch.ones(1000, 700), "b": torch.ones(40, 30)})
    source = Source.of(tmp_path / "u.safetensors")
    assert (source.cost("a"), source.cost("b")) == (1000 * 700 * 700, 40 * 30 * 30)
    assert (source.cost("a", sketch=1), source.cost("b", sketch=1)) == (1000 * 700 * 160, 40 * 30 * 30)


# Where each computes


@pytest.mark.parametrize(
    ("asked", "found"), [("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), (torch.device("cuda"), "cuda:3")]
)
def test_a_gpu_for_each_process(asked: Any, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface.torch, "empty", lambda *size, device: None)
    assert str(interface.check_device(asked)) == ("cuda" if str(asked) == "cuda" else found)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(interface.check_device(asked)) == found


def test_the_commands_that_are_shared() -> None:
    from rankscope.cli import COMMANDS

    assert set(cli_processes.SHARED_COMMANDS) < set(COMMANDS)
