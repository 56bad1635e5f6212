"""What the stores of all adapters in PEFT's layout share: tensors beside the factors, as differences from the base."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.abstract_store import Store, StoredTensors, UpdateInfo
from rankscope.formats.checkpoint import CONV1D_NAME, Checkpoint, non_matrix_reason
from rankscope.formats.checkpoint_store import VOCABULARY_LAYERS
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.names import WEIGHT_SUFFIX, pair_names
from rankscope.formats.peft_folder import SAVED_MODULE_REASON, TOKEN_ROWS_REASON, PeftFolder, StoredTensor
from rankscope.formats.peft_keys import CONFIG_NAME, ParsedKey, parse_factor_key, strip_peft_prefix
from rankscope.formats.recipes import upcast_float8
from rankscope.updates import Dense, LowRank, Update


class BaseCheckpoint:
    """The tensors of the base checkpoint, by the names that the adapter has for them.

    Raises:
        FormatError: it cannot be read.
    """

    def __init__(self, base: Path, names: Iterable[str]) -> None:
        self.checkpoint = Checkpoint(base)
        self.checkpoint.check_readable()
        self._tensors = dict(pair_names(set(names), self.checkpoint.infos).pairs)

    def info(self, name: str) -> TensorInfo | None:
        """The header of a tensor (``layers.0.q.weight``), None where the base has none of that name."""
        return self.checkpoint.infos[self._tensors[name]] if name in self._tensors else None

    def shape(self, name: str, fan_in_fan_out: bool = False) -> tuple[int, int] | None:
        """(out, in) of a matrix; ``fan_in_fan_out`` decides where the checkpoint does not show how it is stored."""
        info = self.info(name)
        if info is None or non_matrix_reason(info, stacks=True):
            return None
        shape = self.checkpoint.matrix_shape(self._tensors[name])
        return shape[::-1] if fan_in_fan_out and self.checkpoint.conv1d is None else shape

    def read(self, name: str) -> Tensor:
        """The tensor as stored."""
        return self.checkpoint.read(self._tensors[name])

    def matrix(self, name: str) -> Tensor:
        """The tensor as a matrix (out, in), stored dtype."""
        return self.checkpoint.matrix(self._tensors[name])


class AdapterStore(Store):
    """The updates of one adapter; ``_put`` gives a name its info and the functions of a store that read it.

    The functions get the store as their argument. If they held it, the cycle of references would keep the file mapped
    after the store's last use, until Python's garbage collector runs.
    """

    kind = "peft"

    def __init__(
        self,
        path: Path,
        device: torch.device | str = "cpu",
        parse: Callable[[str], ParsedKey | None] = parse_factor_key,
    ) -> None:
        super().__init__(path, device)
        self.folder = PeftFolder.open(path, parse)
        self._file = self.folder.file
        self._readers: dict[str, Callable[[Any], Update]] = {}
        self._origins: dict[str, Callable[[Any], Tensor | None]] = {}
        self._others = list(self.folder.others)

    def stored_tensors(self) -> StoredTensors:
        return StoredTensors(self._file.infos, (self._file.path,))

    def base_name(self) -> str | None:
        name = self.folder.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def _put(
        self,
        name: str,
        info: UpdateInfo,
        read: Callable[[Any], Update],
        weight: Callable[[Any], Tensor | None] | None = None,
    ) -> None:
        if name in self._infos:
            raise FormatError(f"{self._file.path}: two parts of it are called {name}; rename one of the modules")
        self._infos[name], self._readers[name] = info, read
        if weight is not None:
            self._origins[name] = weight

    def _read(self, name: str) -> Update:
        return self._readers[name](self).to(self.device)

    def _read_weight(self, name: str) -> Tensor | None:
        return self._origins[name](self) if name in self._origins else None

    def _add_others(self, origin: BaseCheckpoint | None, indices: object) -> None:
        """Add whole weights and token rows as updates where the base has them; every other tensor is skipped."""
        weights = {tensor.key for tensor in self.folder.whole.values() if tensor.kind == "weight"}
        for tensor in self._others:
            reason: str | None = tensor.reason
            if origin is not None and tensor.key in weights:
                reason = self._add_whole(tensor, origin)
            elif origin is not None and tensor.kind == "token rows":
                reason = self._add_tokens(tensor, origin, indices)
            elif origin is None and reason in (SAVED_MODULE_REASON, TOKEN_ROWS_REASON):
                reason = f"{reason}; with --base it is read as tuned − base"
            if reason is not None:
                self._skip(strip_peft_prefix(tensor.key), reason)

    def _add_whole(self, tensor: StoredTensor, origin: BaseCheckpoint) -> str | None:
        """Add tuned − base of a module that was trained whole, or return why there is none."""
        key, name = tensor.key, tensor.name
        info, base_info = self._file.infos[key], origin.info(name)
        if base_info is None:
            return f"{SAVED_MODULE_REASON}; the base has no {name}"
        reason = non_matrix_reason(info) or non_matrix_reason(base_info)
        if reason:
            return f"modules_to_save: {reason}"
        rows = None
        if info.shape != base_info.shape:
            if info.shape[1:] != base_info.shape[1:] or not VOCABULARY_LAYERS.search(name):
                return f"modules_to_save: its shape is {info.shape}, that in the base {base_info.shape}"
            rows = min(info.shape[0], base_info.shape[0])
            self.notes.append(
                f"{name}: {info.shape[0]} rows, {base_info.shape[0]} in the base; the first {rows} are compared"
            )
        transposed = bool(origin.checkpoint.conv1d) and len(info.shape) == 2 and CONV1D_NAME.search(name) is not None

        def read(store: AdapterStore) -> Dense:
            tuned = store._file.read(key).flatten(1)
            return Dense.difference((tuned.T if transposed else tuned)[:rows], origin.matrix(name)[:rows])

        out, into = origin.shape(name) or (0, 0)
        update_info = UpdateInfo((rows or out, into), None, 1.0, info.dtype, "full")
        self._put(name.removesuffix(WEIGHT_SUFFIX), update_info, read, lambda _: origin.matrix(name)[:rows])
        return None

    def _add_tokens(self, tensor: StoredTensor, origin: BaseCheckpoint, indices: object) -> str | None:
        """Add the changed rows of an embedding, as a product with their places, or return why there is none."""
        key, module = tensor.key, tensor.name
        info = self._file.infos[key]
        shape, places = origin.shape(module + WEIGHT_SUFFIX), _token_indices(indices, module)
        if shape is None or len(info.shape) != 2 or info.shape[1] != shape[1]:
            return f"{TOKEN_ROWS_REASON}; the base has no embedding that they fit"
        if len(places) != info.shape[0] or not places or len({*places}) < len(places):
            return f"{TOKEN_ROWS_REASON}; {CONFIG_NAME} does not tell which rows they are"
        if not all(0 <= place < shape[0] for place in places):
            return f"{TOKEN_ROWS_REASON}; the base has {shape[0]} rows, none for {max(places)}"

        def read(store: AdapterStore) -> LowRank:
            rows = upcast_float8(store._file.read(key)).float() - origin.matrix(module + WEIGHT_SUFFIX)[places].float()
            where = torch.zeros(shape[0], len(places))
            where[places, torch.arange(len(places))] = 1.0
            return LowRank(where, rows)

        name = module if module not in self._infos else f"{module}:tokens"
        update_info = UpdateInfo(shape, len(places), 1.0, info.dtype, "tokens")
        self._put(name, update_info, read, lambda _: origin.matrix(module + WEIGHT_SUFFIX))
        return None


def tensor_names_in_base(tensors: Iterable[StoredTensor]) -> set[str]:
    """Names in the base of tensors that were trained whole and of embeddings with trained rows."""
    return {tensor.name + (WEIGHT_SUFFIX if tensor.kind == "token rows" else "") for tensor in tensors}


def _token_indices(indices: object, module: str) -> list[int]:
    """Rows of a module's embedding that were trained; a plain list is the input embedding's. Empty if unknown."""
    if isinstance(indices, dict):
        indices = next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), None)
    if isinstance(indices, list) and all(isinstance(row, int) for row in indices):
        return indices
    return []
