"""The lines of evidence: the only list of them. One more is a folder like the others, and a row here.

Whoever goes through the lines reads ``LINES`` when it is called, so that a row which is added from outside is measured,
written to JSON, and shown, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rankscope.errors import ConfigError
from rankscope.evidence import agreement, dimension, effective, overlap, performance, spectra, truncation, weight
from rankscope.evidence.agreement.section import build_section as agreement_section
from rankscope.evidence.dimension.section import build_section as dimension_section
from rankscope.evidence.effective.section import build_section as effective_section
from rankscope.evidence.material import Material
from rankscope.evidence.overlap.section import build_section as overlap_section
from rankscope.evidence.performance.section import build_section as performance_section
from rankscope.evidence.spectra.section import build_section as spectra_section
from rankscope.evidence.truncation.section import build_section as truncation_section
from rankscope.evidence.weight.section import build_section as weight_section
from rankscope.report.document import Section
from rankscope.verdict import Verdict


class Line(NamedTuple):
    """One line of evidence.

    ``name`` is its key in JSON, its anchor in the page and what ``--lines`` takes; ``title`` is the heading of its
    section. ``result`` is the type that ``measure`` returns, as JSON is read back into it. ``verdicts`` puts a result
    into words. ``section`` shows a result with its verdicts; the page adds name and title. A line is ``decisive`` where
    it asks what the task needs: the answer of a study follows from the first verdict of each decisive line. The other
    lines look at weights, and what is in a weight need not matter to the task.
    """

    name: str
    title: str
    result: type[Any]
    measure: Callable[[Material], Any]
    verdicts: Callable[[Any], list[Verdict]]
    section: Callable[[Any, Sequence[Verdict]], Section]
    decisive: bool = False


LINES: tuple[Line, ...] = (
    Line(
        "performance",
        "Performance against rank",
        performance.Performance,
        performance.measure_performance,
        performance.verdicts,
        performance_section,
        decisive=True,
    ),
    Line(
        "truncation",
        "The update cut to rank k",
        truncation.Truncation,
        truncation.measure_truncation,
        truncation.verdicts,
        truncation_section,
        decisive=True,
    ),
    Line(
        "spectra",
        "Spectra of the updates",
        spectra.Spectra,
        spectra.measure_spectra,
        spectra.verdicts,
        spectra_section,
    ),
    Line(
        "overlap",
        "Overlap across ranks and seeds",
        overlap.Overlap,
        overlap.measure_overlap,
        overlap.verdicts,
        overlap_section,
    ),
    Line(
        "agreement",
        "LoRA against full fine-tuning",
        agreement.Agreement,
        agreement.measure_agreement,
        agreement.verdicts,
        agreement_section,
    ),
    Line(
        "weight",
        "The update against the weight",
        weight.WeightComparison,
        weight.measure_weight,
        weight.verdicts,
        weight_section,
    ),
    Line(
        "effective",
        "Effective rank against performance",
        effective.EffectiveRanks,
        effective.measure_effective,
        effective.verdicts,
        effective_section,
    ),
    Line(
        "dimension",
        "Intrinsic dimension",
        dimension.IntrinsicDimension,
        dimension.measure_dimension,
        dimension.verdicts,
        dimension_section,
    ),
)
"""In the order in which they are measured and shown."""


def select_lines(names: Sequence[str] | None = None) -> list[Line]:
    """The lines of these names in the order of the table, or all of them.

    Raises:
        ConfigError: no line has one of the names.
    """
    known = [line.name for line in LINES]
    if unknown := [name for name in names or () if name not in known]:
        raise ConfigError(f"lines: no line of evidence is called {unknown[0]!r}; there are {', '.join(known)}")
    return [line for line in LINES if names is None or line.name in names]
