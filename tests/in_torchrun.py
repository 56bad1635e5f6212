"""What a process of torchrun does for ``test_analysis_process_sharing``; the outcomes of all calls go to a file."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from makers import normal
from torch import distributed as dist

import rankscope
from rankscope.cli import main
from rankscope.errors import FormatError
from rankscope.updates import LowRank, Update

RANK = int(os.environ["RANK"])


def run_command(arguments: list[str]) -> list[Any]:
    """Exit code, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(arguments)
    except SystemExit as ended:
        return [ended.code, out.getvalue(), err.getvalue()]
    raise AssertionError("a command ends by leaving")


def layers(seed: int = 0) -> dict[str, Update]:
    return {f"layers.{i}.q": LowRank(normal(30 + i, 4, seed=seed + i), normal(4, 20, seed=9 + i)) for i in range(5)}


class Broken(Mapping[str, Update]):
    """A mapping that cannot make some of its layers."""

    def __init__(self, bad: Mapping[str, str]) -> None:
        self.updates, self.bad = layers(), bad

    def __getitem__(self, name: str) -> Update:
        if name in self.bad:
            raise FormatError(self.bad[name])
        return self.updates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)


def failing(call: Callable[[], object]) -> str:
    try:
        call()
    except rankscope.RankscopeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def whole_and_shared() -> tuple[bool, list[str]]:
    """Whether the shared result is that of one process, and the layers that this one computed."""
    seen: list[str] = []
    alone = rankscope.spectrum(layers())

    def track(names: list[str]) -> Iterator[str]:
        seen.extend(names)
        yield from names

    with rankscope.processes(), rankscope.processes():  # the inner one is the outer one
        return rankscope.spectrum(layers(), track=track) == alone, seen


def first_by_the_order_of_layers() -> str:
    bad = {"layers.3.q": "the fourth", "layers.1.q": "the second", "layers.4.q": "the fifth"}
    with rankscope.processes():
        return failing(lambda: rankscope.spectrum(Broken(bad)))


def caught_and_gone_on() -> int:
    """An error that is caught where it is raised ends nothing."""
    with rankscope.processes():
        failing(lambda: rankscope.spectrum(Broken({"layers.1.q": "bad"})))
        return len(rankscope.spectrum(layers()).layers)


def in_one_only() -> str:
    """A process that fails before it has anything to compute does not leave the other waiting."""

    def one_fails() -> None:
        with rankscope.processes():
            if RANK == 1:
                raise FormatError("only the second cannot read it")
            rankscope.spectrum(layers())

    return failing(one_fails)


def after_all_is_computed() -> str:
    def one_fails() -> None:
        with rankscope.processes():
            rankscope.spectrum(layers())
            if RANK == 1:
                raise FormatError("only the second has an end like this")

    return failing(one_fails)


def different() -> str:
    """Other ranks in one process: other updates, of which half a result would be nonsense."""
    mine = {name: LowRank(normal(9, 2 + RANK), normal(2 + RANK, 9)) for name in layers()}

    def differ() -> None:
        with rankscope.processes():
            rankscope.spectrum(mine)

    return failing(differ)


def in_a_thread() -> int:
    """What one process alone calls in a thread, it computes alone."""
    counts: list[int] = []
    with rankscope.processes():
        if RANK == 1:
            thread = threading.Thread(target=lambda: counts.append(len(rankscope.spectrum(layers()).layers)))
            thread.start()
            thread.join()
    return sum(counts)


def open_already() -> tuple[bool, float]:
    """A group of somebody else's is used and left open."""
    dist.init_process_group("gloo")
    for _ in range(2):
        with rankscope.processes():
            alike = rankscope.compare(layers(), layers(50)).layers
    total = torch.tensor(float(RANK + 1))
    dist.all_reduce(total)
    dist.destroy_process_group()
    return len(alike) == 5, total.item()


CALLS = (
    whole_and_shared,
    first_by_the_order_of_layers,
    caught_and_gone_on,
    in_one_only,
    after_all_is_computed,
    different,
    in_a_thread,
    open_already,
)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    outcomes = [run_command(arguments) for arguments in json.loads((folder / "commands.json").read_text())]
    calls = {call.__name__: call() for call in CALLS}
    (folder / f"{RANK}.json").write_text(json.dumps({"commands": outcomes, "calls": calls}))
