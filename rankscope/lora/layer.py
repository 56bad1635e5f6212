"""What all adapter layers share: a frozen module with the factors of N adapters beside it, and where rows go.

The factors of all adapters of a layer lie in two stacked tensors, A (N, R, ·) and B (N, ·, R), R being the largest
rank among them. What an adapter of smaller rank does not use is zero, and stays zero in training: the gradient of a row
of A goes through the same column of B and the other way round, so both vanish, and weight decay of zero is zero.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Generator, Tensor, nn

from rankscope.errors import ConfigError, ShapeError
from rankscope.formats.peft_keys import Kind
from rankscope.linalg import may_copy_ahead
from rankscope.lora.spec import Init, Slot
from rankscope.updates import LowRank

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass
class Route:
    """Where rows go; one object that all layers of a bank share.

    Attributes:
        generators: the random stream of each adapter.
        selected: the adapter that every row passes, or None: the batch is N equal chunks, one per adapter, in order.
        merged: the adapter that the base weights contain just now, if any.
    """

    generators: Sequence[Generator]
    selected: int | None = 0
    merged: int | None = None


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
        device, original = _device(getattr(self.owner, self.name)), self.original
        if isinstance(original, nn.Module):
            original.to(device)
        elif original.device != device:
            # In a module, so that the parameter is moved as modules move theirs: the object stays where it can.
            original = nn.ParameterList([original]).to(device)[0]
        setattr(self.owner, self.name, original)


def _device(item: nn.Module | Tensor) -> torch.device:
    return item.device if isinstance(item, Tensor) else next(item.parameters()).device


class AdapterLayer(nn.Module, ABC):
    """base_layer(x) + scale · B(A(dropout(x))), for the adapter or the adapters that the route names.

    Attributes:
        base_layer: the module whose place this one takes.
        A, B: the stacked factors, (N, R, columns of A) and (N, rows of B, R / groups).
        slots: rank, scale and dropout of each adapter here.
    """

    kind: ClassVar[Kind] = "linear"

    def __init__(self, base_layer: nn.Module, slots: Sequence[Slot], route: Route, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slots = tuple(slots)
        self.route = route
        self.merge_swap: Swap | None = None
        n, rank, device = len(slots), max(slot.rank for slot in slots), _device(base_layer)
        a_shape, b_shape = self.shapes(base_layer, rank)
        self.groups = rank // b_shape[1]
        self.A = nn.Parameter(torch.zeros(n, rank, math.prod(a_shape[1:]), dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(n, *b_shape[:2], dtype=dtype, device=device))
        scales = torch.tensor([slot.scale for slot in slots], dtype=torch.promote_types(dtype, torch.float32))
        self.register_buffer("scales", scales.view(n, 1, 1).to(device), persistent=False)
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their layers (embedding_dim, in_features, bias): the base has them.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet
                raise
            return getattr(self.base_layer, name)

    @property
    def weight(self) -> Tensor:
        """The base weight without adapters, merged or not: what a model that uses it twice reads from here."""
        original: Any = self.base_layer.weight if self.merge_swap is None else self.merge_swap.original
        return cast(Tensor, original)

    # What differs from kind to kind

    @staticmethod
    @abstractmethod
    def shapes(base: Any, rank: int) -> Shapes:
        """Shapes of A and B of this rank on the module ``base``, as PEFT stores them."""

    @abstractmethod
    def delta(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B(A(x)) of one adapter, A (R, ·) and B (·, R / groups), before the scale."""

    def initialise(self, i: int, init: Init) -> None:
        """Draw A of adapter i, from its own stream and in its own rank; B stays zero."""
        shape, _ = self.shapes(self.base_layer, self.slots[i].rank)
        source = self.route.generators[i]
        A = torch.empty(shape, device=source.device)
        if init == "gaussian":
            A.normal_(std=1 / shape[0], generator=source)
        else:
            # kaiming_uniform_ with a = √5 has the bound 1/√fan_in.
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            A.uniform_(-bound, bound, generator=source)
        self.set_factors(i, A=A)

    def to_matrix(self, A: Tensor, B: Tensor, scale: float) -> LowRank:
        """The update (out, in) that stored factors make."""
        return LowRank(B, A, scale)

    def to_weight(self, update: Tensor) -> Tensor:
        """A dense update (out, in) in the layout of the base weight."""
        return update

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.route.merged is not None:
            return result
        if self.route.selected is not None:
            i = self.route.selected
            return self.through_one(x, result, i) if self.slots[i].rank else result
        if x.shape[0] % len(self.slots):
            raise ShapeError(
                f"an input of {x.shape[0]} rows cannot be shared out to {len(self.slots)} adapters; "
                "give each the same number of rows, or select one adapter"
            )
        return self.through_all(x, result)

    def through_one(self, x: Tensor, result: Tensor, i: int) -> Tensor:
        """All rows through adapter i."""
        delta = self.delta(self.prepared(x, i), pick(self.A, i), pick(self.B, i))
        return (result + delta * self.slots[i].scale).to(result.dtype)

    def through_all(self, x: Tensor, result: Tensor) -> Tensor:
        """The i-th of N chunks of the rows through adapter i."""
        parts = zip(x.tensor_split(len(self.slots)), self.A.unbind(), self.B.unbind(), self.slots, strict=True)
        deltas = [self.delta(self.prepared(x, i), A, B) * slot.scale for i, (x, A, B, slot) in enumerate(parts)]
        return (result + torch.cat(deltas)).to(result.dtype)

    def prepared(self, x: Tensor, i: int) -> Tensor:
        """Rows of adapter i in the dtype of the factors, with dropout from adapter i's own stream."""
        x = self.cast(x)
        if not self.drops(i):
            return x
        kept, source = 1 - self.slots[i].dropout, self.route.generators[i]
        mask = torch.empty(x.shape, device=source.device).bernoulli_(kept, generator=source)
        return x * mask.div_(kept).to(x.device, x.dtype, non_blocking=may_copy_ahead(x.device))

    def cast(self, x: Tensor) -> Tensor:
        """x in the dtype of the factors; under autocast, which casts for itself, as it is."""
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return x if autocast else x.to(self.A.dtype)

    def drops(self, i: int) -> bool:
        return self.training and self.slots[i].dropout > 0

    # Factors of one adapter

    def factors(self, i: int) -> tuple[Tensor, Tensor]:
        """Copies of A and B of adapter i, of its own rank, in the shapes that PEFT stores."""
        rank = self.slots[i].rank
        a_shape, b_shape = self.shapes(self.base_layer, rank)
        # With groups, the padding is at the end of each group.
        A = self.A.detach()[i].view(self.groups, -1, self.A.shape[2])[:, : rank // self.groups]
        B = self.B.detach()[i, :, : rank // self.groups]
        return A.reshape(a_shape).clone(), B.reshape(b_shape).clone()

    @torch.no_grad()
    def set_factors(self, i: int, A: Tensor | None = None, B: Tensor | None = None) -> None:
        """Overwrite A or B of adapter i; shapes as in ``factors``."""
        columns = self.slots[i].rank // self.groups
        if A is not None:
            self.A[i].view(self.groups, -1, self.A.shape[2])[:, :columns] = A.to(self.A).reshape(
                self.groups, columns, -1
            )
        if B is not None:
            self.B[i, :, :columns] = B.to(self.B).reshape(-1, columns)

    def update(self, i: int) -> LowRank:
        """The update of adapter i as a matrix (out, in), kept as factors.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        A, B = self.factors(i)
        return self.to_matrix(A, B, self.slots[i].scale)

    def merged_weight(self, i: int) -> nn.Parameter:
        """base weight + adapter i, the update in float32, the sum rounded once, to the dtype of the base.

        Raises:
            ConfigError: nothing can be added to this weight (quantised, grouped).
            NonFiniteError: a factor holds NaN or infinity.
        """
        weight = self.weight.detach()
        if not weight.is_floating_point():
            raise ConfigError(f"the base weight is stored as {weight.dtype}; load the base unquantised to merge")
        working = torch.promote_types(weight.dtype, torch.float32)
        change = self.to_weight(self.update(i).dense()).to(weight.device, working)
        return nn.Parameter((weight.to(working) + change).to(weight.dtype), requires_grad=False)

    def extra_repr(self) -> str:
        return f"adapters={len(self.slots)}, ranks={[slot.rank for slot in self.slots]}"


def pick(stacked: Tensor, i: int) -> Tensor:
    """Factor i of a stack."""
    # Indexing would allocate and fill the whole stack again in the backward pass; a view does not.
    return stacked.squeeze(0) if stacked.shape[0] == 1 else stacked[i]
