"""Which layer of one source is which of another: names, renamed where asked, and fused projections taken apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from rankscope.analysis.sources import Source
from rankscope.errors import ConfigError, RankscopeError
from rankscope.formats.interface import Skipped, Store, examples
from rankscope.formats.names import PARTS, Pairing, natural_key, pair
from rankscope.updates import Dense, LowRank, Update

Renames = Iterable[tuple[str, str]]
# Projections whose rows are q, then k, then v; and those whose rows alternate head by head.
FUSED = ("qkv_proj", "c_attn", "in_proj_weight", "qkv", "query_key_value")
INTERLEAVED = ("query_key_value",)
SPLIT = (
    ("q_proj", "k_proj", "v_proj"),
    ("to_q", "to_k", "to_v"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)


class Place(NamedTuple):
    """A layer under another name: what the source calls it, and which of its rows (None: all)."""

    name: str
    rows: slice | None = None


class View(Mapping[str, Update]):
    """Updates of a source under other names, or blocks of their rows; read when asked for."""

    def __init__(self, source: Source, places: Mapping[str, Place]) -> None:
        self.source, self.places = source, dict(places)

    def __getitem__(self, name: str) -> Update:
        place = self.places[name]
        update = self.source.read(place.name)
        return update if place.rows is None else _rows(update, place.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class Matched(NamedTuple):
    """Both sources under the names that ``pairing`` speaks of, and what was left out of it and why."""

    a: Source
    b: Source
    pairing: Pairing
    skipped: list[Skipped]


def match(a: Source, b: Source, rename: Renames = ()) -> Matched:
    """Pair the layers of two sources.

    Equal names, one wrapper in front, the conventions of tools (``formats.names.pair``); then a fused projection with
    the q, k and v of the other side, where their shapes say that they are its blocks of rows.

    Args:
        a, b: the sources.
        rename: (from, to): parts of names in a and what is read in their place, in this order; an empty "from" puts
            "to" in front.

    Raises:
        ConfigError: a renaming that fits no name, or makes two names one.
        RankscopeError: no layer in common.
    """
    a = _renamed(a, list(rename))
    names_a, names_b = a.names(), b.names()
    pairing = pair(names_a, names_b)
    matched = _with_fused(a, b, pairing)
    if not matched.pairing.pairs:
        why = f"; {matched.skipped[0].name}: {matched.skipped[0].reason}" if matched.skipped else ""
        raise RankscopeError(
            f"{a.label} and {b.label} have no layer in common; the one has {examples(names_a)}, the other "
            f"{examples(names_b)}{why}; where only names differ, --rename FROM=TO changes those of the first"
        )
    return matched


def _renamed(source: Source, rename: Sequence[tuple[str, str]]) -> Source:
    if not rename:
        return source
    names = {name: name for name in source.names()}
    for old, new in rename:
        if not any(old in name for name in names.values()):
            raise ConfigError(f"{source.label}: no name has {old!r}; it has {examples(list(names.values()))}")
        names = {name: (now.replace(old, new) if old else new + now) for name, now in names.items()}
    places = {new: Place(name) for name, new in names.items()}
    if len(places) < len(names):
        raise ConfigError(f"{source.label}: the renaming makes two layers one; say it more exactly")
    return replace(source, updates=View(source, places))


class _Unit(NamedTuple):
    """q, k and v of one attention: one fused name, or three."""

    names: tuple[str, ...]

    @property
    def fused(self) -> bool:
        return len(self.names) == 1


def _with_fused(a: Source, b: Source, pairing: Pairing) -> Matched:
    """The pairing with what is left of it brought together across fused and split projections."""
    units = _units(pairing.only_a), _units(pairing.only_b)
    found: list[tuple[str, str]] = []
    skipped: list[Skipped] = []
    blocks: tuple[dict[str, Place], dict[str, Place]] = ({}, {})
    for parent_a, parent_b in pair(units[0], units[1]).pairs:
        ours, theirs = units[0][parent_a], units[1][parent_b]
        if ours.fused and theirs.fused:
            continue
        sides = [ours.names, theirs.names]
        if ours.fused or theirs.fused:
            side = 0 if ours.fused else 1
            fused, split, source, other = (ours, theirs, a, b) if side == 0 else (theirs, ours, b, a)
            places = _blocks(fused.names[0], source, split.names, other)
            if isinstance(places, str):
                skipped.append(Skipped(fused.names[0], places))
                continue
            blocks[side].update(places)
            sides[side] = tuple(places)
        found += list(zip(*sides, strict=True))
    used_a = {_whole(name, blocks[0]) for name, _ in found}
    used_b = {_whole(name, blocks[1]) for _, name in found}
    pairs = sorted([*pairing.pairs, *found], key=lambda names: natural_key(names[0]))
    left = Pairing(
        pairs, [n for n in pairing.only_a if n not in used_a], [n for n in pairing.only_b if n not in used_b]
    )
    return Matched(_blocked(a, blocks[0]), _blocked(b, blocks[1]), left, skipped)


def _whole(name: str, blocks: Mapping[str, Place]) -> str:
    """What a source itself calls the layer that a name is or is a part of."""
    return blocks[name].name if name in blocks else name


def _units(names: Iterable[str]) -> dict[str, _Unit]:
    """Fused projections and whole triples among names, by the path of their attention."""
    names = list(names)
    found: dict[str, list[tuple[str, ...]]] = {}
    for name in names:
        for end in FUSED:
            if (parent := _parent(name, end)) is not None:
                found.setdefault(parent, []).append((name,))
                break
    known = set(names)
    for ends in SPLIT:
        for name in names:
            parent = _parent(name, ends[0])
            triple = tuple(name.removesuffix(ends[0]) + end for end in ends)
            if parent is not None and known.issuperset(triple):
                found.setdefault(parent, []).append(triple)
    for name in names:  # a fused layer that its file holds in parts (loralib)
        stem = name.removesuffix(f":{PARTS[0]}")
        triple = tuple(f"{stem}:{part}" for part in PARTS)
        parents = [parent for end in FUSED if (parent := _parent(stem, end)) is not None]
        if stem != name and parents and known.issuperset(triple):
            found.setdefault(parents[0], []).append(triple)
    return {parent: _Unit(units[0]) for parent, units in found.items() if len(units) == 1}


def _parent(name: str, end: str) -> str | None:
    """The path before a last component, in names with dots or with underscores; None where it is another."""
    if name == end:
        return ""
    for separator in (".",) if "." in name else ("_",):
        if name.endswith(separator + end):
            return name.removesuffix(separator + end)
    return None


def _blocks(fused: str, source: Source, split: Sequence[str], other: Source) -> dict[str, Place] | str:
    """The parts of a fused projection that are the other side's q, k and v, or why there are none."""
    if any(_parent(fused, end) is not None for end in INTERLEAVED):
        return (
            "a fused projection whose rows of q, k and v may alternate head by head (GPT-NeoX, BLOOM, Falcon), so it "
            "is not split by blocks; compare it with another fused one"
        )
    whole, parts = _shape(source, fused), [_shape(other, name) for name in split]
    if sum(out for out, _ in parts) != whole[0] or any(into != whole[1] for _, into in parts):
        return f"a fused projection {whole}, of which {', '.join(map(str, parts))} are no blocks of rows"
    places, start = {}, 0
    for part, (out, _) in zip(PARTS, parts, strict=True):
        places[f"{fused}:{part}"] = Place(fused, slice(start, start + out))
        start += out
    return places


def _shape(source: Source, name: str) -> tuple[int, int]:
    """(out, in), from the header where there is one."""
    if isinstance(source.updates, View):
        return _shape(source.updates.source, source.updates.places[name].name)
    return source.updates.info(name).shape if isinstance(source.updates, Store) else source.updates[name].shape


def _blocked(source: Source, blocks: Mapping[str, Place]) -> Source:
    if not blocks:
        return source
    return replace(source, updates=View(source, {name: Place(name) for name in source.names()} | dict(blocks)))


def _rows(update: Update, rows: slice) -> Update:
    """Some rows of an update, as factors where it has thin ones."""
    thin = update.product
    if thin is not None:
        return LowRank(thin.B[rows], thin.A, thin.scale)
    if isinstance(update, Dense):
        return replace(update, matrix=update.matrix[rows])
    return Dense(update.working_matrix[rows])
