"""A LoRA adapter for surgery: its updates, how PEFT stores them, and the tensors beside the factors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rankscope.errors import FormatError, prefix_errors
from rankscope.formats.abstract_store import Store, UpdateInfo
from rankscope.formats.adapter_file import FileStore, NoAlphaError
from rankscope.formats.file_io import TensorFile, TensorInfo
from rankscope.formats.peft_config import BASE_MODIFYING_INITS
from rankscope.formats.peft_folder import PeftFolder
from rankscope.formats.peft_keys import CONFIG_NAME, factor_bias_key, magnitude_key
from rankscope.formats.peft_store import AdapterStore
from rankscope.formats.peft_write import FactorLayout
from rankscope.formats.pickle_file import PickledFile
from rankscope.formats.recipes import float_dtype, upcast_float8
from rankscope.formats.store import open as open_store
from rankscope.formats.streaming import LazyTensor
from rankscope.updates import LowRank, check_finite

AdapterSource = str | os.PathLike[str] | Store

CONVERT_HINT = "convert it first: rankscope convert {} --to peft -o NEW"
BIAS_SETTINGS = ("none", "lora_only", "all")  # each trains what the one before does, and more


@dataclass
class Adapter:
    """An opened adapter; tensors are read when asked for.

    ``places``: how PEFT stores each layer's factors; ``ranks``: r of those in the file. ``magnitudes``: keys of DoRA's
    vectors by module. ``factor_biases``: keys of ``lora_B.bias`` by module. ``whole``: what was trained whole (biases,
    heads, token rows), key as PEFT saves it → key in the file.
    """

    label: str
    store: Store
    file: TensorFile | PickledFile
    config: dict[str, Any]
    places: dict[str, FactorLayout] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    magnitudes: dict[str, str] = field(default_factory=dict)
    factor_biases: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        source: AdapterSource,
        base: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
        initial: str | os.PathLike[str] | None = None,
    ) -> Adapter:
        """Open an adapter in PEFT's layout (``base`` is needed for DoRA's whole updates only; ``initial`` is the
        adapter before training, where its initialisation moved the base and it is not beside the adapter).

        Raises:
            FormatError: not such an adapter, or one that means more than base + scale·B·A where it is attached.
        """
        try:
            store = source if isinstance(source, Store) else open_store(source, base, device, initial)
        except NoAlphaError as error:
            raise FormatError(f"{source}: has no α of its own; {CONVERT_HINT.format(source)} --alpha α") from error
        if isinstance(store, FileStore):
            raise FormatError(f"{store.path}: is a {store.kind} file; {CONVERT_HINT.format(store.path)}")
        if not isinstance(store, AdapterStore):
            raise FormatError(f"{source}: is no adapter in PEFT's layout; convert it, or extract one from full weights")
        folder = store.folder
        with prefix_errors(folder.path / CONFIG_NAME):
            _check_config(folder.config)
        adapter = cls(str(folder.path), store, folder.file, folder.config)
        with prefix_errors(folder.file.path):
            adapter._add_tensors(folder)
        return adapter

    def _add_tensors(self, folder: PeftFolder) -> None:
        if folder.unknown:
            raise FormatError(
                f"holds {folder.unknown[0].key}, which is not known; an adapter with unknown tensors is not changed"
            )
        reasons = {item.name: item.reason for item in self.store.skipped}
        for module in [*folder.factors, *folder.factor_biases]:
            if module not in self.store:
                raise FormatError(f"layer {module} cannot be handled: {reasons.get(module, 'not read')}")
        for module, keys in folder.factors.items():
            shapes = {part: self.file.infos[key].shape for part, key in keys.items()}
            self.places[module] = _factor_layout(shapes)
            self.ranks[module] = _factor_shapes(shapes)[0][0]
        self.magnitudes = self._in_file_order(folder.magnitudes)
        self.factor_biases = self._in_file_order({name: bias.key for name, bias in folder.factor_biases.items()})
        tensors = [*folder.whole.values(), *folder.base_weights.values(), *folder.token_rows.values()]
        self.whole = self._in_file_order({tensor.saved_key: tensor.key for tensor in tensors})
        for module, key in self.factor_biases.items():
            _check_factor_bias(key, self.file.infos[key], self.info(module).shape[0])
        _check_start(self.config, all(self.info(name).nominal_rank != r for name, r in self.ranks.items()))

    def _in_file_order(self, keys: Mapping[str, str]) -> dict[str, str]:
        """The same in the order of the keys in the file, which records keep."""
        places = {key: place for place, key in enumerate(self.file.infos)}
        return dict(sorted(keys.items(), key=lambda item: places[item[1]]))

    def names(self) -> list[str]:
        """Layers with factors, in natural order."""
        return [name for name in self.store.names() if name in self.places]

    def info(self, name: str) -> UpdateInfo:
        return self.store.info(name)

    def parameters(self, name: str) -> int:
        """How many numbers the factors of a layer hold in the file."""
        return self.places[name].parameters(self.info(name).shape, self.ranks[name])

    def update(self, name: str) -> LowRank:
        """scale·B·A of a layer; s(BA − B₀A₀) where the initialisation moved the base and the store has it.

        Raises:
            NonFiniteError: a factor holds NaN or infinity.
            FormatError: the file cannot be read.
        """
        update = self.store[name]
        if not isinstance(update, LowRank):
            raise FormatError(f"{self.label}: layer {name} is no product of two factors")
        return update

    def dtype(self, name: str) -> torch.dtype:
        """What a layer's factors are stored in; float32 for eight-bit ones."""
        return float_dtype(self.info(name).dtype)

    def factor_bias(self, name: str) -> Tensor:
        """What a layer's ``lora_B.bias`` adds to its output: scale · bias, (out,).

        Raises:
            NonFiniteError: it holds NaN or infinity, or the scale makes it too large for its dtype.
        """
        bias = upcast_float8(self.file.read(self.factor_biases[name]))
        scaled = (bias.double() * self.info(name).scale).to(torch.promote_types(bias.dtype, self.dtype(name)))
        with prefix_errors(f"{self.label}: layer {name}"):
            check_finite(scaled, "scale · lora_B.bias")
        return scaled

    def lazy_tensor(self, key: str) -> LazyTensor:
        """A tensor of the file, to be copied."""
        return LazyTensor(self.file.infos[key], lambda: self.file.read(key))

    def unchanged_tensors(self) -> dict[str, LazyTensor]:
        """What is copied unchanged when every layer stays: magnitudes, and what was trained whole."""
        magnitudes = {magnitude_key(name): self.lazy_tensor(key) for name, key in self.magnitudes.items()}
        return magnitudes | {key: self.lazy_tensor(stored) for key, stored in self.whole.items()}

    def biases(self) -> dict[str, LazyTensor]:
        """``lora_B.bias`` of each layer, with the scale in it."""
        return {factor_bias_key(name): LazyTensor.of(self.factor_bias(name)) for name in self.factor_biases}


