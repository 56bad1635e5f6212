"""What changed beside the low-rank layers, and how PEFT can save it: as whole modules and as biases."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from rankscope.formats.abstract_store import SkippedItem
from rankscope.formats.peft_keys import PEFT_PREFIX
from rankscope.formats.streaming import LazyTensor
from rankscope.surgery.full_finetune import FullFinetune


class ModulesToSave(NamedTuple):
    """What is saved whole.

    Attributes:
        tensors: the tensors by PEFT's key.
        modules: paths of the modules that are saved whole.
        biases: paths of the modules of which only the bias is saved.
        skipped: what changed and cannot be saved.
    """

    tensors: dict[str, LazyTensor]
    modules: list[str]
    biases: list[str]
    skipped: list[SkippedItem]


def find_modules_to_save(tuned: FullFinetune, low_rank: Collection[str], unchanged: Collection[str]) -> ModulesToSave:
    """Everything that changed beside the weights of ``low_rank``, as far as PEFT can save it.

    A module that contains no other is saved whole (``modules_to_save``); where only its bias changed, only that is
    saved. PEFT compares the ends of paths, so all modules whose paths end in that of a saved one are saved too.

    Args:
        tuned: the full fine-tuning.
        low_rank: layers whose weight becomes low-rank.
        unchanged: layers whose weight is known to be unchanged, so that it is not read again.
    """
    modules: list[str] = []
    biases: list[str] = []
    skipped = _list_unknown(tuned)
    names_by_module: dict[str, list[str]] = {}
    for name in tuned.infos:
        names_by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for module, names in names_by_module.items():
        known = f"{module}.weight" if module in low_rank or module in unchanged else None
        changed = [name for name in names if name != known and tuned.has_changed(name)]
        if changed == [f"{module}.bias"]:
            biases.append(module)
        elif changed:
            same_end = [path for path in names_by_module if path.endswith(module)]
            reason = _find_obstacle(module, same_end, names_by_module, low_rank)
            modules += [] if reason else same_end
            skipped += [SkippedItem(name, reason) for name in changed] if reason else []
    modules = list(dict.fromkeys(modules))
    biases = [module for module in biases if module not in modules]
    tensors = {
        _peft_key(tuned, name): tuned.lazy_tensor(name) for module in modules for name in names_by_module[module]
    }
    for module in biases:
        key = _peft_key(tuned, f"{module}{'.base_layer' if module in low_rank else ''}.bias")
        tensors[key] = tuned.lazy_tensor(f"{module}.bias")
    return ModulesToSave(tensors, modules, biases, skipped)


def _peft_key(tuned: FullFinetune, name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{PEFT_PREFIX}{tuned.model_path(module)}.{leaf}"


def _list_unknown(tuned: FullFinetune) -> list[SkippedItem]:
    """Changes that cannot be written as tensors: of a file of updates without a base, or of tensors that are gone."""
    if not tuned.infos:
        return [SkippedItem(item.name, f"{item.reason}; give --base to save it whole") for item in tuned.store.skipped]
    return [item for item in tuned.store.skipped if item.name not in tuned.infos]


def _find_obstacle(
    module: str, same_end: Collection[str], paths: Collection[str], low_rank: Collection[str]
) -> str | None:
    """Why a changed module cannot be saved whole, or None."""
    if not module:
        return "a parameter of the model itself, which PEFT does not save"
    for path in same_end:
        if path in low_rank:
            return f"PEFT cannot save it whole beside the low-rank {path}"
        if any(other.startswith(f"{path}.") for other in paths):
            return f"PEFT cannot save it without all of {path}"
    return None
