"""Banks of adapters on a small network, alone and together, and a layer of each kind that can be adapted."""

from __future__ import annotations

import copy

import torch
from makers import generator
from torch import Tensor, nn

from rankscope.lora import AdapterSpec, Bank


class Net(nn.Module):
    """Tokens (batch, 6) -> logits (batch, 7), with a layer of each kind on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 12)
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(36)
        self.up = nn.Linear(6 * 24, 10)
        self.block = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 8))
        self.out = nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens).reshape(len(tokens), 2, 6, 6)
        x = self.conv(x).flatten(1)
        return self.out(self.block(torch.relu(self.up(x))))


def make_net() -> Net:
    """The same network at every call, in float64."""
    torch.manual_seed(7)
    return Net().double()


SPECS = (
    AdapterSpec(2, 4.0, ["emb", "conv", "up", "0", "out"]),
    AdapterSpec(4, 6.0, ["emb", "up", "0", "2"], dropout=0.3),
    AdapterSpec(6, 2.0, ["conv", "up", "out"], dropout=0.5, rslora=True, init="gaussian"),
)


def fill_factors(bank: Bank, i: int, seed: int) -> None:
    """Random factors for adapter i of the bank, the same ones for the same seed."""
    source = generator(seed)
    for name, (A, B) in bank.factors(i).items():
        draws = [0.3 * torch.randn(factor.shape, generator=source, dtype=torch.float64) for factor in (A, B)]
        bank.layers[name].set_factors(i, *draws)


def single_bank(i: int) -> tuple[Net, Bank]:
    """A network with adapter i of ``SPECS`` alone."""
    net = make_net()
    bank = Bank.attach(net, SPECS[i], generator(i))
    fill_factors(bank, 0, seed=20 + i)
    return net, bank


def bank_of_three() -> tuple[Net, Bank]:
    """The same network with all three adapters of ``SPECS``, each with the factors that it has alone."""
    net = make_net()
    bank = Bank.attach(net, SPECS, [generator(i) for i in range(3)])
    for i in range(3):
        fill_factors(bank, i, seed=20 + i)
    return net, bank


def gradients(bank: Bank, i: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients of the factors of adapter i, read through the same cutting as the factors."""
    reader = copy.deepcopy(dict(bank.layers))
    for name, layer in bank.layers.items():
        for half in ("A", "B"):
            gradient = getattr(layer, half).grad
            getattr(reader[name], half).data = torch.zeros(()) if gradient is None else gradient.clone()
    return {name: reader[name].factors(i) for name, layer in bank.layers.items() if layer.slots[i].rank}


class Conv1D(nn.Module):
    """GPT-2's layer, written again: y = x · W + b with W (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


# name -> (layer, input, whether the update can be merged)
KINDS = {
    "linear": lambda: (nn.Linear(6, 5), torch.randn(4, 3, 6), True),
    "linear without bias": lambda: (nn.Linear(6, 5, bias=False), torch.randn(4, 6), True),
    "conv1d": lambda: (Conv1D(5, 6), torch.randn(4, 3, 6), True),
    "embedding": lambda: (nn.Embedding(7, 5), torch.randint(7, (4, 3)), True),
    "padded embedding": lambda: (nn.Embedding(7, 5, padding_idx=2), torch.randint(7, (4, 3)), True),
    "conv": lambda: (nn.Conv2d(4, 6, 3), torch.randn(4, 4, 7, 6), True),
    "strided conv": lambda: (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), torch.randn(4, 4, 7, 6), True),
    "dilated conv": lambda: (nn.Conv2d(4, 6, 3, dilation=2, padding="same"), torch.randn(4, 4, 7, 6), True),
    "reflecting conv": lambda: (
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        torch.randn(4, 4, 7, 6),
        True,
    ),
    "pointwise conv": lambda: (nn.Conv2d(4, 6, 1), torch.randn(4, 4, 3, 3), True),
    "grouped conv": lambda: (nn.Conv2d(4, 6, 3, groups=2, padding=1), torch.randn(4, 4, 7, 6), False),
}
