"""Mixed batches: rows of one batch pass different adapters, and each comes out as if its adapter were alone."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from bank_makers import KINDS, Conv1D, bank_of_three, fill_factors, gradients, make_net, single_bank
from makers import generator
from torch import Tensor, nn

from rankscope.errors import ConfigError, ShapeError
from rankscope.lora import AdapterSpec, Bank

TOKENS = torch.randint(9, (7, 6), generator=generator(3))
ROWS = [
    [0, 1, 2, 0, 1, 2, 0],
    [2, -1, 2, 1, -1, 0, 2],
    [0, 0, 0, 1, 1, 2, 2],  # in order: nothing is moved
    [1] * 7,
    [-1] * 7,
    [2, 2, 2, -1, -1, -1, -1],
]


@pytest.mark.parametrize("rows", ROWS)
def test_each_row_is_as_its_adapter_alone(rows: list[int]) -> None:
    """A model with a layer of each kind, of adapters with other ranks and other targets; outputs and gradients."""
    net, bank = bank_of_three()
    net.eval()
    weight = torch.randn(7, 7, generator=generator(4), dtype=torch.float64)
    bank.select(rows)
    assert bank.selection == tuple(rows)
    output = net(TOKENS)
    if max(rows) >= 0:
        (output * weight).sum().backward()
    for i in range(-1, 3):
        chosen = torch.tensor([row == i for row in rows])
        single_net, single = (make_net(), None) if i < 0 else single_bank(i)
        expected = single_net.eval()(TOKENS[chosen])
        torch.testing.assert_close(output[chosen], expected, rtol=1e-11, atol=1e-11)
        if single is not None and chosen.any():
            (expected * weight[chosen]).sum().backward()
            wanted = gradients(single, 0)
            for name, pair in gradients(bank, i).items():
                for mine, theirs in zip(pair, wanted[name], strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.fixture
def conv1d(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type("pytorch_utils", (), {"Conv1D": Conv1D})
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(conv1d: None, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer, x, _ = KINDS[kind]()
    x = x.to(dtype) if x.is_floating_point() else x
    model = nn.Sequential(layer).to(dtype)
    specs = [AdapterSpec(4, 6.0, ["0"]), AdapterSpec(2, 2.0, ["0"])]
    bank = Bank.attach(model, specs, [generator(0), generator(1)])
    for i in range(2):
        fill_factors(bank, i, i)
    rows = [1, -1, 0, 1]
    bank.select(rows)
    output = model(x)
    assert output.dtype == dtype
    base = model[0].base_layer(x)
    for row, i in enumerate(rows):
        bank.select(max(i, 0))
        alone = base if i < 0 else model(x)
        # One row more or fewer in a product changes the order of its sums, so one rounding to the dtype.
        close = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 0.016, "atol": 0.016}
        torch.testing.assert_close(output[row], alone[row], **close)
        assert i < 0 or not torch.allclose(output[row], base[row], rtol=0.1)


def test_dropout_of_a_row_is_that_of_its_adapter() -> None:
    net, bank = bank_of_three()
    net.train()
    bank.route.seeds = (1, 2, 3)
    bank.select([2, 1, 2, 1, 0, 2, -1])
    output = net(TOKENS)
    for i, chosen in ((0, [4]), (1, [1, 3]), (2, [0, 2, 5])):
        single_net, single = single_bank(i)
        single.route.seeds = [i + 1]
        torch.testing.assert_close(output[chosen], single_net.train()(TOKENS[chosen]), rtol=1e-11, atol=1e-11)


def test_autocast() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    bank = Bank.attach(model, [AdapterSpec(2, 4.0, ["0", "1"])] * 2, [generator(0), generator(1)])
    for i in range(2):
        fill_factors(bank, i, i)
    x = torch.randn(3, 6, generator=generator(0))
    bank.select([1, -1, 0])
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_another_number_of_rows_is_refused_in_one_sentence() -> None:
    net, bank = bank_of_three()
    bank.select([0, 1])
    with pytest.raises(ShapeError, match="an input of 7 rows does not fit the 2 rows that were selected"):
        net(TOKENS)
    bank.select([-1, -1])
    with pytest.raises(ShapeError, match="7 rows does not fit"):
        net(TOKENS)
    for rows, message in (
        ([0, 3], "no adapter 3; there are 3"),
        ([0, -2], "no adapter -2"),
        ([], "there are none"),
    ):
        with pytest.raises(ConfigError, match=message):
            bank.select(rows)
    assert bank.selection == (-1, -1)  # what is refused changes nothing
    for which in (1, None):
        bank.select(which)
        assert bank.selection == which
    single = Bank.attach(nn.Sequential(nn.Linear(3, 3)), AdapterSpec(2, 2.0, ["0"]), generator(0))
    single.merge()
    with pytest.raises(ConfigError, match="unmerge first"):
        single.select([0, 0])
    single.detach()
    with pytest.raises(ConfigError, match="detached"):
        single.select([0])


def test_order_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Index tensors are made by ``select``; forward passes make none."""
    net, bank = bank_of_three()
    rows = [2, 1, 0, 2, 1, 0, 2]
    bank.select(rows)
    expected = net.eval()(TOKENS)
    bank.select(rows)
    monkeypatch.setattr(torch, "tensor", None)
    monkeypatch.setattr(Tensor, "argsort", None)
    assert torch.equal(net(TOKENS), expected)


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what third parties warn of on import is theirs
        import transformers
    return transformers


