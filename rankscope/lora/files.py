"""One adapter in PEFT's folder layout: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rankscope.errors import ConfigError, FormatError
from rankscope.formats.files import read_json, read_tensors, write_json, write_tensors
from rankscope.formats.peft_keys import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from rankscope.lora.spec import AdapterSpec

# Live state dicts carry the adapter's name after lora_A; files do not. Both are read.
FACTOR_KEY = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<half>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?")

# Fields of PEFT's configuration that change the forward pass into something other than W0 + scale · BA.
NOT_PLAIN = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "target_parameters", "arrow_config",
    "trainable_token_indices", "alora_invocation_tokens", "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
# Initialisations that take the initial BA out of the base weight: the adapter belongs to that changed base.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    config = read_json(folder / CONFIG_NAME)
    check_plain(folder, config)
    halves: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in read_tensors(folder / WEIGHTS_NAME).items():
        match = FACTOR_KEY.fullmatch(key.removeprefix(PREFIX))
        if match:
            halves.setdefault(match["module"], {})[match["half"]] = tensor
        else:
            whole[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
    if not halves:
        raise FormatError(f"{folder / WEIGHTS_NAME}: holds no LoRA factors")
    for module, pair in halves.items():
        if len(pair) < 2:
            raise FormatError(f"{folder}: {module!r} has lora_{next(iter(pair))} without its other half")
        if 0 in (*pair["A"].shape, *pair["B"].shape) or pair["A"].ndim < 2:
            raise FormatError(f"{folder}: the factors of {module!r} are empty: {tuple(pair['A'].shape)}")
    factors = {module: (pair["A"], pair["B"]) for module, pair in halves.items()}
    try:
        spec = spec_from(config, {module: A.shape[0] for module, (A, _) in factors.items()})
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG_NAME}: {error}") from error
    return StoredAdapter(spec, factors, whole)


def check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise FormatError where the layers here would compute something else than PEFT does."""
    kind, init = config.get("peft_type"), config.get("init_lora_weights")
    if kind != "LORA":
        raise FormatError(f"{folder / CONFIG_NAME}: peft_type is {kind!r}; only LORA can be attached")
    used = [name for name in NOT_PLAIN if config.get(name)]
    if used:
        raise FormatError(f"{folder / CONFIG_NAME}: uses {', '.join(used)}, which the layers here do not implement")
    if isinstance(init, str) and init.lower().startswith(MOVES_BASE):
        raise FormatError(
            f"{folder / CONFIG_NAME}: {init} changes the base weights; convert the adapter to plain LoRA with "
            "PEFT (save_pretrained with path_initial_model_for_weight_conversion) first"
        )


def spec_from(config: Mapping[str, Any], ranks: Mapping[str, int]) -> AdapterSpec:
    """The spec of an adapter with these ranks by module path."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    return AdapterSpec(
        rank=rank,
        alpha=config.get("lora_alpha", 8),
        targets=tuple(ranks),
        init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        dropout=config.get("lora_dropout") or 0.0,
        rslora=bool(config.get("use_rslora")),
        bias=config.get("bias") or "none",
        modules_to_save=tuple(_typed(config, "modules_to_save", list) or ()),
        # ^ keeps a path from matching another path's end, here and in PEFT.
        rank_pattern={f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        alpha_pattern=_typed(config, "alpha_pattern", dict) or {},
    )


def _typed(config: Mapping[str, Any], name: str, kind: type) -> Any:
    value = config.get(name)
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r}, not a JSON {'object' if kind is dict else 'array'}")
    return value


def write_adapter(
    folder: Path,
    spec: AdapterSpec,
    tensors: Mapping[str, Tensor],
    targets: str | Sequence[str],
    fan_in_fan_out: bool,
    base_name: str | None,
    task_type: str | None,
) -> None:
    """Write the folder that ``PeftModel.from_pretrained`` reads; ``tensors`` have PEFT's keys already."""
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": spec.rank,
        # PEFT and vLLM declare a whole number, and take others.
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "use_rslora": spec.rslora,
        "use_dora": False,
        "bias": spec.bias,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": "gaussian" if spec.init == "gaussian" else True,
        "modules_to_save": list(spec.modules_to_save) or None,
    }
    # Tied parameters would share memory, which safetensors refuses.
    write_tensors(folder / WEIGHTS_NAME, {key: tensor.detach().clone() for key, tensor in tensors.items()})
    write_json(folder / CONFIG_NAME, config)
