"""The table of the lines of evidence: it is complete and the only list, and a row added from outside is everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure

import rankscope
from rankscope.cli.report_command import command
from rankscope.cli.train_command import command as train
from rankscope.evidence import lines as table
from rankscope.evidence.hypothesis import Hypothesis, hypothesis
from rankscope.evidence.lines import LINES, Line, select_lines
from rankscope.evidence.material import Material
from rankscope.evidence.study_page import build_document
from rankscope.plots.figure import new_figure
from rankscope.report.document import Picture, Section, Table
from rankscope.train.config import StudyConfig
from rankscope.train.study import Study, run_study
from rankscope.verdict import Verdict

EVIDENCE = Path(rankscope.__file__).parent / "evidence"
ROOMS = sorted(path.parent.name for path in EVIDENCE.glob("*/measure.py"))


class RunCount(msgspec.Struct, frozen=True):
    """A result from outside of the package."""

    runs: int
    pair: tuple[int, float]


def count_runs(material: Material) -> RunCount:
    return RunCount(len(material.study.records), (1, 0.5))


def count_verdicts(result: RunCount) -> list[Verdict]:
    return [
        Verdict(line="count", claim="Some run.", answer="no", sentence=f"{result.runs} made up.", refuted_by="None.")
    ]


def count_section(result: RunCount, verdicts: Sequence[Verdict]) -> Section:
    def draw() -> Figure:
        figure = new_figure(3, 2)
        figure.subplots().plot([0, result.runs])
        return figure

    data = Table("counted", "Runs.", ("runs",), [(result.runs,)])
    return Section(lead="A lead made up.", verdicts=verdicts, pictures=[Picture("counted", "c", "alt", draw, data)])


MADE_UP = Line("count", "A line made up", RunCount, count_runs, count_verdicts, count_section, decisive=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    config = StudyConfig(task="planted", ranks=(1, 4), seeds=(0, 1), steps=4, batch=8, evaluations=0, full_lrs=(1e-3,))
    return run_study(config, tmp_path_factory.mktemp("lines") / "study")


@pytest.fixture
def longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "LINES", (*LINES, MADE_UP))


def test_every_folder_of_a_line_has_a_row_and_every_row_a_folder() -> None:
    assert sorted(line.name for line in LINES) == ROOMS
    for name in ROOMS:
        assert {"__init__.py", "measure.py", "figure.py", "section.py"} <= {p.name for p in (EVIDENCE / name).iterdir()}


def test_names_and_titles_are_told_apart() -> None:
    assert len({line.name for line in LINES}) == len({line.title for line in LINES}) == len(LINES)
    assert {line.name for line in LINES}.isdisjoint(Hypothesis.__struct_fields__)
    assert [line.name for line in LINES if line.decisive] == ["performance", "truncation"]


def test_no_other_module_lists_the_lines() -> None:
    """Three names of lines in one string, or in strings of one literal, are a list of them."""
    names = [f'"{line.name}"' for line in LINES]
    for path in Path(rankscope.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path != EVIDENCE / "lines.py":
            assert sum(name in text for name in names) < 4, path
        assert "eight lines" not in text, path


def test_measuring_loads_neither_matplotlib_nor_the_page() -> None:
    script = (
        f"import sys; from rankscope.evidence import {', '.join(ROOMS)}\n"
        f"[room.verdicts for room in ({', '.join(ROOMS)})]\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'matplotlib' or m.startswith('rankscope.report')])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stdout == "[]\n", ended.stderr


def test_a_row_from_outside_is_measured_and_comes_back_from_json(study: Study, longer: None) -> None:
    result = hypothesis(study, ["count", "spectra"])
    assert result.count == RunCount(len(study.records), (1, 0.5))
    values = json.loads(json.dumps(result.to_json(), allow_nan=False))
    keys = list(values)
    assert keys[keys.index("missing") + 1 : keys.index("made_by")] == [*(line.name for line in LINES), "count"]
    assert values["performance"] is None
    again = Hypothesis.from_json(values)
    assert again.count == result.count
    assert again.to_json() == result.to_json()
    # Decisive, and the other decisive lines are missing.
    assert result.answer == "no"
    assert "count says no" in result.sentence


def test_a_row_from_outside_is_on_the_terminal_in_the_page_and_among_the_files(
    study: Study, tmp_path: Path, longer: None
) -> None:
    asked = [str(study.folder), "-o", str(tmp_path), "--lines", "count,spectra", "--quiet"]
    ended = CliRunner().invoke(command, asked, catch_exceptions=False)
    assert f"{len(study.records)} made up." in ended.output
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["count"]["runs"] == len(study.records)
    page = (tmp_path / "report.html").read_text("utf-8")
    for part in ("A line made up", "A lead made up.", f"{len(study.records)} made up.", 'id="count"'):
        assert part in page
    assert {path.suffix for path in (tmp_path / "figures").glob("counted.*")} == {".png", ".svg", ".csv"}
    help_text = CliRunner().invoke(command, ["--help"]).output
    assert all(line.name in help_text and line.title in help_text for line in (*LINES, MADE_UP))


def test_a_row_from_outside_that_lacks_its_runs_says_so(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(material: Material) -> RunCount:
        raise rankscope.RankscopeError("nothing to count")

    monkeypatch.setattr(table, "LINES", (*LINES, MADE_UP._replace(measure=lack)))
    result = hypothesis(study, ["count"])
    assert result.missing == {"count": "nothing to count"}
    assert result.count is None
    (section, *_) = build_document(result).sections
    assert (section.key, section.title, section.missing) == ("count", "A line made up", "nothing to count")


def test_lines_are_chosen_by_name_in_the_order_of_the_table() -> None:
    assert [line.name for line in select_lines(["spectra", "performance"])] == ["performance", "spectra"]
    assert select_lines() == list(LINES)
    with pytest.raises(rankscope.RankscopeError, match="no line of evidence is called 'rank'"):
        select_lines(["rank"])


def test_a_folder_is_a_study_too(study: Study) -> None:
    assert rankscope.hypothesis(study.folder, ["spectra"]).to_json() == hypothesis(study, ["spectra"]).to_json()


def test_what_has_no_line_is_no_attribute(study: Study) -> None:
    with pytest.raises(AttributeError, match="ranks"):
        hypothesis(study, ["spectra"]).ranks  # noqa: B018


# Work that is done once


def count_calls(monkeypatch: pytest.MonkeyPatch, *places: str) -> Counter[str]:
    """Calls of these functions by name, wherever they are looked up; ``places`` are "module.function"."""
    calls: Counter[str] = Counter()
    for place in places:
        module, _, name = place.rpartition(".")
        original = getattr(sys.modules[module], name)

        def counting(*given: Any, _original: Any = original, _name: str = name, **options: Any) -> Any:
            calls[_name] += 1
            return _original(*given, **options)

        monkeypatch.setattr(place, counting)
    return calls


def test_a_report_measures_each_thing_once(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(
        monkeypatch,
        "rankscope.train.results.spectrum",
        "rankscope.evidence.performance.measure.make_entry",
        "rankscope.evidence.performance.measure.verdict_on_gain",
        "rankscope.evidence.performance.figure.new_figure",
        "rankscope.report.document.encode",
    )
    asked = [str(study.folder), "-o", str(tmp_path), "--lines", "performance,effective", "--quiet"]
    assert CliRunner().invoke(command, asked, catch_exceptions=False).exit_code == 0
    labels = {record.run.label for record in study.best()}
    matrices = [record for record in study.done() if record.run.method != "base"]
    # Three pictures: two of performance, one of effective rank; each of them as png and as svg.
    assert calls == {
        "spectrum": len(matrices),
        "make_entry": len(labels),
        "verdict_on_gain": 1,
        "new_figure": 2,
        "encode": 6,
    }


def test_training_with_a_report_measures_spectra_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "rankscope.train.results.spectrum")
    grid = ["--ranks", "1", "--lrs", "0.01", "--full-lrs", "0.001", "--steps", "2", "--evaluations", "0"]
    asked = ["--task", "planted", *grid, "-o", str(tmp_path / "study"), "--report", "--quiet"]
    assert CliRunner().invoke(train, asked, catch_exceptions=False).exit_code == 0
    assert calls == {"spectrum": 2}
    assert (tmp_path / "study" / "report.html").exists()
