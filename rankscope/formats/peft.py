"""LoRA adapters in PEFT's layout: adapter_config.json beside adapter_model.safetensors.

Tensors are trusted over the configuration: r is A.shape[0]. DoRA layers give two entries, the product
scale·B·A under their name and, with a base, the whole update under ``name:whole``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rankscope.errors import FormatError, located
from rankscope.formats.checkpoint import BaseWeights
from rankscope.formats.files import TensorInfo
from rankscope.formats.interface import Store, UpdateInfo
from rankscope.formats.names import natural_key
from rankscope.formats.peft_config import AdapterConfig, read_adapter_config
from rankscope.formats.peft_keys import (
    CONFIG_NAME,
    OLD_WEIGHTS_NAME,
    WEIGHTS_NAME,
    Kind,
    bare_module,
    parse_key,
)
from rankscope.formats.pickled import open_tensors
from rankscope.linalg import working_dtype
from rankscope.updates import Dense, LowRank, Update, check_finite

WHOLE = ":whole"

# Keys that are no factors, by what they end with or contain; the first that fits gives the reason.
OTHER_KEYS = (
    (".lora_B.bias", "lora_bias: the bias of B changes the layer's bias, not its weight"),
    ("trainable_tokens", "trainable token rows: full rows of an embedding, no low-rank update"),
    ("base_layer.weight", "the base weight, saved along"),
    (".bias", "a bias: one-dimensional, no spectrum"),
    (".weight", "modules_to_save: a full weight, no low-rank update"),
)


@dataclass
class _Layer:
    """Keys of one module's tensors, gathered by part."""

    module: str
    keys: dict[str, str] = field(default_factory=dict)

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
    kind: Kind
    scale: float
    key_m: str | None
    groups: int


