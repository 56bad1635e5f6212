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
from rankscope.formats.file_io import read_json
from rankscope.formats.peft_config import BASE_MODIFYING_INITS, AdapterConfig, read_adapter_config
from rankscope.formats.peft_folder import PeftFolder, TensorKind
from rankscope.formats.peft_keys import CONFIG_NAME, strip_peft_prefix
from rankscope.lora.spec import AdapterSpec, Bias

# Tensors of adapters that are more than plain LoRA.
FOREIGN_KINDS: tuple[TensorKind, ...] = ("factor bias", "token rows", "unknown")

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
    """An adapter's spec, (A, B) by module path, and tensors trained whole by their path in the model, as stored."""

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
    with prefix_errors(folder / CONFIG_NAME):
        check_plain_lora(read_json(folder / CONFIG_NAME))
    stored = PeftFolder.open(folder)
    with prefix_errors(stored.file.path):
        factors, whole = _read_tensors(stored)
    with prefix_errors(folder / CONFIG_NAME):
        spec = make_adapter_spec(config, stored.config, {name: A.shape[0] for name, (A, _) in factors.items()})
    return StoredAdapter(spec, factors, whole)


def _read_tensors(folder: PeftFolder) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Pairs of factors by module, and all other tensors by their path in the model.

    What plain LoRA lacks (magnitudes, biases of factors) is among the other tensors; no model has a tensor for it.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    names = {tensor.key: tensor.name for tensor in (*folder.whole.values(), *folder.base_weights.values())}
    names |= {
        tensor.key: strip_peft_prefix(tensor.saved_key) for tensor in folder.others if tensor.kind in FOREIGN_KINDS
    }
    for module, keys in folder.factors.items():
        for part, key in keys.items():
            if part[-1] not in "AB":
                names[key] = strip_peft_prefix(key)
            elif (
                halves.setdefault(module, {}).setdefault(part[-1], tensor := folder.file.read(key).clone())
                is not tensor
            ):
                raise FormatError(f"{module!r} has factors of a linear layer and of an embedding; which are meant?")
    if not halves:
        raise FormatError("holds no LoRA factors")
    whole = {names[key]: folder.file.read(key).clone() for key in folder.file.infos if key in names}
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
