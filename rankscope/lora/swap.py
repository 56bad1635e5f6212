"""Replaces parameters and modules, and restores them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Swap:
    """Replaces an attribute of a module, a parameter or a module, until ``undo``.

    The original itself is never written to. So it comes back bit for bit, and other modules that share it (a tied
    output layer) are not affected.
    """

    def __init__(self, owner: nn.Module, name: str, replacement: nn.Module | nn.Parameter) -> None:
        self.owner = owner
        self.name = name
        self.original: nn.Module | nn.Parameter = getattr(owner, name)
        setattr(owner, name, replacement)

    def undo(self) -> None:
        """Put the original back, on the device that its replacement has been moved to since."""
        device, original = device_of(getattr(self.owner, self.name)), self.original
        if isinstance(original, nn.Module):
            original.to(device)
        elif original.device != device:
            # A module moves its parameters in place where it can, so the original object stays the same.
            original = nn.ParameterList([original]).to(device)[0]
        setattr(self.owner, self.name, original)


def device_of(item: nn.Module | Tensor) -> torch.device | None:
    """The device of a tensor (any shape), or of a module's first parameter; None for a module without parameters."""
    if isinstance(item, Tensor):
        return item.device
    first = next(item.parameters(), None)
    return None if first is None else first.device
