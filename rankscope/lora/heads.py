"""What is trained whole beside the factors: heads, of which each adapter has its own, and biases of the base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rankscope.errors import ConfigError, ShapeError
from rankscope.lora.layer import AdapterLayer
from rankscope.lora.routing import NO_ADAPTER, BatchRows, Route
from rankscope.lora.targets import is_within


class HeadCopies(nn.Module):
    """N trainable copies of a module in its place, one per adapter: each row passes the copy of its adapter.

    Attributes:
        base: the module itself, frozen: what rows without an adapter pass.
        copies: the module of each adapter.
    """

    def __init__(self, base: nn.Module, count: int, route: Route) -> None:
        super().__init__()
        self.base = base
        self.copies = nn.ModuleList(copy.deepcopy(base).requires_grad_(True) for _ in range(count))
        self.route = route
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their heads (weight, in_features): those of the adapter that is in use.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "copies", "route"):  # not set yet
                raise
            where = self._where()
            return getattr(self.copies[where if isinstance(where, int) else 0], name)

    def _where(self) -> int | BatchRows | None:
        return self.route.selection if self.route.merged is None else self.route.merged

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        where = self._where()
        if isinstance(where, int):
            return self.copies[where](*args, **kwargs)
        batch = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if batch is None or not batch.ndim:
            raise ShapeError("a module trained whole was called without a batch to share out; select one adapter")
        rows = BatchRows.equal_chunks(batch.shape[0], len(self.copies)) if where is None else where
        rows.check(batch.shape[0])
        # What else has as many rows, such as a mask, is shared out along with the batch.
        parts = [_split_value(rows, value) for value in (*args, *kwargs.values())]
        outputs = []
        for i, *values in zip(rows.adapters, *parts, strict=True):
            head = self.base if i == NO_ADAPTER else self.copies[i]
            named = dict(zip(kwargs, values[len(args) :], strict=True))
            outputs.append(head(*values[: len(args)], **named))
        return _join_outputs(rows, outputs)


def _split_value(rows: BatchRows, value: Any) -> Sequence[Any]:
    shared = isinstance(value, Tensor) and value.ndim and value.shape[0] == len(rows.rows)
    return rows.split(value) if shared else [value] * len(rows.adapters)


def _join_outputs(rows: BatchRows, outputs: Sequence[Any]) -> Any:
    """Tensors, or tuples of them, put together again along their first axis."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return rows.join(outputs)
    if isinstance(first, tuple):
        return tuple(_join_outputs(rows, parts) for parts in zip(*outputs, strict=True))
    if first is None:
        return None
    raise ConfigError(
        f"a module trained whole returns a {type(first).__name__}; the rows of several adapters can only be put "
        "together in tensors and tuples of them; select one adapter"
    )


def make_biases_trainable(
    which: str,
    model: nn.Module,
    layers: Mapping[str, AdapterLayer],
    heads: Mapping[str, nn.Module],
    swap: Callable[[nn.Module, str, nn.Parameter], None],
) -> dict[str, nn.Parameter]:
    """Replace biases of the base, by ``swap``, by trainable copies, returned by path; tied ones stay tied.

    Args:
        which: "none", those of the adapted modules ("lora_only"), or "all".
    """
    if which == "none":
        return {}
    owners: dict[str, nn.Module] = {name: layer.base_layer for name, layer in layers.items()}
    if which == "all":
        wrapped = {*layers.values(), *owners.values()}
        owners |= {name: module for name, module in model.named_modules() if module not in wrapped}
    copies: dict[nn.Parameter, nn.Parameter] = {}
    biases = {}
    for name, owner in owners.items():
        bias = owner._parameters.get("bias")
        if bias is not None and not any(is_within(name, head) for head in heads):
            biases[name] = copies.setdefault(bias, nn.Parameter(bias.detach().clone()))
            swap(owner, "bias", biases[name])
    return biases
