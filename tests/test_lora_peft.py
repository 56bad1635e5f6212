"""Against PEFT: the same numbers layer by layer, and adapters that go both ways through files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankscope.errors import FormatError, ShapeError
from rankscope.lora import AdapterSpec, Bank, load

# float32 sums of some tens of products, in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


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


class Mixed(nn.Module):
    """A layer of each kind, applied one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 8, padding_idx=0)
        self.conv = nn.Conv2d(2, 4, 3, stride=(1, 2), padding=1)
        self.grouped = nn.Conv2d(4, 4, (3, 2), groups=2, padding=(1, 0))
        self.up = nn.Linear(4 * 6 * 1, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens).reshape(len(tokens), 2, 6, 4)
        x = self.grouped(torch.relu(self.conv(x))).flatten(1)
        return self.head(torch.tanh(self.norm(self.up(x))))


def mixed() -> Mixed:
    torch.manual_seed(2)
    return Mixed().eval()


ALL = ["emb", "conv", "grouped", "up", "head"]
TOKENS = torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(1))
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": {"up": 2, "emb": 3}, "alpha_pattern": {"head|emb": 5}},
    "dropout": {"r": 4, "lora_alpha": 6, "lora_dropout": 0.4},
    "bias of targets": {"r": 4, "lora_alpha": 6, "bias": "lora_only"},
    "all biases": {"r": 4, "lora_alpha": 6, "bias": "all"},
    "whole head": {"r": 4, "lora_alpha": 6, "target_modules": ALL[:-1], "modules_to_save": ["head"]},
    "all biases and whole head": {"r": 2, "bias": "all", "target_modules": ["up"], "modules_to_save": ["head"]},
    "not needed": {"r": 4, "target_modules": r"up|head", "init_lora_weights": "gaussian"},
}


