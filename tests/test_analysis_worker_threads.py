"""Layers shared out over threads: the same numbers in the same order, and torch's threads as they were."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from makers import normal, planted_dense

from rankscope.analysis import layer_comparison as pairs
from rankscope.analysis import worker_threads as module
from rankscope.analysis.comparison import compare
from rankscope.analysis.layer_spectra import spectrum
from rankscope.analysis.sources import Source
from rankscope.analysis.worker_threads import Job, compute_items, worker_count
from rankscope.errors import ConfigError, FormatError, NonFiniteError
from rankscope.formats.file_io import write_json, write_tensors
from rankscope.formats.store import write_updates
from rankscope.updates import LowRank, Update

CPU = torch.device("cpu")
SIZES = [(300, 200), (120, 300), (300, 200), (40, 60), (300, 200), (120, 300)]


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 2


def layers(seed: int, r: int = 24) -> dict[str, Update]:
    return {
        f"layers.{i}.q": LowRank(normal(out, r, seed=seed + i), normal(r, into, seed=seed + i + 50), 0.5)
        for i, (out, into) in enumerate(SIZES)
    }


@pytest.mark.parametrize("count", [2, 3, 9])
def test_the_same_to_the_bit_however_many_workers(count: int) -> None:
    a, b = layers(0), layers(100)
    assert spectrum(a, workers=count) == spectrum(a, workers=1)
    one, many = (compare(a, b, workers=n).to_json() for n in (1, count))
    assert one == many
    assert [layer["name"] for layer in many["layers"]] == list(a)


def adapter(folder: Path, broken: Sequence[str] = ()) -> Path:
    tensors = {}
    for name, update in layers(0).items():
        assert isinstance(update, LowRank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.A.bfloat16()
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.B.bfloat16()
    for name in broken:
        tensors[f"base_model.model.{name}.lora_B.weight"][0, 0] = math.nan
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 24, "lora_alpha": 24})
    return folder


def test_files_are_read_by_several_threads(tmp_path: Path) -> None:
    adapter(tmp_path)
    assert spectrum(tmp_path, workers=4) == spectrum(tmp_path, workers=1)


def test_the_first_bad_layer_is_named(tmp_path: Path) -> None:
    adapter(tmp_path, ["layers.3.q", "layers.1.q"])
    for count in (1, 3):
        with pytest.raises(NonFiniteError, match=r"layers\.1\.q"):
            spectrum(tmp_path, workers=count)


computed: list[Any] = []


def collect(items: Sequence[Any], alone: set[Any], workers: int, track: Any = iter) -> list[tuple[Any, int, bool]]:
    """Item, torch's threads, and whether in the main thread, where each was computed."""

    def compute(item: Any, updates: Sequence[Update]) -> tuple[Any, int, bool]:
        if item == "bad":
            raise ValueError("bad")
        if isinstance(item, int) and item >= 10:
            time.sleep(0.002)
        computed.append(item)
        return item, torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    job = Job[Any, tuple[Any, int, bool]](lambda item: None if item in alone else 0, lambda item: [], compute)
    return compute_items(items, job, CPU, workers, track)


def test_thin_layers_have_one_thread_each_and_full_ones_all() -> None:
    found = collect([1, 2, 3, 4, 5, 6], {3, 4}, 2)
    assert found == [(1, 1, False), (2, 1, False), (3, 2, True), (4, 2, True), (5, 1, False), (6, 1, False)]
    assert collect([1, 2, 3], {2}, 1) == [(1, 1, True), (2, 2, True), (3, 1, True)]


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_comes_in_its_turn_and_leaves_nothing_behind(count: int) -> None:
    seen: list[Any] = []

    def track(items: list[Any]) -> Iterator[Any]:
        for item in items:
            seen.append(item)
            yield item

    before = threading.active_count()
    computed.clear()
    with pytest.raises(ValueError, match="bad") as caught:
        collect([1, 2, "bad", 4, "bad", *range(10, 200)], set(), count, track)
    assert seen == [1, 2, "bad"]
    assert len(computed) < 100  # what nobody waits for any more is not begun
    # The error holds on to the frames it came through; torch has its threads back all the same.
    assert torch.get_num_threads() == 2
    assert threading.active_count() == before
    assert caught.value.__traceback__ is not None


def test_an_interruption_between_two_layers_leaves_nothing_behind() -> None:
    def track(items: list[Any]) -> Iterator[Any]:
        yield items[0]
        raise KeyboardInterrupt

    computed.clear()
    with pytest.raises(KeyboardInterrupt) as caught:
        collect(range(10, 210), set(), 3, track)
    assert len(computed) < 100
    assert torch.get_num_threads() == 2
    assert caught.value.__traceback__ is not None


