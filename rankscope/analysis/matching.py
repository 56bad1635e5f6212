"""Which layer of one source is which of another: names, renamings, and fused projections split into their blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from rankscope.analysis.sources import Source
from rankscope.errors import ConfigError, RankscopeError
from rankscope.formats.abstract_store import SkippedItem, Store, examples
from rankscope.formats.names import QKV_PARTS, Pairing, natural_key, pair_names
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


class LayerSlice(NamedTuple):
    """A layer under another name: what the source calls it, and which of its rows (None: all)."""

    name: str
    rows: slice | None = None


class RenamedUpdates(Mapping[str, Update]):
    """Updates of a source under other names, or blocks of their rows; each is read on access."""

    def __init__(self, source: Source, places: Mapping[str, LayerSlice]) -> None:
        self.source, self.places = source, dict(places)

    def __getitem__(self, name: str) -> Update:
        place = self.places[name]
        update = self.source.read(place.name)
        return update if place.rows is None else _rows(update, place.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class MatchedSources(NamedTuple):
    """Both sources under the names that ``pairing`` speaks of, and what was left out of it and why."""

    a: Source
    b: Source
    pairing: Pairing
    skipped: list[SkippedItem]


def match_layers(a: Source, b: Source, rename: Renames = ()) -> MatchedSources:
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
    a = rename_layers(a, list(rename))
    names_a, names_b = a.names(), b.names()
    pairing = pair_names(names_a, names_b)
    matched = _pair_fused(a, b, pairing)
    if not matched.pairing.pairs:
        why = f"; {matched.skipped[0].name}: {matched.skipped[0].reason}" if matched.skipped else ""
        raise RankscopeError(
            f"{a.label} and {b.label} have no layer in common; the one has {examples(names_a)}, the other "
            f"{examples(names_b)}{why}; where only names differ, --rename FROM=TO changes those of the first"
        )
    return matched


def rename_layers(source: Source, rename: Sequence[tuple[str, str]]) -> Source:
    """The source with parts of its names read as others.

    Raises:
        ConfigError: a renaming that fits no name, or makes two names one.
    """
    if not rename:
        return source
    names = {name: name for name in source.names()}
    for old, new in rename:
        if not any(old in name for name in names.values()):
            raise ConfigError(f"{source.label}: no name has {old!r}; it has {examples(list(names.values()))}")
        names = {name: (now.replace(old, new) if old else new + now) for name, now in names.items()}
    places = {new: LayerSlice(name) for name, new in names.items()}
    if len(places) < len(names):
        raise ConfigError(f"{source.label}: the renaming makes two layers one; give a longer FROM")
    return replace(source, updates=RenamedUpdates(source, places))


class _Unit(NamedTuple):
    """q, k and v of one attention: one fused name, or three."""

    names: tuple[str, ...]

    @property
    def is_fused(self) -> bool:
        return len(self.names) == 1


def _pair_fused(a: Source, b: Source, pairing: Pairing) -> MatchedSources:
    """The pairing, with the layers that are left paired across fused and split projections."""
    units_a, units_b = _units(pairing.only_a), _units(pairing.only_b)
    blocks_a: dict[str, LayerSlice] = {}
    blocks_b: dict[str, LayerSlice] = {}
    fused_pairs: list[tuple[str, str]] = []
    skipped: list[SkippedItem] = []
    for parent_a, parent_b in pair_names(units_a, units_b).pairs:
        ours, theirs = units_a[parent_a], units_b[parent_b]
        if ours.is_fused and theirs.is_fused:
            continue
        try:
            fused_pairs += zip(_parts(ours, a, theirs, b, blocks_a), _parts(theirs, b, ours, a, blocks_b), strict=True)
        except _NoBlocksError as error:
            skipped.append(error.skipped)
    used_a = {_whole(name, blocks_a) for name, _ in fused_pairs}
    used_b = {_whole(name, blocks_b) for _, name in fused_pairs}
    left = Pairing(
        sorted([*pairing.pairs, *fused_pairs], key=lambda names: natural_key(names[0])),
        [name for name in pairing.only_a if name not in used_a],
        [name for name in pairing.only_b if name not in used_b],
    )
    return MatchedSources(split_fused_layers(a, blocks_a), split_fused_layers(b, blocks_b), left, skipped)


class _NoBlocksError(RankscopeError):
    """A fused projection that cannot be split into blocks."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.skipped = SkippedItem(name, reason)


