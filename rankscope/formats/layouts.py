"""Low-rank layers apart from any file format, and the tensors that each format stores for them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.adapter_file import MODULE_KEY
from rankscope.formats.diffusers import LORA_ADAPTER_METADATA_KEY
from rankscope.formats.kohya import ALPHA_KEY, NAMES_KEY, RANK_KEY
from rankscope.formats.lycoris import ALPHA_LEAF, LOCON, MAGNITUDE_LEAF
from rankscope.formats.peft_keys import PEFT_PREFIX, magnitude_key
from rankscope.formats.peft_write import (
    FactorLayout,
    alpha_settings,
    exact_targets,
    factor_tensors,
    lora_config,
    whole_number,
)
from rankscope.updates import LowRank

_TEXT = re.compile(r"text_encoder(?:_(?P<number>\d))?")
_UNET = re.compile(r"(?:^|\.)(?:down_blocks|up_blocks|mid_block)(?:\.|$)")


@dataclass(frozen=True)
class LayerFactors:
    """One layer: ``name`` in its source, the ``component`` of a pipeline ("" for a model of its own), the dotted path
    ``module`` within that, scale·B·A with the factors as they are stored, how they are stored, and DoRA's (out,)."""

    name: str
    component: str
    module: str
    update: LowRank
    place: FactorLayout
    magnitude: Tensor | None

    @property
    def rank(self) -> int:
        return self.update.nominal_rank

    @property
    def alpha(self) -> float:
        """α with which these factors have their scale."""
        return self.update.scale * self.rank


@dataclass(frozen=True)
class AdapterContents:
    """``tensors`` and ``metadata`` of a file, ``config`` of PEFT's folder, and each layer's update as it is read."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    updates: list[LowRank]


def to_peft(layers: Sequence[LayerFactors], base: str | None, paths: Iterable[str] = ()) -> AdapterContents:
    """PEFT's folder: factors as they are, each layer's α in ``alpha_pattern`` where it is not the commonest.

    Args:
        base: what the configuration names as the base.
        paths: modules of the base, where known, so that no other module is targeted.

    Raises:
        FormatError: some layers have a magnitude and some have none, for which PEFT has no configuration.
    """
    _check_unique(layer.module for layer in layers)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors |= factor_tensors(layer.module, LowRank(layer.update.B, layer.update.A), layer.place)
        if layer.magnitude is not None:
            tensors[magnitude_key(layer.module)] = _reshape_magnitude(layer)
    dora = check_magnitudes(layers)
    targets = [layer.module for layer in layers]
    config = lora_config(
        {
            **alpha_settings({layer.module: (layer.rank, layer.alpha) for layer in layers}),
            "lora_dropout": 0.0,
            "target_modules": exact_targets(targets, {*paths, *targets}),
        },
        base=base,
        dora=dora,
    )
    return AdapterContents(tensors, {}, config, [layer.update for layer in layers])


def _reshape_magnitude(layer: LayerFactors) -> Tensor:
    """DoRA's magnitude as PEFT stores it: (out,), of a convolution (1, out, 1, …)."""
    if layer.magnitude is None:
        raise FormatError(f"layer {layer.name} has no magnitude")
    ones = [1] * len(layer.place.kernel)
    return layer.magnitude.reshape(1, -1, *ones) if ones else layer.magnitude


def check_magnitudes(layers: Sequence[LayerFactors]) -> bool:
    """Whether the adapter is DoRA.

    Raises:
        FormatError: only some layers are: PEFT has one setting for all, and would rescale the others.
    """
    without = [layer.name for layer in layers if layer.magnitude is None]
    if 0 < len(without) < len(layers):
        raise FormatError(
            f"{len(layers) - len(without)} layers have DoRA's magnitude and {len(without)} have none (first "
            f"{without[0]}); PEFT's configuration has it in all or in none, so no adapter there is the same"
        )
    return not without


