"""The measures of effective rank: one table, from which all output takes what it shows.

A further measure is a row here, with a function of a spectrum; JSON and CSV have every row, in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

MeasurePlace = Literal[
    "layers",  # tables of ``rankscope spectrum`` with a row for each layer
    "noise",  # once more for noise, on the terminal
    "medians",  # medians on the page of ``rankscope spectrum``, there with noise beside them
    "plot",  # a mark in the plot of spectra
    "summary",  # the one-line form of a result
    "study",  # the table of a study's runs
    "evidence",  # effective rank against performance
    "kinds",  # the figure of effective ranks by kind of layer
    "callback",  # what the callback of a trainer logs
]
"""Where a measure is shown beside JSON and CSV, which have all."""
BoundRule = Literal["majorisation", "share", "cutoff", "entropy"]
"""How a sketch bounds a measure: at the extremes of the majorisation order of the energies, in which it is monotone; as
the number of directions that hold ``share`` of the energy; as the number of σ above the cutoff; or as the entropy of σ.
"""


@dataclass(frozen=True)
class Measure:
    """One way to make a rank of a spectrum.

    ``name``: its field in JSON. ``title``: its name in tables. ``compute``: the measure of a
    ``rankscope.spectra.Spectrum``, which raises RankscopeError where a truncated one does not determine it.
    ``definition``: the formula, for legends. ``label``: of an axis. ``shown``: its places, each with its position among
    the measures there. ``mark``: the marker in the plot of spectra. ``bound``: the rule of its bounds in a sketch;
    without one they are 0 and the number of singular values, as for any rank. ``is_count``: whether it is whole.
    """

    name: str
    title: str
    compute: Callable[[Any], float | int]
    definition: str
    label: str = ""
    shown: Mapping[MeasurePlace, int] = field(default_factory=dict)
    mark: str = "o"
    is_count: bool = False
    bound: BoundRule | None = None
    share: float = 0.0

    def __call__(self, spectrum: Any) -> float | int:
        return self.compute(spectrum)


def _energy_share(name: str, share: float, **more: Any) -> Measure:
    return Measure(
        name,
        name,
        attrgetter(name),
        f"fewest directions that hold {100 * share:g} % of the energy Σσ²",
        f"directions with {100 * share:g} % of the energy ({name})",
        is_count=True,
        bound="share",
        share=share,
        **more,
    )


_ROWS = (
    Measure(
        "numerical_rank",
        "numerical",
        attrgetter("numerical_rank"),
        "number of σ above rounding",
        shown={"layers": 1},
        is_count=True,
        bound="cutoff",
    ),
    Measure(
        "entropy_rank",
        "entropy",
        attrgetter("entropy_rank"),
        "exp(−Σ p ln p) with p = σ/Σσ",
        "entropy rank",
        {"layers": 4, "medians": 3, "plot": 3, "summary": 2, "study": 1, "evidence": 1, "kinds": 2, "callback": 2},
        mark="D",
        bound="entropy",
    ),
    Measure(
        "energy_entropy_rank",
        "energy entropy",
        attrgetter("energy_entropy_rank"),
        "exp(−Σ p ln p) with p = σ²/Σσ²",
        bound="majorisation",
    ),
    Measure(
        "stable_rank",
        "stable",
        attrgetter("stable_rank"),
        "Σσ²/σ₁²",
        shown={"layers": 2, "medians": 1, "plot": 1, "summary": 1, "study": 2, "evidence": 2, "callback": 1},
        mark="o",
        bound="majorisation",
    ),
    Measure(
        "participation_ratio",
        "participation",
        attrgetter("participation_ratio"),
        "(Σσ²)²/Σσ⁴",
        shown={"layers": 3, "medians": 2},
        bound="majorisation",
    ),
    Measure("nuclear_rank", "nuclear", attrgetter("nuclear_rank"), "Σσ/σ₁", bound="majorisation"),
    _energy_share(
        "k90",
        0.90,
        shown={
            **{"layers": 5, "noise": 1, "medians": 4, "plot": 2, "summary": 3},
            **{"study": 3, "evidence": 3, "kinds": 1, "callback": 3},
        },
        mark="s",
    ),
    _energy_share("k95", 0.95),
    _energy_share("k99", 0.99),
)
MEASURES: dict[str, Measure] = {measure.name: measure for measure in _ROWS}
"""Every measure by its name, in the order of JSON and CSV."""


def measures_shown(place: MeasurePlace) -> list[Measure]:
    """The measures that are shown at a place, in their order there."""
    return sorted((m for m in MEASURES.values() if place in m.shown), key=lambda measure: measure.shown[place])
