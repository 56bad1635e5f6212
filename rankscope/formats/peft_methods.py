"""Every method of PEFT but LoRA: which are read, by what recipe, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rankscope.errors import FormatError, prefix_errors
from rankscope.formats import peft_additive as additive
from rankscope.formats import peft_multiplicative as multiplicative
from rankscope.formats import peft_shared_tensors as shared
from rankscope.formats.checkpoint import BaseWeights
from rankscope.formats.lycoris import LOHA, LOKR
from rankscope.formats.names import WEIGHT_SUFFIX
from rankscope.formats.peft_config import read_method_config
from rankscope.formats.peft_keys import CONFIG_NAME, PEFT_PREFIX, ParsedKey, key_pattern, parse_key
from rankscope.formats.peft_store import AdapterStore, BaseCheckpoint, tensor_names_in_base
from rankscope.formats.recipes import BASE_WEIGHT, AdaptedModule, Recipe, SkippedPartError
from rankscope.updates import Update


class PeftMethod(NamedTuple):
    """``recipe`` makes the update of one module from its ``parts`` and from those ``shared`` by all modules.

    ``note``: what a reader of its numbers must know.
    """

    recipe: Callable[[AdaptedModule], Recipe]
    parts: tuple[str, ...]
    shared: tuple[str, ...] = ()
    note: str = ""


def _no_factors(module: AdaptedModule) -> Recipe:
    raise SkippedPartError("not a factor")


VERA_NOTE = (
    "{}: A and B are random, and shared by all layers and all adapters of one seed; only scalings are trained, so "
    "an overlap of 1 in the input space is so by construction"
)
FULL_MATRIX_NOTE = "{}: the update has no thin factors, so its matrix is formed"
METHODS: Mapping[str, PeftMethod] = {
    "ADALORA": PeftMethod(additive.adalora, ("lora_A", "lora_B", "lora_E")),
    "LOHA": PeftMethod(
        additive.loha,
        tuple(name for leaves in LOHA for name in leaves[:4] if name),
        note="LoHa: the nominal rank is r², which the product entry by entry of two matrices of rank r can have",
    ),
    "LOKR": PeftMethod(
        additive.lokr,
        tuple(name for leaves in LOKR for name in leaves[:4] if name),
        note="LoKr: the nominal rank is the product of those that the two factors can have",
    ),
    "VERA": PeftMethod(shared.vera, ("vera_lambda_b", "vera_lambda_d"), ("vera_A", "vera_B"), VERA_NOTE.format("VeRA")),
    "PVERA": PeftMethod(
        shared.pvera,
        ("pvera_lambda_b", "pvera_lambda_d"),
        ("pvera_A", "pvera_B"),
        VERA_NOTE.format("PVeRA, at its mean"),
    ),
    "DELORA": PeftMethod(additive.delora, ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")),
    "GRALORA": PeftMethod(
        additive.gralora,
        ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
        note="GraLoRA: the nominal rank is k·r, that of k × k blocks of rank r/k",
    ),
    "RANDLORA": PeftMethod(
        shared.randlora,
        ("randlora_lambda", "randlora_gamma"),
        ("randlora_A", "randlora_B"),
        VERA_NOTE.format("RandLoRA"),
    ),
    "VBLORA": PeftMethod(
        shared.vblora,
        tuple(f"vblora_logits_{side}{end}" for side in "AB" for end in ("", "_topk_indices", "_topk_weights")),
        ("vblora_vector_bank",),
    ),
    "MISS": PeftMethod(additive.miss, ("miss_block",)),
    "C3A": PeftMethod(additive.c3a, ("c3a_kernel",), note=FULL_MATRIX_NOTE.format("C3A")),
    "FOURIERFT": PeftMethod(additive.fourierft, ("fourierft_spectrum",), note=FULL_MATRIX_NOTE.format("FourierFT")),
    "SHIRA": PeftMethod(additive.shira, ("shira_weight", "shira_indices"), note=FULL_MATRIX_NOTE.format("SHiRA")),
    "HIRA": PeftMethod(
        multiplicative.hira,
        ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        note=FULL_MATRIX_NOTE.format("HiRA"),
    ),
    "IA3": PeftMethod(multiplicative.ia3, ("ia3_l",), note=FULL_MATRIX_NOTE.format("(IA)³")),
    "HRA": PeftMethod(multiplicative.hra, ("hra_u",)),
    "DEFT": PeftMethod(multiplicative.deft, ("deft_P", "deft_R")),
    "GLORA": PeftMethod(
        multiplicative.glora,
        tuple(f"glora_{name}.{part}" for name in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")),
        note=FULL_MATRIX_NOTE.format("GLoRA"),
    ),
    "OFT": PeftMethod(multiplicative.oft, ("oft_R",), note=FULL_MATRIX_NOTE.format("OFT")),
    "TRAINABLE_TOKENS": PeftMethod(_no_factors, ()),  # whole rows alone, which every adapter can have
}
PROMPT_REASON = "it trains inputs or prefixes, and changes no weight"
ROUTING_REASON = "what it adds depends on the input, so there is no change of a weight"
BASE_PARTS_REASON = (
    "it stores parts of a decomposition of the base weight, which would have to be decomposed again alike"
)
UNSUPPORTED_METHODS: Mapping[str, str] = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"), PROMPT_REASON
    ),
    "ADAPTION_PROMPT": PROMPT_REASON,
    **dict.fromkeys(("XLORA", "POLY", "LILY"), ROUTING_REASON),
    "PEANUT": "it adds a network with nonlinearities, which is no change of a weight",
    "SHADOW": "it trains a network beside the model, which is no change of a weight",
    "BEFT": "it trains biases only, which have no spectrum",
    "LN_TUNING": "it trains norms only, which have no spectrum",
    **dict.fromkeys(("OSF", "PSOFT", "FROD", "ADAMSS", "TINYLORA"), BASE_PARTS_REASON),
    "BOFT": "butterfly products of rotations of the base weight; merge it with PEFT and compare checkpoints",
    "ROAD": "rotations of the base weight's rows; merge it with PEFT and compare checkpoints",
    "WAVEFT": "a wavelet transform at drawn places; merge it with PEFT and compare checkpoints",
    "UNILORA": "entries of one shared vector at drawn places; merge it with PEFT and compare checkpoints",
    "SUPERTUNING": "sparse entries beside factors; merge it with PEFT and compare checkpoints",
    "BONE": "the older form of MISS; convert it with PEFT",
}


class PeftMethodStore(AdapterStore):
    """The updates of one adapter of another method than LoRA.

    Raises:
        FormatError: a method that is not read, a damaged file, parts that are missing or do not fit, or nothing that
            could be read.
    """

    def __init__(self, path: Path, base: Path | None = None, device: torch.device | str = "cpu") -> None:
        self.config = read_method_config(path / CONFIG_NAME)
        kind = self.config.peft_type
        if kind not in METHODS:
            reason = UNSUPPORTED_METHODS.get(kind, "no method of that name is known")
            raise FormatError(f"{path / CONFIG_NAME}: peft_type {kind} is not read: {reason}")
        self.method = METHODS[kind]
        super().__init__(path, device, partial(_parse_method_key, key_pattern(self.method.parts)))
        self._shared: dict[str, str] = {}
        layers = self.folder.factors
        self._separate_shared()
        fan = bool(self.config.fan_in_fan_out)
        origin = (
            BaseCheckpoint(base, tensor_names_in_base(self._others) | {name + WEIGHT_SUFFIX for name in layers})
            if base is not None
            else None
        )
        recipes = self._recipes(layers, origin, fan)
        self._weights: BaseWeights | None = None
        if base is not None and recipes:
            self._weights = BaseWeights(base, {name: recipe.info.shape for name, recipe in recipes.items()}, fan)
            self.notes += self._weights.notes
        for name, recipe in recipes.items():
            read = methodcaller("_build", name, layers[name], recipe)
            self._put(name, recipe.info, read, methodcaller("_weight", name))
        self._add_others(origin, self.config.token_indices or self.config.trainable_token_indices)
        if not self._infos:
            seen = f"; skipped {self.skipped[0].name}: {self.skipped[0].reason}" if self.skipped else ""
            raise FormatError(f"{self._file.path}: holds no layer of {kind} that can be read{seen}")
        if recipes and self.method.note:
            self.notes.append(self.method.note)

    def _separate_shared(self) -> None:
        """Take the tensors that all modules share, and the copies that some versions store, out of ``_others``."""
        for part in self.method.shared:
            pattern = key_pattern((part,))
            keys = [tensor.key for tensor in self._others if pattern.fullmatch(tensor.key)]
            own = [key for key in keys if not key.startswith(PEFT_PREFIX)]
            if keys:
                self._shared[part] = (own or keys)[0]
            self._others = [tensor for tensor in self._others if tensor.key not in keys]

    def _recipes(
        self, layers: Mapping[str, Mapping[str, str]], origin: BaseCheckpoint | None, fan: bool
    ) -> dict[str, Recipe]:
        """Recipes by module; a module that cannot be read is skipped."""
        recipes = {}
        for name, keys in layers.items():
            headers = {part: self._file.infos[key] for part, key in {**self._shared, **keys}.items()}
            shape = origin.shape(name + WEIGHT_SUFFIX, fan) if origin is not None else None
            try:
                with prefix_errors(f"{self._file.path}: layer {name}"):
                    recipes[name] = self.method.recipe(AdaptedModule(name, headers, self.config, shape))
            except SkippedPartError as error:
                self._skip(name, str(error.__cause__))
        return recipes

    def _build(self, name: str, keys: Mapping[str, str], recipe: Recipe) -> Update:
        known = {**self._shared, **keys}
        tensors: dict[str, Tensor] = {
            part: self._file.read(known[part]) for part in recipe.reads if part != BASE_WEIGHT
        }
        weight = self._weight(name) if BASE_WEIGHT in recipe.reads else None
        if weight is not None:
            tensors[BASE_WEIGHT] = weight
        return recipe.build(tensors)

    def _weight(self, name: str) -> Tensor | None:
        return self._weights.matrix(name) if self._weights else None


def _parse_method_key(pattern: re.Pattern[str], key: str) -> ParsedKey | None:
    """What the key of a part of this method says; None for any other key."""
    parsed = parse_key(key, pattern)
    return parsed if parsed is not None and parsed.leaf != "bias" else None
