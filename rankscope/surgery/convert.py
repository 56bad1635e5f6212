"""``convert``: the same updates in the layout of another tool."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from rankscope.errors import ConfigError, FormatError, prefix_errors
from rankscope.formats.abstract_store import SkippedItem
from rankscope.formats.diffusers import DIFFUSERS_WEIGHTS_NAME
from rankscope.formats.layouts import AdapterContents, LayerFactors, pipeline_component, to_diffusers, to_kohya, to_peft
from rankscope.formats.peft_write import write_peft_folder
from rankscope.formats.streaming import LazyTensor, write_streamed
from rankscope.surgery.adapter import AdapterSource
from rankscope.surgery.gather import gather_layers, read_base_names, read_names
from rankscope.surgery.output_folder import (
    build_result,
    copy_tokenizer,
    create_output_folder,
    file_metadata,
    free_output_path,
    write_record,
)
from rankscope.surgery.surgery_result import LayerChange, SurgeryResult, error_over_norm
from rankscope.surgery.truncate_layers import Track
from rankscope.updates import LowRank

TargetFormat = Literal["peft", "kohya", "diffusers"]
SUFFIX = ".safetensors"


def convert(
    adapter: AdapterSource,
    to: TargetFormat,
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

    To PEFT and kohya the factors go as they are, with the α that gives their scale; to diffusers the scale goes into B,
    since its older versions read no α. DoRA's magnitude goes along. What the format has no place for is listed.

    Args:
        adapter: in any format that is read.
        to: "peft" (a folder), "kohya" or "diffusers" (a folder with one file, or the file where ``out`` ends so).
        out: place to be made.
        alpha: α where the adapter's file has none.
        component: the part of a pipeline that is meant (unet, transformer, text_encoder …): which is kept, or, where
            the adapter names none, what its layers are written as.
        base: the model, whose dotted names kohya's are looked up among; a PEFT configuration names it.
        names: a file of dotted names, one a line, for the same.
        device: where factors are brought on the way.
        track: wraps the list of layers and may show progress.
        command: what the record names as the command line.

    Raises:
        RankscopeError: an adapter that cannot be read, is in that format already or holds nothing that it can hold,
            names that are not known, or ``out`` is taken.
    """
    if to not in get_args(TargetFormat):
        raise ConfigError(f"to = {to!r}: convert to one of {', '.join(get_args(TargetFormat))}")
    place = free_output_path(out)
    if to == "peft" and place.suffix == SUFFIX:
        raise ConfigError(f"{out}: PEFT's format is a folder; give a name without {SUFFIX}")
    known = [*(read_base_names(base) if base is not None else ()), *(read_names(names) if names is not None else ())]
    source = gather_layers(adapter, alpha=alpha, device=device, names=known)
    if source.kind == to:
        raise ConfigError(f"{source.label}: is in the format {to} already")
    source.choose(component, to == "peft")
    pieces, left = _placeable(source.read(track), to)
    with prefix_errors(source.label):
        written = _to_format(pieces, to, base, [module for _, module in known])
    fields = {
        "inputs": (source.label,),
        "command": command,
        "choice": f"{source.kind} → {to}",
        "carried": (),
        "skipped": (*source.skipped, *left),
        "notes": (*source.notes, *_notes(pieces, to)),
    }
    changes = tuple(_change(*pair) for pair in zip(pieces, written.updates, strict=True))
    tokenizer = source.folder if source.kind == "peft" else None
    return _put(written, to, out, place, changes, fields, tokenizer)


def _put(
    written: AdapterContents,
    to: TargetFormat,
    out: str | os.PathLike[str],
    place: Path,
    changes: tuple[LayerChange, ...],
    fields: dict[str, Any],
    tokenizer: Path | None,
) -> SurgeryResult:
    """Write the folder, or the one file."""
    tensors = {key: LazyTensor.of(tensor.contiguous()) for key, tensor in written.tensors.items()}
    metadata = {**file_metadata("convert", fields["command"]), **written.metadata}
    if place.suffix == SUFFIX:
        write_streamed(place, tensors, metadata)
        return build_result("convert", out, changes, **fields)
    with create_output_folder(out) as folder:
        if written.config is not None:
            write_peft_folder(folder, written.config, tensors, metadata)
        else:
            name = DIFFUSERS_WEIGHTS_NAME if to == "diffusers" else f"{place.name}{SUFFIX}"
            write_streamed(folder / name, tensors, metadata)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        return write_record(folder, "convert", out, changes, **fields)


def _to_format(
    pieces: Sequence[LayerFactors], to: TargetFormat, base: str | os.PathLike[str] | None, paths: Sequence[str]
) -> AdapterContents:
    if to == "peft":
        part = None if base is None else os.path.join(base, pieces[0].component)  # a pipeline's folder has its parts
        named = part if part is not None and os.path.isdir(part) else base
        return to_peft(pieces, None if named is None else str(named).rstrip(os.sep), paths)
    return to_kohya(pieces) if to == "kohya" else to_diffusers(pieces)


def _placeable(pieces: Sequence[LayerFactors], to: TargetFormat) -> tuple[list[LayerFactors], list[SkippedItem]]:
    """What the format has a place for, and the rest with the reason.

    Raises:
        FormatError: nothing is left.
    """
    left = []
    if to != "peft":
        for piece in pieces:
            if piece.place.kind == "embedding":
                left.append(SkippedItem(piece.name, f"factors of an embedding, for which {to} has no layout"))
            elif piece.place.groups > 1:
                left.append(
                    SkippedItem(piece.name, "a convolution with groups, whose factors only PEFT stores like this")
                )
    out = {one.name for one in left}
    kept = [piece for piece in pieces if piece.name not in out]
    if not kept:
        raise FormatError(f"nothing of it can be in the format {to}; {left[0].name}: {left[0].reason}")
    return kept, left


def _notes(pieces: Sequence[LayerFactors], to: TargetFormat) -> list[str]:
    notes = []
    if to != "peft" and any(not piece.component for piece in pieces):
        notes.append(
            "the adapter does not say which part of a pipeline it is of; written as "
            f"{pipeline_component(pieces[0], pieces)} (--component says otherwise)"
        )
    dora = sum(piece.magnitude is not None for piece in pieces)
    if dora:
        notes.append(f"DoRA in {dora} layers: the magnitudes went along")
    return notes


def _change(piece: LayerFactors, after: LowRank) -> LayerChange:
    """The record of one layer; the error is that of rounding, zero where factors and scale are the same."""
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
