"""Adapters that are one file: each key is mapped to a module and to one of LyCORIS's parts of an update.

The tools differ in how a key names module and part, and in where α is stored (``kohya.py``, ``diffusers.py``,
``loralib.py``); ``FileStore`` does the rest.
"""

from __future__ import annotations

import json
import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from rankscope.errors import FormatError, prefix_errors
from rankscope.formats.abstract_store import Store, StoredTensors, UpdateInfo
from rankscope.formats.checkpoint import BaseWeights
from rankscope.formats.file_io import TensorFile
from rankscope.formats.lycoris import (
    ALPHA_LEAF,
    FULL,
    LOCON,
    MAGNITUDE_LEAF,
    UNSUPPORTED_LEAVES,
    lycoris_dora_update,
    lycoris_recipe,
)
from rankscope.formats.names import natural_key, strip_wrappers
from rankscope.formats.peft_write import FactorLayout
from rankscope.formats.pickle_file import PickledFile
from rankscope.formats.recipes import Recipe
from rankscope.updates import Update

WHOLE_SUFFIX = ":whole"
# Metadata in which trainers write LoRA's α, where no tensor has it.
ALPHA_TAGS = ("ss_network_alpha", "lora_alpha", "network_alpha", "alpha")
CONV_ALPHA_TAG, NETWORK_ARGS_TAG = "conv_alpha", "ss_network_args"
MODULE_KEY = "ss_network_module"  # where kohya's scripts name the script that trained
# Metadata in which kohya's scripts and model hubs name the base model, the most specific first.
BASE_TAGS = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
# Where the factors of an embedding have shapes like a linear layer's, only the name shows what they are.
EMBEDDING_NAME = re.compile(r"(?:^|\.)(?:wte|wpe|shared|\w*embed\w*)$", re.IGNORECASE)
FACTOR_BIAS_PART = "bias of B"  # the name that a parser gives to the bias of B
# Why a key that names no part of an update is skipped: the reason of the first pattern that matches it.
SKIP_REASONS = (
    (
        re.compile(r"^(?:bundle_)?emb"),
        "an embedding bundled with the adapter (textual inversion), no change of a weight",
    ),
    (re.compile(r"lora_embedding_[AB]"), "factors of an embedding, which are read in PEFT's layout only"),
    (
        re.compile(r"\.processor\.proj_lora\."),
        "XLabs applies it to the output of linear2, so it changes no weight by a fixed amount",
    ),
    (re.compile(r"\.bias$"), "a bias: one-dimensional, no spectrum"),
    (re.compile(r"\.weight$"), "a full weight, no low-rank update"),
)


class NoAlphaError(FormatError):
    """Factors without their α, which the caller has to give."""


class ParsedFileKey(NamedTuple):
    """What a key says: the module as the file calls it, and the part by LyCORIS's name (``lycoris.LEAVES``)."""

    module: str
    leaf: str


@dataclass(frozen=True)
class FileLayer:
    """One module: ``keys`` in the file by part, α (None where neither the file nor the caller gives one), and the
    recipe of its update. ``kernel`` is that of a convolution, () of any other layer."""

    keys: Mapping[str, str]
    alpha: float | None
    recipe: Recipe
    kernel: tuple[int, ...]
    embedding: bool = False

    @property
    def place(self) -> FactorLayout:
        """How PEFT stores such factors."""
        return (
            FactorLayout("embedding")
            if self.embedding
            else FactorLayout("conv", self.kernel)
            if self.kernel
            else FactorLayout()
        )

    @property
    def magnitude(self) -> str | None:
        """Key of DoRA's magnitude."""
        return self.keys.get(MAGNITUDE_LEAF)

    @property
    def rank(self) -> int | None:
        """r of a product of two factors; None for any other update."""
        return self.recipe.info.nominal_rank if set(self.recipe.reads) <= set(LOCON[:4]) else None


