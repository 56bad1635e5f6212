"""``extract``: a LoRA adapter from a full fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import torch

from rankscope.errors import FormatError, prefix_errors
from rankscope.formats.abstract_store import SkippedItem
from rankscope.formats.peft_keys import PEFT_PREFIX, strip_peft_prefix
from rankscope.formats.peft_write import FactorLayout, exact_targets, factor_tensors, rank_settings, write_peft_folder
from rankscope.formats.streaming import LazyTensor
from rankscope.surgery.full_finetune import FullFinetune
from rankscope.surgery.modules_to_save import ModulesToSave, find_modules_to_save
from rankscope.surgery.output_folder import copy_tokenizer, create_output_folder, file_metadata, write_record
from rankscope.surgery.surgery_result import LayerChange, SurgeryResult
from rankscope.surgery.truncate import RankChoice
from rankscope.surgery.truncate_layers import LayerUpdate, Track, truncate_layers
from rankscope.surgery.tying import HEAD_WEIGHT, TIED_EMBEDDING, has_head, is_tied
from rankscope.updates import LowRank

EmbeddingMode = Literal["whole", "low-rank"]
HEAD_MODULE = HEAD_WEIGHT.removesuffix(".weight")


def extract(
    tuned: str | os.PathLike[str],
    choice: RankChoice,
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    embeddings: EmbeddingMode = "whole",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    track: Track = iter,
    command: str | None = None,
) -> SurgeryResult:
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
    with create_output_folder(out) as folder:
        source = FullFinetune.open(tuned, base, device)
        layers, kept = _layers(source, embeddings, dtype)
        with prefix_errors(tuned):
            found = truncate_layers(layers, choice, track, zeros=False)
            if not found.factors:
                raise FormatError(f"no matrix that can be low-rank differs from the base{_name_suffix(base)}")
        unchanged = {layer.name for layer in layers} - found.factors.keys()
        parts = _add_tied_head(source, find_modules_to_save(source, found.factors, unchanged))
        factors, changes, places = _with_head(source, found.factors, found.changes, layers)
        tensors = dict(parts.tensors)
        for name, update in factors.items():
            stored = factor_tensors(source.model_path(name), update, places[name])
            tensors |= {key: LazyTensor.of(factor) for key, factor in stored.items()}
        ranks = {source.model_path(name): update.nominal_rank for name, update in factors.items()}
        write_peft_folder(folder, _config(source, ranks, parts, base), tensors, file_metadata("extract", command))
        copy_tokenizer(source.store.path if source.store.path.is_dir() else source.store.path.parent, folder)
        return write_record(
            folder,
            "extract",
            out,
            changes,
            inputs=(str(tuned),),
            base=None if base is None else str(base),
            command=command,
            choice=str(choice),
            carried=tuple(parts.tensors),
            skipped=tuple(_list_skipped(source, parts, kept)),
            notes=(*_notes(source, parts), *found.notes),
        )


def _name_suffix(base: object) -> str:
    return "" if base is None else f" {base}"


def _layers(
    source: FullFinetune, embeddings: EmbeddingMode, dtype: torch.dtype
) -> tuple[list[LayerUpdate], list[SkippedItem]]:
    """The matrices to be made low-rank, and those that are not although they could be read, with the reason."""
    layers, kept = [], []
    for name in source.store.names():
        reason = source.skip_reason(name)
        if reason is None and source.place(name).kind == "embedding" and embeddings == "whole":
            reason = "an embedding, saved whole"
        if reason is None:
            layers.append(_layer(source, name, dtype))
        else:
            kept.append(SkippedItem(name, reason))
    return layers, kept


def _layer(source: FullFinetune, name: str, dtype: torch.dtype) -> LayerUpdate:
    shape = source.store.info(name).shape
    size = shape[0] * shape[1]
    return LayerUpdate(name, shape, source.place(name), dtype, lambda: source.store[name], parameters=size, rank=None)


def _add_tied_head(source: FullFinetune, parts: ModulesToSave) -> ModulesToSave:
    """With the output layer too, where it is an embedding that goes along whole: PEFT would leave it at the base's."""
    moved = [key for key in parts.tensors if TIED_EMBEDDING.search(strip_peft_prefix(key))]
    if not moved or not _ties(source):
        return parts
    tensors = {**parts.tensors, PEFT_PREFIX + HEAD_WEIGHT: parts.tensors[moved[0]]}
    return parts._replace(tensors=tensors, modules=[*parts.modules, HEAD_MODULE])


def _with_head(
    source: FullFinetune, factors: dict[str, LowRank], changes: tuple[LayerChange, ...], layers: Sequence[LayerUpdate]
) -> tuple[dict[str, LowRank], tuple[LayerChange, ...], dict[str, FactorLayout]]:
    """With the output layer too, where it is an embedding that was made low-rank."""
    places = {layer.name: layer.place for layer in layers}
    moved = [
        change for change in changes if change.kind == "embedding" and TIED_EMBEDDING.search(f"{change.name}.weight")
    ]
    if not moved or not _ties(source):
        return factors, changes, places
    head = msgspec.structs.replace(moved[0], name=HEAD_MODULE, kind="linear")
    return {**factors, HEAD_MODULE: factors[moved[0].name]}, (*changes, head), {**places, HEAD_MODULE: FactorLayout()}


def _ties(source: FullFinetune) -> bool:
    return has_head(source.config) and is_tied(source.config, source.infos) and HEAD_WEIGHT not in source.infos


def _list_skipped(source: FullFinetune, parts: ModulesToSave, kept: Sequence[SkippedItem]) -> list[SkippedItem]:
    """What changed and the output lacks. Without a base nothing can go along whole."""
    return parts.skipped + (
        [] if source.infos else [SkippedItem(one.name, f"{one.reason}; give --base") for one in kept]
    )


def _notes(source: FullFinetune, parts: ModulesToSave) -> list[str]:
    grown = [(module, source.row_mismatch(module)) for module in parts.modules]
    return [
        f"{module} has {rows[0]} rows, {rows[1]} in the base: resize the base's embeddings before loading the adapter"
        for module, rows in grown
        if rows
    ]


def _config(source: FullFinetune, ranks: dict[str, int], parts: ModulesToSave, base: object) -> dict[str, Any]:
    classes = source.config.get("architectures") or [""]
    causal = isinstance(classes, list) and str(classes[0]).endswith(("CausalLM", "LMHeadModel"))
    paths = {source.model_path(name.rpartition(".")[0]) for name in source.infos} | ranks.keys()
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
        "modules_to_save": [source.model_path(module) for module in parts.modules] or None,
    }
