"""Reading adapter_config.json: what decides the scale, and with which settings B·A is not the update."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from rankscope.errors import FormatError
from rankscope.formats.file_io import read_json
from rankscope.formats.names import strip_wrappers
from rankscope.formats.peft_keys import CONFIG_NAME

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

# Initialisations that move the base weight as well (PEFT's LoraLayer.*_init): B·A then contains the start.
BASE_MODIFYING_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")
LARGEST_RANK = 2**31
_COMPILED = re.compile(r"_orig_mod\\?\.")  # of torch.compile, in a path or in a pattern of it
# Variants of LoRA in which B·A is not the change of the weight at all.
UNSUPPORTED_SETTINGS = {
    "use_qalora": "QA-LoRA averages the inputs before A",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "kasa_config": "KaSA has a diagonal between B and A and truncates the base",
    "arrow_config": "Arrow mixes several adapters for each token",
}


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The keys that are read; others are ignored, since each release of PEFT adds some."""

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
    trainable_token_indices: Any = None
    ensure_weight_tying: bool | None = False
    base_model_name_or_path: str | None = None

    def scale(self, module: str, rank: int) -> float:
        """α/r, or α/√r with rsLoRA, α by ``alpha_pattern``; ``rank`` is that of the stored factors."""
        alpha = self.alpha(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def alpha(self, module: str) -> float:
        """α of a module, by ``alpha_pattern``."""
        alpha: float = resolve_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha

    def rank(self, module: str) -> int | None:
        """The rank that the configuration claims for a module."""
        return resolve_pattern(self.rank_pattern, module, self.r)

    def target_parameter_names(self, owner: str) -> list[str]:
        """Names of a module's bare parameters, such as stacked experts, that are adapted (``target_parameters``)."""
        targets = (strip_wrappers(target).rpartition(".") for target in self.target_parameters or ())
        return [name for parent, _, name in targets if owner == parent or owner.endswith("." + parent)]

    @property
    def base_modifying_init(self) -> str | None:
        """The initialisation, where it is one that moves the base weight as well."""
        init = self.init_lora_weights
        return init if isinstance(init, str) and init.lower().startswith(BASE_MODIFYING_INITS) else None

    def notes(self) -> list[str]:
        """What a reader of the numbers must know."""
        notes = []
        if self.ensure_weight_tying:
            notes.append("ensure_weight_tying: layers with tied weights share one update, which is here once for each")
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
    kind = peft_type(path, raw)
    if kind != "LORA":
        raise FormatError(f"{path}: peft_type is {kind!r}; only LORA is read")
    if raw.get("lora_alpha") is None:
        raise FormatError(f"{path}: has no lora_alpha, so the scale α/r is not known; add it")
    for key, reason in UNSUPPORTED_SETTINGS.items():
        if raw.get(key):
            raise FormatError(f"{path}: {key} is set: {reason}; this variant is not read")
    return convert_adapter_config(path, raw)


def convert_adapter_config(path: Path, raw: dict[str, Any]) -> AdapterConfig:
    """What ``adapter_config.json`` of LoRA says, typed, whether or not the variant is read.

    Raises:
        FormatError: a wrong type, a number that is not finite, a rank below 1, or a pattern that is no expression.
    """
    config = _convert_config(path, raw, AdapterConfig)
    _check_numbers(path, {"lora_alpha": config.lora_alpha, **(config.alpha_pattern or {})})
    _check_ranks(path, {"r": config.r, **(config.rank_pattern or {})})
    _check_patterns(path, *(config.rank_pattern or ()), *(config.alpha_pattern or ()))
    return config


class MethodConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The keys that are read for every method but LoRA; each method has some of them."""

    peft_type: str
    r: int | None = None
    alpha: float | None = None
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, float] | None = None
    fan_in_fan_out: bool | None = False
    lora_alpha: float | None = None
    init_r: int | None = None
    randlora_alpha: float | None = None
    scaling: float | None = None
    random_loc_seed: int | None = None
    topk: int | None = None
    init_weights: bool | str | None = True
    apply_gs: bool | None = msgspec.field(default=False, name="apply_GS")
    decomposition_method: str | None = None
    para: bool | None = False
    block_share: bool | None = False
    coft: bool | None = False
    use_cayley_neumann: bool | None = False
    num_cayley_neumann_terms: int | None = None
    feedforward_modules: list[str] | str | None = None
    token_indices: Any = None
    trainable_token_indices: Any = None

    def alpha_of(self, module: str) -> float:
        """α, by ``alpha_pattern``.

        Raises:
            FormatError: there is none.
        """
        alpha: float = resolve_pattern(self.alpha_pattern, module, self.require("alpha"))
        return alpha

    def rank_of(self, module: str) -> int:
        """The rank that the configuration claims for a module, by ``rank_pattern``.

        Raises:
            FormatError: there is none.
        """
        rank = resolve_pattern(self.rank_pattern, module, self.r)
        if not isinstance(rank, int) or rank < 1:
            raise FormatError(f"{CONFIG_NAME} gives no rank r, so the scale α/r is not known; add it")
        return rank

    def require(self, key: str) -> Any:
        """The value of a key that the update depends on.

        Raises:
            FormatError: it is missing.
        """
        value = getattr(self, key)
        if value is None:
            raise FormatError(f"{CONFIG_NAME} has no {key}, without which the update is not known; add it")
        return value


def read_method_config(path: Path) -> MethodConfig:
    """Read ``adapter_config.json`` of another method than LoRA.

    Raises:
        FormatError: missing, not JSON, or a wrong type.
    """
    raw = read_json(path)
    config = _convert_config(path, {**raw, "peft_type": peft_type(path, raw)}, MethodConfig)
    scales = {key: getattr(config, key) or 0.0 for key in ("alpha", "lora_alpha", "randlora_alpha", "scaling")}
    _check_numbers(path, {**scales, **(config.alpha_pattern or {})})
    _check_ranks(path, {"r": config.r, "init_r": config.init_r, **(config.rank_pattern or {})})
    _check_patterns(path, *(config.rank_pattern or ()), *(config.alpha_pattern or ()))
    return config


def peft_type(path: Path, raw: Mapping[str, Any]) -> str:
    """The method's name, cut to 40 characters.

    Raises:
        FormatError: there is none.
    """
    kind = raw.get("peft_type")
    if kind is None and ("lora_parameters" in raw or "fine_tune_type" in raw):
        raise FormatError(f"{path}: is the configuration of an adapter of mlx-lm; give its adapters.safetensors")
    if kind is None:
        raise FormatError(f"{path}: has no peft_type; is it the configuration of a PEFT adapter?")
    return str(kind)[:40]


def _convert_config(path: Path, raw: dict[str, Any], kind: type[S]) -> S:
    try:
        return msgspec.convert(raw, kind)
    except (msgspec.ValidationError, OverflowError, ValueError) as error:
        raise FormatError(f"{path}: {error}; correct the configuration") from error


def _check_numbers(path: Path, alphas: Mapping[str, float]) -> None:
    for key, alpha in alphas.items():
        if not math.isfinite(alpha):
            raise FormatError(f"{path}: α of {key} is {alpha}; correct the configuration")


def _check_ranks(path: Path, ranks: Mapping[str, Any]) -> None:
    for key, rank in ranks.items():
        if isinstance(rank, int) and abs(rank) > LARGEST_RANK:
            raise FormatError(f"{path}: the rank of {key} is larger than any matrix; correct the configuration")


def _check_patterns(path: Path, *patterns: str) -> None:
    for pattern in patterns:
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise FormatError(f"{path}: {pattern!r} is not a valid pattern ({error})") from error


def resolve_pattern(patterns: Mapping[str, T] | None, module: str, default: T) -> T:
    """As PEFT's get_pattern_key: the value of the first pattern that matches the end of the path, else of the path."""
    for pattern, value in (patterns or {}).items():
        pattern = _COMPILED.sub("", pattern)  # modules have their paths without it
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return (patterns or {}).get(module, default)
