"""Writing one adapter of a bank in PEFT's folder layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from rankscope.formats.peft_keys import PEFT_PREFIX, factor_keys
from rankscope.formats.peft_write import lora_config, whole_number, write_peft_folder
from rankscope.formats.streaming import LazyTensor
from rankscope.lora.layer import AdapterLayer, FactorPair
from rankscope.lora.spec import AdapterSpec


def peft_tensors(
    factors: Mapping[str, FactorPair],
    layers: Mapping[str, AdapterLayer],
    biases: Mapping[str, Tensor],
    heads: Mapping[str, nn.Module],
) -> dict[str, Tensor]:
    """Factors A (r, in) and B (out, r), biases (out,) and heads, each by module path, under PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in factors.items():
        keys = factor_keys(name, layers[name].kind)
        tensors |= {keys.A: A, keys.B: B}
    for name, bias in biases.items():
        tensors[f"{PEFT_PREFIX}{name}{'.base_layer' if name in layers else ''}.bias"] = bias
    for name, head in heads.items():
        tensors |= {f"{PEFT_PREFIX}{name}.{key}": tensor for key, tensor in head.state_dict().items()}
    return tensors


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
    settings = {
        "r": spec.rank,
        "lora_alpha": whole_number(spec.alpha),
        "lora_dropout": spec.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "use_rslora": spec.rslora,
    }
    config = lora_config(
        settings,
        base=base_name,
        task_type=task_type,
        bias=spec.bias,
        fan_in_fan_out=fan_in_fan_out,
        init="gaussian" if spec.init == "gaussian" else True,
        modules_to_save=spec.modules_to_save,
    )
    write_peft_folder(folder, config, {key: LazyTensor.of(tensor) for key, tensor in tensors.items()})
