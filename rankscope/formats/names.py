"""Names of weights: their order, and the pairing of the names in two files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from rankscope.formats.aliases import pair_aliases

WEIGHT_SUFFIX = ".weight"
# What torch's wrappers put into a path: compile, FSDP and its checkpointing; DDP before the wrapper of PEFT.
_WRAPPERS = re.compile(
    r"(?:(?<=[._])|^)(?:_orig_mod[._]|(?:_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)|^module\.(?=base_model\.)"
)
QKV_PARTS = ("q", "k", "v")
"""Names of the parts of a fused projection: ``NAME:q`` …"""


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    # Of two numbers without leading zeros the longer is the larger; int() would refuse very long ones.
    parts = ((part.isdecimal(), part.lstrip("0"), part) for part in re.split(r"(\d+)", name))
    return tuple((0, len(bare), bare) if number else (1, 0, part) for number, bare, part in parts)


def strip_wrappers(name: str) -> str:
    """The name without what ``torch.compile`` (``_orig_mod.``) and FSDP put into the paths of modules."""
    return _WRAPPERS.sub("", name) if "_" in name or name.startswith("module.") else name


def matches_path_end(name: str, path: str) -> bool:
    """Whether ``name`` is the path or its last components."""
    return path == name or path.endswith(f".{name}")


def layer_kind(name: str) -> str:
    """What a layer is called within its block: the last part of its name that is not a number."""
    parts = [part for part in name.split(".") if not part.isdecimal()]
    return parts[-1] if parts else name


class Pairing(NamedTuple):
    """``pairs`` of (name in a, name in b), and what has no partner; each in natural order."""

    pairs: list[tuple[str, str]]
    only_a: list[str]
    only_b: list[str]


def pair_names(names_a: Iterable[str], names_b: Iterable[str]) -> Pairing:
    """Partners among two lists of dotted names.

    Equal names are partners. Among the rest, one side may have one wrapper in front (``bert.``, ``transformer.``,
    ``base_model.model.``): the prefix that pairs most names is taken. Where two prefixes pair equally many, as
    ``encoder.`` and ``decoder.`` would, neither is used. What is left is paired across the conventions of tools
    (``aliases.py``) where that is unambiguous. What torch's wrappers put into names does not count.
    """
    bare_a, bare_b = _names_by_bare_name(names_a), _names_by_bare_name(names_b)
    bare = _pair_bare_names(bare_a, bare_b)
    return Pairing(
        [(bare_a[ours], bare_b[theirs]) for ours, theirs in bare.pairs],
        [bare_a[name] for name in bare.only_a],
        [bare_b[name] for name in bare.only_b],
    )


def _names_by_bare_name(names: Iterable[str]) -> dict[str, str]:
    """The names by what is left of them without wrappers; where two would be one, both stay whole."""
    names = list(names)
    counts = Counter(strip_wrappers(name) for name in set(names))
    return {bare if counts[bare := strip_wrappers(name)] == 1 else name: name for name in names}


def _pair_bare_names(names_a: Iterable[str], names_b: Iterable[str]) -> Pairing:
    a, b = set(names_a), set(names_b)
    pairs = [(name, name) for name in a & b]
    rest_a, rest_b = a - b, b - a
    of_a, of_b = _prefixes(rest_a, rest_b), _prefixes(rest_b, rest_a)
    best = _only_best(
        [(count, 0, prefix) for prefix, count in of_a.items()] + [(count, 1, prefix) for prefix, count in of_b.items()]
    )
    if best is not None:
        side, prefix = best
        if side == 0:
            pairs += [(prefix + name, name) for name in rest_b if prefix + name in rest_a]
        else:
            pairs += [(name, prefix + name) for name in rest_a if prefix + name in rest_b]
    rest_a -= {name for name, _ in pairs}
    rest_b -= {name for _, name in pairs}
    alias_pairs = pair_aliases(rest_a, rest_b)
    pairs += alias_pairs
    rest_a -= {name for name, _ in alias_pairs}
    rest_b -= {name for _, name in alias_pairs}
    pairs.sort(key=lambda names: natural_key(names[0]))
    return Pairing(pairs, sorted(rest_a, key=natural_key), sorted(rest_b, key=natural_key))


def _prefixes(long: set[str], short: set[str]) -> Counter[str]:
    """How many names of ``long`` are a name of ``short`` behind each prefix."""
    counts: Counter[str] = Counter()
    for name in long:
        for dot in re.finditer(r"\.", name):
            if name[dot.end() :] in short:
                counts[name[: dot.end()]] += 1
    return counts


def _only_best(candidates: list[tuple[int, int, str]]) -> tuple[int, str] | None:
    """(side, prefix) with the highest count, or None where there is none or a tie."""
    candidates.sort(reverse=True)
    if not candidates or (len(candidates) > 1 and candidates[0][0] == candidates[1][0]):
        return None
    return candidates[0][1:]


def module_names(tensors: Iterable[str]) -> dict[str, str]:
    """Module path of each tensor name: without ``.weight``, unless that name is a tensor's already."""
    names = set(tensors)
    return {
        name: bare if (bare := name.removesuffix(WEIGHT_SUFFIX)) == name or bare not in names else name
        for name in names
    }
