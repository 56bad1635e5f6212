"""Adapters in PEFT's layout: adapter_config.json beside adapter_model.safetensors. LoRA itself is read here.

Tensors are trusted over the configuration: r is A.shape[0]. DoRA layers give two entries, the product
scale·B·A under their name and, with a base, the whole update under ``name:whole``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path

import torch
from torch import Tensor

from rankscope.errors import FormatError, prefix_errors
from rankscope.formats.abstract_store import UpdateInfo
from rankscope.formats.checkpoint import BaseWeights
from rankscope.formats.names import WEIGHT_SUFFIX
from rankscope.formats.peft_config import BASE_MODIFYING_INITS, AdapterConfig, read_adapter_config
from rankscope.formats.peft_experts import Experts, find_experts
from rankscope.formats.peft_keys import CONFIG_NAME, LayerType
from rankscope.formats.peft_shapes import block_diagonal, check_magnitude, layer_geometry
from rankscope.formats.peft_store import AdapterStore, BaseCheckpoint, tensor_names_in_base
from rankscope.formats.recipes import upcast_float8
from rankscope.formats.study_layout import INITIAL_FOLDER
from rankscope.linalg import working_dtype
from rankscope.updates import Dense, LowRank, check_finite

WHOLE_SUFFIX = ":whole"
INITIAL_FOLDERS = (INITIAL_FOLDER, *(f"{init}_init" for init in BASE_MODIFYING_INITS))
"""Folders, in the adapter's folder or beside it, in which its initial factors are looked for."""


@dataclass
class _LayerKeys:
    """Keys of one module's tensors, gathered by part."""

    module: str
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """The module that is wrapped, where wrappers are nested (``target_parameters``)."""
        return self.module.replace(".base_layer", "")

    @property
    def embedding(self) -> bool:
        return "lora_embedding_A" in self.keys or "lora_embedding_B" in self.keys

    def pair(self) -> tuple[str, str]:
        """Keys of A and B.

        Raises:
            FormatError: one is missing, or the module has factors of two kinds.
        """
        stem = "lora_embedding_" if self.embedding else "lora_"
        for half, other in (("A", "B"), ("B", "A")):
            if stem + half not in self.keys:
                raise FormatError(f"half of the pair is missing: {stem}{other} is there, {stem}{half} is not")
        if self.embedding and ("lora_A" in self.keys or "lora_B" in self.keys):
            raise FormatError("has factors of a linear layer and of an embedding; which are meant?")
        return self.keys[stem + "A"], self.keys[stem + "B"]


@dataclass(frozen=True)
class _Factors:
    """Where one layer's factors are and how they make the update."""

    key_a: str
    key_b: str
    kind: LayerType
    scale: float
    key_m: str | None
    groups: int


