"""Attaching stored adapters to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from rankscope.errors import FormatError, RankscopeError, ShapeError, prefix_errors
from rankscope.formats.names import matches_path_end
from rankscope.lora.bank import Bank
from rankscope.lora.spec import Slot
from rankscope.lora.stored_adapter import StoredAdapter, read_adapter
from rankscope.lora.targets import check_bank, check_target, layer_class


def load(
    model: nn.Module,
    folders: Path | str | Sequence[Path | str],
    generators: Generator | Sequence[Generator] | None = None,
    dtype: torch.dtype | None = None,
) -> Bank:
    """Attach adapters stored in PEFT's layout, one folder each. On an error the model is left as it was.

    Args:
        model: changed in place; ``Bank.detach`` gives it back.
        folders: one per adapter.
        generators: for dropout when trained further, one per adapter; by default seeded with the adapter's number.
        dtype: of the factors; by default float32, or float64 on a float64 base.

    Raises:
        FormatError: a file is missing or damaged, holds something other than plain LoRA, or a tensor that the model
            has no place for.
        ShapeError: a tensor that does not fit its place.
        ConfigError: as for ``Bank.attach``.
    """
    paths = [Path(folders)] if isinstance(folders, Path | str) else [Path(folder) for folder in folders]
    stored = [_read_fitting_adapter(model, folder) for folder in paths]
    if generators is None:
        generators = [Generator().manual_seed(i) for i in range(len(stored))]
    sources = [generators] if isinstance(generators, Generator) else list(generators)
    specs = [adapter.spec for adapter in stored]
    check_bank(model, specs, sources)
    plans = [{name: adapter.spec.slot(name) for name in adapter.factors} for adapter in stored]
    bank = Bank(model, specs, plans, sources, dtype)
    try:
        for i, (folder, adapter) in enumerate(zip(paths, stored, strict=True)):
            with prefix_errors(folder):
                _fill(bank, i, adapter)
    except RankscopeError:
        bank.detach()
        raise
    return bank


def _read_fitting_adapter(model: nn.Module, folder: Path) -> StoredAdapter:
    """The adapter of a folder, after a check that each pair of factors fits its module."""
    stored = read_adapter(folder)
    modules = dict(model.named_modules())
    with prefix_errors(folder):
        for name, (A, B) in stored.factors.items():
            if name not in modules:
                raise FormatError(f"the adapter has factors for {name!r}, a module that the model does not have")
            _check_fit(model, name, stored.spec.slot(name), A, B)
    # PEFT lists usual names of heads whether the model has them or not.
    kept = tuple(name for name in stored.spec.modules_to_save if any(matches_path_end(name, path) for path in modules))
    return stored._replace(spec=replace(stored.spec, modules_to_save=kept))


def _check_fit(model: nn.Module, name: str, slot: Slot, A: Tensor, B: Tensor) -> None:
    check_target(model, name, slot)
    module = model.get_submodule(name)
    kind = layer_class(module)
    expected = kind.shapes(module, slot.rank) if kind else None
    if expected != (tuple(A.shape), tuple(B.shape)):
        raise ShapeError(
            f"factors of {name!r}, A {tuple(A.shape)} and B {tuple(B.shape)}, do not fit the model's {module}; "
            f"expected {expected}"
        )


def _fill(bank: Bank, i: int, stored: StoredAdapter) -> None:
    """Overwrite adapter i, and the tensors that are trained whole, with those of the file."""
    for name, (A, B) in stored.factors.items():
        bank.layers[name].set_factors(i, A, B)
    targets = {f"{name}.bias": bias.data for name, bias in bank.biases.items()}
    for path in bank.heads:
        targets |= {f"{path}.{key}": tensor for key, tensor in bank.head(i, path).state_dict().items()}
    base = {key.replace(".base_layer.", "."): tensor for key, tensor in bank.model.state_dict().items()}
    for key, tensor in stored.whole.items():
        target = targets.get(key, base.get(key))
        if target is None:
            raise FormatError(f"{key!r} is neither a factor of a module nor a weight of the model")
        if target.shape != tensor.shape:
            raise ShapeError(f"{key!r} is {tuple(tensor.shape)} in the file and {tuple(target.shape)} in the model")
        if key in targets:
            target.copy_(tensor)
        elif not torch.equal(target, tensor.to(target)):
            # PEFT also stores the base weight of an adapted embedding, which must be that of the model.
            raise FormatError(f"the file has another base weight {key!r} than the model; load the base that it fits")