def to_kohya(layers: Sequence[LayerFactors]) -> AdapterContents:
    """kohya's file: factors as they are, α in a tensor of its own, the dotted paths in the metadata.

    Raises:
        FormatError: two layers would get the same name.
    """
    raw = kohya_names(layers)
    tensors: dict[str, Tensor] = {}
    updates = []
    for layer, name in zip(layers, raw, strict=True):
        A, B = layer.update.A, layer.update.B
        ones = [1] * len(layer.place.kernel)
        tensors[f"{name}.{LOCON.b}"] = A.reshape(len(A), -1, *layer.place.kernel)
        tensors[f"{name}.{LOCON.a}"] = B.reshape(*B.shape, *ones)
        alpha = torch.tensor(layer.alpha, dtype=torch.float32)
        tensors[f"{name}.{ALPHA_LEAF}"] = alpha
        if layer.magnitude is not None:
            tensors[f"{name}.{MAGNITUDE_LEAF}"] = layer.magnitude.reshape(-1, 1, *ones)
        updates.append(LowRank(B, A, float(alpha) / layer.rank))
    r, alpha_of_most = Counter((layer.rank, layer.alpha) for layer in layers).most_common(1)[0][0]
    metadata = {
        MODULE_KEY: "networks.lora",
        RANK_KEY: str(r),
        ALPHA_KEY: str(whole_number(alpha_of_most)),
        NAMES_KEY: json.dumps({name: [layer.component, layer.module] for name, layer in zip(raw, layers, strict=True)}),
    }
    return AdapterContents(tensors, metadata, None, updates)


def kohya_names(layers: Sequence[LayerFactors]) -> list[str]:
    """kohya's names: ``lora_unet_`` or ``lora_te_`` (``lora_te1_`` … of several), then the path with underscores."""
    components = {pipeline_component(layer, layers) for layer in layers}
    several = sum(_TEXT.fullmatch(component) is not None for component in components) > 1
    names = []
    for layer in layers:
        text = _TEXT.fullmatch(pipeline_component(layer, layers))
        number = (text["number"] or ("1" if several else "")) if text else ""
        front = f"lora_te{number}" if text else "lora_unet"
        names.append(f"{front}_{layer.module.replace('.', '_')}")
    _check_unique(names)
    return names


def to_diffusers(layers: Sequence[LayerFactors]) -> AdapterContents:
    """diffusers' file: PEFT's names behind the component, α = r, which its older versions assume, in the metadata too.

    The scale goes into B, which stays in its dtype where that is exact and becomes float32 where it is not.

    Raises:
        FormatError: DoRA in some layers only.
    """
    _check_unique(f"{pipeline_component(layer, layers)}.{layer.module}" for layer in layers)
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    updates = []
    by_component: dict[str, list[LayerFactors]] = {}
    for layer in layers:
        by_component.setdefault(pipeline_component(layer, layers), []).append(layer)
        updates.append(LowRank(fold_scale(layer.update), layer.update.A))
        own = factor_tensors(layer.module, updates[-1], layer.place)
        if layer.magnitude is not None:
            own[magnitude_key(layer.module)] = _reshape_magnitude(layer)
        tensors |= {
            f"{pipeline_component(layer, layers)}.{key.removeprefix(PEFT_PREFIX)}": tensor
            for key, tensor in own.items()
        }
    for name, own_layers in by_component.items():
        config = {
            **alpha_settings({layer.module: (layer.rank, float(layer.rank)) for layer in own_layers}),
            "target_modules": [layer.module for layer in own_layers],
            "use_dora": check_magnitudes(own_layers),
            "bias": "none",
        }
        settings |= {f"{name}.{key}": value for key, value in config.items()}
    return AdapterContents(tensors, {LORA_ADAPTER_METADATA_KEY: json.dumps(settings)}, None, updates)


def fold_scale(update: LowRank) -> Tensor:
    """scale·B, (out, r), in B's dtype where that is exact, else in float32."""
    product = update.B.double() * update.scale
    same = product.to(update.B.dtype)
    return same if torch.equal(same.double(), product) else product.float()


def pipeline_component(layer: LayerFactors, layers: Sequence[LayerFactors]) -> str:
    """The component of a pipeline that a layer is in; for a model alone, the component that its paths look like."""
    if layer.component:
        return layer.component
    if any(other.module.startswith("text_model.") for other in layers if not other.component):
        return "text_encoder"
    return (
        "unet"
        if any(denoiser_name(other.module) == "unet" for other in layers if not other.component)
        else "transformer"
    )


def denoiser_name(module: str) -> str:
    """Which of the two kinds of denoising model has a module of this path."""
    return "unet" if _UNET.search(module) else "transformer"


def _check_unique(names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise FormatError(f"two layers would both be called {twice[0]}; convert one part of the pipeline (--component)")
