"""The inputs of the analyses: a path, a store, or a mapping of names to updates, behind one interface."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from rankscope.errors import ConfigError, RankscopeError, prefix_errors
from rankscope.formats.abstract_store import SkippedItem, Store, UpdateInfo, check_device, examples
from rankscope.formats.names import natural_key
from rankscope.formats.opening import Opening
from rankscope.formats.store import open_source
from rankscope.linalg import krylov_columns, sketch_is_cheaper
from rankscope.updates import Update

Readable = str | os.PathLike[str] | Store | Mapping[str, Update]


@dataclass(frozen=True)
class Source:
    """Named updates of a path, a store or a mapping. ``label`` is the path, or a name for the mapping."""

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
        """Open a path, or wrap an open store or a mapping, for which only the device of ``opening`` counts.

        Reads no tensor.

        Raises:
            FormatError: the path holds no known format.
            ConfigError: the device cannot be used, or ``initial`` is given without the path of a LoRA adapter.
        """
        if isinstance(readable, str | os.PathLike):
            label = str(readable)
            readable = open_source(readable, opening)
            return cls._of_store(readable, readable.device, label)
        if opening.initial is not None:
            raise ConfigError(f"an initial adapter ({opening.initial}) is taken with the path of an adapter only")
        device = check_device(opening.device)
        if isinstance(readable, Store):
            return cls._of_store(readable, device, str(readable.path))
        if not isinstance(readable, Mapping):
            raise ConfigError(f"expected a path, a store, or a mapping of names to updates, not {type(readable)}")
        return cls(label, "mapping", readable, device)

    @classmethod
    def _of_store(cls, store: Store, device: torch.device, label: str) -> Source:
        return cls(label, store.kind, store, device, tuple(store.skipped), tuple(store.notes))

    @property
    def folder(self) -> Path | None:
        """Where the files lie; None for a mapping."""
        return self.updates.path if isinstance(self.updates, Store) else None

    @property
    def can_read_ahead(self) -> bool:
        """Whether another thread may read the next update; a mapping may compute its own, and not be thread-safe."""
        return isinstance(self.updates, Store)

    def names(self) -> list[str]:
        return sorted(self.updates, key=natural_key)

    def read(self, name: str) -> Update:
        """Read one update, on the device of this source."""
        if isinstance(self.updates, Store):
            return self.updates[name].to(self.device)
        with prefix_errors(self.layer_label(name)):
            return self.updates[name].to(self.device)

    def info(self, name: str) -> UpdateInfo | None:
        """What the headers tell of one update; None for a mapping, which has no headers."""
        return self.updates.info(name) if isinstance(self.updates, Store) else None

    def batch_key(self, name: str) -> Hashable | None:
        """Shape and rank of an update with thin factors, from the header; None for any other (``Job.kind``)."""
        info = self._shape_info(name)
        if info is None:  # a mapping may compute its updates on access, and not be thread-safe
            return None
        is_thin = info.nominal_rank is not None and info.nominal_rank < min(info.shape)
        return (info.shape, info.nominal_rank) if is_thin else None

    def cost(self, name: str, sketch: int | None = None) -> float:
        """Multiplications of a decomposition up to a factor, from the header; 1 for updates computed on access.

        Args:
            sketch: how many singular values of a full update are asked for; None for all.
        """
        info = self._shape_info(name)
        if info is None:
            return 1.0
        out, into = info.shape
        if info.nominal_rank is not None:
            return float((out + into) * info.nominal_rank**2)
        is_sketched = sketch is not None and sketch_is_cheaper(info.shape, sketch)
        return float(out * into * (krylov_columns(sketch) if sketch and is_sketched else min(info.shape)))

    def _shape_info(self, name: str) -> UpdateInfo | Update | None:
        """Shape and rank of an update without reading it; None where it may be computed on access."""
        return self.updates[name] if isinstance(self.updates, dict) else self.info(name)

    def layer_label(self, name: str) -> str:
        """The name of a layer in messages."""
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
    """One pattern or several as a list; None, which takes all layers, as it is."""
    return [layers] if isinstance(layers, str) else None if layers is None else list(layers)


def matches_any(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether one of the patterns fits one of the names."""
    return any(matches_pattern(name, pattern) for name in names for pattern in patterns)


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether a pattern fits a name: as a glob if it has ``*``, ``?`` or ``[``, else as consecutive dotted parts.

    ``q_proj`` fits every query projection, ``layers.1`` layer 1 and not layer 10.
    """
    if re.search(r"[*?\[]", pattern):
        return fnmatchcase(name, pattern)
    return f".{pattern.strip('.')}." in f".{name}."
