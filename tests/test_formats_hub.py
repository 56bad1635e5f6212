"""Bases and adapters that are named instead of given: by an adapter's configuration, or by their id on the hub."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from adapters import linear, normal, write_adapter, write_checkpoint

from rankscope import cli
from rankscope.errors import FormatError
from rankscope.formats import store as formats
from rankscope.formats.checkpoint import Checkpoint

hub = pytest.importorskip("huggingface_hub")


def dora() -> dict[str, torch.Tensor]:
    return {**linear("block.q"), "base_model.model.block.q.lora_magnitude_vector": torch.ones(5)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base" / "model.safetensors", {"block.q.weight": normal(5, 7)}).parent


def test_the_base_that_the_configuration_names(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = formats.open(write_adapter(tmp_path / "a", dora(), use_dora=True, base_model_name_or_path=str(base)))
    assert found.names() == ["block.q", "block.q:whole"]
    assert torch.equal(found.weight("block.q"), normal(5, 7))
    assert [note for note in found.notes if str(base) in note]
    monkeypatch.chdir(tmp_path)  # relative to the working folder, as PEFT takes it
    found = formats.open(write_adapter(tmp_path / "b", dora(), use_dora=True, base_model_name_or_path="base"))
    assert "block.q:whole" in found


def test_a_given_base_goes_before_the_one_that_is_named(tmp_path: Path, base: Path) -> None:
    other = write_checkpoint(tmp_path / "other.safetensors", {"block.q.weight": normal(5, 7, seed=4)})
    folder = write_adapter(tmp_path / "a", base_model_name_or_path=str(base))
    assert torch.equal(formats.open(folder, base=other).weight("block.q"), normal(5, 7, seed=4))


def test_a_run_of_a_study_is_left_as_it_is(tmp_path: Path, base: Path) -> None:
    folder = write_adapter(tmp_path / "run" / "adapter", dora(), use_dora=True, base_model_name_or_path=str(base))
    assert "block.q:whole" in formats.open(folder)
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "block.q:whole" not in formats.open(folder)


@pytest.mark.parametrize("named", ["org/name", "", "/nowhere/at/all", None, 3, "x" * 5000, "a\0b"])
def test_a_base_that_is_not_on_disk_is_not_looked_for(tmp_path: Path, named: object, monkeypatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", None)  # any call would fail
    options = {} if isinstance(named, int) else {"base_model_name_or_path": named}
    found = formats.open(write_adapter(tmp_path / "a", dora(), use_dora=True, **options))
    assert found.names() == ["block.q"]
    assert not [note for note in found.notes if "its base" in note]


def test_a_named_base_that_does_not_fit_is_said_and_left(tmp_path: Path) -> None:
    wrong = write_checkpoint(tmp_path / "wrong" / "model.safetensors", {"block.q.weight": normal(3, 3)}).parent
    found = formats.open(write_adapter(tmp_path / "a", base_model_name_or_path=str(wrong)))
    assert found.names() == ["block.q"]
    assert [note for note in found.notes if "could not be used" in note and "3 × 3" in note]


class Hub:
    """Stands for snapshot_download: a cache, and what the net has."""

    def __init__(self, cached: dict[str, Path], remote: dict[str, Path]) -> None:
        self.cached, self.remote = cached, remote
        self.asked: list[tuple[str, bool]] = []

    def __call__(self, name: str, local_files_only: bool = False, **patterns: object) -> str:
        self.asked.append((name, local_files_only))
        known = self.cached if local_files_only else self.remote
        if name not in known:
            raise hub.errors.LocalEntryNotFoundError("not found\nand more lines")
        return str(known[name])


def test_the_cache_goes_first(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_adapter(tmp_path / "a", dora(), use_dora=True)
    fake = Hub({"me/adapter": adapter, "me/base": base}, {})
    monkeypatch.setattr(hub, "snapshot_download", fake)
    assert formats.open("me/adapter", base="me/base").names() == ["block.q", "block.q:whole"]
    assert Checkpoint(Path("me/base")).path == base
    assert {local for _, local in fake.asked} == {True}


def test_what_is_not_cached_is_fetched(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    fake = Hub({"me/base": empty}, {"me/base": base})  # a cache that only has the configuration
    monkeypatch.setattr(hub, "snapshot_download", fake)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    assert Checkpoint(Path("me/base")).path == base
    assert fake.asked == [("me/base", True), ("me/base", False)]
    fake.remote["me/base"] = empty
    with pytest.raises(FormatError, match="me/base: the hub has it, without weights"):
        formats.open("me/base")


def test_what_cannot_be_fetched_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    fake = Hub({}, {})
    monkeypatch.setattr(hub, "snapshot_download", fake)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        FormatError, match=r"org/gone: no such file or folder, and it cannot be fetched .*\(not found\)$"
    ):
        formats.open("org/gone")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FormatError, match="HF_HUB_OFFLINE is set"):
        formats.open("org/gone")
    assert fake.asked[-1] == ("org/gone", True)  # the net was not asked
    with pytest.raises(SystemExit) as ended:
        cli.main(["spectrum", "org/gone"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FormatError, match=r'no such file or folder; .*pip install "rankscope\[hf\]"'):
        formats.open("org/gone")


@pytest.mark.parametrize("path", ["/abs/path", "./a/b", "a", "a/b/c", "runs/x.safetensors", "../up"])
def test_paths_are_not_taken_for_names_of_the_hub(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Hub({}, {})
    monkeypatch.setattr(hub, "snapshot_download", fake)
    with pytest.raises(FormatError, match="no such file"):
        formats.open(path)
    with pytest.raises(FormatError, match="no such file"):
        formats.open(write_checkpoint(tmp_path / "x.safetensors", {"q.weight": normal(2, 2)}), base=path)
    (tmp_path / "study").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match="study/run: no such file"):
        formats.open("study/run")  # a slip within a folder that is there
    assert fake.asked == []