def classifier(transformers: ModuleType, kind: str) -> nn.Module:
    torch.manual_seed(3)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 8, "num_labels": 3, "pad_token_id": 0}
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).double().eval()
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes)).double().eval()


HEADS = {"bert": "classifier", "llama": "score"}
TARGETS = {
    "bert": (["query", "value"], ["dense", "word_embeddings"], ["key"]),
    "llama": (["q_proj", "v_proj"], ["down_proj", "embed_tokens"], ["up_proj"]),
}


@pytest.mark.parametrize("kind", HEADS)
def test_classifiers_of_transformers(transformers: ModuleType, kind: str) -> None:
    """Each with a head of its own; rows without an adapter pass the base and its head."""
    words = torch.tensor([[1, 5, 3, 9], [2, 2, 19, 7], [8, 1, 4, 4], [3, 3, 6, 11], [12, 13, 1, 2]])
    specs = [
        AdapterSpec(rank, 4.0, targets, modules_to_save=[HEADS[kind]])
        for rank, targets in zip((2, 4, 3), TARGETS[kind], strict=True)
    ]

    def build(chosen: list[AdapterSpec], numbers: list[int]) -> tuple[Any, Bank]:
        model = classifier(transformers, kind)
        bank = Bank.attach(model, chosen, [generator(i) for i in numbers])
        for place, i in enumerate(numbers):
            fill_factors(bank, place, 20 + i)
            with torch.no_grad():
                for weight in bank.head(place, HEADS[kind]).parameters():
                    weight.copy_(torch.randn(weight.shape, generator=generator(40 + i), dtype=weight.dtype))
        return model, bank

    rows = [2, -1, 0, 1, 2]
    model, bank = build(specs, [0, 1, 2])
    bank.select(rows)
    mixed = model(words).logits
    mixed.square().sum().backward()
    bank.share_gradients()
    for i in range(-1, 3):
        chosen = [k for k, row in enumerate(rows) if row == i]
        if i < 0:
            expected = classifier(transformers, kind)(words[chosen]).logits
        else:
            single, other = build([specs[i]], [i])
            expected = single(words[chosen]).logits
            expected.square().sum().backward()
            head, wanted = bank.head(i, HEADS[kind]), other.head(0, HEADS[kind])
            torch.testing.assert_close(head.weight.grad, wanted.weight.grad, rtol=1e-9, atol=1e-9)
            for name, pair in gradients(other, 0).items():
                for mine, theirs in zip(gradients(bank, i)[name], pair, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mixed[chosen], expected, rtol=1e-10, atol=1e-10)
