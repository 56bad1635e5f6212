"""How PEFT names the tensors of a LoRA adapter: one definition for whoever reads and whoever writes."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OLD_WEIGHTS_NAME = "adapter_model.bin"

Kind = Literal["linear", "embedding", "conv"]


class FactorKeys(NamedTuple):
    """Keys of A and B in ``adapter_model.safetensors``."""

    A: str
    B: str


def factor_keys(module: str, kind: Kind = "linear") -> FactorKeys:
    """Keys that PEFT stores the factors of ``module`` under (full dotted path within the model).

    "linear" (also GPT-2's Conv1D): A (r, in), B (out, r). "embedding": A (r, vocabulary), B (dim, r), keys
    without ``.weight``. "conv": A (r, in/groups, kh, kw), B (out, r/groups, 1, 1), keys as for "linear".
    """
    if kind == "embedding":
        return FactorKeys(f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B")
    return FactorKeys(f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight")


def magnitude_key(module: str) -> str:
    """Key of DoRA's magnitude vector."""
    return f"{PREFIX}{module}.lora_magnitude_vector"
