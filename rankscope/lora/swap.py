"""Parameters and modules put in the place of others, with the way back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Swap:
    """An attribute of a module replaced by another parameter or module, with the way back.

    Nothing of a base model is ever written to: what changes is put in the place of the original, and the original put
    back, so it returns bit for bit, and whoever else holds it (a tied output layer) does not notice.
    """

    def __init__(self, owner: nn.Module, name: str, replacement: nn.Module | nn.Parameter) -> None:
        self.owner = owner
        self.name = name
        self.original: nn.Module | nn.Parameter = getattr(owner, name)
        setattr(owner, name, replacement)

    def undo(self) -> None:
        """Put the original back, on the device that its replacement has been moved to meanwhile."""
        device, original = device_of(getattr(self.owner, self.name)), self.original
        if isinstance(original, nn.Module):
            original.to(device)
        elif original.device != device:
            # In a module, so that the parameter is moved as modules move theirs: the object stays where it can.
            original = nn.ParameterList([original]).to(device)[0]
        setattr(self.owner, self.name, original)


def device_of(item: nn.Module | Tensor) -> torch.device | None:
    """Where a tensor is, or the first parameter of a module; None for a module without any."""
    if isinstance(item, Tensor):
        return item.device
    first = next(item.parameters(), None)
    return None if first is None else first.device
