"""Sums, differences and means of adapters: exact in factored form, where the ranks add."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rankscope.errors import ConfigError, FormatError, ShapeError, prefix_errors
from rankscope.formats.abstract_store import SkippedItem, examples
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.names import natural_key, pair_names
from rankscope.formats.peft_keys import factor_bias_key, strip_peft_prefix
from rankscope.formats.peft_write import config_with_ranks, exact_targets, factor_tensors, write_peft_folder
from rankscope.formats.recipes import float_dtype
from rankscope.formats.streaming import LazyTensor
from rankscope.surgery.adapter import BIAS_SETTINGS, Adapter, AdapterSource
from rankscope.surgery.addition import in_float64
from rankscope.surgery.operation import Operation
from rankscope.surgery.output_folder import copy_tokenizer
from rankscope.surgery.surgery_result import SurgeryResult, format_count, zero_layer_notes
from rankscope.surgery.truncate import RankChoice
from rankscope.surgery.truncate_layers import LayerUpdate, truncate_layers
from rankscope.track import Track
from rankscope.updates import LowRank, check_finite

RELATIVE_TOLERANCE = 1e-12  # sums of weights closer than this are equal
# What a sum of updates means depends on these, so they must agree.
MUST_AGREE = ("layer_replication", "alora_invocation_tokens", "trainable_token_indices")


def merge_adapters(
    adapters: Sequence[AdapterSource],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    choice: RankChoice | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    track: Track = iter,
    command: str | None = None,
) -> SurgeryResult:
    """Write one adapter whose update is Σ wᵢ·sᵢ·BᵢAᵢ.

    Args:
        adapters: at least two in PEFT's layout, of any ranks.
        out: the folder to be made.
        weights: one for each adapter; 1 each by default.
        choice: which singular values of the sum are kept; None keeps all, as factors side by side.
        dtype: dtype of the written factors; None keeps that of the adapters.
        device: where the decompositions run.
        track: wraps the list of layers and may show progress, as ``tqdm.tqdm`` does.
        command: the command line that the record names.

    Raises:
        RankscopeError: an adapter cannot be read or added, shapes differ, or ``out`` exists.
    """
    operation = Operation(
        name="merge", out=out, choice=choice, dtype=dtype, device=device, track=track, command=command
    )
    return _write_sum(adapters, check_weights(weights, len(adapters)), operation)


def subtract(
    a: AdapterSource,
    b: AdapterSource,
    out: str | os.PathLike[str],
    choice: RankChoice | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    track: Track = iter,
    command: str | None = None,
) -> SurgeryResult:
    """Write the adapter whose update is that of ``a`` minus that of ``b``.

    Args:
        a: an adapter in PEFT's layout.
        b: the adapter that is subtracted from it.
        out: the folder to be made.
        choice: which singular values of the difference are kept; None keeps all, as factors side by side.
        dtype: dtype of the written factors; None keeps that of the adapters.
        device: where the decompositions run.
        track: wraps the list of layers and may show progress, as ``tqdm.tqdm`` does.
        command: the command line that the record names.

    Raises:
        RankscopeError: an adapter cannot be read or subtracted, shapes differ, or ``out`` exists.
    """
    operation = Operation(
        name="subtract", out=out, choice=choice, dtype=dtype, device=device, track=track, command=command
    )
    return _write_sum([a, b], [1.0, -1.0], operation)


def average(
    adapters: Sequence[AdapterSource],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    choice: RankChoice | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    track: Track = iter,
    command: str | None = None,
) -> SurgeryResult:
    """Write the adapter whose update is the mean of the updates sBA, weighted by w/Σw.

    It is not the mean of the factors, which would depend on how each product was factored.

    Args:
        adapters: at least two in PEFT's layout, of any ranks.
        out: the folder to be made.
        weights: one for each adapter; equal by default. They are divided by their sum.
        choice: which singular values of the mean are kept; None keeps all, as factors side by side.
        dtype: dtype of the written factors; None keeps that of the adapters.
        device: where the decompositions run.
        track: wraps the list of layers and may show progress, as ``tqdm.tqdm`` does.
        command: the command line that the record names.

    Raises:
        ConfigError: the weights add up to zero.
        RankscopeError: an adapter cannot be read or added, shapes differ, or ``out`` exists.
    """
    weights = check_weights(weights, len(adapters))
    total = math.fsum(weights)
    if weights and abs(total) < RELATIVE_TOLERANCE * max(abs(weight) for weight in weights):
        raise ConfigError(f"the weights {weights} add up to zero, so there is no average; use merge")
    operation = Operation(
        name="average", out=out, choice=choice, dtype=dtype, device=device, track=track, command=command
    )
    return _write_sum(adapters, [weight / total for weight in weights], operation)


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """One finite weight for each of ``count`` adapters; 1 each where none are given.

    Raises:
        ConfigError: too few, too many, or one that is NaN or infinite.
    """
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(
            f"{format_count(len(weights), 'weight')} for {format_count(count, 'adapter')}; give one for each"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"the weights {list(weights)} are not all finite; give finite numbers")
    return [float(weight) for weight in weights]


def _write_sum(sources: Sequence[AdapterSource], weights: Sequence[float], operation: Operation) -> SurgeryResult:
    """Write the adapter whose update is the weighted sum."""
    if len(sources) < 2:
        raise ConfigError(f"a sum needs at least two adapters, not {len(sources)}; give another one")
    with operation.create_folder() as folder:
        adapters = [Adapter.open(source, device=operation.device) for source in sources]
        notes = _check_compatible(adapters)
        names = sorted({name for adapter in adapters for name in adapter.places}, key=natural_key)
        layers = [_sum_layer(name, adapters, weights, operation.dtype) for name in names]
        with prefix_errors(", ".join(adapter.label for adapter in adapters)):
            truncated = truncate_layers(layers, operation)
        whole, dropped = _sum_whole_tensors(adapters, weights)
        tensors = whole | _sum_factor_biases(names, adapters, weights)
        for layer in layers:
            factors = factor_tensors(layer.name, truncated.factors[layer.name], layer.place)
            tensors |= {key: LazyTensor.of(factor) for key, factor in factors.items()}
        ranks = {change.name: change.rank_after or 1 for change in truncated.changes}
        write_peft_folder(folder, _config(adapters, ranks, tensors, dropped), tensors, operation.file_metadata())
        copy_tokenizer(adapters[0].store.path, folder)
        return operation.write_record(
            folder,
            truncated.changes,
            inputs=tuple(adapter.label for adapter in adapters),
            weights=tuple(weights),
            carried=tuple(whole),
            skipped=tuple(SkippedItem(key, "equal in all adapters, so the base's own returns") for key in dropped),
            notes=(*notes, *truncated.notes, *zero_layer_notes(truncated.changes)),
        )


def _check_compatible(adapters: Sequence[Adapter]) -> list[str]:
    """Notes on what the adapters do not share.

    Raises:
        FormatError: they cannot be added.
    """
    notes = []
    first = adapters[0]
    for adapter in adapters:
        if adapter.magnitudes or adapter.config.get("use_dora"):
            raise FormatError(
                f"{adapter.label}: is a DoRA adapter, whose magnitudes do not add; merge each into the base and "
                "extract the difference"
            )
        for key in MUST_AGREE:
            if (adapter.config.get(key) or None) != (first.config.get(key) or None):
                raise FormatError(f"{adapter.label}: has another {key} than {first.label}; they cannot be added")
        shared = pair_names(first.places, adapter.places).pairs
        if shared and not first.places.keys() & adapter.places.keys():
            ours, theirs = shared[0]
            raise FormatError(
                f"{adapter.label}: calls {ours!r} of {first.label} {theirs!r}; save both from the same class of model"
            )
        bases = [each.config.get("base_model_name_or_path") for each in (first, adapter)]
        if None not in bases and bases[0] != bases[1]:
            notes.append(f"{adapter.label} was trained on {bases[1]}, {first.label} on {bases[0]}")
        lone = [name for name in adapter.places if any(name not in other.places for other in adapters)]
        if lone:
            notes.append(
                f"{adapter.label}: {format_count(len(lone), 'layer')} that another adapter does not have: "
                f"{examples(lone)}"
            )
        notes += [f"{adapter.label}: {note}" for note in adapter.store.notes]
    return notes


def _sum_layer(
    name: str, adapters: Sequence[Adapter], weights: Sequence[float], dtype: torch.dtype | None
) -> LayerUpdate:
    """The weighted sum of one layer over the adapters that have it."""
    holders = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if name in adapter.places]
    first = holders[0][0]
    place, shape = first.places[name], first.info(name).shape
    for adapter, _ in holders:
        if adapter.info(name).shape != shape or adapter.places[name] != place:
            raise ShapeError(
                f"layer {name} is {shape} {place.kind} in {first.label} and {adapter.info(name).shape} "
                f"{adapter.places[name].kind} in {adapter.label}; are they of the same model?"
            )
    ranks = [adapter.info(name).nominal_rank or 0 for adapter, _ in holders]

    def read() -> LowRank:
        total = reduce(lambda a, b: a + b, (adapter.update(name) * weight for adapter, weight in holders))
        return _group_directions(total, ranks, place.groups) if place.groups > 1 else total

    return LayerUpdate(
        name=name,
        shape=shape,
        place=place,
        dtype=dtype or reduce(torch.promote_types, (adapter.dtype(name) for adapter, _ in holders)),
        read=read,
        parameters=sum(adapter.parameters(name) for adapter, _ in holders),
        rank=sum(ranks),
    )


def _group_directions(update: LowRank, ranks: Sequence[int], groups: int) -> LowRank:
    """The same sum, B (out, r) and A (r, in), with the r directions sorted by group of the convolution, as in PEFT."""
    ends = accumulate(ranks)
    parts = [torch.arange(end - rank, end).reshape(groups, -1) for rank, end in zip(ranks, ends, strict=True)]
    order = torch.cat(parts, dim=1).flatten().to(update.device)
    return LowRank(update.B[:, order], update.A[order], update.scale)


def _sum_whole_tensors(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Sums of what was trained whole, where they do not need the base; and the keys for which the sum is the base.

    base + Σ wᵢ(pᵢ − base) is Σ wᵢpᵢ where the weights add up to 1. It is the base where they add up to 0 and all pᵢ
    are equal.

    Raises:
        FormatError: a sum that the base would be needed for.
    """
    sums: dict[str, LazyTensor] = {}
    dropped = []
    total = math.fsum(weights)
    for key in sorted({key for adapter in adapters for key in adapter.whole}, key=natural_key):
        holders = [adapter for adapter in adapters if key in adapter.whole]
        everywhere = len(holders) == len(adapters)
        if key.endswith(".base_layer.weight") and _is_equal_in_all(key, holders):
            sums[key] = holders[0].lazy_tensor(holders[0].whole[key])
        elif everywhere and abs(total - 1) < RELATIVE_TOLERANCE:
            sums[key] = _lazy_mean(key, adapters, weights)
        elif everywhere and abs(total) < RELATIVE_TOLERANCE and _is_equal_in_all(key, holders):
            dropped.append(key)
        else:
            raise FormatError(
                f"{holders[0].label}: {strip_peft_prefix(key)} was trained whole, so its sum needs the base; "
                "merge the adapters into their base instead"
            )
    return sums, dropped


