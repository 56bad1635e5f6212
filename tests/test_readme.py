"""What the README says works: its commands and its Python run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import torch

from rankscope.cli import COMMANDS, cli, main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
LINES = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.startswith("rankscope ")]
ON_STUDY = [line for line in LINES if " study" in line]
ON_YOUR_FILES = [line for line in LINES if line not in ON_STUDY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``rankscope train`` has been run, with few steps."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["train", "--steps", "3", "--evaluations", "0", "--ranks", "8,64", "--quiet"]) == 0
    return folder


def run(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_there_is_something_to_check() -> None:
    assert len(ON_STUDY) >= 5
    assert len(ON_YOUR_FILES) >= 4
    for name in COMMANDS:
        assert any(line.startswith(f"rankscope {name}") for line in LINES), name


@pytest.mark.parametrize("line", ON_STUDY)
def test_command(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    assert run(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", ON_YOUR_FILES)
def test_command_on_your_files_is_understood(line: str) -> None:
    """Every option exists and takes its value; the files are the reader's."""
    name, *arguments = shlex.split(line)[1:]
    root = click.Context(cli, info_name="rankscope", **cli.context_settings)
    command = cli.get_command(root, name)
    assert command is not None
    context = command.make_context(name, arguments, parent=root)
    assert context.params


def test_python(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    for kind, text in BLOCKS:
        if kind == "python":
            exec(text, {})  # noqa: S102 (our own README)
    rank = float(capsys.readouterr().out.split()[0])
    assert 1 <= rank <= 8


def test_the_two_commands_name_files_that_exist() -> None:
    root = Path(__file__).parent.parent
    for name in ("constraints.txt", "tools/check.py", "docs/cli.md", "docs/architecture.md"):
        assert name in README
        assert (root / name).exists()


def test_torch_is_the_pinned_one() -> None:
    pins = (Path(__file__).parent.parent / "constraints.txt").read_text(encoding="utf-8")
    assert f"torch=={torch.__version__.partition('+')[0]}" in pins
