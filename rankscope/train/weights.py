"""Weights of a model by the names of their updates: matrices (out, in) by module path, the rest by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rankscope.errors import ShapeError
from rankscope.lora.layer_types import Conv1DLayer
from rankscope.lora.targets import layer_class


def to_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A module's weight as a matrix (out, in), from Conv1D's (in, out) or a convolution's (out, in, …)."""
    return weight.T if _stores_transposed(module) else weight.flatten(1)


def weight_matrix(model: nn.Module, name: str) -> Tensor:
    """The weight (out, in) in float32 of the module at this path, or of the parameter of this name; may be a view.

    Raises:
        ShapeError: the model has no such weight, or it is no matrix.
    """
    weight, transposed = _place(model, name)
    if weight.ndim < 2:
        raise ShapeError(f"{name}: its weight {tuple(weight.shape)} is not a matrix")
    return (weight.detach().T if transposed else weight.detach().flatten(1)).float()


@torch.no_grad()
def add_updates(model: nn.Module, updates: Mapping[str, Tensor]) -> None:
    """Add updates to a model's weights in place, in float32, rounded once to the dtype of each weight.

    A weight that several modules share changes for all of them; give its update once.

    Args:
        updates: module path → matrix (out, in), or parameter name → change of its shape.

    Raises:
        ShapeError: a name or a shape that the model does not have.
    """
    for name, update in updates.items():
        weight, transposed = _place(model, name)
        change = update.to(weight.device).float()
        change = change.T if transposed else change
        if change.shape not in (weight.shape, _flat(weight)):
            raise ShapeError(f"{name}: an update {tuple(update.shape)} does not fit a weight {tuple(weight.shape)}")
        weight.copy_(weight.float() + change.reshape(weight.shape))


def _flat(weight: Tensor) -> torch.Size:
    """(out, in) of a kernel; the shape itself of a vector or a single number."""
    return weight.flatten(1).shape if weight.ndim > 1 else weight.shape


class _NamedWeight(NamedTuple):
    weight: Tensor
    transposed: bool
    """Whether the name means a matrix (out, in) that is stored (in, out)."""


def _place(model: nn.Module, name: str) -> _NamedWeight:
    """The weight of the module at this path; the parameter of this name, as it is, where there is no such module."""
    module = dict(model.named_modules()).get(name)
    weight = getattr(module, "weight", None)
    if module is not None and isinstance(weight, Tensor):
        return _NamedWeight(weight, _stores_transposed(module))
    try:
        return _NamedWeight(model.get_parameter(name), False)
    except AttributeError as error:
        raise ShapeError(f"the model has no weight {name!r}; is it another model's update?") from error


def _stores_transposed(module: nn.Module) -> bool:
    return layer_class(module) is Conv1DLayer
