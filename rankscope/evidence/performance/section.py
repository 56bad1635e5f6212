"""The section on performance against rank, with the tables of LoRA's paper where a study has what they need."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rankscope.evidence.entries import LAST_STRETCH, Entry
from rankscope.evidence.performance.figure import plot_costs, plot_rank_curve
from rankscope.evidence.performance.measure import Performance
from rankscope.inference import CONFIDENCE_LEVEL, Interval
from rankscope.report.document import Cell, Picture, Section, Table
from rankscope.verdict import GAIN_SHARE, Verdict, format_interval

NEAR = 0.1
"""Target sets are at one budget where their numbers of trained parameters are this close, relatively."""


def build_section(found: Performance, verdicts: Sequence[Verdict]) -> Section:
    """Performance against rank, as evidence on how much rank the task needs."""
    return Section(
        lead=(
            "If the task needs little rank, a small r does what full fine-tuning does: every rank is scored on the "
            "test split at its own best learning rate, chosen on validation, beside full fine-tuning and the base."
        ),
        verdicts=verdicts,
        pictures=(_curve(found), _costs(found)),
        tables=tuple(table for table in (_scores(found), *_targets(found)) if table),
        notes=tuple(_notes(found)),
    )


# Pictures


def _curve(found: Performance) -> Picture:
    return Picture(
        name="performance",
        caption=(
            f"Score on the test split: means over seeds with their {CONFIDENCE_LEVEL:.0%} intervals. Bands: the interval of full "
            f"fine-tuning, and the range of the base over seeds. r{100 * GAIN_SHARE:.0f} is the smallest rank with "
            f"{GAIN_SHARE:.0%} of full fine-tuning's gain over the base, r≈ the smallest equivalent to it within "
            f"{found.margin:.0%} of that gain."
        ),
        alt=_curve_alt(found),
        draw=partial(plot_rank_curve, found),
        data=Table(
            name="performance",
            caption="The score of every run at its best rate.",
            header=("run", "method", "rank", "rate", "trained", "seed", found.metric),
            rows=[
                (entry.label, entry.method, entry.rank, entry.lr, entry.trainable, seed, score)
                for entry in found.entries
                for seed, score in zip(entry.seeds, entry.scores, strict=True)
            ],
        ),
    )


def _curve_alt(found: Performance) -> str:
    ranks = ", ".join(f"{entry.score.value:.4g} at r = {entry.rank}" for entry in found.lora_curve)
    full, base = found.entry_of("full"), found.entry_of("base")
    beside = [f"full fine-tuning has {format_interval(full.score, 4)}"] if full else []
    beside += [f"the untouched base has {base.score.value:.4g}"] if base else []
    r90 = found.r90.rank if found.r90 else None
    ends = [f"The smallest rank with {GAIN_SHARE:.0%} of full fine-tuning's gain is {r90}." if r90 else ""]
    ends += [f"The smallest equivalent to it is {found.equivalent}." if found.equivalent else ""]
    way = "higher" if found.higher_is_better else "lower"
    return " ".join([f"Mean {found.metric} ({way} is better): {'; '.join([ranks, *beside])}.", *filter(None, ends)])


def _costs(found: Performance) -> Picture:
    header = ("run", "s/step", "/full", "peak bytes", "/full", "together", "saved bytes", "/full", "gap")
    return Picture(
        name="performance-costs",
        caption=(
            "Means over seeds at the best rates. Memory is that of the allocator on a GPU and of the whole process on "
            "a CPU. Hollow: trained in one pass with other runs, whose peak is that of all and whose time is a share. "
            f"The gap is the training loss over the last 1/{LAST_STRETCH} of the steps less the loss on the test "
            "split; at one seed all runs see the same batches, so gaps compare though their zero means little."
        ),
        alt=_costs_alt(found),
        draw=partial(plot_costs, found),
        data=Table(
            name="performance-costs",
            caption="What each method costs at its best rate, mean over seeds.",
            header=header,
            rows=[_cost_row(entry, found.entry_of("full")) for entry in found.entries if entry.method != "base"],
        ),
    )


def _cost_row(entry: Entry, full: Entry | None) -> tuple[Cell, ...]:
    def beside(own: float | None, whole: float | None) -> tuple[Cell, Cell]:
        return own, own / whole if own is not None and whole else None

    return (
        entry.label,
        *beside(entry.seconds_per_step, full.seconds_per_step if full else None),
        *beside(entry.peak_memory, full.peak_memory if full else None),
        entry.together,
        *beside(entry.saved_bytes, full.saved_bytes if full else None),
        entry.gap,
    )


def _costs_alt(found: Performance) -> str:
    full = found.entry_of("full")
    said = []
    for entry in dict.fromkeys((0, -1)):
        _, seconds, seconds_share, peak, peak_share, _, saved, saved_share, gap = _cost_row(
            found.lora_curve[entry], full
        )
        costs = (
            ("seconds a step", seconds_share or seconds),
            ("peak memory", peak_share or peak),
            ("saved size", saved_share or saved),
            ("gap of training and test loss", gap),
        )
        told = ", ".join(f"{name} {value:.3g}" for name, value in costs if isinstance(value, int | float))
        said.append(f"r = {found.lora_curve[entry].rank}: {told}.")
    return f"Costs{' relative to full fine-tuning' if full else ''}. {' '.join(dict.fromkeys(said))}"


# Tables


def _scores(found: Performance) -> Table:
    return Table(
        name="performance-scores",
        caption=(
            f"{found.metric} on the test split at the best rate, mean over seeds with its {CONFIDENCE_LEVEL:.0%} interval; gain "
            "over the base; share of full fine-tuning's gain (Fieller's interval, paired by seed); p of equivalence, "
            "as it is and corrected for LoRA's ranks. “!” marks a best rate on the edge of those tried."
        ),
        header=(
            *("run", "rate", "seeds", "trained", found.metric, "from", "to", "gain", "from", "to"),
            *("share", "from", "to", "p", "p, corrected"),
        ),
        rows=[
            (
                *(entry.label, _rate(entry), len(entry.seeds), entry.trainable or None, *entry.score),
                *(entry.gain or (None,) * 3),
                *(entry.share or (None,) * 3),
                *(entry.p, entry.corrected),
            )
            for entry in found.entries
        ],
    )


def _rate(entry: Entry) -> str | None:
    return None if entry.lr is None else f"{entry.lr:g}{' !' if entry.edge else ''}"


def _targets(found: Performance) -> list[Table]:
    """Which matrices to adapt, where LoRA was trained on several sets of them."""
    entries = [e for e in found.entries if e.method == found.method and e.rank]
    sets = list(dict.fromkeys(entry.targets for entry in entries))
    if len(sets) < 2:
        return []
    same = entries_at_budget(entries, found.budget)
    ranks = sorted({entry.rank for entry in entries if entry.rank})
    tables = [_which(found, same)] if len(same) > 1 else []
    return tables + ([_cross_table(found, entries, sets, ranks)] if len(ranks) > 1 and found.budget is None else [])


def entries_at_budget(entries: Sequence[Entry], budget: int | None) -> list[Entry]:
    """One entry for each set of targets, with as many trained parameters: the study's own budget, or else the
    largest that most sets have a rank for.
    """
    chosen: list[Entry] = []
    for amount in sorted({entry.trainable for entry in entries}):
        near: dict[str | None, Entry] = {}
        for entry in entries:
            off = abs(entry.trainable - amount)
            better = entry.targets not in near or off < abs(near[entry.targets].trainable - amount)
            if better and (budget is not None or off <= NEAR * amount):
                near[entry.targets] = entry
        if len(near) >= len(chosen):
            chosen = list(near.values())
    return chosen


def _which(found: Performance, same: Sequence[Entry]) -> Table:
    """Table 5 of Hu et al. 2021."""
    names = [entry.targets or "the task's own" for entry in same]
    shares = [entry.share.value if entry.share else None for entry in same]
    return Table(
        name="which-matrices",
        caption="Which matrices to adapt at one number of trained parameters (the form of Table 5 of Hu et al. 2021).",
        header=("", *names),
        rows=[
            ("rank r", *(entry.rank for entry in same)),
            ("trained parameters", *(entry.trainable for entry in same)),
            (found.metric, *(entry.score.value for entry in same)),
            (f"{CONFIDENCE_LEVEL:.0%} interval", *(_ends(entry.score) for entry in same)),
            ("share of full fine-tuning's gain", *shares),
        ],
    )


def _cross_table(
    found: Performance, entries: Sequence[Entry], sets: Sequence[str | None], ranks: Sequence[int]
) -> Table:
    """Table 6 of Hu et al. 2021."""
    cells = {(entry.targets, entry.rank): entry.score.value for entry in entries}
    return Table(
        name="ranks-of-targets",
        caption=f"{found.metric} by adapted matrices and rank (the form of Table 6 of Hu et al. 2021).",
        header=("matrices", *(f"r = {rank}" for rank in ranks)),
        rows=[(targets or "the task's own", *(cells.get((targets, rank)) for rank in ranks)) for targets in sets],
    )


def _ends(found: Interval) -> str | None:
    return None if found.low is None or found.high is None else f"{found.low:.4g} to {found.high:.4g}"


def _notes(found: Performance) -> list[str]:
    notes = [
        "Intervals are over seeds (initial factors, order of the data), for this test split: another one would move "
        "all scores. Each rank's interval stands alone; it is not corrected for the number of ranks.",
        "Full fine-tuning moves every weight, also those that LoRA leaves alone: not all that a share lacks of 1 is a "
        "matter of rank.",
    ]
    single = dict.fromkeys(entry.method for entry in found.entries if entry.rates == 1)
    if single:
        notes.append(f"One rate was tried for {', '.join(single)}: the best may be another.")
    seeds = {len(entry.seeds) for entry in found.entries}
    if len(seeds) > 1:
        notes.append("Not every method has every seed; shares and differences are over the seeds in common.")
    if found.lost:
        more = f" and {len(found.lost) - 5} more" if len(found.lost) > 5 else ""
        notes.append(f"Diverged or stopped, and in no number here: {', '.join(found.lost[:5])}{more}.")
    return notes