def of_peft(peft: ModuleType, model: nn.Module, seed: int = 3, **settings: Any) -> Any:
    """PEFT's model with every trainable parameter moved at random."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ALL, **settings}))
    move([p for p in adapted.parameters() if p.requires_grad], seed)
    return adapted.eval()


def move(parameters: list[nn.Parameter], seed: int) -> None:
    source = generator(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=source))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_peft_loads_here(peft: ModuleType, tmp_path: Path, name: str) -> None:
    theirs = of_peft(peft, mixed(), **CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    model = mixed()
    before = model(TOKENS)
    bank = load(model, tmp_path)
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS), **CLOSE)
    assert not torch.allclose(model(TOKENS), before, atol=1e-2)
    counted = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert bank.parameter_count() == counted
    bank.detach()
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_peft(peft: ModuleType, tmp_path: Path, training: bool) -> None:
    theirs = of_peft(peft, mixed(), r=4, lora_alpha=6, use_rslora=True)
    theirs.save_pretrained(tmp_path)
    theirs.train(training)
    model = mixed().train(training)
    bank = load(model, tmp_path)
    for out in (theirs(TOKENS), model(TOKENS)):
        out.square().sum().backward()
    for name in ALL:
        wrapped, layer = theirs.base_model.model.get_submodule(name), bank.layers[name]
        for half in "AB":
            part = getattr(wrapped, f"lora_embedding_{half}" if name == "emb" else f"lora_{half}")["default"]
            wanted = (part if name == "emb" else part.weight).grad
            mine = getattr(layer, half).grad[0].reshape(wanted.shape)
            assert mine.abs().max() > 0
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


SPECS = {
    "plain": AdapterSpec(4, 6.0, ALL),
    "rslora": AdapterSpec(4, 6.5, ALL, rslora=True, init="gaussian", dropout=0.1),
    "patterns": AdapterSpec(4, 6.0, ALL, rank_pattern={"up": 2}, alpha_pattern={"head|emb": 5.0}),
    "bias of targets": AdapterSpec(4, 6.0, ["up", "conv"], bias="lora_only"),
    "all biases and whole head": AdapterSpec(4, 6.0, ["up"], bias="all", modules_to_save=["head"]),
    "whole head": AdapterSpec(4, 6.0, "all-linear", modules_to_save=["head"]),
    "expression": AdapterSpec(4, 6.0, "up|gro.*"),
}


@pytest.mark.parametrize("name", SPECS)
def test_an_adapter_saved_here_loads_in_peft_and_here(peft: ModuleType, tmp_path: Path, name: str) -> None:
    model = mixed()
    bank = Bank.attach(model, SPECS[name], generator())
    move(bank.trainable_parameters(), 4)
    expected = model(TOKENS)
    bank.save(0, tmp_path, base_name="a base", task_type=None)
    theirs = peft.PeftModel.from_pretrained(mixed(), tmp_path).eval()
    torch.testing.assert_close(theirs(TOKENS), expected, **CLOSE)
    assert theirs.peft_config["default"].base_model_name_or_path == "a base"
    again = mixed()
    restored = load(again, tmp_path)
    assert torch.equal(again(TOKENS), expected)
    assert restored.specs[0].init == SPECS[name].init
    assert restored.specs[0].slot("up") == SPECS[name].slot("up")
    assert restored.parameter_count() == bank.parameter_count()
    for path, (A, B) in bank.factors().items():
        assert torch.equal(restored.factors()[path][0], A)
        assert torch.equal(restored.factors()[path][1], B)


def test_each_of_several_adapters_loads_alone_and_together(peft: ModuleType, tmp_path: Path) -> None:
    specs = [SPECS["plain"], SPECS["patterns"], AdapterSpec(8, 3.0, ["up"])]
    model = mixed()
    bank = Bank.attach(model, specs, [generator(i) for i in range(3)])
    outputs = []
    for i in range(3):
        for name, (A, B) in bank.factors(i).items():
            bank.layers[name].set_factors(i, A + 0.2 * i + 0.1, B + 0.1)
        bank.save(i, tmp_path / str(i))
        bank.select(i)
        outputs.append(model(TOKENS))
        theirs = peft.PeftModel.from_pretrained(mixed(), tmp_path / str(i)).eval()
        torch.testing.assert_close(theirs(TOKENS), outputs[i], **CLOSE)
    again = mixed()
    together = load(again, [tmp_path / str(i) for i in range(3)])
    together.select(None)
    torch.testing.assert_close(again(TOKENS.repeat(3, 1)), torch.cat(outputs), **CLOSE)


def test_names_that_end_alike_stay_apart(peft: ModuleType, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))

    model = build()
    bank = Bank.attach(model, AdapterSpec(2, 4.0, r"0|1\.1", rank_pattern={"^0": 3}), generator())
    assert list(bank.layers) == ["0", "1.1"]
    move(bank.trainable_parameters(), 1)
    bank.save(0, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    lora = [name for name, _ in theirs.named_parameters() if "lora_A" in name]
    assert [name.split(".lora_A")[0] for name in lora] == ["base_model.model.0", "base_model.model.1.1"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)
    assert list(load(build(), tmp_path).layers) == ["0", "1.1"]


def tiny(kind: str) -> nn.Module:
    """A model of transformers of a few thousand parameters."""
    import transformers

    torch.manual_seed(3)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config).eval()
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, pad_token_id=0)).eval()


MODELS = {
    "gpt2": (AdapterSpec(2, 4.0, ["c_attn", "c_proj", "wte"]), "CAUSAL_LM"),
    "bert": (AdapterSpec(2, 4.0, ["query", "value"], modules_to_save=["classifier"]), "SEQ_CLS"),
    "llama": (AdapterSpec(4, 4.0, "all-linear", rslora=True), "CAUSAL_LM"),
}
WORDS = torch.tensor([[1, 5, 3, 9], [2, 2, 19, 0]])


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_transformers_both_ways(peft: ModuleType, tmp_path: Path, kind: str) -> None:
    spec, task = MODELS[kind]
    model = tiny(kind)
    plain = model(WORDS).logits
    bank = Bank.attach(model, spec, generator())
    assert torch.equal(model(WORDS).logits, plain)
    move(bank.trainable_parameters(), 4)
    expected = model(WORDS).logits
    assert not torch.allclose(expected, plain, atol=1e-2)

    bank.save(0, tmp_path / "ours", task_type=task)
    theirs = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(WORDS).logits, expected, **CLOSE)

    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny(kind)
    restored = load(again, tmp_path / "theirs")
    torch.testing.assert_close(again(WORDS).logits, expected, **CLOSE)
    restored.merge()
    torch.testing.assert_close(again(WORDS).logits, expected, **CLOSE)
    restored.detach()
    assert torch.equal(again(WORDS).logits, plain)


def test_gpt2_is_marked_as_stored_transposed(peft: ModuleType, tmp_path: Path) -> None:
    bank = Bank.attach(tiny("gpt2"), AdapterSpec(2, 4.0, ["c_attn"]), generator())
    bank.save(0, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert bank.updates()["transformer.h.0.attn.c_attn"].shape == (24, 8)


def test_all_linear_of_a_language_model_leaves_its_output_layer_out(peft: ModuleType) -> None:
    bank = Bank.attach(tiny("llama"), AdapterSpec(2, 4.0, "all-linear"), generator())
    theirs = of_peft(peft, tiny("llama"), r=2, target_modules="all-linear")
    found = {name.split(".lora_A")[0] for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert {f"base_model.model.{name}" for name in bank.layers} == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True, "target_modules": ["up"]}, "use_dora"),
        ({"lora_bias": True, "target_modules": ["up"]}, "lora_bias"),
        ({"init_lora_weights": "pissa", "target_modules": ["up"]}, "pissa changes the base weights"),
    ],
)
def test_what_is_not_plain_lora_is_refused(
    peft: ModuleType, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    of_peft(peft, mixed(), r=2, **settings).save_pretrained(tmp_path)
    model = mixed()
    with pytest.raises(FormatError, match=message):
        load(model, tmp_path)
    assert type(model.up) is nn.Linear


def test_an_adapter_of_another_model_is_refused(peft: ModuleType, tmp_path: Path) -> None:
    of_peft(peft, mixed(), r=2, lora_alpha=4).save_pretrained(tmp_path)
    model = mixed()
    model.up = nn.Linear(24, 10)
    with pytest.raises(ShapeError, match=r"'up', A \(2, 24\) and B \(12, 2\), do not fit .*out_features=10"):
        load(model, tmp_path)
    del model.up
    with pytest.raises(FormatError, match="'up', a module that the model does not have"):
        load(model, tmp_path)


def test_an_adapter_with_another_base_embedding_is_refused(peft: ModuleType, tmp_path: Path) -> None:
    base = tiny("gpt2")
    theirs = of_peft(peft, base, r=2, target_modules=["wte"])
    with torch.no_grad():
        base.transformer.wte.base_layer.weight.mul_(2)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = tiny("gpt2")
    with pytest.raises(FormatError, match=r"another base weight '(transformer.wte|lm_head).weight'"):
        load(model, tmp_path)
    assert all(parameter.requires_grad for parameter in model.parameters())
