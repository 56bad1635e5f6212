"""What is learned: a base model, its training batches, and how well a model does on held-out data.

A batch is a pure function of (seed, step), so a run that is taken up again sees the data it would
have seen. ``validation`` chooses settings; ``test`` is only ever reported.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankscope.errors import ConfigError, TrainingError
from rankscope.train.config import make_generator
from rankscope.train.randomness import replay_contexts, use_run_streams

Split = Literal["validation", "test"]
Batch = Mapping[str, Tensor]


LORA_RATE_OVER_FULL = 10.0
"""LoRA's best learning rate is about this multiple of full fine-tuning's, whatever the rank (Schulman et al. 2025)."""
SHARING_TOLERANCE = 2e-3
"""Share of the largest output by which rounding may change the others; other dropout changes far more."""


class Task(ABC):
    """A base, its data, a loss, and the metrics of held-out data.

    Runs are trained side by side: their batches are joined along the first axis, and chunk i of what ``outputs``
    gives is run i's.
    """

    metric: str
    """Name of the metric that runs are compared by."""
    higher_is_better: bool
    steps: int
    """Optimizer steps of a run."""
    full_rate: float
    """The middle of the learning rates of full fine-tuning, where the settings name none."""
    default_batch: int = 16
    """Examples a step, where the settings name none."""
    draws: bool = False
    """Whether the base itself draws random numbers in training."""
    targets: tuple[str, ...] = ("all-linear",)
    heads: tuple[str, ...] = ()
    """Modules that are new to the base: every method trains them in full."""
    base_name: str | None = None
    """What an adapter's configuration names as its base."""
    peft_task: str | None = None

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """A fresh copy of the base in float32 on the CPU; ``seed`` makes what the base lacks."""

    def learning_rates(self, full: bool) -> tuple[float, ...]:
        """Learning rates to try, ascending, where the settings name none: half a decade apart, to one digit."""
        middle = self.full_rate * (1.0 if full else LORA_RATE_OVER_FULL)
        return tuple(float(f"{middle * 10**power:.1g}") for power in (-0.5, 0.0, 0.5))

    @abstractmethod
    def batch(self, seed: int, index: int, size: int) -> Batch:
        """The ``index``-th training batch of the run with this seed: tensors of ``size`` rows."""

    def join(self, batches: Sequence[Batch]) -> Batch:
        """One batch from N batches of the same number of examples, in order along the first axis: (N · size, …)."""
        return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}

    @abstractmethod
    def tokens(self, batch: Batch) -> int:
        """How many tokens, padding included, a batch has: what a pass costs."""

    @abstractmethod
    def tokens_per_example(self) -> int:
        """The most that one training example can cost."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the loss needs of the model: (examples, …)."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: Split, device: torch.device) -> dict[str, float]:
        """Metrics of held-out data; the model is in evaluation mode and gradients are off."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What identifies base and data: names and hashes."""

    def checkpoint(self, model: nn.Module, compiled: bool = False) -> None:
        """Have the model recompute its blocks in the backward pass in place of keeping their activations.

        Args:
            compiled: it is for torch.compile, which cannot replay streams: with a base that draws, one run at a time.

        Raises:
            ConfigError: the model does not offer it.
        """
        how: dict[str, Any] = {"use_reentrant": False}
        if self.draws and not compiled:
            how["context_fn"] = replay_contexts
        # transformers 5.23 renamed it and warns of the old name.
        old = getattr(model, "gradient_checkpointing_enable", None)
        enable = getattr(model, "activation_checkpointing_enable", old)
        try:
            if enable is None:
                raise ValueError("no such method")
            enable(how)
        except ValueError as error:
            kind = type(model).__name__
            raise ConfigError(f"checkpointing: a {kind} cannot recompute its activations; leave it out") from error

    @torch.no_grad()
    def can_share(self, model: nn.Module, device: torch.device) -> bool:
        """Whether what a run computes is its own whatever runs pass beside it, its dropout included: by trying.

        It is not with BatchNorm, or where the base draws for something that has no row for each example. The model
        is on the device, has no adapters, and is not to be used afterwards.
        """
        seeds = (1, 2, 3)
        batch = {key: tensor.to(device) for key, tensor in self.batch(0, 0, 2 * len(seeds)).items()}
        parts = {key: tensor.chunk(len(seeds)) for key, tensor in batch.items()}
        model.train()
        try:
            with use_run_streams(device, seeds):
                together = self.outputs(model, batch).float().chunk(len(seeds))
        except TrainingError:
            return False
        for i, seed in enumerate(seeds):
            with use_run_streams(device, [seed]):
                alone = self.outputs(model, {key: chunks[i] for key, chunks in parts.items()}).float()
            if not torch.allclose(alone, together[i], rtol=0.0, atol=SHARING_TOLERANCE * float(alone.abs().max())):
                return False
        return True


@lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order (count,) of the examples in one epoch of the runs with this seed."""
    return torch.randperm(count, generator=make_generator(seed, "order", epoch))


def epoch_indices(seed: int, index: int, size: int, count: int) -> Tensor:
    """Examples (size,) of the ``index``-th batch when epochs follow each other without a gap."""
    places = torch.arange(index * size, (index + 1) * size)
    return torch.stack([epoch_order(seed, int(place) // count, count)[int(place) % count] for place in places])


class WindowTask(Task):
    """Next-token prediction on one long row of tokens (tokens,), in windows of ``length``.

    Held-out windows do not overlap; the first token of each has no context and is not predicted.
    """

    metric = "loss"
    higher_is_better = False
    evaluation_rows = 64
    """Windows in one pass of an evaluation: on two cores 8 and 16 took a sixth longer, 32 as long."""

    def __init__(self, train: Tensor, validation: Tensor, test: Tensor, length: int) -> None:
        shortest = min(len(train), len(validation), len(test))
        if shortest < length:
            raise ConfigError(
                f"windows of {length} do not fit: a part of the data has {shortest}; give a smaller --max-length"
            )
        self.train = train
        self.held_out: dict[Split, Tensor] = {"validation": validation, "test": test}
        self.length = length

    def batch(self, seed: int, index: int, size: int) -> Batch:
        starts = torch.randint(
            len(self.train) - self.length + 1, (size, 1), generator=make_generator(seed, "order", index)
        )
        return {"tokens": self.train[starts + torch.arange(self.length)].long()}

    def tokens(self, batch: Batch) -> int:
        return batch["tokens"].numel()

    def tokens_per_example(self) -> int:
        return self.length

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (batch, length, vocabulary)."""
        out: Tensor = model(batch["tokens"])
        return out

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of each next token: logits (batch, length, vocabulary) → a scalar."""
        return F.cross_entropy(outputs[:, :-1].float().flatten(0, 1), batch["tokens"][:, 1:].flatten())

    def windows(self, split: Split) -> Iterator[Tensor]:
        """Held-out windows, (up to ``evaluation_rows``, length) at a time."""
        tokens = self.held_out[split]
        count = len(tokens) // self.length
        whole = tokens[: count * self.length].view(count, self.length)
        yield from torch.split(whole, self.evaluation_rows)

    def evaluate(self, model: nn.Module, split: Split, device: torch.device) -> dict[str, float]:
        losses, counts = [], []
        for rows in self.windows(split):
            batch = {"tokens": rows.long().to(device)}
            losses.append(self.loss(self.outputs(model, batch), batch))
            counts.append(len(rows))
        return self.loss_metrics(weighted_mean(losses, counts))

    def loss_metrics(self, loss: float) -> dict[str, float]:
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def weighted_mean(losses: Sequence[Tensor], counts: Sequence[int]) -> float:
    """Mean loss of batches of different size, in float64, from one scalar a batch; the device is waited for once."""
    weights = torch.tensor(counts, dtype=torch.float64)
    return float(torch.stack(list(losses)).cpu().double() @ weights / weights.sum())


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
