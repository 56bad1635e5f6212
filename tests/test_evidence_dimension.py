"""Intrinsic dimension: the planted answer d/D, the shares recomputed by hand, and the rules of the verdict."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rankscope.evidence.dimension.figure import plot_dimension
from rankscope.evidence.dimension.measure import (
    DimensionCurve,
    DimensionPoint,
    IntrinsicDimension,
    measure_dimension,
    verdicts,
)
from rankscope.evidence.dimension.section import build_section
from rankscope.evidence.material import Material
from rankscope.inference import Interval, first_reaching
from rankscope.plots import save
from rankscope.result import json_values
from rankscope.train.config import StudyConfig
from rankscope.train.planted import PlantedTask
from rankscope.train.study import Study, run_study
from rankscope.verdict import MissingEvidenceError

GRID: dict[str, Any] = {"task": "planted", "ranks": (1, 4), "dims": (64, 1024), "seeds": (0, 1), "evaluations": 0}
TRAINING = {"steps": 60, "batch": 64}


def trained(folder: Path, **changes: Any) -> Study:
    return run_study(StudyConfig(**{**GRID, **TRAINING, **changes}), folder)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    methods = ("lora", "subspace", "said")
    return trained(tmp_path_factory.mktemp("planted") / "study", methods=methods)


@pytest.fixture(scope="module")
def found(study: Study) -> IntrinsicDimension:
    return measure_dimension(Material(study))


# A study with a known answer


def test_a_random_subspace_holds_its_part_and_lora_the_planted_rank(found: IntrinsicDimension) -> None:
    """Each direction of 12 288 is worth as much. The planted rank is 4: two maps at 4 directions are 1 280 numbers."""
    direct, layered, lora = found.curves
    assert [curve.method for curve in found.curves] == ["subspace", "said", "lora"]
    assert (found.parameters, found.layers) == (64 * 96 + 96 * 64, 2)
    assert [(size.size, size.trained) for size in direct.sizes] == [(64, 64), (1024, 1024)]
    assert [(size.size, size.trained) for size in lora.sizes] == [(1, 320), (4, 1280)]
    for curve in (direct, layered):
        assert curve.sizes[1].share.value == pytest.approx(1024 / 12288, abs=0.03)
        assert curve.sizes[0].share.value == pytest.approx(64 / 12288, abs=0.02)
        assert curve.d90.rank is None
    assert lora.d90.rank == 1280
    assert [verdict.answer for verdict in verdicts(found)] == ["no", "no"]


def test_few_numbers_make_no_low_rank(found: IntrinsicDimension) -> None:
    """64 numbers: an update of the rank of noise; 1 280 numbers of LoRA: rank 4 at most."""
    assert 56 < found.noise_rank < 59
    few, many = found.curves[0].sizes[0], found.curves[2].sizes[1]
    assert few.rank == pytest.approx(found.noise_rank, rel=0.05)
    assert many.rank is not None
    assert many.rank <= 4


def test_the_numbers_are_those_of_the_runs(study: Study, found: IntrinsicDimension) -> None:
    scores = {(r.run.label, r.run.seed): study.score(r) for r in study.best()}
    gains = {name: {s: scores["base", s] - scores[name, s] for s in (0, 1)} for name in ("full", "subspace d = 1024")}
    size = found.curves[0].sizes[1]
    ratio = sum(gains["subspace d = 1024"].values()) / sum(gains["full"].values())
    assert size.share.value == pytest.approx(ratio)
    assert size.score.value == pytest.approx(statistics.fmean(scores["subspace d = 1024", s] for s in (0, 1)))
    assert size.seeds == found.full_seeds == 2
    assert found.full.value == pytest.approx(statistics.fmean(scores["full", s] for s in (0, 1)))
    assert found.score_at(1.0) == pytest.approx(found.full.value)
    assert found.score_at(0.0) == found.base == scores["base", 0]
    assert found.share_at(found.score_at(0.3)) == pytest.approx(0.3)


def test_heads_are_no_part_of_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlantedTask, "heads", ("second",))
    study = trained(tmp_path / "study", methods=("subspace",), dims=(64,), steps=20)
    found = measure_dimension(Material(study))
    assert (found.parameters, found.layers) == (64 * 96, 1)
    assert [size.trained for size in found.curves[0].sizes] == [64]
    assert [r.cost.trainable for r in study.done() if r.run.is_subspace and r.cost] == [64 + 96 * 64] * 2


def test_what_is_missing_is_said(tmp_path: Path, study: Study) -> None:
    without = trained(tmp_path / "lora", methods=("lora",), ranks=(1,), steps=2)
    with pytest.raises(MissingEvidenceError, match="--methods subspace --dims 16,64"):
        measure_dimension(Material(without))
    alone = trained(tmp_path / "alone", methods=("subspace",), dims=(8,), steps=2, full=False)
    with pytest.raises(MissingEvidenceError, match="no full fine-tuning is done"):
        measure_dimension(Material(alone))
    worse = trained(tmp_path / "worse", methods=("subspace",), dims=(8,), steps=2, full_lrs=(1.0,))
    with pytest.raises(MissingEvidenceError, match="full fine-tuning gained nothing"):
        measure_dimension(Material(worse))


def test_seeds_that_full_fine_tuning_lacks_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    settings = {"methods": ("subspace",), "dims": (8, 16), "steps": 20}
    trained(folder, **settings, seeds=(0,))
    other = trained(folder, **settings, seeds=(1,), full=False)
    found = measure_dimension(Material(other))
    assert [size.seeds for size in found.curves[0].sizes] == [1, 1]


def test_seeds_without_a_gain_to_share_are_no_evidence(tmp_path: Path) -> None:
    """Full fine-tuning gains over both seeds, but nothing over the one that the subspace has."""
    folder = tmp_path / "study"
    other = trained(folder, methods=("subspace",), dims=(8,), steps=20)
    for run in folder.glob("runs/subspace-*-s1"):
        shutil.rmtree(run)
    path = next(folder.glob("runs/full-*-s0/run.json"))
    record = json.loads(path.read_text())
    base = json.loads((folder / "runs" / "base-s0" / "run.json").read_text())
    path.write_text(json.dumps({**record, "metrics": base["metrics"]}))
    with pytest.raises(MissingEvidenceError, match="no run in a random subspace has a seed"):
        measure_dimension(Material(Study(other.folder)))


def test_it_comes_back_from_json(found: IntrinsicDimension) -> None:
    assert msgspec.convert(json_values(found), IntrinsicDimension) == found


# The rules

PARAMETERS = 100_000


def size(d: int, share: float, half: float | None = 0.02, edge: Any = None) -> DimensionPoint:
    interval = Interval(share) if half is None else Interval(share, share - half, share + half)
    seeds = 1 if half is None else 3
    score = Interval(2.0 - share)
    return DimensionPoint(size=d, trained=d, lr=0.003, edge=edge, seeds=seeds, score=score, share=interval, rank=50.0)


def made(*sizes: DimensionPoint, full_edge: Any = None) -> IntrinsicDimension:
    d90 = first_reaching([(one.trained, one.share) for one in sizes], 0.9)
    lora = DimensionCurve(method="lora", sizes=(size(2000, 0.95),), d90=first_reaching([(2000, Interval(0.95))], 0.9))
    return IntrinsicDimension(
        metric="loss",
        higher_is_better=False,
        measure="entropy_rank",
        parameters=PARAMETERS,
        layers=7,
        base=2.0,
        full=Interval(1.0, 0.98, 1.02),
        full_edge=full_edge,
        full_seeds=3,
        full_rank=40.0,
        noise_rank=52.0,
        curves=(DimensionCurve(method="subspace", sizes=sizes, d90=d90), lora),
    )


CASES = {
    "enough below the line": ((size(100, 0.5), size(1000, 0.93)), "yes"),
    "enough at the line, and not far below": ((size(100, 0.1), size(999, 0.93), size(5000, 0.99)), "yes"),
    "enough, but only above the line": ((size(900, 0.5), size(1001, 0.93)), "undecided"),
    "not enough at the line": ((size(100, 0.1), size(1000, 0.8)), "no"),
    "not enough above it": ((size(100, 0.1), size(4000, 0.8)), "no"),
    "enough later, but not above the line": ((size(100, 0.1), size(4000, 0.8), size(9000, 0.97)), "no"),
    "not tried up to the line": ((size(100, 0.1), size(999, 0.3)), "undecided"),
    "tried only above the line": ((size(2000, 0.95),), "undecided"),
    "the interval holds the share": ((size(1000, 0.91),), "undecided"),
    "the interval holds the share from below": ((size(1000, 0.89),), "undecided"),
    "one seed": ((size(100, 0.1, None), size(1000, 0.99, None)), "undecided"),
    "not enough, at an end of the rates": ((size(100, 0.1), size(4000, 0.8, edge="high")), "undecided"),
    "not enough, and an end of the rates below": ((size(100, 0.1, edge="low"), size(4000, 0.8)), "no"),
    "enough, at an end of the rates": ((size(1000, 0.95, edge="low"),), "yes"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_answer_follows_from_the_numbers(case: str) -> None:
    sizes, expected = CASES[case]
    (verdict,) = verdicts(made(*sizes))
    assert verdict.answer == expected, verdict.sentence
    assert "1,000, 0.01 of 100,000" in verdict.sentence


def test_full_fine_tuning_at_an_end_of_its_rates_may_gain_more() -> None:
    """Then shares are too high: enough is in doubt, and not enough is not."""
    assert verdicts(made(size(1000, 0.95), full_edge="high"))[0].answer == "undecided"
    assert verdicts(made(size(1000, 0.5), full_edge="high"))[0].answer == "no"


def test_the_verdict_carries_d90_and_its_ends() -> None:
    (verdict,) = verdicts(made(size(100, 0.5), size(800, 0.89), size(900, 0.91), size(1000, 0.95)))
    assert (verdict.value, verdict.low, verdict.high) == (900, 800, 1000)
    assert "d = 1,000 reaches 0.95 (0.93 to 0.97)" in verdict.sentence
    assert "3 seeds" in verdict.sentence
    (alone,) = verdicts(made(size(100, 0.5, None), size(900, 0.95, None)))
    assert (alone.value, alone.low, alone.high) == (900, None, None)
    assert "Not enough seeds" in alone.sentence
    assert "1 seed)" in alone.sentence


# Shown


def test_the_section_says_what_the_picture_shows(found: IntrinsicDimension) -> None:
    shown = build_section(found, verdicts(found))
    (picture,) = shown.pictures
    assert [len(row) for row in picture.data.rows] == [len(picture.data.header)] * 7
    assert "lora" not in picture.alt
    assert "LoRA reaches 90% of the gain with 1,280 numbers" in picture.alt
    assert "random subspace does not reach 90% of the gain; with 1,024 it has 0.0" in picture.alt
    assert any("Dimension is not rank" in note for note in shown.notes)
    assert any("pays 2 of its d numbers" in note for note in shown.notes)
    assert any("LoRA with 320 numbers" in note and "nearest in size, of 1,024," in note for note in shown.notes)
    assert len(shown.verdicts) == 2


def test_the_picture_has_both_curves_on_one_axis(found: IntrinsicDimension, tmp_path: Path) -> None:
    figure = plot_dimension(found)
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.get_lines()}
    assert list(lines["LoRA"].get_xdata()) == [320, 1280]
    assert list(lines["random subspace"].get_xdata()) == [64, 1024]
    assert list(lines["full fine-tuning"].get_xdata()) == [12288]
    assert list(lines["90% of the gain"].get_ydata()) == [0.9, 0.9]
    assert list(lines["1% of all numbers"].get_xdata()) == [122.88, 122.88]
    assert "numbers trained" in left.get_xlabel()
    assert "noise" in "".join(text.get_text() for text in right.texts)
    assert left.child_axes[0].get_ylabel() == "loss (lower is better)"
    assert save(figure, tmp_path / "dimension.png").stat().st_size > 10_000


def test_a_rate_at_an_end_is_hollow() -> None:
    figure = plot_dimension(made(size(100, 0.5), size(1000, 0.9, edge="high")))
    hollow = [line for line in figure.axes[0].get_lines() if line.get_markerfacecolor() == "white"]
    assert [float(line.get_xdata()[0]) for line in hollow] == [1000]
