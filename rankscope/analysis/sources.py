"""What the analyses read: a path, a store, or a plain mapping of names to updates, all seen alike."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from rankscope.errors import ConfigError, RankscopeError, prefix_errors
from rankscope.formats.abstract_store import SkippedItem, Store, UpdateInfo, check_device, examples
from rankscope.formats.names import natural_key
from rankscope.formats.opening import Opening
from rankscope.formats.store import open_source
from rankscope.linalg import krylov_columns, sketch_is_cheaper
from rankscope.updates import Update

Readable = str | os.PathLike[str] | Store | Mapping[str, Update]
Track = Callable[[list[Any]], Iterable[Any]]
"""Hands on the items of a list one by one and may show how far it is: ``iter``, or ``tqdm.tqdm``."""


@dataclass(frozen=True)
class Source:
    """Named updates, wherever they come from. ``label`` is the path, or what a mapping is called."""

    label: str
    kind: str
    updates: Mapping[str, Update] | Store
    device: torch.device
    skipped: tuple[SkippedItem, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        readable: Readable,
        opening: Opening = Opening(),  # noqa: B008 (frozen)
        label: str = "updates",
    ) -> Source:
        """Open a path, or take an open store or a mapping, of which ``opening`` only says the device; reads no tensor.

        Raises:
            FormatError: the path holds nothing that is known.
            ConfigError: the device cannot be used, or ``initial`` for what is no path to a LoRA adapter.
        """
        if isinstance(readable, str | os.PathLike):
            label = str(readable)
            readable = open_source(readable, opening)
            return cls._of_store(readable, readable.device, label)
        if opening.initial is not None:
            raise ConfigError(f"an initial adapter ({opening.initial}) is taken with the path of an adapter only")
        place = check_device(opening.device)
        if isinstance(readable, Store):
            return cls._of_store(readable, place, str(readable.path))
        if not isinstance(readable, Mapping):
            raise ConfigError(f"expected a path, a store, or a mapping of names to updates, not {type(readable)}")
        return cls(label, "mapping", readable, place)

    @classmethod
    def _of_store(cls, store: Store, device: torch.device, label: str) -> Source:
        return cls(label, store.kind, store, device, tuple(store.skipped), tuple(store.notes))

    @property
    def folder(self) -> Path | None:
        """Where the files lie; None for a mapping."""
        return self.updates.path if isinstance(self.updates, Store) else None

    @property
    def can_read_ahead(self) -> bool:
        """Whether another thread may read the next update: a mapping may make its own, and not be made for that."""
        return isinstance(self.updates, Store)

    def names(self) -> list[str]:
        return sorted(self.updates, key=natural_key)

    def read(self, name: str) -> Update:
        """One update, on the device asked for."""
        if isinstance(self.updates, Store):
            return self.updates[name].to(self.device)
        with prefix_errors(self.layer_label(name)):
            return self.updates[name].to(self.device)

    def info(self, name: str) -> UpdateInfo | None:
        """What the headers tell of one update; None of a mapping, which has none."""
        return self.updates.info(name) if isinstance(self.updates, Store) else None

    def batch_key(self, name: str) -> Hashable | None:
        """Shape and rank where an update has thin factors, from the header; None for any other (``workers.spread``)."""
        of = self._shape_info(name)
        if of is None:  # a mapping may make its updates when asked, and not be made for several threads
            return None
        thin = of.nominal_rank is not None and of.nominal_rank < min(of.shape)
        return (of.shape, of.nominal_rank) if thin else None

    def cost(self, name: str, sketch: int | None = None) -> float:
        """Multiplications that a decomposition takes, to a factor, from the header; 1 of what is made when asked.

        Args:
            sketch: how many singular values of a full update are asked for; None for all.
        """
        of = self._shape_info(name)
        if of is None:
            return 1.0
        out, into = of.shape
        if of.nominal_rank is not None:
            return float((out + into) * of.nominal_rank**2)
        rough = sketch is not None and sketch_is_cheaper(of.shape, sketch)
        return float(out * into * (krylov_columns(sketch) if sketch and rough else min(of.shape)))

    def _shape_info(self, name: str) -> UpdateInfo | Update | None:
        """What has the shape and rank of an update without reading it; None where it is made when asked."""
        return self.updates[name] if isinstance(self.updates, dict) else self.info(name)

    def layer_label(self, name: str) -> str:
        """How messages name a layer."""
        return f"{self.label}: layer {name}"


def select_layers(names: Iterable[str], layers: str | Iterable[str] | None, label: str) -> list[str]:
    """The names that match one of the patterns, in their order; all where ``layers`` is None.

    Raises:
        RankscopeError: no name matches.
    """
    names, patterns = list(names), pattern_list(layers)
    if patterns is None:
        return names
    chosen = [name for name in names if matches_any([name], patterns)]
    if not chosen:
        raise RankscopeError(f"{label}: no layer fits {', '.join(map(repr, patterns))}; it has {examples(names)}")
    return chosen


def pattern_list(layers: str | Iterable[str] | None) -> list[str] | None:
    """One pattern or several as a list; None for all layers."""
    return [layers] if isinstance(layers, str) else None if layers is None else list(layers)


def matches_any(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether one of the patterns fits one of the names of a layer."""
    return any(matches_pattern(name, pattern) for name in names for pattern in patterns)


def matches_pattern(name: str, pattern: str) -> bool:
    """A pattern with ``*``, ``?`` or ``[`` is a glob of the whole name; any other is a run of its dotted parts.

    ``q_proj`` fits every query projection, ``layers.1`` the layer 1 and not the layer 10.
    """
    if re.search(r"[*?\[]", pattern):
        return fnmatchcase(name, pattern)
    return f".{pattern.strip('.')}." in f".{name}."
