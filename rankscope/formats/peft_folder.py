"""What all adapters in PEFT's folder layout share: the file, what is in it besides factors, and the base."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.abstract_store import Store, UpdateInfo
from rankscope.formats.checkpoint import CONV1D_NAME, Checkpoint, non_matrix_reason
from rankscope.formats.checkpoint_store import VOCABULARY_LAYERS
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.names import WEIGHT_SUFFIX, natural_key, pair_names
from rankscope.formats.peft_keys import CONFIG_NAME, OLD_WEIGHTS_NAME, WEIGHTS_NAME, ParsedKey, strip_peft_prefix
from rankscope.formats.pickle_file import open_tensors
from rankscope.formats.recipes import upcast_float8
from rankscope.updates import Dense, LowRank, Update

SAVED_MODULE_REASON = "modules_to_save: a full weight, no low-rank update"
TOKEN_ROWS_REASON = "trainable token rows: full rows of an embedding, no low-rank update"

# Keys that are no factors; the first pattern that is found gives the reason.
SKIP_REASONS = (
    (re.compile(r"\.lora_B\.(?:.+\.)?bias$"), "lora_bias: the bias of B changes the layer's bias, not its weight"),
    (re.compile(r"trainable_tokens"), TOKEN_ROWS_REASON),
    (re.compile(r"base_layer\.weight$"), "the base weight, saved along"),
    (re.compile(r"original_module\.weight$"), "the untrained copy of a whole module"),
    (re.compile(r"\.bias$"), "a bias: one-dimensional, no spectrum"),
    (re.compile(r"\.weight$"), SAVED_MODULE_REASON),
)
_SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+)?(?=\.)")  # a live state dict's wrapper, with the adapter's name
_TOKENS = re.compile(r"(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?$")


class BaseCheckpoint:
    """The base checkpoint as an adapter sees it: its tensors by the names that the adapter has for them.

    Raises:
        FormatError: it cannot be read.
    """

    def __init__(self, base: Path, names: Iterable[str]) -> None:
        self.checkpoint = Checkpoint(base)
        self._tensors = dict(pair_names(set(names), self.checkpoint.infos).pairs)

    def info(self, name: str) -> TensorInfo | None:
        """The header of a tensor (``layers.0.q.weight``), None where the base has none of that name."""
        return self.checkpoint.infos[self._tensors[name]] if name in self._tensors else None

    def shape(self, name: str, fan_in_fan_out: bool = False) -> tuple[int, int] | None:
        """(out, in) of a matrix; ``fan_in_fan_out`` decides where the checkpoint does not tell how it is stored."""
        info = self.info(name)
        if info is None or non_matrix_reason(info, stacks=True):
            return None
        found = self.checkpoint.matrix_shape(self._tensors[name])
        return found[::-1] if fan_in_fan_out and self.checkpoint.conv1d is None else found

    def read(self, name: str) -> Tensor:
        """The tensor as stored."""
        return self.checkpoint.read(self._tensors[name])

    def matrix(self, name: str) -> Tensor:
        """The tensor as a matrix (out, in), stored dtype."""
        return self.checkpoint.matrix(self._tensors[name])


class AdapterStore(Store):
    """The updates of one adapter; ``_put`` gives a name its info and the functions of a store that read it.

    They are given the store when they are called: if they held it, it would keep its file mapped after its last use,
    until Python looks for cycles.
    """

    kind = "peft"

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        super().__init__(path, device)
        self._file = open_tensors(weights_file(path))
        self._readers: dict[str, Callable[[Any], Update]] = {}
        self._origins: dict[str, Callable[[Any], Tensor | None]] = {}
        self._others: list[str] = []

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

    def _gather(self, parse: Callable[[str], ParsedKey | None]) -> dict[str, dict[str, str]]:
        """Keys by module and part; all that ``parse`` knows nothing of is kept in ``_others``.

        Raises:
            FormatError: the file holds more than one adapter.
        """
        layers: dict[str, dict[str, str]] = defaultdict(dict)
        adapters = set()
        for key in sorted(self._file.infos, key=natural_key):
            parsed = parse(key)
            if parsed is None:
                self._others.append(key)
                continue
            adapters.add(parsed.adapter)
            keys = layers[parsed.module]
            if keys.setdefault(parsed.part, key) != key:
                raise FormatError(
                    f"{self._file.path}: {parsed.module} has {parsed.part} twice, as {keys[parsed.part]} and "
                    f"{key}; save one adapter only"
                )
        if len(adapters) > 1:
            names = ", ".join(sorted(repr(name) for name in adapters))
            raise FormatError(f"{self._file.path}: holds the adapters {names}; save one only")
        return dict(layers)

    def _other_names(self) -> set[str]:
        """Names in the base of what the adapter holds besides factors."""
        found = {base_tensor_name(key) for key in self._others}
        return found | {_token_module(key) + WEIGHT_SUFFIX for key in self._others if _TOKENS.search(key)}

    def _add_others(self, origin: BaseCheckpoint | None, indices: object) -> None:
        """Whole weights and token rows as updates where the base has them; all else is listed."""
        for key in self._others:
            reason: str | None = _reason(key)
            if origin is not None and reason == SAVED_MODULE_REASON:
                reason = self._add_whole(key, origin)
            elif origin is not None and reason == TOKEN_ROWS_REASON and _TOKENS.search(key):
                reason = self._add_tokens(key, origin, indices)
            elif reason in (SAVED_MODULE_REASON, TOKEN_ROWS_REASON):
                reason = f"{reason}; with --base it is read as tuned − base"
            if reason is not None:
                self._skip(strip_peft_prefix(key), reason)

    def _add_whole(self, key: str, origin: BaseCheckpoint) -> str | None:
        """Tuned − base of a module that was trained whole, or the reason why there is none."""
        name, info = base_tensor_name(key), self._file.infos[key]
        found = origin.info(name)
        if found is None:
            return f"{SAVED_MODULE_REASON}; the base has no {name}"
        reason = non_matrix_reason(info) or non_matrix_reason(found)
        if reason:
            return f"modules_to_save: {reason}"
        rows = None
        if info.shape != found.shape:
            if info.shape[1:] != found.shape[1:] or not VOCABULARY_LAYERS.search(name):
                return f"modules_to_save: its shape is {info.shape}, that in the base {found.shape}"
            rows = min(info.shape[0], found.shape[0])
            self.notes.append(
                f"{name}: {info.shape[0]} rows, {found.shape[0]} in the base; the first {rows} are compared"
            )
        turned = bool(origin.checkpoint.conv1d) and len(info.shape) == 2 and CONV1D_NAME.search(name) is not None

        def read(store: AdapterStore) -> Dense:
            tuned = store._file.read(key).flatten(1)
            return Dense.difference((tuned.T if turned else tuned)[:rows], origin.matrix(name)[:rows])

        out, into = origin.shape(name) or (0, 0)
        told = UpdateInfo((rows or out, into), None, 1.0, info.dtype, "full")
        self._put(name.removesuffix(WEIGHT_SUFFIX), told, read, lambda _: origin.matrix(name)[:rows])
        return None

    def _add_tokens(self, key: str, origin: BaseCheckpoint, indices: object) -> str | None:
        """The changed rows of an embedding, as a product with their places, or the reason why there is none."""
        module, info = _token_module(key), self._file.infos[key]
        shape, places = origin.shape(module + WEIGHT_SUFFIX), _indices(indices, module)
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
        told = UpdateInfo(shape, len(places), 1.0, info.dtype, "tokens")
        self._put(name, told, read, lambda _: origin.matrix(module + WEIGHT_SUFFIX))
        return None


def weights_file(folder: Path) -> Path:
    """The adapter's weights.

    Raises:
        FormatError: there are none.
    """
    for name in (WEIGHTS_NAME, OLD_WEIGHTS_NAME):
        if (folder / name).exists():
            return folder / name
    raise FormatError(f"{folder}: has {CONFIG_NAME} but neither {WEIGHTS_NAME} nor {OLD_WEIGHTS_NAME}")


def _reason(key: str) -> str:
    return next((reason for pattern, reason in SKIP_REASONS if pattern.search(key)), "unknown key")


def base_tensor_name(key: str) -> str:
    """The name in the base of a tensor that was saved whole, under whatever live adapter name."""
    return _SAVED.sub("", strip_peft_prefix(key))


def _token_module(key: str) -> str:
    return strip_peft_prefix(_TOKENS.sub("", key))


def _indices(indices: object, module: str) -> list[int]:
    """Rows of a module's embedding that were trained; a plain list is the input embedding's. Empty if not told."""
    if isinstance(indices, dict):
        indices = next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), None)
    if isinstance(indices, list) and all(isinstance(row, int) for row in indices):
        return indices
    return []
