"""A study's evidence as a page: a section for each line, also for those that the study has no data for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import rankscope
from rankscope.evidence import lines as table
from rankscope.evidence.hypothesis import Hypothesis
from rankscope.report.document import Document, Section
from rankscope.verdict import GAIN_SHARE, LOW_RANK_SHARE, MARGIN


def build_document(found: Hypothesis, command: str = "") -> Document:
    """The page of a study.

    Args:
        command: what made this report, for the end of the page.
    """
    return Document(
        title=f"Is the update low-rank? {found.study}",
        lead=found.sentence,
        sections=[*_sections(found), _method()],
        facts=_facts(found),
        provenance={"report": command, "rankscope": rankscope.__version__, **found.made_by},
    )


def _sections(found: Hypothesis) -> list[Section]:
    sections: list[Section] = []
    for line in table.LINES:
        result = found.results.get(line.name)
        if result is not None:
            section = line.section(result, found.verdicts_of(line.name))
            sections.append(replace(section, key=line.name, title=line.title))
        elif line.name in found.missing:
            sections.append(Section(key=line.name, title=line.title, lead="", missing=found.missing[line.name]))
    return sections


def _method() -> Section:
    """Where the lines were drawn: a reader who would draw them elsewhere can tell what would change."""
    decisive = [f"“{line.title}”" for line in table.LINES if line.decisive]
    return Section(
        key="rules",
        title="Rules of the verdicts",
        lead="Each verdict follows from its numbers by a rule fixed beforehand, not by judgement.",
        notes=(
            f"A rank is low up to {LOW_RANK_SHARE:g} of the smaller side of a weight; LoRA's factors on a square "
            f"weight then hold {2 * LOW_RANK_SHARE:.0%} of its numbers.",
            f"Enough is {GAIN_SHARE:.0%} of full fine-tuning's gain over the untouched base, each rank at its own best "
            "learning rate.",
            f"Equivalent is a gain within {MARGIN:.0%} of full fine-tuning's, by two one-sided t tests at .05.",
            f"The answer at the top rests on what the task needs: {_join(decisive)}. What else is in the weights need "
            "not matter to the task.",
            "Intervals are of the mean over seeds, at 95 %, on this model and these data; they say nothing of others.",
        ),
    )


def _join(names: list[str]) -> str:
    return " and ".join([*filter(None, [", ".join(names[:-1])]), *names[-1:]])


def _facts(found: Hypothesis) -> Mapping[str, str]:
    settings: Mapping[str, Any] = found.made_by.get("config", {})
    prints: Mapping[str, Any] = found.made_by.get("fingerprint", {})
    way = "higher" if found.higher_is_better else "lower"
    return {
        "Task": str(settings.get("task", "")),
        "Base": str(prints.get("base", settings.get("model", ""))),
        "Metric": f"{found.metric} ({way} is better), test split",
        "Runs": ", ".join(f"{count} {status}" for status, count in found.runs.items()),
        "Seeds": ", ".join(str(seed) for seed in settings.get("seeds", ())),
    }
