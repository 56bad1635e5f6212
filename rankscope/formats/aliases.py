"""The names that several tools give to one weight: with dots or underscores, and with each tool's prefix.

kohya's ``lora_unet_down_blocks_0_to_q``, diffusers' ``unet.down_blocks.0.to_q`` and the model's own
``down_blocks.0.to_q`` are one weight.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

# Prefixes of a path, most of which name the part of a pipeline.
_DOTTED = re.compile(
    r"(?P<front>base_model\.model|unet|transformer|prior|diffusion_model|model\.diffusion_model"
    r"|text_encoder(?:_(?P<te>\d))?)\.(?P<path>.+)"
)
# kohya's prefixes; some tools leave the dots of the path behind them.
_RAW = re.compile(r"(?P<front>lora_unet|lora_transformer|lora_prior|lora_te(?P<te>\d)?|lycoris)_(?P<path>.+)")
_STEM = re.compile(r"(?P<stem>.+?)(?P<leaf>\.weight|\.bias)?")
_TEXT = re.compile(r"(?:lora_te|text_encoder)")


class Alias(NamedTuple):
    """A way to read a name: the part of a pipeline ("denoiser", "text 1", None: any), and the path within it.

    ``raw``: dots are underscores in it.
    """

    component: str | None
    path: str
    raw: bool


def aliases(name: str) -> list[Alias]:
    """All ways to read a name."""
    match = _STEM.fullmatch(name)
    stem, leaf = (match["stem"], match["leaf"] or "") if match else (name, "")
    raw = "." not in stem
    readings = [Alias(None, stem + leaf, raw)]
    front = _RAW.fullmatch(stem) or (None if raw else _DOTTED.fullmatch(stem))
    if front:
        readings.append(Alias(_component(front["front"], front["te"]), front["path"] + leaf, raw))
    return readings


def _component(front: str, number: str | None) -> str | None:
    """The part of a pipeline that a prefix names; None for a prefix that every part can have."""
    if _TEXT.match(front):
        return f"text {number or 1}"
    return None if front in ("lycoris", "base_model.model") else "denoiser"


def pair_aliases(names_a: Iterable[str], names_b: Iterable[str]) -> list[tuple[str, str]]:
    """Names of a and b that mean one weight, where each has one partner and no other."""
    by_key: dict[str, list[tuple[str, Alias]]] = defaultdict(list)
    for name in names_b:
        for alias in aliases(name):
            by_key[_replace_dots(alias.path)].append((name, alias))
    partners_of_a: dict[str, set[str]] = defaultdict(set)
    partners_of_b: dict[str, set[str]] = defaultdict(set)
    for name in names_a:
        for alias in aliases(name):
            for other, other_alias in by_key.get(_replace_dots(alias.path), ()):
                if _agree(alias, other_alias):
                    partners_of_a[name].add(other)
                    partners_of_b[other].add(name)
    single = ((name, next(iter(partners))) for name, partners in partners_of_a.items() if len(partners) == 1)
    return [(name, other) for name, other in single if len(partners_of_b[other]) == 1]


def _agree(a: Alias, b: Alias) -> bool:
    same_component = a.component is None or b.component is None or a.component == b.component
    return same_component and (a.path == b.path or a.raw or b.raw)


def _replace_dots(path: str) -> str:
    return path.replace(".", "_")
