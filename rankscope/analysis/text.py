"""How results name themselves and show themselves in notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

SHOWN_ROWS = 40  # of a result's table in a notebook
PARTS_OF_A_RUN = {"adapter", "initial", "update.safetensors", "adapter_model.safetensors", "adapter_config.json"}


def short_name(path: str) -> str:
    """The end of a path that tells runs apart: ``study/runs/lora-r8-s0/adapter`` is ``lora-r8-s0``."""
    parts = Path(path).absolute().parts[1:] or (path,)
    kept = [part for part in parts if part not in PARTS_OF_A_RUN] or list(parts)
    return kept[-1]


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
