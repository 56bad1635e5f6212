"""Checks of the numbers: whether anything was learned, how large it is, how it is distributed, where it overflows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from rankscope.checks.adapter_facts import DORA_PRODUCT, DORA_WHOLE, WHOLE_METHODS, AdapterFacts, LayerFacts
from rankscope.checks.finding import (
    Finding,
    format_names,
    format_share,
    report_error,
    report_ok,
    report_unchecked,
    report_warning,
)
from rankscope.checks.thresholds import FP16_MAX, Limits
from rankscope.formats.peft_config import BASE_MODIFYING_INITS, resolve_pattern
from rankscope.formats.peft_lora import PeftStore

FEWEST_FOR_MEDIAN = 5
"""With fewer layers a median says nothing about one of them."""


def check_trained(facts: AdapterFacts, _: Limits) -> Finding | None:
    """Updates that are exactly zero: B is as it began."""
    layers = facts.products
    if not layers:
        return None
    zero = [layer for layer in layers if layer.norm == 0]
    if not zero:
        return report_ok(f"{format_share(len(layers), len(layers), 'layer')} changed in training", 0)
    factor = zero[0].zero_factor
    reason = f"{factor} is all zero" if factor else "the update is zero"
    if len(zero) == len(layers):
        return report_error(
            f"{reason} in {format_share(len(zero), len(layers), 'layer')}: the adapter is untrained and changes "
            "nothing",
            "save it after training; were its parameters in the optimizer, and on the device that was saved?",
            layers=[layer.name for layer in zero],
        )
    return report_warning(
        f"{reason} in {format_share(len(zero), len(layers), 'layer')}, which change nothing: "
        f"{format_names(layer.name for layer in zero)}",
        "were these layers reached in training? If they are not needed, leave them out",
        layers=[layer.name for layer in zero],
    )


def check_scale(facts: AdapterFacts, limits: Limits) -> Finding | None:
    """The number that B·A is multiplied by."""
    layers = [layer for layer in facts.layers if layer.rank is not None and layer.method not in WHOLE_METHODS]
    if not layers or not facts.is_alpha_known:
        return None
    low, high = limits["scale_low"], limits["scale_high"]
    odd = [layer for layer in layers if not low <= abs(layer.scale) <= high or layer.scale < 0]
    if not odd:
        return report_ok(f"the scale is {_describe_scales(layers)}", statistics.median(_scales(layers)))
    worst = max(odd, key=lambda layer: abs(math.log(abs(layer.scale) or 1e-300)))
    where = f"in {format_share(len(odd), len(layers), 'layer')} (first {odd[0].name})"
    names = [layer.name for layer in odd]
    if worst.scale == 0:
        return report_error(f"the scale is 0 {where}: α is 0, and nothing is applied", "correct α", 0, low, names)
    if worst.scale < 0:
        return report_warning(
            f"the scale is {worst.scale:.3g} {where}: what was learned is subtracted",
            "correct α",
            worst.scale,
            0,
            names,
        )
    limit = low if worst.scale < low else high
    return report_warning(
        f"the scale is {worst.scale:.3g} {where}, {'below' if limit == low else 'above'} {limit:.3g}: out of the "
        "ordinary",
        "compare α and r with the training: α/r, or α/√r with rsLoRA",
        worst.scale,
        limit,
        names,
    )


def _scales(layers: Sequence[LayerFacts]) -> list[float]:
    return [layer.scale for layer in layers]


def _describe_scales(layers: Sequence[LayerFacts]) -> str:
    low, high = min(_scales(layers)), max(_scales(layers))
    ranks = sorted({layer.rank for layer in layers if layer.rank is not None})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"{low:.4g} at rank {rank}" if low == high else f"{low:.4g} to {high:.4g} at rank {rank}"


def check_rslora(facts: AdapterFacts, _: Limits) -> Finding | None:
    """rsLoRA: what a reader that does not know it would apply."""
    if not facts.config.get("use_rslora"):
        return None
    ranks = [layer.rank for layer in facts.layers if layer.rank]
    if not ranks:
        return None
    rank = max(ranks)
    return report_ok(
        f"rsLoRA: the scale is α/√r, at r = {rank} {math.sqrt(rank):.3g} times the α/r that a reader without rsLoRA "
        "takes",
        math.sqrt(rank),
    )


def check_alpha(facts: AdapterFacts, _: Limits) -> Finding | None:
    """α that is missing, or that a pattern gives to no layer."""
    if not facts.is_alpha_known:
        return report_warning(
            "the file gives no α, so the size of its updates is not known (α = 1 is taken here)",
            "give the α of the training with --alpha",
        )
    if not facts.is_peft:
        without = [layer for layer in facts.layers if layer.rank and layer.alpha is None]
        if without and facts.store is not None and facts.store.kind == "kohya":
            return report_warning(
                f"{format_share(len(without), len(facts.layers), 'layer')} have no α; readers take α = r, a scale of 1",
                "if it was trained with another α, give it with --alpha and convert",
                layers=[layer.name for layer in without],
            )
        return None
    unused = [
        f"{field} {pattern!r}"
        for field in ("alpha_pattern", "rank_pattern")
        for pattern in facts.config.get(field) or {}
        if not any(resolve_pattern({pattern: True}, module, False) for module in facts.modules)
    ]
    if unused:
        return report_warning(
            f"{format_names(unused)} fits no layer, so α or r there is that of all",
            "correct the pattern in adapter_config.json",
            len(unused),
            0,
        )
    return None


def holds_initial_product(facts: AdapterFacts) -> bool:
    """Whether B·A contains the product that an initialisation such as PiSSA's took out of the base."""
    init = facts.config.get("init_lora_weights")
    is_moved = isinstance(init, str) and init.lower().startswith(BASE_MODIFYING_INITS)
    return is_moved and not (isinstance(facts.store, PeftStore) and facts.store.has_initial)


