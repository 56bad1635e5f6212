"""What changed beside the low-rank layers, and how PEFT can carry it: whole modules, and biases."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from rankscope.formats.abstract_store import SkippedItem
from rankscope.formats.peft_keys import PEFT_PREFIX
from rankscope.formats.streaming import LazyTensor
from rankscope.surgery.full_finetune import FullFinetune


class ModulesToSave(NamedTuple):
    """``tensors`` by PEFT's key; ``modules`` saved whole; ``biases``: modules of which the bias alone goes along."""

    tensors: dict[str, LazyTensor]
    modules: list[str]
    biases: list[str]
    skipped: list[SkippedItem]


def find_modules_to_save(tuned: FullFinetune, low_rank: Collection[str], unchanged: Collection[str]) -> ModulesToSave:
    """Everything that changed beside the weights of ``low_rank``, as far as PEFT can carry it.

    ``unchanged``: layers of which that is known of the weight, so that it is not read again.

    A module that holds no other goes along whole (``modules_to_save``), a bias alone as a bias. PEFT compares the ends
    of paths, so a module whose path ends another's takes that one along.
    """
    modules: list[str] = []
    biases: list[str] = []
    skipped = _unknown(tuned)
    own: dict[str, list[str]] = {}
    for name in tuned.infos:
        own.setdefault(name.rpartition(".")[0], []).append(name)
    for module, names in own.items():
        settled = f"{module}.weight" if module in low_rank or module in unchanged else None
        moved = [name for name in names if name != settled and tuned.has_changed(name)]
        if moved == [f"{module}.bias"]:
            biases.append(module)
        elif moved:
            ending = [path for path in own if path.endswith(module)]
            reason = _why_not(module, ending, own, low_rank)
            modules += [] if reason else ending
            skipped += [SkippedItem(name, reason) for name in moved] if reason else []
    modules = list(dict.fromkeys(modules))
    biases = [module for module in biases if module not in modules]
    tensors = {_key(tuned, name): tuned.lazy_tensor(name) for module in modules for name in own[module]}
    for module in biases:
        key = _key(tuned, f"{module}{'.base_layer' if module in low_rank else ''}.bias")
        tensors[key] = tuned.lazy_tensor(f"{module}.bias")
    return ModulesToSave(tensors, modules, biases, skipped)


def _key(tuned: FullFinetune, name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{PEFT_PREFIX}{tuned.model_path(module)}.{leaf}"


def _unknown(tuned: FullFinetune) -> list[SkippedItem]:
    """Changes that no tensor can be written of: those of a file of updates without its base; tensors that are gone."""
    if not tuned.infos:
        return [
            SkippedItem(one.name, f"{one.reason}; it can go along whole with --base") for one in tuned.store.skipped
        ]
    return [one for one in tuned.store.skipped if one.name not in tuned.infos]


def _why_not(module: str, ending: Collection[str], paths: Collection[str], low_rank: Collection[str]) -> str | None:
    """Why a changed module cannot be saved whole, or None."""
    if not module:
        return "a parameter of the model itself, which PEFT does not save"
    for path in ending:
        if path in low_rank:
            return f"PEFT cannot save it whole beside the low-rank {path}"
        if any(other.startswith(f"{path}.") for other in paths):
            return f"PEFT cannot save it without all of {path}"
    return None
