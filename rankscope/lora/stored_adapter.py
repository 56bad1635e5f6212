"""Reading one adapter in PEFT's folder layout: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from rankscope.errors import FormatError, prefix_errors
from rankscope.formats.file_io import TensorFile, read_json
from rankscope.formats.peft_config import BASE_MODIFYING_INITS, AdapterConfig, read_adapter_config
from rankscope.formats.peft_keys import (
    CONFIG_NAME,
    OLD_WEIGHTS_NAME,
    WEIGHTS_NAME,
    parse_key,
    strip_peft_prefix,
)
from rankscope.formats.pickle_file import PickledFile, open_tensors
from rankscope.lora.spec import AdapterSpec, Bias

# PEFT's wrappers, which show in the keys of biases and whole modules.
PEFT_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)\.")

# What the configuration can ask for that makes the forward pass something else than that of W0 + scale · BA.
# (The reader of configurations refuses more: what does not even store B and A.)
UNSUPPORTED_SETTINGS = (
    "use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "velora_config", "monteclora_config",
)  # fmt: skip


class AdapterTrainingConfig(msgspec.Struct, frozen=True):
    """The keys of ``adapter_config.json`` that only matter where an adapter is trained or attached."""

    lora_dropout: float | None = 0.0
    bias: Bias | None = "none"
    modules_to_save: list[str] | None = None


class StoredAdapter(NamedTuple):
    """What a folder holds: the spec, (A, B) by module path, and tensors trained whole, by their path in the model."""

    spec: AdapterSpec
    factors: dict[str, tuple[Tensor, Tensor]]
    whole: dict[str, Tensor]


def read_adapter(folder: Path) -> StoredAdapter:
    """Read a LoRA adapter that PEFT, or ``Bank.save``, wrote. Ranks are those of the tensors.

    Raises:
        FormatError: a file is missing or damaged, a factor lacks its other half, or the adapter is not plain LoRA.
        ConfigError: a value in the configuration that makes no sense.
    """
    config = read_adapter_config(folder / CONFIG_NAME)
    raw = read_json(folder / CONFIG_NAME)
    with prefix_errors(folder / CONFIG_NAME):
        check_plain_lora(raw)
    new, old = folder / WEIGHTS_NAME, folder / OLD_WEIGHTS_NAME
    path = old if old.exists() and not new.exists() else new
    file = open_tensors(path)
    with prefix_errors(path):
        factors, whole = _read_tensors(file)
    with prefix_errors(folder / CONFIG_NAME):
        spec = make_adapter_spec(config, raw, {name: A.shape[0] for name, (A, _) in factors.items()})
    return StoredAdapter(spec, factors, whole)


def _read_tensors(file: TensorFile | PickledFile) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Pairs of factors by module, and all other tensors by their path in the model."""
    halves: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key in file.infos:
        parsed = parse_key(key)
        if ".original_module." in key:
            continue  # the untrained copy of a whole module
        if parsed is None or parsed.part[-1] not in "AB" or parsed.leaf == "bias":
            whole[PEFT_WRAPPER.sub(".", strip_peft_prefix(key))] = file.read(key).clone()
            continue
        pair = halves.setdefault(parsed.module, {})
        if parsed.part[-1] in pair:
            raise FormatError(f"{parsed.module!r} has {parsed.part} twice; save one adapter only")
        pair[parsed.part[-1]] = file.read(key).clone()
    if not halves:
        raise FormatError("holds no LoRA factors")
    return {name: _check_pair(name, pair) for name, pair in halves.items()}, whole


def _check_pair(name: str, pair: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    if len(pair) < 2:
        raise FormatError(f"{name!r} has lora_{next(iter(pair))} without its other half")
    for half, factor in pair.items():
        if factor.ndim < 2 or 0 in factor.shape or not factor.is_floating_point():
            raise FormatError(
                f"lora_{half} of {name!r} is {tuple(factor.shape)} {factor.dtype}, no factor of an update"
            )
    return pair["A"], pair["B"]


def check_plain_lora(raw: Mapping[str, Any]) -> None:
    """Raise FormatError where the layers here would compute something else than PEFT does."""
    used = [name for name in UNSUPPORTED_SETTINGS if raw.get(name)]
    if used:
        raise FormatError(f"uses {', '.join(used)}, which the layers here do not implement; attach it with PEFT")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_MODIFYING_INITS):
        raise FormatError(
            f"{init} changes the base weights, so the adapter does not fit the base as published; convert it to plain "
            "LoRA with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def make_adapter_spec(config: AdapterConfig, raw: Mapping[str, Any], ranks: Mapping[str, int]) -> AdapterSpec:
    """The spec of a stored adapter with these ranks by module path."""
    try:
        training = msgspec.convert(raw, AdapterTrainingConfig)
    except msgspec.ValidationError as error:
        raise FormatError(f"{error}; correct the configuration") from error
    rank = Counter(ranks.values()).most_common(1)[0][0]
    return AdapterSpec(
        rank=rank,
        alpha=config.lora_alpha,
        targets=tuple(ranks),
        init="gaussian" if config.init_lora_weights == "gaussian" else "kaiming",
        dropout=training.lora_dropout or 0.0,
        rslora=bool(config.use_rslora),
        bias=training.bias or "none",
        modules_to_save=tuple(training.modules_to_save or ()),
        # ^ keeps a path from matching another path's end, here and in PEFT.
        rank_pattern={f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        alpha_pattern=config.alpha_pattern or {},
    )
