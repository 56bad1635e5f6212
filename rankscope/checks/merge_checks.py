"""Checks of a checkpoint that should contain an adapter: where it has it, at what scale, and to what precision."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rankscope.checks.finding import (
    Finding,
    format_names,
    format_share,
    report_error,
    report_ok,
    report_unchecked,
    report_warning,
)
from rankscope.checks.merge_facts import MergedLayer, MergeFacts
from rankscope.checks.thresholds import Limits

DEVIATIONS = 4.0
"""How many standard deviations of noise are allowed for in the scale of a layer."""
UNCLEAR = 0.5
"""With a larger tolerance a scale of 0 is not told from a scale of 1."""


def check_merged_names(facts: MergeFacts, _: Limits) -> Finding:
    """Whether checkpoint and base have the adapter's layers at all."""
    count = len(facts.missing) + len(facts.layers)
    if facts.missing:
        return report_error(
            f"{format_share(len(facts.missing), count, 'layer')} of the adapter match no weight in the checkpoint or "
            f"in the base, first {facts.missing[0]}",
            "are these the base that was tuned, and a checkpoint of it?",
            layers=facts.missing,
        )
    unread = [layer for layer in facts.layers if layer.problem]
    if unread:
        return report_error(
            f"{format_share(len(unread), count, 'layer')} cannot be compared: {unread[0].problem}",
            "save that file again",
            layers=[layer.name for layer in unread],
        )
    return report_ok(f"all {count} layers of the adapter are in the checkpoint and in the base", count)


def check_merged_scale(facts: MergeFacts, limits: Limits) -> Finding | None:
    """The multiple of the adapter that the checkpoint has, in total and in each layer."""
    layers = facts.nonzero_layers
    if not layers:
        return None if facts.missing else report_unchecked("the adapter changes nothing, so nothing can be missing")
    if all(_tolerance(layer, limits) >= UNCLEAR for layer in layers):
        return report_unchecked(
            "what changed in these layers is so large beside the update that it cannot be seen among it",
            "compare with the checkpoint as it was before the adapter was merged: give that with --base",
        )
    scale, expected = scale_in_checkpoint(layers), scale_after_rounding(layers)
    off = [layer for layer in layers if abs(layer.scale - layer.expected_scale) > _tolerance(layer, limits)]
    absent = [layer for layer in off if abs(layer.scale) <= _tolerance(layer, limits)]
    says = f"it has the adapter {scale:.3f} times in {len(layers)} layers"
    if len(absent) == len(layers):
        return report_error(
            f"it does not have the adapter: {scale:.3f} times in {len(layers)} layers",
            "merge it with rankscope merge",
            scale,
            expected,
            [layer.name for layer in absent],
        )
    if absent:
        return report_error(
            f"{format_share(len(absent), len(layers), 'layer')} lack the adapter (first {absent[0].name}), the others "
            f"have it {scale_in_checkpoint([layer for layer in layers if layer not in absent]):.3f} times",
            "the merge was partial: merge again with rankscope merge",
            scale,
            expected,
            [layer.name for layer in absent],
        )
    if off:
        return report_warning(
            f"{says}, not {expected:.3f}; {format_share(len(off), len(layers), 'layer')} differ (first {off[0].name}: "
            f"{off[0].scale:.3f})",
            "was it merged with another weight or α, or with other adapters?",
            scale,
            expected,
            [layer.name for layer in off],
        )
    return report_ok(says, scale, expected)


def scale_in_checkpoint(layers: Sequence[MergedLayer]) -> float:
    """Σ⟨M − W, U⟩/Σ‖U‖² over layers."""
    return math.fsum(layer.inner for layer in layers) / math.fsum(layer.update**2 for layer in layers)


def scale_after_rounding(layers: Sequence[MergedLayer]) -> float:
    """The same of a merge that is rounded to the checkpoint's dtype."""
    return math.fsum(layer.expected_inner for layer in layers) / math.fsum(layer.update**2 for layer in layers)


def relative_residual(layers: Sequence[MergedLayer], limits: Limits) -> tuple[float, float]:
    """‖M − (W + U)‖/‖U‖ over all layers, and what rounding leaves of it.

    Where the checkpoint has U another number of times than a merge would, that multiple of U is taken, layer by layer.
    """
    update = math.hypot(*(layer.update for layer in layers))
    is_whole = abs(scale_in_checkpoint(layers) - scale_after_rounding(layers)) <= limits["merge_scale"]
    residual = math.hypot(*(layer.residual if is_whole else layer.scaled_residual for layer in layers))
    return residual / update, math.hypot(*(layer.rounding for layer in layers)) / update


def _tolerance(layer: MergedLayer, limits: Limits) -> float:
    return limits["merge_scale"] + DEVIATIONS * layer.deviation


def check_merged_residual(facts: MergeFacts, limits: Limits) -> Finding | None:
    """What the checkpoint has in these layers beside the adapter."""
    layers = facts.nonzero_layers
    if not layers:
        return None
    residual, rounding = relative_residual(layers, limits)
    says = f"its layers differ from the merge by {residual:.2g} of ‖ΔW‖, where rounding alone leaves {rounding:.2g}"
    if residual <= max(limits["merge_precision"], limits["merge_residual"] * rounding):
        return report_ok(says, residual, rounding)
    return report_warning(
        says,
        "something else changed these weights: other adapters, more training, quantisation, or another base",
        residual,
        rounding,
        [
            layer.name
            for layer in layers
            if layer.residual > max(limits["merge_precision"] * layer.update, limits["merge_residual"] * layer.rounding)
        ],
    )


def check_merged_rounding(facts: MergeFacts, limits: Limits) -> Finding | None:
    """How much of the adapter the dtype of the checkpoint can hold."""
    layers = facts.nonzero_layers
    if not layers:
        return None
    lost = 1 - scale_after_rounding(layers)
    says = f"rounding to the checkpoint's dtype keeps {100 - 100 * lost:.1f} % of the update"
    if lost <= limits["merge_lost"]:
        return report_ok(says, lost)
    return report_warning(says, "merge into float32, or keep the adapter beside the model", lost, limits["merge_lost"])


def check_merged_others(facts: MergeFacts, _: Limits) -> Finding:
    """Whether anything else differs from the base."""
    if not facts.changed:
        return report_ok(f"the other {facts.others} tensors are those of the base", 0)
    return report_warning(
        f"{len(facts.changed)} of {facts.others} other tensors differ from the base: {format_names(facts.changed)}",
        "the checkpoint has more than this adapter, or another base",
        layers=facts.changed,
    )
