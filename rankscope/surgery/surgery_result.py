"""What an operation did, layer by layer and in all: the same record for every operation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import msgspec

from rankscope.formats.abstract_store import SkippedItem
from rankscope.result import Result

OPERATIONS = ("resize", "extract", "merge", "unmerge", "subtract", "average", "convert")
SCHEMAS = {name: f"rankscope.{name}/1" for name in OPERATIONS}


class LayerChange(msgspec.Struct, frozen=True, kw_only=True):
    """One layer. ``before`` is the update asked for, ``after`` what the output holds of it, rounding included.

    ``shape`` is (out, in). A rank of None: a full matrix. ``parameters``: how many numbers hold the update.
    ``norm``: ‖before‖_F. ``retained``: share of ‖before‖²_F in the singular values that were kept. ``error``:
    ‖before − after‖_F; ``relative_error``: that over ``norm``, 0 where both are 0.
    ``from_original`` (unmerge): the distance from the weight before merging that rounding is expected to leave.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank_before: int | None
    rank_after: int | None
    parameters_before: int
    parameters_after: int
    norm: float
    retained: float
    error: float
    relative_error: float
    from_original: float | None = None


class SurgeryTotal(msgspec.Struct, frozen=True, kw_only=True):
    """All layers as one long vector: norms and errors add by their squares."""

    layers: int
    parameters_before: int
    parameters_after: int
    norm: float
    retained: float
    error: float
    relative_error: float
    from_original: float | None = None

    @classmethod
    def of(cls, layers: Sequence[LayerChange]) -> SurgeryTotal:
        """Sums over layers."""
        norm = math.hypot(*(layer.norm for layer in layers))
        error = math.hypot(*(layer.error for layer in layers))
        kept = math.fsum(layer.retained * (layer.norm / norm) ** 2 for layer in layers) if norm else 1.0
        distances = [layer.from_original for layer in layers if layer.from_original is not None]
        return cls(
            layers=len(layers),
            parameters_before=sum(layer.parameters_before for layer in layers),
            parameters_after=sum(layer.parameters_after for layer in layers),
            norm=norm,
            retained=kept,
            error=error,
            relative_error=error_over_norm(error, norm),
            from_original=math.hypot(*distances) if distances else None,
        )


class SurgeryResult(Result, frozen=True, kw_only=True):
    """What was made of what. ``carried``: tensors that went along whole; ``skipped``: what the output lacks.

    ``weights`` are those of ``inputs`` where they were combined; ``command`` is the command line, if it was one.
    """

    schemas: ClassVar = tuple(SCHEMAS.values())
    schema: str
    inputs: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    base: str | None = None
    output: str
    command: str | None
    choice: str
    layers: tuple[LayerChange, ...]
    total: SurgeryTotal
    carried: tuple[str, ...]
    skipped: tuple[SkippedItem, ...] = ()
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> LayerChange:
        """The layer of that name.

        Raises:
            KeyError: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def __repr__(self) -> str:
        total = self.total
        return (
            f"SurgeryResult({self.schema}: {total.layers} layers, {total.parameters_before} → {total.parameters_after} "
            f"parameters, energy kept {total.retained:.4f}, relative error {total.relative_error:.3g}, {self.output!r})"
        )


def format_count(n: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def error_over_norm(error: float, norm: float) -> float:
    """error/norm; 0 where the norm is."""
    return error / norm if norm else 0.0


def zero_layer_notes(layers: Iterable[LayerChange]) -> list[str]:
    """Which layers of the output change nothing."""
    zero = [layer.name for layer in layers if layer.norm == 0]
    if not zero:
        return []
    said = "1 layer changes nothing and was" if len(zero) == 1 else f"{len(zero)} layers change nothing and were"
    return [f"{said} given rank 1 of zeros: {', '.join(zero[:3])}{', …' if len(zero) > 3 else ''}"]
