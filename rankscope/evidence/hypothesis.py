"""The low-intrinsic-rank hypothesis, tested on a study along every line of evidence it has data for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, get_args

from rankscope.analysis.display import html_table
from rankscope.analysis.layer_comparison import MatrixKind
from rankscope.analysis.sources import Track
from rankscope.errors import ConfigError, FormatError, RankscopeError
from rankscope.evidence.agreement.measure import Agreement
from rankscope.evidence.dimension.measure import IntrinsicDimension
from rankscope.evidence.effective.measure import EffectiveRanks
from rankscope.evidence.material import Material
from rankscope.evidence.overlap.measure import Overlap
from rankscope.evidence.performance.measure import Performance
from rankscope.evidence.spectra.measure import Spectra
from rankscope.evidence.truncation.measure import Truncation
from rankscope.evidence.weight.measure import WeightComparison
from rankscope.result import Result
from rankscope.train.study import Study
from rankscope.verdict import Answer, LineName, Verdict

SCHEMA = "rankscope.report/1"
LINES: tuple[LineName, ...] = get_args(LineName)
DECISIVE: tuple[LineName, ...] = ("performance", "truncation")
"""The lines that ask what the task needs. The others look at weights, where what is there need not matter."""


class Hypothesis(Result, frozen=True, eq=False, kw_only=True):
    """What a study says: each line of evidence, None where the study lacks what it needs (``missing`` says what).

    ``answer`` follows from the first verdict of each of the ``DECISIVE`` lines. ``study`` is the folder's name,
    ``made_by`` the command, versions, machine, fingerprints and settings. ``to_json`` and ``from_json`` are inverses.
    """

    schemas: ClassVar = (SCHEMA,)
    schema: str = SCHEMA
    study: str
    metric: str
    higher_is_better: bool
    runs: dict[str, int]
    """How many runs ended how."""
    answer: Answer
    sentence: str
    verdicts: tuple[Verdict, ...]
    missing: dict[LineName, str]
    performance: Performance | None = None
    truncation: Truncation | None = None
    spectra: Spectra | None = None
    overlap: Overlap | None = None
    agreement: Agreement | None = None
    weight: WeightComparison | None = None
    effective: EffectiveRanks | None = None
    dimension: IntrinsicDimension | None = None
    made_by: dict[str, Any]

    def __repr__(self) -> str:
        return f"Hypothesis({self.study!r}: {self.answer}; {self.sentence})"

    def _repr_html_(self) -> str:
        rows = [[one.line, one.answer, one.sentence] for one in self.verdicts]
        return html_table(repr(self), ["line", "answer", "sentence"], rows, self.missing.values())


def hypothesis(
    study: Study,
    lines: Sequence[LineName] | None = None,
    of: MatrixKind = "update",
    device: str = "cpu",
    track: Track = iter,
    cache: str | os.PathLike[str] | None = None,
) -> Hypothesis:
    """Test the low-intrinsic-rank hypothesis on a study.

    Args:
        lines: which lines of evidence; None takes all.
        of: what the overlap across ranks and seeds is of: "update" is ΔW, "A" the paper's literal form.
        device: where models are evaluated and matrices decomposed.
        track: wraps lists that take long and may show progress.
        cache: folder that keeps the decompositions of the base's weights for another time; it may be deleted.

    Raises:
        ConfigError: an unknown line.
        FormatError: a file of the study is damaged.
        RankscopeError: nothing has ended in the study.
    """
    wanted = LINES if lines is None else tuple(lines)
    if unknown := [line for line in wanted if line not in LINES]:
        raise ConfigError(f"lines: no line of evidence is called {unknown[0]!r}; there are {', '.join(LINES)}")
    material = Material(study, device, track, Path(cache).expanduser() if cache is not None else None)
    if not any(record.run.method != "base" for record in study.done()):
        raise RankscopeError(f"{study.folder}: no run of this study has ended yet; let it go on with rankscope train")
    found: dict[LineName, Any] = {}
    missing: dict[LineName, str] = {}
    for line in material.track([line for line in LINES if line in wanted]):
        try:
            found[line] = _measure(line, material, of)
        except FormatError:  # a damaged study is no lack of evidence
            raise
        except RankscopeError as error:  # one line that cannot be drawn does not take the others with it
            missing[line] = str(error)
    verdicts = [verdict for line, result in found.items() for verdict in _module(line).verdicts(result)]
    answer, sentence = conclusion(verdicts)
    return Hypothesis(
        study=study.folder.resolve().name,
        metric=study.metric,
        higher_is_better=study.higher_is_better,
        runs=_count(study),
        answer=answer,
        sentence=sentence,
        verdicts=tuple(verdicts),
        missing=missing,
        made_by=material.describe(),
        **found,
    )


def _module(line: LineName) -> ModuleType:
    return import_module(f"rankscope.evidence.{line}.measure")


def _measure(line: LineName, material: Material, of: MatrixKind) -> Any:
    """The result of one line; each module has a function of its own name."""
    measure: Callable[..., Any] = getattr(_module(line), f"measure_{line}")
    return measure(material, of) if line == "overlap" else measure(material)


def _count(study: Study) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in study.records:
        counts[record.status] = counts.get(record.status, 0) + 1
    return counts


def conclusion(verdicts: Sequence[Verdict]) -> tuple[Answer, str]:
    """What the decisive lines say together: "yes" or "no" where all that have an answer agree.

    A line that is undecided or missing leaves the answer to the other; two that disagree leave it open.
    """
    first = {line: next((v for v in verdicts if v.line == line), None) for line in DECISIVE}
    answers = {line: v.answer for line, v in first.items() if v is not None and v.answer != "undecided"}
    said = ", ".join(f"{line} says {answer}" for line, answer in answers.items())
    silent = [line for line in DECISIVE if line not in answers]
    rest = f"; {' and '.join(silent)} cannot tell" if silent else ""
    if not answers:
        return "undecided", f"This study cannot tell whether a low rank is enough: {' and '.join(silent)} cannot tell."
    if len(set(answers.values())) > 1:
        return "undecided", f"The lines disagree on whether a low rank is enough: {said}."
    answer = next(iter(answers.values()))
    enough = "A low rank is enough for this task" if answer == "yes" else "A low rank is not enough for this task"
    return answer, f"{enough}: {said}{rest}."
