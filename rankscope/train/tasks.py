"""What is learned: a base model, its training batches, and how well a model does on held-out data.

A batch is a pure function of (seed, step), so a run that is taken up again sees the data it would
have seen. ``validation`` chooses settings; ``test`` is only ever reported.
"""

from __future__ import annotations

import hashlib
import math
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankscope.errors import ConfigError
from rankscope.train.config import StudyConfig, generator
from rankscope.train.llama import load_llama

Split = Literal["validation", "test"]
Batch = Mapping[str, Tensor]


class Task(ABC):
    """A base, its data, a loss, and the metrics of held-out data."""

    metric: str
    """Name of the metric that runs are compared by."""
    higher_is_better: bool
    steps: int
    """Optimizer steps of a run."""
    lora_rate: float
    """Learning rate of LoRA at rank 1, where the settings name none."""
    full_rate: float
    targets: tuple[str, ...] = ("all-linear",)
    heads: tuple[str, ...] = ()
    """Modules that are new to the base: every method trains them in full."""
    base_name: str | None = None
    """What an adapter's configuration names as its base."""
    peft_task: str | None = None

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """A fresh copy of the base in float32 on the CPU; ``seed`` makes what the base lacks."""

    def rate(self, rank: int | None) -> float:
        """Learning rate of LoRA at this rank, of full fine-tuning for None, where the settings name none.

        ``lora_rate``/√r, to one digit: with α = 2r the best rate falls with the rank. Measured on the documentation
        over 3e-3, 1e-2 and 2e-2: at r = 1 the highest is best, at r = 64 the lowest, and one rate of 1e-2 for all
        makes rank 64 look worse than rank 4.
        """
        return self.full_rate if rank is None else float(f"{self.lora_rate / math.sqrt(rank):.1g}")

    @abstractmethod
    def batch(self, seed: int, index: int, size: int) -> Batch:
        """The ``index``-th training batch of the run with this seed."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: Split, device: torch.device) -> dict[str, float]:
        """Metrics of held-out data; the model is in evaluation mode and gradients are off."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What identifies base and data: names and hashes."""


@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """The order of ``count`` examples in one epoch of the runs with this seed."""
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def epoch_indices(seed: int, index: int, size: int, count: int) -> Tensor:
    """Examples of the ``index``-th batch when epochs follow each other without a gap."""
    places = torch.arange(index * size, (index + 1) * size)
    return torch.stack([permutation(seed, int(place) // count, count)[int(place) % count] for place in places])


class WindowTask(Task):
    """Next-token prediction on one long row of tokens, in windows of ``length``.

    Held-out windows do not overlap; the first token of each has no context and is not predicted.
    """

    metric = "loss"
    higher_is_better = False

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
        starts = torch.randint(len(self.train) - self.length + 1, (size, 1), generator=generator(seed, "order", index))
        return {"tokens": self.train[starts + torch.arange(self.length)].long()}

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """(batch, length, vocabulary) of a model of this task."""
        out: Tensor = model(tokens)
        return out

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens = batch["tokens"]
        logits = self.logits(model, tokens)[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def windows(self, split: Split, rows: int = 64) -> Iterator[Tensor]:
        tokens = self.held_out[split]
        count = len(tokens) // self.length
        whole = tokens[: count * self.length].view(count, self.length)
        yield from (whole[start : start + rows] for start in range(0, count, rows))

    def evaluate(self, model: nn.Module, split: Split, device: torch.device) -> dict[str, float]:
        total, count = 0.0, 0
        for rows in self.windows(split):
            total += float(self.loss(model, {"tokens": rows.long().to(device)})) * rows.shape[0]
            count += rows.shape[0]
        return self.describe(total / count)

    def describe(self, loss: float) -> dict[str, float]:
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class DocsTask(WindowTask):
    """The embedded default: a byte-level decoder that knows Python source adapts to its documentation."""

    metric = "bits_per_byte"
    steps = 200
    lora_rate = 2e-2
    full_rate = 2e-3
    targets = ("all-linear",)
    peft_task = "CAUSAL_LM"

    def __init__(self, length: int = 128) -> None:
        self.text = documentation()
        self.folder = base_folder()
        self.base_name = "rankscope/embedded-base"
        super().__init__(*split_blocks(self.text), length)

    def model(self, seed: int) -> nn.Module:
        return load_llama(self.folder)

    def describe(self, loss: float) -> dict[str, float]:
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    def fingerprint(self) -> dict[str, str]:
        return {
            "base": "embedded",
            "base_sha256": file_hash(self.folder / "model.safetensors"),
            "data": f"pydoc_data.topics of CPython {platform.python_version()}",
            "data_sha256": hashlib.sha256(self.text).hexdigest(),
        }


def base_folder() -> Path:
    """Where the embedded base lies; transformers' ``from_pretrained`` reads the same folder."""
    return Path(str(resources.files("rankscope.train") / "base"))


def documentation() -> bytes:
    """The language reference that every Python carries, each paragraph once.

    Topics quote each other (``specialnames`` holds all of ``customization``): a paragraph that came
    before is left out, or held-out text would have been seen in training.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph)
    return "\n\n".join(kept).encode()


def split_blocks(text: bytes, block: int = 4096) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test bytes: of each ten blocks in a row eight, one and one.

    Blocks keep neighbouring paragraphs together and still give each part the same mix of topics.
    """
    blocks = torch.split(torch.frombuffer(bytearray(text), dtype=torch.uint8), block)
    train = torch.cat([b for i, b in enumerate(blocks) if i % 10 not in (8, 9)])
    validation = torch.cat([b for i, b in enumerate(blocks) if i % 10 == 8])
    return train, validation, torch.cat([b for i, b in enumerate(blocks) if i % 10 == 9])


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_task(config: StudyConfig) -> Task:
    """The task that the settings name.

    Raises:
        ConfigError: a model or data file that the task needs is missing or does not fit.
    """
    if config.task == "docs":
        return DocsTask(config.max_length or 128)
    if config.task == "planted":
        from rankscope.train.planted import PlantedTask

        return PlantedTask(config.planted_rank, config.planted_noise)
    from rankscope.train.hf import make_hf_task

    return make_hf_task(config)
