"""Dropout that is a function of the adapter's seed and the layer's path, and of nothing else."""

from __future__ import annotations

import pytest
import torch
from bank_makers import SPECS, bank_of_three, fill_factors, gradients, make_net, single_bank
from makers import generator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankscope.lora import AdapterSpec, Bank
from rankscope.lora.routing import dropout_seed

TOKENS = torch.randint(9, (12, 6), generator=generator(3))
# Two adapters with dropout, one without; 11 draws before, so that the streams of the generators differ.
SEEDS = (7, 2**62, 7)


def test_masks_are_the_same_alone_and_in_any_bank() -> None:
    net, bank = bank_of_three()
    for source in bank.route.generators:
        torch.rand(11, generator=source)
    net.train()
    bank.select(None)
    bank.route.seeds = SEEDS
    output = net(TOKENS)
    torch.testing.assert_close(net(TOKENS), output, rtol=0, atol=0)
    bank.route.seeds = [1, 2, 3]
    other = net(TOKENS)
    for i in range(3):
        part = slice(4 * i, 4 * i + 4)
        single_net, single = single_bank(i)
        single_net.train()
        single.route.seeds = [SEEDS[i]]
        torch.testing.assert_close(output[part], single_net(TOKENS[part]), rtol=1e-11, atol=1e-11)
        assert torch.allclose(other[part], output[part]) == (SPECS[i].dropout == 0)
    # The order of adapters in the bank does not matter either, nor which layers the others go to.
    net = make_net().train()
    pair = Bank.attach(net, [AdapterSpec(3, 3.0, ["out"], dropout=0.9), SPECS[2]], [generator(4), generator(5)])
    fill_factors(pair, 1, 22)
    pair.select(None)
    pair.route.seeds = [1, SEEDS[2]]
    torch.testing.assert_close(net(TOKENS[4:])[4:], output[8:], rtol=1e-11, atol=1e-11)


class Blocks(nn.Module):
    """Residual blocks, each computed again in the backward pass where asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x))
        return x


@pytest.mark.parametrize("seeded", [True, False])
def test_checkpointing_draws_the_same_masks_again(seeded: bool) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = Blocks().double().train()
        net.checkpointing = checkpointing
        specs = [AdapterSpec(2, 2.0, r"blocks.\d.[02]", dropout=0.5), AdapterSpec(3, 3.0, r".*\d.2", dropout=0.2)]
        bank = Bank.attach(net, specs, [generator(0), generator(1)])
        for i in range(2):
            fill_factors(bank, i, seed=i)
        bank.select(None)
        bank.route.seeds = (5, 6) if seeded else None
        net(torch.ones(4, 8, dtype=torch.float64)).square().sum().backward()
        found.append(gradients(bank, 0))
    close = all(
        torch.allclose(a, b, rtol=1e-12)
        for name, pair in found[0].items()
        for a, b in zip(pair, found[1][name], strict=True)
    )
    assert close == seeded  # without seeds the stream has run on: this is what they are for


def test_masks_of_layers_steps_and_adapters_are_independent() -> None:
    """Each of 2 layers, 2 steps, 2 seeds drops other entries; any two masks agree in half of 2 000 entries."""
    net = nn.ModuleList([nn.Linear(2000, 1), nn.Linear(2000, 1)])
    bank = Bank.attach(net, AdapterSpec(1, 1.0, ["0", "1"], dropout=0.5), generator(0))
    masks = []
    for seed in (0, 1, 2**63 - 1):
        bank.route.seeds = [seed]
        masks += [layer.prepare_input(torch.ones(1, 2000), 0)[0] for layer in bank.layers.values()]
    stacked = torch.stack(masks)
    assert set(stacked.unique().tolist()) == {0.0, 2.0}
    agree = torch.stack([(a == b).double().mean() for k, a in enumerate(stacked) for b in stacked[:k]])
    # A deviation of .5/√2000 = .011; five of them.
    assert (agree - 0.5).abs().max() < 0.056
    assert (stacked.mean(1) - 1).abs().max() < 0.12


def test_the_mix_is_what_it_says() -> None:
    """The first eight bytes of sha256 of "seed path", as openssl computes it, without the lowest bit."""
    assert dropout_seed(7, "a.b") == int("7928befcd7bba7c8", 16) >> 1
    assert dropout_seed(7, "a.b") != dropout_seed(7, "a.c") != dropout_seed(8, "a.b")
