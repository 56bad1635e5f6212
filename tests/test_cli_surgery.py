"""``resize``, ``extract``, ``merge``, ``unmerge``, ``subtract`` and ``average`` on the command line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from adapters import PREFIX, write_adapter, write_checkpoint
from command_line import run
from makers import planted
from safetensors import safe_open
from safetensors.torch import load_file

from rankscope import cli
from rankscope.surgery.surgery_result import SurgeryResult

NAMES = ["resize", "extract", "merge", "unmerge", "subtract", "average"]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands under their names, whether the group lists them or not."""
    for name in NAMES:
        monkeypatch.setitem(cli.COMMANDS, name, cli.COMMANDS.get(name, name))


def factors(module: str, sigma: list[float], seed: int) -> dict[str, torch.Tensor]:
    """A layer 4 × 3 with these singular values."""
    update = planted((4, 3), sigma, seed)
    return {
        f"{PREFIX}{module}.lora_B.weight": update.B.float().contiguous(),
        f"{PREFIX}{module}.lora_A.weight": update.A.float().contiguous(),
    }


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tensors = {**factors("block.q", [4.0, 3.0], 1), **factors("block.v", [2.0, 1.0], 2)}
    return write_adapter(tmp_path / "one", tensors, lora_alpha=2)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "two", factors("block.q", [1.0], 5), lora_alpha=1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    weights = {f"block.{name}.weight": torch.full((4, 3), 1.0) for name in ("q", "v")}
    return write_checkpoint(tmp_path / "base" / "model.safetensors", weights, {}).parent


TABLE = """\
layer    out × in  r  new r  parameters   norm  energy kept  error  rel. error
block.q     4 × 3  2      1           7      5       64.00%      3         0.6
block.v     4 × 3  2      1           7  2.236       80.00%      1       0.447
all                             28 → 14  5.477       66.67%   3.16       0.577
"""


def test_the_table_of_resize(tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: Path) -> None:
    code, out, err = run(capsys, "resize", adapter, "--rank", 1, "-o", tmp_path / "out")
    assert (code, out) == (0, TABLE)
    assert err == f"wrote {tmp_path / 'out'}\n"


@pytest.mark.parametrize(
    ("option", "ranks", "choice"),
    [
        (["--rank", 1], (1, 1), "rank 1"),
        (["--energy", 0.7], (2, 1), "energy 0.7"),
        (["--sigma-ratio", 0.6], (2, 1), "σ ≥ 0.6 σ₁"),
        (["--budget", 21], (2, 1), "budget 21"),
    ],
)
def test_json_is_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: Path, option: list[object], ranks: Any, choice: str
) -> None:
    code, out, err = run(capsys, "resize", adapter, *option, "-o", tmp_path / "out", "--json", "--quiet")
    assert (code, err) == (0, "")
    result = SurgeryResult.from_json(json.loads(out))
    assert tuple(layer.rank_after for layer in result.layers) == ranks
    assert result.choice == choice
    assert json.loads((tmp_path / "out" / "rankscope.json").read_text()) == json.loads(out)


def test_the_command_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/rankscope", "resize", "an adapter", "--rank", "1"])
    run(capsys, "resize", adapter, "--rank", 1, "-o", tmp_path / "out", "--quiet")
    typed = "rankscope resize 'an adapter' --rank 1"
    assert json.loads((tmp_path / "out" / "rankscope.json").read_text())["command"] == typed
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["rankscope_command"] == typed


def test_half_precision_is_chosen_and_noise_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: Path
) -> None:
    run(capsys, "resize", adapter, "--energy", 1, "--dtype", "bfloat16", "-o", tmp_path / "half", "--quiet")
    found = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    code, _, _ = run(capsys, "resize", tmp_path / "half", "--noise", "-o", tmp_path / "cut", "--quiet")
    assert code == 0
    code, _, err = run(capsys, "resize", adapter, "--noise", "-o", tmp_path / "none")
    assert code == 1
    assert "factors is not known" in err


def test_merge_unmerge_and_extract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: Path, base: Path
) -> None:
    code, out, err = run(capsys, "merge", base, adapter, "-o", tmp_path / "merged")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["layer", "out", "×", "in", "r", "norm", "rounding", "rel.", "rounding"]
    assert lines[1].split()[:6] == ["block.q", "4", "×", "3", "2", "5"]
    assert lines[-1].startswith("all")
    assert err == f"wrote {tmp_path / 'merged'}\n"
    code, out, _ = run(capsys, "unmerge", tmp_path / "merged", adapter, "-o", tmp_path / "back")
    assert code == 0
    assert out.splitlines()[0].endswith("from original")
    for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        torch.testing.assert_close(tensor, torch.ones(4, 3), msg=name)
    code, out, _ = run(
        capsys, "extract", tmp_path / "merged", "--base", base, "--energy", 0.999999, "-o", tmp_path / "again", "--json"
    )
    assert code == 0
    assert [layer["rank_after"] for layer in json.loads(out)["layers"]] == [2, 2]
    assert json.loads(out)["total"]["norm"] == pytest.approx(30**0.5, rel=1e-5)


