"""Adapters in torchtune's own names: ``layers.0.attn.q_proj.lora_a.weight`` (r, in), ``lora_b.weight`` (out, r).

DoRA's magnitude is ``.magnitude`` (out,). α is not in the file; torchtune writes PEFT's ``adapter_config.json``
beside it. Layouts: github.com/pytorch/torchtune, modules/peft/lora.py, training/checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from rankscope.formats.adapter_file import FileStore, NoAlphaError, ParsedFileKey
from rankscope.formats.file_io import TensorFile
from rankscope.formats.lycoris import LOCON, MAGNITUDE_LEAF
from rankscope.formats.peft_config import AdapterConfig, read_adapter_config
from rankscope.formats.peft_keys import CONFIG_NAME
from rankscope.formats.pickle_file import PickledFile

_LEAVES = {".lora_a.weight": LOCON.b, ".lora_b.weight": LOCON.a, ".magnitude": MAGNITUDE_LEAF}


def is_torchtune(keys: Iterable[str]) -> bool:
    """Whether keys are torchtune's."""
    return any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in keys)


class TorchtuneStore(FileStore):
    """An adapter in torchtune's names.

    Raises:
        NoAlphaError: no configuration is beside it, and no α was given.
    """

    kind: ClassVar[str] = "torchtune"

    def __init__(self, path: Path, file: TensorFile | PickledFile, *options: Any, **others: Any) -> None:
        config = file.path.parent / CONFIG_NAME
        self._config: AdapterConfig | None = read_adapter_config(config) if config.is_file() else None
        super().__init__(path, file, *options, **others)

    def base_name(self) -> str | None:
        return None if self._config is None else self._config.base_model_name_or_path

    def _parse(self, key: str) -> ParsedFileKey | None:
        end = next((end for end in _LEAVES if key.endswith(end)), None)
        return None if end is None else ParsedFileKey(key.removesuffix(end), _LEAVES[end])

    def _scale_alpha(self, module: str, rank: int | None, kernel: tuple[int, ...]) -> float | None:
        if self._config is None or rank is None:
            return None
        return self._config.scale(module, rank) * rank

    def _add(self, module: str, keys: Mapping[str, str]) -> None:
        if self._config is None and self._alpha is None:
            raise NoAlphaError(
                f"is of an adapter of torchtune, whose α is not in the file; put its {CONFIG_NAME} beside it, or give "
                "α (--alpha)"
            )
        super()._add(module, keys)

    def _note_oddities(self) -> None:
        self.notes.append(
            "names and order of rows are torchtune's: the rows of q and k in each head lie in another order than in a "
            "checkpoint of transformers, so their left singular directions are not comparable with one's"
        )
