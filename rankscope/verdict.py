"""What a line of evidence says, in one sentence whose wording follows from its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from rankscope.errors import RankscopeError
from rankscope.inference import Interval, median_interval

Answer = Literal["yes", "no", "undecided"]

LOW_RANK_SHARE = 1 / 8
"""A rank is called low up to this share of the smaller side of a weight: factors of a square matrix then hold a quarter
of its numbers. No paper sets the line; every sentence that rests on it says where it was drawn."""
GAIN_SHARE = 0.9
"""The share of full fine-tuning's gain over the base that a rank has to reach."""
MARGIN = 0.05
"""Equivalent to full fine-tuning: the gain differs by less than this share of full fine-tuning's."""
MAX_CORRECTED_P = 0.01
"""Corrected p below which an overlap is told from chance."""

MIN_LAYERS = 6
"""The fewest layers whose median has a 95 % interval."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """An answer of one line of evidence to one claim.

    ``claim`` is what the hypothesis predicts, and ``answer`` whether the numbers bear it out: "undecided" where they
    cannot tell, with the reason in ``sentence``. ``refuted_by`` says which numbers would have made the answer "no".
    ``value`` with the interval ``low`` to ``high`` is the number that the answer rests on; None where there is none.
    """

    line: str
    claim: str
    answer: Answer
    sentence: str
    refuted_by: str
    value: float | None = None
    low: float | None = None
    high: float | None = None

    def with_value(self, number: Interval | None) -> Verdict:
        """The verdict with the number that it rests on."""
        value, low, high = number or (None, None, None)
        return msgspec.structs.replace(self, value=value, low=low, high=high)


class MissingEvidenceError(RankscopeError):
    """A study lacks what a line of evidence needs; the message says what, and how to get it."""


def answer_low_rank(low: float | None, high: float | None, dim: int) -> Answer:
    """Whether a rank known to lie from ``low`` to ``high`` is low in ``dim`` dimensions.

    "yes" where even ``high`` is; "no" where even ``low`` is not, or None as no rank that was tried got there;
    "undecided" between, also where ``high`` is None, as none got there for sure.
    """
    return answer_at_most(LOW_RANK_SHARE * dim, low, high)


def answer_at_most(line: float, low: float | None, high: float | None) -> Answer:
    """Whether a rank known to lie from ``low`` to ``high`` is at most ``line``; the ends as for ``answer_low_rank``."""
    if low is None or low > line:
        return "no"
    return "yes" if high is not None and high <= line else "undecided"


def median_over_layers(values: Sequence[float]) -> Interval:
    """The median over layers with its interval; below ``MIN_LAYERS`` layers from the least to the largest, so that all of them
    have to agree. One layer has no ends. Not for what chance scatters around a line: two layers are on one side of it
    every other time.

    Raises:
        ValueError: no layer.
    """
    found = median_interval(values)
    return found if found.known or len(values) < 2 else Interval(found.value, min(values), max(values))


def answer_above(found: Interval, line: float) -> Answer:
    """ "yes" where the whole interval lies above a line, "no" where it lies below; "undecided" without an interval."""
    if found.low is None or found.high is None:
        return "undecided"
    return "yes" if found.low > line else "no" if found.high < line else "undecided"


def format_interval(found: Interval, digits: int = 3) -> str:
    """``0.91 (0.88 to 0.94)``, or the number alone where there is no interval."""
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}g}"
    return f"{found.value:.{digits}g} ({found.low:.{digits}g} to {found.high:.{digits}g})"
