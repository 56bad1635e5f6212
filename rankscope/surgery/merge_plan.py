"""What adapters change in a checkpoint, tensor by tensor: planned from the headers, computed when it is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankscope.errors import FormatError, ShapeError, prefix_errors
from rankscope.formats.abstract_store import examples
from rankscope.formats.checkpoint import CONV1D_NAME, Checkpoint, non_matrix_reason
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.names import WEIGHT_SUFFIX, Pairing, natural_key, pair_names
from rankscope.formats.peft_folder import model_tensor_name
from rankscope.formats.peft_lora import WHOLE_SUFFIX
from rankscope.formats.streaming import LazyTensor
from rankscope.surgery.adapter import Adapter
from rankscope.surgery.addition import Rounding, add_and_round, in_float64
from rankscope.surgery.surgery_result import LayerChange, error_over_norm
from rankscope.surgery.tying import HEAD_WEIGHT, TIED_EMBEDDING, find_tied_embedding, has_head, is_tied, untie_config
from rankscope.track import Track
from rankscope.updates import Update, check_finite

# PEFT saves the base's own weight under this name beside the factors of embeddings and heads.
BASE_LAYER_SUFFIX = ".base_layer.weight"


class _Contribution(NamedTuple):
    """What one adapter adds, times ``weight``: the update of a layer or a tensor of its file, which ``key`` names."""

    adapter: Adapter
    key: str
    weight: float


@dataclass
class _TensorChange:
    """How one tensor of the output is made.

    Attributes:
        stored: its name in the checkpoint; None for a new tensor.
        layer: the layer of the adapters whose updates are added, if there are any.
        kind: "linear", "embedding" or "conv".
        shape: (out, in) of the updates.
        transposed: whether the tensor is stored (in, out).
        updates: layers whose updates are added.
        whole: tensors that replace the stored one.
        biases: layers whose ``lora_B.bias``, (out,), is added.
    """

    stored: str | None
    layer: str | None = None
    kind: str = "linear"
    shape: tuple[int, int] = (0, 0)
    transposed: bool = False
    updates: list[_Contribution] = field(default_factory=list)
    whole: list[_Contribution] = field(default_factory=list)
    biases: list[_Contribution] = field(default_factory=list)


class MergePlan:
    """The plan for one checkpoint and the adapters that are added to it, each with its weight.

    Attributes:
        config: the configuration that fits the output.
        changed: the changes of tensors of the checkpoint, by their name in it.
        added: the changes that make tensors which the checkpoint does not have.
        notes: remarks for the record.

    Raises:
        FormatError: an adapter is of another base, or no weight can hold what it changes.
        ShapeError: two adapters differ in the shape of a layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any],
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        track: Track,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = dict(config)
        self.notes: list[str] = []
        self.changed: dict[str, _TensorChange] = {}
        self.added: dict[str, _TensorChange] = {}
        self._rounding: dict[str, Rounding] = {}
        names = {name + WEIGHT_SUFFIX for adapter in adapters for name in adapter.places}
        names |= {model_tensor_name(key) for adapter in adapters for key in adapter.whole}
        names |= {f"{name}.bias" for adapter in adapters for name in adapter.factor_biases}
        self._pairing = pair_names(names, checkpoint.infos)
        self._stored_names = dict(self._pairing.pairs)
        for adapter, weight in zip(adapters, weights, strict=True):
            with prefix_errors(adapter.label):
                self._add(adapter, weight)
        self._note_doras(adapters)
        self._untie_head(all(adapter.config.get("ensure_weight_tying") for adapter in adapters))
        self._update_vocabulary_size()
        changes = [*self.changed.values(), *self.added.values()]
        self._progress = iter(track([change for change in changes if change.updates]))

    def _note_doras(self, adapters: Sequence[Adapter]) -> None:
        """DoRA's update depends on the weight that it is merged into, so the order of several would count."""
        doras = [adapter for adapter in adapters if adapter.config.get("use_dora")]
        if doras and len(adapters) > 1:
            self.notes.append(
                f"{len(doras)} of {len(adapters)} adapters are DoRA: what each makes of the base is added, in any "
                "order; PEFT's merge_and_unload merges one into the result of the others, and its weights differ"
            )

    def _add(self, adapter: Adapter, weight: float) -> None:
        """Plan all that one adapter changes."""
        missing = [name for name in adapter.places if name + WEIGHT_SUFFIX not in {*self._stored_names, HEAD_WEIGHT}]
        if missing:
            raise FormatError(
                f"{self.checkpoint.path} has no weight for {len(missing)} of its {len(adapter.places)} layers "
                f"({examples(missing)}); is this the base that was tuned?"
            )
        for key in adapter.whole:
            self._add_whole_tensor(adapter, key, weight)
        for name in adapter.names():
            self._add_update(adapter, name, weight)
        for name in adapter.factor_biases:
            self._add_factor_bias(adapter, name, weight)

    def _add_factor_bias(self, adapter: Adapter, name: str, weight: float) -> None:
        if f"{name}.bias" not in self._stored_names:
            raise FormatError(f"{self.checkpoint.path} has no bias for {name}, which the adapter changes")
        change = self._change_of(f"{name}.bias")
        change.biases.append(_Contribution(adapter, name, weight))
        info, shape = self._info(change), (adapter.info(name).shape[0],)
        if info.shape != shape or not info.dtype.is_floating_point:
            raise FormatError(
                f"{self.checkpoint.path}: {name}.bias is {_describe_tensor(info)}, where the adapter changes "
                f"{shape} floating-point numbers; is this the base that was tuned?"
            )

    def _change_of(self, tensor: str) -> _TensorChange:
        """The change of a tensor by its name in the adapters."""
        if tensor in self._stored_names:
            stored = self._stored_names[tensor]
            return self.changed.setdefault(stored, _TensorChange(stored))
        return self.added.setdefault(_checkpoint_name(tensor, self._pairing), _TensorChange(None))

    def _add_update(self, adapter: Adapter, name: str, weight: float) -> None:
        shape, change = adapter.info(name).shape, self._change_of(name + WEIGHT_SUFFIX)
        if change.layer is not None and change.shape != shape:
            raise ShapeError(f"layer {name} is {shape} here and {change.shape} in another adapter")
        change.layer, change.shape, change.kind = name, shape, adapter.places[name].kind
        change.updates.append(_Contribution(adapter, name, weight))
        if change.stored is None and not change.whole:  # an output layer that is its embedding
            with prefix_errors(self.checkpoint.path):
                change.stored = find_tied_embedding(self.checkpoint.infos, shape)
        if change.whole and len(self._info(change).shape) < 2:
            raise FormatError(f"{name}{WEIGHT_SUFFIX} is {self._info(change).shape}, to which no update can be added")
        if change.stored is not None and not change.whole:
            change.transposed = self._is_transposed(
                change.stored, name, shape, bool(adapter.config.get("fan_in_fan_out"))
            )

    def _is_transposed(self, stored: str, name: str, shape: tuple[int, int], fan_in_fan_out: bool) -> bool:
        """Whether the checkpoint stores a weight (in, out) whose update has ``shape`` (out, in)."""
        info = self.checkpoint.infos[stored]
        reason = non_matrix_reason(info, stacks=True)
        matrix = (info.shape[0], math.prod(info.shape[1:])) if info.shape else (1, 1)
        if reason or matrix not in (shape, shape[::-1]):
            raise FormatError(
                f"{self.checkpoint.path}: {stored} is {reason or f'{matrix[0]} × {matrix[1]}'}, but the update of "
                f"{name} is {shape[0]} × {shape[1]}; is this the base that was tuned?"
            )
        if matrix[0] != matrix[1] or not CONV1D_NAME.search(stored):
            return matrix != shape
        conv1d = self.checkpoint.conv1d
        return fan_in_fan_out if conv1d is None else conv1d

    def _add_whole_tensor(self, adapter: Adapter, key: str, weight: float) -> None:
        # The file may have the tensor under the name that it has in a live PEFT model.
        tensor, stored_key = model_tensor_name(key), adapter.whole[key]
        saved = adapter.config.get("modules_to_save") or []
        if tensor == HEAD_WEIGHT and tensor not in self._stored_names and key.endswith(BASE_LAYER_SUFFIX):
            if self._is_embedding(adapter.file.read(stored_key)):
                return
        elif tensor not in self._stored_names and not any(f".{name}." in f".{tensor}" for name in saved):
            raise FormatError(f"{self.checkpoint.path} has no {tensor}, which the adapter replaces")
        change = self._change_of(tensor)
        self._check_fits(tensor, change, adapter.file.infos[stored_key])
        change.whole.append(_Contribution(adapter, stored_key, weight))
        shapes = {part.adapter.file.infos[part.key].shape for part in change.whole}
        if change.stored is not None:
            shapes.add(self.checkpoint.infos[change.stored].shape)
        if (len(change.whole) > 1 or weight != 1) and (change.stored is None or len(shapes) > 1):
            raise FormatError(
                f"{tensor} is new or of another size than the base's, so only one adapter can give it; "
                "merge that adapter alone"
            )

    def _check_fits(self, tensor: str, change: _TensorChange, info: TensorInfo) -> None:
        """Raise FormatError where a tensor cannot replace the base's: only sizes may differ."""
        if change.stored is None:
            if tensor == HEAD_WEIGHT and len(info.shape) != 2:
                raise FormatError(f"{tensor} is {info.shape}, no weight of an output layer")
            return
        stored = self.checkpoint.infos[change.stored]
        if len(stored.shape) != len(info.shape) or stored.dtype.is_complex != info.dtype.is_complex:
            raise FormatError(
                f"{tensor} is {_describe_tensor(info)}, which cannot replace {_describe_tensor(stored)} of "
                f"{self.checkpoint.path}; is this the base that was tuned?"
            )

    def _is_embedding(self, weight: Tensor) -> bool:
        """Whether a weight (vocabulary, dim) equals that of the embedding which the output layer is tied to."""
        infos, shape = self.checkpoint.infos, tuple(weight.shape)
        tied = [name for name, info in infos.items() if TIED_EMBEDDING.search(name) and tuple(info.shape) == shape]
        return len(tied) == 1 and torch.equal(weight, self.checkpoint.read(tied[0]).to(weight.dtype))

    def _untie_head(self, adapters_tie: bool) -> None:
        """Give an output layer that is tied to its embedding a weight of its own, where the two now differ."""
        infos = self.checkpoint.infos
        moved = [name for name in self.changed if TIED_EMBEDDING.search(name)]
        tied = is_tied(self.config, infos)
        if moved and HEAD_WEIGHT not in infos and HEAD_WEIGHT not in self.added and not adapters_tie:
            if tied and has_head(self.config):
                self.added[HEAD_WEIGHT] = _TensorChange(moved[0])
            elif tied or not self.config:
                self.notes.append(f"an output layer that is tied to {moved[0]} changes with it")
        if (
            self.config
            and tied
            and (HEAD_WEIGHT in self.added or (HEAD_WEIGHT in infos and (moved or HEAD_WEIGHT in self.changed)))
        ):
            self.config = untie_config(self.config)
            self.notes.append(f"the output layer, which was the embedding, has a weight of its own now ({HEAD_WEIGHT})")

    def _update_vocabulary_size(self) -> None:
        """Follow an embedding that has more rows than the base's."""
        for name, change in self.changed.items():
            before, after = self.checkpoint.infos[name].shape, self._info(change).shape
            if before != after and TIED_EMBEDDING.search(name) and self.config.get("vocab_size") == before[0]:
                self.config["vocab_size"] = after[0]
                self.notes.append(f"{name} has {after[0]} rows, {before[0]} in the base; vocab_size says so now")

    def _info(self, change: _TensorChange) -> TensorInfo:
        """Shape and dtype of the result: those of the checkpoint, except the shape of a tensor that is replaced."""
        whole = [part.adapter.file.infos[part.key] for part in change.whole]
        if change.stored is None:
            return whole[0]
        stored = self.checkpoint.infos[change.stored]
        return TensorInfo(whole[0].shape, stored.dtype) if whole else stored

    def replacement_tensors(self) -> dict[str, LazyTensor]:
        """The tensors that replace those of the checkpoint, by name."""
        changed = {name: self._lazy_tensor(name, change) for name, change in self.changed.items()}
        names = [name for name in self.checkpoint.quantized if name not in changed]
        return changed | {name: self._dequantized_tensor(name) for name in names}

    def _dequantized_tensor(self, name: str) -> LazyTensor:
        info = self.checkpoint.infos[name]
        return LazyTensor(info, lambda: self.checkpoint.read(name).to(info.dtype))

    def new_tensors(self) -> dict[str, LazyTensor]:
        """The tensors that the checkpoint does not have, by name."""
        return {name: self._lazy_tensor(name, change) for name, change in self.added.items()}

    def _lazy_tensor(self, name: str, change: _TensorChange) -> LazyTensor:
        info = self._info(change)
        return LazyTensor(info, lambda: self._build_tensor(name, change, info))

    def _build_tensor(self, name: str, change: _TensorChange, info: TensorInfo) -> Tensor:
        start = self._read_start(change)
        if change.biases:
            parts = [part.adapter.factor_bias(part.key).double() * part.weight for part in change.biases]
            start = in_float64(start) + reduce(torch.add, parts)
        if not change.updates:
            result = start.to(info.dtype)
            if change.biases or len(change.whole) > 1 or any(part.weight != 1 for part in change.whole):
                check_finite(result, f"the sum in {str(info.dtype).removeprefix('torch.')}")
            return result
        next(self._progress, None)
        flat = start.reshape(start.shape[0], -1).to(change.updates[0].adapter.store.device)
        result, self._rounding[name] = add_and_round(
            flat, [_read_update(part, change.transposed) for part in change.updates], info.dtype
        )
        return result.reshape(info.shape)

    def _read_start(self, change: _TensorChange) -> Tensor:
        """The tensor W of the checkpoint, or what replaces it: W + Σ w(Wᵢ − W)."""
        parts = [(part.adapter.file.read(part.key), part.weight) for part in change.whole]
        if len(parts) == 1 and parts[0][1] == 1:
            return parts[0][0]
        if change.stored is None:
            raise FormatError("is new to the checkpoint, so there is no weight that it could be added to")
        stored = self.checkpoint.read(change.stored)
        if not parts:
            return stored
        exact = in_float64(stored)
        return exact + sum((weight * (in_float64(tensor) - exact) for tensor, weight in parts), torch.zeros_like(exact))

    def layers(self, unmerged: bool) -> tuple[LayerChange, ...]:
        """The record of each layer; to be called after everything was written."""
        for _ in self._progress:
            pass
        changes = {name: change for name, change in (self.changed | self.added).items() if change.layer is not None}
        layers = [_layer_change(change, self._rounding[name], unmerged) for name, change in changes.items()]
        return tuple(sorted(layers, key=lambda layer: natural_key(layer.name)))


