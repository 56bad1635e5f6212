"""The layers: a frozen module with the factors of N adapters beside it, one class per kind of module.

The factors of all adapters of a layer lie in two stacked tensors, A (N, R, ·) and B (N, ·, R), R being the largest
rank among them. What an adapter of smaller rank does not use is zero, and stays zero in training: the gradient of a row
of A goes through the same column of B and the other way round, so both vanish, and weight decay of zero is zero.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from rankscope.errors import ConfigError, ShapeError
from rankscope.formats.peft_keys import Kind
from rankscope.lora.spec import Init, Slot
from rankscope.updates import LowRank


@dataclass
class Route:
    """Where rows go, shared by all layers of a bank.

    ``selected``: the adapter that every row passes, or None: the batch is N equal chunks, one per adapter, in order.
    ``merged``: the adapter that the base weights contain just now, if any.
    """

    selected: int | None = 0
    merged: int | None = None


class AdapterLayer(nn.Module):
    """base(x) + scale · B(A(dropout(x))), for the adapter or adapters that the route names.

    Attributes:
        base_layer: the module that was replaced, untouched.
        A, B: the stacked factors; their first axis is the adapter.
    """

    kind: ClassVar[Kind] = "linear"

    def __init__(
        self,
        base_layer: nn.Module,
        slots: Sequence[Slot],
        route: Route,
        generators: Sequence[Generator],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slots = tuple(slots)
        self.route = route
        self.generators = tuple(generators)
        n_in, n_out, groups = self.sizes(base_layer)
        self.groups = groups
        n, rank = len(slots), max(slot.rank for slot in slots)
        device = next(base_layer.parameters()).device
        self.A = nn.Parameter(torch.zeros(n, rank, n_in, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(n, n_out, rank // groups, dtype=dtype, device=device))
        scales = torch.tensor([slot.scale for slot in slots], dtype=torch.promote_types(dtype, torch.float32))
        self.register_buffer("scales", scales.to(device).view(n, 1, 1), persistent=False)
        self.scales: Tensor
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their layers (embedding_dim, nf, weight of a tied output layer): the base has them.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    # What differs from kind to kind

    @staticmethod
    def sizes(base: nn.Module) -> tuple[int, int, int]:
        """Columns of A, rows of B, and groups of a module of this kind.

        Raises:
            ConfigError: a module of this kind that adapters cannot go to.
        """
        raise NotImplementedError

    def delta(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B(A(x)) of one adapter, A (R, ·) and B (·, R / groups), before the scale."""
        raise NotImplementedError

    def draw(self, i: int, init: Init) -> Tensor:
        """Initial A (r, n_in) of adapter i, from its own stream and of its own rank only."""
        return draw_a(self.slots[i].rank, self.A.shape[2], init, self.generators[i])

    def to_weight(self, update: Tensor) -> Tensor:
        """A dense update (out, in), as a change of the base weight."""
        return update

    def exported(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Factors in the shapes that PEFT stores."""
        return A, B

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.route.merged is not None:
            return result
        if self.route.selected is None:
            if x.shape[0] % len(self.slots):
                raise ShapeError(
                    f"a batch of {x.shape[0]} cannot be shared by {len(self.slots)} adapters; "
                    "give each the same number of rows, or select one adapter"
                )
            return self.through_all(x, result)
        if self.slots[self.route.selected].rank == 0:
            return result
        return self.through_one(x, result, self.route.selected)

    def through_one(self, x: Tensor, result: Tensor, i: int) -> Tensor:
        delta = self.delta(self.prepared(x, i), _pick(self.A, i), _pick(self.B, i))
        return (result + delta * self.slots[i].scale).to(result.dtype)

    def through_all(self, x: Tensor, result: Tensor) -> Tensor:
        chunks = zip(x.tensor_split(len(self.slots)), self.A.unbind(), self.B.unbind(), strict=True)
        deltas = [
            self.delta(self.prepared(part, i), A, B) * self.slots[i].scale for i, (part, A, B) in enumerate(chunks)
        ]
        return (result + torch.cat(deltas)).to(result.dtype)

    def prepared(self, x: Tensor, i: int) -> Tensor:
        """The rows of adapter i: cast to the dtype of the factors, then dropped from adapter i's own stream."""
        if x.dtype != self.A.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        slot = self.slots[i]
        if not (self.training and slot.dropout and slot.rank):
            return x
        source = self.generators[i]
        kept = torch.empty(x.shape, device=source.device).bernoulli_(1 - slot.dropout, generator=source)
        return x * kept.div_(1 - slot.dropout).to(x.device, x.dtype)

    # Factors, one adapter at a time

    def factors(self, i: int) -> tuple[Tensor, Tensor]:
        """Copies of A and B of adapter i, cut to its rank, in the shapes that PEFT stores."""
        rank, columns = self.slots[i].rank, self.slots[i].rank // self.groups
        A = self.A.detach()[i].unflatten(0, (self.groups, -1))[:, :columns].reshape(rank, -1)
        return self.exported(A.clone(), self.B.detach()[i, :, :columns].clone())

    @torch.no_grad()
    def set_factors(self, i: int, A: Tensor | None = None, B: Tensor | None = None) -> None:
        """Overwrite A, B or both of adapter i, in the shapes that PEFT stores."""
        columns = self.slots[i].rank // self.groups
        if A is not None:
            grouped = A.reshape(self.groups, columns, -1).to(self.A.device, self.A.dtype)
            self.A[i].unflatten(0, (self.groups, -1))[:, :columns] = grouped
        if B is not None:
            self.B[i, :, :columns] = B.reshape(-1, columns).to(self.B.device, self.B.dtype)

    def initialise(self, i: int, init: Init) -> None:
        """Draw the factor of adapter i that does not start at zero."""
        self.set_factors(i, A=self.draw(i, init))

    def update(self, i: int) -> LowRank:
        """The update of adapter i as a matrix (out, in), kept as factors."""
        A, B = self.factors(i)
        return LowRank(B, A, self.slots[i].scale)

    def merged_weight(self, i: int) -> Tensor:
        """The base weight with adapter i added, computed in float32 or finer, in the base's dtype.

        Raises:
            ConfigError: a weight that nothing can be added to (quantised).
            NonFiniteError: a factor holds NaN or infinity.
        """
        weight: Tensor = self.base_layer.weight.detach()  # type: ignore[union-attr,operator]
        if not weight.is_floating_point():
            raise ConfigError(f"the base weight is stored as {weight.dtype}, which nothing can be added to")
        working = torch.promote_types(weight.dtype, torch.float32)
        change = self.to_weight(self.update(i).dense()).to(weight.device, working)
        return (weight.to(working) + change).to(weight.dtype)


class LinearLayer(AdapterLayer):
    """nn.Linear: A (r, in), B (out, r)."""

    @staticmethod
    def sizes(base: nn.Module) -> tuple[int, int, int]:
        assert_type = base.in_features, base.out_features
        return int(assert_type[0]), int(assert_type[1]), 1  # type: ignore[arg-type]

    def through_one(self, x: Tensor, result: Tensor, i: int) -> Tensor:
        low = F.linear(self.prepared(x, i), _pick(self.A, i)).flatten(0, -2)
        B, scale = _pick(self.B, i), self.slots[i].scale
        if low.dtype != result.dtype:
            return (result + (low @ B.T * scale).view_as(result)).to(result.dtype)
        return torch.addmm(result.reshape(-1, B.shape[0]), low, B.T, alpha=scale).view_as(result)

    def through_all(self, x: Tensor, result: Tensor) -> Tensor:
        n, n_out, _ = self.B.shape
        chunks = x.tensor_split(n)
        x = torch.cat([self.prepared(part, i) for i, part in enumerate(chunks)]) if self._drops else self.prepared(x, 0)
        low = torch.bmm(x.reshape(n, -1, x.shape[-1]), self.A.mT)
        low = (low * self.scales).to(low.dtype)
        if low.dtype != result.dtype:
            return (result + torch.bmm(low, self.B.mT).view_as(result)).to(result.dtype)
        return torch.baddbmm(result.reshape(n, -1, n_out), low, self.B.mT).view_as(result)

    @property
    def _drops(self) -> bool:
        return self.training and any(slot.dropout and slot.rank for slot in self.slots)