def _is_equal_in_all(key: str, holders: Sequence[Adapter]) -> bool:
    first, *others = (holder.file.read(holder.whole[key]) for holder in holders)
    same_kind = all(other.shape == first.shape and other.is_complex() == first.is_complex() for other in others)
    return same_kind and all(torch.equal(first, other.to(first.dtype)) for other in others)


def _lazy_mean(key: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> LazyTensor:
    """Σ wᵢpᵢ of one tensor that every adapter trained whole, computed when it is written."""
    infos = [adapter.file.infos[adapter.whole[key]] for adapter in adapters]
    if len({info.shape for info in infos}) > 1:
        shapes = ", ".join(str(info.shape) for info in infos)
        raise ShapeError(f"{strip_peft_prefix(key)} has the shapes {shapes}; are the adapters of the same model?")
    dtype = reduce(torch.promote_types, (float_dtype(info.dtype) for info in infos))

    def read() -> Tensor:
        parts = (in_float64(a.file.read(a.whole[key])) * weight for a, weight in zip(adapters, weights, strict=True))
        mean = reduce(torch.add, parts).to(dtype)
        check_finite(mean, f"the sum in {str(dtype).removeprefix('torch.')}")
        return mean

    return LazyTensor(TensorInfo(infos[0].shape, dtype), read)


def _sum_factor_biases(
    names: Sequence[str], adapters: Sequence[Adapter], weights: Sequence[float]
) -> dict[str, LazyTensor]:
    """Sums of ``lora_B.bias``, (out,); zeros where no adapter has one, since PEFT gives all layers one or none."""
    if not any(adapter.factor_biases for adapter in adapters):
        return {}
    sums = {}
    for name in names:
        holders = [(a, w) for a, w in zip(adapters, weights, strict=True) if name in a.places]
        first = holders[0][0]
        parts = [a.factor_bias(name) * w for a, w in holders if name in a.factor_biases]
        size = first.info(name).shape[0]
        total = reduce(torch.add, parts) if parts else torch.zeros(size, dtype=first.dtype(name))
        check_finite(total, f"{name}: the sum of lora_B.bias")
        sums[factor_bias_key(name)] = LazyTensor.of(total)
    return sums


def _config(
    adapters: Sequence[Adapter], ranks: dict[str, int], tensors: dict[str, LazyTensor], dropped: Sequence[str]
) -> dict[str, Any]:
    """The configuration of the sum; ``dropped``: keys of tensors that only the base holds."""
    configs = [adapter.config for adapter in adapters]
    gone = {strip_peft_prefix(key).rpartition(".")[0] for key in dropped}
    saved = dict.fromkeys(name for config in configs for name in config.get("modules_to_save") or ())
    kept = [name for name in saved if not any(path == name or path.endswith(f".{name}") for path in gone)]
    paths = {*ranks, *(strip_peft_prefix(key).rpartition(".")[0] for key in tensors if ".lora_" not in key)}
    return config_with_ranks(
        configs[0],
        ranks,
        target_modules=exact_targets(list(ranks), paths),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        fan_in_fan_out=any(config.get("fan_in_fan_out") for config in configs),
        bias=max((config.get("bias") or "none" for config in configs), key=BIAS_SETTINGS.index),
        lora_bias=any(config.get("lora_bias") for config in configs),
        modules_to_save=kept or None,
    )
