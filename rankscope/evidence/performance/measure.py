"""Performance against rank: the smallest rank that does what full fine-tuning does, each rank at its own best rate."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from rankscope.evidence.entries import Entry, gains_by_seed, group_by_label, make_entry, median_smaller_side
from rankscope.evidence.material import Material
from rankscope.inference import CONFIDENCE_LEVEL, Interval, Reach, first_reaching, holm, largest_insufficient_rank
from rankscope.verdict import (
    GAIN_SHARE,
    LOW_RANK_SHARE,
    MARGIN,
    Answer,
    MissingEvidenceError,
    Verdict,
    answer_low_rank,
    format_interval,
)

EQUIVALENCE_LEVEL = 0.05
"""Corrected p of the two one-sided tests below which a rank is called equivalent."""


class Performance(msgspec.Struct, frozen=True, kw_only=True):
    """Every method of a study at its best rate, and what rank does as well as full fine-tuning.

    ``method`` and ``targets`` say which of the ``entries`` are LoRA's curve; ``dim`` is the median over its layers of
    the smaller side of the weight. ``r90``: the smallest rank with ``GAIN`` of full fine-tuning's gain; ``equivalent``:
    the smallest whose gain differs from it by less than ``allowed``, which is ``margin`` of it. ``missing`` says why
    there is nothing to compare with, where there is not. ``budget``: of parameters, where the study set one. ``lost``:
    runs that diverged or were stopped.
    """

    metric: str
    higher_is_better: bool
    method: str
    targets: str | None
    dim: int
    margin: float
    allowed: float | None
    entries: tuple[Entry, ...]
    r90: Reach | None
    equivalent: int | None
    missing: str | None
    budget: int | None
    lost: tuple[str, ...]

    @property
    def lora_curve(self) -> list[Entry]:
        """LoRA's ranks, ascending."""
        found = [e for e in self.entries if e.method == self.method and e.targets == self.targets]
        return sorted(found, key=lambda entry: entry.rank or 0)

    def entry_of(self, method: str) -> Entry | None:
        """The entry of a method without rank, such as "full" or "base"."""
        return next((entry for entry in self.entries if entry.method == method), None)


def measure_performance(material: Material, margin: float = MARGIN) -> Performance:
    """Each method of a study at the best rate of each rank, by the test split.

    Args:
        margin: the share of full fine-tuning's gain by which an equivalent rank may differ from it.

    Raises:
        MissingEvidenceError: no LoRA run is done.
    """
    first = material.lora_rows()[0]
    labels = group_by_label(row for row in material.rows if row.is_best)
    gains = {label: gains_by_seed(material, found) for label, found in labels.items()}
    full, missing = _reference(material, gains)
    allowed = margin * statistics.fmean(full.values()) if full and not missing else None
    run = first.record.run
    entries = [make_entry(material, found, gains[label], full, allowed) for label, found in labels.items()]
    entries = _correct_p_values(entries, run.method, run.targets)
    curve = [entry for entry in entries if entry.method == run.method and entry.targets == run.targets]
    return Performance(
        metric=material.study.metric,
        higher_is_better=material.study.higher_is_better,
        method=run.method,
        targets=run.targets,
        dim=median_smaller_side(first),
        margin=margin,
        allowed=allowed,
        entries=tuple(entries),
        r90=None if missing else first_reaching([(e.rank, e.share) for e in curve if e.rank and e.share], GAIN_SHARE),
        equivalent=min((e.rank for e in curve if e.rank and _is_equivalent(e)), default=None),
        missing=missing,
        budget=material.study.config.budget,
        lost=tuple(record.run.name for record in material.study.records if record.status != "done"),
    )


def _reference(material: Material, gains: Mapping[str, dict[int, float]]) -> tuple[dict[int, float], str | None]:
    """Full fine-tuning's gains, and why nothing can be compared with them, if it cannot."""
    try:
        full = gains[material.full_rows()[0].record.run.label]
    except MissingEvidenceError as error:
        return {}, str(error)
    if not full:
        return {}, "the untouched base was not measured; let the study go on"
    if statistics.fmean(full.values()) <= 0:
        return full, "full fine-tuning does no better than the untouched base: there is no gain to share"
    return full, None


