"""Files of kohya's scripts and of LyCORIS: names with underscores, ``lora_down``/``lora_up``, a scalar ``alpha``.

``lora_unet_down_blocks_0_attn_to_q.lora_down.weight``: which underscores were dots is not known, so updates keep the
raw name. Some tools leave the dots behind the prefix. α that no tensor has is taken from the metadata; without any, the
scale is 1 (sd-scripts takes r for α). Layouts: github.com/kohya-ss/sd-scripts,
networks/lora.py; LyCORIS's: see ``lycoris.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import ClassVar

import msgspec

from rankscope.formats.adapter_file import FileStore, ParsedFileKey
from rankscope.formats.lycoris import LEAF_NAMES, LOCON, MAGNITUDE_LEAF
from rankscope.formats.peft_keys import PEFT_PREFIX

NAMES_KEY = "rankscope_names"
"""Metadata of files that rankscope wrote: a JSON object, raw name → [component of the pipeline or "", dotted path]."""
RANK_KEY, ALPHA_KEY = "ss_network_dim", "ss_network_alpha"

# ai-toolkit's name, and PEFT's names of the factors behind kohya's prefix.
_LEAVES = {"magnitude": MAGNITUDE_LEAF, "lora_A.weight": LOCON.b, "lora_B.weight": LOCON.a}
_LEAF = re.compile("|".join(re.escape(leaf) for leaf in sorted((*LEAF_NAMES, *_LEAVES), key=len, reverse=True)))
_KEY = re.compile(rf"(?P<module>.+?)\.(?P<leaf>{_LEAF.pattern})")
# Parts that only these files have; the others (diff, alpha, rescale) count only behind kohya's prefixes.
_DISTINCTIVE = re.compile(
    r"\.(?:lora_(?:up|down|mid)\.weight|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|oft_\w+)$"
)
_PREFIXED = re.compile(r"^(?:lora|lycoris)_[^.]+\.")


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether keys are those of kohya's scripts or LyCORIS."""
    own = [key for key in keys if not key.startswith(PEFT_PREFIX)]  # PEFT's LoHa and LoKr have the same parts
    return any(_DISTINCTIVE.search(key) or (_PREFIXED.match(key) and _KEY.fullmatch(key)) for key in own)


class KohyaStore(FileStore):
    """An adapter of kohya's scripts or of LyCORIS."""

    kind: ClassVar[str] = "kohya"

    def _parse(self, key: str) -> ParsedFileKey | None:
        match = _KEY.fullmatch(key)
        return ParsedFileKey(match["module"], _LEAVES.get(match["leaf"], match["leaf"])) if match else None

    def _scale_alpha(self, module: str, rank: int | None, kernel: tuple[int, ...]) -> float | None:
        return self._metadata_alpha(kernel)

    def _note_oddities(self) -> None:
        self._note_claim()
        if zero := [name for name, layer in self.layers.items() if layer.alpha == 0]:
            self.notes.append(f"α is 0 in {len(zero)} layers (first {zero[0]}), so their update is zero")

    def _note_claim(self) -> None:
        """Note where the metadata gives another rank than the tensors; convolutions have a rank of their own."""
        claimed = self.file.metadata.get(RANK_KEY, "")
        ranks = {name: layer.rank for name, layer in self.layers.items() if layer.rank and not layer.kernel}
        differ = {name: rank for name, rank in ranks.items() if claimed.isdecimal() and str(rank) != claimed}
        if differ:
            name, rank = next(iter(differ.items()))
            self.notes.append(
                f"the metadata gives another rank than the tensors in {len(differ)} of {len(ranks)} layers (first "
                f"{name}: {claimed[:20]}, in fact {rank}); the tensors are trusted, also for the scale"
            )


def read_dotted_names(metadata: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """(component of the pipeline, dotted path) by raw name, from the metadata; empty where it has none."""
    try:
        return msgspec.json.decode(metadata.get(NAMES_KEY, "{}"), type=dict[str, tuple[str, str]])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}
