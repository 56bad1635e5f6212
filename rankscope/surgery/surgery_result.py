"""What an operation did, for each layer and in total: the same record for every operation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import msgspec

from rankscope.formats.abstract_store import SkippedItem
from rankscope.result import Result, find_layer
from rankscope.table import Column, Table

OPERATIONS = ("resize", "extract", "merge", "unmerge", "subtract", "average", "convert")
SCHEMAS = {name: f"rankscope.{name}/1" for name in OPERATIONS}


class LayerChange(msgspec.Struct, frozen=True, kw_only=True):
    """What was done to one layer: ``before`` is the requested update, ``after`` the one that the output holds, rounded.

    Attributes:
        name: path of the module.
        kind: "linear", "embedding" or "conv".
        shape: (out, in).
        rank_before, rank_after: None for a full matrix.
        parameters_before, parameters_after: how many numbers hold the update.
        norm: ‖before‖_F.
        retained: share of ‖before‖²_F in the singular values that were kept.
        error: ‖before − after‖_F.
        relative_error: ``error`` / ``norm``; 0 where both are 0.
        from_original: after ``unmerge``, the expected distance from the weight before merging, which rounding causes.
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
    """All layers as one vector: squares of norms and errors add. Fields as in ``LayerChange``."""

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
        """The total of the layers."""
        norm = math.hypot(*(layer.norm for layer in layers))
        error = math.hypot(*(layer.error for layer in layers))
        retained = math.fsum(layer.retained * (layer.norm / norm) ** 2 for layer in layers) if norm else 1.0
        distances = [layer.from_original for layer in layers if layer.from_original is not None]
        return cls(
            layers=len(layers),
            parameters_before=sum(layer.parameters_before for layer in layers),
            parameters_after=sum(layer.parameters_after for layer in layers),
            norm=norm,
            retained=retained,
            error=error,
            relative_error=error_over_norm(error, norm),
            from_original=math.hypot(*distances) if distances else None,
        )


class SurgeryResult(Result, frozen=True, kw_only=True):
    """What an operation made of its inputs.

    Attributes:
        schema: "rankscope.resize/1" and its like.
        inputs: the adapters, or the fine-tuned model.
        weights: those of ``inputs`` where several were combined.
        base: the base model, where there was one.
        output: the folder or file that was written.
        command: the command line, if there was one.
        choice: how ranks were chosen.
        layers: what was done to each layer.
        total: the same for all layers together.
        carried: keys of tensors that were copied whole.
        skipped: what the output lacks, with the reason.
        notes: remarks.
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
        """The layer of that name; KeyError where there is none."""
        return find_layer(self.layers, name)

    def table(self) -> Table:
        """A row for each layer and one for all: of written factors with their ranks, of weights with their rounding."""
        writes_factors = all(layer.rank_after is not None for layer in self.layers)
        columns, place = _make_columns(self.total), "factors" if writes_factors else "weights"
        return Table.of(columns, self.layers, place, caption="what was done to each layer", has_total=True)

    def __repr__(self) -> str:
        total = self.total
        return (
            f"SurgeryResult({self.schema}: {total.layers} layers, {total.parameters_before} → {total.parameters_after} "
            f"parameters, energy kept {total.retained:.4f}, relative error {total.relative_error:.3g}, {self.output!r})"
        )


def _make_columns(total: SurgeryTotal) -> list[Column[LayerChange]]:
    """Columns of the tables "factors" and "weights"."""
    sizes = f"{total.parameters_before} → {total.parameters_after}"
    unmerged = {} if total.from_original is None else {"weights": "from original"}
    return [
        Column.of(lambda layer: layer.name, total="all", factors="layer", weights="layer"),
        Column.of(lambda layer: f"{layer.shape[0]} × {layer.shape[1]}", factors="out × in", weights="out × in"),
        Column.of(lambda layer: layer.rank_before, factors="r", weights="r"),
        Column.of(lambda layer: layer.rank_after, factors="new r"),
        Column.of(lambda layer: layer.parameters_after, total=sizes, factors="parameters"),
        Column.of(lambda layer: layer.norm, total=total.norm, factors="norm", weights="norm"),
        Column.of(lambda layer: layer.retained, ".2%", total.retained, factors="energy kept"),
        Column.of(lambda layer: layer.error, ".3g", total.error, factors="error", weights="rounding"),
        Column.of(
            lambda layer: layer.relative_error,
            ".3g",
            total.relative_error,
            factors="rel. error",
            weights="rel. rounding",
        ),
        Column(lambda layer: layer.from_original, unmerged, ".3g", total.from_original),
    ]


def format_count(n: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def error_over_norm(error: float, norm: float) -> float:
    """error / norm; 0 where the norm is 0."""
    return error / norm if norm else 0.0


def zero_layer_notes(layers: Iterable[LayerChange]) -> list[str]:
    """A note on the layers whose update is zero, if there are any."""
    zero = [layer.name for layer in layers if layer.norm == 0]
    if not zero:
        return []
    subject = "1 layer changes nothing and was" if len(zero) == 1 else f"{len(zero)} layers change nothing and were"
    return [f"{subject} given rank 1 of zeros: {', '.join(zero[:3])}{', …' if len(zero) > 3 else ''}"]
