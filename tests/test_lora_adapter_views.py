"""One optimizer per adapter on one bank: each adapter trains as it would alone, and moves between banks."""

from __future__ import annotations

import pytest
import torch
from bank_makers import SPECS, Net, bank_of_three, fill_factors, gradients, make_net, single_bank
from makers import generator
from torch import Tensor, nn

from rankscope.errors import ConfigError, ShapeError
from rankscope.lora import AdapterSpec, Bank

RATES = (0.02, 0.005, 0.05)


def tokens(step: int) -> Tensor:
    return torch.randint(9, (4, 6), generator=generator(step))


def optimizer_of(bank: Bank, i: int, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(bank.parameters(i).values(), lr=rate, weight_decay=0.1, fused=True)


def train_together(net: Net, bank: Bank, optimizers: list[torch.optim.AdamW], steps: range) -> None:
    """Two micro-batches a step; gradients of each adapter clipped by its own norm, at a value that is exceeded."""
    bank.select(None)
    for step in steps:
        for micro in (0, 1):
            net(tokens(2 * step + micro).repeat(len(bank), 1)).square().sum().backward()
        bank.share_gradients()
        for i, optimizer in enumerate(optimizers):
            nn.utils.clip_grad_norm_(bank.parameters(i).values(), 0.5)
            optimizer.step()
        bank.zero_grad()


def train_alone(i: int, steps: range) -> Bank:
    """The same without anything of ``Leaves``: the stacked parameters of a bank of one."""
    net, bank = single_bank(i)
    optimizer = torch.optim.AdamW(bank.trainable_parameters(), lr=RATES[i], weight_decay=0.1)
    for step in steps:
        for micro in (0, 1):
            net(tokens(2 * step + micro)).square().sum().backward()
        nn.utils.clip_grad_norm_(bank.trainable_parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return bank


def assert_same_factors(bank: Bank, i: int, single: Bank) -> None:
    assert bank.factors(i).keys() == single.factors().keys()
    for name, pair in single.factors().items():
        for mine, theirs in zip(bank.factors(i)[name], pair, strict=True):
            # Adam divides by √v: where a gradient is nearly zero, rounding of float64 is magnified.
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


def test_each_adapter_has_an_optimizer_of_its_own_and_trains_as_alone() -> None:
    """Other rates, ranks, targets, dropout; a convolution with groups; gradients that are summed and clipped."""
    net, bank = bank_of_three()
    start = {(i, name): A.clone() for i in range(3) for name, (A, _) in bank.factors(i).items()}
    optimizers = [optimizer_of(bank, i, RATES[i]) for i in range(3)]
    train_together(net, bank, optimizers, range(5))
    for i in range(3):
        assert_same_factors(bank, i, train_alone(i, range(5)))
        assert all(not torch.equal(A, start[i, name]) for name, (A, _) in bank.factors(i).items())
    for stack in bank.trainable_parameters():
        assert stack.grad is None


def test_leaves_are_the_memory_of_the_stack() -> None:
    _, bank = bank_of_three()
    for i, spec in enumerate(SPECS):
        leaves = bank.parameters(i)
        assert list(leaves) == [f"{path}.{half}" for path in bank.factors(i) for half in "AB"]
        for name, leaf in leaves.items():
            path, _, half = name.rpartition(".")
            stack = getattr(bank.layers[path], half)
            assert leaf.is_leaf
            assert leaf.requires_grad
            assert leaf.is_contiguous()
            assert leaf.shape == stack.shape[1:]
            assert leaf.data_ptr() == stack.data_ptr() + i * stack[0].numel() * stack.element_size()
        assert bank.layers["up"].slots[i].rank == spec.rank < bank.layers["up"].A.shape[1] + (i == 2)
        again = bank.parameters(i)
        assert all(again[name] is leaf for name, leaf in leaves.items())
    with pytest.raises(ConfigError, match="no adapter 3"):
        bank.parameters(3)


def test_gradients_are_slices_without_copies() -> None:
    net, bank = bank_of_three()
    bank.parameters(0)
    leaves = bank.parameters(1)
    bank.select(1)
    net(tokens(0)).sum().backward()
    assert all(leaf.grad is None for leaf in leaves.values())
    bank.share_gradients()
    wanted = gradients(bank, 1)
    for path, (gradient, _) in wanted.items():
        stack, leaf = bank.layers[path].A.grad, leaves[f"{path}.A"]
        assert leaf.grad.data_ptr() == stack[1].data_ptr()
        assert torch.equal(bank.trim(1, {f"{path}.A": leaf.grad})[f"{path}.A"], gradient)
    # The third adapter alone goes to a layer that the second does not: no gradient has reached it.
    assert bank.layers["conv"].A.grad is None
    assert bank.parameters(0)["conv.A"].grad is None
    bank.zero_grad()
    assert all(p.grad is None for p in (*leaves.values(), *bank.trainable_parameters()))
    bank.share_gradients()
    assert all(leaf.grad is None for leaf in leaves.values())


def test_one_adapter_with_its_head_and_biases() -> None:
    net = make_net()
    spec = AdapterSpec(2, 4.0, ["up"], bias="lora_only", modules_to_save=["block", "out"])
    bank = Bank.attach(net, spec, generator(0))
    leaves = bank.parameters(0)
    heads = ["block.0.weight", "block.0.bias", "block.2.weight", "block.2.bias", "out.weight", "out.bias"]
    assert list(leaves) == ["up.A", "up.B", *heads, "up.bias"]
    assert leaves["up.bias"] is bank.biases["up"]
    assert leaves["out.weight"] is bank.head(0, "out").weight
    assert bank.parameter_count() == sum(leaf.numel() for leaf in leaves.values())
    before = net(tokens(0)).detach()
    optimizer = optimizer_of(bank, 0, 0.1)
    net(tokens(0)).square().sum().backward()
    bank.share_gradients()
    optimizer.step()
    assert not torch.allclose(net(tokens(0)), before)
    assert all(leaf.grad is not None for leaf in leaves.values())
    bank.zero_grad()
    assert all(leaf.grad is None for leaf in leaves.values())


def test_tied_parameters_are_trained_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    bank = Bank.attach(model, AdapterSpec(2, 4.0, ["0"], bias="all", modules_to_save=["2"]), generator(0))
    assert list(bank.parameters(0)) == ["0.A", "0.B", "2.weight", "2.bias", "0.bias"]


def test_moving_the_model_afterwards_is_noticed() -> None:
    """Views of memory that the model has left would train nothing."""
    net = make_net()
    bank = Bank.attach(net, AdapterSpec(2, 4.0, ["up"]), generator(0))
    old = bank.parameters(0)["up.A"]
    net.to(torch.float32)
    with pytest.raises(ConfigError, match="move it first"):
        bank.share_gradients()
    new = bank.parameters(0)["up.A"]
    assert new.dtype == torch.float32
    assert new is not old
    bank.share_gradients()


def test_a_run_goes_on_in_a_bank_with_another_largest_rank() -> None:
    """Weights and moments leave a bank of three between steps, and each goes on in another bank."""
    net, bank = bank_of_three()
    optimizers = [optimizer_of(bank, i, RATES[i]) for i in range(3)]
    train_together(net, bank, optimizers, range(3))
    states = [carried(bank, i, optimizers[i]) for i in range(3)]
    generators = [source.get_state() for source in bank.route.generators]
    for i in range(3):
        assert {name: tuple(t.shape) for name, t in states[i]["weight"].items()} == {
            f"{path}.{half}": tuple(factor.shape)
            for path, pair in bank.factors(i).items()
            for half, factor in zip("AB", pair, strict=True)
        }
        # Together with another one, of another rank, in another order.
        neighbour = (i + 1) % 3
        net = make_net()
        pair = Bank.attach(net, [SPECS[neighbour], SPECS[i]], [generator(9), generator(8)])
        pair.route.generators[1].set_state(generators[i])
        fill_factors(pair, 0, 1)
        moved = [optimizer_of(pair, 0, 0.1), optimizer_of(pair, 1, RATES[i])]
        restore(pair, 1, moved[1], states[i])
        train_together(net, pair, moved, range(3, 5))
        assert_same_factors(pair, 1, train_alone(i, range(5)))


def carried(bank: Bank, i: int, optimizer: torch.optim.AdamW) -> dict[str, dict[str, Tensor]]:
    leaves = bank.parameters(i)
    state = {key: {n: optimizer.state[leaf][key] for n, leaf in leaves.items()} for key in ("exp_avg", "exp_avg_sq")}
    steps = {name: optimizer.state[leaf]["step"] for name, leaf in leaves.items()}
    return {"weight": bank.trim(i, leaves), **{key: bank.trim(i, t) for key, t in state.items()}, "step": steps}


@torch.no_grad()
def restore(bank: Bank, i: int, optimizer: torch.optim.AdamW, state: dict[str, dict[str, Tensor]]) -> None:
    padded = {key: bank.pad(i, tensors) for key, tensors in state.items() if key != "step"} | {"step": state["step"]}
    for name, leaf in bank.parameters(i).items():
        leaf.copy_(padded["weight"][name])
        optimizer.state[leaf] = {key: padded[key][name].clone() for key in ("step", "exp_avg", "exp_avg_sq")}


def test_trim_and_pad_are_inverse_and_check_shapes() -> None:
    _, bank = bank_of_three()
    leaves = bank.parameters(0) | {"out.head": torch.ones(3)}
    own = bank.trim(0, leaves)
    assert own["out.head"] is leaves["out.head"]
    for path, (A, B) in bank.factors(0).items():
        assert torch.equal(own[f"{path}.A"], A)
        assert torch.equal(own[f"{path}.B"], B)
    assert own["conv.A"].shape == (2, 2, 3, 3)
    assert leaves["conv.A"].shape == (6, 18)
    for name, padded in bank.pad(0, own).items():
        assert torch.equal(padded, leaves[name])
    own["conv.A"].zero_()
    assert bank.layers["conv"].A[0].count_nonzero() > 0  # a copy
    with pytest.raises(ShapeError, match=r"^emb: A is \(2, 9\), expected \(4, 9\)"):
        bank.trim(0, own)
    with pytest.raises(ShapeError, match=r"^up: B is \(10, 6\), expected \(10, 2\)"):
        bank.pad(0, {"up.B": leaves["up.B"]})
