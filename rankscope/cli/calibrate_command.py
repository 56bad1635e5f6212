"""``rankscope calibrate``."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from rankscope.cli.output import print_json, print_table, progress_tracker
from rankscope.table import Cell, Table, format_number

if TYPE_CHECKING:
    from rankscope.evidence.calibration import Calibration, CalibrationCase

HEADER = ("planted", "noise", "needs", "sweep", "truncation", "MP count", "truth", "answer", "lines of evidence")
QUICK_CASES = {(1, "flat", 0.5), (4, "flat", 0.5), (48, "flat", 0.5), (64, "flat", 0.5)}


@click.command()
@click.option(
    "-o", "--output", metavar="FOLDER", help="Keep the studies here, and go on with them [a folder that goes]."
)
@click.option("--quick", is_flag=True, help="Four cases and nine seeds: about a minute.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--quiet", is_flag=True, help="No notes and no progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(output: str | None, quick: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """The whole instrument on planted truth: can it find a rank, and can it say no?

    Updates of known rank, form and noise are planted in a linear model; the grid of ranks and full fine-tuning is
    trained on each; every line of evidence is asked. Some cases have a high rank, where the hypothesis is false. Exit
    code 1 where a case is answered the wrong way round.

    \b
    Examples:
      rankscope calibrate --quick
      rankscope calibrate -o calibration --json > calibration.json
    """
    from rankscope.evidence.calibration import CASES, calibrate

    cases = [case for case in CASES if (case.rank, case.spectrum, case.noise) in QUICK_CASES] if quick else CASES
    with tempfile.TemporaryDirectory() if output is None else nullcontext(output) as folder:
        calibration = calibrate(folder, cases, seeds=9 if quick else 24, track=progress_tracker(quiet, "cases"))
    if as_json:
        print_json(calibration.to_json())
    else:
        print_table(Table("cases", "", HEADER, [_cells(case) for case in calibration.cases]))
        click.echo("\n" + "\n".join(_summary(calibration)))
    if calibration.wrong_cases:
        raise click.exceptions.Exit(1)


def _cells(case: CalibrationCase) -> list[Cell]:
    buried = "" if case.visible else " (buried)"
    lines = ", ".join(f"{line} {answer}" for line, answer in case.answers.items())
    return [
        f"{case.plant.rank} {case.plant.spectrum}{buried}",
        case.plant.noise,
        case.needed,
        format_number(case.performance) or "none",
        format_number(case.truncation) or "none",
        case.counted,
        case.expected,
        case.answer,
        lines,
    ]


def _summary(calibration: Calibration) -> list[str]:
    (hits, of), (right, judged), coverage = (
        calibration.recovery_counts,
        calibration.correct_counts,
        calibration.coverage,
    )
    wrong = (
        f"; the wrong way round: {len(calibration.wrong_cases)}"
        if calibration.wrong_cases
        else "; none the wrong way round"
    )
    return [
        f"planted ranks read within one step of the grid, by sweep and by truncation: {hits} of {of}",
        f"answered as planted, where the signal stands above the noise: {right} of {judged}{wrong}",
        f"t intervals of three seeds that held the mean of {coverage.seeds}: {coverage.held} of {coverage.intervals}",
    ]