def test_what_is_not_thin_is_not_shared_out() -> None:
    mixed = layers(0)
    mixed |= {"layers.2.q": planted_dense((60, 50), [3.0, 1.0]), "layers.9.q": LowRank(normal(9, 9), normal(9, 9))}
    source = Source.of(mixed)
    alone = {name for name in mixed if source.batch_key(name) is None}
    assert alone == {"layers.2.q", "layers.9.q"}
    # A mapping of another kind may make its updates when asked, and not be made for threads.
    assert Source.of(MappingProxyType(mixed)).batch_key("layers.0.q") is None
    assert spectrum(mixed, workers=3) == spectrum(mixed, workers=1)


def test_batches_hold_one_shape_and_come_in_order() -> None:
    kinds = ["a", "b", "a", "a", "c", "b", "a"]
    assert module._batches(kinds, 2) == [[0, 2], [1, 5], [3, 6], [4]]
    assert module._batches(kinds, 1) == [[place] for place in range(7)]


def test_how_many_workers() -> None:
    assert worker_count(None, CPU) == torch.get_num_threads() == 2
    assert worker_count(7, CPU) == 7
    torch.set_num_threads(64)
    assert worker_count(None, torch.device("cuda")) == module.MAX_WORKERS_ON_DEVICE
    torch.set_num_threads(2)
    for nothing in (0, -1):
        with pytest.raises(ConfigError, match="at least one"):
            spectrum(layers(0), workers=nothing)


def test_a_comparison_finds_the_chance_of_a_grid_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    chance = pairs.chance
    monkeypatch.setattr(pairs, "chance", lambda grid, d: asked.append(d) or chance(grid, d))
    result = compare(layers(0), layers(100))
    side = result.layers[0].left
    assert side is not None
    assert not asked
    for i, j in ((1, 1), (3, 20), (24, 24)):
        cell = side.at(i, j)
        for name in ("overlap", "expected", "z", "p"):
            assert getattr(cell, name) == pytest.approx(getattr(side, name)[i - 1, j - 1], rel=1e-12)
    assert asked == [300]  # once for all four grids
    assert np.shape(side.p) == (24, 24)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_one_full_matrix_is_read_ahead_and_no_more(length: int) -> None:
    """Whether the next is read while one is computed, how many live at once, the order, and an error in its turn."""
    alive: weakref.WeakSet[Update] = weakref.WeakSet()
    reading, most, seen = {n: threading.Event() for n in range(length)}, [], []

    def read(n: int) -> list[Update]:
        if n == 4:
            raise FormatError("the fifth is broken")
        update = planted_dense((6, 5), [n + 1.0])
        alive.add(update)
        reading[n].set()
        return [update]

    def compute(n: int, updates: Sequence[Update]) -> float:
        if n + 1 in reading and n + 1 != 4:
            assert reading[n + 1].wait(10)
        assert n + 2 not in reading or not reading[n + 2].is_set()
        most.append(len(alive))
        seen.append(n)
        return updates[0].norm

    def ahead() -> list[float]:
        return compute_items(range(length), Job(lambda n: None, read, compute), CPU, ahead=True)

    before = torch.get_num_threads()
    if length == 5:
        with pytest.raises(FormatError, match="the fifth is broken"):
            ahead()
        assert seen == [0, 1, 2, 3]
    else:
        assert ahead() == pytest.approx([n + 1.0 for n in range(length)])
    assert max(most) == min(length, 2)
    assert torch.get_num_threads() == before


def test_only_stores_are_read_ahead(tmp_path: Path) -> None:
    write_updates(tmp_path / "u.safetensors", {"a": normal(6, 5).float(), "b": normal(5, 6).float()})
    stored = Source.of(tmp_path / "u.safetensors")
    assert stored.can_read_ahead
    assert not Source.of(layers(0)).can_read_ahead
    assert [layer.energy for layer in spectrum(tmp_path / "u.safetensors").layers] == [
        stored.read(name).energy for name in ("a", "b")
    ]


BLOCKS = """
import resource, torch
from pathlib import Path
from rankscope.analysis.worker_threads import release_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20

with release_freed_memory():
    pass  # which leaves glibc as it is after a block of 32 MB was freed
with release_freed_memory():
    before = resident()
    blocks = [torch.ones(2**22) for _ in range(12)]
    most = resident() - before
    del blocks[:-1]
    print(most, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_what_is_freed_goes_back_to_the_system() -> None:
    """Blocks of 16 MB below one that stays: glibc's heap would keep them all. In a process with nothing free as yet."""
    done = subprocess.run([sys.executable, "-c", BLOCKS], capture_output=True, text=True, check=True)
    most, left = map(int, done.stdout.split())
    assert most > 11 * 16
    assert left < 3 * 16
