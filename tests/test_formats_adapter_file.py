"""Adapters of kohya's scripts, LyCORIS, diffusers and loralib: whole files, against products written out in numpy."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapters import linear, normal, write_adapter, write_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from rankscope import cli
from rankscope.errors import ConfigError, FormatError
from rankscope.formats import store as formats
from rankscope.formats.loralib import NoAlphaError
from rankscope.updates import Dense, LowRank


def written(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata or None)
    return path


def product(up: Tensor, down: Tensor, scale: float) -> np.ndarray:
    """scale · up · down, kernels flattened, in numpy's float64."""
    left, right = (np.asarray(t.float(), dtype=np.float64).reshape(t.shape[0], -1) for t in (up, down))
    return scale * (left @ right)


def same(update: object, truth: np.ndarray) -> None:
    assert isinstance(update, LowRank | Dense)
    np.testing.assert_allclose(update.dense().numpy(), truth, rtol=0, atol=2e-6 * np.abs(truth).max())


def kohya_layer(name: str, out: int = 6, n: int = 4, r: int = 2, seed: int = 0, alpha: float | None = 3.0):
    tensors = {
        f"{name}.lora_up.weight": normal(out, r, seed=seed),
        f"{name}.lora_down.weight": normal(r, n, seed=seed + 1),
    }
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


Q, TE = "lora_unet_mid_block_attn_to_q", "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kohya(tmp_path, dtype):
    tensors = {**kohya_layer(Q), **kohya_layer(TE, 3, 5, 1, seed=2, alpha=None)}
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    store = formats.open(written(tmp_path / "model.safetensors", tensors))
    assert (store.kind, store.names()) == ("kohya", [TE, Q])
    same(store[Q], product(tensors[f"{Q}.lora_up.weight"], tensors[f"{Q}.lora_down.weight"], 3 / 2))
    same(store[TE], product(tensors[f"{TE}.lora_up.weight"], tensors[f"{TE}.lora_down.weight"], 1.0))
    info = store.info(Q)
    assert (info.shape, info.nominal_rank, info.scale, info.dtype, info.method) == ((6, 4), 2, 1.5, dtype, "lora")
    assert store.skipped == []


@pytest.mark.parametrize("name", ["x.safetensors", "adapter_model.safetensors", "update.safetensors", "x.pt", "x.bin"])
def test_content_tells_not_the_name(tmp_path, name):
    tensors = kohya_layer(Q)
    path = tmp_path / "it" / name
    path.parent.mkdir()
    torch.save(tensors, path) if path.suffix in (".pt", ".bin") else save_file(tensors, path)
    assert formats.open(path).kind == "kohya"
    if path.suffix == ".safetensors" and name != "update.safetensors":
        assert formats.open(path.parent).kind == "kohya"  # a folder with one file, as the hub has them
        assert formats.open(path.parent).path == path.parent if name == "x.safetensors" else True


def test_kohyas_convolutions(tmp_path):
    up, down, mid = normal(6, 2, 1, 1), normal(2, 4, 3, 3, seed=1), normal(2, 2, 3, 3, seed=2)
    small = normal(2, 4, 1, 1, seed=3)
    tensors = {
        "lora_unet_a.lora_up.weight": up,
        "lora_unet_a.lora_down.weight": down,
        "lora_unet_a.alpha": torch.tensor([1.0]),
        "lora_unet_b.lora_up.weight": up,
        "lora_unet_b.lora_mid.weight": mid,
        "lora_unet_b.lora_down.weight": small,
    }
    store = formats.open(written(tmp_path / "c.safetensors", tensors))
    same(store["lora_unet_a"], product(up, down, 0.5))
    core = np.einsum("om,mnhw,ni->oihw", up.flatten(1).numpy(), mid.numpy(), small.flatten(1).numpy())
    same(store["lora_unet_b"], core.reshape(6, -1).astype(np.float64))


