"""Low-rank layers between two formats, and the tensors that each format has for them."""

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
    """``tensors`` and ``metadata`` of a file, ``config`` of PEFT's folder, and what a reader makes of each layer."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    updates: list[LowRank]


def to_peft(pieces: Sequence[LayerFactors], base: str | None, paths: Iterable[str] = ()) -> AdapterContents:
    """PEFT's folder: factors as they are, each layer's α in ``alpha_pattern`` where it is not the commonest.

    Args:
        base: what the configuration names as the base.
        paths: modules of the base, where known, so that no other one is targeted.

    Raises:
        FormatError: some layers have a magnitude and some have none, which PEFT cannot say.
    """
    _check_unique(piece.module for piece in pieces)
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        tensors |= factor_tensors(piece.module, LowRank(piece.update.B, piece.update.A), piece.place)
        if piece.magnitude is not None:
            tensors[magnitude_key(piece.module)] = _reshape_magnitude(piece)
    dora = check_magnitudes(pieces)
    targets = [piece.module for piece in pieces]
    config = lora_config(
        {
            **alpha_settings({piece.module: (piece.rank, piece.alpha) for piece in pieces}),
            "lora_dropout": 0.0,
            "target_modules": exact_targets(targets, {*paths, *targets}),
        },
        base=base,
        dora=dora,
    )
    return AdapterContents(tensors, {}, config, [piece.update for piece in pieces])


def _reshape_magnitude(piece: LayerFactors) -> Tensor:
    """DoRA's magnitude as PEFT stores it: (out,), of a convolution (1, out, 1, …)."""
    if piece.magnitude is None:
        raise FormatError(f"layer {piece.name} has no magnitude")
    ones = [1] * len(piece.place.kernel)
    return piece.magnitude.reshape(1, -1, *ones) if ones else piece.magnitude


def check_magnitudes(pieces: Sequence[LayerFactors]) -> bool:
    """Whether the adapter is DoRA.

    Raises:
        FormatError: it is in some layers only: PEFT has one setting for all, and would rescale the others.
    """
    without = [piece.name for piece in pieces if piece.magnitude is None]
    if 0 < len(without) < len(pieces):
        raise FormatError(
            f"{len(pieces) - len(without)} layers have DoRA's magnitude and {len(without)} have none (first "
            f"{without[0]}); PEFT's configuration has it in all or in none, so no adapter there is the same"
        )
    return not without


def to_kohya(pieces: Sequence[LayerFactors]) -> AdapterContents:
    """kohya's file: factors as they are, α a tensor of its own; the dotted paths go along in the metadata.

    Raises:
        FormatError: two layers get one name.
    """
    raw = kohya_names(pieces)
    tensors: dict[str, Tensor] = {}
    updates = []
    for piece, name in zip(pieces, raw, strict=True):
        A, B = piece.update.A, piece.update.B
        ones = [1] * len(piece.place.kernel)
        tensors[f"{name}.{LOCON.b}"] = A.reshape(len(A), -1, *piece.place.kernel)
        tensors[f"{name}.{LOCON.a}"] = B.reshape(*B.shape, *ones)
        alpha = torch.tensor(piece.alpha, dtype=torch.float32)
        tensors[f"{name}.{ALPHA_LEAF}"] = alpha
        if piece.magnitude is not None:
            tensors[f"{name}.{MAGNITUDE_LEAF}"] = piece.magnitude.reshape(-1, 1, *ones)
        updates.append(LowRank(B, A, float(alpha) / piece.rank))
    r, alpha_of_most = Counter((piece.rank, piece.alpha) for piece in pieces).most_common(1)[0][0]
    metadata = {
        MODULE_KEY: "networks.lora",
        RANK_KEY: str(r),
        ALPHA_KEY: str(whole_number(alpha_of_most)),
        NAMES_KEY: json.dumps({name: [piece.component, piece.module] for name, piece in zip(raw, pieces, strict=True)}),
    }
    return AdapterContents(tensors, metadata, None, updates)


def kohya_names(pieces: Sequence[LayerFactors]) -> list[str]:
    """kohya's names: ``lora_unet_`` or ``lora_te_`` (``lora_te1_`` … of several), then the path with underscores."""
    components = {pipeline_component(piece, pieces) for piece in pieces}
    several = sum(_TEXT.fullmatch(one) is not None for one in components) > 1
    names = []
    for piece in pieces:
        text = _TEXT.fullmatch(pipeline_component(piece, pieces))
        number = (text["number"] or ("1" if several else "")) if text else ""
        front = f"lora_te{number}" if text else "lora_unet"
        names.append(f"{front}_{piece.module.replace('.', '_')}")
    _check_unique(names)
    return names


def to_diffusers(pieces: Sequence[LayerFactors]) -> AdapterContents:
    """diffusers' file: PEFT's names behind the component, α = r, which its older versions assume, in the metadata too.

    The scale goes into B, which stays in its dtype where that is exact and becomes float32 where it is not.

    Raises:
        FormatError: DoRA in some layers only.
    """
    _check_unique(f"{pipeline_component(piece, pieces)}.{piece.module}" for piece in pieces)
    tensors: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    updates = []
    by_component: dict[str, list[LayerFactors]] = {}
    for piece in pieces:
        by_component.setdefault(pipeline_component(piece, pieces), []).append(piece)
        updates.append(LowRank(fold_scale(piece.update), piece.update.A))
        own = factor_tensors(piece.module, updates[-1], piece.place)
        if piece.magnitude is not None:
            own[magnitude_key(piece.module)] = _reshape_magnitude(piece)
        tensors |= {
            f"{pipeline_component(piece, pieces)}.{key.removeprefix(PEFT_PREFIX)}": tensor
            for key, tensor in own.items()
        }
    for name, own_pieces in by_component.items():
        config = {
            **alpha_settings({piece.module: (piece.rank, float(piece.rank)) for piece in own_pieces}),
            "target_modules": [piece.module for piece in own_pieces],
            "use_dora": check_magnitudes(own_pieces),
            "bias": "none",
        }
        told |= {f"{name}.{key}": value for key, value in config.items()}
    return AdapterContents(tensors, {LORA_ADAPTER_METADATA_KEY: json.dumps(told)}, None, updates)


def fold_scale(update: LowRank) -> Tensor:
    """scale·B in B's dtype where nothing is lost by that, else in float32."""
    product = update.B.double() * update.scale
    same = product.to(update.B.dtype)
    return same if torch.equal(same.double(), product) else product.float()


def pipeline_component(piece: LayerFactors, pieces: Sequence[LayerFactors]) -> str:
    """The part of a pipeline that a layer is in; of a model that is none, the one that its paths look like."""
    if piece.component:
        return piece.component
    if any(other.module.startswith("text_model.") for other in pieces if not other.component):
        return "text_encoder"
    return (
        "unet"
        if any(denoiser_name(other.module) == "unet" for other in pieces if not other.component)
        else "transformer"
    )


def denoiser_name(module: str) -> str:
    """Which of the two kinds of denoising model has a module of this path."""
    return "unet" if _UNET.search(module) else "transformer"


def _check_unique(names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise FormatError(f"two layers would both be called {twice[0]}; convert one part of the pipeline (--component)")
