"""``extract``: a LoRA adapter from a full fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import torch

from rankscope.errors import FormatError, prefix_errors
from rankscope.formats.abstract_store import SkippedItem
from rankscope.formats.checkpoint import read_model_config
from rankscope.formats.peft_keys import PEFT_PREFIX, strip_peft_prefix
from rankscope.formats.peft_write import (
    FactorLayout,
    exact_targets,
    factor_tensors,
    lora_config,
    rank_settings,
    write_peft_folder,
)
from rankscope.formats.streaming import LazyTensor
from rankscope.surgery.full_finetune import FullFinetune
from rankscope.surgery.model_fit import describe_misfits
from rankscope.surgery.modules_to_save import ModulesToSave, find_modules_to_save
from rankscope.surgery.operation import Operation
from rankscope.surgery.output_folder import copy_tokenizer
from rankscope.surgery.surgery_result import SurgeryResult
from rankscope.surgery.truncate import RankChoice
from rankscope.surgery.truncate_layers import LayerUpdate, TruncatedLayers, truncate_layers
from rankscope.surgery.tying import HEAD_WEIGHT, TIED_EMBEDDING, has_head, is_tied
from rankscope.track import Track
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

    What cannot be low-rank is copied whole where PEFT can load it (norms, biases, new modules, embeddings of another
    size); the rest is listed in ``skipped``. Layers that did not change are left out. One pair of tensors at a time is
    in memory; each is decomposed in float32.

    Args:
        tuned: full weights, or a file of updates such as a study's run of full fine-tuning has.
        choice: which singular values are kept; energies are relative to the exact energy of the update.
        out: the folder to be made.
        base: the checkpoint that was tuned; required for full weights. Without it, changes in a file of updates that
            are no matrices are left out.
        embeddings: "whole" saves embeddings that changed as they are; "low-rank" treats them like any other matrix.
        dtype: dtype of the written factors.
        device: where the decompositions run.
        track: wraps the list of layers and may show progress, as ``tqdm.tqdm`` does.
        command: the command line that the record names.

    Raises:
        RankscopeError: files cannot be read, the base does not fit, no matrix changed, or ``out`` exists.
    """
    operation = Operation(
        name="extract", out=out, choice=choice, dtype=dtype, device=device, track=track, command=command
    )
    with operation.create_folder() as folder:
        source = FullFinetune.open(tuned, base, device)
        layers, kept_whole = _layer_updates(source, embeddings, dtype)
        with prefix_errors(tuned):
            truncated = truncate_layers(layers, operation, keep_zeros=False)
            if not truncated.factors:
                raise FormatError(f"no matrix that can be low-rank differs from the base{_name_suffix(base)}")
        unchanged = {layer.name for layer in layers} - truncated.factors.keys()
        saved = _save_tied_head(source, find_modules_to_save(source, truncated.factors, unchanged))
        truncated, places = _truncate_tied_head(source, truncated, {layer.name: layer.place for layer in layers})
        tensors = saved.tensors | _factor_tensors(source, truncated.factors, places)
        ranks = {source.model_path(name): update.nominal_rank for name, update in truncated.factors.items()}
        write_peft_folder(folder, _config(source, ranks, saved, base), tensors, operation.file_metadata())
        copy_tokenizer(source.store.path if source.store.path.is_dir() else source.store.path.parent, folder)
        return operation.write_record(
            folder,
            truncated.changes,
            inputs=(str(tuned),),
            base=None if base is None else str(base),
            carried=tuple(saved.tensors),
            skipped=tuple(_list_skipped(source, saved, kept_whole)),
            notes=(*_misfits(source, ranks, saved), *_notes(source, saved), *truncated.notes),
        )


def _name_suffix(base: object) -> str:
    return "" if base is None else f" {base}"


def _layer_updates(
    source: FullFinetune, embeddings: EmbeddingMode, dtype: torch.dtype
) -> tuple[list[LayerUpdate], list[SkippedItem]]:
    """The matrices that become low-rank, and those that do not although they can be read, with the reason."""
    layers, kept_whole = [], []
    for name in source.store.names():
        reason = source.skip_reason(name)
        if reason is None and source.place(name).kind == "embedding" and embeddings == "whole":
            reason = "an embedding, saved whole"
        if reason is None:
            layers.append(_layer_update(source, name, dtype))
        else:
            kept_whole.append(SkippedItem(name, reason))
    return layers, kept_whole


