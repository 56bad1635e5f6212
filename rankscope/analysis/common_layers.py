"""The layers that several sources share: two sources at a time are matched by name, and the matches are joined."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

from rankscope.analysis.matching import (
    LayerSlice,
    RenamedUpdates,
    Renames,
    match_layers,
    rename_layers,
    split_fused_layers,
)
from rankscope.analysis.sources import Source
from rankscope.errors import ConfigError, RankscopeError
from rankscope.formats.abstract_store import SkippedItem, examples
from rankscope.formats.names import natural_key

Node = tuple[int, str]
"""(group, name): a layer of a group of sources that use the same names."""


class CommonLayers(NamedTuple):
    """``layers``: for each common layer, its name in each source. ``alone``: for each source, its other names."""

    sources: list[Source]
    layers: list[tuple[str, ...]]
    alone: list[tuple[str, ...]]
    skipped: list[SkippedItem]


def find_common_layers(sources: Sequence[Source], rename: Renames = ()) -> CommonLayers:
    """The layers that all sources have, in the order of the first one's names.

    A layer is shared if it, its partners (``matching.match_layers``) and their partners are exactly one layer of each
    source; the order of the sources does not matter. A renaming applies to every source with a name that it fits.

    Raises:
        ConfigError: a renaming that fits no source, or makes two names of a source one.
        RankscopeError: two sources without a layer in common, or no layer that all have.
    """
    sources = _rename_sources(sources, list(rename))
    names = [tuple(source.names()) for source in sources]
    groups = list(dict.fromkeys(names))
    group_of = [groups.index(source_names) for source_names in names]
    first = [sources[group_of.index(group)] for group in range(len(groups))]
    partners, blocks, skipped = _partners(first)
    shared = [dict(nodes) for nodes in partners if sorted(group for group, _ in nodes) == list(range(len(groups)))]
    if not shared:
        known = "; ".join(f"{source.label} has {examples(source.names())}" for source in first)
        raise RankscopeError(f"no layer is in all {len(sources)} sources: {known}")
    shared.sort(key=lambda layer: natural_key(layer[group_of[0]]))
    layers = [tuple(layer[group] for group in group_of) for layer in shared]
    sources = [split_fused_layers(source, blocks[group]) for source, group in zip(sources, group_of, strict=True)]
    used = [{_whole(source, layer[place]) for layer in layers} for place, source in enumerate(sources)]
    alone = [tuple(name for name in listed if name not in taken) for listed, taken in zip(names, used, strict=True)]
    return CommonLayers(sources, layers, alone, skipped)


def _rename_sources(sources: Sequence[Source], rename: Sequence[tuple[str, str]]) -> list[Source]:
    renamed = list(sources)
    for old, new in rename:
        fitting = [place for place, source in enumerate(renamed) if any(old in name for name in source.names())]
        if not fitting:
            raise ConfigError(
                f"no name has {old!r} in any source; {renamed[0].label} has {examples(renamed[0].names())}"
            )
        for place in fitting:
            renamed[place] = rename_layers(renamed[place], [(old, new)])
    return renamed


def _partners(sources: Sequence[Source]) -> tuple[list[list[Node]], list[dict[str, LayerSlice]], list[SkippedItem]]:
    """Groups of partners, direct or through others; each source's blocks of fused projections; skipped layers."""
    above: dict[Node, Node] = {}

    def top(node: Node) -> Node:
        while above.setdefault(node, node) != node:
            node = above[node]
        return node

    blocks: list[dict[str, LayerSlice]] = [{} for _ in sources]
    skipped: dict[SkippedItem, None] = {}
    for place, source in enumerate(sources):
        for name in source.names():
            top((place, name))
    for i, j in combinations(range(len(sources)), 2):
        matched = match_layers(sources[i], sources[j])
        for place, source in ((i, matched.a), (j, matched.b)):
            blocks[place] |= _blocks(source)
        skipped |= dict.fromkeys(matched.skipped)
        for a, b in matched.pairing.pairs:
            above[top((i, a))] = top((j, b))
    together: dict[Node, list[Node]] = defaultdict(list)
    for node in above:
        together[top(node)].append(node)
    return list(together.values()), blocks, list(skipped)


def _blocks(source: Source) -> Iterable[tuple[str, LayerSlice]]:
    """The layers of a source that are blocks of rows of another layer, each with its rows there."""
    if not isinstance(source.updates, RenamedUpdates):
        return []
    return [(name, place) for name, place in source.updates.places.items() if place.rows is not None]


def _whole(source: Source, name: str) -> str:
    """The layer that a block is a part of; for any other layer its own name."""
    place = source.updates.places.get(name) if isinstance(source.updates, RenamedUpdates) else None
    return name if place is None or place.rows is None else place.name
