"""Specs, the modules they pick, and everything that is refused, with what the message says."""

import pytest
import torch
from bank_makers import make_net
from makers import generator
from torch import nn

from rankscope.errors import ConfigError, ShapeError
from rankscope.lora import AdapterSpec, Bank


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is a whole number"),
        ({"rank": 2.0}, "rank is a whole number"),
        ({"rank": True}, "rank is a whole number"),
        ({"rank_pattern": {"up": 0}}, "rank is a whole number"),
        ({"alpha": float("nan")}, "alpha is a finite number"),
        ({"alpha": "8"}, "alpha is a finite number"),
        ({"alpha_pattern": {"up": None}}, "alpha is a finite number"),
        ({"dropout": 1.0}, r"\[0, 1\)"),
        ({"dropout": -0.1}, r"\[0, 1\)"),
        ({"dropout": "x"}, r"\[0, 1\)"),
        ({"init": "olora"}, "init is one of kaiming, gaussian, pissa"),
        ({"init": "pissa", "alpha": 0}, "alpha must be positive, not 0"),
        ({"init": "pissa", "alpha_pattern": {"up": -1.0}}, "alpha must be positive, not -1.0"),
        ({"bias": "some"}, "bias is one of none, lora_only, all"),
        ({"targets": []}, "hold names"),
        ({"targets": [""]}, "hold names"),
        ({"targets": [3]}, "hold names"),
        ({"targets": "("}, "not a regular expression"),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"modules_to_save": "out"}, r"write \('out',\)"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterSpec(**{"rank": 2, "alpha": 4.0, "targets": ["up"], **settings})


def test_patterns_match_the_end_of_a_path_and_the_first_one_counts() -> None:
    spec = AdapterSpec(
        2, 8.0, ["x"], rank_pattern={"up": 4, "^b.up": 3, "b\\..*": 5, "^a": 6}, alpha_pattern={"a|b": 1}
    )
    ranks = {"up": 4, "b.up": 4, "b.b.up": 4, "cup": 2, "up.x": 2, "b.x": 5, "a": 6, "b.a": 5, "c.a": 2}
    assert {path: spec.slot(path).rank for path in ranks} == ranks
    scales = {"up": 8 / 4, "a": 1 / 6, "c.a": 1 / 2, "cup": 8 / 2}
    assert {path: spec.slot(path).scale for path in scales} == scales
    assert spec.scale == 4.0


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["up"], ["up"]),
        (["0", "out"], ["block.0", "out"]),
        (["block.2"], ["block.2"]),
        (r"block\.[02]|up", ["up", "block.0", "block.2"]),
        ("all-linear", ["up", "block.0", "block.2", "out"]),
    ],
)
def test_targets_by_name_by_expression_and_all_linear(targets: object, found: list[str]) -> None:
    net = make_net()
    bank = Bank.attach(net, AdapterSpec(2, 4.0, targets), generator(0))
    assert list(bank.layers) == found


def test_all_linear_leaves_out_the_output_layer_and_whole_modules() -> None:
    net = make_net()
    net.get_output_embeddings = lambda: net.out
    bank = Bank.attach(net, AdapterSpec(2, 4.0, "all-linear", modules_to_save=["block"]), generator(0))
    assert list(bank.layers) == ["up"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AdapterSpec(2, 4.0, ["q_proj"]), r"'q_proj' matches no module of the model; it has emb, conv, up, 0, 2, out"),
        (AdapterSpec(2, 4.0, ["up", "wrong"]), "'wrong' matches no module"),
        (AdapterSpec(2, 4.0, "u"), "'u' matches no module"),
        (AdapterSpec(2, 4.0, ["p"]), "'p' matches no module"),
        (AdapterSpec(2, 4.0, ["norm"]), "target 'norm' is a LayerNorm; adapters go to Linear"),
        (AdapterSpec(2, 4.0, ["block"]), "target 'block' is a Sequential"),
        (AdapterSpec(3, 4.0, ["conv"]), "2 groups, which do not divide the rank 3"),
        (AdapterSpec(2, 4.0, ["up"], modules_to_save=["head"]), "modules_to_save entry 'head' matches no module"),
        (AdapterSpec(2, 4.0, ["up"], modules_to_save=["up"]), "'up' matches no module"),
    ],
)
def test_a_target_that_cannot_be_is_refused_and_nothing_changes(spec: AdapterSpec, message: str) -> None:
    net = make_net()
    with pytest.raises(ConfigError, match=message):
        Bank.attach(net, spec, generator(0))
    assert type(net.up) is nn.Linear
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_layers_that_would_bypass_the_adapter_are_refused() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ConfigError, match="MultiheadAttention, which reads the weight"):
        Bank.attach(encoder, AdapterSpec(2, 4.0, ["out_proj"]), generator(0))
    with pytest.raises(ConfigError, match="fast path"):
        Bank.attach(encoder, AdapterSpec(2, 4.0, ["linear1"]), generator(0))
    for module, message in (
        (nn.LazyLinear(3), "lazy"),
        (nn.Embedding(4, 3, max_norm=1.0), "max_norm"),
    ):
        with pytest.raises(ConfigError, match=message):
            Bank.attach(nn.Sequential(module), AdapterSpec(2, 4.0, ["0"]), generator(0))
    with pytest.raises(ConfigError, match="no Linear layer"):
        Bank.attach(nn.Sequential(nn.ReLU()), AdapterSpec(2, 4.0, "all-linear"), generator(0))


def test_banks_that_cannot_be_are_refused() -> None:
    spec = AdapterSpec(2, 4.0, ["up"])
    shared = generator(0)
    for specs, generators, message in (
        ([], [], "at least one adapter"),
        ([spec, spec], [generator(0)], "2 adapters need as many generators"),
        ([spec, spec], [shared, shared], "generators of their own"),
        ([spec, AdapterSpec(2, 4.0, ["up"], bias="all")], [generator(0), generator(1)], "one adapter"),
        (
            [spec, AdapterSpec(2, 4.0, ["up"], modules_to_save=["out"])],
            [generator(0), generator(1)],
            "the same modules",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            Bank.attach(make_net(), specs, generators)
    net = make_net()
    Bank.attach(net, spec, generator(0))
    with pytest.raises(ConfigError, match="adapters already"):
        Bank.attach(net, spec, generator(0))


def test_what_cannot_be_done_now_says_why() -> None:
    net = make_net()
    spec = AdapterSpec(2, 4.0, ["up"])
    bank = Bank.attach(net, [spec, spec, spec], [generator(i) for i in range(3)])
    for action, message in (
        (bank.unmerge, "no adapter is merged"),
        (lambda: bank.switch(1), "no adapter is merged; use merge"),
        (lambda: bank.merge(3), "there is no adapter 3; there are 3"),
        (lambda: bank.select(-1), "there is no adapter -1"),
        (lambda: bank.updates(3), "there is no adapter 3"),
        (lambda: bank.factors(-1), "there is no adapter -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            action()
    bank.select(None)
    with pytest.raises(ShapeError, match="4 rows cannot be split into equal chunks for 3"):
        net(torch.zeros(4, 6, dtype=torch.long))
    bank.merge(1)
    for action, message in (
        (lambda: bank.merge(0), "adapter 1 is merged already; use switch"),
        (lambda: bank.select(0), "use switch"),
    ):
        with pytest.raises(ConfigError, match=message):
            action()
