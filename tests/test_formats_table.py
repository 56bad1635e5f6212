"""The table of file formats is complete, and a format that is added to it from outside is known everywhere."""

from __future__ import annotations

import csv
import importlib
import io
import json
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import rankscope
from rankscope import formats
from rankscope.cli import cli
from rankscope.formats import file_formats
from rankscope.formats.abstract_store import Store
from rankscope.formats.adapter_file import FileStore, ParsedFileKey
from rankscope.formats.file_formats import FileFormat, FormatWriter, open_adapter_file
from rankscope.formats.layouts import AdapterContents, LayerFactors
from rankscope.formats.lycoris import ALPHA_LEAF, LOCON

LEAVES = {"left": LOCON.a, "right": LOCON.b, "alpha": ALPHA_LEAF}


class RunicStore(FileStore):
    """A made-up format: ``rune/MODULE/left`` is B, ``rune/MODULE/right`` is A."""

    kind: ClassVar[str] = "runic"

    def _parse(self, key: str) -> ParsedFileKey | None:
        _, module, part = key.split("/")
        return ParsedFileKey(module, LEAVES[part])


def arrange_runes(layers: Sequence[LayerFactors], _: object, __: object) -> AdapterContents:
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        parts = {"left": layer.update.B, "right": layer.update.A, "alpha": torch.tensor(layer.alpha)}
        tensors |= {f"rune/{layer.module}/{part}": tensor for part, tensor in parts.items()}
    return AdapterContents(tensors, {}, None, [layer.update for layer in layers])


RUNIC = FileFormat(
    "runic",
    "Runic tablet",
    lambda path, tensors, opening: open_adapter_file(RunicStore, path, tensors, opening),
    tools=("Runesmith",),
    matches=lambda tensors: all(key.startswith("rune/") for key in tensors.infos),
    writer=FormatWriter(arrange_runes, "tablet-{}.safetensors"),
)


@pytest.fixture
def tablet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the made-up format, which the table knows."""
    monkeypatch.setattr(file_formats, "FORMATS", (*file_formats.FORMATS, RUNIC))
    torch.manual_seed(0)
    parts = {"left": torch.randn(6, 2), "right": torch.randn(2, 5), "alpha": torch.tensor(4.0)}
    path = tmp_path / "tablet.safetensors"
    save_file({f"rune/layers.{i}.q/{part}": tensor * (i + 1) for i in range(2) for part, tensor in parts.items()}, path)
    return path


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def all_stores() -> set[type[Store]]:
    for module in pkgutil.iter_modules(formats.__path__):
        importlib.import_module(f"rankscope.formats.{module.name}")
    stores, todo = set(), [Store]
    while todo:
        for store in todo.pop().__subclasses__():
            if store.__module__.startswith("rankscope."):
                stores.add(store)
                todo.append(store)
    return stores


def test_every_store_has_a_row_and_every_row_is_whole() -> None:
    kinds = [row.kind for row in file_formats.all_formats()]
    assert len(set(kinds)) == len(kinds)
    assert {store.kind for store in all_stores() if not getattr(store, "__abstractmethods__", None)} == set(kinds)
    for row in file_formats.FORMATS:
        assert row.paths or row.matches
        assert row.title
        assert row.tools or row.kind == "update"
    assert list(file_formats.writers()) == ["peft", "kohya", "diffusers"]
    assert file_formats.adapter_tools() == [
        "PEFT",
        "kohya",
        "LyCORIS",
        "diffusers",
        "loralib",
        "mlx-lm",
        "torchtune",
        "XLabs",
    ]


def test_a_format_of_the_table_is_opened_by_its_contents(tablet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = rankscope.open(tablet)
    assert isinstance(store, RunicStore)
    assert store.names() == ["layers.0.q", "layers.1.q"]
    tensors = load_file(tablet)
    expected = tensors["rune/layers.1.q/left"] @ tensors["rune/layers.1.q/right"] * 4.0  # α = 8, r = 2
    torch.testing.assert_close(store["layers.1.q"].dense().float(), expected)
    assert isinstance(rankscope.open(tablet.parent), RunicStore)  # a folder with one such file
    monkeypatch.undo()
    with pytest.raises(rankscope.RankscopeError, match="holds full weights"):
        rankscope.open(tablet)


def test_a_format_of_the_table_is_inspected_and_measured(tablet: Path, tmp_path: Path) -> None:
    assert "Runic tablet: 2 updates" in run("inspect", tablet)
    inspected = json.loads(run("inspect", tablet, "--json"))
    assert inspected["format"] == "Runic tablet"
    assert [target["alpha"] for target in inspected["targets"]] == [4.0, 8.0]
    assert inspected["tensors"] == 6
    assert "layers.1.q" in run("spectrum", tablet, "--report", tmp_path / "page.html", "--quiet")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "layers.1.q" in page
    result = json.loads(run("spectrum", tablet, "--json"))
    assert [layer["name"] for layer in result["layers"]] == ["layers.0.q", "layers.1.q"]
    rows = list(csv.DictReader(io.StringIO(run("spectrum", tablet, "--csv"))))
    assert {row["layer"] for row in rows} == {"layers.0.q", "layers.1.q"}


def test_a_format_of_the_table_is_converted_both_ways(tablet: Path, tmp_path: Path) -> None:
    run("convert", tablet, "--to", "peft", "-o", tmp_path / "adapter")
    run("convert", tmp_path / "adapter", "--to", "runic", "-o", tmp_path / "back")
    back = load_file(tmp_path / "back" / "tablet-back.safetensors")
    for key, tensor in load_file(tablet).items():
        assert torch.equal(back[key], tensor)
    result = CliRunner().invoke(cli, ["convert", str(tablet), "--to", "runic", "-o", str(tmp_path / "again")])
    assert result.exit_code != 0
    assert "in the format runic already" in str(result.exception)


@pytest.mark.parametrize("command", ["spectrum", "compare", "inspect"])
def test_help_names_the_formats_of_the_table(tablet: Path, command: str) -> None:
    text = " ".join(run(command, "--help").split())
    assert "PEFT, kohya, LyCORIS, diffusers, loralib, mlx-lm, torchtune, XLabs, Runesmith" in text
    assert "peft|kohya|diffusers|runic" in " ".join(run("convert", "--help").split())


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["convert", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom rankscope.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    root = Path(rankscope.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=root, timeout=120)


def test_the_names_in_a_study_are_written_once() -> None:
    names = ("study.json", "latency.json", "run.json", "metrics.jsonl", "update.safetensors", "state.pt")
    package = Path(rankscope.__file__).parent
    for name in names:
        quoted = [f'"{name}"', f"'{name}'", f"/{name}"]
        holders = [
            path.relative_to(package).as_posix()
            for path in package.rglob("*.py")
            if any(text in path.read_text(encoding="utf-8") for text in quoted)
        ]
        assert holders == ["formats/study_layout.py"], name
