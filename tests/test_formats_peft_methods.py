"""Adapters of every method that PEFT saved: what is read equals PEFT's merged weight minus its base."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import PREFIX, linear, normal, write_adapter, write_checkpoint
from peft_models import LINEAR, Saved, Tiny, check_equal, import_peft, two
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankscope.errors import ConfigError, FormatError
from rankscope.formats import store as formats
from rankscope.formats.peft_lora import PeftStore
from rankscope.formats.peft_methods import METHODS, UNSUPPORTED_METHODS
from rankscope.updates import Dense, LowRank


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield


@pytest.fixture(scope="session")
def peft():
    return import_peft()


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers(peft, tmp_path, name):
    config, kind, needs_base = LINEAR[name]
    saved = Saved(peft, tmp_path, name.split(",")[0], two(), target_modules=["q", "k"], **config)
    store = saved.check("block.q", "block.k")
    assert store.names() == ["block.k", "block.q"]
    assert store.kind == "peft"
    assert isinstance(store["block.q"], kind)
    assert store.info("block.q").method == name.split(",")[0].lower()
    assert torch.equal(store.weight("block.k"), saved.base["block.k.weight"])
    if needs_base:
        with pytest.raises(FormatError, match=r"no layer of .* that can be read; skipped block\.k: .*--base"):
            formats.open(saved.folder)
    else:
        saved.check("block.q", "block.k", base=False)


def test_every_method_that_is_read_is_tried() -> None:
    assert {name.split(",")[0] for name in LINEAR} == set(METHODS) - {"TRAINABLE_TOKENS"}


def test_every_method_of_peft_is_read_or_refused_with_a_reason(peft):
    known = {kind.value for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING}
    assert known - {"LORA"} <= set(METHODS) | set(UNSUPPORTED_METHODS)
    assert not set(METHODS) & set(UNSUPPORTED_METHODS)


@pytest.mark.parametrize("method", UNSUPPORTED_METHODS)
def test_a_method_that_is_not_read_says_why(tmp_path, method):
    with pytest.raises(FormatError, match=rf"adapter_config\.json: peft_type {method} is not read: [a-z(]"):
        formats.open(write_adapter(tmp_path / "a", peft_type=method))


CONVOLUTIONS = {
    "LOHA": {},
    "LOHA, core": {"use_effective_conv2d": True},
    "LOKR": {},
    "LOKR, core": {"use_effective_conv2d": True},
    "LOKR, both factored": {"decompose_both": True, "decompose_factor": 8},
    "LOKR, whole": {"r": 8},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(8, 16, 3),
        lambda: nn.Conv2d(8, 16, (1, 1)),
        lambda: nn.Conv2d(8, 16, (3, 2), groups=2),
        lambda: nn.Conv1d(8, 16, 3),
    ],
    ids=["3 × 3", "1 × 1", "grouped", "one-dimensional"],
)
def test_convolutions_of_lycoris_methods(peft, tmp_path, name, layer):
    if name == "LOKR, core" and isinstance(layer(), nn.Conv1d):
        pytest.skip("PEFT's own product fails there (torch.kron of a transposed tensor)")
    config = {"r": 1, "alpha": 3, **CONVOLUTIONS[name]}
    saved = Saved(peft, tmp_path, name.split(",")[0], Tiny(conv=layer()), target_modules=["conv"], **config)
    store = saved.check("block.conv")
    assert store.info("block.conv").scale == 3 / config["r"]
    saved.check("block.conv", base=False)


def test_a_whole_kernel_of_conv1d_is_read_as_peft_computes_it(peft, tmp_path):
    """torch.kron aligns the last dimensions, so PEFT's entries are in another order than those of w1 ⊗ w2."""
    saved = Saved(peft, tmp_path, "LOKR", Tiny(conv=nn.Conv1d(8, 16, 3)), r=8, alpha=3, target_modules=["conv"])
    tensors = load_file(saved.folder / "adapter_model.safetensors")
    w1, w2 = (tensors[f"{PREFIX}block.conv.lokr_w{i}"] for i in (1, 2))
    update = formats.open(saved.folder)["block.conv"]
    assert isinstance(update, Dense)
    assert not torch.allclose(update.dense(), torch.kron(w1, w2.flatten(1)) * 3 / 8)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("ADALORA", {"init_r": 3, "target_r": 2, "total_step": 10}),
        ("HRA", {"r": 3}),
        ("IA3", {"feedforward_modules": []}),
        ("OFT", {"r": 0, "oft_block_size": 6, "use_cayley_neumann": False}),
    ],
)
def test_convolutions_of_other_methods(peft, tmp_path, method, config):
    saved = Saved(peft, tmp_path, method, Tiny(conv=nn.Conv2d(4, 6, 3)), target_modules=["conv"], **config)
    saved.check("block.conv")


