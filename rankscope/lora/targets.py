"""Which modules of a model an adapter goes to, and which layer class fits each."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from rankscope.errors import ConfigError
from rankscope.lora.kinds import Conv1DLayer, Conv2dLayer, EmbeddingLayer, LinearLayer
from rankscope.lora.layer import AdapterLayer
from rankscope.lora.spec import ALL_LINEAR, AdapterSpec, Slot, select_names


def layer_class(module: nn.Module) -> type[AdapterLayer] | None:
    """The layer that adapts a module of this kind; None where there is none."""
    # A Conv1D can only be there if transformers has been imported; importing it to ask would take a second.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    for kind, layer in (
        (nn.Linear, LinearLayer),
        (conv1d, Conv1DLayer),
        (nn.Embedding, EmbeddingLayer),
        (nn.Conv2d, Conv2dLayer),
    ):
        if isinstance(module, kind):
            return layer
    return None


def find_targets(model: nn.Module, spec: AdapterSpec) -> dict[str, Slot]:
    """Path of each module that the adapter goes to, in the order of the model, with its rank, scale and dropout.

    Raises:
        ConfigError: a name that matches nothing, or a module that adapters cannot go to.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    adaptable = [name for name, module in modules.items() if layer_class(module)]
    saved = find_saved(model, spec.modules_to_save)
    free = [name for name in modules if not any(is_within(name, path) for path in saved)]
    if spec.targets == ALL_LINEAR:
        head = _output_layer(model)
        linear = [name for name in free if modules[name] is not head]
        names = [n for n in linear if (kind := layer_class(modules[n])) and issubclass(kind, LinearLayer)]
        if not names:
            raise ConfigError("the model has no Linear layer but its output; name other targets")
    else:
        names = select_names(spec.targets, free, "target", shown=adaptable)
    for name in names:
        check_target(model, name, spec.slot(name))
    return {name: spec.slot(name) for name in names}


def find_saved(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Paths of the modules that are trained whole."""
    paths = [name for name, _ in model.named_modules() if name]
    return select_names(names, paths, "modules_to_save entry", shown=paths) if names else []


def is_within(path: str, ancestor: str) -> bool:
    """Whether a path is another, or lies below it."""
    return path == ancestor or path.startswith(f"{ancestor}.")


def _output_layer(model: nn.Module) -> object:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def check_target(model: nn.Module, name: str, slot: Slot) -> None:
    """Raise ConfigError where an adapter on this module would be impossible, or would silently do nothing."""
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    reason = None
    if layer_class(module) is None:
        reason = f"is a {type(module).__name__}; adapters go to Linear, Embedding, Conv2d and transformers' Conv1D"
    elif isinstance(module.weight, UninitializedParameter):
        reason = "is lazy and has no shape yet; run the model once first"
    elif isinstance(module, nn.Embedding) and module.max_norm is not None:
        reason = "renormalises its weight (max_norm), which no low-rank update follows"
    elif isinstance(module, nn.Conv2d) and slot.rank % module.groups:
        reason = f"has {module.groups} groups, which do not divide the rank {slot.rank}"
    elif isinstance(parent, nn.MultiheadAttention):
        reason = "belongs to torch's MultiheadAttention, which reads the weight without calling the module"
    elif isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        reason = (
            "is bypassed by torch's fast path of TransformerEncoderLayer; "
            "call torch.backends.mha.set_fastpath_enabled(False) first"
        )
    if reason:
        raise ConfigError(f"target {name!r} {reason}")
