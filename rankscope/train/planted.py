"""A task whose answer is known: a linear teacher that is the base plus an update of chosen rank.

A transformer's weights are not identifiable from what it computes: many updates do the same, so a rank that was
planted there could not be recovered. Here inputs are white and the loss is the squared error. So by Eckart & Young a
student of rank r can reach noise² + Σ_{l>r} σ_l² / out and no less, and the update of full fine-tuning is the planted
one plus Gaussian noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rankscope.train.config import PlantedSpectrum, make_generator
from rankscope.train.task import Batch, Split, Task

ROWS_PER_SPLIT = 8192
"""Examples of each split."""


class PlantedModel(nn.Module):
    """Two linear maps side by side; inputs (batch, first.in + second.in), outputs likewise."""

    SHAPES = ((64, 96), (96, 64))

    def __init__(self) -> None:
        super().__init__()
        (m, n), (p, q) = self.SHAPES
        self.first = nn.Linear(n, m, bias=False)
        self.second = nn.Linear(q, p, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, first.in + second.in) to (batch, first.out + second.out)."""
        left, right = x[..., : self.first.in_features], x[..., self.first.in_features :]
        return torch.cat((self.first(left), self.second(right)), dim=-1)


class PlantedTask(Task):
    """Learn from the noisy outputs of a teacher, which is the base plus a planted update.

    Each map's update has ``rank`` singular values: evenly spaced from 2 down to 1 ("even"), all 1.5 ("flat"), or
    falling as 3/l, l = 1, 2, … ("decaying").
    """

    metric = "loss"
    higher_is_better = False
    steps = 400
    full_rate = 3e-3

    def __init__(
        self, rank: int, noise: float, spectrum: PlantedSpectrum = "even", count: int = ROWS_PER_SPLIT
    ) -> None:
        self.rank, self.noise, self.spectrum = rank, noise, spectrum
        self.base = {
            name: self._draw(name, shape) for name, shape in zip(("first", "second"), PlantedModel.SHAPES, strict=True)
        }
        self.updates = {name: self._plant(name, weight.shape) for name, weight in self.base.items()}
        width = sum(shape[1] for shape in PlantedModel.SHAPES)
        self.inputs = {
            split: torch.randn(count, width, generator=make_generator("planted", split))
            for split in ("train", "validation", "test")
        }
        self.answers = {split: self._teach(x, split) for split, x in self.inputs.items()}

    @property
    def singular_values(self) -> Tensor:
        """Singular values (rank,) of each planted update."""
        if self.spectrum == "flat":
            return torch.full((self.rank,), 1.5)
        if self.spectrum == "decaying":
            return 3.0 / torch.arange(1.0, self.rank + 1)
        return torch.linspace(2.0, 1.0, self.rank)

    def floor(self, rank: int) -> float:
        """The smallest expected loss that an update of this rank can reach."""
        missed = float(self.singular_values[rank:].square().sum()) * len(self.base)
        return self.noise**2 + missed / sum(shape[0] for shape in PlantedModel.SHAPES)

    def _draw(self, name: str, shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, generator=make_generator("planted", "base", name)) / math.sqrt(shape[1])

    def _plant(self, name: str, shape: torch.Size) -> Tensor:
        source = make_generator("planted", "update", name)
        left, _ = torch.linalg.qr(torch.randn(shape[0], self.rank, generator=source))
        right, _ = torch.linalg.qr(torch.randn(shape[1], self.rank, generator=source))
        update: Tensor = left * self.singular_values @ right.T
        return update

    def _teach(self, x: Tensor, split: str) -> Tensor:
        teacher = PlantedModel()
        weights = {f"{name}.weight": self.base[name] + self.updates[name] for name in self.base}
        teacher.load_state_dict(weights)
        with torch.no_grad():
            y: Tensor = teacher(x)
        return y + self.noise * torch.randn(y.shape, generator=make_generator("planted", "noise", split))

    def learning_rates(self, full: bool) -> tuple[float, ...]:
        """One rate: the task is easy enough for it to reach each floor."""
        return (self.full_rate,) if full else (1e-2,)

    def model(self, seed: int) -> nn.Module:
        student = PlantedModel()
        student.load_state_dict({f"{name}.weight": weight for name, weight in self.base.items()})
        return student

    def batch(self, seed: int, index: int, size: int) -> Batch:
        rows = torch.randint(len(self.inputs["train"]), (size,), generator=make_generator(seed, "order", index))
        return {"x": self.inputs["train"][rows], "y": self.answers["train"][rows]}

    def tokens(self, batch: Batch) -> int:
        return len(batch["x"])

    def tokens_per_example(self) -> int:
        return 1

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(batch, first.out + second.out)."""
        out: Tensor = model(batch["x"])
        return out

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean squared error of the outputs (rows, out): a scalar."""
        return (outputs - batch["y"]).square().mean()

    def evaluate(self, model: nn.Module, split: Split, device: torch.device) -> dict[str, float]:
        batch = {"x": self.inputs[split].to(device), "y": self.answers[split].to(device)}
        return {"loss": float(self.loss(self.outputs(model, batch), batch))}

    def fingerprint(self) -> dict[str, str]:
        planted = f"rank {self.rank}{'' if self.spectrum == 'even' else f' {self.spectrum}'}, noise {self.noise:g}"
        return {"base": "planted", "data": f"{planted}, {len(self.inputs['train'])} rows"}
