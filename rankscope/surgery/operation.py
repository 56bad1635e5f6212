"""One call of a function of surgery: its name, where the output goes, the settings all share, and its record."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankscope.formats.file_io import as_text, write_json
from rankscope.surgery.output_folder import RECORD_NAME, create_output_folder
from rankscope.surgery.surgery_result import SCHEMAS, LayerChange, SurgeryResult, SurgeryTotal
from rankscope.surgery.truncate import RankChoice
from rankscope.track import Track


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What every function of surgery is given beside its inputs.

    Attributes:
        name: one of ``OPERATIONS``.
        out: where the output goes; nothing may be there yet.
        choice: which singular values are kept; None keeps all.
        dtype: dtype of the written factors; None keeps that of the inputs.
        device: where the computations run.
        track: wraps the list of layers and may show progress.
        command: the command line that the record names, if there was one.
    """

    name: str
    out: str | os.PathLike[str]
    choice: RankChoice | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str = "cpu"
    track: Track = iter
    command: str | None = None

    def create_folder(self) -> AbstractContextManager[Path]:
        """The folder of the output while it is written; see ``create_output_folder``."""
        return create_output_folder(self.out)

    def file_metadata(self) -> dict[str, str]:
        """Metadata of the safetensors files that the operation writes."""
        return {"rankscope": self.name, **({"rankscope_command": as_text(self.command)} if self.command else {})}

    def make_result(self, layers: tuple[LayerChange, ...], **fields: Any) -> SurgeryResult:
        """What was done to ``layers``; ``fields`` are the other fields of ``SurgeryResult``."""
        choice = "exact" if self.choice is None else str(self.choice)
        fields = {"output": str(self.out), "command": self.command, "choice": choice, **fields}
        texts = {name: _as_texts(value) for name, value in fields.items()}
        return SurgeryResult(schema=SCHEMAS[self.name], layers=layers, total=SurgeryTotal.of(layers), **texts)

    def write_record(self, folder: Path, layers: tuple[LayerChange, ...], **fields: Any) -> SurgeryResult:
        """The result of ``make_result``, which is also written beside the weights."""
        result = self.make_result(layers, **fields)
        write_json(folder / RECORD_NAME, result.to_json())
        return result


def _as_texts(value: Any) -> Any:
    """A field of the record with every string as valid text; paths and names may be none."""
    if isinstance(value, tuple):
        return tuple(_as_texts(item) for item in value)
    return as_text(value) if isinstance(value, str) else value