def _checkpoint_name(tensor: str, pairing: Pairing) -> str:
    """A new tensor's name in a checkpoint whose names have another prefix than the adapter's."""
    for ours, theirs in pairing.pairs:
        if ours != theirs:
            if ours.endswith(theirs):
                return tensor.removeprefix(ours.removesuffix(theirs))
            return theirs.removesuffix(ours) + tensor
    return tensor


def _describe_tensor(info: TensorInfo) -> str:
    return f"{info.shape} of {str(info.dtype).removeprefix('torch.')}"


def _read_update(part: _Contribution, transposed: bool) -> Update:
    """The update of a layer times its weight: (out, in), or (in, out) if ``transposed``."""
    store, name = part.adapter.store, part.key
    update = store[name + WHOLE_SUFFIX] if name in part.adapter.magnitudes else store[name]
    update = update * part.weight if part.weight != 1 else update
    return update.T if transposed else update


def _layer_change(change: _TensorChange, rounding: Rounding, unmerged: bool) -> LayerChange:
    holders = [part.adapter for part in change.updates]
    layer = change.layer or ""
    return LayerChange(
        name=layer,
        kind=change.kind,
        shape=change.shape,
        rank_before=sum(adapter.info(layer).nominal_rank or 0 for adapter in holders),
        rank_after=None,
        parameters_before=sum(adapter.parameters(layer) for adapter in holders),
        parameters_after=math.prod(change.shape),
        norm=rounding.norm,
        retained=1.0,
        error=rounding.error,
        relative_error=error_over_norm(rounding.error, rounding.norm),
        from_original=rounding.left if unmerged else None,
    )
