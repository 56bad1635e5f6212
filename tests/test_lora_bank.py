"""Banks: N adapters on one model behave as each would alone; what attaches also comes off."""

import copy

import pytest
import torch
from bank_makers import SPECS, bank_of_three, fill_factors, gradients, make_net, single_bank
from makers import generator
from torch import Tensor, nn

from rankscope.errors import ConfigError
from rankscope.lora import AdapterSpec, Bank


def test_initial_factors_do_not_depend_on_the_neighbours() -> None:
    bank = Bank.attach(make_net(), SPECS, [generator(i) for i in range(3)])
    reverse = Bank.attach(make_net(), SPECS[::-1], [generator(i) for i in (2, 1, 0)])
    for i, spec in enumerate(SPECS):
        single = Bank.attach(make_net(), spec, generator(i)).factors()
        for other in (bank.factors(i), reverse.factors(2 - i)):
            assert single.keys() == other.keys()
            for name, (A, B) in single.items():
                assert torch.equal(A, other[name][0])
                assert torch.equal(B, other[name][1])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_chunks_of_a_batch_are_as_each_adapter_alone(mode: str) -> None:
    tokens = torch.randint(9, (12, 6), generator=generator(3))
    net, bank = bank_of_three()
    net.train(mode == "train")
    bank.select(None)
    output = net(tokens)
    weight = torch.randn(output.shape, generator=generator(4), dtype=output.dtype)
    (output * weight).sum().backward()
    for i, part in enumerate((slice(0, 4), slice(4, 8), slice(8, 12))):
        single_net, single = single_bank(i)
        single_net.train(mode == "train")
        # Rounding only: everything is float64, and drop-out masks must be the very same.
        torch.testing.assert_close(output[part], expected := single_net(tokens[part]), rtol=1e-11, atol=1e-11)
        (expected * weight[part]).sum().backward()
        wanted = gradients(single, 0)
        for name, pair in gradients(bank, i).items():
            for mine, theirs in zip(pair, wanted[name], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
                assert mine.abs().max() > 0


def test_dropout_masks_differ_between_adapters_and_from_call_to_call() -> None:
    net = nn.Sequential(nn.Linear(50, 3)).train()
    specs = [AdapterSpec(2, 2.0, ["0"], dropout=0.5)] * 2
    bank = Bank.attach(net, specs, [generator(0), generator(1)])
    A, B = torch.ones(2, 50), torch.ones(3, 2)
    for i in range(2):
        bank.layers["0"].set_factors(i, A, B)
    x = torch.ones(2, 50)
    bank.select(None)
    first, second = net(x), net(x)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    # Inverted dropout keeps the mean: 2 · 50 with a deviation of 2 · √50 at p = .5.
    base = net[0].base_layer(x)
    many = torch.stack([net(x) - base for _ in range(400)])
    assert many.mean().item() == pytest.approx(100, abs=4 * 2 * 50**0.5 / 800**0.5)
    net.eval()
    torch.testing.assert_close(net(x) - base, torch.full((2, 3), 100.0))


def test_select_sends_every_row_through_one_adapter() -> None:
    tokens = torch.randint(9, (5, 6), generator=generator(3))
    net, bank = bank_of_three()
    net.eval()
    assert bank.selection == 0
    for i in (0, 1, 2, 1):
        bank.select(i)
        torch.testing.assert_close(net(tokens), single_bank(i)[0].eval()(tokens), rtol=1e-11, atol=1e-11)


def test_padding_stays_zero_under_adamw_with_weight_decay() -> None:
    net, bank = bank_of_three()
    bank.select(None)
    optimizer = torch.optim.AdamW(bank.trainable_parameters(), lr=0.1, weight_decay=0.5)
    padding = [(factor, factor.detach() == 0) for factor in bank.trainable_parameters()]
    assert sum(int(mask.sum()) for _, mask in padding) > 100
    before = [factor.detach().clone() for factor, _ in padding]
    for step in range(5):
        optimizer.zero_grad()
        net(torch.randint(9, (6, 6), generator=generator(step))).square().sum().backward()
        optimizer.step()
    for (factor, mask), old in zip(padding, before, strict=True):
        assert factor.grad[mask].count_nonzero() == 0
        assert factor.detach()[mask].count_nonzero() == 0
        assert not torch.equal(factor.detach(), old)


def test_a_bank_trains_as_the_runs_one_by_one() -> None:
    net, bank = bank_of_three()
    bank.select(None)
    singles = [single_bank(i) for i in range(3)]
    many = [torch.optim.AdamW(bank.trainable_parameters(), lr=0.01)]
    many += [torch.optim.AdamW(single.trainable_parameters(), lr=0.01) for _, single in singles]
    for step in range(4):
        tokens = torch.randint(9, (4, 6), generator=generator(step))
        for optimizer in many:
            optimizer.zero_grad()
        net(tokens.repeat(3, 1)).square().sum().backward()
        for single_net, _ in singles:
            single_net(tokens).square().sum().backward()
        for optimizer in many:
            optimizer.step()
    for i, (_, single) in enumerate(singles):
        for name, (A, B) in single.factors().items():
            # Adam divides by √v: where a gradient is nearly zero, rounding is magnified.
            torch.testing.assert_close(bank.factors(i)[name][0], A, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(bank.factors(i)[name][1], B, rtol=1e-6, atol=1e-7)


def test_updates_have_the_shapes_and_values_of_the_weights() -> None:
    _, bank = bank_of_three()
    for i, spec in enumerate(SPECS):
        for name, update in bank.updates(i).items():
            A, B = bank.factors(i)[name]
            s = spec.slot(name).scale
            assert update.nominal_rank == spec.rank
            if name == "emb":
                torch.testing.assert_close(update.dense(), (s * (B @ A).T).float())
                assert update.shape == (9, 12)
            elif name != "conv":
                torch.testing.assert_close(update.dense(), (s * B @ A).float())
    assert set(bank.updates(2)) == {"conv", "up", "out"}
    ranks = {"emb": 9 + 12, "up": 144 + 10, "block.0": 20, "block.2": 18}
    assert bank.parameter_count(1) == 4 * sum(ranks.values())


def test_factors_are_copies() -> None:
    _, bank = bank_of_three()
    old = bank.factors(1)["up"][0].clone()
    held = bank.factors(1)["up"][0]
    with torch.no_grad():
        for parameter in bank.trainable_parameters():
            parameter.add_(1)
    assert torch.equal(held, old)


@pytest.mark.parametrize("spec", [SPECS[0], AdapterSpec(2, 4.0, ["0"], bias="all", modules_to_save=["out"])])
def test_detach_gives_back_the_very_model(spec: AdapterSpec) -> None:
    net = make_net()
    net.norm.weight.requires_grad_(False)
    tree = {name: id(module) for name, module in net.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in net.named_parameters()}
    tokens = torch.randint(9, (4, 6))
    before = net(tokens)
    bank = Bank.attach(net, spec, generator(0))
    fill_factors(bank, 0, 1)
    optimizer = torch.optim.SGD(bank.trainable_parameters(), lr=0.1)
    net(tokens).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(net(tokens), before)
    if "conv" not in spec.targets:  # it has groups, which cannot be merged
        bank.merge()
    assert bank.detach() is net
    assert {name: id(module) for name, module in net.named_modules()} == tree
    for name, p in net.named_parameters():
        assert (id(p), p.requires_grad) == parameters[name][:2], name
        assert torch.equal(p, parameters[name][2]), name
    assert torch.equal(net(tokens), before)
    bank.detach()
    for action in (bank.merge, bank.unmerge, lambda: bank.select(0), lambda: bank.switch(0)):
        with pytest.raises(ConfigError, match="detached"):
            action()
    Bank.attach(net, spec, generator(0))  # and it can be used again


def test_only_the_adapter_is_trainable() -> None:
    net, bank = bank_of_three()
    trained = {id(parameter) for parameter in net.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in bank.trainable_parameters()}
    assert len(trained) == 2 * len(bank.layers)


@pytest.mark.parametrize(
    ("bias", "trained"),
    [("none", set()), ("lora_only", {"up", "block.0"}), ("all", {"conv", "norm", "up", "block.0", "block.2"})],
)
def test_biases_and_whole_modules_are_trained_with_the_adapter(bias: str, trained: set[str]) -> None:
    net = make_net()
    bank = Bank.attach(net, AdapterSpec(2, 4.0, ["up", "0"], bias=bias, modules_to_save=["out"]), generator(0))
    assert set(bank.biases) == trained
    trainable = {
        name.replace(".base_layer", "").replace(".copies.0", "")
        for name, p in net.named_parameters()
        if p.requires_grad
    }
    factors = {f"{name}.{half}" for name in ("up", "block.0") for half in "AB"}
    assert trainable == factors | {f"{name}.bias" for name in trained} | {"out.weight", "out.bias"}
    sizes = {"conv": 4, "norm": 36, "up": 10, "block.0": 10, "block.2": 8}
    expected = 2 * (144 + 10 + 20) + 7 * 8 + 7 + sum(sizes[name] for name in trained)
    assert bank.parameter_count() == expected == sum(p.numel() for p in bank.trainable_parameters())


class Tied(nn.Module):
    """A language model whose output layer is its embedding: as a module that shares the weight, or by a function."""

    def __init__(self, function: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 5)
        self.function = function
        if not function:
            self.head = nn.Linear(5, 9, bias=False)
            self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        return nn.functional.linear(x, self.emb.weight) if self.function else self.head(x)


@pytest.mark.parametrize(("function", "target"), [(False, "emb"), (False, "head"), (True, "emb")])
def test_an_adapter_on_one_end_of_tied_weights_leaves_the_other_alone(function: bool, target: str) -> None:
    net = Tied(function).double()
    plain = copy.deepcopy(net)
    weight = net.emb.weight
    bank = Bank.attach(net, AdapterSpec(2, 4.0, [target]), generator(0))
    fill_factors(bank, 0, 1)
    tokens = torch.arange(9)
    change = bank.updates()[target].dense().double()
    embedded = plain.emb.weight + (change if target == "emb" else 0)
    expected = embedded @ (plain.emb.weight + (change if target == "head" else 0)).T
    # The update is read out in float32.
    torch.testing.assert_close(net(tokens), expected, rtol=1e-5, atol=1e-5)
    bank.merge()
    torch.testing.assert_close(net(tokens), expected, rtol=1e-5, atol=1e-5)
    bank.detach()
    assert net.emb.weight is weight
    assert function or net.head.weight is weight


def test_a_merged_model_can_be_moved_between_devices() -> None:
    net = make_net()
    bank = Bank.attach(net, AdapterSpec(2, 4.0, ["up"], bias="lora_only", modules_to_save=["out"]), generator(0))
    bank.merge()
    net.to("meta")
    bank.detach()
    assert {p.device.type for p in net.parameters()} == {"meta"}


def test_attributes_of_the_base_show_through() -> None:
    net, bank = bank_of_three()
    assert net.up.in_features == 144
    assert net.emb.embedding_dim == 12
    assert net.up.bias is net.up.base_layer.bias
    assert net.up.weight is net.up.base_layer.weight
    with pytest.raises(AttributeError, match="nonsense"):
        _ = net.up.nonsense
    assert copy.deepcopy(net).up.A is not bank.layers["up"].A