def _parts(
    unit: _Unit, source: Source, partner: _Unit, other: Source, blocks: dict[str, LayerSlice]
) -> tuple[str, ...]:
    """Names of q, k and v; those of a fused unit are made, like its partner's, and put into ``blocks``."""
    if not unit.is_fused:
        return unit.names
    places = _blocks(unit.names[0], source, partner.names, other)
    blocks.update(places)
    return tuple(places)


def _whole(name: str, blocks: Mapping[str, LayerSlice]) -> str:
    """What a source itself calls the layer that a name is or is a part of."""
    return blocks[name].name if name in blocks else name


def _units(names: Sequence[str]) -> dict[str, _Unit]:
    """Fused projections and whole triples among names, by the path of their attention, where it has one of them."""
    units_of: dict[str, list[tuple[str, ...]]] = {}
    known = set(names)
    for name in names:
        if (parent := _fused_parent(name)) is not None:
            units_of.setdefault(parent, []).append((name,))
        for parent, triple in _triples(name):
            if known.issuperset(triple):
                units_of.setdefault(parent, []).append(triple)
    return {parent: _Unit(units[0]) for parent, units in units_of.items() if len(units) == 1}


def _fused_parent(name: str) -> str | None:
    """The path of the attention that a fused projection is in; None for any other layer."""
    return next((parent for end in FUSED if (parent := _parent(name, end)) is not None), None)


def _triples(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What q, k and v would be called if this were q, with the path of their attention."""
    for ends in SPLIT:
        if (parent := _parent(name, ends[0])) is not None:
            yield parent, tuple(name.removesuffix(ends[0]) + end for end in ends)
    stem, _, part = name.rpartition(":")  # a fused layer that its file holds in parts (loralib)
    if part == QKV_PARTS[0] and (parent := _fused_parent(stem)) is not None:
        yield parent, tuple(f"{stem}:{part}" for part in QKV_PARTS)


def _parent(name: str, end: str) -> str | None:
    """The path before a last component, in names with dots or with underscores; None where it is another."""
    if name == end:
        return ""
    for separator in (".",) if "." in name else ("_",):
        if name.endswith(separator + end):
            return name.removesuffix(separator + end)
    return None


def _blocks(fused: str, source: Source, split: Sequence[str], other: Source) -> dict[str, LayerSlice]:
    """The parts of a fused projection that are the other side's q, k and v.

    Raises:
        _NoBlocksError: its rows alternate, or do not add up.
    """
    if any(_parent(fused, end) is not None for end in INTERLEAVED):
        raise _NoBlocksError(
            fused,
            "a fused projection whose rows of q, k and v may alternate head by head (GPT-NeoX, BLOOM, Falcon), so it "
            "is not split by blocks; compare it with another fused one",
        )
    whole, parts = _shape(source, fused), [_shape(other, name) for name in split]
    if sum(out for out, _ in parts) != whole[0] or any(into != whole[1] for _, into in parts):
        raise _NoBlocksError(
            fused, f"a fused projection {whole}, of which {', '.join(map(str, parts))} are no blocks of rows"
        )
    places, start = {}, 0
    for part, (out, _) in zip(QKV_PARTS, parts, strict=True):
        places[f"{fused}:{part}"] = LayerSlice(fused, slice(start, start + out))
        start += out
    return places


def _shape(source: Source, name: str) -> tuple[int, int]:
    """(out, in), from the header where there is one."""
    if isinstance(source.updates, RenamedUpdates):
        return _shape(source.updates.source, source.updates.places[name].name)
    return source.updates.info(name).shape if isinstance(source.updates, Store) else source.updates[name].shape


def split_fused_layers(source: Source, blocks: Mapping[str, LayerSlice]) -> Source:
    """The source with blocks of its fused projections as further layers."""
    if not blocks:
        return source
    return replace(
        source, updates=RenamedUpdates(source, {name: LayerSlice(name) for name in source.names()} | dict(blocks))
    )


def _rows(update: Update, rows: slice) -> Update:
    """Some rows of an update, as factors where it has thin ones."""
    thin = update.product
    if thin is not None:
        return LowRank(thin.B[rows], thin.A, thin.scale)
    if isinstance(update, Dense):
        return replace(update, matrix=update.matrix[rows])
    return Dense(update.working_matrix[rows])
