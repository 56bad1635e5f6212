"""``rankscope train`` on the command line: table, JSON, plots, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankscope.cli import main

QUICK = ["train", "--task", "planted", "--ranks", "1,4", "--steps", "20"]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tmp_path / "study"


def test_a_study_prints_a_table_and_draws_two_plots(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run([*QUICK, "-o", str(study)], capsys)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["method", "lr", "seed", "trainable"]
    assert sum("r = " in line for line in lines) == 2
    assert sum(line.startswith("full") for line in lines) == 1
    for name in ("spectra.png", "performance.png"):
        assert (study / name).read_bytes().startswith(b"\x89PNG")
        assert name in err


def test_json_has_a_row_a_run_and_quiet_is_quiet(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run([*QUICK, "-o", str(study), "--json", "--quiet"], capsys)
    assert code == 0
    assert err == ""
    described = json.loads(out)
    assert described["schema"] == "rankscope.study-table/1"
    assert [row["method"] for row in described["runs"]] == ["base", "lora", "lora", "full"]
    assert all(row["status"] == "done" for row in described["runs"])
    again = json.loads(run([*QUICK, "-o", str(study), "--json", "--quiet"], capsys)[1])
    assert again == described


def test_piped_progress_is_plain_lines(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = run([*QUICK, "-o", str(study)], capsys)[2]
    assert "lora-r1-lr0.01-s0: 20 steps" in err
    assert "step 20  loss" in err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--ranks", "one"], 2, "not a list of numbers"),
        (["--task", "poetry"], 2, "poetry"),
        (["--model", "x"], 2, "need --task"),
        (["--ranks", "0"], 1, "ranks of at least 1"),
        (["--config", "nowhere.toml"], 1, "nowhere.toml: no such file"),
        (["--task", "planted", "--targets", "nothing"], 1, "matches no module"),
        (["--task", "planted", "--device", "cuda:77"], 1, "cuda:77"),
        (["--task", "classify"], 1, "needs --model"),
        (["--task", "planted", "--planted-rank", "100"], 1, "1 to 64"),
        (["--task", "planted", "--data", "x.csv"], 1, "brings its own"),
        (["--max-length", "10000000"], 1, "a part of the data has"),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str], code: int, message: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = run(["train", "--quiet", "-o", str(study), *arguments], capsys)
    assert found == code
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    if code == 1:
        assert len(err.strip().splitlines()) == 1


def test_help_has_two_examples(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["train", "--help"], capsys)
    assert code == 0
    assert out.split("Examples:")[1].count("rankscope train") >= 2
