"""The only writer of PEFT's folder layout: the contents of adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankscope.errors import ShapeError
from rankscope.formats.file_io import write_json
from rankscope.formats.names import matches_path_end
from rankscope.formats.peft_keys import CONFIG_NAME, WEIGHTS_NAME, LayerType, factor_keys
from rankscope.formats.streaming import LazyTensor, write_streamed
from rankscope.updates import LowRank

# Settings of initialisations, which mean nothing for finished factors (PEFT warns about some).
INIT_CONFIG_KEYS = ("eva_config", "corda_config", "lora_ga_config", "loftq_config")


class FactorLayout(NamedTuple):
    """How PEFT stores the factors of one layer: its kind and, of a convolution, kernel (kh, kw) and groups."""

    kind: LayerType = "linear"
    kernel: tuple[int, ...] = ()
    groups: int = 1

    def parameters(self, shape: tuple[int, int], rank: int) -> int:
        """How many numbers the two factors of an update (out, in) hold."""
        return rank * (shape[0] // self.groups + shape[1])


def factor_tensors(module: str, update: LowRank, place: FactorLayout = FactorLayout()) -> dict[str, Tensor]:  # noqa: B008 (frozen)
    """A and B under PEFT's keys, in the dtype of the update's factors and in the shapes that ``factor_keys`` gives.

    The update's scale must be 1 (α = r).

    Raises:
        ShapeError: the update has another scale, which the factors do not hold.
    """
    if update.scale != 1.0:
        raise ShapeError(f"{module}: a scale of {update.scale:g} belongs into the configuration or into B")
    keys = factor_keys(module, place.kind)
    A, B = update.A, update.B
    if place.kind == "embedding":  # the (vocabulary, dim) weight changes by (BA)ᵀ
        A, B = B.T, A.T
    elif place.kind == "conv":
        points = [1] * len(place.kernel)
        A = A.reshape(len(A), -1, *place.kernel)
        B = _diagonal_blocks(B, place.groups).reshape(len(B), -1, *points)
    return {keys.A: A.contiguous(), keys.B: B.contiguous()}


def _diagonal_blocks(B: Tensor, groups: int) -> Tensor:
    """(out, r) whose only entries are one block for each group, as (out, r/groups)."""
    out, r = B.shape
    blocks = B.reshape(groups, out // groups, groups, r // groups)
    return torch.stack([blocks[g, :, g] for g in range(groups)]).reshape(out, r // groups)


def whole_number(value: float) -> float | int:
    """α as an int where it is whole: PEFT and vLLM declare it an int, and accept floats."""
    return int(value) if float(value).is_integer() else value


def rank_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """r, lora_alpha and their patterns for layers of these ranks, each with the scale 1 (α = r).

    The commonest rank is r; each other layer has a pattern of its whole path. A reader that ignores patterns
    still gets the right scale.
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    # ^ keeps a path from matching another path's end.
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "use_rslora": False,
    }


def alpha_settings(layers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """r, lora_alpha and their patterns for layers of these (r, α); the factors stay as they are."""
    r, alpha = Counter(layers.values()).most_common(1)[0][0]
    # ^ keeps a path from matching another path's end.
    ranks = {f"^{re.escape(name)}": own for name, (own, _) in layers.items() if own != r}
    alphas = {f"^{re.escape(name)}": whole_number(own) for name, (_, own) in layers.items() if own != alpha}
    return {
        "r": r, "lora_alpha": whole_number(alpha), "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": False
    }  # fmt: skip


def lora_config(
    settings: Mapping[str, Any],
    *,
    base: str | None,
    task_type: str | None = None,
    dora: bool = False,
    bias: str = "none",
    fan_in_fan_out: bool = False,
    init: bool | str = True,
    modules_to_save: Sequence[str] = (),
) -> dict[str, Any]:
    """``adapter_config.json`` of a new adapter.

    Args:
        settings: ranks, α, dropout and target modules under PEFT's keys, which the file keeps in this order.
        base: what the configuration names as the base model.
    """
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        **settings,
        "use_dora": dora,
        "bias": bias,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": init,
        "modules_to_save": list(modules_to_save) or None,
    }


def config_with_ranks(config: Mapping[str, Any], ranks: Mapping[str, int], **settings: Any) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter made from another: α = r everywhere; keys not known here are copied."""
    kept = {key: value for key, value in config.items() if key not in INIT_CONFIG_KEYS}
    return {**kept, "init_lora_weights": True, "inference_mode": True, **rank_settings(ranks), **settings}


def exact_targets(targets: Sequence[str], paths: Iterable[str]) -> str | list[str]:
    """The paths; or a regular expression of them where PEFT, which compares ends, would match more modules."""
    more = any(matches_path_end(target, path) for path in {*paths}.difference(targets) for target in targets)
    return "|".join(re.escape(target) for target in targets) if more else list(targets)


def write_peft_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the folder that ``PeftModel.from_pretrained`` reads; ``tensors`` have PEFT's keys.

    Raises:
        FormatError: it cannot be written.
    """
    write_streamed(folder / WEIGHTS_NAME, tensors, metadata)
    write_json(folder / CONFIG_NAME, config)
