"""What is done on the CPU and on a device, to be compared: a small decoder's steps, a study's curves, closeness."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from makers import generator, normal
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rankscope.lora import AdapterSpec, Bank
from rankscope.train.llama import Llama, LlamaConfig
from rankscope.train.study import Study

CPU = torch.device("cpu")
TINY = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
)  # fmt: skip
SPECS = [
    AdapterSpec(rank=2, alpha=4, targets=("q_proj", "down_proj", "embed_tokens"), dropout=0.2),
    AdapterSpec(rank=3, alpha=3, targets="all-linear", init="gaussian"),
]


def tiny(device: torch.device) -> Llama:
    """The decoder with known weights."""
    with torch.device("meta"):
        model = Llama(TINY)
    weights = {
        name: normal(*weight.shape, seed=i, dtype=torch.float32) / weight.shape[-1] ** 0.5
        for i, (name, weight) in enumerate(model.state_dict().items())
    }
    model.load_state_dict(weights, assign=True)
    return model.to(device)


@torch.no_grad()
def fill(bank: Bank) -> None:
    """Factors that change something."""
    for i, factor in enumerate(bank.trainable_parameters()):
        factor.copy_(0.1 * normal(*factor.shape, seed=i, dtype=torch.float32))


def tokens(device: torch.device, rows: int = 4) -> Tensor:
    return torch.randint(TINY.vocab_size, (rows, 12), generator=generator()).to(device)


def next_token_loss(model: nn.Module, x: Tensor) -> Tensor:
    return cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def adapt(device: torch.device, move_first: bool, count: int, select: int | None) -> tuple[Bank, list[Tensor]]:
    """Three steps of AdamW on a bank of ``count`` adapters; the bank and its losses."""
    model = tiny(device if move_first else CPU)
    bank = Bank.attach(model, SPECS[:count], [generator(seed) for seed in range(count)])
    model.to(device)
    bank.select(select)
    optimizer = torch.optim.AdamW(bank.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = next_token_loss(model.train(), tokens(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return bank, losses


def lines(study: Study) -> dict[str, list[dict[str, Any]]]:
    """The learning curve of each run, without times."""
    curves = {}
    for record in study.records:
        path = study.path(record.run) / "metrics.jsonl"
        evaluations = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        curves[record.run.name] = [{**line, "seconds": 0} for line in evaluations]
    return curves


def losses(study: Study) -> list[float]:
    """Of each run the held-out losses, before, twice between and after, and the mean training losses between them."""
    losses = []
    for line in (line for curve in lines(study).values() for line in curve):
        losses += [line[split]["loss"] for split in ("validation", "test") if split in line]
        losses += [line["train_loss"]] if "train_loss" in line else []
    return losses


def close(a: Any, b: Any, tolerance: float) -> bool:
    """Largest difference, relative to the largest number."""
    a, b = (x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x) for x in (a, b))
    return a.shape == b.shape and bool(np.abs(a - b).max() <= tolerance * max(np.abs(a).max(), 1e-30))
