"""``convert``: the same updates in the format of another tool."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rankscope.errors import ConfigError, FormatError, prefix_errors
from rankscope.formats.abstract_store import SkippedItem
from rankscope.formats.file_formats import FormatWriter, writers
from rankscope.formats.layouts import AdapterContents, LayerFactors, pipeline_component
from rankscope.formats.peft_write import write_peft_folder
from rankscope.formats.streaming import LazyTensor, write_streamed
from rankscope.surgery.adapter import AdapterSource
from rankscope.surgery.convertible_adapter import ConvertibleAdapter, read_base_names, read_names
from rankscope.surgery.operation import Operation
from rankscope.surgery.output_folder import copy_tokenizer, free_output_path
from rankscope.surgery.surgery_result import LayerChange, SurgeryResult, error_over_norm, format_count
from rankscope.track import Track
from rankscope.updates import LowRank

SUFFIX = ".safetensors"


def convert(
    adapter: AdapterSource,
    to: str,
    out: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    component: str | None = None,
    base: str | os.PathLike[str] | None = None,
    names: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    track: Track = iter,
    command: str | None = None,
) -> SurgeryResult:
    """Write the layers of an adapter in another format. Factors are neither multiplied out nor decomposed.

    For PEFT and kohya the factors stay as they are, with the α that gives their scale; for diffusers the scale is
    multiplied into B, since its older versions read no α. DoRA's magnitude is copied. Layers that the format cannot
    hold are listed in ``skipped``.

    Args:
        adapter: an adapter in any format that can be read.
        to: a format that can be written (``formats.file_formats``): "peft" (a folder), "kohya" or "diffusers" (a
            folder with one file, or that file if ``out`` ends in .safetensors).
        out: the folder or file to be made.
        alpha: α where the adapter's file has none.
        component: the part of a pipeline (unet, transformer, text_encoder …) that is kept; where the adapter names
            none, the part that its layers are written for.
        base: the model, among whose dotted names those of kohya are looked up; a PEFT configuration names it.
        names: a file of dotted names, one a line, for the same look-up.
        device: where the factors are read to.
        track: wraps the list of layers and may show progress, as ``tqdm.tqdm`` does.
        command: the command line that the record names.

    Raises:
        RankscopeError: the adapter cannot be read, is in that format already or has no layer that the format can hold,
            its names are not known, or ``out`` exists.
    """
    writer = writers().get(to)
    if writer is None:
        raise ConfigError(f"to = {to!r}: convert to one of {', '.join(writers())}")
    path = free_output_path(out)
    is_folder = writer.file_name is None
    if is_folder and path.suffix == SUFFIX:
        raise ConfigError(f"{out}: the format {to} is a folder; give a name without {SUFFIX}")
    known = [*(read_base_names(base) if base is not None else ()), *(read_names(names) if names is not None else ())]
    operation = Operation(name="convert", out=out, device=device, track=track, command=command)
    source = ConvertibleAdapter.open(adapter, alpha=alpha, device=device, names=known)
    if source.kind == to:
        raise ConfigError(f"{source.label}: is in the format {to} already")
    source.choose_component(component, is_folder)
    pieces, skipped = _split_by_format(source.read_layers(track), to, is_folder)
    with prefix_errors(source.label):
        contents = writer.arrange(pieces, base, [module for _, module in known])
    fields = {
        "inputs": (source.label,),
        "choice": f"{source.kind} → {to}",
        "carried": (),
        "skipped": (*source.skipped, *skipped),
        "notes": (*source.notes, *_notes(pieces, is_folder)),
    }
    changes = tuple(_layer_change(*pair) for pair in zip(pieces, contents.updates, strict=True))
    tokenizer = source.folder if source.kind == "peft" else None
    return _write_output(path, contents, writer, operation, changes, fields, tokenizer)


def _write_output(
    path: Path,
    contents: AdapterContents,
    writer: FormatWriter,
    operation: Operation,
    changes: tuple[LayerChange, ...],
    fields: dict[str, Any],
    tokenizer: Path | None,
) -> SurgeryResult:
    """Write the folder, or the one file; ``tokenizer`` is the folder that one is copied from."""
    tensors = {key: LazyTensor.of(tensor.contiguous()) for key, tensor in contents.tensors.items()}
    metadata = {**operation.file_metadata(), **contents.metadata}
    if path.suffix == SUFFIX:
        write_streamed(path, tensors, metadata)
        return operation.make_result(changes, **fields)
    with operation.create_folder() as folder:
        if contents.config is not None:
            write_peft_folder(folder, contents.config, tensors, metadata)
        else:
            write_streamed(folder / (writer.file_name or "{}").format(path.name), tensors, metadata)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        return operation.write_record(folder, changes, **fields)


def _split_by_format(
    pieces: Sequence[LayerFactors], to: str, is_folder: bool
) -> tuple[list[LayerFactors], list[SkippedItem]]:
    """The layers that the format can hold, and the others with the reason.

    Raises:
        FormatError: it can hold none.
    """
    kept, skipped = [], []
    for piece in pieces:
        if not is_folder and piece.place.kind == "embedding":
            skipped.append(SkippedItem(piece.name, f"factors of an embedding, for which {to} has no layout"))
        elif not is_folder and piece.place.groups > 1:
            reason = "a convolution with groups, whose factors only PEFT stores like this"
            skipped.append(SkippedItem(piece.name, reason))
        else:
            kept.append(piece)
    if not kept:
        raise FormatError(f"the format {to} can hold no layer of it; {skipped[0].name}: {skipped[0].reason}")
    return kept, skipped


def _notes(pieces: Sequence[LayerFactors], is_folder: bool) -> list[str]:
    notes = []
    if not is_folder and any(not piece.component for piece in pieces):
        notes.append(
            "the adapter does not say which part of a pipeline it is for; it is written for "
            f"{pipeline_component(pieces[0], pieces)} (choose another with --component)"
        )
    dora = sum(piece.magnitude is not None for piece in pieces)
    if dora:
        notes.append(f"DoRA in {format_count(dora, 'layer')}: the magnitudes are copied")
    return notes


def _layer_change(piece: LayerFactors, after: LowRank) -> LayerChange:
    """The record of one layer; the error is that of rounding, zero where factors and scale are unchanged."""
    before = piece.update
    same = after.B.dtype == before.B.dtype and after.scale == before.scale and torch.equal(after.B, before.B)
    error = 0.0 if same else (before + after * -1.0).norm
    parameters = piece.place.parameters(before.shape, piece.rank)
    return LayerChange(
        name=piece.name,
        kind=piece.place.kind,
        shape=before.shape,
        rank_before=piece.rank,
        rank_after=piece.rank,
        parameters_before=parameters,
        parameters_after=parameters,
        norm=before.norm,
        retained=1.0,
        error=error,
        relative_error=error_over_norm(error, before.norm),
    )
