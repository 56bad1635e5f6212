"""Modules trained whole: each adapter of a bank has its own copy, and each behaves as in a bank of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bank_makers import Net, fill_factors, make_net
from makers import generator
from safetensors.torch import load_file
from torch import Tensor, nn

from rankscope.errors import ConfigError, ShapeError
from rankscope.lora import AdapterSpec, Bank, load

SPECS = [
    AdapterSpec(2, 4.0, ["emb", "up"], modules_to_save=["block", "out"]),
    AdapterSpec(3, 3.0, ["up"], modules_to_save=["out", "block"]),
]
TOKENS = torch.randint(9, (6, 6), generator=generator(3))


@torch.no_grad()
def move_heads(bank: Bank, i: int, seed: int) -> None:
    source = generator(seed)
    for path in ("block", "out"):
        for parameter in bank.head(i, path).parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=source, dtype=parameter.dtype))


def single_bank(i: int) -> tuple[Net, Bank]:
    net = make_net()
    bank = Bank.attach(net, SPECS[i], generator(i))
    fill_factors(bank, 0, 20 + i)
    move_heads(bank, 0, 30 + i)
    return net, bank


def bank_of_two() -> tuple[Net, Bank]:
    net = make_net()
    bank = Bank.attach(net, SPECS, [generator(0), generator(1)])
    for i in range(2):
        fill_factors(bank, i, 20 + i)
        move_heads(bank, i, 30 + i)
    return net, bank


def test_each_chunk_passes_the_head_of_its_adapter_and_trains_it() -> None:
    net, bank = bank_of_two()
    bank.select(None)
    output = net(TOKENS)
    output.square().sum().backward()
    bank.share_gradients()
    for i, part in enumerate((slice(0, 3), slice(3, 6))):
        single_net, single = single_bank(i)
        expected = single_net(TOKENS[part])
        torch.testing.assert_close(output[part], expected, rtol=1e-11, atol=1e-11)
        expected.square().sum().backward()
        mine, theirs = bank.parameters(i), single.parameters(0)
        for path in ("block", "out"):
            for key, parameter in bank.head(i, path).named_parameters():
                name = f"{path}.{key}"
                assert mine[name] is parameter
                assert parameter.grad.abs().max() > 0
                torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-10, atol=1e-10)
        assert bank.parameter_count(i) == single.parameter_count()
    assert all(weight.grad is None for head in bank.heads.values() for weight in head.base.parameters())


def test_select_merge_and_switch_take_the_head_along() -> None:
    net, bank = bank_of_two()
    expected = [single_bank(i)[0](TOKENS) for i in range(2)]
    for i in (1, 0, 1):
        bank.select(i)
        torch.testing.assert_close(net(TOKENS), expected[i], rtol=1e-11, atol=1e-11)
        assert net.out.weight is bank.head(i, "out").weight
    bank.select(0)
    bank.merge(1)
    # A merged update is rounded to float32.
    torch.testing.assert_close(net(TOKENS), expected[1], rtol=1e-5, atol=1e-5)
    assert net.out.bias is bank.head(1, "out").bias
    bank.switch(0)
    torch.testing.assert_close(net(TOKENS), expected[0], rtol=1e-5, atol=1e-5)
    bank.unmerge()
    bank.select(1)
    torch.testing.assert_close(net(TOKENS), expected[1], rtol=1e-11, atol=1e-11)


def test_detach_gives_the_head_back() -> None:
    net = make_net()
    plain, out, before = net(TOKENS), net.out, {name: id(module) for name, module in net.named_modules()}
    bank = Bank.attach(net, SPECS, [generator(0), generator(1)])
    assert bank.head(0, "out") is not bank.head(1, "out")
    bank.select(None)
    assert torch.allclose(net(TOKENS), plain, rtol=1e-12)
    move_heads(bank, 0, 1)
    move_heads(bank, 1, 2)
    assert not torch.allclose(net(TOKENS), plain)
    bank.detach()
    assert net.out is out
    assert {name: id(module) for name, module in net.named_modules()} == before
    assert torch.equal(net(TOKENS), plain)
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_trained_is_each_adapters_own(count: int) -> None:
    net = make_net()
    bank = Bank.attach(net, SPECS[:count], [generator(i) for i in range(count)])
    trained = {id(parameter) for parameter in net.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in bank.trainable_parameters()}
    assert len(bank.trainable_parameters()) == len(trained) == 2 * len(bank.layers) + 6 * count
    for i in range(count):
        own = {id(weight) for path in bank.heads for weight in bank.head(i, path).parameters()}
        assert own < trained
        assert own.isdisjoint({id(weight) for head in bank.heads.values() for weight in head.base.parameters()})
        assert own < {id(weight) for weight in bank.parameters(i).values()}


def test_each_adapter_is_saved_and_loaded_with_its_head(tmp_path: Path) -> None:
    net, bank = bank_of_two()
    folders = [tmp_path / str(i) for i in range(2)]
    expected = []
    for i, folder in enumerate(folders):
        bank.save(i, folder)
        stored = load_file(folder / "adapter_model.safetensors")
        assert torch.equal(stored["base_model.model.out.weight"], bank.head(i, "out").weight)
        assert {key for key in stored if "lora" not in key} == {
            f"base_model.model.{name}.{leaf}" for name in ("block.0", "block.2", "out") for leaf in ("weight", "bias")
        }
        bank.select(i)
        expected.append(net(TOKENS))
    again = make_net()
    restored = load(again, folders)
    restored.select(None)
    torch.testing.assert_close(again(TOKENS.repeat(2, 1)), torch.cat(expected), rtol=1e-11, atol=1e-11)


class Pair(nn.Module):
    """A head that takes a mask by name and returns a tensor, nothing, and a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor, factor: float, *, mask: Tensor, table: Tensor) -> Any:
        y = self.linear(x) * mask[:, None] * factor
        return y, None, (y.sum(1), x @ table)


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(4, 5)
        self.head = head

    def forward(self, x: Tensor, **named: Any) -> Any:
        return self.head(self.up(x), **named)


