"""Checks of an adapter beside its base: whether its layers are there, under the same names and in the same shapes."""

from __future__ import annotations

import re

from rankscope.checks.adapter_facts import AdapterFacts
from rankscope.checks.finding import (
    Finding,
    format_names,
    format_share,
    report_error,
    report_ok,
    report_unchecked,
    report_warning,
)
from rankscope.checks.thresholds import Limits
from rankscope.formats.names import strip_wrappers
from rankscope.formats.peft_keys import PEFT_PREFIX

# What training puts around a model; more than ``strip_wrappers`` takes off, since PEFT's own wrapper counts too.
_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model|module)(?=\.)"
)


def check_names(facts: AdapterFacts, _: Limits) -> Finding | None:
    """Whether the layers are layers of the base: a name that matches nothing is ignored without an error."""
    modules = facts.modules
    if not modules or (facts.store is None and facts.config.get("target_parameters")):
        return None
    # Readers leave torch's wrappers out of the names, loaders do not.
    stored = [key.rpartition(".lora_")[0] or key for key in facts.ranges if strip_wrappers(key) != key]
    wrapped = list(dict.fromkeys(stored)) or [name for name in modules if _WRAPPER.search(name)]
    if wrapped:
        match = _WRAPPER.search(wrapped[0].removeprefix(PEFT_PREFIX))
        return report_error(
            f"{format_share(len(wrapped), len(modules), 'name')} contain {match[0] if match else ''!r}, which the "
            f"training put there (first {wrapped[0]}): no model has such a layer, and loaders ignore it without an "
            "error",
            "take it out of the keys, or save the unwrapped model",
            layers=wrapped,
        )
    base = facts.base
    if base is None:
        return report_unchecked(
            f"whether the {len(modules)} names are layers of the base is not known without it",
            "give the base with --base",
        )
    if base.missing:
        none = len(base.missing) == len(modules)
        return report_error(
            f"{format_share(len(base.missing), len(modules), 'layer')} match nothing in the base {base.path} (first "
            f"{base.missing[0]}; it has {format_names(base.examples)}): "
            + ("the adapter does nothing there, without an error" if none else "that part is ignored without an error"),
            "is this the base that was tuned? If so, rename the keys as the base has them",
            layers=base.missing,
        )
    return _check_prefix(facts) or report_ok(f"all {len(modules)} layers are in the base {base.path}", 0)


def _check_prefix(facts: AdapterFacts) -> Finding | None:
    """What stands before the names on one side: loaders compare whole names with those of the model in memory."""
    base = facts.base
    if base is None or not base.prefix:
        return None
    task = facts.config.get("task_type")
    if base.doubled:
        return report_error(
            f"the names fit the base only without {base.prefix!r} in front, which the base's names begin with already "
            f"(first {next(iter(base.partners))}): loaders ignore such layers without an error",
            "take it out of the keys: the adapter was saved from inside a wrapper",
            layers=base.partners,
        )
    if base.prefix_side == "adapter" and not base.is_body:
        return report_warning(
            f"the names fit the base only without {base.prefix!r} in front (first {next(iter(base.partners))}), which "
            "is no part of this kind of model: a loader may ignore them without an error",
            "compare the keys with the names of the model in memory (model.named_modules())",
            layers=base.partners,
        )
    if base.prefix_side == "base" and task not in (None, "FEATURE_EXTRACTION"):
        return report_warning(
            f"the base's names have {base.prefix!r} in front, and the adapter's, for {task}, have not: it was trained "
            "on the inner model, and a loader of the whole model may ignore it without an error",
            f"load it onto the model without the head, or put {base.prefix!r} into the keys",
            len(base.partners),
            0,
        )
    return report_ok(
        f"all {len(base.partners)} layers are in the base {base.path}, with {base.prefix!r} in front in the "
        f"{base.prefix_side} only (the model with and without its head)",
        0,
    )


def check_base_shapes(facts: AdapterFacts, _: Limits) -> Finding | None:
    """Whether each update has the shape of its weight in the base."""
    base = facts.base
    if base is None or not base.partners:
        return None
    if base.misfits:
        name, (shape, other) = next(iter(base.misfits.items()))
        return report_error(
            f"{format_share(len(base.misfits), len(base.partners), 'update')} have another shape than their weight, "
            f"first {name}: {shape[0]} × {shape[1]}, in the base {other[0]} × {other[1]}",
            "is this the base that was tuned? Look at its size and at its vocabulary",
            layers=base.misfits,
        )
    return report_ok(f"all {len(base.partners)} updates have the shapes of their weights", 0)
