"""Adapters that PEFT itself saved: what we read equals PEFT's merged weight minus its base."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from rankscope.errors import FormatError
from rankscope.formats import store as formats
from rankscope.updates import Dense, LowRank

# float32 factors saved by PEFT and multiplied by us in float64: PEFT's own float32 merge is the coarser side.
REL = 1e-5
SIGMA = 2e-5


@pytest.fixture(autouse=True)
def seeded():
    """Layers and PEFT draw from torch's global generator, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


@pytest.fixture(scope="session")
def peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever importing third-party packages warns of
        import peft as module
        from transformers.pytorch_utils import Conv1D

        module.Conv1D = Conv1D
        return module


class Tiny(nn.Module):
    """One named layer, so that names have a path."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleDict(layers)


class Saved:
    """A model adapted by PEFT with random factors, its base, and the folder that PEFT saved."""

    def __init__(self, peft, model: nn.Module, folder: Path, **config) -> None:
        self.base = {name: value.detach().clone() for name, value in model.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(init_lora_weights=False, **config)
            self.model = peft.get_peft_model(copy.deepcopy(model), config)
            for name, value in self.model.named_parameters():  # a magnitude that is not the one it starts from
                if "lora_magnitude_vector" in name:
                    value.data.mul_(1 + 0.3 * torch.rand_like(value))
            self.folder = folder / "adapter"
            self.model.save_pretrained(self.folder)
            self.base_file = folder / "model.safetensors"
            save_file({name: value.contiguous() for name, value in self.base.items()}, self.base_file)

    def merged(self) -> dict[str, Tensor]:
        """merged − base by PEFT, as stored by the model."""
        tuned = copy.deepcopy(self.model).merge_and_unload().state_dict()
        return {name: tuned[name] - value for name, value in self.base.items()}

    def check(self, module: str, of: str | None = None, transpose: bool = False, rel: float = REL) -> None:
        update = formats.open(self.folder, base=self.base_file)[of or module]
        truth = self.merged()[module + ".weight"].flatten(1)
        check_equal(update, truth.T if transpose else truth, rel)


def check_equal(update, truth: Tensor, rel: float = REL) -> None:
    assert update.shape == tuple(truth.shape)
    scale = truth.abs().max()
    assert scale > 0
    torch.testing.assert_close(update.dense(), truth, rtol=0, atol=rel * float(scale))
    sigma = np.linalg.svd(truth.double().numpy(), compute_uv=False)
    ours = update.singular_values().double().numpy()
    np.testing.assert_allclose(ours, sigma[: len(ours)], rtol=0, atol=max(rel, SIGMA) * sigma[0])


def test_linear(peft, tmp_path):
    saved = Saved(peft, Tiny(q=nn.Linear(7, 5)), tmp_path, r=3, lora_alpha=12, target_modules=["q"])
    saved.check("block.q")
    store = formats.open(saved.folder)
    assert store.names() == ["block.q"]
    info = store.info("block.q")
    assert (info.shape, info.nominal_rank, info.scale, info.method) == ((5, 7), 3, 4.0, "lora")
    assert isinstance(store["block.q"], LowRank)
    assert store.notes == []
    assert store.skipped == []


def test_conv1d_of_gpt2_keeps_the_orientation_out_in(peft, tmp_path):
    """transformers' Conv1D stores its weight (in, out); the update is (out, in) all the same."""
    model = Tiny(c_attn=peft.Conv1D(9, 4))  # 4 in, 9 out
    saved = Saved(peft, model, tmp_path, r=2, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True)
    saved.check("block.c_attn", transpose=True)
    assert formats.open(saved.folder)["block.c_attn"].shape == (9, 4)
    weight = formats.open(saved.folder, base=saved.base_file).weight("block.c_attn")
    assert torch.equal(weight, saved.base["block.c_attn.weight"].T)


def test_square_conv1d_base_is_turned_by_the_configuration(peft, tmp_path):
    """A square weight shows no orientation: fan_in_fan_out has to decide."""
    model = Tiny(c_proj=peft.Conv1D(4, 4))
    saved = Saved(peft, model, tmp_path, r=2, target_modules=["c_proj"], fan_in_fan_out=True)
    weight = formats.open(saved.folder, base=saved.base_file).weight("block.c_proj")
    assert torch.equal(weight, saved.base["block.c_proj.weight"].T)


