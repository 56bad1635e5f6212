"""Whether what is written has its place in the model it is for, by the model that transformers builds from the
configuration: what has none is ignored on loading, without an error there, so it is told here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rankscope.formats.abstract_store import examples
from rankscope.formats.model_outline import ModelOutline, outline_model


def outline_of_class(config: Mapping[str, Any]) -> ModelOutline | None:
    """The model of the class that the configuration names; None where it names none, or transformers lacks it."""
    return outline_model(config) if config.get("architectures") else None


def describe_misfits(config: Mapping[str, Any], modules: Collection[str]) -> list[str]:
    """What PEFT would make of an adapter of these modules (low-rank or whole) on the model of ``config``, where that
    is not what the files say: a sentence each. None where the model is not known."""
    outline = outline_of_class(config)
    if outline is None:
        return []
    absent = [module for module in modules if module not in outline.modules]
    notes = []
    if absent:
        notes.append(
            f"{len(absent)} of {len(modules)} modules ({examples(absent)}) do not exist in the {outline.class_name} "
            "that transformers builds: PEFT cannot place them, so the adapter lacks what they change"
        )
    return notes + [
        f"{examples(changed)} and {examples(others)} are tied, one weight in the model; the adapter changes the former "
        "alone, and in PEFT the latter may keep the base's weight"
        for changed, others in _split_ties(outline, modules)
    ]


def _split_ties(outline: ModelOutline, modules: Collection[str]) -> list[tuple[list[str], list[str]]]:
    """Groups of tied parameters of which some are in the modules and some are not: both, by name."""
    splits = []
    for group in outline.tied_weights:
        changed = sorted(name for name in group if any(name.startswith(f"{module}.") for module in modules))
        others = sorted(set(group) - set(changed))
        if changed and others:
            splits.append((changed, others))
    return splits


def find_strangers(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """The tensors that the model of ``config`` has no parameter for; none where the model is not known."""
    outline = outline_of_class(config)
    return [] if outline is None else [name for name in names if outline.find_parameter(name) is None]