def _correct_p_values(entries: Sequence[Entry], method: str, targets: str | None) -> list[Entry]:
    """With p corrected for the number of LoRA's ranks: the smallest of many that passes is a pick of many looks."""
    tested = [e for e in entries if e.method == method and e.targets == targets and e.p is not None]
    corrected = dict(zip([e.label for e in tested], holm([e.p or 0.0 for e in tested]).tolist(), strict=True))
    return [msgspec.structs.replace(entry, corrected=corrected.get(entry.label)) for entry in entries]


def _is_equivalent(entry: Entry) -> bool:
    return entry.corrected is not None and entry.corrected < EQUIVALENCE_LEVEL


# Verdicts


def verdicts(found: Performance) -> list[Verdict]:
    """Whether a low rank is enough, and whether some rank is equivalent to full fine-tuning."""
    return [verdict_on_gain(found), verdict_on_equivalence(found)]


def incomparability_reason(found: Performance) -> str | None:
    """Why no rank can be compared with full fine-tuning, if none can."""
    full = found.entry_of("full")
    if found.missing or full is None or full.gain is None:
        return f"Nothing to compare with: {found.missing}."
    if max((len(entry.paired) for entry in found.lora_curve), default=0) < 2:
        return "Not enough seeds to tell: no two of LoRA's seeds have full fine-tuning beside them; train with --seeds."
    if full.edge:
        end = "lowest" if full.edge == "low" else "highest"
        return (
            f"The best rate of full fine-tuning, {full.lr:g}, is the {end} that was tried: a better one may lie "
            "beyond, and its gain be larger; --extend-lrs goes on."
        )
    if full.gain.low is not None and full.gain.low <= 0:
        return (
            f"Full fine-tuning does not surely improve on the base: its gain is {format_interval(full.gain)} {found.metric}, "
            f"mean of {len(full.seeds)} seeds with its {CONFIDENCE_LEVEL:.0%} interval."
        )
    return None


def verdict_on_gain(found: Performance) -> Verdict:
    line = LOW_RANK_SHARE * found.dim
    reach = found.r90 or Reach(None, None, None)
    answer, sentence = _whether_low(found, reach)
    return Verdict(
        line="performance",
        claim=f"A low rank is enough: it reaches {GAIN_SHARE:.0%} of full fine-tuning's gain over the base.",
        answer=answer,
        sentence=sentence,
        refuted_by=f"Every rank up to {line:g} surely below {GAIN_SHARE:.0%} of the gain: the upper ends of their shares.",
        value=_number(reach.rank),
        low=_number(reach.low),
        high=_number(reach.high),
    )


def _whether_low(found: Performance, reach: Reach) -> tuple[Answer, str]:
    """A rank with its best rate on the edge could only do better: that casts doubt on a "no" alone."""
    if why := incomparability_reason(found):
        return "undecided", why
    line = LOW_RANK_SHARE * found.dim
    # The smallest rank that may be enough lies above the largest that surely is not, whether it was tried or not.
    least = largest_insufficient_rank([(entry.rank or 0, entry.share) for entry in found.lora_curve], GAIN_SHARE) + 1
    answer = answer_low_rank(least, reach.high, found.dim)
    sentence = f"{_describe_reach(found, reach)} Low is up to {line:g}, {LOW_RANK_SHARE:g} of the median smaller side {found.dim}."
    edges = [entry.label for entry in found.lora_curve if entry.edge and entry.rank and entry.rank <= line]
    if answer == "no" and edges:
        return "undecided", f"{sentence} But the best rate of {_join_labels(edges)} lies on the edge of those tried."
    if answer == "undecided" and not any(least <= (entry.rank or 0) <= line for entry in found.lora_curve):
        sentence += f" No rank from {least} to {line:g} was tried."
    return answer, sentence


