"""One adapter on one layer of each kind: forward, gradients, initial values, merging. No PEFT here."""

import math

import pytest
import torch
from bank_makers import KINDS, Conv1D
from makers import generator
from torch import Tensor, nn
from torch.func import functional_call

from rankscope.errors import ConfigError, NonFiniteError
from rankscope.lora import AdapterSpec, Bank


@pytest.fixture(autouse=True)
def conv1d_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for transformers.pytorch_utils, which these tests do not import."""
    module = type("pytorch_utils", (), {"Conv1D": Conv1D})
    monkeypatch.setitem(__import__("sys").modules, "transformers.pytorch_utils", module)


MERGEABLE = [name for name in KINDS if name != "grouped conv"]


def make(kind: str, dtype: torch.dtype = torch.float64, **settings: object) -> tuple[nn.Module, Bank, Tensor]:
    """A one-layer model with an adapter whose factors are all random."""
    torch.manual_seed(1)
    layer, x, _ = KINDS[kind]()
    model = nn.Sequential(layer).to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    settings = {"rank": 4, "alpha": 6.0, "targets": ["0"], **settings}
    bank = Bank.attach(model, AdapterSpec(**settings), generator())
    fill(bank)
    return model, bank, x


def fill(bank: Bank, seed: int = 5) -> None:
    source = generator(seed)
    for i in range(len(bank)):
        for name, (A, B) in bank.factors(i).items():
            draws = [torch.randn(factor.shape, generator=source, dtype=torch.float64) for factor in (A, B)]
            bank.layers[name].set_factors(i, *draws)


def dense_weight(bank: Bank, base: nn.Module, s: float) -> Tensor:
    """The merged weight by einsum from the stored factors, not by the package."""
    A, B = bank.factors()["0"]
    if isinstance(base, nn.Conv2d):
        return base.weight + s * torch.einsum("or,rchw->ochw", B[:, :, 0, 0], A)
    change = s * torch.einsum("or,ri->oi", B, A)
    return base.weight + (change.T if isinstance(base, nn.Embedding | Conv1D) else change)


@pytest.mark.parametrize("kind", MERGEABLE)
@pytest.mark.parametrize("rslora", [False, True])
def test_forward_is_that_of_the_dense_weight(kind: str, rslora: bool) -> None:
    model, bank, x = make(kind, rslora=rslora)
    base = model[0].base_layer
    weight = dense_weight(bank, base, 6 / math.sqrt(4) if rslora else 6 / 4)
    expected = functional_call(base, {"weight": weight}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected, base(x), atol=1e-2)  # the adapter does something


@pytest.mark.parametrize("kind", [name for name in MERGEABLE if "embedding" not in name])
def test_gradients_are_those_of_the_dense_weight(kind: str) -> None:
    model, bank, x = make(kind)
    base, s = model[0].base_layer, 6 / 4
    weight = dense_weight(bank, base, s).detach().requires_grad_()
    output = functional_call(base, {"weight": weight}, (x,))
    toward = torch.randn(output.shape, generator=generator(3), dtype=x.dtype)
    (output * toward).sum().backward()
    (model(x) * toward).sum().backward()
    A, B = (factor.flatten(1) for factor in bank.factors()["0"])
    G = weight.grad.T if isinstance(base, Conv1D) else weight.grad.flatten(1)
    torch.testing.assert_close(model[0].A.grad[0], s * B.T @ G, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model[0].B.grad[0], s * G @ A.T, rtol=1e-10, atol=1e-10)
    assert all(parameter.grad is None for parameter in base.parameters())


def test_gradient_of_a_padded_embedding_passes_the_padding_by() -> None:
    model, _, _ = make("padded embedding")
    model(torch.tensor([[2, 3, 2]])).sum().backward()
    touched = model[0].A.grad[0].abs().sum(0).nonzero().flatten()
    assert touched.tolist() == [3]


def test_a_scaled_embedding_scales_its_adapter() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.embed_scale

    model = nn.Sequential(Scaled(7, 5)).double()
    bank = Bank.attach(model, AdapterSpec(4, 6.0, ["0"]), generator())
    fill(bank)
    x = torch.arange(7)
    before = model(x)
    bank.merge()
    # A dense update is float32.
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_grouped_convolution_joins_groups_and_is_not_merged() -> None:
    model, bank, x = make("grouped conv")
    base = model[0].base_layer
    A, B = bank.factors()["0"]
    assert A.shape == (4, 4, 3, 3)
    assert B.shape == (6, 2, 1, 1)
    # Output channels 0-2 use rows 0-1 of A, channels 3-5 rows 2-3, each over all four input channels.
    change = torch.stack([sum(B[o, j, 0, 0] * A[2 * (o // 3) + j] for j in range(2)) for o in range(6)]) * 6 / 4
    full = torch.zeros(6, 4, 3, 3, dtype=x.dtype)
    full[:3, :2], full[3:, 2:] = base.weight[:3], base.weight[3:]
    expected = nn.functional.conv2d(x, full + change, base.bias, padding=1)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    update = bank.updates()["0"]
    assert update.shape == (6, 36)
    torch.testing.assert_close(update.dense(), change.flatten(1).float(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigError, match="0: a convolution with groups"):
        bank.merge()
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_fresh_adapter_changes_nothing(kind: str, init: str) -> None:
    torch.manual_seed(1)
    layer, x, _ = KINDS[kind]()
    model = nn.Sequential(layer)
    before = model(x)
    bank = Bank.attach(model, AdapterSpec(4, 6.0, ["0"], init=init), generator())
    assert torch.equal(model(x), before)
    A, B = bank.factors()["0"]
    started, still = (B, A) if "embedding" in kind else (A, B)
    assert started.count_nonzero() == started.numel()
    assert still.count_nonzero() == 0


def test_initial_values_have_the_stated_distribution() -> None:
    model = nn.ModuleDict({"lin": nn.Linear(400, 3), "conv": nn.Conv2d(16, 3, 5), "emb": nn.Embedding(10, 900)})

    def drawn(init: str) -> dict[str, tuple[Tensor, Tensor]]:
        bank = Bank.attach(model, AdapterSpec(50, 1.0, ["lin", "conv", "emb"], init=init), generator())
        factors = bank.factors()
        bank.detach()
        return factors

    kaiming, gaussian = drawn("kaiming"), drawn("gaussian")
    # 20 000 draws: the deviation of a sample deviation is at most .5 % of it, the bound is that of a uniform law.
    for A in (kaiming["lin"][0], kaiming["conv"][0]):
        assert 0.999 / 20 < A.abs().max() <= 1 / 20
        assert A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    assert gaussian["lin"][0].std().item() == pytest.approx(1 / 50, rel=0.025)
    assert gaussian["emb"][1].std().item() == pytest.approx(1.0, rel=0.025)
    assert kaiming["emb"][1].std().item() == pytest.approx(1.0, rel=0.025)


@pytest.mark.parametrize("kind", MERGEABLE)
def test_merged_equals_unmerged_and_comes_back_bit_for_bit(kind: str) -> None:
    model, bank, x = make(kind, torch.float32)
    base = model[0].base_layer
    original, parameter = base.weight.clone(), base.weight
    before = model(x)
    bank.merge()
    # Two sums of at most 36 products of numbers of order one, in another order: some 36 rounding errors.
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-4)
    assert torch.equal(model(x), base(x))
    assert not torch.equal(base.weight, original)
    bank.unmerge()
    assert base.weight is parameter
    assert torch.equal(base.weight, original)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_merge_switch_unmerge_in_every_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12)).to(dtype)
    original = model[0].weight.detach().clone()
    specs = [AdapterSpec(4, 8.0, ["0"]), AdapterSpec(2, 2.0, ["0"])]
    bank = Bank.attach(model, specs, [generator(0), generator(1)])
    fill(bank)
    base = model[0].base_layer
    exact = []
    for i, s in ((0, 2.0), (1, 1.0)):
        A, B = bank.factors(i)["0"]
        exact.append(original.double() + s * B.double() @ A.double())

    def check(i: int) -> None:
        # One rounding to the dtype errs by at most eps/2; the update itself is float32.
        error = (base.weight.detach().double() - exact[i]).abs()
        single = torch.finfo(torch.float32).eps * 30
        assert (error <= 0.5 * torch.finfo(dtype).eps * exact[i].abs() + single).all()

    bank.merge(0)
    check(0)
    for i in (1, 0, 1) * 5:
        bank.switch(i)
        check(i)
    assert base.weight.dtype == dtype
    bank.unmerge()
    assert torch.equal(base.weight, original)


def test_dtypes_of_factors_and_of_results() -> None:
    for base, factor in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(base)
        bank = Bank.attach(model, AdapterSpec(2, 4.0, ["0", "1"]), generator())
        fill(bank)
        assert {parameter.dtype for parameter in bank.trainable_parameters()} == {factor}
        for route in (0, None):
            bank.select(route)
            assert model(torch.randn(3, 6, dtype=base)).dtype == base
    model = nn.Sequential(nn.Linear(6, 5))
    bank = Bank.attach(model, AdapterSpec(2, 4.0, ["0"]), generator(), dtype=torch.bfloat16)
    assert model[0].A.dtype == torch.bfloat16
    assert model(torch.randn(3, 6)).dtype == torch.float32


@pytest.mark.parametrize("route", [0, None])
def test_half_precision_base_is_close_to_the_exact_result(route: int | None) -> None:
    model, bank, x = make("linear", torch.bfloat16)
    base = model[0].base_layer
    weight = base.weight.double() + 6 / 4 * bank.factors()["0"][1].double() @ bank.factors()["0"][0].double()
    exact = x.double() @ weight.T + base.bias.double()
    bank.select(route)
    # The base's product and the sum are each rounded to bfloat16.
    error = (model(x).double() - exact).abs().max()
    assert error < 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("route", [0, None])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_the_lower_precision(kind: str, route: int | None) -> None:
    model, bank, x = make(kind, torch.float32)
    exact = model(x)
    bank.select(route)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
        plain = model[0].base_layer(x)
    assert low.dtype == plain.dtype
    error = (low.float() - exact).abs().max()
    assert error < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("route", [0, None])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_on_the_meta_device(kind: str, route: int | None) -> None:
    with torch.device("meta"):
        layer, x, _ = KINDS[kind]()
        model = nn.Sequential(layer)
    expected = model(x).shape
    spec = AdapterSpec(4, 6.0, ["0"], dropout=0.5)
    bank = Bank.attach(model, spec, generator())
    bank.select(route)
    output = model(x)
    assert output.shape == expected
    assert output.device.type == "meta"
    output.sum().backward()
    assert model[0].A.grad.shape == model[0].A.shape


def test_a_merge_of_factors_that_are_not_finite_is_refused() -> None:
    model, bank, x = make("linear")
    before = model[0].base_layer(x)
    with torch.no_grad():
        model[0].B[0, 1, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"^0: B"):
        bank.merge()
    assert torch.equal(model[0].base_layer(x), before)
    with pytest.raises(NonFiniteError, match=r"^0: B"):
        bank.updates()


def test_a_merge_that_fails_half_way_leaves_nothing_merged() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    weights = [layer.weight for layer in model]
    bank = Bank.attach(model, [AdapterSpec(2, 4.0, ["0", "1"])] * 2, [generator(0), generator(1)])
    fill(bank)
    before = model(x := torch.randn(3, 6))
    bank.layers["1"].set_factors(1, B=torch.full((6, 2), math.nan))
    with pytest.raises(NonFiniteError, match=r"^1: B"):
        bank.merge(1)
    assert all(layer.base_layer.weight is weight for layer, weight in zip(model, weights, strict=True))
    bank.merge(0)
    with pytest.raises(NonFiniteError, match=r"^1: B"):
        bank.switch(1)
    assert all(layer.base_layer.weight is weight for layer, weight in zip(model, weights, strict=True))
    assert torch.equal(model(x), before)


def test_a_quantised_base_can_be_adapted_but_not_merged() -> None:
    class Rounded(nn.Linear):
        """Weights in int8, as quantising libraries subclass Linear."""

        def __init__(self) -> None:
            super().__init__(6, 5)
            self.weight = nn.Parameter((self.weight * 100).to(torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight.to(x.dtype) / 100).T

    model = nn.Sequential(Rounded())
    bank = Bank.attach(model, AdapterSpec(2, 4.0, ["0"]), generator())
    x = torch.randn(3, 6)
    assert torch.equal(model(x), model[0].base_layer(x))
    with pytest.raises(ConfigError, match=r"0: .*int8.*unquantised"):
        bank.merge()
