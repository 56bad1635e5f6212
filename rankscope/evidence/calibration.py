"""The whole instrument on planted truth: what was planted, what each line of evidence said, what intervals cover.

The planted task (``train/planted.py``) is linear with white inputs, so the truth is known in closed form: an update of
rank r can reach the share Σ_{l≤r}σ² / Σσ² of the gain, and no more. A case with a high planted rank is there to be
answered "no": an instrument that cannot say no proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import msgspec
import numpy as np

from rankscope.analysis.display import html_table
from rankscope.evidence.hypothesis import Hypothesis, hypothesis
from rankscope.evidence.spectra.measure import FULL_LABEL
from rankscope.inference import mean_interval
from rankscope.noise import noise_edge
from rankscope.result import Result
from rankscope.table import Table
from rankscope.track import Track
from rankscope.train.config import PlantedSpectrum, StudyConfig, make_study_config
from rankscope.train.planted import ROWS_PER_SPLIT, PlantedModel, PlantedTask
from rankscope.train.study import Study, run_study
from rankscope.verdict import GAIN_SHARE, LOW_RANK_SHARE, Answer

SCHEMA = "rankscope.calibration/1"
RANKS = (1, 2, 4, 8, 16, 32, 64)
DIM = min(min(shape) for shape in PlantedModel.SHAPES)
TRAINING: dict[str, Any] = {"batch": 64, "steps": 300, "evaluations": 0}


class PlantedUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """An update to plant: ``rank`` singular values in the form ``spectrum``, answers with ``noise``."""

    rank: int
    spectrum: PlantedSpectrum
    noise: float

    def study_config(self, **settings: Any) -> StudyConfig:
        planted = {"planted_rank": self.rank, "planted_spectrum": self.spectrum, "planted_noise": self.noise}
        return make_study_config({"task": "planted", **planted, **TRAINING, **settings}, f"plant {self}")

    def needed_rank(self) -> int:
        """The fewest directions that hold ``GAIN`` of the planted energy: the rank that the task needs."""
        return int(np.argmax(self._shares() >= GAIN_SHARE - 1e-6)) + 1

    def _shares(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        energies = PlantedTask(self.rank, self.noise, self.spectrum, count=1).singular_values.double().numpy() ** 2
        shares: np.ndarray[Any, np.dtype[np.float64]] = np.cumsum(energies) / energies.sum()
        return shares

    def is_visible(self, samples: int) -> bool:
        """Whether every planted σ stands above the edge of the noise that so many samples leave in the update.

        Least squares on white inputs errs by noise/√samples an entry.
        """
        values = PlantedTask(self.rank, self.noise, self.spectrum, count=1).singular_values
        return float(values.min()) > max(noise_edge(self.noise / samples**0.5, shape) for shape in PlantedModel.SHAPES)

    @property
    def expected_answer(self) -> Answer:
        """What an instrument that works says of it: whether the rank it needs is low."""
        return "yes" if self.needed_rank() <= LOW_RANK_SHARE * DIM else "no"


CASES = (
    *(PlantedUpdate(rank=rank, spectrum="flat", noise=0.5) for rank in (1, 2, 4, 8, 32, 48, 64)),
    *(PlantedUpdate(rank=rank, spectrum="even", noise=0.5) for rank in (2, 5, 24, 56)),
    *(PlantedUpdate(rank=rank, spectrum="decaying", noise=0.5) for rank in (4, 16)),
    *(PlantedUpdate(rank=rank, spectrum="flat", noise=noise) for rank in (4, 48) for noise in (0.1, 2.0)),
    PlantedUpdate(rank=4, spectrum="flat", noise=40.0),
)
"""Low and high ranks, three forms of spectrum, noise from a fifth of the default to where it buries the signal."""


class CalibrationCase(msgspec.Struct, frozen=True, kw_only=True):
    """One planted update and what the instrument said of it.

    ``needed`` is the planted truth, ``performance`` and ``truncation`` the ranks that the sweep and the cut full update
    say reach ``GAIN``, ``counted`` the mean number of singular values of the full update above its noise edge.
    ``within`` one step of the grid of ranks: whether ``performance`` and ``truncation`` are, None where the signal does
    not stand above the noise. ``answers``: the first verdict of each line.
    """

    plant: PlantedUpdate
    needed: int
    visible: bool
    expected: Answer
    answer: Answer
    performance: int | None
    truncation: int | None
    counted: float | None
    within: dict[str, bool] | None
    answers: dict[str, Answer]


class Coverage(msgspec.Struct, frozen=True, kw_only=True):
    """How often a t interval over three seeds held the mean over ``seeds`` seeds: of ``intervals``, ``held`` did.

    Intervals are of disjoint triples of seeds, at several ranks; nominally 95 % hold, a little less as the mean of all
    is itself uncertain.
    """

    seeds: int
    intervals: int
    held: int


class Calibration(Result, frozen=True, kw_only=True):
    """The instrument on planted truth; ``to_json`` and ``from_json`` are inverses."""

    schemas: ClassVar = (SCHEMA,)
    schema: str = SCHEMA
    cases: tuple[CalibrationCase, ...]
    coverage: Coverage

    @property
    def recovery_counts(self) -> tuple[int, int]:
        """How many planted ranks the sweep and the truncation read within one step of the grid, and of how many."""
        within = [hit for case in self.cases if case.within is not None for hit in case.within.values()]
        return sum(within), len(within)

    @property
    def correct_counts(self) -> tuple[int, int]:
        """How many visible cases were answered as planted, of how many; "undecided" is not."""
        judged = [case.answer == case.expected for case in self.cases if case.visible]
        return sum(judged), len(judged)

    @property
    def wrong_cases(self) -> tuple[PlantedUpdate, ...]:
        """The cases, visible or not, that were answered "yes" for "no" or "no" for "yes"."""
        return tuple(case.plant for case in self.cases if case.answer not in ("undecided", case.expected))

    def __repr__(self) -> str:
        (hits, of), (right, judged) = self.recovery_counts, self.correct_counts
        return (
            f"Calibration(planted ranks within one step of the grid: {hits} of {of}; answered as planted: {right} of "
            f"{judged}; intervals that held: {self.coverage.held} of {self.coverage.intervals})"
        )

    def _repr_html_(self) -> str:
        rows = [[f"{c.plant.rank} {c.plant.spectrum}", c.expected, c.answer] for c in self.cases]
        return html_table(repr(self), Table("cases", "", ("planted", "truth", "answer"), rows))


def calibrate(
    folder: Path | str,
    cases: Sequence[PlantedUpdate] = CASES,
    seeds: int = 24,
    lines: Sequence[str] | None = None,
    track: Track = iter,
    train: Callable[[StudyConfig, Path], Study] = run_study,
) -> Calibration:
    """Plant updates, train the whole grid on each, and see what the evidence says.

    Args:
        folder: where the studies go, one a case; taken up again where they were left.
        cases: what to plant.
        seeds: how many runs the coverage of intervals is counted on; a multiple of three.
        lines: which lines of evidence are asked; None takes all.
        track: wraps the list of cases and may show progress.
        train: makes a study of settings.
    """
    folder = Path(folder)
    outcomes = tuple(_case(plant, folder, lines, train) for plant in track(list(cases)))
    return Calibration(cases=outcomes, coverage=_coverage(folder / "coverage", seeds, train))


def _case(
    plant: PlantedUpdate, folder: Path, lines: Sequence[str] | None, train: Callable[[StudyConfig, Path], Study]
) -> CalibrationCase:
    config = plant.study_config(ranks=RANKS, seeds=(0, 1, 2))
    study = train(config, folder / f"r{plant.rank}-{plant.spectrum}-noise{plant.noise:g}")
    said = hypothesis(study, lines)
    needed, visible = plant.needed_rank(), plant.is_visible(min(ROWS_PER_SPLIT, TRAINING["batch"] * TRAINING["steps"]))
    performance = said.performance.r90.rank if said.performance and said.performance.r90 else None
    truncation = said.truncation.k90.rank if said.truncation else None
    ranks = {"performance": performance, "truncation": truncation}
    return CalibrationCase(
        plant=plant,
        needed=needed,
        visible=visible,
        expected=plant.expected_answer,
        answer=said.answer,
        performance=performance,
        truncation=truncation,
        counted=_mean_count_above_noise(said),
        within={name: is_within_one_step(rank, needed) for name, rank in ranks.items()} if visible else None,
        answers=_first_answers(said),
    )


def is_within_one_step(rank: int | None, needed: int) -> bool:
    """Whether a rank lies within one step of ``RANKS`` of the smallest rank there that suffices."""
    if rank is None:
        return False

    def place(rank: int) -> int:
        return next((i for i, r in enumerate(RANKS) if r >= rank), len(RANKS))

    return abs(place(rank) - place(needed)) <= 1


def _first_answers(said: Hypothesis) -> dict[str, Answer]:
    firsts: dict[str, Answer] = {}
    for verdict in said.verdicts:  # in the order of the table of lines
        firsts.setdefault(verdict.line, verdict.answer)
    return firsts


def _mean_count_above_noise(said: Hypothesis) -> float | None:
    """#{σ above the noise edge} of full fine-tuning's updates, the mean over layers and seeds."""
    counts = [layer.mp_count for layer in said.spectra.layers_of(FULL_LABEL)] if said.spectra else []
    known = [count for count in counts if count is not None]
    return fmean(known) if known else None


def _coverage(folder: Path, seeds: int, train: Callable[[StudyConfig, Path], Study]) -> Coverage:
    """t intervals over disjoint triples of seeds against the mean over all, at three ranks and full fine-tuning."""
    plant = PlantedUpdate(rank=8, spectrum="even", noise=0.5)
    study = train(plant.study_config(ranks=(2, 4, 8), seeds=tuple(range(seeds)), steps=100), folder)
    scores: dict[str, list[float]] = {}
    for record in study.best():
        if record.run.method != "base":
            scores.setdefault(record.run.label, []).append(study.score(record))
    held = intervals = 0
    for values in scores.values():
        mean = fmean(values)
        for start in range(0, len(values) - 2, 3):
            interval = mean_interval(values[start : start + 3])
            intervals += 1
            held += interval.low is not None and interval.high is not None and interval.low <= mean <= interval.high
    return Coverage(seeds=seeds, intervals=intervals, held=held)
