"""Weights by the names of their updates: what is added is what the model then computes with."""

from __future__ import annotations

import sys

import pytest
import torch
from makers import generator, normal
from torch import Tensor, nn
from torch.nn import functional as F

from rankscope.errors import ShapeError
from rankscope.train.weights import add_updates, to_matrix, weight_matrix


class Conv1D(nn.Module):
    """GPT-2's layer, written again: y = x · W + b with W (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(nx, nf, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Zoo(nn.Module):
    """A module of each kind; ``lm_head`` shares the weight of ``embed``, Conv1D and one map are square."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(4, 4)
        self.wide = nn.Linear(4, 6, bias=False)
        self.conv1d = Conv1D(4, 4)
        self.c_fc = Conv1D(6, 4)
        self.embed = nn.Embedding(7, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed.weight
        self.conv = nn.Conv2d(3, 5, (2, 3))
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("steps", torch.zeros(3))


@pytest.fixture(autouse=True)
def conv1d_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for transformers.pytorch_utils, which takes a second to import."""
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", type("pytorch_utils", (), {"Conv1D": Conv1D}))


def single(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(9))


@pytest.mark.parametrize("name", ["square", "wide", "conv1d", "c_fc"])
def test_a_matrix_changes_the_output_by_its_product(name: str) -> None:
    """y' − y = ΔW · x for a row x: a transposed or scaled update would not do it."""
    model = Zoo()
    module = model.get_submodule(name)
    shape = tuple(to_matrix(module, module.weight).shape)
    update, x = single(*shape), single(5, shape[1])
    before = module(x)
    add_updates(model, {name: update})
    torch.testing.assert_close(module(x) - before, x @ update.T, atol=1e-5, rtol=1e-5)


def test_an_embedding_gains_its_row_and_takes_the_tied_head_along() -> None:
    model, update, x = Zoo(), single(7, 4), single(5, 4)
    rows, logits = model.embed(torch.arange(7)), model.lm_head(x)
    add_updates(model, {"embed": update})
    torch.testing.assert_close(model.embed(torch.arange(7)) - rows, update)
    torch.testing.assert_close(model.lm_head(x) - logits, x @ update.T, atol=1e-5, rtol=1e-5)
    assert model.lm_head.weight is model.embed.weight


def test_a_kernel_takes_the_matrix_that_it_flattens_to() -> None:
    model, kernel, x = Zoo(), single(5, 3, 2, 3), single(1, 3, 8, 8)
    before = model.conv(x)
    add_updates(model, {"conv": kernel.reshape(5, 18)})
    torch.testing.assert_close(model.conv(x) - before, F.conv2d(x, kernel), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["square.bias", "norm.weight", "norm.bias", "temperature", "attention.in_proj_weight"])
def test_what_is_no_module_goes_by_its_parameter_name(name: str) -> None:
    model = Zoo()
    parameter = model.get_parameter(name)
    before, change = parameter.detach().clone(), single(*parameter.shape)
    add_updates(model, {name: change})
    torch.testing.assert_close(parameter.detach() - before, change)


def test_a_conv1d_by_parameter_name_takes_its_own_shape() -> None:
    """``conv1d`` is a matrix (out, in), ``conv1d.weight`` the parameter (in, out)."""
    model, change = Zoo(), single(4, 4)
    before = model.conv1d.weight.detach().clone()
    add_updates(model, {"conv1d.weight": change})
    torch.testing.assert_close(model.conv1d.weight.detach() - before, change)
    add_updates(model, {"conv1d": -change.T})
    torch.testing.assert_close(model.conv1d.weight.detach(), before)


def test_the_model_itself_may_be_the_module() -> None:
    model, update = nn.Linear(4, 3), single(3, 4)
    before = model.weight.detach().clone()
    add_updates(model, {"": update})
    torch.testing.assert_close(model.weight.detach() - before, update)


def test_the_sum_is_rounded_once() -> None:
    """Next above 1 bfloat16 has 1 + 2⁻⁷: a little more than half of that rounds up, but half to 1 again."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    add_updates(model, {"": torch.tensor([[2.0**-8 + 2.0**-17]])})
    assert model.weight.item() == 1.0 + 2.0**-7
    assert model.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("wide", (4, 6)),  # transposed
        ("c_fc", (4, 6)),  # as stored
        ("conv", (3, 30)),  # as many numbers
        ("square.bias", (1, 4)),
        ("temperature", (1,)),
        ("embed", (6, 4)),
    ],
)
def test_another_shape_is_refused_and_named(name: str, shape: tuple[int, ...]) -> None:
    model = Zoo()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ShapeError, match=rf"^{name}: an update {str(shape).replace('(', '.').replace(')', '.')}"):
        add_updates(model, {name: torch.ones(shape)})
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["nowhere", "square.weights", "steps", "square.bias.x"])
def test_a_name_that_the_model_lacks_is_refused(name: str) -> None:
    with pytest.raises(ShapeError, match=f"no weight '{name}'"):
        add_updates(Zoo(), {name: torch.ones(3)})


@pytest.mark.parametrize(
    ("name", "shape"), [("wide", (6, 4)), ("c_fc", (6, 4)), ("conv", (5, 18)), ("attention.in_proj_weight", (12, 4))]
)
def test_a_weight_reads_as_the_matrix_that_an_update_adds_to(name: str, shape: tuple[int, int]) -> None:
    model, update = Zoo(), single(*shape)
    before = weight_matrix(model, name).clone()
    assert before.shape == shape
    assert before.dtype == torch.float32
    add_updates(model, {name: update})
    torch.testing.assert_close(weight_matrix(model, name) - before, update)


def test_what_is_no_matrix_has_none() -> None:
    for name in ("norm", "square.bias"):
        with pytest.raises(ShapeError, match="not a matrix"):
            weight_matrix(Zoo(), name)
