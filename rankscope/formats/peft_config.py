"""adapter_config.json of a LoRA adapter: what decides the scale, and what makes B·A not the update."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from rankscope.errors import FormatError
from rankscope.formats.files import read_json

T = TypeVar("T")

# Initialisations that move the base weight as well (PEFT's LoraLayer.*_init): B·A then contains the start.
MOVES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Variants of LoRA in which B·A is not the change of the weight at all.
NOT_A_PRODUCT = {
    "use_qalora": "QA-LoRA averages the inputs before A",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "kasa_config": "KaSA has a diagonal between B and A and truncates the base",
    "arrow_config": "Arrow mixes several adapters for each token",
}


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The keys that matter; others are ignored, since each release of PEFT adds some."""

    peft_type: str
    lora_alpha: float
    r: int | None = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    fan_in_fan_out: bool | None = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True
    target_parameters: list[str] | None = None
    layer_replication: list[Any] | None = None
    alora_invocation_tokens: list[Any] | None = None
    base_model_name_or_path: str | None = None

    def scale(self, module: str, rank: int) -> float:
        """α/r, or α/√r with rsLoRA, α by ``alpha_pattern``; ``rank`` is that of the stored factors."""
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def rank(self, module: str) -> int | None:
        """The rank that the configuration claims for a module."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def targets_parameter_of(self, module: str) -> bool:
        """Whether ``module``'s factors belong to a bare parameter (``target_parameters``), such as stacked experts."""
        owner = module.replace(".base_layer", "")
        parents = (target.rpartition(".")[0] for target in self.target_parameters or ())
        return any(owner == parent or owner.endswith("." + parent) for parent in parents)

    def notes(self) -> list[str]:
        """What a reader of the numbers must know."""
        notes = []
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower().startswith(MOVES_BASE):
            notes.append(
                f"initialised with {init}, which moves the base weight too: scale·B·A is not the learned update "
                "(that is scale·(B·A − B₀·A₀))"
            )
        if self.layer_replication:
            notes.append("layer_replication: the base model repeats layers, so names are those of the repeated model")
        if self.alora_invocation_tokens:
            notes.append("activated LoRA: the update acts only after the invocation tokens")
        return notes


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read ``adapter_config.json``.

    Raises:
        FormatError: missing, not JSON, no LoRA configuration, a wrong type, or no ``lora_alpha``.
    """
    raw = read_json(path)
    kind = raw.get("peft_type")
    if kind is None:
        raise FormatError(f"{path}: has no peft_type; is it the configuration of a PEFT adapter?")
    if kind != "LORA":
        raise FormatError(f"{path}: peft_type is {str(kind)[:40]!r}; only LORA is read")
    if raw.get("lora_alpha") is None:
        raise FormatError(f"{path}: has no lora_alpha, so the scale α/r is not known; add it")
    for key, reason in NOT_A_PRODUCT.items():
        if raw.get(key):
            raise FormatError(f"{path}: {key} is set: {reason}; this variant is not read")
    return _typed(path, raw)


def _typed(path: Path, raw: dict[str, Any]) -> AdapterConfig:
    try:
        config = msgspec.convert(raw, AdapterConfig)
    except (msgspec.ValidationError, OverflowError, ValueError) as error:
        raise FormatError(f"{path}: {error}; correct the configuration") from error
    alphas = {"lora_alpha": config.lora_alpha, **(config.alpha_pattern or {})}
    for key, alpha in alphas.items():
        if not math.isfinite(alpha):
            raise FormatError(f"{path}: α of {key} is {alpha}; correct the configuration")
    for pattern in (*(config.rank_pattern or ()), *(config.alpha_pattern or ())):
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise FormatError(f"{path}: {pattern!r} is not a valid pattern ({error})") from error
    return config


def _by_pattern(patterns: Mapping[str, T] | None, module: str, default: T) -> T:
    """PEFT's get_pattern_key: the first pattern that matches the end of the path wins; then the path itself."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return (patterns or {}).get(module, default)