def _layer_update(source: FullFinetune, name: str, dtype: torch.dtype) -> LayerUpdate:
    shape = source.store.info(name).shape
    size = shape[0] * shape[1]
    return LayerUpdate(name, shape, source.place(name), dtype, lambda: source.store[name], parameters=size, rank=None)


def _factor_tensors(
    source: FullFinetune, factors: Mapping[str, LowRank], places: Mapping[str, FactorLayout]
) -> dict[str, LazyTensor]:
    """The factors of all layers by PEFT's key."""
    return {
        key: LazyTensor.of(factor)
        for name, update in factors.items()
        for key, factor in factor_tensors(source.model_path(name), update, places[name]).items()
    }


def _save_tied_head(source: FullFinetune, saved: ModulesToSave) -> ModulesToSave:
    """Save the output layer too, where it is tied to an embedding that is saved: PEFT would keep the base's weight."""
    embeddings = [key for key in saved.tensors if TIED_EMBEDDING.search(strip_peft_prefix(key))]
    if not embeddings or not _ties_head(source):
        return saved
    tensors = {**saved.tensors, PEFT_PREFIX + HEAD_WEIGHT: saved.tensors[embeddings[0]]}
    return saved._replace(tensors=tensors, modules=[*saved.modules, HEAD_MODULE])


def _truncate_tied_head(
    source: FullFinetune, truncated: TruncatedLayers, places: dict[str, FactorLayout]
) -> tuple[TruncatedLayers, dict[str, FactorLayout]]:
    """Give the output layer the same factors, where it is tied to an embedding that was made low-rank."""
    embeddings = [
        change
        for change in truncated.changes
        if change.kind == "embedding" and TIED_EMBEDDING.search(f"{change.name}.weight")
    ]
    if not embeddings or not _ties_head(source):
        return truncated, places
    head = msgspec.structs.replace(embeddings[0], name=HEAD_MODULE, kind="linear")
    factors = {**truncated.factors, HEAD_MODULE: truncated.factors[embeddings[0].name]}
    changes = (*truncated.changes, head)
    return truncated._replace(factors=factors, changes=changes), {**places, HEAD_MODULE: FactorLayout()}


def _ties_head(source: FullFinetune) -> bool:
    """Whether the model's output layer is its embedding and has no weight of its own in the checkpoint."""
    return has_head(source.config) and is_tied(source.config, source.infos) and HEAD_WEIGHT not in source.infos


def _list_skipped(source: FullFinetune, saved: ModulesToSave, kept_whole: Sequence[SkippedItem]) -> list[SkippedItem]:
    """What changed and is not in the output. Without a base no tensor can be saved whole."""
    if source.infos:
        return saved.skipped
    return saved.skipped + [SkippedItem(item.name, f"{item.reason}; give --base") for item in kept_whole]


def _misfits(source: FullFinetune, ranks: Mapping[str, int], saved: ModulesToSave) -> list[str]:
    """What PEFT cannot place in the base, or would apply to one of two tied weights alone."""
    config = source.config if source.base is None else read_model_config(source.base.path)
    modules = dict.fromkeys([*ranks, *(source.model_path(module) for module in saved.modules)])
    return describe_misfits(config, list(modules))


def _notes(source: FullFinetune, saved: ModulesToSave) -> list[str]:
    mismatches = [(module, source.row_mismatch(module)) for module in saved.modules]
    return [
        f"{module} has {rows[0]} rows, {rows[1]} in the base: resize the base's embeddings before loading the adapter"
        for module, rows in mismatches
        if rows
    ]


def _config(source: FullFinetune, ranks: dict[str, int], saved: ModulesToSave, base: object) -> dict[str, Any]:
    classes = source.config.get("architectures") or [""]
    causal = isinstance(classes, list) and str(classes[0]).endswith(("CausalLM", "LMHeadModel"))
    paths = {source.model_path(name.rpartition(".")[0]) for name in source.infos} | ranks.keys()
    return lora_config(
        {**rank_settings(ranks), "lora_dropout": 0.0, "target_modules": exact_targets(list(ranks), paths)},
        base=None if base is None else str(base),
        task_type="CAUSAL_LM" if causal else None,
        bias="all" if saved.biases else "none",
        fan_in_fan_out=any(source.is_conv1d(name) for name in ranks),
        modules_to_save=[source.model_path(module) for module in saved.modules],
    )
