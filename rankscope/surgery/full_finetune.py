"""A full fine-tuning and its base: which tensors changed, and how PEFT would store their updates."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.abstract_store import Store
from rankscope.formats.checkpoint import CONV1D_NAME, Checkpoint, read_model_config
from rankscope.formats.file_io import TensorFile, TensorInfo
from rankscope.formats.names import WEIGHT_SUFFIX, pair_names
from rankscope.formats.peft_write import FactorLayout
from rankscope.formats.store import open as open_store
from rankscope.formats.streaming import LazyTensor
from rankscope.surgery.addition import in_float64
from rankscope.surgery.tying import HEAD_WEIGHT, has_head

INNER_MODEL_NAMES = {"gpt2": "transformer", "openai-gpt": "transformer", "bloom": "transformer"}
# Last parts of the paths of embeddings, and of linear layers whose names contain one of those.
EMBEDDING_NAMES = re.compile(r"emb|wte|wpe|^shared$|^tokens$|relative_attention_bias", re.IGNORECASE)
LINEAR_NAMES = re.compile(r"head|score|decoder|proj|mapping|classifier|out$", re.IGNORECASE)


@dataclass
class FullFinetune:
    """Full weights and their base, or a file of updates with or without the base.

    Attributes:
        store: the updates.
        infos: shape and dtype of the tuned tensors by name, as far as they are known.
        conv1d: whether GPT-2's projections are stored (in, out); None where that is not known.
        config: the configuration of the model.
        base: the base, if it was given.
    """

    store: Store
    infos: dict[str, TensorInfo]
    conv1d: bool | None
    config: dict[str, Any]
    base: Checkpoint | None
    _tuned: Checkpoint | TensorFile
    _partners: dict[str, str]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        base: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> FullFinetune:
        """Open full weights (``base`` is required) or a file of updates.

        Raises:
            FormatError: the path is neither, the base does not fit, or files cannot be read.
        """
        store = open_store(path, base, device)
        checkpoint = Checkpoint(Path(base).expanduser()) if base is not None else None
        if store.kind == "checkpoint" and checkpoint is not None:
            tuned = Checkpoint(store.path)
            partners = dict(pair_names(tuned.infos, checkpoint.infos).pairs)
            conv1d = tuned.conv1d if tuned.conv1d is not None else checkpoint.conv1d
            return cls(store, dict(tuned.infos), conv1d, read_model_config(store.path), checkpoint, tuned, partners)
        if store.kind != "update":
            raise FormatError(f"{path}: is no full fine-tuning, from which an adapter could be extracted")
        changes = TensorFile(store.path)
        if checkpoint is None:
            return cls(store, {}, None, {}, None, changes, {})
        names = {_parameter_name(name, info): name for name, info in changes.infos.items()}
        partners = dict(pair_names(names, checkpoint.infos).pairs)
        names_by_partner = {theirs: ours for ours, theirs in partners.items()}
        infos = {names_by_partner.get(name, name): info for name, info in checkpoint.infos.items()}
        partners |= {name: name for name in checkpoint.infos if name not in names_by_partner}
        return cls(store, infos, checkpoint.conv1d, read_model_config(checkpoint.path), checkpoint, changes, partners)

    def place(self, layer: str) -> FactorLayout:
        """How PEFT would store the factors of a layer."""
        shape = self._shape(layer)
        if len(shape) > 2:
            return FactorLayout("conv", shape[2:])
        return FactorLayout("embedding") if self.is_embedding(layer) else FactorLayout()

    def _shape(self, layer: str) -> tuple[int, ...]:
        info = self.infos.get(layer + WEIGHT_SUFFIX)
        return info.shape if info else self.store.info(layer).shape

    def is_embedding(self, layer: str) -> bool:
        """Whether a layer is an embedding, judged by its name and shape."""
        last = layer.rpartition(".")[2]
        return bool(EMBEDDING_NAMES.search(last)) and not LINEAR_NAMES.search(last) and len(self._shape(layer)) == 2

    def is_conv1d(self, layer: str) -> bool:
        """Whether the base stores this weight (in, out)."""
        return bool(CONV1D_NAME.search(layer + WEIGHT_SUFFIX)) and self.conv1d is not False

    def row_mismatch(self, layer: str) -> tuple[int, int] | None:
        """(rows of the tuned weight, rows in the base) where they differ."""
        partner = self.base.infos.get(self._partners.get(layer + WEIGHT_SUFFIX, "")) if self.base else None
        if partner is None or layer + WEIGHT_SUFFIX not in self.infos:
            return None
        if not (self.infos[layer + WEIGHT_SUFFIX].shape and partner.shape):
            return None  # a single number has no rows
        rows = self.infos[layer + WEIGHT_SUFFIX].shape[0], partner.shape[0]
        return rows if rows[0] != rows[1] else None

    def skip_reason(self, layer: str) -> str | None:
        """Why a matrix cannot be made low-rank, or None."""
        rows, shape = self.row_mismatch(layer), self._shape(layer)
        if rows:
            return f"{rows[0]} rows, {rows[1]} in the base"
        return (
            "a convolution with one input channel per group"
            if len(shape) > 2 and shape[1] == 1 and shape[0] > 1
            else None
        )

    def model_path(self, module: str) -> str:
        """A module's path in the model of the class that the configuration names, where PEFT looks for it.

        Published GPT-2 and BLOOM lack the name of the inner model in their keys; transformers adds it on loading.
        """
        inner = INNER_MODEL_NAMES.get(str(self.config.get("model_type")))
        named = any(name.startswith(f"{inner}.") for name in self.infos)
        lacks_inner = inner and has_head(self.config) and not named
        return f"{inner}.{module}" if lacks_inner and f"{module}.weight" != HEAD_WEIGHT else module

    def has_changed(self, name: str) -> bool:
        """Whether a tensor differs from the base's, or is not in the base."""
        if isinstance(self._tuned, TensorFile):
            return self._update_key(name) is not None
        if self.base is None or name not in self._partners:
            return True
        ours, theirs = self._tuned.read(name), self.base.read(self._partners[name])
        alike = ours.shape == theirs.shape and ours.is_complex() == theirs.is_complex()
        return not alike or not torch.equal(ours, theirs.to(ours.dtype))

    def lazy_tensor(self, name: str) -> LazyTensor:
        """A tuned tensor, to be copied."""
        return LazyTensor(self.infos[name], lambda: self._read(name))

    def _read(self, name: str) -> Tensor:
        if self.base is None or not isinstance(self._tuned, TensorFile):
            return self._tuned.read(name).to(self.infos[name].dtype)
        stored, key = self.base.read(self._partners[name]), self._update_key(name)
        if key is None:
            return stored
        # Weights that Conv1D stores transposed become low-rank, so none of them is read here.
        return (in_float64(stored) + in_float64(self._tuned.read(key)).reshape(stored.shape)).to(stored.dtype)

    def _update_key(self, name: str) -> str | None:
        """The key of a parameter's update in a file of updates; None where it has none."""
        infos = self._tuned.infos
        return next((key for key in (name, name.removesuffix(WEIGHT_SUFFIX)) if key in infos), None)


def _parameter_name(name: str, info: TensorInfo) -> str:
    """The name of the parameter that an entry of a file of updates changes: a matrix has its module's path as key."""
    return name + WEIGHT_SUFFIX if len(info.shape) > 1 and not name.endswith(WEIGHT_SUFFIX) else name
