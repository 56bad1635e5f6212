"""Short names of results, and their tables in notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from rankscope.formats.peft_keys import CONFIG_NAME, WEIGHTS_NAME
from rankscope.formats.study_layout import ADAPTER_FOLDER, INITIAL_FOLDER, UPDATES_NAME
from rankscope.table import Table

MAX_HTML_ROWS = 40  # of a result's table in a notebook
RUN_FILE_NAMES = {ADAPTER_FOLDER, INITIAL_FOLDER, UPDATES_NAME, WEIGHTS_NAME, CONFIG_NAME}


def short_name(path: str) -> str:
    """The end of a path that tells runs apart: ``study/runs/lora-r8-s0/adapter`` is ``lora-r8-s0``."""
    parts = Path(path).absolute().parts[1:] or (path,)
    kept = [part for part in parts if part not in RUN_FILE_NAMES] or list(parts)
    return kept[-1]


def html_table(title: str, table: Table, notes: Iterable[str] = ()) -> str:
    """A table for notebooks of at most ``MAX_HTML_ROWS`` rows, its numbers rounded as on the terminal."""
    rows = table.text_rows()
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[:MAX_HTML_ROWS]
    )
    more = f"<p>… and {len(rows) - MAX_HTML_ROWS} more</p>" if len(rows) > MAX_HTML_ROWS else ""
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    listed = f"<ul>{items}</ul>" if items else ""
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<p><b>{html.escape(title)}</b></p>{body}{more}{listed}"


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Short names that all differ: equal ones become the parts in which their paths differ.

    Of equal paths the second gets "(2)", the third "(3)" and so on.
    """
    names = [short_name(path) for path in paths]
    for name in {name for name in names if names.count(name) > 1}:
        places = [i for i, other in enumerate(names) if other == name]
        for place, longer in zip(places, _strip_common_parts([paths[i] for i in places]), strict=True):
            names[place] = longer
    counts: dict[str, int] = {}
    for i, name in enumerate(names):
        counts[name] = counts.get(name, 0) + 1
        names[i] = name if counts[name] == 1 else f"{name} ({counts[name]})"
    return names


def _strip_common_parts(paths: Sequence[str]) -> list[str]:
    """The paths without their common beginning, and without names of a run's files at a common end."""
    split = [list(Path(path).absolute().parts[1:]) or [path] for path in paths]
    while all(len(parts) > 1 for parts in split) and len({parts[0] for parts in split}) == 1:
        split = [parts[1:] for parts in split]
    while (
        all(len(parts) > 1 for parts in split)
        and len({parts[-1] for parts in split}) == 1
        and split[0][-1] in RUN_FILE_NAMES
    ):
        split = [parts[:-1] for parts in split]
    return ["/".join(parts) for parts in split]