class PeftStore(Store):
    """The updates of one LoRA adapter.

    Args:
        path: the adapter's folder.
        base: the base model's checkpoint; needed for the whole update of DoRA layers and for ``weight(name)``.
        device: where updates are put.

    Raises:
        FormatError: not a LoRA adapter, a damaged file, a pair with one half, or factors that do not multiply.
    """

    kind = "peft"

    def __init__(self, path: Path, base: Path | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__(path, device)
        self.config: AdapterConfig = read_adapter_config(path / CONFIG_NAME)
        self._file = open_tensors(_weights_file(path))
        self.notes += self.config.notes()
        self._factors: dict[str, _Factors] = {}
        self._claims: list[tuple[str, int, int]] = []
        layers = self._gather()
        for layer in layers:
            with located(f"{self._file.path}: layer {layer.module}"):
                self._add(layer)
        if not self._infos:
            seen = f"; skipped {self.skipped[0].name}: {self.skipped[0].reason}" if self.skipped else ""
            raise FormatError(f"{self._file.path}: holds no LoRA layer that can be read{seen}")
        self._note_oddities()
        self._weights: BaseWeights | None = None
        if base is not None:
            shapes = {name: info.shape for name, info in self._infos.items() if self._factors[name].groups == 1}
            self._weights = BaseWeights(base, shapes, bool(self.config.fan_in_fan_out))
        self._add_wholes()

    def _gather(self) -> list[_Layer]:
        """Layers with their keys; every other key is listed as skipped."""
        layers: dict[str, _Layer] = {}
        adapters = set()
        for key in sorted(self._file.infos, key=natural_key):
            parsed = parse_key(key)
            if parsed is None or not _is_factor(parsed.part, parsed.leaf):
                bias = parsed is not None and parsed.part == "lora_B" and parsed.leaf == "bias"
                self._skip(bare_module(key), _reason(".lora_B.bias" if bias else key))
                continue
            adapters.add(parsed.adapter)
            layer = layers.setdefault(parsed.module, _Layer(parsed.module))
            if layer.keys.setdefault(parsed.part, key) != key:
                raise FormatError(
                    f"{self._file.path}: {parsed.module} has {parsed.part} twice, as {layer.keys[parsed.part]} and "
                    f"{key}; save one adapter only"
                )
        if len(adapters) > 1:
            names = ", ".join(sorted(repr(name) for name in adapters))
            raise FormatError(f"{self._file.path}: holds the adapters {names}; save one only")
        return list(layers.values())

    def _add(self, layer: _Layer) -> None:
        module = layer.module
        if set(layer.keys) == {"lora_magnitude_vector"}:
            self._skip(module, "a DoRA magnitude without factors")
            return
        if self.config.targets_parameter_of(module):
            self._skip(module, "target_parameters: factors of a bare parameter (stacked experts) are not read")
            return
        key_a, key_b = layer.pair()
        A, B = self._file.infos[key_a], self._file.infos[key_b]
        kind, shape = _geometry(A, B, layer.embedding)
        rank = A.shape[0]
        key_m = layer.keys.get("lora_magnitude_vector")
        if key_m is not None:
            _check_magnitude(self._file.infos[key_m], shape, kind)
        groups = rank // B.shape[1] if kind == "conv" else 1
        factors = _Factors(key_a, key_b, kind, self.config.scale(module, rank), key_m, groups)
        self._factors[module] = factors
        self._infos[module] = UpdateInfo(shape, rank, factors.scale, A.dtype, "dora-product" if key_m else "lora")
        claimed = self.config.rank(module)
        if claimed is not None and claimed != rank:
            self._claims.append((module, claimed, rank))

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
                f"{CONFIG_NAME} gives another rank than the tensors in {len(self._claims)} of {len(self._infos)} "
                f"layers (first {module}: {claimed}, in fact {rank}); the tensors are trusted, also for the scale"
            )
        dora = sum(factors.key_m is not None for factors in self._factors.values())
        if bool(self.config.use_dora) != bool(dora):
            self.notes.append(f"{CONFIG_NAME} has use_dora {self.config.use_dora}, but {dora} layers have a magnitude")

    def _add_wholes(self) -> None:
        """The whole update of every DoRA layer, or the reason why there is none."""
        dora = [name for name, factors in self._factors.items() if factors.key_m is not None]
        for module in dora:
            if self._factors[module].groups > 1:
                self._skip(module + WHOLE, "DoRA of a grouped convolution: PEFT's norm there is of no weight's rows")
            elif self._weights is None:
                self._skip(module + WHOLE, "DoRA: the whole update needs --base")
            elif module not in self._weights:
                self._skip(module + WHOLE, "DoRA: the base has no weight for it")
            elif module + WHOLE in self._infos:
                raise FormatError(f"{self._file.path}: a module is called {module + WHOLE}; rename it")
            else:
                shape = self._infos[module].shape
                self._infos[module + WHOLE] = UpdateInfo(shape, None, 1.0, torch.float32, "dora")
        if dora:
            self.notes.append(
                f"DoRA in {len(dora)} layers: NAME is the product scale·B·A, NAME{WHOLE} the whole update"
            )

    def _read(self, name: str) -> Update:
        if name in self._factors:
            return self._product(name).to(self.device)
        return self._whole(name.removesuffix(WHOLE))

    def _product(self, module: str) -> LowRank:
        factors = self._factors[module]
        A, B = _floats(self._file.read(factors.key_a)), _floats(self._file.read(factors.key_b))
        if factors.kind == "embedding":  # the (vocabulary, dim) weight changes by (BA)ᵀ
            return LowRank(A.T, B.T, factors.scale)
        if factors.kind == "conv":
            return LowRank(_block_diagonal(B.flatten(1), factors.groups), A.flatten(1), factors.scale)
        return LowRank(B, A, factors.scale)

    def _whole(self, module: str) -> Dense:
        """m·(W0 + sBA)/‖W0 + sBA‖ − W0, the norm per output (per dimension of an embedding): DoRA, eq. 5."""
        factors, weight = self._factors[module], self._read_weight(module)
        if factors.key_m is None or weight is None:
            raise FormatError("has no whole update")
        exact = working_dtype(self.device)
        magnitude = self._file.read(factors.key_m).flatten()
        check_finite(_floats(magnitude), "the magnitude")
        product = self._product(module).to(self.device)
        start = weight.to(self.device).to(exact)
        moved = start + product.left @ product.right
        over_columns = factors.kind != "embedding"
        norms = torch.linalg.vector_norm(moved, dim=1 if over_columns else 0, keepdim=True)
        m = magnitude.to(self.device).to(exact)
        return Dense((m[:, None] if over_columns else m[None, :]) / norms * moved - start)

    def _read_weight(self, name: str) -> Tensor | None:
        return self._weights.matrix(name.removesuffix(WHOLE)) if self._weights else None


