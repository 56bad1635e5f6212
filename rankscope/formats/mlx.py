"""Adapters of mlx-lm: ``adapters.safetensors`` with ``lora_a`` (in, r) and ``lora_b`` (r, out) beside its own
``adapter_config.json``, which has the scale itself, not α/r.

A linear layer changes by scale·(a·b)ᵀ, an embedding (vocabulary, dim) by scale·a·b with a (vocabulary, r). Stacked
experts have a (experts, r, in) and b (experts, out, r), read as one update each, ``NAME[e]``. DoRA's magnitude is
``m``, the norm of each row of the weight. Layouts: github.com/ml-explore/mlx-lm, tuner/lora.py, tuner/dora.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from rankscope.errors import FormatError
from rankscope.formats.adapter_file import EMBEDDING_NAME, FileLayer, FileStore, NoAlphaError, ParsedFileKey
from rankscope.formats.file_io import TensorFile, TensorInfo, read_json
from rankscope.formats.lycoris import LOCON, MAGNITUDE_LEAF, lycoris_recipe
from rankscope.formats.peft_keys import CONFIG_NAME
from rankscope.formats.pickle_file import PickledFile
from rankscope.formats.recipes import Recipe, Tensors
from rankscope.updates import Update

SETTINGS_KEY = "lora_parameters"
_LEAVES = {"lora_a": LOCON.b, "lora_b": LOCON.a, "m": MAGNITUDE_LEAF}


class MlxParameters(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that decide the scale. The first versions had an ``alpha``, and scale·alpha/rank."""

    scale: float | None = None
    alpha: float | None = None
    rank: int | None = None

    def alpha_of(self, rank: int) -> float | None:
        """α of factors of this rank, such that their scale is α/r; None where the settings have no scale."""
        if self.scale is None:
            return None
        return self.scale * rank if self.alpha is None else self.scale * self.alpha * rank / (self.rank or rank)


def is_mlx(keys: Iterable[str]) -> bool:
    """Whether keys are those of mlx-lm."""
    return any(key.endswith((".lora_a", ".lora_b")) for key in keys)


class MlxStore(FileStore):
    """An adapter of mlx-lm.

    Raises:
        NoAlphaError: its configuration is not beside it, and no α was given.
    """

    kind: ClassVar[str] = "mlx"

    def __init__(self, path: Path, file: TensorFile | PickledFile, *options: Any, **others: Any) -> None:
        self._config = _read_config(file.path.parent / CONFIG_NAME)
        self._settings = _read_settings(self._config, file.path.parent / CONFIG_NAME)
        super().__init__(path, file, *options, **others)

    def base_name(self) -> str | None:
        name = self._config.get("model")
        return name if isinstance(name, str) and name else None

    def _parse(self, key: str) -> ParsedFileKey | None:
        module, _, leaf = key.rpartition(".")
        return ParsedFileKey(module, _LEAVES[leaf]) if module and leaf in _LEAVES else None

    def _add(self, module: str, keys: Mapping[str, str]) -> None:
        infos = {leaf: self.file.infos[key] for leaf, key in keys.items()}
        if not {LOCON.a, LOCON.b} & set(infos):
            for key in keys.values():
                self._skip(key, "no factors are beside it")
            return
        a, b = infos.get(LOCON.b), infos.get(LOCON.a)
        if a is None or b is None or len(a.shape) != len(b.shape) or len(a.shape) not in (2, 3):
            shapes = ", ".join(f"{keys[leaf]} {info.shape}" for leaf, info in infos.items())
            raise FormatError(
                f"{shapes}: expected lora_a (in, r) and lora_b (r, out), or stacks of (r, in) and (out, r)"
            )
        if len(a.shape) == 3:
            self._add_experts(module, keys, a, b)
            return
        parts = {LOCON.b: TensorInfo(a.shape[::-1], a.dtype), LOCON.a: TensorInfo(b.shape[::-1], b.dtype)}
        alpha = self._layer_alpha(a.shape[1])
        recipe = lycoris_recipe(parts, alpha)

        def build(tensors: Tensors) -> Update:
            return recipe.build({leaf: tensor.T for leaf, tensor in tensors.items()})

        self._put(module, FileLayer(keys, alpha, Recipe(recipe.info, recipe.reads, build), ()))
        if EMBEDDING_NAME.search(module):
            self._read_as_embedding(module)

    def _add_experts(self, module: str, keys: Mapping[str, str], a: TensorInfo, b: TensorInfo) -> None:
        if a.shape[0] != b.shape[0]:
            raise FormatError(f"lora_a {a.shape} and lora_b {b.shape} have other numbers of experts")
        if MAGNITUDE_LEAF in keys:
            raise FormatError("has DoRA's magnitude on stacked experts, which mlx-lm does not write")
        alpha = self._layer_alpha(a.shape[1])
        parts = {LOCON.b: TensorInfo(a.shape[1:], a.dtype), LOCON.a: TensorInfo(b.shape[1:], b.dtype)}
        recipe = lycoris_recipe(parts, alpha)
        for e in range(a.shape[0]):

            def build(tensors: Tensors, e: int = e) -> Update:
                return recipe.build({leaf: tensor[e] for leaf, tensor in tensors.items()})

            self._put(f"{module}[{e}]", FileLayer(keys, alpha, Recipe(recipe.info, recipe.reads, build), ()))

    def _layer_alpha(self, rank: int) -> float:
        """α such that α/r is mlx-lm's scale."""
        alpha = self._settings.alpha_of(rank)
        if alpha is not None:
            return alpha
        if self._alpha is None:
            raise NoAlphaError(
                f"is of an adapter of mlx-lm, whose scale is in {CONFIG_NAME} ({SETTINGS_KEY}: scale); put that beside "
                "it, or give α = scale · rank (--alpha)"
            )
        self.given += 1
        return self._alpha


def _read_config(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_settings(config: Mapping[str, Any], path: Path) -> MlxParameters:
    """The settings that decide the scale.

    Raises:
        FormatError: one is of a wrong type or not finite.
    """
    try:
        settings = msgspec.convert(config.get(SETTINGS_KEY) or {}, MlxParameters)
    except (msgspec.ValidationError, OverflowError, ValueError) as error:
        raise FormatError(f"{path}: {SETTINGS_KEY}: {error}; correct the configuration") from error
    numbers = [number for number in (settings.scale, settings.alpha) if number is not None]
    if not all(abs(number) < float("inf") for number in numbers) or (settings.rank is not None and settings.rank < 1):
        raise FormatError(f"{path}: {SETTINGS_KEY} has no finite scale and positive rank; correct the configuration")
    return settings