class FileStore(Store):
    """The updates of one adapter in one file.

    Args:
        path: what was opened.
        file: the tensors.
        base: the base model's checkpoint; needed for DoRA's whole updates and ``weight(name)``.
        device: where updates are put.
        alpha: α of layers that the file gives none for.

    ``layers``: the layer behind each name. ``given``: how many layers use ``alpha``, since the file has none for them.

    Raises:
        FormatError: a damaged file, a pair with one half, factors that do not multiply, or no layer that can be read.
    """

    kind: ClassVar[str] = "adapter file"

    def __init__(
        self,
        path: Path,
        file: TensorFile | PickledFile,
        base: Path | None = None,
        device: torch.device | str = "cpu",
        alpha: float | None = None,
    ) -> None:
        super().__init__(path, device)
        self.file = file
        self.layers: dict[str, FileLayer] = {}
        self.given = 0
        self._has_alphas: bool | None = None
        self._alpha = alpha
        self._weights: BaseWeights | None = None
        for module, keys in self._gather().items():
            with prefix_errors(f"{file.path}: layer {module}"):
                self._add(module, keys)
        if not self._infos:
            seen = f"; skipped {self.skipped[0].name}: {self.skipped[0].reason}" if self.skipped else ""
            raise FormatError(f"{file.path}: holds no layer that can be read{seen}")
        if self.given:
            self.notes.append(f"α = {alpha:g}, as given, in {self.given} of {len(self.layers)} layers")
        found = self._metadata_alpha()
        if found is not None and any(layer.alpha == found for layer in self.layers.values()):
            self.notes.append(
                f"α = {found:g} from the file's metadata, since no tensor has it; tools that read tensors alone take "
                "α = r and see another scale"
            )
        self._note_oddities()
        # A part of a fused layer ("NAME:q") has only some rows of its weight.
        shapes = {name: self._infos[name].shape for name in self.layers if ":" not in name}
        if base is not None and shapes:
            self._weights = BaseWeights(base, shapes)
        self._add_wholes()

    def stored_tensors(self) -> StoredTensors:
        return StoredTensors(self.file.infos, (self.file.path,))

    def layer_alpha(self, name: str) -> float | None:
        return self.layers[name].alpha if name in self.layers else None

    def base_name(self) -> str | None:
        return next((name for tag in BASE_TAGS if (name := self.file.metadata.get(tag))), None)

    def training_script(self) -> str | None:
        return self.file.metadata.get(MODULE_KEY)

    @abstractmethod
    def _parse(self, key: str) -> ParsedFileKey | None:
        """What a key says; None where it is no part of an update."""

    def _scale_alpha(self, module: str, rank: int | None, kernel: tuple[int, ...]) -> float | None:
        """α of a layer that has no tensor of its own for it; None makes the scale 1."""
        return None

    def _metadata_alpha(self, kernel: tuple[int, ...] = ()) -> float | None:
        """α from the file's metadata, where no tensor of the file is one; None where there is none."""
        if self._has_alphas is None:
            parts = (self._parse(strip_wrappers(key)) for key in self.file.infos)
            self._has_alphas = any(part is not None and part.leaf == ALPHA_LEAF for part in parts)
        return None if self._has_alphas else metadata_alpha(self.file.metadata, kernel)

    def _gather(self) -> dict[str, dict[str, str]]:
        """Keys by module and part; every other key goes to ``skipped``."""
        modules: dict[str, dict[str, str]] = {}
        for key in sorted(self.file.infos, key=natural_key):
            part = self._parse(strip_wrappers(key))
            reason = _reason(key) if part is None else UNSUPPORTED_LEAVES.get(part.leaf)
            if part is None or reason is not None:
                self._skip(key, reason or "unknown key")
            elif part.leaf == FACTOR_BIAS_PART:
                self._skip(key, "lora_bias: the bias of B changes the layer's bias, not its weight")
            elif modules.setdefault(part.module, {}).setdefault(part.leaf, key) != key:
                other = modules[part.module][part.leaf]
                raise FormatError(f"{self.file.path}: {part.module} has {part.leaf} twice, as {other} and {key}")
        return modules

    def _add(self, module: str, keys: Mapping[str, str]) -> None:
        parts = {leaf: self.file.infos[key] for leaf, key in keys.items()}
        if not set(parts) - {ALPHA_LEAF, MAGNITUDE_LEAF}:
            for key in keys.values():
                self._skip(key, "no factors are beside it")
            return
        if FULL.whole in parts and len(parts[FULL.whole].shape) < 2:
            self._skip(keys[FULL.whole], "a change of a vector: one-dimensional, no spectrum")
            return
        rank = next((info.shape[0] for leaf, info in parts.items() if leaf == LOCON.b and info.shape), None)
        kernels = [parts[leaf].shape[2:] for leaf in (LOCON.core, LOCON.b) if leaf in parts]
        kernel = kernels[0] if kernels else ()
        alpha = self._read_alpha(keys[ALPHA_LEAF]) if ALPHA_LEAF in keys else self._scale_alpha(module, rank, kernel)
        if alpha is None and self._alpha is not None:
            alpha = self._alpha
            self.given += 1
        recipe = lycoris_recipe(parts, alpha)
        self._put(module, FileLayer(keys, alpha, recipe, kernel))

    def _put(self, name: str, layer: FileLayer) -> None:
        info = layer.recipe.info
        if layer.magnitude is not None:
            if not self.file.infos[layer.magnitude].dtype.is_floating_point:
                raise FormatError(f"{layer.magnitude} is no floating-point tensor")
            info = replace(info, method="dora-product")
        self.layers[name], self._infos[name] = layer, info

    def _read_as_embedding(self, name: str) -> None:
        """Read a layer as an embedding: the (vocabulary, dim) weight changes by (BA)ᵀ."""
        layer = self.layers[name]
        out, into = layer.recipe.info.shape
        info = replace(layer.recipe.info, shape=(into, out))
        build = layer.recipe.build
        recipe = Recipe(info, layer.recipe.reads, lambda tensors: build(tensors).T)
        self._put(name, replace(layer, recipe=recipe, embedding=True))

    def _read_alpha(self, key: str) -> float:
        """α from its tensor, which is read on opening, because no header holds the scale."""
        info = self.file.infos[key]
        if math.prod(info.shape) != 1 or info.dtype.is_complex:
            raise FormatError(f"{key} is {info.shape}; α is one number")
        alpha = float(self.file.read(key))
        if not math.isfinite(alpha):
            raise FormatError(f"{key} is {alpha}; without a finite α the scale is not known")
        return alpha

    def _note_oddities(self) -> None:
        """Add notes on what is unusual in the file."""

    def _add_wholes(self) -> None:
        """Add the whole update of every DoRA layer, or skip it with the reason."""
        dora = [name for name, layer in self.layers.items() if layer.magnitude is not None]
        for name in dora:
            if self._weights is None:
                self._skip(name + WHOLE_SUFFIX, "DoRA: the whole update needs --base")
            elif name not in self._weights:
                self._skip(name + WHOLE_SUFFIX, "DoRA: the base has no weight for it")
            else:
                self._infos[name + WHOLE_SUFFIX] = UpdateInfo(self._infos[name].shape, None, 1.0, torch.float32, "dora")
        if dora:
            self.notes.append(f"DoRA in {len(dora)} layers: NAME is the product, NAME{WHOLE_SUFFIX} the whole update")

    def magnitude(self, name: str) -> Tensor | None:
        """DoRA's magnitude of a layer as stored, None without one."""
        key = self.layers[name].magnitude
        return None if key is None else self.file.read(key)

    def _read(self, name: str) -> Update:
        module = name.removesuffix(WHOLE_SUFFIX) if name not in self.layers else name
        layer = self.layers[module]
        product = layer.recipe.build({leaf: self.file.read(layer.keys[leaf]) for leaf in layer.recipe.reads})
        if name == module:
            return product.to(self.device)
        magnitude, weight = self.magnitude(module), self._read_weight(module)
        if magnitude is None or weight is None:
            raise FormatError("has no whole update")
        return lycoris_dora_update(product.to(self.device), magnitude.to(self.device), weight.to(self.device))

    def _read_weight(self, name: str) -> Tensor | None:
        module = name.removesuffix(WHOLE_SUFFIX) if name not in self.layers else name
        return self._weights.matrix(module) if self._weights else None


def metadata_alpha(metadata: Mapping[str, str], kernel: tuple[int, ...] = ()) -> float | None:
    """α that a file's metadata gives for all layers; for a convolution of a ``kernel`` other than 1 × 1, kohya's own
    for those. None where it gives none that is a finite number."""
    texts = [metadata.get(tag, "") for tag in ALPHA_TAGS]
    if math.prod(kernel) > 1:
        try:
            arguments = json.loads(metadata.get(NETWORK_ARGS_TAG, "{}"))
        except (ValueError, RecursionError):
            arguments = {}
        own = arguments.get(CONV_ALPHA_TAG) if isinstance(arguments, dict) else None
        texts = [str(own), *texts] if own is not None else texts
    return next((alpha for text in texts if (alpha := _finite_number(text)) is not None), None)


def _finite_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _reason(key: str) -> str:
    return next((reason for pattern, reason in SKIP_REASONS if pattern.search(key)), "unknown key")