class PeftStore(AdapterStore):
    """The updates of one LoRA adapter.

    Args:
        path: the adapter's folder.
        base: the base model's checkpoint; needed for the whole update of DoRA layers, for what was trained whole, and
            for ``weight(name)``.
        device: where updates are put.
        initial: the adapter's folder as it was before training, whose product is subtracted; by default looked for
            where the initialisation moved the base (``INITIAL_FOLDERS``).

    Raises:
        FormatError: not a LoRA adapter, a damaged file, a pair with one half, or factors that do not multiply.
    """

    def __init__(
        self,
        path: Path,
        base: Path | None = None,
        device: torch.device | str = "cpu",
        initial: Path | None = None,
    ) -> None:
        self.config: AdapterConfig = read_adapter_config(path / CONFIG_NAME)
        super().__init__(path, device)
        self.notes += self.config.notes()
        self._factors: dict[str, _Factors] = {}
        self._claims: list[tuple[str, int, int]] = []
        layers = [_LayerKeys(module, keys) for module, keys in self.folder.factors.items()]
        origin = BaseCheckpoint(base, self._names_in_base(layers)) if base is not None else None
        self._initial = self._open_initial(initial or _find_initial(path, self.config.base_modifying_init))
        self._add_layers(layers, origin)
        self._note_oddities()
        self._weights: BaseWeights | None = None
        if base is not None and self._factors:
            shapes = {name: self._infos[name].shape for name, factors in self._factors.items() if factors.groups == 1}
            self._weights = BaseWeights(base, shapes, bool(self.config.fan_in_fan_out))
        self._add_wholes()
        self._add_others(origin, self.config.trainable_token_indices)

    @property
    def has_initial(self) -> bool:
        """Whether the factors before training are known and subtracted."""
        return self._initial is not None

    def layer_alpha(self, name: str) -> float | None:
        return self.config.alpha(name) if self.info(name).method in ("lora", "dora-product") else None

    def _names_in_base(self, layers: list[_LayerKeys]) -> set[str]:
        names = tensor_names_in_base(self._others) | {layer.module + WEIGHT_SUFFIX for layer in layers}
        owners = {layer.owner for layer in layers}
        return names | {f"{owner}.{name}" for owner in owners for name in self.config.target_parameter_names(owner)}

    def _open_initial(self, folder: Path | None) -> PeftStore | None:
        init = self.config.base_modifying_init
        if folder is not None:
            self.notes.append(
                f"the updates are scale·(B·A − B₀·A₀), of rank up to r + r₀, with the initial factors of {folder}"
                + (f": {init} moves the base weight too" if init else "")
            )
            return PeftStore(folder)
        if init is not None:
            self.notes.append(
                f"initialised with {init}, which moves the base weight too: scale·B·A is not the learned update "
                f"(that is scale·(B·A − B₀·A₀); put the initial adapter into the subfolder {INITIAL_FOLDERS[0]})"
            )
        return None

    def _add_layers(self, layers: list[_LayerKeys], origin: BaseCheckpoint | None) -> None:
        stacks: dict[str, list[_LayerKeys]] = {}
        for layer in layers:
            if self.config.target_parameter_names(layer.owner):
                stacks.setdefault(layer.owner, []).append(layer)
                continue
            with prefix_errors(f"{self._file.path}: layer {layer.module}"):
                self._add(layer)
        for owner, wrappers in stacks.items():
            with prefix_errors(f"{self._file.path}: layer {owner}"):
                self._add_experts(owner, wrappers, origin)
        if not self._infos:
            seen = f"; skipped {self.skipped[0].name}: {self.skipped[0].reason}" if self.skipped else ""
            raise FormatError(f"{self._file.path}: holds no LoRA layer that can be read{seen}")

    def _add(self, layer: _LayerKeys) -> None:
        module = layer.module
        if set(layer.keys) == {"lora_magnitude_vector"}:
            self._skip(module, "a DoRA magnitude without factors")
            return
        key_a, key_b = layer.pair()
        A, B = self._file.infos[key_a], self._file.infos[key_b]
        kind, shape = layer_geometry(A, B, layer.embedding)
        rank = A.shape[0]
        key_m = layer.keys.get("lora_magnitude_vector")
        if key_m is not None:
            check_magnitude(self._file.infos[key_m], shape, kind)
        groups = rank // B.shape[1] if kind == "conv" else 1
        factors = _Factors(key_a, key_b, kind, self.config.scale(module, rank), key_m, groups)
        self._factors[module] = factors
        nominal = rank + self._initial_rank(module, shape)
        info = UpdateInfo(shape, nominal, factors.scale, A.dtype, "dora-product" if key_m else "lora")
        self._put(module, info, methodcaller("_product", module), methodcaller("_weight", module))
        claimed = self.config.rank(module)
        if claimed is not None and claimed != rank:
            self._claims.append((module, claimed, rank))

    def _initial_rank(self, module: str, shape: tuple[int, int]) -> int:
        """r₀, 0 without an initial adapter."""
        if self._initial is None:
            return 0
        if module not in self._initial or self._initial.info(module).shape != shape:
            raise FormatError(f"the initial adapter {self._initial.path} has no factors for it of shape {shape}")
        return self._initial.info(module).nominal_rank or 0

    def _add_experts(self, owner: str, wrappers: list[_LayerKeys], origin: BaseCheckpoint | None) -> None:
        """Add one update for each expert of each parameter; factors whose parameter is not known are skipped."""
        pairs = {layer.module: tuple(self._file.infos[key] for key in layer.pair()) for layer in wrappers}
        if self._initial is not None:
            self._skip(owner, "target_parameters: not read together with an initial adapter")
            return
        parameters = find_experts(owner, pairs, self.config, origin)
        if isinstance(parameters, str):
            for module in pairs:
                self._skip(module, parameters)
            return
        keys = {layer.module: layer.pair() for layer in wrappers}
        for experts in parameters:
            for name, info in experts.infos():
                read = methodcaller("_expert", experts, keys[experts.module], name)
                self._put(name, info, read, methodcaller("_expert_weight", experts, name, origin))

    def _expert_weight(self, experts: Experts, name: str, origin: BaseCheckpoint | None) -> Tensor | None:
        return experts.weight(name, origin)

    def _expert(self, experts: Experts, keys: tuple[str, str], name: str) -> LowRank:
        A, B = (upcast_float8(self._file.read(key)) for key in keys)
        return experts.update(A, B, name)

    def _note_oddities(self) -> None:
        grouped = [name for name, factors in self._factors.items() if factors.groups > 1]
        if grouped:
            self.notes.append(
                f"{len(grouped)} grouped convolutions (first {grouped[0]}): PEFT's A reads every input, so the update "
                "is that of the kernel without groups, (out, in·kh·kw), and no base weight has its shape"
            )
        if self._claims:
            module, claimed, rank = self._claims[0]
            self.notes.append(
                f"{CONFIG_NAME} gives another rank than the tensors in {len(self._claims)} of {len(self._factors)} "
                f"layers (first {module}: {claimed}, in fact {rank}); the tensors are trusted, also for the scale"
            )
        dora = sum(factors.key_m is not None for factors in self._factors.values())
        if bool(self.config.use_dora) != bool(dora):
            self.notes.append(f"{CONFIG_NAME} has use_dora {self.config.use_dora}, but {dora} layers have a magnitude")

    def _add_wholes(self) -> None:
        """Add the whole update of every DoRA layer, or skip it with the reason."""
        dora = [name for name, factors in self._factors.items() if factors.key_m is not None]
        for module in dora:
            if self._factors[module].groups > 1:
                self._skip(
                    module + WHOLE_SUFFIX, "DoRA of a grouped convolution: PEFT's norm there is of no weight's rows"
                )
            elif self._weights is None:
                self._skip(module + WHOLE_SUFFIX, "DoRA: the whole update needs --base")
            elif module not in self._weights:
                self._skip(module + WHOLE_SUFFIX, "DoRA: the base has no weight for it")
            else:
                info = UpdateInfo(self._infos[module].shape, None, 1.0, torch.float32, "dora")
                self._put(module + WHOLE_SUFFIX, info, methodcaller("_whole", module), methodcaller("_weight", module))
        if dora:
            self.notes.append(
                f"DoRA in {len(dora)} layers: NAME is the product scale·B·A, NAME{WHOLE_SUFFIX} the whole update"
            )

    def _product(self, module: str) -> LowRank:
        factors = self._factors[module]
        A, B = upcast_float8(self._file.read(factors.key_a)), upcast_float8(self._file.read(factors.key_b))
        if factors.kind == "embedding":  # the (vocabulary, dim) weight changes by (BA)ᵀ
            A, B = B.T, A.T
        elif factors.kind == "conv":
            A, B = A.flatten(1), block_diagonal(B.flatten(1), factors.groups)
        product = LowRank(B, A, factors.scale)
        return product if self._initial is None else _subtract(product, self._initial._product(module))

    def _whole(self, module: str) -> Dense:
        """m·(W0 + sBA)/‖W0 + sBA‖ − W0, the norm per output (per dimension of an embedding): DoRA, eq. 5."""
        factors, weight = self._factors[module], self._weight(module)
        if factors.key_m is None or weight is None:
            raise FormatError("has no whole update")
        exact = working_dtype(self.device)
        magnitude = self._file.read(factors.key_m).flatten()
        check_finite(upcast_float8(magnitude), "the magnitude")
        product = self._product(module).to(self.device)
        start = weight.to(self.device).to(exact)
        moved = start + product.left @ product.right
        over_columns = factors.kind != "embedding"
        norms = torch.linalg.vector_norm(moved, dim=1 if over_columns else 0, keepdim=True)
        m = magnitude.to(self.device).to(exact)
        return Dense((m[:, None] if over_columns else m[None, :]) / norms * moved - start)

    def _weight(self, module: str) -> Tensor | None:
        return self._weights.matrix(module) if self._weights else None


def _find_initial(folder: Path, init: str | None) -> Path | None:
    """The initial adapter of one whose initialisation moved the base, in its folder or beside it."""
    if init is None:
        return None
    candidates = [home / name for home in (folder, folder.parent) for name in INITIAL_FOLDERS]
    return next((path for path in candidates if (path / CONFIG_NAME).is_file() and path != folder), None)


def _subtract(now: LowRank, start: LowRank) -> LowRank:
    """now − start; in the stored dtype where the scales agree, as those of one adapter do."""
    if now.scale != start.scale or now.B.dtype != start.B.dtype:
        return now + start * -1.0
    return LowRank(torch.cat((now.B, -start.B), dim=1), torch.cat((now.A, start.A)), now.scale)
