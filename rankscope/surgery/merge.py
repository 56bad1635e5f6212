"""``merge`` and ``unmerge``: adapters are added to the weights of a checkpoint, or subtracted from them again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rankscope.errors import ConfigError, FormatError
from rankscope.formats.checkpoint import MODEL_CONFIG, Checkpoint, read_model_config
from rankscope.formats.file_io import write_json
from rankscope.formats.hub import local_path
from rankscope.formats.peft_keys import CONFIG_NAME, strip_peft_prefix
from rankscope.formats.peft_lora import WHOLE_SUFFIX
from rankscope.formats.quantized import QUANTIZATION_CONFIG, QUANTIZATION_FILES
from rankscope.surgery.adapter import Adapter, AdapterSource
from rankscope.surgery.algebra import check_weights
from rankscope.surgery.merge_plan import MergePlan
from rankscope.surgery.model_fit import find_strangers
from rankscope.surgery.operation import Operation
from rankscope.surgery.output_folder import EXCLUDED_PATTERNS, copy_files, copy_parts, copy_tokenizer
from rankscope.surgery.shards import Shards
from rankscope.surgery.surgery_result import SurgeryResult
from rankscope.track import Track

# With one of these settings the adapted model is not base + update.
UNMERGEABLE_SETTINGS = {
    "layer_replication": "the model repeats layers of the base",
    "alora_invocation_tokens": "activated LoRA acts only after its invocation tokens",
    "trainable_token_indices": "rows of the embedding were trained",
}


def merge(
    base: str | os.PathLike[str],
    adapters: Sequence[AdapterSource],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    *,
    device: torch.device | str = "cpu",
    track: Track = iter,
    command: str | None = None,
) -> SurgeryResult:
    """Write W + Σ wᵢ·sᵢ·BᵢAᵢ for every weight W of a checkpoint, rounded once to the dtype that stores W.

    DoRA layers add wᵢ·(m(W + sBA)/‖W + sBA‖ − W). What an adapter trained whole (biases, heads) replaces the base's
    tensor: W + Σ wᵢ(Wᵢ − W). The checkpoint keeps its shards, its configuration and its tokenizer; an output layer
    tied to an embedding gets a weight of its own where only one of the two changes.

    Args:
        base: the checkpoint; of a folder, the files beside the weights are copied.
        adapters: one or more in PEFT's layout.
        out: the folder to be made.
        weights: one for each adapter; 1 each by default.
        device: where the products are computed.
        track: wraps the list of layers and may show progress, as ``tqdm.tqdm`` does.
        command: the command line that the record names.

    Raises:
        RankscopeError: a file cannot be read, an adapter is of another base or of a kind that cannot be merged, or
            ``out`` exists.
    """
    operation = Operation(name="merge", out=out, device=device, track=track, command=command)
    return _write_checkpoint(base, adapters, weights, operation)


def unmerge(
    merged: str | os.PathLike[str],
    adapters: Sequence[AdapterSource],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    *,
    device: torch.device | str = "cpu",
    track: Track = iter,
    command: str | None = None,
) -> SurgeryResult:
    """Subtract adapters from the checkpoint that they were merged into.

    Rounding W + ΔW lost a part of W wherever the sum is the larger number: ``from_original`` of each layer is the
    distance from W that is expected to remain if the sum was rounded once (see ``addition``).

    Args:
        merged: the checkpoint; of a folder, the files beside the weights are copied.
        adapters: those that were merged, in PEFT's layout.
        out: the folder to be made.
        weights: those that the adapters were merged with; 1 each by default.
        device: where the products are computed.
        track: wraps the list of layers and may show progress, as ``tqdm.tqdm`` does.
        command: the command line that the record names.

    Raises:
        FormatError: an adapter replaced what cannot be restored: DoRA, biases, modules saved whole.
        RankscopeError: any other error of ``merge``.
    """
    operation = Operation(name="unmerge", out=out, device=device, track=track, command=command)
    return _write_checkpoint(merged, adapters, weights, operation)


def _write_checkpoint(
    base: str | os.PathLike[str],
    sources: Sequence[AdapterSource],
    weights: Sequence[float] | None,
    operation: Operation,
) -> SurgeryResult:
    """Write the checkpoint with the adapters added, or subtracted for ``unmerge``."""
    if not sources:
        raise ConfigError("no adapter is given; give at least one adapter")
    weights = check_weights(weights, len(sources))
    path = local_path(base)
    if (path / CONFIG_NAME).is_file():
        raise FormatError(f"{base}: is an adapter, where a base model comes first; --as-adapter adds adapters alone")
    unmerges = operation.name == "unmerge"
    with operation.create_folder() as folder:
        checkpoint = Checkpoint(path)
        adapters = [_open_adapter(source, path, operation) for source in sources]
        config = _plain_config(checkpoint, read_model_config(path))
        signed_weights = [-weight for weight in weights] if unmerges else weights
        plan = MergePlan(checkpoint, config, adapters, signed_weights, operation.track)
        if unmerges and plan.added:
            raise FormatError(f"{base}: has no {next(iter(plan.added))}, which the adapter would be subtracted from")
        if strangers := find_strangers(plan.config, list(plan.added)):
            raise FormatError(
                f"{base}: its model has no {strangers[0]}, which the merge would write, so that layer would be random "
                "on loading; its output layer is tied under another name, and untying that is not supported: leave the "
                "embedding out of the adapter"
            )
        metadata = operation.file_metadata()
        tensors = plan.replacement_tensors(), plan.new_tensors()
        Shards(path).write(folder, *tensors, metadata, checkpoint.scales)
        layers = plan.layers(unmerges)
        if path.is_dir():
            copy_files(path, folder, but=(*EXCLUDED_PATTERNS, *QUANTIZATION_FILES))
            copy_parts(path, folder)
            if len(adapters) == 1:
                copy_tokenizer(adapters[0].store.path, folder)
            if plan.config != read_model_config(path):
                write_json(folder / MODEL_CONFIG, plan.config)
        return operation.write_record(
            folder,
            layers,
            inputs=tuple(adapter.label for adapter in adapters),
            weights=tuple(weights),
            base=str(base),
            carried=tuple(dict.fromkeys(key for adapter in adapters for key in adapter.whole)),
            notes=(
                *(f"{a.label}: {note}" for a in adapters for note in a.store.notes),
                *plan.notes,
                *_notes(checkpoint),
            ),
        )


def _plain_config(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without that of the quantisation: the output is not quantised.

    Raises:
        FormatError: the weights are quantised in a layout that is not read, or the configuration does not say so, with
            which every loader takes the codes for the weights.
    """
    checkpoint.check_readable()
    if checkpoint.quantized and config and QUANTIZATION_CONFIG not in config:
        schemes = sorted({weight.scheme for weight in checkpoint.quantized.values()})
        raise FormatError(
            f"{checkpoint.path}: holds weights in {' and '.join(schemes)}, but its {MODEL_CONFIG} has no "
            f"{QUANTIZATION_CONFIG}, so it is not the model's own; take that, or dequantize it first"
        )
    return {key: value for key, value in config.items() if not (checkpoint.quantized and key == QUANTIZATION_CONFIG)}


