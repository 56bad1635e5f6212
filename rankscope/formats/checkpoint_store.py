"""Updates of full fine-tuning: a tuned checkpoint minus its base, or the differences themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rankscope.errors import FormatError, ShapeError
from rankscope.formats.abstract_store import Store, StoredTensors, UpdateInfo, examples
from rankscope.formats.checkpoint import BaseWeights, Checkpoint, non_matrix_reason
from rankscope.formats.file_io import TensorFile, write_tensors
from rankscope.formats.names import module_names, pair_names
from rankscope.formats.pickle_file import PickledFile
from rankscope.updates import Dense, block_rows

VOCABULARY_LAYERS = re.compile(r"embed|wte|wpe|lm_head|shared", re.IGNORECASE)
FORMAT_TAG = {"rankscope": "update"}  # metadata of a file of updates


class CheckpointStore(Store):
    """A tuned checkpoint minus its base; one pair of tensors in memory at a time.

    Matrices and flattened convolution kernels are updates; the rest is listed in ``skipped``.

    Raises:
        FormatError: a checkpoint cannot be read, or the two have no weight in common.
    """

    kind = "checkpoint"

    def __init__(self, path: Path, base: Path, device: torch.device | str = "cpu") -> None:
        super().__init__(path, device)
        self._tuned, self._base = tuned, origin = Checkpoint(path), Checkpoint(base)
        for checkpoint in (tuned, origin):
            checkpoint.check_readable()
            self.notes += [checkpoint.quantization_note] if checkpoint.quantization_note else []
        if tuned.conv1d is None or origin.conv1d is None:  # both have one layout, which one may show alone
            tuned.conv1d = origin.conv1d = tuned.conv1d if tuned.conv1d is not None else origin.conv1d
        self._pairs: dict[str, tuple[str, str]] = {}
        pairing = pair_names(tuned.infos, origin.infos)
        if not pairing.pairs:
            raise FormatError(
                f"{path}: shares no weight with the base {base}; it has {examples(pairing.only_a)}, "
                f"the base has {examples(pairing.only_b)}"
            )
        modules = module_names(tuned.infos)
        for ours, theirs in pairing.pairs:
            self._add(modules[ours], ours, theirs)
        for name in pairing.only_a:
            self._skip(name, f"not in the base {base}")
        for name in pairing.only_b:
            self._skip(name, "only in the base")
        if not self._infos:
            raise FormatError(
                f"{path}: shares no matrix with the base {base}; {self.skipped[0].name}: {self.skipped[0].reason}"
            )

    def _add(self, module: str, ours: str, theirs: str) -> None:
        info = self._tuned.infos[ours]
        reason = non_matrix_reason(info) or non_matrix_reason(self._base.infos[theirs])
        if reason:
            self._skip(ours, reason)
            return
        shape, other = self._tuned.matrix_shape(ours), self._base.matrix_shape(theirs)
        if shape != other:
            if shape[1] != other[1] or not VOCABULARY_LAYERS.search(ours):
                self._skip(ours, f"its shape is {shape}, that in the base {other}")
                return
            common = min(shape[0], other[0])
            self.notes.append(f"{module}: {shape[0]} rows, {other[0]} in the base; the first {common} are compared")
            shape = (common, shape[1])
        self._pairs[module] = (ours, theirs)
        self._infos[module] = UpdateInfo(shape, None, 1.0, info.dtype, "full")

    def stored_tensors(self) -> StoredTensors:
        return StoredTensors(self._tuned.infos, self._tuned.paths)

    def _read(self, name: str) -> Dense:
        ours, theirs = self._pairs[name]
        update = self._subtract(name)
        schemes = [part.quantized[key].scheme if key in part.quantized else None for part, key in self._sides(name)]
        if schemes == [None, None]:
            return update
        # A base in the format of the tuned weight is exactly what was tuned; one in another format was rounded to it.
        base = self._base.rounding(theirs) if schemes[0] != schemes[1] else 0.0
        return replace(update, rounding=math.hypot(update.rounding, self._tuned.rounding(ours), base))

    def _sides(self, name: str) -> tuple[tuple[Checkpoint, str], tuple[Checkpoint, str]]:
        ours, theirs = self._pairs[name]
        return (self._tuned, ours), (self._base, theirs)

    def _subtract(self, name: str) -> Dense:
        ours, theirs = self._pairs[name]
        shape, transposed = self._infos[name].shape, self._tuned.is_transposed(ours)
        if transposed != self._base.is_transposed(theirs) or (transposed and shape != self._tuned.matrix_shape(ours)):
            tuned, base = self._tuned.matrix(ours)[: shape[0]], self._base.matrix(theirs)[: shape[0]]
            return Dense.difference(tuned.to(self.device), base.to(self.device))
        stored = shape[::-1] if transposed else shape
        step = block_rows(stored[1])
        parts = zip(
            self._tuned.read_blocks(ours, stored[0], step), self._base.read_blocks(theirs, stored[0], step), strict=True
        )
        update = Dense.from_blocks(parts, stored, self.device)
        return update.T if transposed else update

    def _read_weight(self, name: str) -> Tensor:
        return self._base.matrix(self._pairs[name][1])[: self._infos[name].shape[0]]


class UpdateStore(Store):
    """The float32 updates that ``write_updates`` wrote.

    ``base``, where given, is used for ``weight(name)`` only.

    Raises:
        FormatError: ``write_updates`` did not write the file, or it holds no matrix.
    """

    kind = "update"

    def __init__(self, path: Path, base: Path | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__(path, device)
        self._file = TensorFile(path)
        if not is_updates(self._file):
            raise FormatError(f"{path}: is not a file of updates written by rankscope; its metadata lacks {FORMAT_TAG}")
        for name, info in self._file.infos.items():
            reason = non_matrix_reason(info) if len(info.shape) < 3 else f"{len(info.shape)}-dimensional"
            if reason:
                self._skip(name, reason)
            else:
                self._infos[name] = UpdateInfo((info.shape[0], info.shape[1]), None, 1.0, info.dtype, "update")
        if not self._infos:
            raise FormatError(f"{path}: holds no update; an update is a matrix of floating-point numbers")
        shapes = {name: info.shape for name, info in self._infos.items()}
        self._weights = BaseWeights(base, shapes) if base is not None else None
        self.notes += self._weights.notes if self._weights else []

    def stored_tensors(self) -> StoredTensors:
        return StoredTensors(self._file.infos, (self._file.path,))

    def _read(self, name: str) -> Dense:
        return Dense(self._file.read_rows(name, 0, self._infos[name].shape[0]).to(self.device))

    def _read_weight(self, name: str) -> Tensor | None:
        return self._weights.matrix(name) if self._weights else None


def write_updates(path: Path, updates: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write float32 updates, module path → matrix (out, in), to a safetensors file, atomically.

    Changes that are no matrix (of biases, of norms) are written under their parameter's name; a reader skips them.

    Raises:
        ShapeError: an update is not of floating-point numbers.
        FormatError: the file cannot be written.
    """
    for name, update in updates.items():
        if not update.is_floating_point():
            raise ShapeError(f"{name}: an update holds floating-point numbers, not {update.dtype}")
    tensors = {name: update.detach().float() for name, update in updates.items()}
    write_tensors(path, tensors, {**(metadata or {}), **FORMAT_TAG})


def is_updates(file: TensorFile | PickledFile) -> bool:
    """Whether a file was written by ``write_updates``."""
    return FORMAT_TAG.items() <= file.metadata.items()
