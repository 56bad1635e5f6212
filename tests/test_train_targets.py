"""Shorthands for targets on models of transformers, and how many parameters they come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from rankscope.errors import ConfigError
from rankscope.lora import AdapterSpec, Bank
from rankscope.lora.targets import find_targets
from rankscope.train.docs import embedded_base_folder
from rankscope.train.llama import load_llama
from rankscope.train.target_roles import expand_targets, parameters_per_rank

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
BERT: dict[str, Any] = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 16}


def hub(name: str) -> Any:
    t = pytest.importorskip("transformers")
    makers: dict[str, Callable[[], Any]] = {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**BERT)),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**BERT)),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=16)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)),
        "t5": lambda: t.T5Model(t.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)),
        "neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(intermediate_size=24, **SIZES)),
    }
    return makers[name]()


def model_of(name: str) -> nn.Module:
    return load_llama(embedded_base_folder()) if name == "llama" else hub(name)


def picked(model: nn.Module, targets: str | Sequence[str]) -> set[str]:
    return set(find_targets(model, AdapterSpec(rank=1, alpha=1.0, targets=targets)))


def layers(pattern: str, ends: str, count: int = 2) -> set[str]:
    return {pattern.format(i) + end for i in range(count) for end in ends.split()}


BLOCK = {
    "llama": "model.layers.{}.",
    "bert": "bert.encoder.layer.{}.",
    "roberta": "roberta.encoder.layer.{}.",
    "distilbert": "distilbert.transformer.layer.{}.",
    "gpt2": "transformer.h.{}.",
    "neox": "gpt_neox.layers.{}.",
}
# Modules of each role in a block, as the modelling code of each architecture names them.
PLACES = {
    "llama": {
        **{role: f"self_attn.{role}_proj" for role in "qkvo"},
        "mlp": "mlp.gate_proj mlp.up_proj mlp.down_proj",
    },
    "bert": {
        **{"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"},
        **{"o": "attention.output.dense", "mlp": "intermediate.dense output.dense"},
    },
    "distilbert": {
        **{"q": "attention.q_lin", "k": "attention.k_lin", "v": "attention.v_lin"},
        **{"o": "attention.out_lin", "mlp": "ffn.lin1 ffn.lin2"},
    },
    "gpt2": {"q,k,v": "attn.c_attn", "o": "attn.c_proj", "mlp": "mlp.c_fc mlp.c_proj"},
    "neox": {
        **{"q,k,v": "attention.query_key_value", "o": "attention.dense"},
        **{"mlp": "mlp.dense_h_to_4h mlp.dense_4h_to_h"},
    },
}
PLACES["roberta"] = PLACES["bert"]


@pytest.mark.parametrize("name", PLACES)
def test_roles_are_the_matrices_that_have_them(name: str) -> None:
    model, count = model_of(name), 4 if name == "llama" else 2
    expected = {role: layers(BLOCK[name], ends, count) for role, ends in PLACES[name].items()}
    for role, paths in expected.items():
        assert picked(model, expand_targets(model, role)) == paths, role
    attention = set().union(*(paths for role, paths in expected.items() if role != "mlp"))
    assert picked(model, expand_targets(model, "attention")) == attention
    assert picked(model, expand_targets(model, "attention, mlp")) == attention | expected["mlp"]
    assert picked(model, expand_targets(model, "o,q,v,k")) == attention
    if "q" in expected:
        assert picked(model, expand_targets(model, "q,v")) == expected["q"] | expected["v"]


def test_names_are_as_short_as_they_can_be() -> None:
    llama, bert = model_of("llama"), hub("bert")
    assert expand_targets(llama, "q,v") == ("q_proj", "v_proj")
    assert expand_targets(llama, "mlp") == ("gate_proj", "up_proj", "down_proj")
    # BERT's attention has an output.dense too: the layer's own has to be told apart by its number.
    assert expand_targets(bert, "mlp") == ("intermediate.dense", "0.output.dense", "1.output.dense")


def test_all_names_and_expressions() -> None:
    llama = model_of("llama")
    assert expand_targets(llama, "all") == expand_targets(llama, "all-linear") == "all-linear"
    assert expand_targets(llama, "q_proj") == ("q_proj",)
    assert expand_targets(llama, "q_proj, layers.0.mlp.up_proj") == ("q_proj", "layers.0.mlp.up_proj")
    assert expand_targets(llama, "down_proj,q") == ("down_proj", "q_proj")
    for expression in (r".*\.(q|v)_proj", r"model\.layers\.[0-1]\..*", ".*[qv]_proj", r".*\.\d{1,2}\.mlp\.up_proj"):
        assert expand_targets(llama, expression) == expression
    assert picked(llama, expand_targets(llama, ".*[qv]_proj")) == picked(llama, expand_targets(llama, "q,v"))


def test_a_layer_of_that_very_name_comes_first() -> None:
    """T5 calls its matrices q, k, v and o, and a matrix of its feed-forward part wo, which elsewhere is attention's."""
    assert expand_targets(nn.ModuleDict({"mlp": nn.Linear(2, 2)}), "mlp") == ("mlp",)
    model = hub("t5")
    assert expand_targets(model, "q,o") == ("q", "o")
    own = picked(model, ("q", "k", "v", "o"))
    assert len(own) == 4 * 3  # encoder, decoder, and what looks from one to the other
    assert picked(model, expand_targets(model, "attention")) == own
    assert {path.rpartition(".")[2] for path in picked(model, expand_targets(model, "mlp"))} == {"wi", "wo"}


