"""Full checkpoints: one file, a folder, or shards behind an index. Headers first, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rankscope.errors import FormatError, prefix_errors
from rankscope.formats.abstract_store import examples
from rankscope.formats.file_io import TensorFile, TensorInfo, read_json
from rankscope.formats.hub import local_path
from rankscope.formats.names import WEIGHT_SUFFIX, pair_names
from rankscope.formats.peft_keys import OLD_WEIGHTS_NAME, WEIGHTS_NAME
from rankscope.formats.pickle_file import PickledFile, open_tensors
from rankscope.formats.quantized import (
    QUANTIZATION_CONFIG,
    SCALED_MARKER,
    QuantizedWeight,
    find_quantized,
    find_unread_layout,
)
from rankscope.formats.study_layout import UPDATES_NAME

INDEX_SUFFIX = ".index.json"
MODEL_CONFIG = "config.json"
NOT_CHECKPOINTS = {WEIGHTS_NAME, OLD_WEIGHTS_NAME, UPDATES_NAME}
# In the order in which transformers prefers them, and any single file or index (diffusers' names).
FOLDER_PATTERNS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "*.safetensors.index.json",
    "*.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# transformers' Conv1D stores (in, out): the modules and the model types that use it (pytorch_utils.Conv1D).
CONV1D_NAME = re.compile(r"(?:^|\.)(?:c_attn|q_attn|c_proj|c_fc)\.weight$")
CONV1D_WIDENS = re.compile(r"(?:^|\.)(?:c_attn|c_fc)\.weight$")
CONV1D_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}


class Checkpoint:
    """Every tensor of a model on disk: ``infos`` now, tensors one at a time.

    ``conv1d`` says whether GPT-2's projections are stored (in, out); None where that is not known. ``quantized`` has
    the weights that are stored as codes and scales: ``infos`` has their own shape, as bfloat16, and no scales; ``read``
    gives them dequantised in float32.

    Raises:
        FormatError: there is no checkpoint, a file is damaged, or the index names tensors that its shards do not hold.
    """

    def __init__(self, path: Path) -> None:
        path = local_path(path)
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, TensorFile | PickledFile] = {}
        source = checkpoint_file(path)
        for file in _open_files(source):
            self.infos.update(file.infos)
            self._files.update(dict.fromkeys(file.infos, file))
        if not self.infos:
            raise FormatError(f"{path}: holds no tensors")
        self.unread_layout = find_unread_layout(self.infos)
        self.quantized = self._find_quantized(source.parent)
        self._scales = {part for weight in self.quantized.values() for part in weight.parts}
        self._scales |= {name for name in self.infos if self.quantized and name.split(".")[-1] == SCALED_MARKER}
        logical = {name: TensorInfo(weight.shape, torch.bfloat16) for name, weight in self.quantized.items()}
        self.infos = {name: info for name, info in (self.infos | logical).items() if name not in self._scales}
        self.conv1d = _stores_conv1d(self.infos, source.parent)

    def _find_quantized(self, folder: Path) -> dict[str, QuantizedWeight]:
        """The weights that are stored as codes and scales."""
        if all(info.dtype.itemsize > 1 for info in self.infos.values()):
            return {}
        config = read_model_config(folder).get(QUANTIZATION_CONFIG)
        with prefix_errors(self.path):
            return find_quantized(self.infos, config if isinstance(config, dict) else {}, self._read_stored)

    @property
    def quantization_note(self) -> str | None:
        """How the quantised weights are read, in one sentence; None where there are none."""
        schemes = sorted({weight.scheme for weight in self.quantized.values()})
        if not schemes:
            return None
        return f"{self.path}: {len(self.quantized)} weights are dequantised from {' and '.join(schemes)}"

    def check_readable(self) -> None:
        """Raise FormatError, with the name of the layout, where weights are quantised in one that is not read."""
        if self.unread_layout:
            raise FormatError(
                f"{self.path}: is quantised as {self.unread_layout}, which is not read; dequantize it first"
            )

    @property
    def scales(self) -> frozenset[str]:
        """The stored tensors that belong to quantised weights and are not in ``infos``."""
        return frozenset(self._scales)

    def rounding(self, name: str) -> float:
        """Root mean square of the error per entry that quantising this weight can have left; 0 if it is not."""
        with prefix_errors(f"{self.path}: {name}"):
            return self.quantized[name].read(self._read_stored).rounding() if name in self.quantized else 0.0

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that the tensors lie in."""
        return tuple(sorted({file.path for file in self._files.values()}))

    def read(self, name: str) -> Tensor:
        """The tensor as stored: (rows, columns, …), stored dtype; float32 where it is dequantised."""
        if name not in self.quantized:
            return self._read_stored(name)
        with prefix_errors(f"{self.path}: {name}"):
            return self.quantized[name].read(self._read_stored).dequantize()

    def _read_stored(self, name: str) -> Tensor:
        return self._files[name].read(name)

    def read_blocks(self, name: str, rows: int, step: int) -> Iterator[Tensor]:
        """The first ``rows`` rows as stored, in matrices (at most ``step``, columns).

        Those of a safetensors file are read into memory of their own, not mapped.
        """
        file = self._files[name]
        by_rows = isinstance(file, TensorFile) and name not in self.quantized
        whole = None if by_rows else self.read(name)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = cast(TensorFile, file).read_rows(name, start, stop) if whole is None else whole[start:stop]
            yield part.reshape(len(part), -1)

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of ``matrix(name)``, from the header."""
        rows, *rest = self.infos[name].shape or (1,)
        columns = 1
        for size in rest:
            columns *= size
        return (columns, rows) if self.is_transposed(name) else (rows, columns)

    def matrix(self, name: str) -> Tensor:
        """The weight as (out, in): Conv1D transposed, convolution kernels flattened; stored dtype."""
        tensor = self.read(name)
        flat = tensor.reshape(tensor.shape[0], -1)
        return flat.T if self.is_transposed(name) else flat

    def is_transposed(self, name: str) -> bool:
        """Whether it is stored (in, out)."""
        return bool(self.conv1d) and len(self.infos[name].shape) == 2 and CONV1D_NAME.search(name) is not None


class BaseWeights:
    """The pre-trained weights (out, in) behind updates whose own file does not hold them.

    ``shapes`` maps module paths to (out, in) of their updates. ``fan_in_fan_out`` decides for square weights
    where the checkpoint itself does not show how they are stored.

    Raises:
        FormatError: the base has no weight for any module, or one that does not fit its update.
    """

    def __init__(self, base: Path, shapes: Mapping[str, tuple[int, int]], fan_in_fan_out: bool = False) -> None:
        self._checkpoint = Checkpoint(base)
        self._checkpoint.check_readable()
        wanted = {module + WEIGHT_SUFFIX: module for module in shapes}
        pairing = pair_names(wanted, self._checkpoint.infos)
        if wanted and not pairing.pairs:
            raise FormatError(
                f"{base}: has no weight for any of the layers {examples(list(shapes))}; it holds "
                f"{examples(pairing.only_b)}; is this the base that was tuned?"
            )
        self._tensors = {wanted[ours]: theirs for ours, theirs in pairing.pairs}
        self._transposed = {
            module: self._needs_transpose(module, tensor, shapes[module], fan_in_fan_out)
            for module, tensor in self._tensors.items()
        }

    def _needs_transpose(self, module: str, tensor: str, shape: tuple[int, int], fan_in_fan_out: bool) -> bool:
        """Whether the checkpoint's matrix must still be transposed to fit its update."""
        reason = non_matrix_reason(self._checkpoint.infos[tensor], stacks=True)
        if reason:
            raise FormatError(f"{self._checkpoint.path}: {tensor} cannot serve as base weight ({reason})")
        base_shape = self._checkpoint.matrix_shape(tensor)
        if base_shape not in (shape, shape[::-1]):
            raise FormatError(
                f"{self._checkpoint.path}: {tensor} is {base_shape[0]} × {base_shape[1]}, but the update of {module} "
                f"is {shape[0]} × {shape[1]}; is this the base that was tuned?"
            )
        if base_shape[0] != base_shape[1]:
            return base_shape != shape
        return fan_in_fan_out and self._checkpoint.conv1d is None

    def __contains__(self, module: str) -> bool:
        return module in self._tensors

    @property
    def notes(self) -> list[str]:
        """How quantised weights are read, where there are any."""
        note = self._checkpoint.quantization_note
        return [note] if note else []

    def matrix(self, module: str) -> Tensor | None:
        """The weight (out, in) in its stored dtype; None where the base has none."""
        if module not in self._tensors:
            return None
        weight = self._checkpoint.matrix(self._tensors[module])
        return weight.T if self._transposed[module] else weight


