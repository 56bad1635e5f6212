"""The low-intrinsic-rank hypothesis, tested on a study along every line of evidence it has data for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from rankscope.analysis.display import html_table
from rankscope.analysis.layer_comparison import MatrixKind
from rankscope.errors import FormatError, RankscopeError
from rankscope.evidence import lines as table
from rankscope.evidence.material import Material
from rankscope.result import Result, convert_json, json_values
from rankscope.table import Table
from rankscope.track import Track
from rankscope.train.results import RunResult
from rankscope.train.study import Study
from rankscope.verdict import Answer, Verdict

SCHEMA = "rankscope.report/1"


class Hypothesis(Result, frozen=True, eq=False, kw_only=True):
    """What a study says, along each line of evidence.

    ``results`` holds the result of each line by its name; ``missing`` says why a line has none. The result of a line
    is an attribute, too: ``hypothesis.truncation`` is ``hypothesis.results.get("truncation")``. ``answer`` follows from
    the first verdict of each decisive line. ``runs`` counts the runs by how they ended. ``study`` is the name of the
    folder, ``made_by`` the command, versions, machine, fingerprints and settings. ``to_json`` and ``from_json`` are
    inverses; JSON has a key for each line, in place of ``results``.
    """

    schemas: ClassVar = (SCHEMA,)
    schema: str = SCHEMA
    study: str
    metric: str
    higher_is_better: bool
    runs: dict[str, int]
    answer: Answer
    sentence: str
    verdicts: tuple[Verdict, ...]
    missing: dict[str, str]
    results: dict[str, Any]
    made_by: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        """The result of the line of this name; None where it is missing."""
        if any(line.name == name for line in table.LINES):
            return self.results.get(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def verdicts_of(self, line: str) -> list[Verdict]:
        """The verdicts of one line."""
        return [verdict for verdict in self.verdicts if verdict.line == line]

    def to_json(self) -> dict[str, Any]:
        """Strict JSON values: no NaN, no infinity; a key for each line, null where it has no result."""
        names = [line.name for line in table.LINES]
        values: dict[str, Any] = {}
        for key, value in json_values(self).items():
            values |= {name: value.get(name) for name in (*names, *value)} if key == "results" else {key: value}
        return values

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The result that ``to_json`` described.

        Raises:
            FormatError: another schema, or fields that are missing or of another type.
        """
        results: dict[str, Any] = {}
        if isinstance(value, Mapping) and value.get("schema") in cls.schemas:
            results = {
                line.name: convert_json(value[line.name], line.result, SCHEMA)
                for line in table.LINES
                if value.get(line.name) is not None
            }
            value = {**value, "results": results}
        return super().from_json(value)

    def __repr__(self) -> str:
        return f"Hypothesis({self.study!r}: {self.answer}; {self.sentence})"

    def _repr_html_(self) -> str:
        rows = [[verdict.line, verdict.answer, verdict.sentence] for verdict in self.verdicts]
        return html_table(
            repr(self), Table("verdicts", "", ("line", "answer", "sentence"), rows), self.missing.values()
        )


def hypothesis(
    study: Study | Path | str,
    lines: Sequence[str] | None = None,
    of: MatrixKind = "update",
    device: str = "cpu",
    track: Track = iter,
    cache: str | os.PathLike[str] | None = None,
    rows: Sequence[RunResult] | None = None,
) -> Hypothesis:
    """Test the low-intrinsic-rank hypothesis on a study.

    Args:
        study: a study or its folder.
        lines: names of the lines of evidence to follow, as in ``evidence.lines``; None follows all.
        of: what the overlap across ranks and seeds is of: "update" is ΔW, "A" the paper's literal form.
        device: where models are evaluated and matrices decomposed.
        track: wraps lists that take long and may show progress.
        cache: folder that keeps the decompositions of the base's weights for another time; it may be deleted.
        rows: what ``train.results.run_results`` says of this study, where it was asked already: spectra take time.

    Raises:
        ConfigError: an unknown line.
        FormatError: the folder is no study, or a file of it is damaged.
        RankscopeError: no run of the study has ended.
    """
    chosen = table.select_lines(lines)
    study = study if isinstance(study, Study) else Study(study)
    material = Material(study, device, track, Path(cache).expanduser() if cache is not None else None, of, rows)
    if not any(record.run.method != "base" for record in study.done()):
        raise RankscopeError(f"{study.folder}: no run of this study has ended yet; let it go on with rankscope train")
    results: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for line in material.track(chosen):
        try:
            results[line.name] = material.measure_once(line.measure)
        except FormatError:  # a damaged study is no lack of evidence
            raise
        except RankscopeError as error:  # a line that cannot be measured leaves the others alone
            missing[line.name] = str(error)
    verdicts = [verdict for line in chosen if line.name in results for verdict in line.verdicts(results[line.name])]
    answer, sentence = conclude(verdicts)
    return Hypothesis(
        study=study.folder.resolve().name,
        metric=study.metric,
        higher_is_better=study.higher_is_better,
        runs=dict(Counter(record.status for record in study.records)),
        answer=answer,
        sentence=sentence,
        verdicts=tuple(verdicts),
        missing=missing,
        results=results,
        made_by=material.describe(),
    )


def conclude(verdicts: Sequence[Verdict]) -> tuple[Answer, str]:
    """What the decisive lines say together, and a sentence: "yes" or "no" where all that have an answer agree.

    A line that is undecided or missing leaves the answer to the others; lines that disagree leave it open.
    """
    decisive = [line.name for line in table.LINES if line.decisive]
    first = {line: next((verdict for verdict in verdicts if verdict.line == line), None) for line in decisive}
    answers = {line: v.answer for line, v in first.items() if v is not None and v.answer != "undecided"}
    reasons = ", ".join(f"{line} says {answer}" for line, answer in answers.items())
    silent = " and ".join(line for line in decisive if line not in answers)
    if not answers:
        return "undecided", f"This study cannot tell whether a low rank is enough: {silent} cannot tell."
    if len(set(answers.values())) > 1:
        return "undecided", f"The lines disagree on whether a low rank is enough: {reasons}."
    answer = next(iter(answers.values()))
    enough = "A low rank is enough for this task" if answer == "yes" else "A low rank is not enough for this task"
    return answer, f"{enough}: {reasons}{f'; {silent} cannot tell' if silent else ''}."
