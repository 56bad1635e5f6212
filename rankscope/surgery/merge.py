"""``merge`` and ``unmerge``: adapters added to the weights of a checkpoint, or taken off again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from rankscope.errors import ConfigError, FormatError
from rankscope.formats.checkpoint import MODEL_CONFIG, Checkpoint, read_model_config
from rankscope.formats.file_io import write_json
from rankscope.formats.hub import local_path
from rankscope.formats.peft_keys import CONFIG_NAME, strip_peft_prefix
from rankscope.formats.peft_lora import WHOLE_SUFFIX
from rankscope.surgery.adapter import Adapter, AdapterSource
from rankscope.surgery.algebra import check_weights
from rankscope.surgery.merge_plan import MergePlan
from rankscope.surgery.output_folder import (
    copy_files,
    copy_tokenizer,
    create_output_folder,
    file_metadata,
    write_record,
)
from rankscope.surgery.shards import Shards
from rankscope.surgery.surgery_result import SurgeryResult
from rankscope.surgery.truncate_layers import Track

# An adapter with one of these means another model than base + update.
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
    """Write W + Σ wᵢ·sᵢ·BᵢAᵢ for every weight W of a checkpoint, rounded once to the dtype it is stored in.

    DoRA layers add wᵢ·(m(W + sBA)/‖W + sBA‖ − W). What an adapter trained whole (biases, heads) takes the base's
    place: W + Σ wᵢ(Wᵢ − W). The checkpoint keeps its shards, its configuration and its tokenizer; an output layer
    tied to an embedding gets a weight of its own where only one of the two changes.

    Args:
        base: checkpoint; of a folder, the files beside the weights are copied.
        adapters: in PEFT's layout.
        out: folder to be made.
        weights: one an adapter; 1 by default.
        device: where the products are formed.
        track: wraps the list of layers and may show progress.
        command: what the record names as the command line.

    Raises:
        RankscopeError: a file that cannot be read, an adapter of another base or of another kind, or ``out`` is taken.
    """
    return _write("merge", base, adapters, out, weights, device, track, command)


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
    """Take adapters off the checkpoint they were merged into; arguments and errors as for ``merge``.

    Rounding W + ΔW lost part of W where the sum is the larger number: ``from_original`` of each layer is the distance
    from W that this is expected to leave, had the sum been rounded once (see ``addition``).

    Raises:
        FormatError: also an adapter that replaced what cannot be brought back: DoRA, biases, modules saved whole.
    """
    return _write("unmerge", merged, adapters, out, weights, device, track, command)


def _write(
    operation: str,
    base: str | os.PathLike[str],
    sources: Sequence[AdapterSource],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None,
    device: torch.device | str,
    track: Track,
    command: str | None,
) -> SurgeryResult:
    if not sources:
        raise ConfigError("give at least one adapter")
    factors = check_weights(weights if weights is not None else [1.0] * len(sources), len(sources))
    place = local_path(base)
    if (place / CONFIG_NAME).is_file():
        raise FormatError(f"{base}: is an adapter, where a base model comes first; --as-adapter adds adapters alone")
    with create_output_folder(out) as folder:
        checkpoint = Checkpoint(place)
        adapters = [_open(source, place, device, operation) for source in sources]
        config = read_model_config(place)
        signs = factors if operation == "merge" else [-factor for factor in factors]
        changes = MergePlan(checkpoint, config, adapters, signs, track)
        if operation == "unmerge" and changes.added:
            raise FormatError(f"{base}: has no {next(iter(changes.added))}, which the adapter would be taken off")
        Shards(place).write(
            folder, changes.replaced_tensors(), changes.added_tensors(), file_metadata(operation, command)
        )
        layers = changes.layers(operation == "unmerge")
        if place.is_dir():
            copy_files(place, folder)
            if len(adapters) == 1:
                copy_tokenizer(adapters[0].store.path, folder)
            if config != changes.config:
                write_json(folder / MODEL_CONFIG, changes.config)
        return write_record(
            folder,
            operation,
            out,
            layers,
            inputs=tuple(adapter.label for adapter in adapters),
            weights=tuple(factors),
            base=str(base),
            command=command,
            choice="exact",
            carried=tuple(dict.fromkeys(key for adapter in adapters for key in adapter.whole)),
            notes=(*(f"{a.label}: {note}" for a in adapters for note in a.store.notes), *changes.notes),
        )


def _open(source: AdapterSource, base: Path, device: torch.device | str, operation: str) -> Adapter:
    adapter = Adapter.open(source, device=device)
    for key, reason in UNMERGEABLE_SETTINGS.items():
        if adapter.config.get(key):
            raise FormatError(f"{adapter.label}: {key} is set ({reason}), which is not merged here; use it with PEFT")
    grouped = [name for name, where in adapter.places.items() if where.groups > 1]
    if grouped:
        raise FormatError(f"{adapter.label}: layer {grouped[0]} is a convolution with groups, which no weight can hold")
    if operation == "unmerge" and (adapter.magnitudes or adapter.whole):
        what = "DoRA rescaled" if adapter.magnitudes else f"{strip_peft_prefix(next(iter(adapter.whole)))} replaced"
        raise FormatError(f"{adapter.label}: {what} a weight of the base, which nothing here holds; keep the base")
    if adapter.magnitudes:
        adapter = Adapter.open(adapter.label, base, device)
        for name in adapter.magnitudes:
            if name + WHOLE_SUFFIX not in adapter.store:
                raise FormatError(f"{base}: has no weight for the DoRA layer {name}; is this the base that was tuned?")
    return adapter
