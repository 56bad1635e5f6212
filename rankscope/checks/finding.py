"""A finding: what one check of ``check_table.py`` says, with its number and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Level = Literal["error", "warning", "unchecked", "ok"]
LEVELS: tuple[Level, ...] = ("error", "warning", "unchecked", "ok")
"""The levels, the worst first. ``unchecked``: the check needs what was not given or could not be read."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check found.

    ``check``: its name in ``CHECKS``. ``says``: what was found, where, with its number. ``advice``: what to do, "" for
    nothing. ``value``: the number alone, ``limit`` what it was compared with. ``layers``: the layers or tensors that
    are concerned; none where it is the adapter as a whole.
    """

    check: str = ""
    level: Level
    says: str
    advice: str = ""
    value: float | None = None
    limit: float | None = None
    layers: tuple[str, ...] = ()


def report_ok(says: str, value: float | None = None, limit: float | None = None) -> Finding:
    """A check that found nothing wrong."""
    return Finding(level="ok", says=says, value=value, limit=limit)


def report_unchecked(says: str, advice: str = "") -> Finding:
    """A check that could not be made, and why."""
    return Finding(level="unchecked", says=says, advice=advice)


def report_warning(
    says: str, advice: str, value: float | None = None, limit: float | None = None, layers: Iterable[str] = ()
) -> Finding:
    """Something that may be wrong, or that a reader of the adapter can get wrong."""
    return _report("warning", says, advice, value, limit, layers)


def report_error(
    says: str, advice: str, value: float | None = None, limit: float | None = None, layers: Iterable[str] = ()
) -> Finding:
    """Something that is wrong."""
    return _report("error", says, advice, value, limit, layers)


def _report(
    level: Level, says: str, advice: str, value: float | None, limit: float | None, layers: Iterable[str]
) -> Finding:
    """A finding; without a number of its own it has that of its layers, of which there should be none."""
    names = tuple(layers)
    if value is None and names:
        value, limit = len(names), 0
    return Finding(level=level, says=says, advice=advice, value=value, limit=limit, layers=names)


def format_names(names: Iterable[str], count: int = 2) -> str:
    """The first few names, for a sentence."""
    known = list(names)
    return ", ".join(known[:count]) + (", …" if len(known) > count else "")


def format_share(part: int, whole: int, noun: str) -> str:
    """``3 of 14 layers``, ``all 14 layers``, ``the only layer``."""
    if whole == 1:
        return f"the only {noun}" if part else f"no {noun}"
    return f"all {whole} {noun}s" if part == whole else f"{part} of {whole} {noun}s"
