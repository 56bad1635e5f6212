"""Factors as microsoft/LoRA's loralib saves them: parameters ``lora_A`` and ``lora_B`` without ``.weight``, no α.

A linear layer has A (r, in), B (out, r). ``MergedLinear`` packs n of the parts of a fused projection (q, k, v): A
(r·n, in), B (rows·n, r), part i being B's i-th block of rows times A's i-th block. Each part is read as
an update of its own, ``NAME:q`` … where all three are there, else ``NAME:0`` …, since the file does not name them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from torch import Tensor

from rankscope.formats.adapter_file import EMBEDDING_NAME, FileLayer, FileStore, NoAlphaError, ParsedFileKey
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.lycoris import LOCON, lycoris_recipe
from rankscope.formats.names import QKV_PARTS
from rankscope.formats.recipes import Recipe, Tensors
from rankscope.updates import Update

_LEAVES = {"lora_A": LOCON.b, "lora_B": LOCON.a}


def is_loralib(keys: Iterable[str]) -> bool:
    """Whether keys are those of loralib."""
    return any(key.rpartition(".")[2] in _LEAVES for key in keys)


class LoralibStore(FileStore):
    """An adapter that loralib's layers saved (``lora_state_dict``).

    Raises:
        NoAlphaError: no α was given.
    """

    kind: ClassVar[str] = "loralib"

    def _parse(self, key: str) -> ParsedFileKey | None:
        module, _, name = key.rpartition(".")
        return ParsedFileKey(module or "model", _LEAVES[name]) if name in _LEAVES else None

    def _add(self, module: str, keys: Mapping[str, str]) -> None:
        if self._alpha is None:
            raise NoAlphaError("holds LoRA's factors, but not their α, which decides the scale; give it (--alpha)")
        packed = _packed_count(keys, self.file.infos)
        if packed < 2:
            super()._add(module, keys)
            return
        A, B = (self.file.infos[keys[leaf]] for leaf in (LOCON.b, LOCON.a))
        whole = TensorInfo((A.shape[0] // packed, *A.shape[1:]), A.dtype)
        block = TensorInfo((B.shape[0] // packed, *B.shape[1:]), B.dtype)
        for i, name in enumerate(QKV_PARTS if packed == len(QKV_PARTS) else map(str, range(packed))):
            self._add_block(f"{module}:{name}", keys, {LOCON.b: whole, LOCON.a: block}, i)

    def _add_block(self, name: str, keys: Mapping[str, str], parts: Mapping[str, TensorInfo], i: int) -> None:
        recipe = lycoris_recipe(parts, self._alpha)

        def build(tensors: Tensors) -> Update:
            return recipe.build({leaf: _block(tensors[leaf], info.shape[0], i) for leaf, info in parts.items()})

        self.given += 1
        self._put(name, FileLayer(keys, self._alpha, Recipe(recipe.info, recipe.reads, build), ()))

    def _note_oddities(self) -> None:
        if unnamed := [name for name in self.layers if name.endswith(":0")]:
            self.notes.append(
                f"{len(unnamed)} fused layers (first {unnamed[0].removesuffix(':0')}) have factors for some of q, k "
                "and v; the file does not say which (the examples of loralib adapt q and v)"
            )
        embeddings = [name for name in self.layers if EMBEDDING_NAME.search(name)]
        for name in embeddings:
            self._read_as_embedding(name)
        if embeddings:
            self.notes.append(
                f"{', '.join(embeddings)}: by the name an embedding, whose update is the transposed product"
            )


def _packed_count(keys: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> int:
    """n of a ``MergedLinear``, 1 for any other layer."""
    shapes = [infos[keys[leaf]].shape for leaf in (LOCON.b, LOCON.a) if leaf in keys]
    if len(shapes) < 2 or any(len(shape) != 2 or 0 in shape for shape in shapes):
        return 1
    (rn, _), (rows, r) = shapes
    return rn // r if rn % r == 0 and rows % (rn // r) == 0 else 1


def _block(tensor: Tensor, rows: int, i: int) -> Tensor:
    return tensor[i * rows : (i + 1) * rows]