def check_initialisation(facts: AdapterFacts, _: Limits) -> Finding | None:
    """Initialisations that moved the base: on the base as it was published the adapter is wrong."""
    init = facts.config.get("init_lora_weights")
    if not holds_initial_product(facts):
        has_initial = isinstance(facts.store, PeftStore) and facts.store.has_initial
        return report_ok("its initial factors are there and are subtracted") if has_initial else None
    return report_warning(
        f"initialised with {init}, which moved the base too: on the published base B·A is not what was learned",
        "save it with path_initial_model_for_weight_conversion, or give the initial adapter (subfolder initial)",
    )


def _layers_beside_weights(facts: AdapterFacts) -> list[LayerFacts]:
    """The layers whose size beside their weight is known; of DoRA the whole update, not the product."""
    whole = {layer.name.rpartition(":")[0] for layer in facts.layers if layer.method == DORA_WHOLE}
    return [
        layer
        for layer in facts.layers
        if layer.weight_norm
        and not layer.problem
        and (layer.is_product or layer.method == DORA_WHOLE)
        and not (layer.method == DORA_PRODUCT and layer.name in whole)
    ]


def check_size(facts: AdapterFacts, limits: Limits) -> Finding | None:
    """‖ΔW‖/‖W‖ over all layers."""
    layers = _layers_beside_weights(facts)
    if not facts.products:
        return None
    if holds_initial_product(facts):
        return report_unchecked(
            "‖ΔW‖/‖W‖ is not known: B·A contains what the initialisation took out of the base",
            "give the initial adapter (subfolder initial) to see what was learned",
        )
    if not layers:
        return report_unchecked("‖ΔW‖/‖W‖ is not known without the weights of the base", "give the base with --base")
    ratio = math.hypot(*(layer.norm for layer in layers)) / math.hypot(*(layer.weight_norm or 0.0 for layer in layers))
    says = f"‖ΔW‖/‖W‖ is {ratio:.2g} over {len(layers)} layer{'s' * (len(layers) != 1)}"
    if ratio > limits["size_broken"]:
        return report_error(
            f"{says}: the model is probably broken",
            "look at α and at the learning rate; apply it with a smaller weight",
            ratio,
            limits["size_broken"],
        )
    if ratio > limits["size_high"]:
        return report_warning(
            f"{says}: very strong", "compare the model's answers with the base's", ratio, limits["size_high"]
        )
    if 0 < ratio < limits["size_low"]:
        return report_warning(
            f"{says}: too small to matter, and lost when merged in half precision",
            "train longer or with a higher rate; look at α",
            ratio,
            limits["size_low"],
        )
    return report_ok(says, ratio)