def test_embedding_update_is_the_transposed_product(peft, tmp_path):
    saved = Saved(peft, Tiny(emb=nn.Embedding(11, 6)), tmp_path, r=2, lora_alpha=5, target_modules=["emb"])
    saved.check("block.emb")
    assert formats.open(saved.folder)["block.emb"].shape == (11, 6)


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_is_flattened(peft, tmp_path, kernel):
    model = Tiny(conv=nn.Conv2d(4, 6, kernel))
    saved = Saved(peft, model, tmp_path, r=3, lora_alpha=5, target_modules=["conv"])
    saved.check("block.conv")
    assert formats.open(saved.folder)["block.conv"].shape == (6, 4 * kernel**2)


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv1d, (1, 4, 9)), (nn.Conv3d, (1, 4, 5, 5, 5))])
def test_convolutions_of_other_dimensions(peft, tmp_path, layer, shape):
    model = Tiny(conv=layer(4, 6, 3))
    saved = Saved(peft, model, tmp_path, r=3, lora_alpha=5, target_modules=["conv"])
    check_by_forward(saved, "block.conv", torch.randn(shape, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolution(peft, tmp_path, groups):
    """PEFT refuses to merge these: the truth is what its layer computes.

    Its A has no groups and reads every input channel, so the update is a kernel without groups.
    """
    model = Tiny(conv=nn.Conv2d(8, 12, 3, groups=groups))
    saved = Saved(peft, model, tmp_path, r=4, lora_alpha=6, target_modules=["conv"])
    check_by_forward(saved, "block.conv", torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(5)))
    assert formats.open(saved.folder).info("block.conv").shape == (12, 8 * 9)
    store = formats.open(saved.folder, base=saved.base_file)  # whose weight has another shape, and that is no error
    assert "grouped" in store.notes[0]
    with pytest.raises(FormatError, match="no pre-trained weight is known that fits"):
        store.weight("block.conv")


def check_by_forward(saved: Saved, module: str, inputs: Tensor) -> None:
    """Convolve with our update and compare with what PEFT's layer adds to its base layer."""
    update = formats.open(saved.folder)[module]
    adapted = saved.model.base_model.model.get_submodule(module)
    added = adapted(inputs) - adapted.base_layer(inputs)
    assert added.abs().max() > 1e-2  # the update must be felt
    kernel = update.dense().reshape(update.shape[0], -1, *adapted.base_layer.kernel_size)
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[inputs.ndim]
    torch.testing.assert_close(convolve(inputs, kernel), added, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_and_rslora(peft, tmp_path, rslora):
    layers = {name: nn.Linear(8, 6) for name in ("q", "k", "v", "o")}
    saved = Saved(
        peft,
        Tiny(**layers),
        tmp_path,
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["q", "k", "v", "o"],
        # k is hit by two patterns (the first wins); "bloc" must not match "block"; v by its full path.
        # In alphabetical order, because PEFT sorts the keys when it saves: any other order would be lost.
        rank_pattern={"(k|q)": 2, "^block.v": 3, "bloc.o": 7, "k": 5},
        alpha_pattern={"block.k": 9, "k|q": 11, "v": 2},
    )
    for name in layers:
        saved.check(f"block.{name}")
    store = formats.open(saved.folder)
    assert [store.info(f"block.{name}").nominal_rank for name in "qkvo"] == [2, 2, 3, 4]
    root = (lambda r: r**0.5) if rslora else (lambda r: r)
    scales = [store.info(f"block.{name}").scale for name in "qkvo"]
    assert scales == pytest.approx([11 / root(2), 9 / root(2), 2 / root(3), 6 / root(4)])
    assert store.notes == []


@pytest.mark.parametrize(
    "patterns", [{"k": 9, "block.k": 2}, {"lock.k": 9}, {".*k": 7}, {"k$": 7}, {"block": 3}, {"a+": 5}]
)
def test_pattern_matching_is_pefts_own(peft, tmp_path, patterns):
    from peft.utils.other import get_pattern_key

    from rankscope.formats.peft_config import AdapterConfig

    config = AdapterConfig(peft_type="LORA", lora_alpha=1.0, r=4, rank_pattern=patterns)
    for module in ("block.k", "k", "block.kk", "block", "a+", "aa"):
        assert config.rank(module) == patterns.get(get_pattern_key(patterns.keys(), module), 4)


@pytest.mark.parametrize(
    ("name", "make", "transpose"),
    [
        ("lin", lambda peft: nn.Linear(7, 5), False),
        ("c_fc", lambda peft: peft.Conv1D(9, 4), True),
        ("emb", lambda peft: nn.Embedding(11, 6), False),
        ("conv", lambda peft: nn.Conv2d(4, 6, 3), False),
    ],
)
def test_dora(peft, tmp_path, name, make, transpose):
    """The whole update equals PEFT's merge; the product stays available, and alone is another matrix."""
    fan = {"fan_in_fan_out": True} if transpose else {}
    saved = Saved(
        peft, Tiny(**{name: make(peft)}), tmp_path, r=2, lora_alpha=6, use_dora=True, target_modules=[name], **fan
    )
    module = f"block.{name}"
    saved.check(module, of=f"{module}:whole", transpose=transpose, rel=1e-4)
    store = formats.open(saved.folder, base=saved.base_file)
    assert store.names() == [module, f"{module}:whole"]
    whole, product = store[f"{module}:whole"], store[module]
    assert isinstance(whole, Dense)
    assert whole.rounding == 0
    assert isinstance(product, LowRank)
    assert product.nominal_rank == 2
    assert (product.dense() - whole.dense()).norm() > 0.1 * whole.norm


def test_dora_without_a_base_lists_the_whole_update(peft, tmp_path):
    saved = Saved(peft, Tiny(q=nn.Linear(7, 5)), tmp_path, r=2, use_dora=True, target_modules=["q"])
    store = formats.open(saved.folder)
    assert store.names() == ["block.q"]
    assert [(skip.name, "--base" in skip.reason) for skip in store.skipped] == [("block.q:whole", True)]
    assert store.info("block.q").method == "dora-product"


def test_dora_product_is_the_plain_lora_product(peft, tmp_path):
    saved = Saved(peft, Tiny(q=nn.Linear(7, 5)), tmp_path, r=2, lora_alpha=6, use_dora=True, target_modules=["q"])
    layer = saved.model.base_model.model.block["q"]
    check_equal(formats.open(saved.folder)["block.q"], layer.get_delta_weight("default").detach())


def test_half_precision_base_of_dora_is_upcast_first(peft, tmp_path):
    saved = Saved(peft, Tiny(q=nn.Linear(7, 5)), tmp_path, r=2, lora_alpha=6, use_dora=True, target_modules=["q"])
    half = tmp_path / "half.safetensors"
    save_file({name: value.bfloat16() for name, value in saved.base.items()}, half)
    whole = formats.open(saved.folder, base=half)["block.q:whole"]
    weight = saved.base["block.q.weight"].bfloat16().double().numpy()
    delta = saved.model.base_model.model.block["q"].get_delta_weight("default").detach().double().numpy()
    magnitude = (
        saved.model.base_model.model.block["q"].lora_magnitude_vector["default"].weight.detach().double().numpy()
    )
    moved = weight + delta
    truth = magnitude[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True) - weight
    np.testing.assert_allclose(whole.dense().numpy(), truth, rtol=0, atol=1e-6)
    assert whole.rounding == 0
    assert whole.stored == torch.float32


def test_live_state_dict_with_adapter_names(peft, tmp_path):
    """Keys as they are in the running model, ``lora_A.default.weight``, mean the same."""
    model = Tiny(q=nn.Linear(7, 5), emb=nn.Embedding(11, 6))
    saved = Saved(peft, model, tmp_path, r=2, lora_alpha=6, use_dora=True, target_modules=["q", "emb"])
    live = tmp_path / "live"
    live.mkdir()
    state = {name: value.contiguous() for name, value in saved.model.state_dict().items() if "lora_" in name}
    assert any(name.endswith("lora_A.default.weight") for name in state)
    save_file(state, live / "adapter_model.safetensors")
    (live / "adapter_config.json").write_text((saved.folder / "adapter_config.json").read_text())
    expected, found = (formats.open(folder, base=saved.base_file) for folder in (saved.folder, live))
    assert found.names() == expected.names() == ["block.emb", "block.emb:whole", "block.q", "block.q:whole"]
    for name in expected:
        assert torch.equal(found[name].dense(), expected[name].dense())


def test_everything_else_is_listed_with_its_reason(peft, tmp_path):
    model = Tiny(q=nn.Linear(7, 5), head=nn.Linear(5, 2))
    saved = Saved(
        peft, model, tmp_path, r=2, lora_bias=True, bias="all", target_modules=["q"], modules_to_save=["head"]
    )
    store = formats.open(saved.folder)
    assert store.names() == ["block.q"]
    skipped = {skip.name: skip.reason for skip in store.skipped}
    assert "lora_bias" in skipped.pop("block.q.lora_B.bias")
    assert "modules_to_save" in skipped.pop("block.head.weight")
    assert skipped
    assert all("bias" in reason for reason in skipped.values())


def test_trainable_tokens_are_listed(peft, tmp_path):
    model = Tiny(emb=nn.Embedding(11, 6), q=nn.Linear(6, 5))
    saved = Saved(peft, model, tmp_path, r=2, target_modules=["q"], trainable_token_indices={"emb": [1, 3]})
    store = formats.open(saved.folder)
    assert store.names() == ["block.q"]
    assert any("token" in skip.reason for skip in store.skipped)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up[0]


def test_target_parameters_are_listed(peft, tmp_path):
    saved = Saved(
        peft,
        Tiny(q=nn.Linear(7, 5), experts=Experts()),
        tmp_path,
        r=2,
        target_modules=["q"],
        target_parameters=["experts.up", "experts.down"],
    )
    store = formats.open(saved.folder)
    assert store.names() == ["block.q"]
    assert len(store.skipped) == 2
    assert all("target_parameters" in skip.reason for skip in store.skipped)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_move_the_base_are_noted(peft, tmp_path, init):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=init)
        peft.get_peft_model(Tiny(q=nn.Linear(7, 5)), config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"]
    assert written == init
    (note,) = formats.open(tmp_path).notes
    assert re.search(f"{init}.*not the learned update", note)