@pytest.mark.parametrize(("name", "fused"), [("gpt2", "c_attn"), ("neox", "query_key_value")])
@pytest.mark.parametrize("entry", ["q", "q,v", "k,o"])
def test_a_part_of_a_fused_matrix_is_refused(name: str, fused: str, entry: str) -> None:
    message = rf"target '[kq]': {fused} is q, k and v at once in this model; ask for q,k,v, or for {fused}"
    with pytest.raises(ConfigError, match=message):
        expand_targets(hub(name), entry)


def test_roles_that_nothing_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="target 'mlp': no layer of this model is known to have that role; it has up"):
        expand_targets(nn.ModuleDict({"up": nn.Linear(2, 2)}), "mlp")
    with pytest.raises(ConfigError, match="target 'attention'"):
        expand_targets(nn.ModuleDict({"h": nn.ModuleList([nn.Linear(2, 2)])}), "attention")


def test_heads_are_not_in_a_block() -> None:
    """RoBERTa's head has an out_proj, and a dense that is no output of attention."""
    model = hub("roberta")
    everything = picked(model, expand_targets(model, "attention,mlp"))
    assert not any(path.startswith("classifier") for path in everything)
    assert everything == {path for path in picked(model, "all-linear") if not path.startswith("classifier")}


class Mixed(nn.Module):
    """One of each kind that adapters go to."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.conv = nn.Conv2d(6, 8, (3, 2), groups=2)
        self.plain = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(10, 2)


def trained(model: nn.Module, rank: int, targets: Any, heads: Sequence[str] = ()) -> int:
    spec = AdapterSpec(rank, 1.0, targets, modules_to_save=tuple(heads))
    bank = Bank.attach(model, spec, torch.Generator().manual_seed(0))
    return sum(A.numel() + B.numel() for A, B in bank.factors(0).values())


def test_parameters_of_a_rank_are_those_of_an_adapter() -> None:
    targets = ("emb", "up", "conv", "plain")
    # A (r, in) and B (out, r); the grouped convolution's A reads all 6 channels and its B has r / 2 columns.
    expected = (11 + 6) + (6 + 10) + (6 * 3 * 2 + 8 // 2) + (3 * 3 * 3 + 5)
    assert parameters_per_rank(Mixed(), targets) == expected
    assert 4 * expected == trained(Mixed(), 4, targets)
    assert parameters_per_rank(Mixed(), ("up",)) == 6 + 10


@pytest.mark.parametrize("name", PLACES)
def test_parameters_of_a_rank_on_real_architectures(name: str) -> None:
    model = model_of(name)
    targets = expand_targets(model, "all")
    assert 3 * parameters_per_rank(model, targets) == trained(model, 3, targets)


def test_heads_do_not_count() -> None:
    model = hub("bert")
    count = parameters_per_rank(model, "all-linear", ("classifier",))
    assert parameters_per_rank(model, "all-linear") - count == 16 + 2
    assert 2 * count == trained(model, 2, "all-linear", ("classifier",))
    with pytest.raises(ConfigError, match="'nothing' matches no module"):
        parameters_per_rank(hub("bert"), ("nothing",))
