"""Writing one adapter in PEFT's folder layout: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from rankscope.formats.files import write_json, write_tensors
from rankscope.formats.peft_keys import CONFIG_NAME, PREFIX, WEIGHTS_NAME, factor_keys
from rankscope.lora.layer import AdapterLayer, Pair
from rankscope.lora.spec import AdapterSpec, is_named


def peft_tensors(
    factors: Mapping[str, Pair],
    layers: Mapping[str, AdapterLayer],
    biases: Mapping[str, Tensor],
    heads: Mapping[str, nn.Module],
) -> dict[str, Tensor]:
    """Factors, biases and heads, each by module path, under PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in factors.items():
        keys = factor_keys(name, layers[name].kind)
        tensors |= {keys.A: A, keys.B: B}
    for name, bias in biases.items():
        tensors[f"{PREFIX}{name}{'.base_layer' if name in layers else ''}.bias"] = bias
    for name, head in heads.items():
        tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in head.state_dict().items()}
    return tensors


def exact_targets(targets: Sequence[str], paths: Iterable[str]) -> str | list[str]:
    """The paths; or a regular expression of them where PEFT, which compares ends, would find more in the model."""
    more = any(is_named(target, path) for path in {*paths}.difference(targets) for target in targets)
    return "|".join(re.escape(target) for target in targets) if more else list(targets)


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