@pytest.mark.parametrize(
    ("method", "layer"), [("IA3", lambda: nn.Conv2d(4, 6, 3)), ("HIRA", lambda: nn.Conv2d(4, 6, 3))]
)
def test_convolutions_that_are_listed(peft, tmp_path, method, layer):
    model = Tiny(conv=layer(), q=nn.Linear(5, 7))
    config = {"feedforward_modules": ["conv"]} if method == "IA3" else {"r": 2}
    saved = Saved(peft, tmp_path, method, model, target_modules=["conv", "q"], **config)
    store = saved.check("block.q")
    assert store.names() == ["block.q"]
    assert [skip.name for skip in store.skipped] == ["block.conv"]
    assert "convolution is not read" in store.skipped[0].reason


def test_hira_of_an_embedding(peft, tmp_path):
    saved = Saved(peft, tmp_path, "HIRA", Tiny(emb=nn.Embedding(11, 6)), r=2, target_modules=["emb"])
    saved.check("block.emb")


CONV1D = {
    "ADALORA": {"init_r": 3, "target_r": 2, "total_step": 10},
    "VERA": {"r": 5},
    "PVERA": {"r": 5},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "RANDLORA": {"r": 3},
    "VBLORA": {"r": 2, "num_vectors": 9, "vector_length": 4, "topk": 3},
    "FOURIERFT": {"n_frequency": 7},
    "HIRA": {"r": 3},
    "IA3": {"feedforward_modules": []},
    "DEFT": {"r": 3},
}


@pytest.mark.parametrize("method", CONV1D)
@pytest.mark.parametrize(("name", "out"), [("c_fc", 24), ("c_proj", 24), ("c_proj", 8)])
def test_conv1d_of_gpt2_keeps_the_orientation_out_in(peft, tmp_path, method, name, out):
    """c_fc always widens, so its shape tells how it is stored; for c_proj alone the configuration has to."""
    model = Tiny(**{name: peft.Conv1D(out, 8)})
    saved = Saved(peft, tmp_path, method, model, target_modules=[name], fan_in_fan_out=True, **CONV1D[method])
    store = saved.check(f"block.{name}", turned=True)
    assert torch.equal(store.weight(f"block.{name}"), saved.base[f"block.{name}.weight"].T)


@pytest.mark.parametrize("method", ["LOHA", "LOKR"])
def test_patterns(peft, tmp_path, method):
    layers = {name: nn.Linear(16, 16) for name in ("q", "k", "v", "o")}
    saved = Saved(
        peft,
        tmp_path,
        method,
        Tiny(**layers),
        r=8,  # a LoKr of whole factors, of which the configuration alone knows r
        alpha=6,
        target_modules=list(layers),
        rank_pattern={"(k|q)": 1, "^block.v": 16, "bloc.o": 7},
        alpha_pattern={"block.k": 9, "k|q": 11, "v": 2},
    )
    store = saved.check(*(f"block.{name}" for name in layers))
    assert [store.info(f"block.{name}").scale for name in "qkvo"] == pytest.approx([11, 9, 2 / 16, 6 / 8])


def test_a_pruned_adalora_keeps_the_scale_of_its_initial_rank(peft, tmp_path):
    """PEFT loads a pruned adapter with the rank number from before: α/init_r, not α over what is left."""
    model = Tiny(q=nn.Linear(12, 8), k=nn.Linear(8, 24), v=nn.Linear(8, 8))
    config = {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 7, "target_modules": ["q", "k", "v"]}
    saved = Saved(peft, tmp_path, "ADALORA", model, **config)
    kept = {"q": [True, False, False, True], "k": [False, True, True, True], "v": [False] * 4}
    saved.model.peft_config["default"].rank_pattern = {f"block.{name}.lora_E": rows for name, rows in kept.items()}
    saved.save()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes the empty factors for a damaged file
        saved.model = peft.PeftModel.from_pretrained(model, saved.folder)
    store = saved.check("block.q", "block.k")
    assert [store.info(f"block.{name}").nominal_rank for name in "qk"] == [2, 3]
    assert store.info("block.q").scale == pytest.approx(7 / 4, rel=1e-5)
    assert [(skip.name, "rank 0" in skip.reason) for skip in store.skipped] == [("block.v", True)]


