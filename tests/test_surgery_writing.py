"""Outputs are whole or not there at all: taken places, full disks, files written one tensor at a time."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import linear, normal, write_adapter, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

from rankscope.errors import ConfigError, FormatError, RankscopeError
from rankscope.formats import file_io as files
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.streaming import LazyTensor, write_streamed
from rankscope.surgery.algebra import average, merge_adapters, subtract
from rankscope.surgery.extract import extract
from rankscope.surgery.merge import merge, unmerge
from rankscope.surgery.output_folder import copy_files, create_output_folder
from rankscope.surgery.resize import resize
from rankscope.surgery.surgery_result import SurgeryResult
from rankscope.surgery.truncate import Rank

Act = Callable[[Path], Any]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """An adapter, a base and its tuned weights, large enough to fill a small disk."""
    home = tmp_path / "sources"
    write_adapter(home / "a", linear("q", out=300, n=200, r=64))
    write_adapter(home / "b", linear("q", out=300, n=200, r=64, seed=1))
    weight = normal(300, 200)
    write_checkpoint(home / "base" / "model.safetensors", {"q.weight": weight}, {"model_type": "x"})
    write_checkpoint(home / "tuned" / "model.safetensors", {"q.weight": weight + normal(300, 200, seed=1)})
    return home


ACTS: dict[str, Callable[[Path, Path], Any]] = {
    "resize": lambda home, out: resize(home / "a", Rank(32), out),
    "extract": lambda home, out: extract(home / "tuned", Rank(32), out, home / "base"),
    "merge": lambda home, out: merge(home / "base", [home / "a"], out),
    "unmerge": lambda home, out: unmerge(home / "base", [home / "a"], out),
    "merge adapters": lambda home, out: merge_adapters([home / "a", home / "a"], out),
    "subtract": lambda home, out: subtract(home / "a", home / "b", out),
    "average": lambda home, out: average([home / "a", home / "a"], out),
}


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ACTS)
def test_a_place_that_is_taken_is_refused_and_stays_as_it_is(tmp_path: Path, sources: Path, name: str) -> None:
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    (taken / "precious").write_text("x")
    file.write_text("x")
    before = everything(tmp_path)
    inputs = [sources / "a", sources / "base", sources / "tuned"]
    for out in (taken, file, *inputs):
        with pytest.raises(ConfigError, match="exists already; give a new place for the output"):
            ACTS[name](sources, out)
    with pytest.raises(ConfigError, match="exists already"):
        ACTS[name](tmp_path / "nowhere", taken)  # said before any work is done
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ACTS)
def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path: Path, sources: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    before = everything(sources)
    for out in (tmp_path / "empty", tmp_path / "deep" / "er" / "out"):
        result = ACTS[name](sources, out)
        assert result.output == str(out)
        assert (out / "rankscope.json").is_file()
        assert list(out.glob("*.safetensors"))
        assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
    assert everything(sources) == before


def full_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the count-th file that is put in place."""
    left = [count]
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    monkeypatch.setattr(files.os, "replace", replace)


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("count", [0, 1])
def test_an_error_in_the_middle_leaves_nothing(
    tmp_path: Path, sources: Path, name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(tmp_path)
    full_after(count, monkeypatch)
    with pytest.raises(FormatError, match=r"cannot be written \(No space left on device\)"):
        ACTS[name](sources, tmp_path / "out")
    assert everything(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sources"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("name", ACTS)
def test_a_disk_that_is_really_full(small_disk: Path, sources: Path, name: str) -> None:
    with pytest.raises(RankscopeError, match="No space left") as caught:
        ACTS[name](sources, small_disk / "out")
    assert "\n" not in str(caught.value)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("name", ACTS)
def test_an_error_leaves_no_parents_and_names_the_place(
    tmp_path: Path, sources: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    full_after(0, monkeypatch)
    with pytest.raises(FormatError) as caught:
        ACTS[name](sources, tmp_path / "there" / "deep" / "er" / "out")
    assert ".tmp" not in str(caught.value)
    assert "deep/er/out" in str(caught.value)
    assert list((tmp_path / "there").iterdir()) == []


def test_parents_that_others_use_meanwhile_stay(tmp_path: Path) -> None:
    def interrupt() -> None:
        (tmp_path / "deep" / "theirs").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "deep" / "er" / "out", interrupt)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["theirs"]


def test_a_parent_that_cannot_be_made_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be written"):
        fill(tmp_path / "deep" / ("x" * 300) / "out", list)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("no memory\nin two lines"), MemoryError(), OSError(5, "Input/output")])
