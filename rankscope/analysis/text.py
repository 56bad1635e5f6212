"""How results name themselves, show themselves in notebooks, and come back from JSON."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from rankscope.errors import FormatError

SHOWN_ROWS = 40  # of a result's table in a notebook
PARTS_OF_A_RUN = {"adapter", "initial", "update.safetensors", "adapter_model.safetensors", "adapter_config.json"}
Decoded = TypeVar("Decoded")


def short_name(path: str) -> str:
    """The end of a path that tells runs apart: ``study/runs/lora-r8-s0/adapter`` is ``lora-r8-s0``."""
    parts = Path(path).absolute().parts[1:] or (path,)
    kept = [part for part in parts if part not in PARTS_OF_A_RUN] or list(parts)
    return kept[-1]


def decoded(kind: type[Decoded], value: Mapping[str, Any], schema: str) -> Decoded:
    """An object of ``kind`` from JSON values.

    Raises:
        FormatError: another schema, or fields that are missing or of another type.
    """
    found = value.get("schema") if isinstance(value, Mapping) else None
    if found != schema:
        raise FormatError(f"expected a result with the schema {schema!r}, not {found!r}")
    try:
        return msgspec.convert(value, kind, dec_hook=_array)
    except msgspec.ValidationError as error:
        raise FormatError(f"not a whole result of the schema {schema!r} ({error})") from error


def _array(kind: type, value: Any) -> Any:
    """Lists of numbers as arrays; null stands for a number that is not known."""
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise msgspec.ValidationError(f"expected a grid of numbers ({error})") from error


def json_values(result: msgspec.Struct) -> dict[str, Any]:
    """What strict JSON holds of a result: arrays and tuples as lists, NaN as null."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(result, enc_hook=lambda array: array.tolist()))
    return found


def html_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """A table for notebooks, at most ``SHOWN_ROWS`` long."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[:SHOWN_ROWS]
    )
    more = f"<p>… and {len(rows) - SHOWN_ROWS} more</p>" if len(rows) > SHOWN_ROWS else ""
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    listed = f"<ul>{said}</ul>" if said else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<p><b>{html.escape(title)}</b></p>{table}{more}{listed}"
