"""``rankscope train`` on the command line: table, JSON, plots, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from rankscope.cli import main
from rankscope.cli.cost_table import _digits, _percent, _short, cost_entries
from rankscope.cli.study_output import _point, print_study, series_name, write_plots
from rankscope.train.results import RunResult
from rankscope.train.runs import Run, RunCost, RunRecord
from rankscope.train.study import Study

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
    assert lines[0].split()[:4] == ["method", "lr", "seeds", "validation"]
    runs, costs, serving = out.split("\n\n")
    for table in (runs, costs):
        assert [line[:5] for line in table.splitlines() if line.startswith(("r =", "full"))] == [
            "r = 1",
            "r = 4",
            "full ",
        ]
    assert max(map(len, lines)) <= 100
    assert costs.split()[:4] == ["method", "params", "of", "all"]
    assert [line.split()[0] for line in serving.splitlines()] == ["examples", "1", "32"]
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
    err = run([*QUICK, "--lrs", "0.01", "-o", str(study)], capsys)[2]
    assert "3 runs\n" in err
    assert "[1/3] lora-r1-lr0.01-s0: validation loss 0." in err
    assert "\x1b" not in err


# The tables, of studies whose numbers are known


def cost(trainable: int = 10, together: int = 1, **changes: Any) -> RunCost:
    """Of a model of 1000 parameters, in float32 under AdamW."""
    numbers = {
        "parameters": 1000,
        "trainable": trainable,
        "parameter_bytes": 4 * trainable,
        "gradient_bytes": 4 * trainable,
        "optimizer_bytes": 8 * trainable,
        "saved_bytes": 4 * trainable,
        "peak_memory": 2**20 * 300,
        "seconds": 1.0,
        "seconds_per_step": 0.05,
        "together": together,
    }
    return RunCost(**{**numbers, **changes})


def ended(run: Run, score: float, took: RunCost | None = None, status: str = "done") -> RunRecord:
    """The test score is one more than the validation score."""
    metrics = {"validation": {"loss": score}, "test": {"loss": score + 1}} if status == "done" else {}
    return RunRecord(run=run, status=status, steps=5, metrics=metrics, before=metrics, cost=took)  # type: ignore[arg-type]


def lora(lr: float, seed: int, rank: int = 8, **changes: Any) -> Run:
    return Run(**{"method": "lora", "seed": seed, "rank": rank, "alpha": 16.0, "lr": lr, **changes})


def full(lr: float = 0.001, seed: int = 0) -> Run:
    return Run(method="full", seed=seed, lr=lr)


def known(folder: Path, records: list[RunRecord], device: str = "cpu") -> tuple[Study, list[RunResult]]:
    """A study of these records; each update's effective ranks are 2 more than its seed."""
    folder.mkdir()
    described = {"schema": "rankscope.study/2", "config": {}, "metric": "loss", "higher_is_better": False}
    (folder / "study.json").write_text(json.dumps({**described, "machine": {"device": device}}))
    for record in records:
        (folder / "runs" / record.run.name).mkdir(parents=True)
        record.write(folder / "runs" / record.run.name)
    study = Study(folder)
    choices = study.choices()
    return study, [row_of(record, choices.get(record.run.label)) for record in study.records]


def row_of(record: RunRecord, choice: Any) -> RunResult:
    if record.status != "done":
        return RunResult(record, None, None, {}, None, None)
    ranked = record.run.method in ("lora", "full")
    ranks = dict.fromkeys(("entropy_rank", "stable_rank", "k90"), 2.0 + record.run.seed) if ranked else {}
    chosen = choice if choice is not None and choice.lr == record.run.lr else None
    scores = (record.metrics[split]["loss"] for split in ("test", "validation"))
    return RunResult(record, *scores, ranks, None, chosen)


SEVERAL = [
    ended(Run(method="base", seed=0), 2.0),
    *(ended(lora(lr, seed), score, cost(together=4)) for lr, seed, score in [(0.01, 0, 0.5), (0.01, 1, 0.7)]),
    *(ended(lora(lr, seed), 0.9, cost()) for lr, seed in [(0.003, 0), (0.003, 1), (0.03, 0)]),
    ended(lora(0.03, 1), 0.0, status="diverged"),
    ended(full(0.001), 0.4, cost(1000)),
    ended(full(0.01), 0.0, status="stopped"),
    ended(full(0.1), 0.3, cost(1000)),
]


def table(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines()]