def test_a_tensor_that_cannot_be_computed_is_not_the_fault_of_the_disk(tmp_path: Path, error: Exception) -> None:
    def fail() -> torch.Tensor:
        raise error

    with pytest.raises(FormatError, match=r"^x\.safetensors: a: cannot be computed \(.+\)$") as caught:
        write_streamed(tmp_path / "x.safetensors", {"a": LazyTensor(TensorInfo((2, 3), torch.float32), fail)})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ACTS)
def test_a_place_whose_name_is_no_text(tmp_path: Path, sources: Path, name: str) -> None:
    """A path of bytes that are no UTF-8, as Python gives it: written, and the record readable by any JSON reader."""
    out = tmp_path / "caf\udce9"
    result = ACTS[name](sources, out)
    assert result.output.endswith("caf\\udce9")
    (out / "rankscope.json").read_text().encode()
    assert SurgeryResult.from_json(json.loads((out / "rankscope.json").read_text())) == result


def test_a_command_line_that_is_no_text(tmp_path: Path, sources: Path) -> None:
    result = resize(sources / "a", Rank(2), tmp_path / "out", command="rankscope resize caf\udce9")
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "pt") as file:
        assert file.metadata()["rankscope_command"] == result.command == "rankscope resize caf\\udce9"


def fill(out: Path, then: Callable[[], Any]) -> None:
    with create_output_folder(out) as folder:
        (folder / "ours").write_text("x")
        then()


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def take() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("y")

    with pytest.raises(ConfigError, match="exists already"):
        fill(tmp_path / "out", take)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_places_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(RankscopeError):
            fill(place, list)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill(tmp_path / "link", list)
    assert (tmp_path / "real" / "ours").is_file()
    assert (tmp_path / "link").is_symlink()


def test_copies_follow_links_and_name_what_cannot_be_read(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (tmp_path / "blob").write_text("x")
    (source / "config.json").symlink_to(tmp_path / "blob")
    (source / "lost.json").symlink_to(tmp_path / "nowhere")
    copy_files(source, target)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert not (target / "config.json").is_symlink()
    with pytest.raises(FormatError, match="nowhere"):
        copy_files(tmp_path / "nowhere", target)


TENSORS = {
    "float": normal(3, 5),
    "turned": normal(4, 6, seed=1).T,
    "bf16": normal(3, 1).bfloat16(),
    "number": torch.tensor(3.0, dtype=torch.float16),
    "none": torch.zeros(0, 3),
    "flags": torch.tensor([True, False, True]),
    "counts": torch.arange(5),
    "small": torch.tensor([1, 2], dtype=torch.uint16),
    "complex": torch.complex(normal(2), normal(2, seed=1)),
    'q"uote\u00fc': normal(2).double(),
    "eight": normal(7).to(torch.float8_e4m3fn),
}


def test_what_is_streamed_is_read_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_streamed(path, {name: LazyTensor.of(tensor) for name, tensor in TENSORS.items()}, {"note": "ü"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        raw = [one.contiguous().reshape(-1).view(torch.uint8) for one in (found[name], tensor) if not one.is_complex()]
        assert not raw or torch.equal(raw[0], raw[1])
    assert torch.equal(found["complex"], TENSORS["complex"])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"}


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def read() -> torch.Tensor:
        assert all(one() is None for one in held)
        tensor = normal(10, 10)
        held.append(weakref.ref(tensor))
        return tensor

    pending = LazyTensor(TensorInfo((10, 10), torch.float32), read)
    write_streamed(tmp_path / "x.safetensors", {str(i): pending for i in range(4)})
    assert len(held) == 4


@pytest.mark.parametrize("info", [TensorInfo((3, 2), torch.float32), TensorInfo((2, 3), torch.float16)])
def test_a_tensor_that_is_not_what_was_announced(tmp_path: Path, info: TensorInfo) -> None:
    with pytest.raises(FormatError, match=r"x\.safetensors: a: is .* was announced"):
        write_streamed(tmp_path / "x.safetensors", {"a": LazyTensor(info, lambda: normal(2, 3))})
    assert list(tmp_path.iterdir()) == []
