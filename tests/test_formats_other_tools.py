"""Spellings of keys that other tools write, and adapters in layouts of their own, against products in numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import normal, write_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats import store as formats
from rankscope.formats.adapter_file import NoAlphaError
from rankscope.formats.names import pair_names, strip_wrappers

R, OUT, IN = 2, 6, 4
A, B = normal(R, IN, seed=1), normal(OUT, R, seed=2)
PATH = "transformer_blocks.0.attn.to_q"


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata or None)
    return path


def product(scale: float, up: Tensor = B, down: Tensor = A) -> np.ndarray:
    left, right = (np.asarray(factor, dtype=np.float64) for factor in (up, down))
    return scale * (left @ right)


def check_close(update: object, truth: np.ndarray) -> None:
    matrix = update.dense().numpy()  # type: ignore[attr-defined]
    np.testing.assert_allclose(matrix, truth, rtol=0, atol=2e-6 * np.abs(truth).max())


PEFT, DOWN, ALPHA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"), ("alpha",)


def behind(front: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The factors (and α = 6) under these names."""
    return {front + name: value for name, value in zip(names, (A, B, torch.tensor(6.0)), strict=False)}


SPELLINGS = {
    # a file's tensors, the layer's name, and its scale
    "compiled, prefix in front": (behind("_orig_mod.unet.x.", PEFT), "unet.x", 1),
    "compiled, within": (behind(f"transformer._orig_mod.{PATH}.", PEFT), f"transformer.{PATH}", 1),
    "compiled layer": (
        behind("lora_unet_a._orig_mod.", DOWN) | {"lora_unet_a.alpha": torch.tensor(6.0)}, "lora_unet_a", 3
    ),
    "compiled model of kohya": (behind("lora_unet__orig_mod_a.", DOWN + ALPHA), "lora_unet_a", 3),
    "FSDP": (behind(f"transformer._fsdp_wrapped_module.{PATH}.", PEFT), f"transformer.{PATH}", 1),
    "no prefix": (behind(f"{PATH}.", PEFT), PATH, 1),
    "no prefix, adapter name": (
        behind("blocks.0.self_attn.q.", ("lora_A.default.weight", "lora_B.default.weight")), "blocks.0.self_attn.q", 1
    ),
    "no prefix, alpha": (behind("any.name.", PEFT + ALPHA), "any.name", 3),
    "linear layer": (
        behind("text_encoder.q_proj.lora_linear_layer.", ("down.weight", "up.weight")), "text_encoder.q_proj", 1
    ),
    "linear layer, no prefix": (behind(f"{PATH}.lora_linear_layer.", ("down.weight", "up.weight")), PATH, 1),
    "old text encoder": (
        behind("text_encoder.layers.0.self_attn.to_out_lora.", ("down.weight", "up.weight")),
        "text_encoder.layers.0.self_attn.out_proj", 1,
    ),
    "dots behind kohya's prefix": (behind(f"lora_unet_{PATH}.", DOWN + ALPHA), f"lora_unet_{PATH}", 3),
    "PEFT's factors behind kohya's prefix": (behind("lora_unet_a.", PEFT + ALPHA), "lora_unet_a", 3),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_keys(tmp_path, spelling):
    tensors, name, scale = SPELLINGS[spelling]
    store = formats.open(write(tmp_path / "x.safetensors", tensors))
    assert (store.names(), store.skipped) == ([name], [])
    check_close(store[name], product(scale))


@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
@pytest.mark.parametrize("within", ["_orig_mod.", ""])
def test_alpha_of_compiled_models_is_found(tmp_path, prefix, within):
    keys = {f"{prefix}unet.{within}a.lora_{half}.weight": value for half, value in (("A", A), ("B", B))}
    settings = json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": {"^a": 6}})
    store = formats.open(write(tmp_path / "x.safetensors", keys, lora_adapter_metadata=settings))
    check_close(store["unet.a"], product(3))
    peft = {f"{prefix}base_model.model.{within}l.0.q.lora_{half}.weight": value for half, value in (("A", A), ("B", B))}
    write(tmp_path / "p" / "adapter_model.safetensors", peft)
    for pattern in ("^l.0.q", rf"^{within}l\.0\.q"):
        config = {"peft_type": "LORA", "r": R, "lora_alpha": 1, "alpha_pattern": {pattern: 6}}
        (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(config))
        store = formats.open(tmp_path / "p")
        assert store.names() == ["l.0.q"]
        check_close(store["l.0.q"], product(3))


def test_compiled_checkpoints_pair_with_their_base(tmp_path):
    weight, change = normal(6, 4), normal(6, 4, seed=5)
    base = write_checkpoint(
        tmp_path / "b.safetensors", {"model.l.0.q.weight": weight, "model.l.1.q.weight": weight + 1}
    )
    tuned = {"_orig_mod.model.l.0.q.weight": weight + change, "_orig_mod.model.l.1._orig_mod.q.weight": 2 * weight}
    store = formats.open(write_checkpoint(tmp_path / "t.safetensors", tuned), base=base)
    assert len(store) == 2
    check_close(store[store.names()[0]], (weight + change - weight).double().numpy())
    assert pair_names(["_orig_mod.a", "a"], ["a", "b"]).pairs == [("a", "a")]
    assert strip_wrappers("module.base_model.model.module.x") == "base_model.model.module.x"


@pytest.mark.parametrize("tag", ["ss_network_alpha", "lora_alpha", "alpha"])
def test_alpha_in_the_metadata_alone(tmp_path, tag):
    kohya = {"lora_unet_a.lora_down.weight": A, "lora_unet_a.lora_up.weight": B}
    for tensors in (kohya, {f"{PATH}.lora_A.weight": A, f"{PATH}.lora_B.weight": B}):
        store = formats.open(write(tmp_path / "x.safetensors", tensors, **{tag: "6"}))
        check_close(store[store.names()[0]], product(3))
        assert any("from the file's metadata" in note for note in store.notes)
        own = next(iter(tensors)).rpartition(".lora_")[0] + ".alpha"
        store = formats.open(write(tmp_path / "o.safetensors", tensors | {own: torch.tensor(4.0)}, **{tag: "6"}))
        check_close(store[store.names()[0]], product(2))
    store = formats.open(write(tmp_path / "n.safetensors", kohya, ss_network_alpha="None"))
    check_close(store["lora_unet_a"], product(1))


def test_alpha_of_convolutions_in_kohyas_metadata(tmp_path):
    down, up = normal(R, IN, 3, 3), normal(OUT, R, 1, 1)
    tensors = {"lora_unet_c.lora_down.weight": down, "lora_unet_c.lora_up.weight": up}
    arguments = json.dumps({"conv_dim": "2", "conv_alpha": "5"})
    path = write(tmp_path / "x.safetensors", tensors, ss_network_alpha="6", ss_network_args=arguments)
    assert formats.open(path).info("lora_unet_c").scale == 2.5


@pytest.mark.parametrize("factors", [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")])
def test_magnitudes_of_ai_toolkit(tmp_path, factors):
    tensors = {f"transformer.{PATH}.{key}": value for key, value in zip(factors, (A, B), strict=True)}
    tensors[f"transformer.{PATH}.magnitude"] = m = normal(OUT, seed=3).abs()
    W = normal(OUT, IN, seed=4)
    base = write_checkpoint(tmp_path / "base.safetensors", {f"{PATH}.weight": W})
    store = formats.open(write(tmp_path / "x.safetensors", tensors), base=base)
    moved = W.double().numpy() + product(1)
    truth = m.double().numpy()[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True) - W.double().numpy()
    check_close(store[f"transformer.{PATH}:whole"], truth)


def test_other_models_without_alpha_are_refused(tmp_path):
    keys = {f"model.layers.0.self_attn.q_proj.lora_{half}.weight": value for half, value in (("A", A), ("B", B))}
    path = write(tmp_path / "x.safetensors", keys)
    with pytest.raises(FormatError, match=r"not its scale.*--alpha"):
        formats.open(path)
    check_close(formats.open(path, alpha=6)["model.layers.0.self_attn.q_proj"], product(3))


def write_mlx(folder: Path, tensors: dict[str, Tensor], **parameters: object) -> Path:
    write(folder / "adapters.safetensors", tensors)
    config = {"fine_tune_type": "lora", "num_layers": 2, "model": "org/base", "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_mlx(tmp_path):
    """ΔW = scale · (lora_a @ lora_b)ᵀ, of an embedding scale · lora_a @ lora_b, of experts scale · b[e] @ a[e]."""
    table = normal(9, R, seed=5)
    a, b = normal(3, R, IN, seed=6), normal(3, OUT, R, seed=7)
    tensors = {
        "model.layers.0.self_attn.q_proj.lora_a": A.T, "model.layers.0.self_attn.q_proj.lora_b": B.T,
        "model.embed_tokens.lora_a": table, "model.embed_tokens.lora_b": A,
        "model.layers.0.mlp.switch_mlp.up_proj.lora_a": a, "model.layers.0.mlp.switch_mlp.up_proj.lora_b": b,
    }  # fmt: skip
    folder = write_mlx(tmp_path / "m", tensors, rank=R, scale=20.0, dropout=0.0)
    for path in (folder, folder / "adapters.safetensors"):
        store = formats.open(path)
        assert (store.kind, store.skipped, store.base_name()) == ("mlx", [], "org/base")
        check_close(store["model.layers.0.self_attn.q_proj"], product(20))
        check_close(store["model.embed_tokens"], product(20, table, A))
        for e in range(3):
            check_close(store[f"model.layers.0.mlp.switch_mlp.up_proj[{e}]"], product(20, b[e], a[e]))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(NoAlphaError, match=r"lora_parameters.*--alpha"):
        formats.open(folder)
    check_close(formats.open(folder, alpha=40)["model.layers.0.self_attn.q_proj"], product(20))


def test_mlx_of_the_first_versions_and_dora(tmp_path):
    tensors = {"l.q.lora_a": A.T, "l.q.lora_b": B.T, "l.q.m": normal(OUT, seed=3).abs()}
    W = normal(OUT, IN, seed=4)
    base = write_checkpoint(tmp_path / "base.safetensors", {"l.q.weight": W})
    folder = write_mlx(tmp_path / "m", tensors, rank=R, alpha=3.0, scale=2.0)
    store = formats.open(folder, base=base)
    check_close(store["l.q"], product(3))  # scale · alpha / rank
    moved = W.double().numpy() + product(3)
    m = tensors["l.q.m"].double().numpy()[:, None]
    check_close(store["l.q:whole"], m * moved / np.linalg.norm(moved, axis=1, keepdims=True) - W.double().numpy())


def test_mlx_folders_of_fully_tuned_weights(tmp_path):
    W, change = normal(OUT, IN), normal(OUT, IN, seed=3)
    base = write_checkpoint(tmp_path / "base.safetensors", {"l.q.weight": W})
    folder = write_mlx(tmp_path / "m", {"l.q.weight": W + change})
    check_close(formats.open(folder, base=base)["l.q"], (W + change - W).double().numpy())


@pytest.mark.parametrize(
    "parameters", [{"scale": "x"}, {"scale": float("inf")}, {"scale": 1.0, "rank": 0}, {"scale": 1.0, "alpha": []}]
)
def test_mlx_settings_that_are_damaged(tmp_path, parameters):
    with pytest.raises(FormatError, match="lora_parameters"):
        formats.open(write_mlx(tmp_path / "m", {"l.q.lora_a": A.T, "l.q.lora_b": B.T}, **parameters))


def test_torchtune(tmp_path):
    tensors = {f"layers.0.attn.q_proj.lora_{half}.weight": value for half, value in (("a", A), ("b", B))}
    path = tmp_path / "adapter_0.pt"
    torch.save(tensors, path)
    with pytest.raises(NoAlphaError, match=r"adapter_config.json.*--alpha"):
        formats.open(path)
    check_close(formats.open(path, alpha=6)["layers.0.attn.q_proj"], product(3))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": 6}))
    store = formats.open(path)
    assert (store.kind, store.names()) == ("torchtune", ["layers.0.attn.q_proj"])
    check_close(store["layers.0.attn.q_proj"], product(3))


def test_xlabs(tmp_path):
    tensors = {}
    for name in ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2"):
        tensors |= behind(f"double_blocks.3.processor.{name}.", ("down.weight", "up.weight"))
    for name in ("qkv_lora", "proj_lora"):
        tensors |= behind(f"single_blocks.1.processor.{name}.", ("down.weight", "up.weight"))
    store = formats.open(write(tmp_path / "x.safetensors", tensors))
    names = [f"double_blocks.3.{stream}_attn.{part}" for stream in ("img", "txt") for part in ("proj", "qkv")]
    assert (store.kind, store.names()) == ("xlabs", [*names, "single_blocks.1.linear1:qkv"])
    for name in store:
        check_close(store[name], product(1))
    assert {item.reason.split(",")[0] for item in store.skipped} == {"XLabs applies it to the output of linear2"}


def test_layouts_that_are_not_read_are_refused_by_name(tmp_path):
    path = write(tmp_path / "x.safetensors", {"blk.0.attn_q.weight.lora_x": A, "blk.0.attn_q.weight.lora_y": B})
    with pytest.raises(FormatError, match="is an adapter by the names of its tensors"):
        formats.open(path)
    for name, message in (("a.gguf", "llama.cpp"), ("adapters.npz", "mlx-lm")):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(FormatError, match=message):
            formats.open(tmp_path / name)
    # A model whose own layers are called after LoRA is no adapter.
    model = {f"l.{i}.{name}.weight": normal(OUT, IN) for i in range(3) for name in ("q", "k", "w_lora")}
    path = write(tmp_path / "m.safetensors", model)
    assert len(formats.open(path, base=path)) == 9