def _check_factor_bias(key: str, info: TensorInfo, out: int) -> None:
    if info.shape != (out,) or not info.dtype.is_floating_point:
        stored = str(info.dtype).removeprefix("torch.")
        raise FormatError(f"{key} is {info.shape} of {stored}, where floating-point numbers ({out},) are needed")


def _factor_shapes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B as stored."""
    stem = "lora_embedding_" if "lora_embedding_A" in shapes else "lora_"
    return shapes[stem + "A"], shapes[stem + "B"]


def _factor_layout(shapes: Mapping[str, tuple[int, ...]]) -> FactorLayout:
    """How a layer's factors are stored, from their shapes by part."""
    A, B = _factor_shapes(shapes)
    if "lora_embedding_A" in shapes:
        return FactorLayout("embedding")
    return FactorLayout("conv", A[2:], A[0] // B[1]) if len(A) > 2 else FactorLayout()


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise FormatError(
            f"peft_type is {config.get('peft_type')!r}; only LORA is changed here; merge the adapter with PEFT and "
            "extract one from the result"
        )
    if config.get("bias") not in (None, *BIAS_SETTINGS):
        raise FormatError(
            f"bias is {config['bias']!r}, not one of {', '.join(BIAS_SETTINGS)}; correct the configuration"
        )
    saved = config.get("modules_to_save")
    if not (saved is None or (isinstance(saved, list) and all(isinstance(name, str) for name in saved))):
        raise FormatError("modules_to_save is no list of names; correct the configuration")
    if config.get("monteclora_config"):
        raise FormatError("monteclora_config is set: B·A is then the mean of a random update; merge it with PEFT")


def _check_start(config: Mapping[str, Any], subtracted: bool) -> None:
    """Refuse factors that contain their initial values, unless the store has subtracted those."""
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_MODIFYING_INITS) and not subtracted:
        raise FormatError(
            f"{init} subtracted an initial product of the adapter's rank from the base weights, so no other adapter "
            "fits them; put the initial adapter beside it (in a subfolder called initial), name it with --initial "
            "(resize), or convert it to plain LoRA with PEFT"
        )