def test_shared_projections_are_told_of(peft, tmp_path):
    saved = Saved(peft, tmp_path, "VERA", two(), r=5, target_modules=["q", "k"])
    (note,) = formats.open(saved.folder, base=saved.base_file).notes
    assert "by construction" in note
    other = Saved(peft, tmp_path / "b", "VERA", two(), r=5, target_modules=["q", "k"], save_projection=False)
    with pytest.raises(FormatError, match=r"vera_A and vera_B, shared by all layers.*save_projection=True"):
        formats.open(other.folder, base=saved.base_file)


def test_structured_updates_say_what_their_rank_means(peft, tmp_path):
    for method, rank in (("LOHA", 9), ("LOKR", 3 * 3)):
        config = dict(r=3, alpha=3, **({} if method == "LOHA" else {"decompose_both": True}))
        model = Tiny(q=nn.Linear(64, 100))
        saved = Saved(peft, tmp_path / method, method, model, target_modules=["q"], **config)
        store = saved.check("block.q")
        assert store.info("block.q").nominal_rank == rank
        assert "nominal rank" in store.notes[0]
        assert np.linalg.matrix_rank(store["block.q"].dense().double().numpy(), tol=1e-4) == rank


def test_live_keys_with_adapter_names(peft, tmp_path):
    for method, config in (("LOHA", {"r": 2}), ("VERA", {"r": 5})):
        saved = Saved(peft, tmp_path / method, method, two(), target_modules=["q", "k"], **config)
        expected = formats.open(saved.folder, base=saved.base_file)
        state = {n: v.clone() for n, v in saved.model.state_dict().items() if "hada_" in n or "vera_" in n}
        assert any(".default" in name for name in state)
        live = tmp_path / f"live-{method}"
        shutil.copytree(saved.folder, live)
        save_file(state, live / "adapter_model.safetensors")
        found = formats.open(live, base=saved.base_file)
        assert found.names() == expected.names() == ["block.k", "block.q"]
        for name in expected:
            assert torch.equal(found[name].dense(), expected[name].dense())


# What an adapter holds besides factors


class Vocabulary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.q = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 4)
        self.new = nn.Linear(5, 3)


def test_modules_saved_whole_are_updates_where_the_base_has_them(peft, tmp_path):
    saved = Saved(
        peft, tmp_path, "LORA", Vocabulary(), r=2, target_modules=["q"], modules_to_save=["head", "new", "norm"]
    )
    del saved.base["new.weight"]
    saved.base["new.bias"] = saved.base["new.bias"][:3]
    save_file(saved.base, saved.base_file)
    store = formats.open(saved.folder, base=saved.base_file)
    merged = saved.merged()
    assert store.names() == ["head", "q"]
    check_equal(store, "head", merged["head.weight"])
    check_equal(store, "q", merged["q.weight"])
    assert (store.info("head").method, store.info("head").nominal_rank) == ("full", None)
    assert torch.equal(store.weight("head"), saved.base["head.weight"])
    reasons = {skip.name: skip.reason for skip in store.skipped}
    assert "the base has no new.weight" in reasons["new.weight"]
    assert "one-dimensional" in reasons["norm.weight"]
    assert {skip.name for skip in formats.open(saved.folder).skipped} >= {"head.weight", "new.weight", "norm.weight"}
    listed = {skip.name: skip.reason for skip in formats.open(saved.folder).skipped}
    assert "--base" in listed["head.weight"]


def test_conv1d_saved_whole_keeps_the_orientation_out_in(peft, tmp_path):
    model = Tiny(q=nn.Linear(6, 5), c_fc=peft.Conv1D(24, 8), c_proj=peft.Conv1D(8, 24))
    saved = Saved(peft, tmp_path, "LORA", model, r=2, target_modules=["q"], modules_to_save=["c_fc", "c_proj"])
    saved.check("block.c_fc", "block.c_proj", turned=True)