def _weights_file(folder: Path) -> Path:
    for name in (WEIGHTS_NAME, OLD_WEIGHTS_NAME):
        if (folder / name).exists():
            return folder / name
    raise FormatError(f"{folder}: has {CONFIG_NAME} but neither {WEIGHTS_NAME} nor {OLD_WEIGHTS_NAME}")


def _is_factor(part: str, leaf: str) -> bool:
    if part == "lora_magnitude_vector":
        return leaf != "bias"
    return leaf == ("" if part.startswith("lora_embedding") else "weight")


def _reason(key: str) -> str:
    for mark, reason in OTHER_KEYS:
        if key.endswith(mark) or (mark == "trainable_tokens" and mark in key):
            return reason
    return "unknown key"


def _geometry(A: TensorInfo, B: TensorInfo, embedding: bool) -> tuple[Kind, tuple[int, int]]:
    """Kind of layer and (out, in) of its update, from the shapes of its factors.

    Raises:
        FormatError: they do not multiply, are empty, or are not floating-point.
    """
    shapes = f"A {A.shape} and B {B.shape}"
    for info in (A, B):
        if not info.dtype.is_floating_point:
            raise FormatError(f"{shapes} are stored as {A.dtype} and {B.dtype}; factors are floating-point numbers")
    if 0 in A.shape or 0 in B.shape:
        raise FormatError(f"{shapes} have an empty side")
    if len(A.shape) == len(B.shape) == 2 and A.shape[0] == B.shape[1]:
        return ("embedding", (A.shape[1], B.shape[0])) if embedding else ("linear", (B.shape[0], A.shape[1]))
    if not embedding and _is_convolution(A.shape, B.shape):
        columns = torch.Size(A.shape[1:]).numel()
        return "conv", (B.shape[0], columns)
    raise FormatError(f"{shapes} do not multiply; expected (r, in) and (out, r)")


def _is_convolution(A: tuple[int, ...], B: tuple[int, ...]) -> bool:
    """A (r, in, kh, kw) and B (out, r/groups, 1, 1), or with one, or three, dimensions of kernel."""
    if not 3 <= len(A) <= 5 or len(B) != len(A) or any(size != 1 for size in B[2:]) or A[0] % B[1]:
        return False
    return B[0] % (A[0] // B[1]) == 0


def _block_diagonal(B: Tensor, groups: int) -> Tensor:
    """B (out, r/groups) spread to (out, r): the outputs of a group see the r/groups rows of A of that group."""
    blocks = B.reshape(groups, -1, B.shape[1])
    spread = blocks.new_zeros(groups, blocks.shape[1], groups, blocks.shape[2])
    spread.diagonal(dim1=0, dim2=2).copy_(blocks.permute(1, 2, 0))
    return spread.reshape(B.shape[0], -1)


def _check_magnitude(info: TensorInfo, shape: tuple[int, int], kind: Kind) -> None:
    expected = shape[1] if kind == "embedding" else shape[0]
    if torch.Size(info.shape).numel() != expected or not info.dtype.is_floating_point:
        raise FormatError(f"its magnitude is {info.shape}, but the update {shape} needs {expected} numbers")


def _floats(tensor: Tensor) -> Tensor:
    """Eight-bit floats, which torch can hardly compute with, to float32; all else as stored."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor
