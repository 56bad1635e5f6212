"""LoRA files of XLabs for FLUX: ``double_blocks.0.processor.qkv_lora1.down.weight`` (r, in), ``….up.weight`` (out, r).

The number says whose attention it is, 1 the image's and 2 the text's. There is no α: the scale is 1. In single blocks
``qkv_lora`` changes the first rows of ``linear1``; ``proj_lora`` there is applied to the output of ``linear2`` and
changes no weight by a fixed amount. Layouts: github.com/XLabs-AI/x-flux, src/flux/modules/layers.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar

from rankscope.formats.adapter_file import FileStore, ParsedFileKey
from rankscope.formats.lycoris import LOCON

_DOUBLE = re.compile(
    r"(?:diffusion_model\.)?(?P<block>double_blocks\.\d+)\.processor\.(?P<part>qkv|proj)_lora(?P<stream>[12])"
    r"\.(?P<half>down|up)\.weight"
)
_SINGLE = re.compile(
    r"(?:diffusion_model\.)?(?P<block>single_blocks\.\d+)\.processor\.(?P<part>qkv|proj)_lora\.(?P<half>down|up)\.weight"
)
_STREAMS = {"1": "img", "2": "txt"}
_HALVES = {"down": LOCON.b, "up": LOCON.a}
QKV_ROWS = ".linear1:qkv"


def is_xlabs(keys: Iterable[str]) -> bool:
    """Whether keys are those of XLabs."""
    return any(_DOUBLE.fullmatch(key) or _SINGLE.fullmatch(key) for key in keys)


class XLabsStore(FileStore):
    """A FLUX adapter of XLabs; modules have the names of FLUX's own code (``double_blocks.0.img_attn.qkv``)."""

    kind: ClassVar[str] = "xlabs"

    def _parse(self, key: str) -> ParsedFileKey | None:
        if match := _DOUBLE.fullmatch(key):
            module = f"{match['block']}.{_STREAMS[match['stream']]}_attn.{match['part']}"
            return ParsedFileKey(module, _HALVES[match["half"]])
        match = _SINGLE.fullmatch(key)
        if match is None or match["part"] == "proj":
            return None
        return ParsedFileKey(match["block"] + QKV_ROWS, _HALVES[match["half"]])