def test_a_whole_embedding_of_another_size_is_compared_on_the_common_rows(tmp_path):
    tuned, base = normal(9, 4), normal(7, 4, seed=1)
    folder = write_adapter(tmp_path / "a", {**linear("q"), f"{PREFIX}embed_tokens.weight": tuned})
    origin = write_checkpoint(tmp_path / "base.safetensors", {"embed_tokens.weight": base, "q.weight": normal(5, 7)})
    store = formats.open(folder, base=origin)
    assert torch.equal(store["embed_tokens"].dense(), tuned[:7] - base)
    assert store.info("embed_tokens").shape == (7, 4)
    assert any("9 rows, 7 in the base" in note for note in store.notes)
    write_checkpoint(origin, {"embed_tokens.weight": normal(7, 5), "q.weight": normal(5, 7)})
    (skip,) = formats.open(folder, base=origin).skipped
    assert "its shape is (9, 4), that in the base (7, 5)" in skip.reason


def test_tied_layers_are_told_of(peft, tmp_path):
    """PEFT saves the shared factors under both layers' names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=30, tie_word_embeddings=True))
        targets = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "init_lora_weights": False}
        peft.get_peft_model(model, peft.LoraConfig(r=2, **targets)).save_pretrained(tmp_path)
    store = formats.open(tmp_path)
    assert store.names() == ["lm_head", "model.embed_tokens"]
    assert torch.allclose(store["lm_head"].dense(), store["model.embed_tokens"].dense(), atol=1e-6)
    (note,) = store.notes
    assert "share one update" in note


@pytest.mark.parametrize("method", ["LORA", "TRAINABLE_TOKENS"])
def test_trained_token_rows_are_a_product_with_their_places(peft, tmp_path, method):
    if method == "LORA":
        config = {"r": 2, "target_modules": ["q"], "trainable_token_indices": {"embed": [8, 1, 3]}}
    else:
        config = {"target_modules": ["embed"], "token_indices": [8, 1, 3]}
    saved = Saved(peft, tmp_path, method, Vocabulary(), **config)
    store = formats.open(saved.folder, base=saved.base_file)
    check_equal(store, "embed", saved.merged()["embed.weight"])
    update = store["embed"]
    assert isinstance(update, LowRank)
    assert (update.nominal_rank, store.info("embed").method) == (3, "tokens")
    path = saved.folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for places, reason in (
        ([8, 1], "does not tell which rows"),
        ([8, 1, 30], "none for 30"),
        ([1, 1, 2], "which rows"),
    ):
        key = "trainable_token_indices" if method == "LORA" else "token_indices"
        path.write_text(json.dumps({**config, key: {"embed": places} if method == "LORA" else places}))
        if method == "LORA":
            (skip,) = formats.open(saved.folder, base=saved.base_file).skipped
            assert reason in skip.reason
        else:
            with pytest.raises(FormatError, match=reason):
                formats.open(saved.folder, base=saved.base_file)


# Stacked experts


class Experts(nn.Module):
    def __init__(self, transposed: bool, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.is_transposed = transposed
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return x


SHAPES = {"up": (3, 6, 4), "down": (3, 4, 5)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", [("up", "down"), ("down", "up")])
def test_stacked_experts(peft, tmp_path, transposed, order):
    """The nesting follows the order in the module, which the file does not tell: the base's shapes have to."""
    experts = Experts(transposed, **{name: SHAPES[name] for name in order})
    saved = Saved(
        peft,
        tmp_path,
        "LORA",
        Tiny(q=nn.Linear(7, 5), experts=experts),
        r=2,
        lora_alpha=6,
        target_modules=["q"],
        target_parameters=["experts.up", "experts.down"],
        rank_pattern={"experts.up": 4},
        alpha_pattern={"experts.down": 10},
    )
    store = formats.open(saved.folder, base=saved.base_file)
    assert store.names() == [*(f"block.experts.{name}[{e}]" for name in ("down", "up") for e in range(3)), "block.q"]
    merged = saved.merged()
    for name, rank, scale in (("up", 4, 1.5), ("down", 2, 5.0)):
        for e in range(3):
            part = f"block.experts.{name}[{e}]"
            truth, base = (tensors[f"block.experts.{name}"][e] for tensors in (merged, saved.base))
            check_equal(store, part, truth.T if transposed else truth)
            assert torch.equal(store.weight(part), base.T if transposed else base)
            assert (store.info(part).nominal_rank, store.info(part).scale) == (rank, scale)
    listed = {skip.name: skip.reason for skip in formats.open(saved.folder).skipped}
    assert set(listed) == {"block.experts", "block.experts.base_layer"}
    assert all("with --base the shapes tell" in reason for reason in listed.values())


