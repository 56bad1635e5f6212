"""The PiSSA start: against numpy's SVD, against PEFT's own PiSSA step by step, and as files on the unmodified base."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rankscope.errors import ConfigError, NonFiniteError
from rankscope.lora import AdapterSpec, Bank, load


@pytest.fixture(scope="module")
def peft() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what third parties warn of on import is theirs
        import peft
        import transformers.pytorch_utils  # noqa: F401 (our layers look for its Conv1D)
    return peft


@pytest.fixture(autouse=True)
def quiet_peft() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(peft|transformers)\..*")
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """Images (batch, 2, 4, 4) -> (batch, 3), by a convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.up = nn.Linear(24, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.up(torch.tanh(self.conv(x)).flatten(1))))


def net() -> Net:
    torch.manual_seed(2)
    return Net()


X = torch.randn(6, 2, 4, 4, generator=generator(1))
ALL = ["conv", "up", "out"]
SPECS = [
    AdapterSpec(2, 5.0, ALL, init="pissa"),
    AdapterSpec(4, 6.0, ["conv", "up"]),
    AdapterSpec(3, 2.0, ["up", "out"], init="pissa", rslora=True),
]


def top(weight: Tensor, r: int) -> np.ndarray:
    """The best approximation of rank r of a weight as a matrix (out, in), by numpy in float64."""
    u, s, vt = np.linalg.svd(weight.detach().double().flatten(1).numpy(), full_matrices=False)
    return (u[:, :r] * s[:r]) @ vt[:r]


def step(model: nn.Module, parameters: list[nn.Parameter], steps: int, x: Tensor = X) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_it_starts_from_the_largest_directions_and_changes_nothing() -> None:
    model = net()
    before = model(X)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    bank = Bank.attach(model, SPECS, [generator(i) for i in range(3)])
    for i, spec in enumerate(SPECS):
        bank.select(i)
        assert torch.equal(model(X), before)
        assert all(update.energy == 0 for update in bank.updates(i).values())
        for name, (A, B) in bank.factors(i).items():
            product = spec.slot(name).scale * B.flatten(1).double() @ A.flatten(1).double()
            if spec.init == "pissa":
                # Float32, twice a square root and a product.
                np.testing.assert_allclose(product, top(weights[f"{name}.weight"], spec.rank), atol=3e-6)
                # √(S / scale) on each side: rows of A and columns of B are as long.
                torch.testing.assert_close(A.flatten(1).norm(dim=1), B.flatten(1).norm(dim=0), rtol=1e-5, atol=0)
            else:
                assert product.count_nonzero() == 0
    bank.select(None)
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-6)
    bank.detach()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("i", [0, 2])
def test_the_function_is_that_of_the_weight_with_the_start_replaced(i: int) -> None:
    """W − s·B0A0 + s·BA by numpy's SVD of W, after some training; merged as well."""
    model, spec = net(), SPECS[i]
    bank = Bank.attach(model, spec, generator())
    step(model, bank.trainable_parameters(), 5)
    output, plain, updates = model(X), net(), bank.updates()
    for name, (A, B) in bank.factors().items():
        s, weight = spec.slot(name).scale, plain.get_submodule(name).weight
        change = s * B.flatten(1).double() @ A.flatten(1).double() - torch.from_numpy(top(weight, spec.rank))
        assert updates[name].nominal_rank == 2 * spec.rank
        assert change.norm() > 0.01
        # Each entry is a sum of a few products of float32 numbers of order one.
        torch.testing.assert_close(updates[name].dense().double(), change, rtol=0, atol=3e-6)
        weight.data += change.float().view(weight.shape)
    torch.testing.assert_close(output, plain(X), rtol=1e-4, atol=1e-5)
    bank.merge()
    torch.testing.assert_close(model(X), output, rtol=1e-4, atol=1e-5)
    bank.unmerge()
    assert torch.equal(model(X), output)


