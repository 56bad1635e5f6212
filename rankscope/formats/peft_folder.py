"""The tensors of one folder in PEFT's layout, by the names of the base model; only this module sorts an adapter's keys.

A saved adapter has keys without its name; a state dict of a running model has them with it
(``lora_A.mine.weight``, ``score.modules_to_save.mine.weight``), and its frozen weights besides. With ``bias="all"``
PEFT saves the bias of a module in ``modules_to_save`` under both kinds of key.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from rankscope.errors import FormatError
from rankscope.formats.file_io import TensorFile, read_json
from rankscope.formats.names import natural_key
from rankscope.formats.peft_keys import (
    CONFIG_NAME,
    OLD_WEIGHTS_NAME,
    PEFT_PREFIX,
    WEIGHTS_NAME,
    ParsedKey,
    parse_factor_key,
    strip_peft_prefix,
)
from rankscope.formats.pickle_file import PickledFile, open_tensors

MAGNITUDE_PART = "lora_magnitude_vector"
TensorKind = Literal[
    "weight", "bias", "parameter", "token rows", "factor bias", "base weight", "untrained copy", "unknown"
]
SAVED_MODULE_REASON = "modules_to_save: a full weight, no low-rank update"
TOKEN_ROWS_REASON = "trainable token rows: full rows of an embedding, no low-rank update"
BIAS_REASON = "a bias: one-dimensional, no spectrum"
UNKNOWN_REASON = "unknown key"
COPY_REASON = "the untrained copy of a whole module"


class KeyRule(NamedTuple):
    """A key that ``pattern`` is found in is of this ``kind``; ``reason``: why it is no low-rank update."""

    kind: TensorKind
    pattern: re.Pattern[str]
    reason: str


# Keys that are no factors; the first rule whose pattern is in a key gives its kind.
KEY_RULES = (
    KeyRule(
        "factor bias",
        re.compile(r"\.lora_B\.(?:.+\.)?bias$"),
        "lora_bias: the bias of B changes the layer's bias, not its weight",
    ),
    KeyRule("token rows", re.compile(r"\.trainable_tokens_delta(?:\.[^.]+)?$"), TOKEN_ROWS_REASON),
    KeyRule("unknown", re.compile(r"trainable_tokens"), TOKEN_ROWS_REASON),
    KeyRule("base weight", re.compile(r"\.base_layer\.weight$"), "the base weight, saved along"),
    KeyRule("untrained copy", re.compile(r"\.original_module\.(?:.+\.)?bias$"), BIAS_REASON),
    KeyRule("untrained copy", re.compile(r"\.original_module\."), COPY_REASON),
    KeyRule("unknown", re.compile(r"\.lora_"), UNKNOWN_REASON),
    KeyRule("bias", re.compile(r"\.bias$"), BIAS_REASON),
    KeyRule("weight", re.compile(r"\.weight$"), SAVED_MODULE_REASON),
    KeyRule("parameter", re.compile(""), UNKNOWN_REASON),
)
WHOLE_KINDS: tuple[TensorKind, ...] = ("weight", "bias", "parameter")
# What a live state dict has before a module's own path: the wrapper of PEFT, with the adapter's name.
_SAVED_MODULE = re.compile(r"\.modules_to_save(?:\.[^.]+)?(?=\.)")
_TOKEN_ROWS = re.compile(r"(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?$")
_FACTOR_BIAS = re.compile(r"\.lora_B\.(?:.+\.)?bias$")


class StoredTensor(NamedTuple):
    """A tensor that is no factor: its ``key`` in the file, ``saved_key``, under which PEFT saves it, and its kind.

    ``name`` is that of the tensor in the base model; of token rows and of a factor's bias, the module's path.
    """

    key: str
    saved_key: str
    name: str
    kind: TensorKind
    reason: str


@dataclass(frozen=True)
class PeftFolder:
    """One adapter: its configuration as it was written, the open file, and the keys of its tensors.

    ``factors``: keys by module and part (``lora_A`` …). ``others``: all else, in natural order.
    """

    path: Path
    config: dict[str, Any]
    file: TensorFile | PickledFile
    factors: dict[str, dict[str, str]]
    others: tuple[StoredTensor, ...]

    @classmethod
    def open(cls, path: Path, parse: Callable[[str], ParsedKey | None] = parse_factor_key) -> PeftFolder:
        """Sort the keys of a folder; reads headers, and a tensor only where two keys stand for the same one.

        Args:
            parse: what a key says of a factor, None where it is none; by default that of LoRA.

        Raises:
            FormatError: a file is missing or damaged, the file holds more than one adapter, or two tensors that
                should be one differ.
        """
        config = read_json(path / CONFIG_NAME)
        file = open_tensors(weights_file(path))
        factors: dict[str, dict[str, str]] = defaultdict(dict)
        others = []
        adapters = set()
        for key in sorted(file.infos, key=natural_key):
            parsed = parse(key)
            if parsed is None:
                others.append(_describe_key(key))
                continue
            adapters.add(parsed.adapter)
            other = factors[parsed.module].setdefault(parsed.part, key)
            if other != key:
                raise FormatError(
                    f"{file.path}: {parsed.module!r} has {parsed.part} twice, as {other} and {key}; "
                    "save one adapter only"
                )
        if len(adapters) > 1:
            names = ", ".join(sorted(repr(name) for name in adapters))
            raise FormatError(f"{file.path}: holds the adapters {names}; save one adapter only")
        folder = cls(path, config, file, dict(factors), tuple(others))
        folder._check_duplicates()
        return folder

    @property
    def whole(self) -> dict[str, StoredTensor]:
        """What was trained whole (weights, biases and buffers of heads), by its name in the base model."""
        return self._by_name(*WHOLE_KINDS)

    @property
    def token_rows(self) -> dict[str, StoredTensor]:
        """Trained rows of embeddings, by module."""
        return self._by_name("token rows")

    @property
    def base_weights(self) -> dict[str, StoredTensor]:
        """Weights of the base that were saved along, by name."""
        return self._by_name("base weight")

    @property
    def factor_biases(self) -> dict[str, StoredTensor]:
        """The biases of B (``lora_bias``), by module."""
        return self._by_name("factor bias")

    @property
    def unknown(self) -> list[StoredTensor]:
        """Tensors whose meaning is not known."""
        return [tensor for tensor in self.others if tensor.kind == "unknown"]

    @property
    def magnitudes(self) -> dict[str, str]:
        """Keys of DoRA's magnitudes, by module."""
        return {module: keys[MAGNITUDE_PART] for module, keys in self.factors.items() if MAGNITUDE_PART in keys}

    def _by_name(self, *kinds: TensorKind) -> dict[str, StoredTensor]:
        """The first key of each tensor; ``_check_duplicates`` has checked that others hold the same."""
        tensors: dict[str, StoredTensor] = {}
        for tensor in self.others:
            if tensor.kind in kinds:
                tensors.setdefault(tensor.name, tensor)
        return tensors

    def _check_duplicates(self) -> None:
        """Refuse two keys of one tensor with different values.

        Raises:
            FormatError: there are such keys.
        """
        seen: dict[str, str] = {}
        for tensor in self.others:
            if tensor.kind not in (*WHOLE_KINDS, "token rows", "factor bias"):
                continue
            first = seen.setdefault(tensor.saved_key, tensor.key)
            if first != tensor.key and not self._equal(first, tensor.key):
                raise FormatError(
                    f"{self.file.path}: holds {first} and {tensor.key}, which are one and the same; "
                    "save one adapter only"
                )

    def _equal(self, first: str, second: str) -> bool:
        if self.file.infos[first] != self.file.infos[second]:
            return False
        return torch.equal(self.file.read(first), self.file.read(second))


