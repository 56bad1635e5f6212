"""How a computation over many items shows its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Track = Callable[[list[Any]], Iterable[Any]]
"""Yields the items of a list one by one and may show progress: ``iter``, or ``tqdm.tqdm``."""
