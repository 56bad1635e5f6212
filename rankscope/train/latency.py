"""What an adapter costs at inference: the forward time of the base, with the adapter merged, and beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import msgspec
import numpy as np
import torch
from torch import nn

from rankscope.errors import ConfigError
from rankscope.lora.bank import Bank
from rankscope.lora.swap import device_of

ForwardFunction = Callable[[nn.Module, int], object]
PassTimes = dict[tuple[str, int], list[float]]


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Median seconds of a forward pass.

    Attributes:
        size: examples in a pass.
        base: the model without adapters, its own modules in their places.
        merged: the adapter added to the weights.
        unmerged: the adapter computed beside each layer.
        noise: interquartile range of the base's times: a difference of medians below it says nothing.
    """

    size: int
    base: float
    merged: float
    unmerged: float
    noise: float


def measure_latency(
    model: nn.Module,
    bank: Bank,
    run: ForwardFunction,
    sizes: Sequence[int] = (1, 32),
    repeats: int = 20,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Latency]:
    """Forward times in evaluation mode without gradients, one ``Latency`` for each size.

    In each repeat every variant takes its turn, so that a machine that slows down slows all of them; after each change
    of variant one pass of each size is not timed. The merged adapter is the one that is merged, else the one that is
    selected, else the first. Afterwards the model and the bank are as before, bit for bit.

    Args:
        model: that the bank is attached to, or a module around it.
        run: calls the model on so many examples.
        repeats: times that each variant is timed at each size.
        clock: seconds, as ``time.perf_counter``.

    Raises:
        ConfigError: sizes or repeats below 1, or a bank that is detached or of another model.
        NonFiniteError: a factor holds NaN or infinity, so that it cannot be merged.
    """
    _check(model, bank, sizes, repeats)
    times: PassTimes = {(name, size): [] for name in ("base", "merged", "unmerged") for size in sizes}
    wait = _make_synchronize(device_of(model))
    with _set_eval_mode(model), _select_one_adapter(bank) as i:
        for _ in range(repeats):
            for name, variant in _variants(bank, i).items():
                with variant:
                    _time(model, run, name, sizes, times, clock, wait)
    return [_latency(size, times) for size in sizes]


def _check(model: nn.Module, bank: Bank, sizes: Sequence[int], repeats: int) -> None:
    if not sizes or min(sizes) < 1 or repeats < 1:
        raise ConfigError(f"latency needs sizes and repeats from 1, not {tuple(sizes)} and {repeats}")
    inside = set(model.modules())
    if not bank.attached or not all(layer in inside for layer in bank.layers.values()):
        raise ConfigError("the adapters are not attached to this model; attach them before measuring its latency")


def _time(
    model: nn.Module,
    run: ForwardFunction,
    name: str,
    sizes: Sequence[int],
    times: PassTimes,
    clock: Callable[[], float],
    wait: Callable[[], None],
) -> None:
    """One warm-up pass of each size, then one that is timed."""
    with torch.no_grad():
        for size in sizes:
            run(model, size)
        for size in sizes:
            wait()
            begun = clock()
            run(model, size)
            wait()
            times[name, size].append(clock() - begun)


def _variants(bank: Bank, i: int) -> dict[str, AbstractContextManager[object]]:
    return {"base": _remove_adapters(bank), "merged": _merge_adapter(bank, i), "unmerged": nullcontext()}


@contextmanager
def _remove_adapters(bank: Bank) -> Iterator[None]:
    """The base's own modules in their places: no wrapper is left to cost anything. (Trained biases stay.)"""
    own: dict[nn.Module, nn.Module] = {layer: layer.base_layer for layer in bank.layers.values()}
    own |= {head: head.base for head in bank.heads.values()}
    places = [
        (parent, name, child)
        for parent in bank.model.modules()
        for name, child in parent._modules.items()
        if child in own
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = own[child]
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


@contextmanager
def _merge_adapter(bank: Bank, i: int) -> Iterator[None]:
    bank.merge(i)
    try:
        yield
    finally:
        bank.unmerge()


@contextmanager
def _select_one_adapter(bank: Bank) -> Iterator[int]:
    """The bank unmerged with one adapter for all rows, and afterwards as it was."""
    merged, selected = bank.route.merged, bank.selection
    i = merged if merged is not None else selected if isinstance(selected, int) else 0
    if merged is not None:
        bank.unmerge()
    try:
        bank.select(i)
        yield i
    finally:
        bank.select(selected)
        if merged is not None:
            bank.merge(merged)


@contextmanager
def _set_eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _make_synchronize(device: torch.device | None) -> Callable[[], None]:
    """Waits until a device has done what it was told; nothing to do on a CPU."""
    if device is not None and device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device is not None and device.type == "mps":
        return torch.mps.synchronize
    return lambda: None


def _latency(size: int, times: PassTimes) -> Latency:
    low, high = np.percentile(times["base", size], [25, 75])
    base, merged, unmerged = (float(np.median(times[name, size])) for name in ("base", "merged", "unmerged"))
    return Latency(size=size, base=base, merged=merged, unmerged=unmerged, noise=float(high - low))
