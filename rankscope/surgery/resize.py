"""``resize``: the same adapter at lower ranks."""

from __future__ import annotations

import os

import torch

from rankscope.errors import prefix_errors
from rankscope.formats.peft_write import factor_tensors, write_peft_folder
from rankscope.formats.streaming import LazyTensor
from rankscope.surgery.adapter import Adapter, AdapterSource, config_with_ranks
from rankscope.surgery.output_folder import copy_tokenizer, create_output_folder, file_metadata, write_record
from rankscope.surgery.surgery_result import SurgeryResult, format_count, zero_layer_notes
from rankscope.surgery.truncate import RankChoice
from rankscope.surgery.truncate_layers import LayerUpdate, Track, TruncatedLayers, truncate_layers


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
    What was trained whole goes along. A DoRA layer keeps its magnitude: only the product scale·B·A is truncated.

    Args:
        adapter: folder of a LoRA adapter in PEFT's layout, a run with one, or a store of it.
        choice: which singular values are kept.
        out: folder to be made.
        dtype: of the written factors; None keeps that of the adapter.
        device: where the decompositions run.
        track: wraps the list of layers and may show progress.
        command: what the record names as the command line.
        initial: the adapter before training, where its initialisation moved the base (PiSSA and others); what is
            written is then plain LoRA for the unmodified base.

    Raises:
        RankscopeError: an adapter that cannot be read or changed, a choice it does not allow, or ``out`` is taken.
    """
    with create_output_folder(out) as folder:
        source = Adapter.open(adapter, device=device, initial=initial)
        layers = [_layer(source, name, dtype) for name in source.names()]
        with prefix_errors(source.label):
            found = truncate_layers(layers, choice, track)
        ranks = {change.name: change.rank_after or 1 for change in found.changes}
        config = config_with_ranks(source.config, ranks)
        write_peft_folder(folder, config, _tensors(source, found), file_metadata("resize", command))
        copy_tokenizer(source.store.path, folder)
        return write_record(
            folder,
            "resize",
            out,
            found.changes,
            inputs=(source.label,),
            command=command,
            choice=str(choice),
            carried=tuple(source.whole),
            notes=(*source.store.notes, *_dora_note(source), *found.notes, *zero_layer_notes(found.changes)),
        )


def _layer(source: Adapter, name: str, dtype: torch.dtype | None) -> LayerUpdate:
    return LayerUpdate(
        name=name,
        shape=source.info(name).shape,
        place=source.places[name],
        dtype=dtype or source.dtype(name),
        read=lambda: source.update(name),
        parameters=source.parameters(name),
        rank=source.info(name).nominal_rank,
    )


def _tensors(source: Adapter, found: TruncatedLayers) -> dict[str, LazyTensor]:
    tensors = source.unchanged_tensors() | source.biases()
    for name, update in found.factors.items():
        factors = factor_tensors(name, update, source.places[name])
        tensors |= {key: LazyTensor.of(factor) for key, factor in factors.items()}
    return tensors


def _dora_note(source: Adapter) -> list[str]:
    if not source.magnitudes:
        return []
    layers = format_count(len(source.magnitudes), "layer")
    return [f"DoRA in {layers}: the product scale·B·A was resized, the magnitude is as it was"]