def test_kohyas_dora_with_and_without_its_base(tmp_path):
    tensors = {**kohya_layer(Q), f"{Q}.dora_scale": normal(6, 1, seed=5).abs()}
    path = written(tmp_path / "d.safetensors", tensors)
    store = formats.open(path)
    assert store.info(Q).method == "dora-product"
    assert [(one.name, "needs --base" in one.reason) for one in store.skipped] == [(f"{Q}:whole", True)]
    W = normal(6, 4, seed=9)
    base = write_checkpoint(tmp_path / "base.safetensors", {f"{Q}.weight": W})
    store = formats.open(path, base=base)
    added = product(tensors[f"{Q}.lora_up.weight"], tensors[f"{Q}.lora_down.weight"], 1.5)
    moved = W.numpy().astype(np.float64) + added
    m = tensors[f"{Q}.dora_scale"].numpy().astype(np.float64)
    truth = m * moved / np.linalg.norm(moved, axis=1, keepdims=True) - W.numpy()
    same(store[f"{Q}:whole"], truth)
    same(store[Q], added)
    assert torch.equal(store.weight(Q), W)


def test_what_is_not_analysed_is_listed(tmp_path):
    tensors = {
        **kohya_layer(Q),
        f"{Q}.diff_b": normal(6),
        "lora_unet_norm.w_norm": normal(4),
        "lora_unet_rest.alpha": torch.tensor(1.0),
        "lora_unet_turn.oft_blocks": normal(2, 3, 3),
        "bundle_emb.word.string_to_param.*": normal(1, 4),
        "left_over": normal(2, 2),
    }
    store = formats.open(written(tmp_path / "s.safetensors", tensors))
    reasons = {one.name: one.reason for one in store.skipped}
    assert set(reasons) == set(tensors) - set(kohya_layer(Q))
    assert "bias" in reasons[f"{Q}.diff_b"]
    assert "norm" in reasons["lora_unet_norm.w_norm"]
    assert "rotation" in reasons["lora_unet_turn.oft_blocks"]
    assert "textual inversion" in reasons["bundle_emb.word.string_to_param.*"]
    only = written(tmp_path / "only.safetensors", {"lora_unet_turn.oft_blocks": normal(2, 3, 3)})
    with pytest.raises(FormatError, match=r"holds no layer that can be read; skipped lora_unet_turn\.oft_blocks: OFT"):
        formats.open(only)


@pytest.mark.parametrize("kind", ["kohya", "diffusers"])
def test_whole_differences_beside_factors(tmp_path, kind):
    """As trainers of video models write them: vectors and convolutions whole, the rest as factors."""
    down, up = ("lora_down.weight", "lora_up.weight") if kind == "kohya" else ("lora_A.weight", "lora_B.weight")
    front = "diffusion_model.blocks.0"
    tensors = {
        f"{front}.q.{down}": normal(2, 4), f"{front}.q.{up}": normal(6, 2), f"{front}.q.diff_b": normal(6),
        f"{front}.norm.diff": normal(4), "diffusion_model.patch.diff": normal(6, 3, 1, 2, 2),
    }  # fmt: skip
    store = formats.open(written(tmp_path / "x.safetensors", tensors))
    assert (store.kind, store.names()) == (kind, [f"{front}.q", "diffusion_model.patch"])
    assert {one.name for one in store.skipped} == {f"{front}.q.diff_b", f"{front}.norm.diff"}
    same(store["diffusion_model.patch"], tensors["diffusion_model.patch.diff"].reshape(6, -1).numpy().astype(float))


def test_kohyas_metadata_that_contradicts_the_tensors(tmp_path):
    path = written(tmp_path / "m.safetensors", kohya_layer(Q), ss_network_dim="16", ss_network_alpha="8")
    store = formats.open(path)
    assert store.info(Q).scale == 1.5
    assert any("16, in fact 2" in note for note in store.notes)
    assert formats.open(written(tmp_path / "ok.safetensors", kohya_layer(Q), ss_network_dim="2")).notes == []


