"""``resize``: the same adapter at lower rank."""

from __future__ import annotations

import os

import torch

from rankscope.errors import prefix_errors
from rankscope.formats.peft_write import config_with_ranks, factor_tensors, write_peft_folder
from rankscope.formats.streaming import LazyTensor
from rankscope.surgery.adapter import Adapter, AdapterSource
from rankscope.surgery.operation import Operation
from rankscope.surgery.output_folder import copy_tokenizer
from rankscope.surgery.surgery_result import SurgeryResult, format_count, zero_layer_notes
from rankscope.surgery.truncate import RankChoice
from rankscope.surgery.truncate_layers import LayerUpdate, TruncatedLayers, truncate_layers
from rankscope.track import Track


def resize(
    adapter: AdapterSource,
    choice: RankChoice,
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    track: Track = iter,
    command: str | None = None,
    initial: str | os.PathLike[str] | None = None,
) -> SurgeryResult:
    """Write an adapter whose every layer is the best approximation of its rank (Eckart & Young 1936).

    Nothing is multiplied out. Factors are balanced (√σ on each side) with α = r, so the scale is 1 for every reader.
    What was trained whole is copied. A DoRA layer keeps its magnitude: only the product scale·B·A is truncated.

    Args:
        adapter: folder of a LoRA adapter in PEFT's layout, a run that has one, or a store of it.
        choice: which singular values are kept.
        out: the folder to be made.
        dtype: dtype of the written factors; None keeps that of the adapter.
        device: where the decompositions run.
        track: wraps the list of layers and may show progress, as ``tqdm.tqdm`` does.
        command: the command line that the record names.
        initial: the adapter before training, where its initialisation moved the base (PiSSA and others); the adapter
            that is written is then plain LoRA for the unmodified base.

    Raises:
        RankscopeError: the adapter cannot be read or changed, it does not allow the choice, or ``out`` exists.
    """
    operation = Operation(
        name="resize", out=out, choice=choice, dtype=dtype, device=device, track=track, command=command
    )
    with operation.create_folder() as folder:
        source = Adapter.open(adapter, device=device, initial=initial)
        layers = [_layer_update(source, name, dtype) for name in source.names()]
        with prefix_errors(source.label):
            truncated = truncate_layers(layers, operation)
        changes = truncated.changes
        config = config_with_ranks(source.config, {change.name: change.rank_after or 1 for change in changes})
        write_peft_folder(folder, config, _tensors(source, truncated), operation.file_metadata())
        copy_tokenizer(source.store.path, folder)
        return operation.write_record(
            folder,
            changes,
            inputs=(source.label,),
            carried=tuple(source.whole),
            notes=(*source.store.notes, *_dora_notes(source), *truncated.notes, *zero_layer_notes(changes)),
        )


def _layer_update(source: Adapter, name: str, dtype: torch.dtype | None) -> LayerUpdate:
    """The truncation that one layer of the adapter needs."""
    return LayerUpdate(
        name=name,
        shape=source.info(name).shape,
        place=source.places[name],
        dtype=dtype or source.dtype(name),
        read=lambda: source.update(name),
        parameters=source.parameters(name),
        rank=source.info(name).nominal_rank,
    )


def _tensors(source: Adapter, truncated: TruncatedLayers) -> dict[str, LazyTensor]:
    """Everything that the new adapter holds, by PEFT's key."""
    tensors = source.unchanged_tensors() | source.biases()
    for name, update in truncated.factors.items():
        factors = factor_tensors(name, update, source.places[name])
        tensors |= {key: LazyTensor.of(factor) for key, factor in factors.items()}
    return tensors


def _dora_notes(source: Adapter) -> list[str]:
    if not source.magnitudes:
        return []
    layers = format_count(len(source.magnitudes), "layer")
    return [f"DoRA in {layers}: the product scale·B·A was resized, the magnitude is as it was"]