def test_one_stack_of_experts_needs_no_base(peft, tmp_path):
    saved = Saved(
        peft,
        tmp_path,
        "LORA",
        Tiny(q=nn.Linear(7, 5), experts=Experts(False, **SHAPES)),
        r=2,
        lora_alpha=6,
        target_modules=["q"],
        target_parameters=["experts.down"],
    )
    store = formats.open(saved.folder)
    merged = saved.merged()["block.experts.down"]
    for e in range(3):
        check_equal(store, f"block.experts.down[{e}]", merged[e])
    path = saved.folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 4}))
    with pytest.raises(FormatError, match=r"layer block\.experts: A \(6, 5\) does not divide into experts of rank 4"):
        formats.open(saved.folder)


def test_experts_of_one_shape_cannot_be_told_apart(peft, tmp_path):
    experts = Experts(False, up=(3, 6, 4), gate=(3, 6, 4))
    saved = Saved(
        peft,
        tmp_path,
        "LORA",
        Tiny(q=nn.Linear(7, 5), experts=experts),
        r=2,
        target_modules=["q"],
        target_parameters=["experts.up", "experts.gate"],
    )
    store = formats.open(saved.folder, base=saved.base_file)
    assert store.names() == ["block.q"]
    assert all("nothing tells whose" in skip.reason for skip in store.skipped)


# Initialisations that move the base


def moved(peft, folder: Path, init: str, places: str | None) -> tuple[Saved, dict[str, Tensor]]:
    """A trained adapter with its initial one beside it, and trained − original by PEFT."""
    model = two()
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=init, target_modules=["q", "k"])
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        if places is not None:
            adapted.save_pretrained(folder / places)
        for _, value in adapted.named_parameters():
            if value.requires_grad:
                value.data += 0.3 * torch.randn_like(value)
        adapted.save_pretrained(folder / "adapter")
        tuned = copy.deepcopy(adapted).merge_and_unload().state_dict()
    return adapted, {name: tuned[name] - value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("place", ["adapter/initial", "initial", "pissa_init", "somewhere/else"])
def test_the_initial_adapter_is_subtracted(peft, tmp_path, init, place):
    _, learned = moved(peft, tmp_path, init, place)
    named = place == "somewhere/else"
    store = formats.open(tmp_path / "adapter", initial=tmp_path / place if named else None)
    for module in ("block.q", "block.k"):
        check_equal(store, module, learned[f"{module}.weight"], 1e-4)
        assert store.info(module).nominal_rank == 6
    (note,) = store.notes
    assert init in note
    assert "B₀·A₀" in note
    assert str(tmp_path / place) in note


def test_without_the_initial_adapter_the_product_is_not_what_was_learned(peft, tmp_path):
    _, learned = moved(peft, tmp_path, "pissa", None)
    store = formats.open(tmp_path / "adapter")
    assert store.info("block.q").nominal_rank == 3
    assert not torch.allclose(store["block.q"].dense(), learned["block.q.weight"], atol=0.1)
    (note,) = store.notes
    assert "is not the learned update" in note
    assert "initial" in note


def test_an_initial_adapter_that_does_not_fit(peft, tmp_path):
    moved(peft, tmp_path, "pissa", "initial")
    other = write_adapter(tmp_path / "other", linear("block.q", 8, 12))
    with pytest.raises(FormatError, match=r"layer block\.k: the initial adapter .*other has no factors for it"):
        formats.open(tmp_path / "adapter", initial=other)
    checkpoint = write_checkpoint(tmp_path / "c.safetensors", {"q.weight": normal(3, 3)})
    with pytest.raises(ConfigError, match="is no LoRA adapter"):
        formats.open(checkpoint, base=checkpoint, initial=other)


def test_a_plain_start_is_not_subtracted(tmp_path):
    """Beside our own runs lies ``initial/`` too, but plain LoRA starts from a zero update."""
    folder = write_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "initial", linear("block.q", seed=4))
    store = formats.open(folder)
    assert isinstance(store, PeftStore)
    assert store.notes == []
    assert store.info("block.q").nominal_rank == 2
