"""The instrument on planted truth, in small: it finds a low rank, says no to a high one, and counts what it did."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from rankscope.cli.calibrate_command import _cells, _summary, command
from rankscope.errors import FormatError
from rankscope.evidence.calibration import (
    CASES,
    DIM,
    RANKS,
    Calibration,
    CalibrationCase,
    Coverage,
    PlantedUpdate,
    calibrate,
    is_within_one_step,
)
from rankscope.train.planted import ROWS_PER_SPLIT, PlantedTask
from rankscope.verdict import LOW_RANK_SHARE


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    low, high = PlantedUpdate(rank=2, spectrum="flat", noise=0.5), PlantedUpdate(rank=64, spectrum="flat", noise=0.5)
    return calibrate(
        tmp_path_factory.mktemp("calibration"), [low, high], seeds=6, lines=("performance", "truncation", "spectra")
    )


def test_a_low_rank_is_found_and_a_high_one_refused(small: Calibration) -> None:
    low, high = small.cases
    assert (low.needed, low.performance, low.truncation, low.answer) == (2, 2, 2, "yes")
    assert low.counted == pytest.approx(2, abs=0.5)
    assert (high.needed, high.answer) == (58, "no")
    assert small.recovery_counts == (4, 4)
    assert small.correct_counts == (2, 2)
    assert small.wrong_cases == ()


def test_intervals_are_counted(small: Calibration) -> None:
    # Two triples of seeds for three ranks and full fine-tuning.
    assert small.coverage.intervals == 8
    assert 0 < small.coverage.held <= 8


def test_json_there_and_back(small: Calibration) -> None:
    text = json.dumps(small.to_json(), allow_nan=False)
    assert Calibration.from_json(json.loads(text)) == small
    with pytest.raises(FormatError, match="schema"):
        Calibration.from_json({"schema": "another"})


def test_what_the_command_says(small: Calibration) -> None:
    cells = _cells(small.cases[1])
    assert cells[:3] == ["64 flat", 0.5, 58]
    assert "no" in cells
    assert "4 of 4" in _summary(small)[0]
    assert "none the wrong way round" in _summary(small)[1]


@pytest.mark.parametrize(
    ("rank", "spectrum", "needed"),
    [(10, "flat", 9), (4, "even", 4), (8, "even", 7), (1, "flat", 1), (4, "decaying", 3)],
)
def test_the_rank_that_a_plant_needs(rank: int, spectrum: str, needed: int) -> None:
    """By hand: energies 4, 25/9, 16/9, 1 hold .895 in the first three; 1, 1/4, 1/9, 1/16 hold .878 in the first two and
    .956 in three."""
    plant = PlantedUpdate(rank=rank, spectrum=spectrum, noise=0.5)  # type: ignore[arg-type]
    values = PlantedTask(rank, 0.5, spectrum, count=1).singular_values.numpy() ** 2  # type: ignore[arg-type]
    by_hand = next(k for k in range(1, rank + 1) if values[:k].sum() >= 0.9 * values.sum() - 1e-5)
    assert plant.needed_rank() == by_hand == needed


def test_the_planted_update_has_the_planted_spectrum() -> None:
    for spectrum in ("even", "flat", "decaying"):
        task = PlantedTask(5, 0.5, spectrum, count=1)  # type: ignore[arg-type]
        for update in task.updates.values():
            found = np.linalg.svd(update.double().numpy(), compute_uv=False)
            assert found[:5] == pytest.approx(task.singular_values.numpy(), rel=1e-5)
            assert found[5:].max() < 1e-5


def test_noise_can_bury_a_plant() -> None:
    assert PlantedUpdate(rank=4, spectrum="flat", noise=0.5).is_visible(ROWS_PER_SPLIT)
    assert not PlantedUpdate(rank=4, spectrum="flat", noise=40.0).is_visible(ROWS_PER_SPLIT)
    # Just above and below: σ = 1.5, the edge noise/√ROWS·(√64 + √96).
    edge = 1.5 * ROWS_PER_SPLIT**0.5 / (8 + 96**0.5)
    assert PlantedUpdate(rank=4, spectrum="flat", noise=0.99 * edge).is_visible(ROWS_PER_SPLIT)
    assert not PlantedUpdate(rank=4, spectrum="flat", noise=1.01 * edge).is_visible(ROWS_PER_SPLIT)


@pytest.mark.parametrize(
    ("found", "needed", "within"),
    [(4, 4, True), (8, 4, True), (2, 4, True), (16, 4, False), (1, 4, False), (64, 44, True), (None, 4, False)],
)
def test_within_a_step_of_the_grid(found: int | None, needed: int, within: bool) -> None:
    assert is_within_one_step(found, needed) is within


def test_the_cases_have_both_answers() -> None:
    answers = [case.expected_answer for case in CASES]
    assert answers.count("yes") >= 5
    assert answers.count("no") >= 5
    assert {case.spectrum for case in CASES} == {"flat", "even", "decaying"}
    assert len({case.noise for case in CASES}) >= 3
    assert RANKS[-1] == DIM
    assert LOW_RANK_SHARE * DIM in RANKS


def test_a_wrong_answer_is_counted_and_ends_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CalibrationCase(
        plant=CASES[0],
        needed=1,
        visible=True,
        expected="yes",
        answer="no",
        performance=8,
        truncation=None,
        counted=None,
        within={"performance": False, "truncation": False},
        answers={"performance": "no"},
    )
    found = Calibration(cases=(case,), coverage=Coverage(seeds=3, intervals=1, held=1))
    assert found.wrong_cases == (CASES[0],)
    assert found.recovery_counts == (0, 2)
    monkeypatch.setattr("rankscope.evidence.calibration.calibrate", lambda *_, **__: found)
    ended = CliRunner().invoke(command, ["--quick", "--quiet"])
    assert ended.exit_code == 1
    assert "the wrong way round: 1" in ended.output


def test_training_is_what_the_truth_assumes() -> None:
    """White inputs: their second moments are the identity, or the share of the gain would not be that of energy."""
    inputs = PlantedTask(4, 0.5).inputs["train"].double()
    moments = inputs.T @ inputs / len(inputs)
    assert float((moments - torch.eye(len(moments), dtype=torch.float64)).abs().max()) < 0.06
