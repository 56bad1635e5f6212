"""One weight under the names of several tools: dots or underscores, and what each puts in front.

kohya's ``lora_unet_down_blocks_0_to_q``, diffusers' ``unet.down_blocks.0.to_q`` and the model's own
``down_blocks.0.to_q`` are one weight.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

# What stands in front of a path, and the part of a pipeline that it means; "" where it means none.
_DOTTED = re.compile(
    r"(?P<front>base_model\.model|unet|transformer|prior|diffusion_model|model\.diffusion_model"
    r"|text_encoder(?:_(?P<te>\d))?)\.(?P<path>.+)"
)
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
    found = _STEM.fullmatch(name)
    stem, leaf = (found["stem"], found["leaf"] or "") if found else (name, "")
    raw = "." not in stem
    ways = [Alias(None, stem + leaf, raw)]
    front = (_RAW if raw else _DOTTED).fullmatch(stem)
    if front:
        ways.append(Alias(_component(front["front"], front["te"]), front["path"] + leaf, raw))
    return ways


def _component(front: str, number: str | None) -> str | None:
    """What a prefix means; None for one that every part of a pipeline can have."""
    if _TEXT.match(front):
        return f"text {number or 1}"
    return None if front in ("lycoris", "base_model.model") else "denoiser"


def pair_aliases(names_a: Iterable[str], names_b: Iterable[str]) -> list[tuple[str, str]]:
    """Names of a and b that mean one weight, where each has one partner and no other."""
    by_key: dict[str, list[tuple[str, Alias]]] = defaultdict(list)
    for name in names_b:
        for way in aliases(name):
            by_key[_replace_dots(way.path)].append((name, way))
    partners: dict[str, set[str]] = defaultdict(set)
    back: dict[str, set[str]] = defaultdict(set)
    for name in names_a:
        for way in aliases(name):
            for other, theirs in by_key.get(_replace_dots(way.path), ()):
                if _agree(way, theirs):
                    partners[name].add(other)
                    back[other].add(name)
    single = ((name, next(iter(found))) for name, found in partners.items() if len(found) == 1)
    return [(name, other) for name, other in single if len(back[other]) == 1]


def _agree(one: Alias, other: Alias) -> bool:
    components = one.component is None or other.component is None or one.component == other.component
    return components and (one.path == other.path or one.raw or other.raw)


def _replace_dots(path: str) -> str:
    return path.replace(".", "_")
