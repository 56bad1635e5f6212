"""A tuned model whose update is cut to rank k, or goes without its top k directions, matrix by matrix."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from rankscope.evidence.material import Material
from rankscope.formats.file_io import TensorFile
from rankscope.formats.names import layer_kind
from rankscope.lora.stored_adapter import read_adapter
from rankscope.lora.targets import is_within
from rankscope.train.results import RunResult
from rankscope.train.weights import add_updates
from rankscope.verdict import MissingEvidenceError


class CutModel:
    """A run's update, each of its matrices decomposed once, ready to be put back into the base in part.

    On the device: the model, a copy of what it starts from, and U·diag(s) and Vt of every matrix.
    """

    def __init__(self, material: Material, row: RunResult) -> None:
        self._material = material
        self._store = material.store(row)
        self.names = [name for name in self._store.names() if not any(is_within(name, head) for head in material.heads)]
        if not self.names:
            raise MissingEvidenceError(f"{row.record.run.name} changes no matrix but those of its heads")
        self._model = material.copy_base(row.record.run)
        rest = self._whole_adapter() if row.record.run.is_lora else self._whole_full()
        add_updates(self._model, rest)
        self.whole = len(rest)
        self._start = {key: tensor.detach().clone() for key, tensor in self._model.state_dict().items()}
        self._halves = {name: self._decompose(name) for name in self.names}

    def _whole_full(self) -> dict[str, Tensor]:
        file = TensorFile(self._store.path)
        return {name: file.read(name) for name in file.infos if name not in self.names}

    def _whole_adapter(self) -> dict[str, Tensor]:
        """What an adapter holds beside its factors, as changes of the base."""
        state = self._model.state_dict()
        whole = read_adapter(self._store.path).whole
        return {key: tensor.float() - state[key].cpu().float() for key, tensor in whole.items() if key in state}

    def _decompose(self, name: str) -> tuple[Tensor, Tensor]:
        svd = self._store[name].to(self._material.device).svd()
        return (svd.U * svd.s).float(), svd.Vt.float()

    @property
    def dim(self) -> int:
        """The median smaller side of the matrices."""
        return statistics.median_low(min(self._store.info(name).shape) for name in self.names)

    @property
    def max_rank(self) -> int:
        """The largest rank that a matrix can have."""
        return max(self._rank(name) for name in self.names)

    def _rank(self, name: str) -> int:
        return self._halves[name][1].shape[0]

    def max_rank_of_kind(self, kind: str) -> int:
        return max(self._rank(name) for name in self.matrices_of_kind(kind))

    def matrices_of_kind(self, kind: str) -> list[str]:
        return [name for name in self.names if layer_kind(name) == kind]

    def score_top_part(self, k: int, kind: str | None = None) -> float:
        """The score with each matrix, or each of one kind, replaced by its best rank k."""
        return self._score(
            lambda name: self._top(name, k) if kind in (None, layer_kind(name)) else self._stored_update(name)
        )

    def score_without_top(self, k: int) -> float:
        """The score with each matrix without its best rank k."""
        return self._score(lambda name: self._halves[name][0][:, k:] @ self._halves[name][1][k:])

    def _top(self, name: str, k: int) -> Tensor:
        left, right = self._halves[name]
        return left[:, :k] @ right[:k] if k < len(right) else self._stored_update(name)

    def _stored_update(self, name: str) -> Tensor:
        """The update as its file has it, without the rounding of a decomposition."""
        return self._store[name].to(self._material.device).dense()

    @torch.no_grad()
    def _score(self, part: Callable[[str], Tensor]) -> float:
        self._model.load_state_dict(self._start)
        for name in self.names:  # one matrix at a time in memory
            add_updates(self._model, {name: part(name)})
        return self._material.score(self._model)