def check_layer_sizes(facts: AdapterFacts, limits: Limits) -> Finding | None:
    """‖ΔW‖/‖W‖ of single layers."""
    layers = _layers_beside_weights(facts)
    if not layers or holds_initial_product(facts):
        return None
    ratios = {layer.name: layer.norm / (layer.weight_norm or 1.0) for layer in layers}
    worst = max(ratios, key=lambda name: ratios[name])
    high = [name for name, ratio in ratios.items() if ratio > limits["layer_size_high"]]
    if not high:
        return report_ok(f"the largest ‖ΔW‖/‖W‖ of a layer is {ratios[worst]:.2g} ({worst})", ratios[worst])
    return report_warning(
        f"‖ΔW‖/‖W‖ is {ratios[worst]:.3g} in {worst}; above {limits['layer_size_high']:g} in "
        f"{format_share(len(high), len(layers), 'layer')}",
        "look at these layers with rankscope spectrum",
        ratios[worst],
        limits["layer_size_high"],
        high,
    )


def check_spike(facts: AdapterFacts, limits: Limits) -> Finding | None:
    """A layer with one direction that is far above those of all other layers."""
    layers = [layer for layer in facts.products if layer.values and layer.norm > 0]
    if holds_initial_product(facts) or len(layers) < FEWEST_FOR_MEDIAN:
        return None
    median = statistics.median(layer.values[0] for layer in layers)
    spikes = [
        layer
        for layer in layers
        if layer.values[0] > limits["spike_ratio"] * median and layer.stable_rank < limits["spike_stable_rank"]
    ]
    largest = max(layers, key=lambda layer: layer.values[0])
    ratio = largest.values[0] / median
    if not spikes:
        return report_ok(f"no spike: the largest σ₁ is {ratio:.2g} × the median of the layers", ratio)
    spike = max(spikes, key=lambda layer: layer.values[0])
    return report_warning(
        f"a spike: σ₁ of {spike.name} is {spike.values[0] / median:.3g} × the median of the layers, with a stable rank "
        f"of {spike.stable_rank:.2f}",
        "an outlier of the training, or a damaged entry of a factor: rankscope spectrum shows the layer",
        spike.values[0] / median,
        limits["spike_ratio"],
        [layer.name for layer in spikes],
    )


def check_rank_use(facts: AdapterFacts, limits: Limits) -> Finding | None:
    """Directions that hold nothing."""
    layers = [layer for layer in facts.products if layer.values and layer.norm > 0 and layer.rank]
    if not layers:
        return None
    shares, used = [], []
    for layer in layers:
        cut = limits["unused_sigma"] * layer.values[0]
        used.append(sum(value > cut for value in layer.values))
        shares.append(1 - used[-1] / min(layer.rank or 1, *layer.shape))
    ranks = [layer.rank or 0 for layer in layers]
    k99 = statistics.median(layer.k99 for layer in layers)
    says = f"of rank {_span(ranks)} {_span(used)} directions are used; 99 % of the energy is in {k99:g} (median)"
    share = statistics.median(shares)
    if share < limits["unused_share"]:
        return report_ok(says, share)
    return report_warning(
        says,
        f"rankscope resize --rank {max(used)} makes it smaller and loses nothing",
        share,
        limits["unused_share"],
    )


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def check_half_precision(facts: AdapterFacts, limits: Limits) -> Finding:
    """Whether float16 can hold the factors and the merged weights."""
    factors = {key: stored.largest for key, stored in facts.ranges.items()}
    merged = {layer.name: layer.largest_merged for layer in facts.products}
    everything = {**factors, **merged}
    worst = max(everything, key=lambda name: everything[name], default="")
    largest = everything.get(worst, 0.0)
    what = "W + ΔW" if worst in merged and worst not in factors else "the factors"
    says = f"the largest entry of {what} is {largest:.3g} ({worst})"
    stored = {*(layer.dtype for layer in facts.layers), *(facts.base.dtypes.values() if facts.base else ())}
    is_half = torch.float16 in stored
    if largest > FP16_MAX:
        report = report_error if is_half else report_warning
        return report(
            f"{says}, and float16 ends at 65504", "use bfloat16 or float32, not float16", largest, FP16_MAX, [worst]
        )
    if largest > limits["fp16_share"] * FP16_MAX:
        return report_warning(
            f"{says}, near the end of float16 (65504)",
            "use bfloat16 or float32, not float16",
            largest,
            limits["fp16_share"] * FP16_MAX,
            [worst],
        )
    tiny = [key for key, size in factors.items() if 0 < size < limits["fp16_smallest"]]
    if tiny:
        return report_warning(
            f"the largest entry of {tiny[0]} is {factors[tiny[0]]:.2g}: float16 loses most of its digits"
            f" ({format_share(len(tiny), len(factors), 'tensor')})",
            "keep it in float32 or bfloat16",
            factors[tiny[0]],
            limits["fp16_smallest"],
            tiny,
        )
    return report_ok(f"float16 holds it: {says}", largest)