def _notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    note = checkpoint.quantization_note
    return (f"{note} and written as bfloat16",) if note else ()


def _open_adapter(source: AdapterSource, base: Path, operation: Operation) -> Adapter:
    """Open an adapter that can be merged into this base.

    Raises:
        FormatError: it cannot, or it cannot be unmerged where that is the operation.
    """
    adapter = Adapter.open(source, device=operation.device)
    for key, reason in UNMERGEABLE_SETTINGS.items():
        if adapter.config.get(key):
            raise FormatError(f"{adapter.label}: {key} is set ({reason}), which is not merged here; use it with PEFT")
    grouped = [name for name, where in adapter.places.items() if where.groups > 1]
    if grouped:
        raise FormatError(f"{adapter.label}: layer {grouped[0]} is a convolution with groups, which no weight can hold")
    if operation.name == "unmerge" and (adapter.magnitudes or adapter.whole):
        what = "DoRA rescaled" if adapter.magnitudes else f"{strip_peft_prefix(next(iter(adapter.whole)))} replaced"
        raise FormatError(f"{adapter.label}: {what} a weight of the base, which nothing here holds; keep the base")
    if adapter.magnitudes:
        adapter = Adapter.open(adapter.label, base, operation.device)
        for name in adapter.magnitudes:
            if name + WHOLE_SUFFIX not in adapter.store:
                raise FormatError(f"{base}: has no weight for the DoRA layer {name}; is this the base that was tuned?")
    return adapter