def test_adapters_are_added_subtracted_and_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: Path, other: Path
) -> None:
    code, out, err = run(
        capsys, "merge", "--as-adapter", adapter, other, "--weights", "1,-0.5", "-o", tmp_path / "1", "--json"
    )
    assert code == 0
    assert json.loads(out)["weights"] == [1, -0.5]
    assert [layer["rank_after"] for layer in json.loads(out)["layers"]] == [3, 2]
    assert "1 layer that another adapter does not have: block.v" in err
    code, out, _ = run(capsys, "subtract", adapter, adapter, "-o", tmp_path / "2", "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["total"]["norm"] == 0
    code, out, _ = run(
        capsys, "average", adapter, other, "--weights", "3,1", "--rank", 1, "-o", tmp_path / "3", "--json", "--quiet"
    )
    assert code == 0
    assert json.loads(out)["weights"] == [0.75, 0.25]
    assert [layer["rank_after"] for layer in json.loads(out)["layers"]] == [1, 1]


def test_what_is_left_out_is_listed_with_v(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"fc.weight": torch.ones(4, 3), "token": torch.zeros(3), "norm.weight": torch.ones(3)}
    tuned = {"fc.weight": torch.eye(4, 3), "token": torch.ones(3), "norm.weight": torch.zeros(3)}
    one = write_checkpoint(tmp_path / "base.safetensors", base)
    two = write_checkpoint(tmp_path / "tuned.safetensors", tuned)
    code, _, err = run(capsys, "extract", two, "--base", one, "--rank", 1, "-o", tmp_path / "out", "-v")
    assert code == 0
    assert "note: skipped token: a parameter of the model itself" in err
    assert "note: copied 1 tensor whole, beside the low-rank layers" in err


USAGE = [
    (["resize", "{a}", "-o", "{o}"], "no ranks are chosen; give one of"),
    (["resize", "{a}", "--rank", "1", "--noise", "-o", "{o}"], "choose one of --rank"),
    (["resize", "{a}", "--rank", "0", "-o", "{o}"], "--rank"),
    (["resize", "{a}", "--rank", "1"], "Missing option '-o'"),
    (["resize", "--rank", "1", "-o", "{o}"], "Missing argument 'ADAPTER'"),
    (["extract", "{a}", "-o", "{o}"], "no ranks are chosen; give one of"),
    (["merge", "{a}", "-o", "{o}"], "give BASE and at least one ADAPTER"),
    (["merge", "{a}", "{a}", "--rank", "2", "-o", "{o}"], "with --as-adapter only"),
    (["merge", "{a}", "{a}", "--dtype", "float16", "-o", "{o}"], "with --as-adapter only"),
    (["merge", "--as-adapter", "{a}", "{a}", "--weights", "1,x", "-o", "{o}"], "--weights takes numbers"),
    (["average", "{a}", "{a}", "--energy", ".9", "--budget", "9", "-o", "{o}"], "choose one of --rank"),
    (["unmerge", "{a}", "-o", "{o}"], "Missing argument 'ADAPTER...'"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE)
def test_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: Path, arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, *(part.format(a=adapter, o=tmp_path / "out") for part in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()


FAILURES = [
    (["resize", "{a}", "--energy", "1.5", "-o", "{o}"], "a share of the energy"),
    (["resize", "{a}", "--budget", "13", "-o", "{o}"], "below the 14 of rank 1"),
    (["resize", "{a}", "--rank", "1", "-o", "{a}"], "exists already"),
    (["resize", "{a}/nowhere", "--rank", "1", "-o", "{o}"], "no such file or folder"),
    (["resize", "{a}", "--rank", "1", "-o", "{o}", "--device", "nonsense"], "cannot be used"),
    (["extract", "{a}", "--rank", "1", "-o", "{o}"], "is no full fine-tuning"),
    (["merge", "{a}", "{a}", "-o", "{o}"], "is an adapter, where a base model comes first"),
    (["merge", "--as-adapter", "{a}", "-o", "{o}"], "at least two adapters"),
    (["merge", "--as-adapter", "{a}", "{a}", "--weights", "1", "-o", "{o}"], "1 weight for 2 adapters"),
    (["average", "{a}", "{a}", "--weights", "1,-1", "-o", "{o}"], "add up to zero"),
    (["average", "{a}", "-o", "{o}"], "at least two adapters"),
]


@pytest.mark.parametrize(("arguments", "message"), FAILURES)
def test_failures_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: Path, arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, *(part.format(a=adapter, o=tmp_path / "out") for part in arguments))
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_help_has_two_examples(name: str) -> None:
    command: click.Command = importlib.import_module(f"rankscope.cli.{name}_command").command
    assert (command.help or "").count(f"  rankscope {name} ") == 2
