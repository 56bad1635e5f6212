"""Rules that turn numbers into words: the same numbers always give the same answer."""

from __future__ import annotations

import pytest

from rankscope.evidence.hypothesis import conclude
from rankscope.inference import Interval
from rankscope.verdict import (
    LOW_RANK_SHARE,
    Answer,
    Verdict,
    answer_above,
    answer_low_rank,
    format_interval,
    median_over_layers,
)


def verdict(line: str, answer: Answer) -> Verdict:
    return Verdict(line=line, claim="c", answer=answer, sentence="s", refuted_by="r")


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (1, 16, "yes"),
        (16, 16, "yes"),
        (1, 17, "undecided"),
        (16, None, "undecided"),
        (17, 32, "no"),
        (17, None, "no"),
        (None, None, "no"),
    ],
)
def test_a_rank_is_low_up_to_an_eighth_of_the_side(low: float | None, high: float | None, answer: Answer) -> None:
    assert LOW_RANK_SHARE == 1 / 8
    assert answer_low_rank(low, high, 128) == answer


def test_numbers_with_and_without_an_interval() -> None:
    assert format_interval(Interval(0.91, 0.88, 0.944)) == "0.91 (0.88 to 0.944)"
    assert format_interval(Interval(0.91), 1) == "0.9"


def test_few_layers_are_taken_from_the_least_to_the_largest() -> None:
    assert median_over_layers([10, 30, 20]) == Interval(20, 10, 30)
    assert median_over_layers([7]) == Interval(7, None, None)
    # Of six, the order statistics that leave 2.5 % on each side are the ends; of nine, the second and the eighth.
    assert median_over_layers(range(1, 7)) == Interval(3.5, 1, 6)
    assert median_over_layers(range(1, 10)) == Interval(5, 2, 8)


@pytest.mark.parametrize(
    ("ends", "answer"),
    [((1.1, 2.0), "yes"), ((0.0, 0.9), "no"), ((0.9, 1.1), "undecided"), ((1.0, 2.0), "undecided"), ((), "undecided")],
)
def test_above_a_line_is_what_lies_above_it_whole(ends: tuple[float, ...], answer: Answer) -> None:
    assert answer_above(Interval(1.5, *ends), 1.0) == answer


@pytest.mark.parametrize(
    ("performance", "truncation", "answer", "words"),
    [
        ("yes", "yes", "yes", "is enough"),
        ("no", "no", "no", "is not enough"),
        ("yes", "undecided", "yes", "truncation cannot tell"),
        ("undecided", "no", "no", "performance cannot tell"),
        ("yes", "no", "undecided", "disagree"),
        ("undecided", "undecided", "undecided", "cannot tell"),
        (None, "yes", "yes", "performance cannot tell"),
        (None, None, "undecided", "cannot tell"),
    ],
)
def test_the_answer_rests_on_what_the_task_needs(
    performance: Answer | None, truncation: Answer | None, answer: Answer, words: str
) -> None:
    lines: tuple[str, ...] = ("performance", "truncation")
    given = [verdict(line, a) for line, a in zip(lines, (performance, truncation), strict=True) if a]
    # What is in the weights has no say, and of each line only the first verdict.
    given += [verdict("spectra", "no"), verdict("overlap", "yes")]
    given += [verdict("performance", "no")] if performance else []
    found, sentence = conclude(given)
    assert found == answer
    assert words in sentence
