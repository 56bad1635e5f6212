"""How the names and shapes of an adapter's layers fit the headers of a base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from rankscope.formats.checkpoint import Checkpoint, read_model_config
from rankscope.formats.names import WEIGHT_SUFFIX, pair_names

Shape = tuple[int, int]
_PART = re.compile(r":[^.:]+$|\[\d+\]$")  # of a fused projection or of a stack of experts
# What transformers' models with a head have before the names of the bare model, beside the family's own name.
BODY_PREFIXES = ("model.", "transformer.", "backbone.", "encoder.", "decoder.")


@dataclass(frozen=True)
class BaseMatch:
    """What the headers of a base say about an adapter's layers.

    ``partners``: the base's tensor of each layer. ``missing``: layers that have none. ``misfits``: (update's shape,
    base's shape) of layers that do not fit. ``prefix``: what stands before the names on one side alone, and whether
    that is the ``adapter`` or the ``base`` (``prefix_side``). ``doubled``: the base's own names begin with that prefix
    too. ``is_body``: it is what a model with a head has before its body (base_model_prefix), as far as the model's
    type tells. ``dtypes``: how the partners are stored.
    """

    path: Path
    partners: Mapping[str, str]
    missing: tuple[str, ...]
    misfits: Mapping[str, tuple[Shape, Shape]]
    prefix: str
    prefix_side: str
    doubled: bool
    is_body: bool
    dtypes: Mapping[str, torch.dtype]
    examples: tuple[str, ...]


def match_base(path: Path, shapes: Mapping[str, Shape | None]) -> BaseMatch:
    """Pair layers, by their names with their shapes (out, in) where known, with the tensors of a base.

    Raises:
        FormatError: the base cannot be read, or is quantised in a layout that is not.
    """
    checkpoint = Checkpoint(path)
    checkpoint.check_readable()
    partners = _find_partners(shapes, checkpoint.infos)
    prefix, side = _common_prefix(partners)
    return BaseMatch(
        path=path,
        partners=partners,
        missing=tuple(name for name in shapes if name not in partners),
        misfits=dict(_find_misfits(shapes, partners, checkpoint)),
        prefix=prefix,
        prefix_side=side,
        doubled=side == "adapter" and any(tensor.startswith(prefix) for tensor in partners.values()),
        is_body=_is_body_prefix(prefix, path),
        dtypes={name: checkpoint.infos[tensor].dtype for name, tensor in partners.items()},
        examples=tuple(name for name in checkpoint.infos if name.endswith(WEIGHT_SUFFIX))[:2],
    )


def _find_partners(names: Iterable[str], tensors: Iterable[str]) -> dict[str, str]:
    """The base's tensor of each layer; parts of a fused layer and experts of a stack share theirs."""
    wanted: dict[str, list[str]] = {}
    for name in names:
        bare = _PART.sub("", name)
        for tensor in (bare + WEIGHT_SUFFIX, bare):  # bare parameters, such as stacked experts, have no suffix
            wanted.setdefault(tensor, []).append(name)
    pairs = pair_names(wanted, tensors).pairs
    return {name: theirs for ours, theirs in pairs for name in wanted[ours]}


def _common_prefix(partners: Mapping[str, str]) -> tuple[str, str]:
    """The prefix that most names have on one side alone, and that side; ("", "") where names are equal or differ
    otherwise."""
    prefixes: Counter[tuple[str, str]] = Counter()
    for name, tensor in partners.items():
        bare = _PART.sub("", name)
        ours = bare + WEIGHT_SUFFIX if tensor.endswith(WEIGHT_SUFFIX) else bare
        if ours.endswith("." + tensor):
            prefixes[ours.removesuffix(tensor), "adapter"] += 1
        elif tensor.endswith("." + ours):
            prefixes[tensor.removesuffix(ours), "base"] += 1
    return prefixes.most_common(1)[0][0] if prefixes else ("", "")


def _is_body_prefix(prefix: str, base: Path) -> bool:
    model_type = str(read_model_config(base).get("model_type") or "") if base.is_dir() else ""
    return not model_type or prefix in BODY_PREFIXES or prefix.removesuffix(".") in model_type.replace("-", "_")


def _find_misfits(
    shapes: Mapping[str, Shape | None], partners: Mapping[str, str], checkpoint: Checkpoint
) -> Iterable[tuple[str, tuple[Shape, Shape]]]:
    for name, tensor in partners.items():
        shape = shapes[name]
        stored = checkpoint.infos[tensor].shape
        if shape is None or _PART.search(name) or len(stored) == 3:
            continue
        base = checkpoint.matrix_shape(tensor)
        is_grouped = len(stored) > 2 and shape[0] == base[0] and shape[1] % base[1] == 0  # a convolution in groups
        if base not in (shape, shape[::-1]) and not is_grouped:
            yield name, (shape, base)
