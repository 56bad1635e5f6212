"""How PEFT names the tensors of a LoRA adapter: one definition for reading and writing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from rankscope.formats.names import strip_wrappers

PEFT_PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OLD_WEIGHTS_NAME = "adapter_model.bin"

LayerType = Literal["linear", "embedding", "conv"]


class FactorKeys(NamedTuple):
    """Keys of A and B in ``adapter_model.safetensors``."""

    A: str
    B: str


def factor_keys(module: str, kind: LayerType = "linear") -> FactorKeys:
    """Keys that PEFT stores the factors of ``module`` under (full dotted path within the model).

    "linear" (also GPT-2's Conv1D): A (r, in), B (out, r). "embedding": A (r, vocabulary), B (dim, r), keys
    without ``.weight``. "conv": A (r, in, kh, kw), B (out, r/groups, 1, 1), keys as for "linear".
    """
    if kind == "embedding":
        return FactorKeys(f"{PEFT_PREFIX}{module}.lora_embedding_A", f"{PEFT_PREFIX}{module}.lora_embedding_B")
    return FactorKeys(f"{PEFT_PREFIX}{module}.lora_A.weight", f"{PEFT_PREFIX}{module}.lora_B.weight")


def magnitude_key(module: str) -> str:
    """Key of DoRA's magnitude vector."""
    return f"{PEFT_PREFIX}{module}.lora_magnitude_vector"


def factor_bias_key(module: str) -> str:
    """Key of the bias that ``lora_bias`` gives B."""
    return f"{PEFT_PREFIX}{module}.lora_B.bias"


class ParsedKey(NamedTuple):
    """The parts of a factor's key: module path, part (``lora_A`` …), adapter name or "", leaf or ""."""

    module: str
    part: str
    adapter: str
    leaf: str


def key_pattern(parts: Iterable[str]) -> re.Pattern[str]:
    """What ``parse_key`` looks for where a method's tensors are called ``parts``."""
    names = "|".join(re.escape(part) for part in parts)
    return re.compile(rf"(?P<module>.+)\.(?P<part>{names})(?:\.(?P<tail>.+))?")


_LORA_KEY = key_pattern(("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"))


def parse_key(key: str, pattern: re.Pattern[str] = _LORA_KEY) -> ParsedKey | None:
    """What a key says, with or without a live adapter name (``lora_A.default.weight``); None where it is no factor."""
    match = pattern.fullmatch(key)
    if match is None:
        return None
    adapter, _, leaf = ("." + (match["tail"] or "")).rpartition(".")
    if leaf not in ("weight", "bias"):
        adapter, leaf = f"{adapter}.{leaf}", ""
    return ParsedKey(strip_peft_prefix(match["module"]), match["part"], adapter.strip("."), leaf)


def parse_factor_key(key: str) -> ParsedKey | None:
    """What the key of a factor of LoRA, or of DoRA's magnitude, says; None for any other key, as that of B's bias."""
    parsed = parse_key(key)
    if parsed is None:
        return None
    if parsed.part == "lora_magnitude_vector":
        return parsed if parsed.leaf != "bias" else None
    leaf = "" if parsed.part.startswith("lora_embedding") else "weight"
    return parsed if parsed.leaf == leaf else None


def strip_peft_prefix(name: str) -> str:
    """The path within the model: without the wrappers of PEFT, which stand in front, and of torch."""
    return strip_wrappers(name).removeprefix(PEFT_PREFIX)