def test_small_updates_keep_their_digits() -> None:
    """An update of a millionth of the weight: the difference of two products in float32 would have lost it."""
    model = nn.Sequential(nn.Linear(40, 30))
    bank = Bank.attach(model, AdapterSpec(4, 4.0, ["0"], init="pissa"), generator())
    A, B = (factor.double() for factor in bank.factors()["0"])
    with torch.no_grad():
        bank.layers["0"].B.mul_(1 + 2.0**-20)
    exact = 2.0**-20 * B @ A
    # Each entry of B is rounded to 2⁻²⁴ of itself, 1/16 of its change at most; the errors are random.
    error = (bank.updates()["0"].dense().double() - (bank.layers["0"].B[0].double() - B).detach() @ A).norm()
    assert error < 1e-5 * exact.norm()
    x = torch.randn(5, 40, generator=generator(3))
    change = model(x) - model[0].base_layer(x)
    # The sum with the base's output is rounded to float32; without it the change is exact to float32.
    bare = model[0].delta(x, *model[0].forward_factors(0))
    wanted = (x.double() @ bank.updates()["0"].dense().double().T).float()
    torch.testing.assert_close(bare, wanted, rtol=1e-3, atol=1e-10)
    assert (change - bare).abs().max() < 1e-6


def test_dropout_acts_on_the_difference_so_the_start_is_the_base_in_training_too() -> None:
    model = net()
    before = model(X)
    bank = Bank.attach(model.train(), AdapterSpec(2, 5.0, ALL, init="pissa", dropout=0.5), generator())
    assert torch.equal(model(X), before)
    with torch.no_grad():
        bank.layers["up"].B.mul_(2)
    assert not torch.equal(model(X), model(X))


@pytest.mark.parametrize("route", [None, [2, 0, -1, 1, 2, 0]])
def test_in_a_bank_each_trains_as_alone(route: Any) -> None:
    """Three adapters, two of them PiSSA, of other ranks and targets; gradients of chunks and of mixed rows."""
    model = net().double()
    bank = Bank.attach(model, SPECS, [generator(i) for i in range(3)])
    x = X.double()
    bank.select(route)
    owners = torch.tensor(route or [0, 0, 1, 1, 2, 2])
    optimizers = [torch.optim.SGD(bank.parameters(i).values(), lr=0.01) for i in range(3)]
    for _ in range(3):
        model(x).square().sum().backward()
        bank.share_gradients()
        for optimizer in optimizers:
            optimizer.step()
        bank.zero_grad()
    for i, spec in enumerate(SPECS):
        single_model = net().double()
        single = Bank.attach(single_model, spec, generator(i))
        optimizer = torch.optim.SGD(single.trainable_parameters(), lr=0.01)
        for _ in range(3):
            single_model(x[owners == i]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, pair in single.factors().items():
            for mine, theirs in zip(bank.factors(i)[name], pair, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
        bank.select(i)
        torch.testing.assert_close(model(x), single_model(x), rtol=1e-9, atol=1e-11)
        # What a smaller rank does not use stays zero, in the start as well.
        for layer in bank.layers.values():
            assert layer.A[i, layer.slots[i].rank :].count_nonzero() == 0
            if layer.A0 is not None:
                assert layer.A0[i, layer.slots[i].rank if spec.init == "pissa" else 0 :].count_nonzero() == 0


def test_the_start_takes_memory_only_where_it_is_needed() -> None:
    bank = Bank.attach(net(), [SPECS[1], AdapterSpec(2, 2.0, ["out"], init="pissa")], [generator(0), generator(1)])
    assert bank.layers["up"].A0 is None
    assert bank.layers["out"].A0 is not None
    assert not bank.layers["out"].A0.requires_grad
    assert bank.layers["out"].A0.data_ptr() != bank.layers["out"].A.data_ptr()
    assert set(bank.parameters(1)) == {"out.A", "out.B"}
    assert bank.parameter_count(1) == 2 * 11


# Against PEFT


def linear_net(kind: str) -> nn.Module:
    torch.manual_seed(4)
    if kind == "linear":
        return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(9, 7), nn.Tanh(), Conv1D(5, 9))
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[2].weight)
    return model


