"""Optimizers per adapter, heads, mixed rows and PiSSA on an accelerator: the fake one of ``fake_device``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_device
import pytest
import torch
from both_devices import close
from fake_device import DEVICE, DeviceTensor, waits
from makers import generator, normal
from torch import Tensor, nn

from rankscope.errors import ConfigError
from rankscope.lora import AdapterSpec, Bank, load

CPU = torch.device("cpu")
# The fake device computes with the CPU's kernels; only the order of sums may differ, with the layout of a tensor.
FLOAT32 = 1e-5


@pytest.fixture(autouse=True)
def _accelerated() -> Iterator[None]:
    with fake_device.accelerated():
        yield


class Net(nn.Module):
    """Tokens (batch, 5) -> (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.down(torch.tanh(self.up(self.emb(tokens))))).mean(1))


SPECS = [
    AdapterSpec(2, 4.0, ["emb", "up"], dropout=0.3, modules_to_save=["out"]),
    AdapterSpec(3, 3.0, ["up", "down"], dropout=0.1, init="pissa", modules_to_save=["out"]),
]
TOKENS = torch.randint(9, (4, 5), generator=generator(3))


def net() -> Net:
    model = Net()
    with torch.no_grad():
        for seed, weight in enumerate(model.parameters()):
            weight.copy_(normal(*weight.shape, seed=seed, dtype=torch.float32) / weight.shape[-1] ** 0.5)
    return model


def bank_on(device: torch.device, move_first: bool) -> tuple[nn.Module, Bank]:
    model = net()
    if move_first:
        model.to(device)
    bank = Bank.attach(model, SPECS, [generator(0), generator(1)])
    model.to(device)
    return model.train(), bank


def trained(device: torch.device, move_first: bool, steps: int = 3) -> tuple[Bank, list[str]]:
    """A bank after some steps with one optimizer per adapter; for what the host has waited in the last one."""
    model, bank = bank_on(device, move_first)
    optimizers = [torch.optim.AdamW(bank.parameters(i).values(), lr=0.02 * (i + 1)) for i in range(2)]
    tokens = TOKENS.to(device)
    bank.select(None)
    for step in range(steps):
        bank.route.seeds = (step, 10 + step)
        with waits() as noted:
            model(tokens).square().sum().backward()
            bank.share_gradients()
            for i, optimizer in enumerate(optimizers):
                nn.utils.clip_grad_norm_(bank.parameters(i).values(), 1.0)
                optimizer.step()
            bank.zero_grad()
    return bank, noted


@pytest.mark.parametrize("move_first", [True, False], ids=["moved, attached", "attached, moved"])
def test_one_optimizer_per_adapter_on_the_device(tmp_path: Path, move_first: bool) -> None:
    here, _ = trained(CPU, move_first)
    there, noted = trained(DEVICE, move_first)
    assert noted == []
    start = bank_on(CPU, move_first)[1]
    for i in range(2):
        leaves = there.parameters(i)
        assert all(isinstance(leaf.detach(), DeviceTensor) and leaf.device == DEVICE for leaf in leaves.values())
        for name, leaf in here.parameters(i).items():
            # Adam divides by √v, which enlarges the rounding of small gradients.
            assert close(leaf, leaves[name], 1e-3), name
            assert not torch.equal(leaf, start.parameters(i)[name])
        own = there.trim(i, leaves)
        for name, padded in there.pad(i, own).items():
            assert close(padded, leaves[name], 0)
            assert padded.device == DEVICE
        there.save(i, tmp_path / str(i))
        there.save_initial(i, tmp_path / "initial" / str(i))
    model = net().to(DEVICE)
    restored = load(model, [tmp_path / "0", tmp_path / "1"])
    for bank in (restored, there):
        bank.select([1, -1, 0, 1])
    assert close(model.eval()(TOKENS.to(DEVICE)), there.model.eval()(TOKENS.to(DEVICE)), FLOAT32)


def test_views_of_what_has_moved_away_are_not_used() -> None:
    model = net()
    bank = Bank.attach(model, AdapterSpec(2, 4.0, ["up"]), generator(0))
    early = bank.parameters(0)["up.A"]
    model.to(DEVICE)
    with pytest.raises(ConfigError, match="move it first"):
        bank.share_gradients()
    late = bank.parameters(0)["up.A"]
    assert (early.device, late.device) == (CPU, DEVICE)


@pytest.mark.parametrize("rows", [[1, -1, 0, 1], [0, 0, 1, 1], [-1, -1, -1, -1]])
def test_mixed_rows_on_the_device(rows: list[int]) -> None:
    found: list[Any] = []
    for device in (CPU, DEVICE):
        model, bank = bank_on(device, move_first=False)
        with torch.no_grad():
            for i in range(2):
                for seed, leaf in enumerate(bank.parameters(i).values()):
                    leaf.add_(0.3 * normal(*leaf.shape, seed=seed, dtype=torch.float32).to(device))
        bank.route.seeds = (1, 2)
        tokens = TOKENS.to(device)
        bank.select(rows)
        with waits() as noted:
            output = model(tokens)
            if max(rows) >= 0:
                output.square().sum().backward()
        assert noted == []
        bank.share_gradients()
        found.append((output, [leaf.grad for i in range(2) for leaf in bank.parameters(i).values()]))
    (here, gradients), (there, others) = found
    assert there.device == DEVICE
    assert close(here, there, FLOAT32)
    for mine, theirs in zip(gradients, others, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or close(mine, theirs, FLOAT32)


def test_rows_follow_a_model_that_is_moved_after_they_were_selected() -> None:
    model, bank = bank_on(CPU, move_first=False)
    model.eval()
    bank.select([1, 0, -1, 1])
    with torch.no_grad():  # a graph would hold the parameters where they are
        expected = model(TOKENS)
        model.to(DEVICE)
        assert close(expected, model(TOKENS.to(DEVICE)), FLOAT32)
        bank.select(1)
        apart = model(TOKENS.to(DEVICE))
        bank.merge(1)
        assert close(apart, model(TOKENS.to(DEVICE)), FLOAT32)
        assert close(net().eval()(TOKENS), bank.detach()(TOKENS.to(DEVICE)), FLOAT32)
