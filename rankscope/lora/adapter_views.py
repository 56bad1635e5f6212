"""One adapter's slices of the stacked factors as leaf tensors, for an optimizer that trains this adapter alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rankscope.errors import ConfigError
from rankscope.lora.layer import AdapterLayer


class AdapterViews:
    """Views of the stacked factors by adapter, in the bank's memory; each is made once, at the first request."""

    def __init__(self, layers: Mapping[str, AdapterLayer]) -> None:
        self._layers = layers
        self._views: dict[str, dict[int, Tensor]] = {}

    def _stacks(self) -> Iterator[tuple[str, nn.Parameter, AdapterLayer]]:
        for path, layer in self._layers.items():
            yield f"{path}.A", layer.A, layer
            yield f"{path}.B", layer.B, layer

    def views(self, i: int) -> dict[str, Tensor]:
        """A (R, columns of A) and B (rows of B, R / groups) of each layer of adapter i, as f"{path}.A" and so on."""
        return {name: self._view(name, stack, i) for name, stack, layer in self._stacks() if layer.slots[i].rank}

    def _view(self, name: str, stack: nn.Parameter, i: int) -> Tensor:
        views = self._views.setdefault(name, {})
        if i not in views or not is_view(views[i], stack, i):
            views[i] = stack.detach()[i].requires_grad_(True)
        return views[i]

    def share_gradients(self) -> None:
        """Set the gradient of each view to its slice of the stacked gradient, without copying.

        Raises:
            ConfigError: the model was moved, so the factors lie in other memory than the views.
        """
        for name, stack, _ in self._stacks():
            views = self._views.get(name, {})
            if any(not is_view(view, stack, i) for i, view in list(views.items())[:1]):
                raise ConfigError("the model was moved after parameters() was called; move it first")
            slices = None if stack.grad is None else stack.grad.detach().unbind()
            for i, view in views.items():
                view.grad = None if slices is None else slices[i]

    def zero_grad(self) -> None:
        """Drop the gradients of the views, which would keep those of the stacks in memory."""
        for views in self._views.values():
            for view in views.values():
                view.grad = None


@torch.no_grad()
def is_view(view: Tensor, stack: Tensor, i: int) -> bool:
    """Whether a tensor is slice i of a stack (N, …), in the same memory."""
    piece = stack[i]
    return (view.device, view.dtype, view.data_ptr()) == (piece.device, piece.dtype, piece.data_ptr())
