"""Pairs of layers of two sources: by name, by renaming, and as blocks of fused projections."""

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
    """A layer, or a block of its rows (None: all), under another name; ``name`` is the one in the source."""

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
    """Both sources under the names of ``pairing``, and the layers that cannot be paired, with the reason."""

    a: Source
    b: Source
    pairing: Pairing
    skipped: list[SkippedItem]


def match_layers(a: Source, b: Source, rename: Renames = ()) -> MatchedSources:
    """Pair the layers of two sources.

    First by names: equal ones, with a wrapper in front, by the conventions of tools (``formats.names.pair_names``).
    Then a fused projection with q, k and v of the other side, if their shapes add up to its blocks of rows.

    Args:
        a, b: the sources.
        rename: (from, to): parts of names in a and their replacements, in this order; an empty "from" puts "to" in
            front.

    Raises:
        ConfigError: a renaming fits no name, or makes two names one.
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
    """The source with parts of its names replaced.

    Raises:
        ConfigError: a renaming fits no name, or makes two names one.
    """
    if not rename:
        return source
    names = {name: name for name in source.names()}
    for old, new in rename:
        if not any(old in name for name in names.values()):
            raise ConfigError(f"{source.label}: no name has {old!r}; it has {examples(list(names.values()))}")
        names = {name: (renamed.replace(old, new) if old else new + renamed) for name, renamed in names.items()}
    places = {new: LayerSlice(name) for name, new in names.items()}
    if len(places) < len(names):
        raise ConfigError(f"{source.label}: the renaming makes two layers one; give a longer FROM")
    return replace(source, updates=RenamedUpdates(source, places))


class _Projections(NamedTuple):
    """q, k and v of one attention: one fused name, or three names."""

    names: tuple[str, ...]

    @property
    def is_fused(self) -> bool:
        return len(self.names) == 1


def _pair_fused(a: Source, b: Source, pairing: Pairing) -> MatchedSources:
    """The pairing, with its unmatched layers paired across fused and split projections."""
    attentions_a, attentions_b = _attentions(pairing.only_a), _attentions(pairing.only_b)
    blocks_a: dict[str, LayerSlice] = {}
    blocks_b: dict[str, LayerSlice] = {}
    fused_pairs: list[tuple[str, str]] = []
    skipped: list[SkippedItem] = []
    for parent_a, parent_b in pair_names(attentions_a, attentions_b).pairs:
        qkv_a, qkv_b = attentions_a[parent_a], attentions_b[parent_b]
        if qkv_a.is_fused and qkv_b.is_fused:
            continue
        try:
            parts_a, parts_b = _parts(qkv_a, a, qkv_b, b, blocks_a), _parts(qkv_b, b, qkv_a, a, blocks_b)
            fused_pairs += zip(parts_a, parts_b, strict=True)
        except _NoBlocksError as error:
            skipped.append(error.skipped)
    used_a = {_whole(name, blocks_a) for name, _ in fused_pairs}
    used_b = {_whole(name, blocks_b) for _, name in fused_pairs}
    completed = Pairing(
        sorted([*pairing.pairs, *fused_pairs], key=lambda names: natural_key(names[0])),
        [name for name in pairing.only_a if name not in used_a],
        [name for name in pairing.only_b if name not in used_b],
    )
    return MatchedSources(split_fused_layers(a, blocks_a), split_fused_layers(b, blocks_b), completed, skipped)


class _NoBlocksError(RankscopeError):
    """A fused projection that cannot be split into blocks."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.skipped = SkippedItem(name, reason)


def _parts(
    qkv: _Projections, source: Source, partner: _Projections, other: Source, blocks: dict[str, LayerSlice]
) -> tuple[str, ...]:
    """Names of q, k and v; a fused projection gets names for its blocks, which are put into ``blocks``."""
    if not qkv.is_fused:
        return qkv.names
    places = _blocks(qkv.names[0], source, partner.names, other)
    blocks.update(places)
    return tuple(places)


def _whole(name: str, blocks: Mapping[str, LayerSlice]) -> str:
    """The name in the source of the layer that a name is, or is a block of."""
    return blocks[name].name if name in blocks else name


def _attentions(names: Sequence[str]) -> dict[str, _Projections]:
    """By the path of each attention, its fused projection or its q, k and v, where there is exactly one of them."""
    candidates: dict[str, list[tuple[str, ...]]] = {}
    known = set(names)
    for name in names:
        if (parent := _fused_parent(name)) is not None:
            candidates.setdefault(parent, []).append((name,))
        for parent, triple in _triples(name):
            if known.issuperset(triple):
                candidates.setdefault(parent, []).append(triple)
    return {parent: _Projections(triples[0]) for parent, triples in candidates.items() if len(triples) == 1}


def _fused_parent(name: str) -> str | None:
    """The path of the attention that a fused projection is in; None for any other layer."""
    return next((parent for end in FUSED if (parent := _parent(name, end)) is not None), None)


def _triples(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The names of q, k and v if this is q, with the path of their attention."""
    for ends in SPLIT:
        if (parent := _parent(name, ends[0])) is not None:
            yield parent, tuple(name.removesuffix(ends[0]) + end for end in ends)
    stem, _, part = name.rpartition(":")  # a fused layer that is stored in parts (loralib)
    if part == QKV_PARTS[0] and (parent := _fused_parent(stem)) is not None:
        yield parent, tuple(f"{stem}:{part}" for part in QKV_PARTS)


def _parent(name: str, end: str) -> str | None:
    """The path before ``end``, in names with dots or with underscores; None where a name ends otherwise."""
    if name == end:
        return ""
    suffix = ("." if "." in name else "_") + end
    return name.removesuffix(suffix) if name.endswith(suffix) else None


def _blocks(fused: str, source: Source, split: Sequence[str], other: Source) -> dict[str, LayerSlice]:
    """The blocks of a fused projection that match q, k and v of the other source.

    Raises:
        _NoBlocksError: its rows alternate, or the shapes do not add up.
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
    """(out, in) of a layer, from the header where there is one."""
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
    """A block of rows of an update, as factors where it has thin ones."""
    thin = update.product
    if thin is not None:
        return LowRank(thin.B[rows], thin.A, thin.scale)
    if isinstance(update, Dense):
        return replace(update, matrix=update.matrix[rows])
    return Dense(update.working_matrix[rows])
