"""``extract``: a LoRA adapter from a full fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import torch

from rankscope.errors import FormatError, located
from rankscope.formats.interface import Skipped
from rankscope.formats.peft_keys import PREFIX, bare_module
from rankscope.formats.peft_write import Place, exact_targets, rank_settings, stored_factors, write_folder
from rankscope.formats.streaming import Pending
from rankscope.surgery.result import LayerChange, Surgery
from rankscope.surgery.shrink import Layer, Track, shrink
from rankscope.surgery.truncate import Choice
from rankscope.surgery.tuned import Tuned
from rankscope.surgery.tying import EMBEDDING, HEAD, has_head, is_tied
from rankscope.surgery.whole import Whole, whole_parts
from rankscope.surgery.writing import copy_tokenizer, new_folder, record, tags
from rankscope.updates import LowRank

Embeddings = Literal["whole", "low-rank"]
HEAD_MODULE = HEAD.removesuffix(".weight")


def extract(
    tuned: str | os.PathLike[str],
    choice: Choice,
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    embeddings: Embeddings = "whole",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    track: Track = iter,
    command: str | None = None,
) -> Surgery:
    """Write the LoRA adapter whose every layer is the best approximation of its rank to tuned − base.

    What cannot be low-rank goes along whole where PEFT can load it (norms, biases, new modules, embeddings of another
    size); the rest is listed in ``skipped``. Layers that did not change are left out. One pair of tensors is in memory
    at a time; each is decomposed in float32.

    Args:
        tuned: full weights, or a file of updates such as a study's run of full fine-tuning has.
        choice: which singular values are kept, with energies relative to the exact energy of the update.
        out: folder to be made.
        base: the checkpoint that was tuned; required for full weights. Without it, what changed of a file of updates
            and is no matrix is left out.
        embeddings: "whole" saves embeddings that changed as they are; "low-rank" treats them as any other matrix.
        dtype: of the written factors.
        device: where the decompositions run.
        track: wraps the list of layers and may show progress.
        command: what the record names as the command line.

    Raises:
        RankscopeError: files that cannot be read, a base that does not fit, no matrix that changed, ``out`` is taken.
    """
    with new_folder(out) as folder:
        source = Tuned.open(tuned, base, device)
        layers, kept = _layers(source, embeddings, dtype)
        with located(tuned):
            found = shrink(layers, choice, track, zeros=False)
            if not found.factors:
                raise FormatError(f"no matrix that can be low-rank differs from the base{_named(base)}")
        unchanged = {layer.name for layer in layers} - found.factors.keys()
        parts = _tied(source, whole_parts(source, found.factors, unchanged))
        factors, changes, places = _with_head(source, found.factors, found.changes, layers)
        tensors = dict(parts.tensors)
        for name, update in factors.items():
            stored = stored_factors(source.in_model(name), update, places[name])
            tensors |= {key: Pending.of(factor) for key, factor in stored.items()}
        ranks = {source.in_model(name): update.nominal_rank for name, update in factors.items()}
        write_folder(folder, _config(source, ranks, parts, base), tensors, tags("extract", command))
        copy_tokenizer(source.store.path if source.store.path.is_dir() else source.store.path.parent, folder)
        return record(
            folder,
            "extract",
            out,
            changes,
            inputs=(str(tuned),),
            base=None if base is None else str(base),
            command=command,
            choice=str(choice),
            carried=tuple(parts.tensors),
            skipped=tuple(_skipped(source, parts, kept)),
            notes=(*_notes(source, parts), *found.notes),
        )


def _named(base: object) -> str:
    return "" if base is None else f" {base}"


def _layers(source: Tuned, embeddings: Embeddings, dtype: torch.dtype) -> tuple[list[Layer], list[Skipped]]:
    """The matrices to be made low-rank, and those that are not although they could be read, with the reason."""
    layers, kept = [], []
    for name in source.store.names():
        reason = source.why_not(name)
        if reason is None and source.place(name).kind == "embedding" and embeddings == "whole":
            reason = "an embedding, saved whole"
        if reason is None:
            layers.append(_layer(source, name, dtype))
        else:
            kept.append(Skipped(name, reason))
    return layers, kept


def _layer(source: Tuned, name: str, dtype: torch.dtype) -> Layer:
    shape = source.store.info(name).shape
    size = shape[0] * shape[1]
    return Layer(name, shape, source.place(name), dtype, lambda: source.store[name], parameters=size, rank=None)


def _tied(source: Tuned, parts: Whole) -> Whole:
    """With the output layer too, where it is an embedding that goes along whole: PEFT would leave it at the base's."""
    moved = [key for key in parts.tensors if EMBEDDING.search(bare_module(key))]
    if not moved or not _ties(source):
        return parts
    tensors = {**parts.tensors, PREFIX + HEAD: parts.tensors[moved[0]]}
    return parts._replace(tensors=tensors, modules=[*parts.modules, HEAD_MODULE])


def _with_head(
    source: Tuned, factors: dict[str, LowRank], changes: tuple[LayerChange, ...], layers: Sequence[Layer]
) -> tuple[dict[str, LowRank], tuple[LayerChange, ...], dict[str, Place]]:
    """With the output layer too, where it is an embedding that was made low-rank."""
    places = {layer.name: layer.place for layer in layers}
    moved = [change for change in changes if change.kind == "embedding" and EMBEDDING.search(f"{change.name}.weight")]
    if not moved or not _ties(source):
        return factors, changes, places
    head = msgspec.structs.replace(moved[0], name=HEAD_MODULE, kind="linear")
    return {**factors, HEAD_MODULE: factors[moved[0].name]}, (*changes, head), {**places, HEAD_MODULE: Place()}


def _ties(source: Tuned) -> bool:
    return has_head(source.config) and is_tied(source.config, source.infos) and HEAD not in source.infos


def _skipped(source: Tuned, parts: Whole, kept: Sequence[Skipped]) -> list[Skipped]:
    """What changed and the output lacks. Without a base nothing can go along whole."""
    return parts.skipped + ([] if source.infos else [Skipped(one.name, f"{one.reason}; give --base") for one in kept])


def _notes(source: Tuned, parts: Whole) -> list[str]:
    grown = [(module, source.grown(module)) for module in parts.modules]
    return [
        f"{module} has {rows[0]} rows, {rows[1]} in the base: resize the base's embeddings before loading the adapter"
        for module, rows in grown
        if rows
    ]


def _config(source: Tuned, ranks: dict[str, int], parts: Whole, base: object) -> dict[str, Any]:
    classes = source.config.get("architectures") or [""]
    causal = isinstance(classes, list) and str(classes[0]).endswith(("CausalLM", "LMHeadModel"))
    paths = {source.in_model(name.rpartition(".")[0]) for name in source.infos} | ranks.keys()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": None if base is None else str(base),
        "inference_mode": True,
        **rank_settings(ranks),
        "lora_dropout": 0.0,
        "target_modules": exact_targets(list(ranks), paths),
        "use_dora": False,
        "bias": "all" if parts.biases else "none",
        "fan_in_fan_out": any(source.is_conv1d(name) for name in ranks),
        "init_lora_weights": True,
        "modules_to_save": [source.in_model(module) for module in parts.modules] or None,
    }