def bank_of(head: nn.Module, count: int = 2) -> tuple[Model, Bank]:
    torch.manual_seed(0)
    model = Model(head)
    specs = [AdapterSpec(2, 2.0, ["up"], modules_to_save=["head"])] * count
    bank = Bank.attach(model, specs, [generator(i) for i in range(count)])
    for i in range(count):
        fill_factors(bank, i, i)
        nn.init.normal_(bank.head(i, "head").linear.weight, generator=generator(i))
    return model, bank


@pytest.mark.parametrize("route", [None, [1, 0, 1, 0]])
def test_a_head_with_several_inputs_and_outputs(route: Any) -> None:
    model, bank = bank_of(Pair())
    x, mask = torch.randn(4, 4, generator=generator(0)), torch.tensor([1.0, 2.0, 3.0, 4.0])
    # Its first axis is not that of the batch: every adapter sees all of it.
    table = torch.randn(5, 2, generator=generator(1))
    bank.select(route)
    y, nothing, (total, product) = model(x, factor=2.0, mask=mask, table=table)
    assert nothing is None
    for row, i in enumerate(route or [0, 0, 1, 1]):
        bank.select(i)
        one, _, (sums, products) = model(x[row : row + 1], factor=2.0, mask=mask[row : row + 1], table=table)
        torch.testing.assert_close(y[row], one[0])
        torch.testing.assert_close(total[row], sums[0])
        torch.testing.assert_close(product[row], products[0])


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x)}


def test_batches_that_cannot_be_split_are_refused() -> None:
    model, bank = bank_of(Odd())
    x = torch.ones(4, 4)
    assert model(x)["logits"].shape == (4, 3)
    bank.select(None)
    with pytest.raises(ConfigError, match="returns a dict; rows of several adapters"):
        model(x)
    with pytest.raises(ShapeError, match="without a batch that can be split"):
        model.head(3)
    with pytest.raises(ShapeError, match="an input of 3 rows cannot be split into equal chunks for 2 adapters"):
        model.head(x[:3])
    with pytest.raises(ConfigError, match="'up' is not trained whole; head is"):
        bank.head(0, "up")
    with pytest.raises(ConfigError, match="no adapter 2"):
        bank.head(2, "head")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model.head.nonsense


def test_a_module_within_a_saved_one_goes_along_with_it() -> None:
    net = make_net()
    bank = Bank.attach(net, AdapterSpec(2, 2.0, ["up"], modules_to_save=["block", "2"]), generator(0))
    assert list(bank.heads) == ["block"]
    assert bank.parameter_count() == 2 * 154 + 110 + 88


def test_a_module_without_parameters_can_be_saved_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))
    bank = Bank.attach(model, AdapterSpec(2, 2.0, ["0"], modules_to_save=["1"]), generator(0))
    assert model(torch.ones(2, 3)).shape == (2, 3)
    assert type(bank.detach()[1]) is nn.Dropout
