"""Which modules of a model an adapter goes to, and which layer class fits each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, nn
from torch.nn.parameter import UninitializedParameter

from rankscope.errors import ConfigError
from rankscope.lora.layer import AdapterLayer
from rankscope.lora.layer_types import Conv1DLayer, Conv2dLayer, EmbeddingLayer, LinearLayer
from rankscope.lora.spec import ALL_LINEAR, AdapterSpec, Slot, select_names
from rankscope.updates import check_finite


def layer_class(module: nn.Module) -> type[AdapterLayer] | None:
    """The layer that adapts a module of this kind; None where there is none."""
    # The model can only have a Conv1D if transformers is imported; importing it for this check would take a second.
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
    saved = find_modules_to_save(model, spec.modules_to_save)
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
        if spec.init == "pissa":
            check_pissa_target(model, name, spec.slot(name))
    return {name: spec.slot(name) for name in names}


def find_modules_to_save(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Paths of the modules that are trained whole, without those that lie within another of them."""
    paths = [name for name, _ in model.named_modules() if name]
    saved = select_names(names, paths, "modules_to_save entry", shown=paths) if names else []
    return [name for name in saved if not any(name != other and is_within(name, other) for other in saved)]


def is_within(path: str, ancestor: str) -> bool:
    """Whether a path equals another or lies below it."""
    return path == ancestor or path.startswith(f"{ancestor}.")


def _output_layer(model: nn.Module) -> object:
    """The output layer of a model of transformers; None where there is none."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def check_target(model: nn.Module, name: str, slot: Slot) -> None:
    """Raise ConfigError where an adapter on this module is impossible or would have no effect."""
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


def check_pissa_target(model: nn.Module, name: str, slot: Slot) -> None:
    """Raise where an adapter cannot start from the singular directions of this module's weight.

    Raises:
        ConfigError: the kind of module, its dtype or its size does not allow it.
        NonFiniteError: the weight holds NaN or infinity.
    """
    module = model.get_submodule(name)
    weight: Any = module.weight
    reason = None
    if layer_class(module) is EmbeddingLayer:
        reason = "is an Embedding, whose two factors PEFT starts otherwise"
    elif getattr(module, "groups", 1) > 1:
        reason = "is a convolution with groups, whose weight is not one matrix"
    elif not weight.is_floating_point():
        reason = f"is stored as {weight.dtype}; load the base unquantised"
    elif slot.rank > (most := min(weight.flatten(1).shape)):
        reason = f"has only {most} singular directions, fewer than the rank {slot.rank}"
    if reason:
        raise ConfigError(f'target {name!r} {reason}: init "pissa" cannot start there')
    if not weight.is_meta:
        check_finite(weight, f"the weight of target {name!r}")


def check_bank(model: nn.Module, specs: Sequence[AdapterSpec], generators: Sequence[Generator]) -> None:
    """Raise ConfigError where these adapters cannot share this model."""
    if not specs:
        raise ConfigError("a bank needs at least one adapter")
    if len(specs) != len(generators) or len({id(source) for source in generators}) < len(generators):
        raise ConfigError(f"{len(specs)} adapters need as many generators of their own, not {len(generators)}")
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise ConfigError("the model has adapters already; detach them first, or attach all of them at once")
    if len(specs) > 1 and any(spec.bias != "none" for spec in specs):
        raise ConfigError(
            "biases can only be trained with one adapter on the model, not several, which would share them"
        )
    if len({frozenset(spec.modules_to_save) for spec in specs}) > 1:
        raise ConfigError("the adapters of a bank need the same modules_to_save; attach the others to another model")
