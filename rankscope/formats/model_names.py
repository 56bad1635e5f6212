"""A model's names: those of its tensors on disk and in memory, and which of them share one weight.

This is the one place that knows them. Names in memory are those of the modules, which PEFT's targets name and an
adapter's file has. One parameter of a stack of experts is a unit of its own, ``…experts.gate_up_proj[3]``, whether the
checkpoint stores the experts in one tensor or singly.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from rankscope.formats.file_io import TensorInfo
from rankscope.formats.model_outline import ModelOutline, TransformersRules, outline_model
from rankscope.formats.name_rules import (
    INPUTS_FIRST_TYPES,
    PLAIN_TYPES,
    Conversion,
    NameRules,
    PlainRules,
    RenamedKey,
    TableRules,
)
from rankscope.formats.names import natural_key, strip_wrappers

_EXPERT_STACK = re.compile(r"(?:^|\.)[^.]*experts?(?:\.[^.]+)*\.(?!weight$)[^.]+$")
_UNIT = re.compile(r"(?P<stack>.+)\[(?P<number>\d+)\]$")


class StoredPart(NamedTuple):
    """A block of a stored tensor: of the matrix ``number`` of a stack, the rows from ``start`` to ``stop`` (None: all).

    ``transposed``: the block is stored (columns, rows).
    """

    stored: str
    number: int | None = None
    start: int = 0
    stop: int | None = None
    transposed: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the block is the tensor as it is stored."""
        return self == StoredPart(self.stored)


Layout = dict[str, tuple[StoredPart, ...]]
"""By each name in memory, the blocks of stored tensors that are put one below the other to make it."""


def split_unit(name: str) -> tuple[str, int] | None:
    """The stack and the number of an expert from ``STACK[NUMBER]``; None for any other name."""
    match = _UNIT.fullmatch(name)
    return (match["stack"], int(match["number"])) if match else None