INPUT = torch.randn(4, 7, generator=generator(5))
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}  # float32; AdamW divides by √v, which enlarges rounding


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_it_trains_as_in_peft_and_saves_what_peft_converts(
    peft: ModuleType, tmp_path: Path, kind: str, rslora: bool
) -> None:
    spec = AdapterSpec(3, 5.0, ["0", "2"], init="pissa", rslora=rslora)
    model = linear_net(kind)
    bank = Bank.attach(model, spec, generator())
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5.0,
        target_modules=["0", "2"],
        init_lora_weights="pissa",
        use_rslora=rslora,
        fan_in_fan_out=kind == "conv1d",
    )
    theirs = peft.get_peft_model(linear_net(kind), config)
    for name, (A, B) in bank.factors().items():
        wrapped = theirs.base_model.model.get_submodule(name)
        A1, B1 = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
        signs = (A * A1).sum(1).sign()
        torch.testing.assert_close(signs[:, None] * A, A1, **CLOSE)
        torch.testing.assert_close(signs * B, B1, **CLOSE)
    bank.save_initial(0, tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "their initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    start = model(INPUT).detach()
    torch.testing.assert_close(theirs(INPUT), start, **CLOSE)
    step(model, bank.trainable_parameters(), 4, INPUT)
    step(theirs, [p for p in theirs.parameters() if p.requires_grad], 4, INPUT)
    expected = model(INPUT)
    assert not torch.allclose(expected, start, atol=0.01)
    torch.testing.assert_close(theirs(INPUT), expected, **CLOSE)

    bank.save(0, tmp_path / "ours")
    theirs.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "their initial")
    )
    configs = [json.loads((tmp_path / which / "adapter_config.json").read_text()) for which in ("ours", "theirs")]
    assert configs[0]["r"] == configs[1]["r"] == 6
    assert configs[0]["lora_alpha"] == pytest.approx(configs[1]["lora_alpha"], rel=1e-12)
    assert configs[0]["use_rslora"] is configs[1]["use_rslora"] is rslora
    assert configs[0]["init_lora_weights"] is configs[1]["init_lora_weights"] is True
    tensors = [load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs")]
    assert {k: v.shape for k, v in tensors[0].items()} == {k: v.shape for k, v in tensors[1].items()}
    for name in ("0", "2"):
        keys = [f"base_model.model.{name}.lora_{half}.weight" for half in "BA"]
        torch.testing.assert_close(*(t[keys[0]] @ t[keys[1]] for t in tensors), **CLOSE)

    loaded = peft.PeftModel.from_pretrained(linear_net(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(loaded(INPUT), expected, **CLOSE)
    again = linear_net(kind)
    restored = load(again, tmp_path / "ours")
    torch.testing.assert_close(again(INPUT), expected, **CLOSE)
    assert restored.specs[0].slot("0").scale == pytest.approx(spec.slot("0").scale, rel=1e-12)


def test_patterns_keep_their_scales_in_files(peft: ModuleType, tmp_path: Path) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"2": 2}, "alpha_pattern": {"0": 3.0}}
    for rslora in (False, True):
        spec = AdapterSpec(3, 5.0, ["0", "2"], init="pissa", rslora=rslora, **patterns)
        model = linear_net("linear")
        bank = Bank.attach(model, spec, generator())
        step(model, bank.trainable_parameters(), 3, INPUT)
        bank.save(0, tmp_path / str(rslora))
        theirs = peft.PeftModel.from_pretrained(linear_net("linear"), tmp_path / str(rslora)).eval()
        torch.testing.assert_close(theirs(INPUT), model(INPUT), **CLOSE)
        for name, rank in (("0", 6), ("2", 4)):
            wrapped = theirs.base_model.model.get_submodule(name)
            assert wrapped.r["default"] == rank
            assert wrapped.scaling["default"] == pytest.approx(spec.slot(name).scale)


def test_initial_factors_are_an_ordinary_adapter_of_their_rank(tmp_path: Path) -> None:
    model = net()
    bank = Bank.attach(model, SPECS[:2], [generator(0), generator(1)])
    start = [bank.factors(i) for i in range(2)]
    bank.select(None)
    step(model, bank.trainable_parameters(), 2)
    bank.save_initial(0, tmp_path / "pissa")
    bank.save_initial(1, tmp_path / "kaiming")
    bank.save(1, tmp_path / "kaiming now")
    # PiSSA's is kept; of another the current factors are written, as ``save`` does.
    stored = load(net(), tmp_path / "pissa")
    assert stored.specs[0].slot("up") == SPECS[0].slot("up")
    assert all(torch.equal(A, start[0][name][0]) for name, (A, _) in stored.factors().items())
    assert all(torch.equal(B, start[0][name][1]) for name, (_, B) in stored.factors().items())
    assert not torch.equal(bank.factors(0)["up"][0], start[0]["up"][0])
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("kaiming", "kaiming now")]
    assert files[0].read_bytes() == files[1].read_bytes()
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("pissa", "kaiming")]
    assert [config["init_lora_weights"] for config in configs] == [True, True]
    assert [config["r"] for config in configs] == [2, 4]


