"""The section on agreement: is LoRA's update the low-rank part of the one that full fine-tuning makes?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rankscope.evidence.agreement.figure import plot_agreement
from rankscope.evidence.agreement.measure import Agreement, LayerRow, RankAgreement
from rankscope.report.document import Cell, Picture, Section, Table
from rankscope.verdict import MAX_CORRECTED_P, Verdict

LORA, FULL = "LoRA", "another full fine-tuning, cut"


def build_section(found: Agreement, verdicts: Sequence[Verdict]) -> Section:
    """LoRA against full fine-tuning, as evidence on whether both look for the same update."""
    return Section(
        lead=(
            "If full fine-tuning's update is low-rank at heart, LoRA should find that part of it: at each rank LoRA's "
            "update is set beside the best approximation of that rank, and beside full fine-tuning with another seed."
        ),
        verdicts=verdicts,
        pictures=(_picture(found),),
        tables=(_summary(found), _layers(found)),
        notes=tuple(_notes(found)),
    )


def _series(found: Agreement) -> list[tuple[str, RankAgreement]]:
    return [(LORA, one) for one in found.ranks] + [(FULL, one) for one in found.repeat]


def _picture(found: Agreement) -> Picture:
    return Picture(
        name="agreement",
        caption=(
            "Errors and cosines of all layers together, mean over seeds; the other two are medians over layers. Bars "
            "are 95 % intervals. “Another full fine-tuning” is the full update of another seed, cut to rank r."
        ),
        alt=_alt(found),
        draw=lambda: plot_agreement(found),
        data=Table(
            name="agreement",
            caption="What the figure shows.",
            header=(
                *("update", "rank", "floor", "error", "error, best multiple", "cosine"),
                *("explained", "from", "to", "left", "left by chance", "right", "right by chance"),
            ),
            rows=[
                (
                    *(name, one.rank, one.total.floor.value, one.total.achieved.value, one.total.scaled.value),
                    *(one.total.cosine.value, *one.efficiency, one.left.value, one.left_chance),
                    *(one.right.value, one.right_chance),
                )
                for name, one in _series(found)
            ],
        ),
    )


def _alt(found: Agreement) -> str:
    first, last = found.ranks[0], found.ranks[-1]
    values = {
        "the least possible error goes": (first.total.floor, last.total.floor),
        "LoRA's with the best multiple": (first.total.scaled, last.total.scaled),
        "its cosine": (first.total.cosine, last.total.cosine),
        "what it explains of what the rank could": (first.efficiency, last.efficiency),
    }
    if found.repeat:
        values["what another full fine-tuning explains"] = found.repeat[0].efficiency, found.repeat[-1].efficiency
    ends = [f"{name} from {one.value:.2g} to {other.value:.2g}" for name, (one, other) in values.items()]
    return (
        f"From r = {first.rank} to r = {last.rank} {', '.join(ends)}. At r = {last.rank} LoRA's output space holds "
        f"{last.left.value:.2g} of the full update's energy, by chance {last.left_chance:.2g}, its input space "
        f"{last.right.value:.2g}, by chance {last.right_chance:.2g}."
    )


def _summary(found: Agreement) -> Table:
    return Table(
        name="agreement-ranks",
        caption=(
            "All layers as one vector, means over seeds; then medians over layers. “Explained” is (1 − error²)/(1 − "
            f"floor²) with the best multiple; beyond chance are layers with a corrected p below {MAX_CORRECTED_P:g}."
        ),
        header=(
            *("update", "rank", "seeds", "floor", "error", "best multiple", "cosine", "‖LoRA‖/‖full‖"),
            *("explained", "from", "to", "left", "right", "both", "left, right, both by chance"),
            *("φ(1, 1) left", "φ(1, 1) right", "layers", "left beyond chance", "right beyond chance"),
        ),
        rows=[_summary_row(name, one) for name, one in _series(found)],
        digits=3,
    )


def _summary_row(name: str, one: RankAgreement) -> tuple[Cell, ...]:
    total = one.total
    return (
        *(name, one.rank, len(one.seeds), total.floor.value, total.achieved.value, total.scaled.value),
        *(total.cosine.value, total.ratio.value, *one.efficiency, one.left.value, one.right.value, one.both.value),
        f"{one.left_chance:.2g}, {one.right_chance:.2g}, {one.both_chance:.2g}",
        *(one.top_left.value, one.top_right.value, len(one.rows), one.significant_left, one.significant_right),
    )


def _layers(found: Agreement) -> Table:
    return Table(
        name="agreement-layers",
        caption="Each layer at each rank, means over seeds; p is corrected for the grid, all layers and sides.",
        header=(
            *(
                "rank",
                "layer",
                "out × in",
                "‖full‖",
                "‖LoRA‖",
                "floor",
                "error",
                "best multiple",
                "cosine",
                "explained",
            ),
            *("left", "left by chance", "right", "right by chance", "both", "both by chance"),
            *("φ(1, 1) left", "its chance", "p left", "φ(1, 1) right", "chance of it", "p right"),
        ),
        rows=[_layer_row(one.rank, row) for one in found.ranks for row in one.rows],
        digits=3,
    )


def _layer_row(rank: int, row: LayerRow) -> tuple[Cell, ...]:
    out, into = row.shape
    return (
        *(rank, row.layer, f"{out} × {into}", row.norm_full, row.norm_lora, row.floor, row.achieved, row.scaled),
        *(row.cosine, row.efficiency, row.left, row.left_chance, row.right, row.right_chance),
        *(row.both, row.both_chance, row.top_left, row.top_left_chance, row.holm_left),
        *(row.top_right, row.top_right_chance, row.holm_right),
    )


def _notes(found: Agreement) -> Iterator[str]:
    yield (
        "The least error of rank r is √Σσ² of the full update beyond σ_r, over its norm (Eckart & Young). The best "
        "multiple of LoRA's update is not below zero: one that points the other way explains nothing."
    )
    yield (
        "LoRA saw the batches of the full fine-tuning that it is compared with; another full fine-tuning saw others, "
        "from the same base."
    )
    if found.skipped:
        yield f"Left out: {'; '.join(found.skipped)}."