BAD = {
    "half": ({f"{Q}.lora_up.weight": normal(6, 2)}, "half of the factors is missing"),
    "no product": ({f"{Q}.lora_up.weight": normal(6, 3), f"{Q}.lora_down.weight": normal(2, 4)}, "do not multiply"),
    "two alphas": (kohya_layer(Q, alpha=None) | {f"{Q}.alpha": normal(2)}, "one number"),
    "alpha is no number": (kohya_layer(Q, alpha=float("nan")), "not known"),
    "integers": ({k: v.to(torch.int8) for k, v in kohya_layer(Q).items()}, "floating-point"),
    "a magnitude of integers": (kohya_layer(Q) | {f"{Q}.dora_scale": torch.ones(6, 1, dtype=torch.int8)}, "floating"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_sentence(tmp_path, case):
    tensors, message = BAD[case]
    path = written(tmp_path / "x.safetensors", tensors)
    with pytest.raises(FormatError, match=message) as caught:
        formats.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


KINDS = {
    "locon": ("locon.LoConModule", {}),
    "locon with a core": ("locon.LoConModule", {"use_tucker": True}),
    "rslora": ("locon.LoConModule", {"rs_lora": True}),
    "dora": ("locon.LoConModule", {"weight_decompose": True}),
    "loha": ("loha.LohaModule", {}),
    "lokr": ("lokr.LokrModule", {"lora_dim": 1}),
    "full": ("full.FullModule", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["linear", "convolution"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_against_the_forward_of_lycoris(tmp_path, kind, layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever importing a third-party package warns of
        pytest.importorskip("lycoris.modules.locon")
        place, name = KINDS[kind][0].split(".")
        cls = getattr(importlib.import_module(f"lycoris.modules.{place}"), name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = nn.Linear(12, 8, bias=False) if layer == "linear" else nn.Conv2d(4, 6, 3, bias=False)
        original.requires_grad_(False)
        inputs = torch.randn(5, 12) if layer == "linear" else torch.randn(2, 4, 7, 7)
        before = original(inputs)
        weight = original.weight.detach().clone()
        module = cls("lycoris_x", original, 1.0, **{"lora_dim": 2, "alpha": 3, **KINDS[kind][1]})
        if kind == "full":
            module.apply_to()  # it holds the whole weight from here on
        for path, value in module.named_parameters():
            value.data = (
                value.data * (1 + torch.rand_like(value)) if "dora" in path else value.data + torch.randn_like(value)
            )
    module.org_forward = lambda x, *_, **__: F.linear(x, weight) if layer == "linear" else F.conv2d(x, weight)
    with torch.no_grad():
        after = module.eval().forward(inputs)
        state = {f"lycoris_x.{leaf}": value.detach() for leaf, value in module.custom_state_dict().items()}
    base = write_checkpoint(tmp_path / "base.safetensors", {"x.weight": weight})
    store = formats.open(written(tmp_path / "l.safetensors", state), base=base)
    name = "lycoris_x:whole" if kind == "dora" else "lycoris_x"
    kernel = (weight.flatten(1) + store[name].dense()).reshape(weight.shape)
    ours = F.linear(inputs, kernel) if layer == "linear" else F.conv2d(inputs, kernel)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(ours, after.detach(), rtol=0, atol=1e-5 * float(after.detach().abs().max()))


A, B = normal(2, 4, seed=1), normal(6, 2, seed=2)


def config(**values: object) -> str:
    return json.dumps(values)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("unet.mid.to_q.lora_A.weight", "unet.mid.to_q.lora_B.weight"), "unet.mid.to_q"),
        (("transformer.a.lora.down.weight", "transformer.a.lora.up.weight"), "transformer.a"),
        (("a.attn1.processor.to_q_lora.down.weight", "a.attn1.processor.to_q_lora.up.weight"), "a.attn1.to_q"),
        (("a.attn1.processor.to_out_lora.down.weight", "a.attn1.processor.to_out_lora.up.weight"), "a.attn1.to_out.0"),
        (("text_encoder_2.x.lora_A.weight", "text_encoder_2.x.lora_B.weight"), "text_encoder_2.x"),
        (("unet.x.lora_A.default.weight", "unet.x.lora_B.default.weight"), "unet.x"),
    ],
)
def test_names_of_diffusers(tmp_path, keys, name):
    store = formats.open(written(tmp_path / "x.safetensors", dict(zip(keys, (A, B), strict=True))))
    assert (store.kind, store.names()) == ("diffusers", [name])
    same(store[name], product(B, A, 1.0))
    assert any("α = r" in note for note in store.notes)


def test_diffusers_takes_alpha_from_its_metadata_or_its_tensors(tmp_path):
    keys = {f"{part}.{name}.lora_{half}.weight": t for part in ("unet", "text_encoder") for name in ("a.q", "a.v")
            for half, t in (("A", A), ("B", B))}  # fmt: skip
    told = config(**{
        "unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"a.v": 3}, "unet.target_modules": ["q", "v"],
        "text_encoder.lora_alpha": 6, "text_encoder.use_rslora": True,
    })  # fmt: skip
    store = formats.open(written(tmp_path / "m.safetensors", keys, lora_adapter_metadata=told))
    scales = {name: store.info(name).scale for name in store}
    expected = {"unet.a.q": 4.0, "unet.a.v": 1.5, "text_encoder.a.q": 6 / 2**0.5, "text_encoder.a.v": 6 / 2**0.5}
    assert scales == pytest.approx(expected)
    same(store["unet.a.v"], product(B, A, 1.5))
    assert store.notes == []
    own = {**keys, "unet.a.q.alpha": torch.tensor(5.0)}
    assert formats.open(written(tmp_path / "t.safetensors", own)).info("unet.a.q").scale == 2.5
    bare = {key.removeprefix("unet."): value for key, value in keys.items() if key.startswith("unet.")}
    told = config(lora_alpha=8, r=2)
    assert formats.open(written(tmp_path / "b.safetensors", bare, lora_adapter_metadata=told)).info("a.q").scale == 4.0
    nested = config(unet={"lora_alpha": 8})
    assert (
        formats.open(written(tmp_path / "n.safetensors", keys, lora_adapter_metadata=nested)).info("unet.a.q").scale
        == 4
    )


@pytest.mark.parametrize(
    ("told", "message"),
    [("{", "not valid JSON"), ("[]", "no JSON object"), ('{"unet.lora_alpha": "x"}', "Expected"),
     ('{"unet.lora_alpha": 1e999}', "finite"), ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}', "metadata")],
)  # fmt: skip
def test_metadata_that_is_damaged(tmp_path, told, message):
    tensors = {"unet.a.lora_A.weight": A, "unet.a.lora_B.weight": B}
    with pytest.raises(FormatError, match=message):
        formats.open(written(tmp_path / "x.safetensors", tensors, lora_adapter_metadata=told))


def test_diffusers_dora_and_what_is_beside(tmp_path):
    tensors = {
        "transformer.a.lora_A.weight": A, "transformer.a.lora_B.weight": B,
        "transformer.a.lora_magnitude_vector": normal(6, seed=4).abs(), "transformer.a.lora_B.bias": normal(6),
        "transformer.norm.weight": normal(4),
    }  # fmt: skip
    W = normal(6, 4, seed=7)
    base = write_checkpoint(tmp_path / "base.safetensors", {"a.weight": W})
    store = formats.open(written(tmp_path / "x.safetensors", tensors), base=base)
    moved = W.numpy() + product(B, A, 1.0)
    m = tensors["transformer.a.lora_magnitude_vector"].numpy()[:, None]
    same(store["transformer.a:whole"], m * moved / np.linalg.norm(moved, axis=1, keepdims=True) - W.numpy())
    assert {one.name for one in store.skipped} == {"transformer.a.lora_B.bias", "transformer.norm.weight"}


def test_pefts_factors_without_their_configuration_are_still_refused(tmp_path):
    for tensors in (linear("q"), {"base_model.model.q.hada_w1_a": A}, {"q.lora_A.weight": A, "q.lora_B.weight": B}):
        with pytest.raises(FormatError, match="not its scale"):
            formats.open(written(tmp_path / "x.safetensors", tensors))


def test_loralib(tmp_path):
    tensors = {"h.0.q.lora_A": A, "h.0.q.lora_B": B, "h.0.q.weight": normal(6, 4), "wte.lora_A": A, "wte.lora_B": B}
    for path in (tmp_path / "x.pt", tmp_path / "x.safetensors"):
        if path.suffix == ".pt":
            torch.save({"model_state_dict": tensors}, path)
        else:
            written(path, tensors)
        store = formats.open(path, alpha=8)
        assert (store.kind, store.names()) == ("loralib", ["h.0.q", "wte"])
        same(store["h.0.q"], product(B, A, 4.0))
        same(store["wte"], product(B, A, 4.0).T)  # B·A is (dim, vocabulary), the weight (vocabulary, dim)
        assert [one.name for one in store.skipped] == ["h.0.q.weight"]
        assert any("α = 8" in note for note in store.notes)
        with pytest.raises(NoAlphaError, match="--alpha"):
            formats.open(path)
    with pytest.raises(ConfigError, match="finite"):
        formats.open(path, alpha=float("inf"))


@pytest.mark.parametrize(("n", "names"), [(3, ["q", "k", "v"]), (2, ["0", "1"])])
def test_loralibs_merged_linear(tmp_path, n, names):
    """The layer's own formula: a convolution over groups (loralib/layers.py, merge_AB)."""
    r, rows, into = 2, 5, 4
    packed_a, packed_b = normal(r * n, into, seed=3), normal(rows * n, r, seed=4)
    truth = F.conv1d(packed_a[None], packed_b[..., None], groups=n)[0].numpy() * 3 / r
    path = written(tmp_path / "x.safetensors", {"h.c_attn.lora_A": packed_a, "h.c_attn.lora_B": packed_b})
    store = formats.open(path, alpha=3)
    assert store.names() == sorted(f"h.c_attn:{name}" for name in names)
    for i, name in enumerate(names):
        assert store.info(f"h.c_attn:{name}").nominal_rank == r
        same(store[f"h.c_attn:{name}"], truth[i * rows : (i + 1) * rows].astype(np.float64))


def test_a_given_alpha_fills_gaps_only_and_says_where_it_does_not(tmp_path):
    path = written(tmp_path / "k.safetensors", {**kohya_layer(Q), **kohya_layer(TE, alpha=None)})
    store = formats.open(path, alpha=4)
    assert (store.info(Q).scale, store.info(TE).scale) == (1.5, 2.0)
    peft = formats.open(write_adapter(tmp_path / "p"), alpha=4)
    assert peft.info("block.q").scale == 4.0  # lora_alpha 8 over r 2
    assert any("is not used" in note for note in peft.notes)


def test_alpha_on_the_command_line(tmp_path, capsys):
    path = written(tmp_path / "x.safetensors", {"h.0.q.lora_A": A, "h.0.q.lora_B": B})

    def run(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    code, _, err = run("spectrum", path)
    assert (code, "--alpha" in err) == (1, True)
    norms = [json.loads(run("spectrum", path, "--alpha", alpha, "--json")[1])["total"]["norm"] for alpha in (1, 8)]
    assert norms[1] == pytest.approx(8 * norms[0])
    assert run("compare", path, path, "--alpha", 2)[0] == 0