def _describe_reach(found: Performance, reach: Reach) -> str:
    """Which rank reaches the share, and how far intervals leave that open."""
    shares = [(entry, entry.share) for entry in found.lora_curve if entry.share]
    over = f"the {CONFIDENCE_LEVEL:.0%} intervals over {_seeds(entry for entry, _ in shares)} seeds"
    if reach.rank is None:
        best, share = max(shares, key=lambda pair: pair[1].value)
        most = f"r = {best.rank} has the largest share, {format_interval(share)}, by {over}"
        return f"No rank tried reaches {GAIN_SHARE:.0%} of the gain; {most}."
    share = next(share for entry, share in shares if entry.rank == reach.rank)
    to = f"to {reach.high}" if reach.high else "upwards, as none surely reaches it"
    left = (
        "leave no other of those tried" if reach.low == reach.high else f"leave the smallest from r = {reach.low} {to}"
    )
    return (
        f"r = {reach.rank} is the smallest rank tried that reaches {GAIN_SHARE:.0%} of the gain, with a share of "
        f"{format_interval(share)}; {over} {left}."
    )


def verdict_on_equivalence(found: Performance) -> Verdict:
    answer, sentence, shown = _whether_equivalent(found)
    difference = shown.difference if shown and shown.difference else None
    return Verdict(
        line="performance",
        claim=f"Some rank is equivalent to full fine-tuning: its gain is within {found.margin:.0%} of that one's.",
        answer=answer,
        sentence=sentence,
        refuted_by=f"Every rank surely worse by more than the margin: the {CONFIDENCE_LEVEL:.0%} interval of each below it.",
    ).with_value(difference)


def _whether_equivalent(found: Performance) -> tuple[Answer, str, Entry | None]:
    """The answer, why, and the rank it rests on."""
    tested = [entry for entry in found.lora_curve if entry.corrected is not None and entry.difference]
    if (why := incomparability_reason(found)) or not tested or found.allowed is None:
        return "undecided", why or "No rank has two seeds beside full fine-tuning.", None
    passed = [entry for entry in tested if _is_equivalent(entry)]
    firm = [entry for entry in passed if not entry.edge]
    shown = (firm or passed or [min(tested, key=lambda entry: abs(entry.difference.value))])[0]  # type: ignore[union-attr]
    sentence = _describe_difference(found, shown)
    if firm:
        return "yes", f"r = {shown.rank} is the smallest rank equivalent to full fine-tuning. {sentence}", shown
    if passed:
        return "undecided", f"{sentence} But its best rate lies on the edge of those tried.", shown
    highs = [entry.difference.high for entry in found.lora_curve if entry.difference]
    if all(high is not None and high < -found.allowed for high in highs) and len(highs) == len(found.lora_curve):
        edges = [entry.label for entry in found.lora_curve if entry.edge]
        if edges:
            return "undecided", f"{sentence} But the best rate of {_join_labels(edges)} lies on the edge.", shown
        return "no", f"Every rank tried is worse than full fine-tuning by more than the margin. {sentence}", shown
    if shown.difference and shown.difference.low is not None and shown.difference.low > found.allowed:
        return "undecided", f"{sentence} LoRA is better; full fine-tuning may not have been trained to its best.", shown
    return "undecided", f"No rank is shown to be equivalent, nor all to be worse by more. {sentence}", shown


def _describe_difference(found: Performance, entry: Entry) -> str:
    """The difference of a rank from full fine-tuning beside the margin, and how it was tested."""
    ranks = sum(one.corrected is not None for one in found.lora_curve)
    by = format_interval(entry.difference or Interval(0))
    return (
        f"The gain of r = {entry.rank} differs from that of full fine-tuning by {by} {found.metric}, margin "
        f"± {found.allowed:.3g} ({found.margin:.0%} of its gain); p = {entry.corrected:.2g} by two one-sided t tests "
        f"on {len(entry.paired)} pairs of seeds{f', corrected for {ranks} ranks (Holm)' if ranks > 1 else ''}."
    )


def _seeds(entries: Iterable[Entry]) -> str:
    counts = sorted({len(entry.paired) for entry in entries})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _join_labels(labels: Sequence[str]) -> str:
    return " and ".join(labels) if len(labels) < 3 else f"{', '.join(labels[:-1])} and {labels[-1]}"


def _number(rank: int | None) -> float | None:
    return None if rank is None else float(rank)
