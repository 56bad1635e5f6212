"""What is trained whole beside the factors: heads, with a copy for each adapter, and biases of the base."""

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
        base: the module itself, frozen, which rows without an adapter pass.
        copies: the copy of each adapter.
        route: which copies the rows pass.
    """

    def __init__(self, base: nn.Module, count: int, route: Route) -> None:
        super().__init__()
        self.base = base
        self.copies = nn.ModuleList(copy.deepcopy(base).requires_grad_(True) for _ in range(count))
        self.route = route
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their heads (weight, in_features); they get those of the selected adapter.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "copies", "route"):  # not set yet
                raise
            selection = self._selection()
            return getattr(self.copies[selection if isinstance(selection, int) else 0], name)

    def _selection(self) -> int | BatchRows | None:
        """The merged adapter, or else the selection of the route."""
        return self.route.selection if self.route.merged is None else self.route.merged

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        selection = self._selection()
        if isinstance(selection, int):
            return self.copies[selection](*args, **kwargs)
        batch = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if batch is None or not batch.ndim:
            raise ShapeError("a module trained whole was called without a batch that can be split; select one adapter")
        rows = BatchRows.equal_chunks(batch.shape[0], len(self.copies)) if selection is None else selection
        rows.check(batch.shape[0])
        # Other arguments with as many rows, such as a mask, are split like the batch.
        parts = [_split_value(rows, value) for value in (*args, *kwargs.values())]
        outputs = []
        for i, *values in zip(rows.adapters, *parts, strict=True):
            head = self.base if i == NO_ADAPTER else self.copies[i]
            named = dict(zip(kwargs, values[len(args) :], strict=True))
            outputs.append(head(*values[: len(args)], **named))
        return _join_outputs(rows, outputs)


def _split_value(rows: BatchRows, value: Any) -> Sequence[Any]:
    """The rows of each group of a tensor (rows, …); any other value for each group."""
    has_rows = isinstance(value, Tensor) and value.ndim and value.shape[0] == len(rows.rows)
    return rows.split(value) if has_rows else [value] * len(rows.adapters)


def _join_outputs(rows: BatchRows, outputs: Sequence[Any]) -> Any:
    """The outputs of all groups, tensors (rows, …) or tuples of them, joined along their first axis."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return rows.join(outputs)
    if isinstance(first, tuple):
        return tuple(_join_outputs(rows, parts) for parts in zip(*outputs, strict=True))
    if first is None:
        return None
    raise ConfigError(
        f"a module trained whole returns a {type(first).__name__}; rows of several adapters can only be joined in "
        "tensors and tuples of tensors; select one adapter"
    )


def make_biases_trainable(
    which: str,
    model: nn.Module,
    layers: Mapping[str, AdapterLayer],
    heads: Mapping[str, nn.Module],
    swap: Callable[[nn.Module, str, nn.Parameter], None],
) -> dict[str, nn.Parameter]:
    """Replace biases of the base, with ``swap``, by trainable copies; tied biases stay tied. Returns them by path.

    Args:
        which: "none", "lora_only" (those of the adapted modules), or "all".
        model: the base with the adapter layers in place.
        layers: the adapter layers by path.
        heads: the modules trained whole by path; their own biases are left alone.
        swap: replaces a parameter of a module.
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