def non_matrix_reason(info: TensorInfo, stacks: bool = False) -> str | None:
    """Why a tensor is no matrix to analyse, or None. ``stacks`` lets three dimensions pass (Conv1d kernels)."""
    stored = str(info.dtype).removeprefix("torch.")
    if not info.dtype.is_floating_point:
        return f"stored as {stored}: not a floating-point weight; dequantize it first"
    if info.dtype.itemsize == 1:
        return f"stored as {stored}: eight bits mean nothing without their scales; dequantize it first"
    if len(info.shape) < 2:
        return "one-dimensional: no spectrum"
    if len(info.shape) == 3 and not stacks:
        return f"three-dimensional {info.shape}: a stack of matrices is not read"
    return f"empty {info.shape}" if 0 in info.shape else None


def checkpoint_file(path: Path) -> Path:
    """The file of weights, or the index of shards, at ``path``.

    Raises:
        FormatError: there is none, or there are several and no index.
    """
    if not path.exists():
        raise FormatError(f"{path}: no such file or folder")
    if not path.is_dir():
        return path
    for pattern in FOLDER_PATTERNS:
        files = sorted(file for file in path.glob(pattern) if file.name not in NOT_CHECKPOINTS)
        if len(files) == 1:
            return files[0]
        if files:
            raise FormatError(
                f"{path}: holds {len(files)} weight files and no index ({files[0].name}, {files[1].name}, …); "
                "give the one that is meant"
            )
    raise FormatError(
        f"{path}: holds no weights; looked for model.safetensors, model.safetensors.index.json, "
        "any single .safetensors file and pytorch_model.bin"
    )


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds anything that ``checkpoint_file`` would look at."""
    return any(file.name not in NOT_CHECKPOINTS for pattern in FOLDER_PATTERNS for file in folder.glob(pattern))


def _open_files(source: Path) -> Iterator[TensorFile | PickledFile]:
    if not source.name.endswith(INDEX_SUFFIX):
        yield open_tensors(source)
        return
    weight_map = read_json(source).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError(f"{source}: has no weight_map from tensor names to shard names; it is not an index")
    for shard in sorted(set(weight_map.values())):
        file = open_tensors(_shard_path(source, shard))
        missing = [name for name, where in weight_map.items() if where == shard and name not in file.infos]
        if missing:
            raise FormatError(f"{source}: says that {missing[0]} is in {shard}, which does not hold it")
        yield file


def _shard_path(index: Path, shard: str) -> Path:
    """The shard's path, refused where it leads out of the index's folder.

    The hub's cache is a folder of links into ``blobs/`` two levels up: links to there are allowed.
    """
    folder = index.parent
    refused = FormatError(f"{index}: names the shard {shard!r}, which is outside its folder; refused")
    try:
        target, home = (folder / shard).resolve(), folder.resolve()
        if Path(shard).is_absolute() or ".." in Path(shard).parts or not shard:
            raise refused
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
            raise refused
    except (OSError, ValueError, RuntimeError) as error:  # a name with a null byte; a loop of links
        raise refused from error
    return folder / shard


def read_model_config(folder: Path) -> dict[str, Any]:
    """The configuration of the model in a folder, empty where there is none.

    Raises:
        FormatError: there is one, but it cannot be read.
    """
    file = folder / MODEL_CONFIG
    return read_json(file) if file.is_file() else {}


def _stores_conv1d(infos: dict[str, TensorInfo], folder: Path) -> bool | None:
    """Whether the projections that Conv1D is used for are stored (in, out).

    c_attn and c_fc always have more outputs than inputs, so their shape decides, whatever the configuration says:
    nanoGPT uses the same names for ordinary layers. The model type decides only where no such weight is present.
    """
    for name, info in infos.items():
        if CONV1D_WIDENS.search(name) and len(info.shape) == 2 and info.shape[0] != info.shape[1]:
            return info.shape[1] > info.shape[0]
    if any(CONV1D_NAME.search(name) for name in infos):
        return True if str(read_model_config(folder).get("model_type")) in CONV1D_TYPES else None
    return None
