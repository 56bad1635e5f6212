"""A whole study as evidence: every line, what is missing, and the command that writes it as a page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from rankscope.cli.report_command import command
from rankscope.errors import ConfigError, FormatError, RankscopeError
from rankscope.evidence.hypothesis import Hypothesis, hypothesis
from rankscope.evidence.lines import LINES
from rankscope.train.config import StudyConfig
from rankscope.train.study import Study, run_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    config = StudyConfig(task="planted", ranks=(2, 8), seeds=(0, 1), steps=120, batch=64, evaluations=0)
    return run_study(config, tmp_path_factory.mktemp("evidence") / "a <study>")


@pytest.fixture(scope="module")
def found(study: Study) -> Hypothesis:
    return hypothesis(study)


def without(study: Study, folder: Path, *patterns: str) -> Study:
    """A copy of a study without the runs that fit."""
    copy = folder / "copy"
    shutil.copytree(study.folder, copy)
    for pattern in patterns:
        for run in copy.glob(f"runs/{pattern}"):
            shutil.rmtree(run)
    return Study(copy)


def test_every_line_answers_but_those_without_runs(found: Hypothesis) -> None:
    assert set(found.missing) == {"dimension"}
    assert "--method" in found.missing["dimension"]
    assert {verdict.line for verdict in found.verdicts} == {line.name for line in LINES} - {"dimension"}
    # Four planted directions of 64, two seeds: nothing here says that more are needed.
    assert found.answer != "no"
    assert found.runs == {"done": 8}


def test_each_verdict_says_what_would_refute_it(found: Hypothesis) -> None:
    for verdict in found.verdicts:
        assert verdict.claim
        assert verdict.refuted_by
        assert verdict.sentence.rstrip(".")
        if verdict.low is not None and verdict.value is not None:
            assert verdict.low <= verdict.value


def test_json_there_and_back(found: Hypothesis) -> None:
    text = json.dumps(found.to_json(), allow_nan=False)
    again = Hypothesis.from_json(json.loads(text))
    assert again.to_json() == found.to_json()
    with pytest.raises(FormatError, match="schema"):
        Hypothesis.from_json({"schema": "rankscope.spectrum/1"})


def test_a_notebook_escapes_names(found: Hypothesis) -> None:
    assert "a &lt;study&gt;" in found._repr_html_()


def test_lines_can_be_chosen(study: Study) -> None:
    chosen = hypothesis(study, ["spectra"])
    assert chosen.performance is None
    assert chosen.spectra is not None
    assert chosen.answer == "undecided"
    with pytest.raises(ConfigError, match="no line of evidence is called 'rank'"):
        hypothesis(study, ["rank"])


def test_without_full_fine_tuning(study: Study, tmp_path: Path) -> None:
    some = hypothesis(without(study, tmp_path, "full-*"))
    assert {"truncation", "agreement"} <= set(some.missing)
    assert "full fine-tuning" in some.missing["truncation"]
    assert some.performance is not None
    assert some.answer == "undecided"


def test_without_adapters(study: Study, tmp_path: Path) -> None:
    some = hypothesis(without(study, tmp_path, "lora-*"))
    assert "no LoRA run is done" in some.missing["overlap"]
    assert some.truncation is not None


def test_with_one_run(study: Study, tmp_path: Path) -> None:
    some = hypothesis(without(study, tmp_path, "full-*", "lora-r8-*", "*-s1"))
    assert some.verdicts
    assert some.answer == "undecided"


def test_with_a_run_that_diverged(study: Study, tmp_path: Path) -> None:
    copy = without(study, tmp_path)
    path = next(copy.folder.glob("runs/lora-r8-*-s1/run.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "diverged", "metrics": {}}))
    some = hypothesis(Study(copy.folder))
    assert some.runs == {"done": 7, "diverged": 1}
    assert some.performance is not None


def test_nothing_has_ended(study: Study, tmp_path: Path) -> None:
    with pytest.raises(RankscopeError, match="no run of this study has ended"):
        hypothesis(without(study, tmp_path, "full-*", "lora-*"))


def test_other_data_leaves_the_lines_that_need_no_model(study: Study, tmp_path: Path) -> None:
    copy = without(study, tmp_path)
    path = copy.folder / "study.json"
    path.write_text(path.read_text().replace("rank 4, noise", "rank 5, noise"))
    some = hypothesis(Study(copy.folder), lines=["truncation", "spectra"])
    assert "was begun with another data" in some.missing["truncation"]


def test_the_command_writes_page_results_and_figures(study: Study, tmp_path: Path) -> None:
    place = tmp_path / "out"
    asked = [str(study.folder), "-o", str(place), "--lines", "performance,spectra", "--quiet"]
    ended = CliRunner().invoke(command, asked, catch_exceptions=False)
    assert ended.exit_code == 0
    page = (place / "report.html").read_text(encoding="utf-8")
    results = json.loads((place / "results.json").read_text(encoding="utf-8"))
    assert results["schema"] == "rankscope.report/1"
    assert "a &lt;study&gt;" in page
    assert "a <study>" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    stems = {path.stem for path in (place / "figures").glob("*.png")}
    assert stems
    for suffix in ("svg", "csv"):
        assert stems <= {path.stem for path in (place / "figures").glob(f"*.{suffix}")}
    assert "performance" in ended.output
    assert results["sentence"] in ended.output


def test_the_command_prints_json(study: Study, tmp_path: Path) -> None:
    asked = [str(study.folder), "-o", str(tmp_path), "--lines", "spectra", "--json", "--quiet"]
    ended = CliRunner().invoke(command, asked, catch_exceptions=False)
    assert json.loads(ended.stdout) == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("content", ["[1]", '{"train_losses": ["a", null]}', '{"train_losses": 3}', "{", ""])
def test_a_damaged_history_costs_one_number(study: Study, tmp_path: Path, content: str) -> None:
    copy = without(study, tmp_path)
    for path in copy.folder.glob("runs/*/metrics.jsonl"):
        path.write_text(content)
    found = hypothesis(copy, ["performance"])
    assert found.performance is not None
    assert {entry.gap for entry in found.performance.entries} == {None}


def test_weights_that_were_deleted_cost_the_lines_that_read_them(study: Study, tmp_path: Path) -> None:
    copy = without(study, tmp_path)
    for path in [*copy.folder.glob("runs/lora-*-s1/adapter"), *copy.folder.glob("runs/full-*")]:
        shutil.rmtree(path) if path.name == "adapter" else (path / "update.safetensors").unlink()
    found, whole = (hypothesis(one) for one in (copy, study))
    assert found.performance == whole.performance
    assert {"effective", "truncation", "overlap", "agreement"} <= set(found.missing)
    assert all("the weights of" in reason for line, reason in found.missing.items() if line != "dimension")
    assert found.spectra is not None
    assert found.spectra.seeds == {"r = 2": 1, "r = 8": 1}
    assert hypothesis(copy, lines=["performance"]).verdicts == hypothesis(study, lines=["performance"]).verdicts


@pytest.mark.parametrize("name", ["full-*-s0/update.safetensors", "lora-r8-*-s1/adapter/adapter_config.json"])
def test_a_damaged_study_is_an_error_and_no_lack_of_evidence(study: Study, tmp_path: Path, name: str) -> None:
    copy = without(study, tmp_path)
    path = next(copy.folder.glob(f"runs/{name}"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FormatError, match=path.name):
        hypothesis(copy, lines=["spectra"])
    ended = CliRunner().invoke(command, [str(copy.folder), "-o", str(tmp_path / "out"), "--quiet"])
    assert isinstance(ended.exception, FormatError)
    assert not (tmp_path / "out").exists()
