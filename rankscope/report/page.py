"""A document as one HTML file: it loads nothing, needs no script, and reads on a phone, in the dark and on paper."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import rankscope
from rankscope.errors import ConfigError, FormatError
from rankscope.formats.file_io import write_atomic
from rankscope.report.cells import RenderedTable, allow_breaks, render_table, strip_control_characters
from rankscope.report.document import Document, Picture, Section

MOST_ROWS = 500
"""Rows that are shown of the numbers behind a picture; tables of their own are whole."""
FEW_SVG_BYTES = 100_000
"""Up to here a picture is embedded as lines without a look at what it would take as points."""
PIXELS = 108
"""Width on the screen of an inch of a figure: text of 8 points is 12 pixels high."""
PAIRS = 12  # a longer mapping is shown as JSON
RESERVED = ("page-top", "page-main", "page-summary", "page-provenance")


class _RenderedPicture(NamedTuple):
    id: str
    number: int
    caption: str
    alt: str
    source: str
    width: int
    height: int
    data: RenderedTable


class _RenderedSection(NamedTuple):
    section: Section
    pictures: list[_RenderedPicture]
    tables: list[RenderedTable]


def write_page(document: Document, path: str | os.PathLike[str]) -> Path:
    """Write the page atomically; its pictures are drawn here.

    Raises:
        ConfigError: two sections have the same key.
        FormatError: the file cannot be written.
    """
    target = Path(path).expanduser()
    if target.is_dir():
        raise FormatError(f"{target}: is a folder; give the page a name of its own")
    encoded = render_page(document).encode("utf-8")

    def write(file: Path) -> None:
        file.write_bytes(encoded)

    write_atomic(target, write)
    return target


def render_page(document: Document) -> str:
    """The page as text. The same document gives the same text.

    Raises:
        ConfigError: two sections have the same key.
    """
    keys = Counter([*RESERVED, *(section.key for section in document.sections)])
    if doubled := [key for key, count in keys.items() if count > 1]:
        raise ConfigError(f"two parts of a page have the key {doubled[0]!r}")
    script = _read_package_file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .from_string(_read_package_file("template.html"))
        .render(
            document=document,
            sections=_sections(document),
            summary=_summary(document),
            provenance=[(key, *_format_fact(key, value)) for key, value in document.provenance.items()],
            style=Markup(_read_package_file("page.css")),
            script=Markup(script),
            # The page's own script and no other: text that slipped through the escaping could not run either.
            policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
            "base-uri 'none'; form-action 'none'",
            version=rankscope.__version__,
        )
    )


def _read_package_file(name: str) -> str:
    return files("rankscope.report").joinpath(name).read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=strip_control_characters,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["soft"] = allow_breaks
    return environment


def _sections(document: Document) -> list[_RenderedSection]:
    figures, tables = itertools.count(1), itertools.count(1)
    return [
        _RenderedSection(
            section,
            [_picture(picture, next(figures)) for picture in section.pictures],
            [render_table(table, f"table-{n}", n) for table, n in zip(section.tables, tables, strict=False)],
        )
        for section in document.sections
    ]


def _summary(document: Document) -> str | None:
    """How the claims fared, in a sentence; None where there is none and nothing is missing."""
    answers = Counter(verdict.answer for section in document.sections for verdict in section.verdicts)
    missing = sum(section.missing is not None for section in document.sections)
    if not answers and not missing:
        return None
    said = ", ".join(f"{answers[word]} {word}" for word in ("yes", "no", "undecided"))
    lacking = f"; {missing} {'section has' if missing == 1 else 'sections have'} no data" if missing else ""
    total = answers.total()
    return f"{total} {'claim' if total == 1 else 'claims'} tested: {said}{lacking}."


def _picture(picture: Picture, number: int) -> _RenderedPicture:
    width, height = (round(inches * PIXELS) for inches in picture.figure.get_size_inches())
    data = render_table(picture.data, f"figure-{number}-data", None, MOST_ROWS)
    return _RenderedPicture(
        f"figure-{number}", number, picture.caption, picture.alt, _data_uri(picture), width, height, data
    )


def _data_uri(picture: Picture) -> str:
    """Lines as SVG, sharp at every size; heat maps, and lines so many that they take more than points, as PNG."""
    has_images = any(axes.get_images() for axes in picture.figure.axes)
    if has_images or (len(picture.svg) > FEW_SVG_BYTES and len(picture.png) < len(picture.svg)):
        return _encode_data_uri("png", picture.png)
    return _encode_data_uri("svg+xml", picture.svg)


def _encode_data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _format_fact(key: str, value: Any) -> tuple[str, Any]:
    """How a fact of the provenance is shown: as text, as pairs of short texts, or as JSON."""
    value = msgspec.to_builtins(value)
    if key == "command" and isinstance(value, list):
        return "code", shlex.join(map(str, value))
    if (
        isinstance(value, Mapping)
        and len(value) <= PAIRS
        and not any(isinstance(v, list | dict) for v in value.values())
    ):
        return "pairs", [(str(name), "–" if one is None else str(one)) for name, one in value.items()]
    if isinstance(value, dict):
        lines = (f"  {_json(name)}: {_json(one)}" for name, one in value.items())
        return "json", "{\n" + ",\n".join(lines) + "\n}"
    if isinstance(value, list):
        return "json", _json(value)
    return "text", str(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
