"""A study's evidence as a page: a section for each line, also for those that the study has no data for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import rankscope
from rankscope.evidence.hypothesis import LINES, Hypothesis
from rankscope.report.document import Document, Section
from rankscope.verdict import GAIN_SHARE, LOW_RANK_SHARE, MARGIN, LineName

TITLES: dict[LineName, str] = {
    "performance": "Performance against rank",
    "truncation": "The update cut to rank k",
    "spectra": "Spectra of the updates",
    "overlap": "Overlap across ranks and seeds",
    "agreement": "LoRA against full fine-tuning",
    "weight": "The update against the weight",
    "effective": "Effective rank against performance",
    "dimension": "Intrinsic dimension",
}
"""What a section is called where there is nothing to show in it."""


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
    for line in LINES:
        result = getattr(found, line)
        if result is not None:
            sections.append(import_module(f"rankscope.evidence.{line}.section").section(result))
        elif line in found.missing:
            sections.append(Section(key=line, title=TITLES[line], lead="", missing=found.missing[line]))
    return sections


def _method() -> Section:
    """Where the lines were drawn: a reader who would draw them elsewhere can tell what would change."""
    return Section(
        key="rules",
        title="Rules of the verdicts",
        lead="Each verdict follows from its numbers by a rule fixed beforehand, not by judgement.",
        notes=(
            f"A rank is low up to {LOW_RANK_SHARE:g} of the smaller side of a weight; LoRA's factors on a square weight then hold "
            f"{2 * LOW_RANK_SHARE:.0%} of its numbers.",
            f"Enough is {GAIN_SHARE:.0%} of full fine-tuning's gain over the untouched base, at each rank's own best rate.",
            f"Equivalent is a gain within {MARGIN:.0%} of full fine-tuning's, by two one-sided t tests at .05.",
            "The answer above the page rests on what the task needs: performance against rank, and the update of full "
            "fine-tuning cut to rank k. What is in the weights beside that need not matter to the task.",
            "Intervals are of the mean over seeds, at 95 %, on this model and these data; they say nothing of others.",
        ),
    )


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
