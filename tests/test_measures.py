"""The tables of measures and of columns: they are complete, and a row added from outside is shown everywhere."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from adapters import linear, write_adapter
from command_line import run
from makers import normal, planted

import rankscope
from rankscope.analysis.spectrum_tables import layer_table
from rankscope.cli import study_output
from rankscope.evidence.effective.measure import measure_names, random_measures
from rankscope.measures import MEASURES, Measure, measures_shown
from rankscope.plots import plot_spectra
from rankscope.report import spectrum_page
from rankscope.sketch import Sketch
from rankscope.spectra import Spectrum
from rankscope.table import Column, Table
from rankscope.updates import Dense

MADE_UP = Measure(
    "double_rank",
    "doubled",
    lambda spectrum: 2.0 * spectrum.stable_rank,
    "2Σσ²/σ₁²",
    shown={"layers": 9, "medians": 9, "plot": 9, "summary": 9, "noise": 9, "study": 9, "evidence": 9},
    mark="^",
)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Measure:
    monkeypatch.setitem(MEASURES, MADE_UP.name, MADE_UP)
    return MADE_UP


def test_the_table_of_measures_is_complete() -> None:
    spectrum = Spectrum.of(planted((6, 5), (3.0, 1.0)))
    for name, measure in MEASURES.items():
        assert measure.name == name
        assert measure.compute(spectrum) == getattr(spectrum, name)
        assert measure.title
        assert measure.definition
        assert measure.bound is not None, f"{name} has no bounds in a sketch"
        assert measure.bound != "share" or 0 < measure.share < 1
    assert len({measure.title for measure in MEASURES.values()}) == len(MEASURES)
    marks = [measure.mark for measure in measures_shown("plot")]
    assert len(set(marks)) == len(marks)


def test_the_order_at_a_place_is_its_own() -> None:
    layers = [measure.name for measure in measures_shown("layers")]
    assert layers == ["numerical_rank", "stable_rank", "participation_ratio", "entropy_rank", "k90"]
    assert [measure.title for measure in measures_shown("study")] == ["entropy", "stable", "k90"]
    assert [measure.title for measure in measures_shown("callback")] == ["stable", "entropy", "k90"]


def test_positions_at_a_place_are_all_different() -> None:
    for place in {place for measure in MEASURES.values() for place in measure.shown}:
        positions = [measure.shown[place] for measure in measures_shown(place)]
        assert positions == list(range(1, len(positions) + 1)), place


@pytest.mark.usefixtures("made_up")
def test_a_measure_from_outside_is_on_the_terminal_in_json_and_in_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "a", linear("q", out=4, n=5, r=2, seed=1))
    path = str(tmp_path / "a")
    measures = json.loads(run(capsys, "spectrum", path, "--json")[1])["layers"][0]["measures"]
    assert measures["double_rank"] == 2 * measures["stable_rank"]
    (row,) = csv.DictReader(io.StringIO(run(capsys, "spectrum", path, "--csv")[1]))
    assert float(row["double_rank"]) == measures["double_rank"]
    header, first, *_ = run(capsys, "spectrum", path)[1].splitlines()
    assert "doubled" in header.split()
    assert f"{measures['double_rank']:.4g}" in first.split()


@pytest.mark.usefixtures("made_up")
def test_a_measure_from_outside_is_on_the_page_in_the_plot_and_in_notebooks() -> None:
    result = rankscope.spectrum({"fc": Dense(normal(12, 9))})
    layer = result["fc"]
    document = spectrum_page.build_document([result])
    (ranks,) = (table for section in document.sections for table in section.tables if table.name == "ranks-1")
    cells = dict(zip(ranks.header, ranks.rows[0], strict=True))
    assert cells["doubled"] == layer.measures["double_rank"]
    assert layer.noise is not None
    assert cells["doubled, noise"] == layer.noise["double_rank"]
    assert "doubled: 2Σσ²/σ₁²." in " ".join(document.sections[0].notes)
    assert ", doubled " in document.sections[0].lead
    assert "double_rank" in repr(result)
    assert "<th>doubled</th>" in result._repr_html_()
    assert "noise doubled" in layer_table(result).header
    drawn = [line for axes in plot_spectra([result]).axes for line in axes.lines if line.get_marker() == "^"]
    assert [float(line.get_xdata()[0]) for line in drawn] == [result.total.median["double_rank"]]  # type: ignore[index]


@pytest.mark.usefixtures("made_up")
def test_a_measure_from_outside_is_in_the_tables_of_a_study_and_beside_performance() -> None:
    for columns in (study_output.run_columns(), study_output.label_columns()):
        assert "doubled" in [column.titles.get("terminal") for column in columns]
    assert measure_names()[-1] == "double_rank"
    assert set(random_measures([(6, 5, 2)])) == set(measure_names())


@pytest.mark.usefixtures("made_up")
def test_a_measure_without_a_rule_is_bounded_as_any_rank() -> None:
    update = Dense(normal(60, 50))
    low, high = Sketch.of(update, 3).bounds()["double_rank"]
    assert (low, high) == (0.0, 50.0)


def test_a_table_has_the_columns_of_its_place() -> None:
    columns: list[Column[dict[str, Any]]] = [
        Column.of(lambda item: item["name"], total="all", csv="name", terminal="layer"),
        Column.of(lambda item: item["p"], text="p", csv="p_value", terminal="p"),
        Column.of(lambda item: item["norm"], total=1.23456789, csv="norm", terminal="‖a‖"),
        Column.of(lambda item: 1 / 0, page="never asked for"),
    ]
    items = [{"name": "q", "p": 1e-20, "norm": 2 / 3}, {"name": "k", "p": None, "norm": 7}]
    whole = Table.of(columns, items, "csv", "a caption")
    assert (whole.name, whole.caption, whole.header) == ("csv", "a caption", ("name", "p_value", "norm"))
    assert whole.rows == [["q", 1e-20, 2 / 3], ["k", None, 7]], "numbers keep all their digits"
    assert whole.total is None
    shown = Table.of(columns, items, "terminal", has_total=True)
    assert shown.header == ("layer", "p", "‖a‖")
    assert shown.text_rows() == [["q", "<1e-12", "0.6667"], ["k", "", "7"], ["all", "", "1.235"]]
    assert Table.of([columns[0].only("csv"), columns[1]], items, "terminal").header == ("p",)