class ModelNames:
    """The names of the model that a configuration (``config.json``) describes; without one, those on disk."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        kind = config.get("model_type")
        self.model_type = kind if isinstance(kind, str) else ""

    @cached_property
    def outline(self) -> ModelOutline | None:
        """The model without its weights; None where transformers cannot tell."""
        return outline_model(self.config)

    @property
    def module_paths(self) -> frozenset[str] | None:
        """The paths of all modules in memory; None where they are not known."""
        return frozenset(self.outline.modules) if self.outline is not None else None

    @property
    def tied_weights(self) -> tuple[frozenset[str], ...]:
        """Groups of names in memory that share one weight; none where they are not known."""
        return self.outline.tied_weights if self.outline is not None else ()

    def find_parameter(self, name: str) -> str | None:
        """The full name in memory of a tensor whose name may lack that of the inner model (``transformer.``, …)."""
        return self.outline.find_parameter(name) if self.outline is not None else None

    def stores_inputs_first(self, stack: str) -> bool:
        """Whether a stack of experts is (experts, in, out), as PEFT sees it too."""
        if self.model_type in PLAIN_TYPES or not self.model_type:
            return False
        if self.outline is None:
            return self.model_type in INPUTS_FIRST_TYPES
        return self.outline.find_parameter(stack) in self.outline.stacks_inputs_first

    def lay_out(self, infos: Mapping[str, TensorInfo]) -> Layout:
        """How the tensors in memory are made of the stored ones, in the order of those.

        A tensor that no rule fits, or whose conversion is not known here, keeps its stored name.
        """
        rules = self._rules()
        groups: dict[tuple[str, Conversion | None], list[tuple[str, RenamedKey]]] = defaultdict(list)
        for stored in sorted(infos, key=natural_key):
            key = rules.rename(strip_wrappers(stored)) if self.model_type else RenamedKey(stored)
            groups[key.name, key.conversion].append((stored, key))
        layout: Layout = {}
        for (name, conversion), members in groups.items():
            made = self._convert(name, conversion, members, infos)
            if made is None or made.keys() & layout.keys():
                made = {stored: (StoredPart(stored),) for stored, _ in members}
            layout |= made
        layout = self._split_stacks(layout, infos)
        order = {stored: place for place, stored in enumerate(infos)}
        return dict(sorted(layout.items(), key=lambda item: order[item[1][0].stored]))

    def _rules(self) -> NameRules:
        if not self.model_type or self.model_type in PLAIN_TYPES:
            return PlainRules()
        return TransformersRules(self.outline) if self.outline is not None else TableRules(self.model_type)

    def _convert(
        self,
        name: str,
        conversion: Conversion | None,
        members: Sequence[tuple[str, RenamedKey]],
        infos: Mapping[str, TensorInfo],
    ) -> Layout | None:
        """The tensors that a rule makes of its stored ones; None where these are not what the rule is for."""
        stored = [member for member, _ in members]
        if conversion is None:
            return {name: (StoredPart(stored[0]),)} if len(stored) == 1 else None
        by_source = [[part for part, key in members if key.source == n] for n in range(len(conversion.sources))]
        match conversion.step:
            case "stack" | "stack and concatenate":
                return _stack(name, by_source, infos)
            case "concatenate" if all(len(parts) == 1 for parts in by_source):
                return {name: tuple(StoredPart(parts[0]) for parts in by_source)}
            case "chunk" | "split" if len(stored) == 1:
                return self._divide(name, conversion, stored[0], infos[stored[0]])
            case "transpose" | "transpose to fit" if len(stored) == 1:
                fits = conversion.step == "transpose to fit" and self._has_shape(name, infos[stored[0]])
                return {name: (StoredPart(stored[0], transposed=not fits),)}
        return None

    def _divide(self, name: str, conversion: Conversion, stored: str, info: TensorInfo) -> Layout | None:
        """Blocks of rows of one stored tensor, each under its own name."""
        names = [name.replace(conversion.targets[0], target) for target in conversion.targets]
        if conversion.step == "chunk":
            sizes = [info.shape[0] // len(names) if info.shape else 0] * len(names)
        else:
            shapes = [self.outline.parameters.get(part, ()) if self.outline else () for part in names]
            sizes = [shape[0] if shape else 0 for shape in shapes]
        if not info.shape or not all(sizes) or sum(sizes) != info.shape[0] or len({*names}) < len(names):
            return None
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        return {
            part: (StoredPart(stored, None, start, start + size),)
            for part, start, size in zip(names, starts, sizes, strict=True)
        }

    def _has_shape(self, name: str, info: TensorInfo) -> bool:
        """Whether a stored tensor has the shape of the parameter in memory."""
        parameter = self.find_parameter(name)
        return self.outline is not None and parameter is not None and self.outline.parameters[parameter] == info.shape

    def _split_stacks(self, layout: Layout, infos: Mapping[str, TensorInfo]) -> Layout:
        """The layout with each expert of a stacked parameter under a name of its own."""
        result: Layout = {}
        for name, parts in layout.items():
            info = infos[parts[0].stored]
            if len(parts) == 1 and parts[0].number is None and is_expert_stack(name, info):
                for number in range(info.shape[0]):
                    result[f"{name}[{number}]"] = (parts[0]._replace(number=number),)
            else:
                result[name] = parts
        return result


def is_expert_stack(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is a stack of the experts' matrices, (experts, rows, columns)."""
    return len(info.shape) == 3 and info.dtype.is_floating_point and _EXPERT_STACK.search(name) is not None


def _stack(name: str, by_source: Sequence[Sequence[str]], infos: Mapping[str, TensorInfo]) -> Layout | None:
    """The units of a stack whose experts are stored singly: of each source, one tensor for each expert."""
    counts = {len(parts) for parts in by_source}
    shapes = [{infos[part].shape for part in parts} for parts in by_source]
    if len(counts) > 1 or any(len(shape) != 1 or len(next(iter(shape))) != 2 for shape in shapes):
        return None
    return {
        f"{name}[{number}]": tuple(StoredPart(parts[number]) for parts in by_source) for number in range(counts.pop())
    }