def weights_file(folder: Path) -> Path:
    """The file of the adapter's weights.

    Raises:
        FormatError: there is none.
    """
    for name in (WEIGHTS_NAME, OLD_WEIGHTS_NAME):
        if (folder / name).exists():
            return folder / name
    raise FormatError(f"{folder}: has {CONFIG_NAME} but neither {WEIGHTS_NAME} nor {OLD_WEIGHTS_NAME}")


def model_tensor_name(key: str) -> str:
    """The name in the base model of a tensor that an adapter holds whole, saved or live."""
    name = _SAVED_MODULE.sub("", strip_peft_prefix(key))
    return name.replace(".token_adapter.", ".").replace(".base_layer.", ".")


def _describe_key(key: str) -> StoredTensor:
    rule = next(rule for rule in KEY_RULES if rule.pattern.search(key))
    path = strip_peft_prefix(key)
    if rule.kind == "token rows":
        module = _TOKEN_ROWS.sub("", path)
        wrapper = ".token_adapter" if ".token_adapter." in path else ""
        return StoredTensor(
            key, f"{PEFT_PREFIX}{module}{wrapper}.trainable_tokens_delta", module, rule.kind, rule.reason
        )
    if rule.kind == "factor bias":
        module = _FACTOR_BIAS.sub("", path)
        return StoredTensor(key, f"{PEFT_PREFIX}{module}.lora_B.bias", module, rule.kind, rule.reason)
    saved = PEFT_PREFIX + _SAVED_MODULE.sub("", path)
    return StoredTensor(key, saved, model_tensor_name(key), rule.kind, rule.reason)
