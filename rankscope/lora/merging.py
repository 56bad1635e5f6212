"""Replaces base weights by their sums with an adapter, and restores them."""

from __future__ import annotations

from collections.abc import Mapping

from rankscope.errors import prefix_errors
from rankscope.lora.layer import AdapterLayer
from rankscope.lora.routing import Route
from rankscope.lora.swap import Swap


def merge_adapter(route: Route, layers: Mapping[str, AdapterLayer], i: int) -> None:
    """Merge adapter i instead of the one that is merged, if any; after an error none is merged."""
    restore_base_weights(route, layers)
    try:
        for name, layer in layers.items():
            if layer.slots[i].rank:
                with prefix_errors(name):
                    layer.merge_swap = Swap(layer.base_layer, "weight", layer.weight_with_adapter(i))
    except BaseException:
        restore_base_weights(route, layers)
        raise
    route.merged = i


def restore_base_weights(route: Route, layers: Mapping[str, AdapterLayer]) -> None:
    """Put the base weights back, if an adapter is merged."""
    for layer in layers.values():
        if layer.merge_swap is not None:
            layer.merge_swap.undo()
            layer.merge_swap = None
    route.merged = None