def test_a_convolution_goes_through_files(peft: ModuleType, tmp_path: Path) -> None:
    model = net()
    bank = Bank.attach(model, SPECS[0], generator())
    step(model, bank.trainable_parameters(), 3)
    bank.save(0, tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    torch.testing.assert_close(theirs(X), model(X), **CLOSE)


# What is refused


class Quantised(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 5)
        self.weight = nn.Parameter((self.weight * 100).to(torch.int8), requires_grad=False)


def holding(value: float) -> nn.Linear:
    layer = nn.Linear(6, 5)
    nn.init.constant_(layer.weight, value)
    return layer


@pytest.mark.parametrize(
    ("module", "rank", "message"),
    [
        (nn.Embedding(6, 5), 2, "target '0' is an Embedding"),
        (nn.Conv2d(4, 4, 3, groups=2), 2, "target '0' is a convolution with groups"),
        (Quantised(), 2, "target '0' is stored as torch.int8; load the base unquantised"),
        (nn.Linear(6, 5), 6, "has only 5 singular directions, fewer than the rank 6"),
        (nn.Linear(3, 5), 4, "has only 3 singular directions, fewer than the rank 4"),
        (nn.Conv2d(2, 20, 3), 19, "has only 18 singular directions"),
    ],
)
def test_what_has_no_such_start_is_refused(module: nn.Module, rank: int, message: str) -> None:
    model = nn.Sequential(module)
    with pytest.raises(ConfigError, match=message):
        Bank.attach(model, AdapterSpec(rank, 4.0, ["0"], init="pissa"), generator())
    assert model[0] is module


def test_a_weight_that_is_not_finite_has_no_directions() -> None:
    model = nn.Sequential(holding(1.0), holding(math.nan))
    with pytest.raises(NonFiniteError, match="the weight of target '1'"):
        Bank.attach(model, AdapterSpec(2, 4.0, ["0", "1"], init="pissa"), generator())
    assert type(model[0]) is nn.Linear
    Bank.attach(model, AdapterSpec(5, 4.0, ["0"], init="pissa"), generator())  # as many as there are


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Bank.attach(model, SPECS[0], generator())
    assert type(model.up) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_half_precision_and_meta_bases() -> None:
    model = net().bfloat16()
    before = model(X.bfloat16())
    bank = Bank.attach(model, SPECS[0], generator())
    assert bank.layers["up"].A.dtype == torch.float32
    assert torch.equal(model(X.bfloat16()), before)
    with torch.device("meta"):
        shapes = Net()
    bank = Bank.attach(shapes, SPECS[0], generator())
    assert shapes(X.to("meta")).shape == (6, 3)
    assert bank.layers["up"].A0.device.type == "meta"