def test_a_row_for_each_rank_at_its_best_rate(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_study(*known(study, SEVERAL), as_json=False)
    out, err = capsys.readouterr()
    header, base, r8, whole = table(out.partition("\n\n")[0])
    assert header[-1] == "lost"
    assert base == ["base", "1", "2.0000", "3.0000"]
    # 0.5 and 0.7: mean 0.6, sample standard deviation 0.2 / √2.
    assert r8[:5] == ["r", "=", "8", "0.01*", "2"]
    assert r8[5:11] == ["0.6000", "±", "0.1414", "1.6000", "±", "0.1414"]
    assert r8[11:] == ["2.5", "2.5", "2.5", "1", "diverged"]
    assert whole == ["full", "0.1*!", "1", "0.3000", "1.3000", "2.0", "2.0", "2.0", "1", "stopped"]
    for said in (
        "loss (lower is better), mean ± standard deviation",
        "* the best learning rate",
        "! the best learning rate",
        "median",
    ):
        assert said in err
        assert said not in out


def test_verbose_has_a_row_for_each_run(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_study(*known(study, SEVERAL), as_json=False, verbose=True)
    out, err = capsys.readouterr()
    rows = table(out.partition("\n\n")[0])[1:]
    assert len(rows) == len(SEVERAL)
    assert [row[3:5] for row in rows if row[0] == "r"] == [
        [lr, seed] for lr in ("0.003", "0.01*", "0.03") for seed in ("0", "1")
    ]
    assert [row[-1] for row in rows if row[0] == "full"] == ["0.050", "stopped", "0.050"]
    assert "±" not in out + err


def test_without_a_choice_nothing_is_marked(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [ended(lora(0.01, 0), 0.5, cost()), ended(full(), 0.0, status="diverged")]
    print_study(*known(study, records), as_json=False)
    out, err = capsys.readouterr()
    assert table(out)[1:3] == [
        ["r", "=", "8", "0.01", "1", "0.5000", "1.5000", "2.0", "2.0", "2.0"],
        ["full", "0", "1", "diverged"],
    ]
    assert "*" not in out + err
    assert "±" not in out + err


def test_costs_stand_against_full_fine_tuning(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lone = cost(20, parameter_bytes=2**18, gradient_bytes=2**18, optimizer_bytes=2**19, saved_bytes=2**17)
    whole = cost(1000, parameter_bytes=2**20, gradient_bytes=2**20, optimizer_bytes=2**21, saved_bytes=2**20)
    records = [
        ended(lora(0.01, 1), 0.5, cost(20, seconds_per_step=9.0)),
        ended(lora(0.01, 0), 0.6, replace(lone, peak_memory=2**20 * 150, seconds_per_step=0.02)),
        ended(lora(0.03, 0), 0.9, cost(20)),
        ended(lora(0.03, 1), 0.9, cost(20)),
        ended(lora(0.01, 0, rank=64), 0.5, replace(lone, together=3)),
        ended(full(), 0.4, whole),
    ]
    print_study(*known(study, records), as_json=False)
    out, err = capsys.readouterr()
    header, r8, r64, last = table(out.partition("\n\n")[2])
    assert " ".join(header) == "method params of all /full state /full peak /full s/step /full saved /full"
    assert r8[3:] == ["20", "2%", "2%", "1", "25%", "150", "50%", "0.02", "40%", "0.125", "12%"]
    # Trained with two others: a peak, but whose?
    assert r64[3:] == ["20", "2%", "2%", "1", "25%", "300~", "0.05", "100%", "0.125", "12%"]
    assert last[1:] == ["1k", "100%", "100%", "4", "100%", "300", "100%", "0.05", "100%", "1", "100%"]
    assert "whole process" in err
    assert "~ trained in one pass" in err


def test_costs_without_full_fine_tuning(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known_study, found = known(study, [ended(lora(0.01, 0), 0.5, cost(peak_memory=None))], device="cuda:1")
    print_study(known_study, found, as_json=False)
    out, err = capsys.readouterr()
    header, row = table(out.partition("\n\n")[2])
    assert header == ["method", "params", "of", "all", "state", "peak", "s/step", "saved"]
    assert row == ["r", "=", "8", "10", "1%", "0.000153", "0.05", "3.81e-05"]
    assert "GPU" in err
    assert "~" not in err
    print_study(known_study, found, as_json=True)
    described = json.loads(capsys.readouterr().out)
    assert described["peak_memory_of"] == "allocator"
    (entry,) = described["costs"]
    assert (entry["of_full"], entry["trained_bytes"], entry["trainable_share"]) == (None, 160, 0.01)


def test_json_has_every_run_and_its_costs(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_study(*known(study, SEVERAL), as_json=True)
    out, err = capsys.readouterr()
    assert err == ""
    described = json.loads(out)
    assert len(described["runs"]) == len(SEVERAL)
    assert described["peak_memory_of"] == "process"
    r8, whole = described["costs"]
    assert (r8["name"], whole["name"]) == ("lora-r8-lr0.01-s0", "full-lr0.1-s0")
    assert r8["of_full"] == {
        "trainable": 0.01,
        "trained_bytes": 0.01,
        "peak_memory": None,
        "seconds_per_step": 1.0,
        "saved_bytes": 0.01,
    }
    assert whole["of_full"]["peak_memory"] == 1.0


def test_a_peak_has_no_ratio_to_one_that_is_not_known(study: Path) -> None:
    records = [
        ended(lora(0.01, 0), 0.5, cost()),
        ended(full(), 0.4, cost(1000, peak_memory=None, seconds_per_step=0.0)),
    ]
    of_full = cost_entries(known(study, records)[1])[0]["of_full"]
    assert (of_full["peak_memory"], of_full["seconds_per_step"], of_full["trainable"]) == (None, None, 0.01)


@pytest.mark.parametrize(
    ("form", "value", "said"),
    [
        (_short, 0, "0"),
        (_short, 998, "998"),
        (_short, 12_345, "12.3k"),
        (_short, 999_600, "1M"),
        (_short, 7 * 10**9, "7G"),
        (_percent, 1.0, "100%"),
        (_percent, 0.0996, "10%"),
        (_percent, 0.0123, "1.2%"),
        (_percent, None, ""),
        (_digits, 0.04567, "0.0457"),
        (_digits, 1.5, "1.5"),
        (_digits, 99.96, "100"),
        (_digits, 12345.6, "12,346"),
    ],
)
def test_numbers_are_short(form: Callable[[Any], str], value: Any, said: str) -> None:
    assert form(value) == said


def test_a_grid_without_matrices_is_drawn_too(study: Path) -> None:
    found = known(study, [ended(Run(method="bias", seed=0, lr=0.01), 0.5, cost())])
    assert [path.name for path in write_plots(*found)] == ["performance.png"]
    assert write_plots(*known(study.parent / "other", [ended(Run(method="base", seed=0), 2.0)])) == []


def test_a_point_is_its_run(study: Path) -> None:
    rows = {row.record.run.name: row for row in known(study, SEVERAL)[1]}
    point = _point(rows["full-lr0.1-s0"])
    assert (point.method, point.nominal_rank, point.effective_rank) == ("full", None, 2.0)
    assert (point.score, point.edge) == (1.3, True)
    point = _point(rows["lora-r8-lr0.01-s1"])
    assert (point.series, point.nominal_rank, point.effective_rank) == ("LoRA", 8, 3.0)
    assert (point.score, point.seed, point.edge) == (1.7, 1, False)


def test_series_are_told_apart_by_method_and_targets() -> None:
    assert series_name(lora(0.1, 0)) == "LoRA"
    assert series_name(lora(0.1, 0, method="pissa", targets="q,v")) == "PiSSA on q,v"
    assert series_name(Run(method="bias", seed=0)) == "biases only"


# Wrong input


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


def test_what_serving_costs_is_measured_once(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUICK, "-o", str(study), "--json", "--quiet"]
    described = json.loads(run(arguments, capsys)[1])["serving"]
    assert described["run"] == "lora-r4-lr0.01-s0"
    assert [latency["size"] for latency in described["latency"]] == [1, 32]
    assert all(latency[name] > 0 for latency in described["latency"] for name in ("base", "merged", "unmerged"))
    assert json.loads((study / "latency.json").read_text()) == described
    assert json.loads(run(arguments, capsys)[1])["serving"] == described
    (study / "latency.json").write_text("{")
    code, _, err = run(arguments, capsys)
    assert code == 1
    assert "delete it to measure again" in err


def test_full_fine_tuning_alone_serves_no_adapter(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        ["train", "--task", "planted", "--ranks", "", "--steps", "5", "-o", str(study), "--json"], capsys
    )
    assert code == 0
    assert json.loads(out)["serving"] is None
