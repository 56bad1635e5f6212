"""What all adapter layers share: a frozen module with the factors of N adapters beside it.

The factors of all adapters of a layer lie in two stacked tensors, A (N, R, ·) and B (N, ·, R), where R is the largest
rank among them. An adapter of smaller rank is padded with zeros, which stay zero in training: the gradient of a row of
A contains the same column of B and the other way round, so both vanish, and weight decay of zero is zero.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from rankscope.errors import ConfigError, ShapeError
from rankscope.formats.peft_keys import LayerType
from rankscope.linalg import supports_non_blocking
from rankscope.lora.pissa import difference_factors, pissa_factors, sign_fixed_svd
from rankscope.lora.routing import NO_ADAPTER, BatchRows, Route, check_equal_chunks
from rankscope.lora.spec import Init, Slot
from rankscope.lora.swap import Swap, device_of
from rankscope.updates import LowRank

FactorShapes = tuple[tuple[int, ...], tuple[int, ...]]
FactorName = Literal["A", "B"]
FactorPair = tuple[Tensor, Tensor]


class AdapterLayer(nn.Module, ABC):
    """base_layer(x) + scale · B(A(dropout(x))), for the adapter or the adapters that the route selects.

    An adapter that starts from the base's own singular vectors (PiSSA) adds scale · (B A − B0 A0) instead.

    Attributes:
        base_layer: the module that this one replaces.
        path: its path in the model.
        A, B: the stacked factors, (N, R, columns of A) and (N, rows of B, R / groups).
        A0, B0: of the same shapes, the factors that PiSSA adapters started from, zero for others; None without PiSSA.
        slots: rank, scale and dropout of each adapter on this layer.
        route: which adapters the rows pass.
    """

    kind: ClassVar[LayerType] = "linear"

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
        # Models read attributes of their layers (embedding_dim, in_features, bias), which the base has.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet
                raise
            return getattr(self.base_layer, name)

    @property
    def weight(self) -> Tensor:
        """The base weight without adapters, merged or not, for models that use the weight in a second place."""
        original: Any = self.base_layer.weight if self.merge_swap is None else self.merge_swap.original
        return cast(Tensor, original)

    # What differs from kind to kind

    @staticmethod
    @abstractmethod
    def shapes(base: Any, rank: int) -> FactorShapes:
        """Shapes of A and B of this rank on the module ``base``, as PEFT stores them."""

    @abstractmethod
    def delta(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B(A(x)) of one adapter without the scale: x (batch, …, in), A (R, ·), B (·, R / groups) → (batch, …, out)."""

    def initialise(self, i: int, init: Init) -> None:
        """Draw A of adapter i from its own generator and at its own rank; B stays zero."""
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
        """The update (out, in) of factors in the shapes that PEFT stores."""
        return LowRank(B, A, scale)

    def to_weight(self, update: Tensor) -> Tensor:
        """A dense update (out, in) in the layout of the base weight."""
        return update

    def from_weight(self, weight: Tensor) -> Tensor:
        """A weight in the base's layout as a matrix (out, in)."""
        return weight.flatten(1)

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (batch, …, in) → (batch, …, out), for the kinds of module that have other axes as those do."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.route.merged is not None:
            return result
        selection = self.route.selection
        if selection is None:
            check_equal_chunks(x.shape[0], len(self.slots))
            return self.forward_all(x, result)
        if isinstance(selection, BatchRows):
            return self.forward_rows(x, result, selection)
        return self.forward_one(x, result, selection) if self.slots[selection].rank else result

    def forward_one(self, x: Tensor, result: Tensor, i: int) -> Tensor:
        """Adds adapter i to the base's ``result`` (batch, …, out) of x (batch, …, in)."""
        delta = self.delta(self.prepare_input(x, i), *self.forward_factors(i))
        return (result + delta * self.slots[i].scale).to(result.dtype)

    def forward_all(self, x: Tensor, result: Tensor) -> Tensor:
        """Adds adapter i to the i-th of N equal chunks of the batch: x (batch, …, in), result (batch, …, out)."""
        A, B = self.all_forward_factors()
        parts = zip(x.tensor_split(len(self.slots)), A.unbind(), B.unbind(), self.slots, strict=True)
        deltas = [self.delta(self.prepare_input(x, i), A, B) * slot.scale for i, (x, A, B, slot) in enumerate(parts)]
        return (result + torch.cat(deltas)).to(result.dtype)

    def forward_rows(self, x: Tensor, result: Tensor, rows: BatchRows) -> Tensor:
        """Adds to each group of rows its adapter, or none: x (batch, …, in), result (batch, …, out)."""
        rows.check(x.shape[0])
        here = [i != NO_ADAPTER and self.slots[i].rank > 0 for i in rows.adapters]
        if not any(here):
            return result
        groups = zip(rows.adapters, here, rows.split(x), rows.split(result), strict=True)
        return rows.join([self.forward_one(x, out, i) if there else out for i, there, x, out in groups])

    def forward_factors(self, i: int) -> FactorPair:
        """The factors that the rows of adapter i pass, A (R, ·) and B (·, R / groups); with PiSSA of twice the rank."""
        A, B = select_factor(self.A, i), select_factor(self.B, i)
        if self.A0 is None or self.B0 is None or not self.subtracts[i]:
            return A, B
        return difference_factors(A, B, select_factor(self.A0, i), select_factor(self.B0, i))

    def all_forward_factors(self) -> FactorPair:
        """The factors of all adapters, stacked: A (N, R, ·) and B (N, ·, R / groups); with PiSSA of twice the rank."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return difference_factors(self.A, self.B, self.A0, self.B0)

    def prepare_input(self, x: Tensor, i: int) -> Tensor:
        """x (batch, …, in) in the dtype of the factors, with dropout from the generator of adapter i."""
        x = self.cast(x)
        if not self.applies_dropout(i):
            return x
        keep, generator = 1 - self.slots[i].dropout, self.route.dropout_generator(i, self.path)
        mask = torch.empty(x.shape, device=generator.device).bernoulli_(keep, generator=generator)
        return x * mask.div_(keep).to(x.device, x.dtype, non_blocking=supports_non_blocking(x.device))

    def cast(self, x: Tensor) -> Tensor:
        """x, of any shape, in the dtype of the factors; unchanged under autocast, which casts by itself."""
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return x if autocast else x.to(self.A.dtype)

    def applies_dropout(self, i: int) -> bool:
        return self.training and self.slots[i].dropout > 0

    # Factors of one adapter

    def trim(self, i: int, half: FactorName, stacked: Tensor) -> Tensor:
        """A copy of one slice (R, ·) or (·, R / groups) of a stack without padding, in the shape that PEFT stores.

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

    def pad(self, i: int, half: FactorName, own: Tensor) -> Tensor:
        """The inverse of ``trim``: A (r, …) to (R, …) or B (…, r) to (…, R), with zeros beyond rank r.

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

    def factors(self, i: int) -> FactorPair:
        """Copies of A and B of adapter i, of its own rank, in the shapes that PEFT stores."""
        return self.trim(i, "A", self.A[i]), self.trim(i, "B", self.B[i])

    @torch.no_grad()
    def set_factors(self, i: int, A: Tensor | None = None, B: Tensor | None = None) -> None:
        """Overwrite A (r, in, …) or B (out, r, …) of adapter i, in the shapes that PEFT stores."""
        if A is not None:
            self.A[i].copy_(self.pad(i, "A", A))
        if B is not None:
            self.B[i].copy_(self.pad(i, "B", B))

    @torch.no_grad()
    def start_from_weight(self, members: Sequence[int]) -> None:
        """Start these adapters as PiSSA does; one decomposition of the weight serves all of them."""
        svd = sign_fixed_svd(self.from_weight(self.weight.detach()))
        self.A0, self.B0 = torch.zeros_like(self.A.detach()), torch.zeros_like(self.B.detach())
        for i in members:
            factors = pissa_factors(svd, self.slots[i].rank, self.slots[i].scale)
            shapes = self.shapes(self.base_layer, self.slots[i].rank)
            self.set_factors(i, *(factor.reshape(shape) for factor, shape in zip(factors, shapes, strict=True)))
            self.A0[i].copy_(self.A[i])
            self.B0[i].copy_(self.B[i])
            self.subtracts[i] = True

    def initial_factors(self, i: int) -> FactorPair | None:
        """Copies of the (A0, B0) that PiSSA subtracts for adapter i, shaped as in ``factors``; None without PiSSA."""
        if self.A0 is None or self.B0 is None or not self.subtracts[i]:
            return None
        return self.trim(i, "A", self.A0[i]), self.trim(i, "B", self.B0[i])

    def update_factors(self, i: int) -> FactorPair:
        """Copies of factors A, B whose product is the whole update of adapter i, in the shapes that PEFT stores."""
        own, start = self.factors(i), self.initial_factors(i)
        if start is None:
            return own
        A, B = difference_factors(*(factor.flatten(1) for factor in (*own, *start)))
        a_shape, b_shape = self.shapes(self.base_layer, 2 * self.slots[i].rank)
        return A.reshape(a_shape), B.reshape(b_shape)

    def update(self, i: int) -> LowRank:
        """The update of adapter i, (out, in), kept as factors.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
        """
        A, B = self.update_factors(i)
        return self.to_matrix(A, B, self.slots[i].scale)

    def weight_with_adapter(self, i: int) -> nn.Parameter:
        """Base weight + adapter i, in the shape of the weight: added in float32, rounded once to the base's dtype.

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


def select_factor(stacked: Tensor, i: int) -> Tensor:
    """Factor i of a stack (N, ·, ·), as (·, ·)."""
    # Indexing would allocate and fill the whole stack again in the backward pass; a view does not.
    return stacked.squeeze(0) if stacked.shape[0] == 1 else stacked[i]


def check_shape(tensor: Tensor, shape: Sequence[int], half: FactorName) -> None:
    """Raise ShapeError where a factor, A (r, in, …) or B (out, r, …), has another shape than ``shape``."""
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(f"{half} is {tuple(tensor.shape)}, expected {tuple(shape)}; is it of another adapter or rank?")
