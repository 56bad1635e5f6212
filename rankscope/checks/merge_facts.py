"""What a checkpoint has of an adapter: its change of each adapted weight, projected on the adapter's update."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankscope.checks.adapter_facts import DORA_PRODUCT, DORA_WHOLE
from rankscope.checks.base_match import Shape, match_base
from rankscope.errors import ConfigError, FormatError, RankscopeError
from rankscope.formats.abstract_store import Store
from rankscope.formats.checkpoint import Checkpoint
from rankscope.formats.file_formats import CHECKPOINT
from rankscope.formats.hub import local_path
from rankscope.formats.names import pair_names
from rankscope.formats.opening import Opening
from rankscope.formats.store import open_source
from rankscope.linalg import working_dtype
from rankscope.track import Track
from rankscope.updates import block_rows


@dataclass(frozen=True)
class MergedLayer:
    """One adapted weight, with U the adapter's update, W the base, M the checkpoint, Q the rounding to M's dtype.

    ``update``: ‖U‖. ``change``: ‖M − W‖. ``inner``: ⟨M − W, U⟩. ``expected_inner``: ⟨Q(W + U) − W, U⟩, what a merge in
    M's dtype would have. ``residual``: ‖M − (W + U)‖. ``rounding``: ‖Q(W + U) − (W + U)‖. ``entries``: their number.
    ``problem``: why it could not be measured, "" where it was.
    """

    name: str
    update: float = 0.0
    change: float = 0.0
    inner: float = 0.0
    expected_inner: float = 0.0
    residual: float = 0.0
    rounding: float = 0.0
    entries: int = 1
    problem: str = ""

    @property
    def scale(self) -> float:
        """The multiple of U that is in M − W by least squares."""
        return self.inner / self.update**2 if self.update else 0.0

    @property
    def expected_scale(self) -> float:
        """The same of a merge in M's dtype: 1, or less where the rounding swallows the update."""
        return self.expected_inner / self.update**2 if self.update else 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation of ``scale``: ρ/‖U‖, with ρ the root mean square per entry of what is not U, but noise."""
        noise = max(self.rounding, self.scaled_residual)
        return noise / math.sqrt(self.entries) / self.update if self.update else 0.0

    @property
    def scaled_residual(self) -> float:
        """‖M − (W + scale·U)‖."""
        return math.sqrt(max(0.0, self.change**2 - self.inner * self.scale))


@dataclass(frozen=True)
class MergeFacts:
    """A checkpoint beside an adapter and their base.

    ``missing``: layers of the adapter that the checkpoint or the base lacks. ``changed``: tensors of the checkpoint
    that the adapter does not touch and that differ from the base, of ``others``.
    """

    path: str
    adapter: str
    layers: tuple[MergedLayer, ...]
    missing: tuple[str, ...]
    changed: tuple[str, ...]
    others: int

    @property
    def nonzero_layers(self) -> list[MergedLayer]:
        """The layers whose update is not zero and that could be measured."""
        return [layer for layer in self.layers if not layer.problem and layer.update > 0]


def read_merge_facts(
    path: str | os.PathLike[str], adapter: str | os.PathLike[str], opening: Opening, track: Track = iter
) -> MergeFacts:
    """Project a checkpoint's change on an adapter's updates, one layer at a time.

    Raises:
        ConfigError: no base was given, or ``adapter`` is none.
        FormatError: one of the three cannot be read.
    """
    if opening.base_path is None:
        raise ConfigError(f"{path}: whether it contains {adapter} is seen beside their base; give it with --base")
    merged, base = Checkpoint(local_path(path)), Checkpoint(opening.base_path)
    store, target = _open_on(adapter, base, opening), _open_on(adapter, merged, opening)
    known = store or target or open_source(adapter, replace(opening, base=None))
    if known.kind == CHECKPOINT.kind:
        raise ConfigError(f"{adapter}: holds full weights, no adapter")
    names, shapes = _update_names(known)
    in_base, in_merged = match_base(base.path, shapes), match_base(merged.path, shapes)
    missing = tuple(dict.fromkeys((*in_base.missing, *in_merged.missing, *in_base.misfits, *in_merged.misfits)))
    there = [name for name in names if name.removesuffix(":whole") not in missing]
    layers = [
        _measure(store, target, name, in_merged.dtypes[name.removesuffix(":whole")])
        for name in track(there)
        if store is not None and target is not None
    ]
    changed, others = _compare_others(merged, base, set(in_merged.partners.values()))
    missing = tuple(shapes) if there and not layers else missing
    return MergeFacts(str(path), str(adapter), tuple(layers), missing, tuple(changed), others)


def _open_on(adapter: str | os.PathLike[str], base: Checkpoint, opening: Opening) -> Store | None:
    """The adapter on a checkpoint, whose weights then come in the adapter's order; None where they do not fit.

    Raises:
        FormatError: the adapter cannot be read at all.
    """
    try:
        return open_source(adapter, replace(opening, base=base.path))
    except FormatError:
        open_source(adapter, replace(opening, base=None))
        return None


def _update_names(store: Store) -> tuple[list[str], dict[str, Shape | None]]:
    """The updates to be looked for, of DoRA the whole ones; and the shape (out, in) of each by the layer's name."""
    wholes = {name.rpartition(":")[0] for name in store.names() if store.info(name).method == DORA_WHOLE}
    names = [name for name in store.names() if not (store.info(name).method == DORA_PRODUCT and name in wholes)]
    return names, {name.removesuffix(":whole"): store.info(name).shape for name in names}


