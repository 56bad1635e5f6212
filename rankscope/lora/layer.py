"""What all adapter layers share: a frozen module with the factors of N adapters beside it.

The factors of all adapters of a layer lie in two stacked tensors, A (N, R, ·) and B (N, ·, R), R being the largest
rank among them. What an adapter of smaller rank does not use is zero, and stays zero in training: the gradient of a row
of A goes through the same column of B and the other way round, so both vanish, and weight decay of zero is zero.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from rankscope.errors import ConfigError, ShapeError
from rankscope.formats.peft_keys import Kind
from rankscope.linalg import may_copy_ahead
from rankscope.lora.pissa import difference, directions, first_factors
from rankscope.lora.routing import BASE, Route, Rows, check_even
from rankscope.lora.spec import Init, Slot
from rankscope.lora.swap import Swap, device_of
from rankscope.updates import LowRank

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
Half = Literal["A", "B"]
Pair = tuple[Tensor, Tensor]


class AdapterLayer(nn.Module, ABC):
    """base_layer(x) + scale · B(A(dropout(x))), for the adapter or the adapters that the route names.

    An adapter that starts from the base's own singular vectors (PiSSA) adds scale · (B A − B0 A0) instead.

    Attributes:
        base_layer: the module whose place this one takes.
        path: where in the model that is.
        A, B: the stacked factors, (N, R, columns of A) and (N, rows of B, R / groups).
        A0, B0: of the same shapes, what PiSSA adapters started from, and zero for others; None without PiSSA here.
        slots: rank, scale and dropout of each adapter here.
    """

    kind: ClassVar[Kind] = "linear"

    def __init__(
        self, base_layer: nn.Module, slots: Sequence[Slot], route: Route, dtype: torch.dtype, path: str = ""
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.slots = tuple(slots)
        self.route = route
        self.merge_swap: Swap | None = None
        n, rank, device = len(slots), max(slot.rank for slot in slots), device_of(base_layer)
        a_shape, b_shape = self.shapes(base_layer, rank)
        self.groups = rank // b_shape[1]
        self.A = nn.Parameter(torch.zeros(n, rank, math.prod(a_shape[1:]), dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(n, *b_shape[:2], dtype=dtype, device=device))
        self.A0: Tensor | None
        self.B0: Tensor | None
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        self.subtracts = [False] * n
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

    def from_weight(self, weight: Tensor) -> Tensor:
        """A weight in the base's layout as a matrix (out, in)."""
        return weight.flatten(1)

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.route.merged is not None:
            return result
        where = self.route.selected
        if where is None:
            check_even(x.shape[0], len(self.slots))
            return self.through_all(x, result)
        if isinstance(where, Rows):
            return self.through_rows(x, result, where)
        return self.through_one(x, result, where) if self.slots[where].rank else result

    def through_one(self, x: Tensor, result: Tensor, i: int) -> Tensor:
        """All rows through adapter i."""
        delta = self.delta(self.prepared(x, i), *self.pair(i))
        return (result + delta * self.slots[i].scale).to(result.dtype)

    def through_all(self, x: Tensor, result: Tensor) -> Tensor:
        """The i-th of N chunks of the rows through adapter i."""
        A, B = self.pairs()
        parts = zip(x.tensor_split(len(self.slots)), A.unbind(), B.unbind(), self.slots, strict=True)
        deltas = [self.delta(self.prepared(x, i), A, B) * slot.scale for i, (x, A, B, slot) in enumerate(parts)]
        return (result + torch.cat(deltas)).to(result.dtype)

    def through_rows(self, x: Tensor, result: Tensor, rows: Rows) -> Tensor:
        """Each group of rows through its adapter, or through none."""
        rows.check(x.shape[0])
        here = [i != BASE and self.slots[i].rank > 0 for i in rows.adapters]
        if not any(here):
            return result
        groups = zip(rows.adapters, here, rows.split(x), rows.split(result), strict=True)
        return rows.join([self.through_one(x, out, i) if there else out for i, there, x, out in groups])

    def pair(self, i: int) -> Pair:
        """The factors that adapter i's rows pass, A (R, ·) and B (·, R / groups); twice as many with PiSSA."""
        A, B = pick(self.A, i), pick(self.B, i)
        if self.A0 is None or self.B0 is None or not self.subtracts[i]:
            return A, B
        return difference(A, B, pick(self.A0, i), pick(self.B0, i))

    def pairs(self) -> Pair:
        """The factors of all adapters, stacked."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return difference(self.A, self.B, self.A0, self.B0)

    def prepared(self, x: Tensor, i: int) -> Tensor:
        """Rows of adapter i in the dtype of the factors, with dropout from adapter i's own stream."""
        x = self.cast(x)
        if not self.drops(i):
            return x
        kept, source = 1 - self.slots[i].dropout, self.route.source(i, self.path)
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

    def trim(self, i: int, half: Half, stacked: Tensor) -> Tensor:
        """What adapter i uses of one slice of a stack, copied: of its own rank, in the shape that PEFT stores.

        Raises:
            ShapeError: not the shape of a slice of this layer's stack.
        """
        check_shape(stacked, (self.A if half == "A" else self.B).shape[1:], half)
        shape, columns = (
            self.shapes(self.base_layer, self.slots[i].rank)[half == "B"],
            self.slots[i].rank // self.groups,
        )
        stacked = stacked.detach()
        # With groups, the padding is at the end of each group.
        used = stacked.reshape(self.groups, -1, stacked.shape[1])[:, :columns] if half == "A" else stacked[:, :columns]
        return used.reshape(shape).clone()

    def pad(self, i: int, half: Half, own: Tensor) -> Tensor:
        """The way back from ``trim``: zero where adapter i uses nothing.

        Raises:
            ShapeError: not the shape of this factor of adapter i.
        """
        rank = self.slots[i].rank
        columns = rank // self.groups
        check_shape(own, self.shapes(self.base_layer, rank)[half == "B"], half)
        padded = own.detach().new_zeros((self.A if half == "A" else self.B).shape[1:])
        if half == "A":
            padded.view(self.groups, -1, padded.shape[1])[:, :columns] = own.reshape(self.groups, columns, -1)
        else:
            padded[:, :columns] = own.reshape(-1, columns)
        return padded

    def factors(self, i: int) -> Pair:
        """Copies of A and B of adapter i, of its own rank, in the shapes that PEFT stores."""
        return self.trim(i, "A", self.A[i]), self.trim(i, "B", self.B[i])

    @torch.no_grad()
    def set_factors(self, i: int, A: Tensor | None = None, B: Tensor | None = None) -> None:
        """Overwrite A or B of adapter i; shapes as in ``factors``."""
        if A is not None:
            self.A[i].copy_(self.pad(i, "A", A))
        if B is not None:
            self.B[i].copy_(self.pad(i, "B", B))

    @torch.no_grad()
    def start_from_weight(self, members: Sequence[int]) -> None:
        """Give adapters the PiSSA start; one decomposition serves all of them."""
        svd = directions(self.from_weight(self.weight.detach()))
        self.A0, self.B0 = torch.zeros_like(self.A.detach()), torch.zeros_like(self.B.detach())
        for i in members:
            factors = first_factors(svd, self.slots[i].rank, self.slots[i].scale)
            shapes = self.shapes(self.base_layer, self.slots[i].rank)
            self.set_factors(i, *(factor.reshape(shape) for factor, shape in zip(factors, shapes, strict=True)))
            self.A0[i].copy_(self.A[i])
            self.B0[i].copy_(self.B[i])
            self.subtracts[i] = True

    def started(self, i: int) -> Pair | None:
        """Copies of the (A0, B0) that adapter i takes off, shaped as in ``factors``; None where there are none."""
        if self.A0 is None or self.B0 is None or not self.subtracts[i]:
            return None
        return self.trim(i, "A", self.A0[i]), self.trim(i, "B", self.B0[i])

    def plain(self, i: int) -> Pair:
        """Copies of factors whose product is the whole update of adapter i, as PEFT stores them."""
        own, start = self.factors(i), self.started(i)
        if start is None:
            return own
        A, B = difference(*(factor.flatten(1) for factor in (*own, *start)))
        a_shape, b_shape = self.shapes(self.base_layer, 2 * self.slots[i].rank)
        return A.reshape(a_shape), B.reshape(b_shape)

    def update(self, i: int) -> LowRank:
        """The update of adapter i as a matrix (out, in), kept as factors.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        A, B = self.plain(i)
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


def check_shape(tensor: Tensor, wanted: Sequence[int], half: Half) -> None:
    if tuple(tensor.shape) != tuple(wanted):
        raise ShapeError(
            f"{half} is {tuple(tensor.shape)}, expected {tuple(wanted)}; is it of another adapter or rank?"
        )