def _measure(store: Store, target: Store, name: str, dtype: torch.dtype) -> MergedLayer:
    try:
        update = store[name].to(store.device)
        weight, merged = store.weight(name), target.weight(name)
        if weight.shape != update.shape or merged.shape != update.shape:
            raise FormatError(
                f"{name}: the update {update.shape} and the weights {tuple(merged.shape)} differ in shape"
            )
        return _project(name, update.working_matrix, weight, merged, dtype)
    except RankscopeError as error:
        return MergedLayer(name, problem=str(error))


def _project(name: str, update: Tensor, weight: Tensor, merged: Tensor, dtype: torch.dtype) -> MergedLayer:
    """All sums over (out, in), a block of rows at a time in the working precision."""
    working = working_dtype(update.device)
    sums = torch.zeros(6, dtype=working, device=update.device)
    step = block_rows(update.shape[1])
    for U, W, M in zip(update.split(step), weight.split(step), merged.split(step), strict=True):  # type: ignore[no-untyped-call]
        U, W, M = U.to(working), W.to(working), M.to(working)
        target = W + U
        change, expected = M - W, target.to(dtype).to(working) - W
        pairs = ((U, U), (change, change), (change, U), (expected, U), (M - target,) * 2, (expected - U,) * 2)
        sums += torch.stack([(left * right).sum() for left, right in pairs])
    squares = [float(value) for value in sums]
    if not all(map(math.isfinite, squares)):
        raise FormatError(f"{name}: the weights hold NaN or infinity")
    root = [math.sqrt(max(0.0, value)) for value in squares]
    return MergedLayer(
        name, root[0], root[1], squares[2], squares[3], root[4], root[5], update.shape[0] * update.shape[1]
    )


def _compare_others(merged: Checkpoint, base: Checkpoint, adapted: set[str]) -> tuple[list[str], int]:
    """Tensors beside the adapted ones that differ from the base in the same dtype, and how many were compared."""
    changed, count = [], 0
    for ours, theirs in _pairs(merged, base):
        if ours in adapted:
            continue
        count += 1
        tensor, origin = merged.read(ours), base.read(theirs)
        if tensor.shape != origin.shape or not torch.equal(tensor, origin.to(tensor.dtype)):
            changed.append(ours)
    return changed, count


def _pairs(merged: Checkpoint, base: Checkpoint) -> Iterable[tuple[str, str]]:
    return pair_names(merged.infos, base.infos).pairs
