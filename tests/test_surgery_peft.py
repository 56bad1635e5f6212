"""Every output of surgery loads in PEFT or transformers and gives the logits that independent arithmetic predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery_makers import (
    LINEAR,
    gpt2,
    import_peft,
    llama,
    load_model,
    logits,
    quietly,
    save_model,
    save_peft,
    with_peft,
    with_updates,
)
from torch import Tensor

from rankscope.formats.store import open as open_store
from rankscope.surgery.algebra import average, merge_adapters, subtract
from rankscope.surgery.extract import extract
from rankscope.surgery.merge import merge, unmerge
from rankscope.surgery.resize import resize
from rankscope.surgery.truncate import Budget, Energy, Rank

CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}
GPT = ["c_attn", "c_proj", "c_fc"]


@pytest.fixture(scope="module", autouse=True)
def peft() -> Any:
    return import_peft()


def deltas(folder: Path) -> dict[str, Tensor]:
    """scale · B · A from the raw files, by module."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for key, A in tensors.items():
        module = key.removeprefix("base_model.model.").partition(".lora_")[0]
        if key.endswith("lora_A.weight"):
            r = A.shape[0]
            scale = config["lora_alpha"] / (r**0.5 if config["use_rslora"] else r)
            found[module] = scale * (tensors[key.replace("lora_A", "lora_B")].double() @ A.double()).float()
        if key.endswith("lora_embedding_A"):
            B = tensors[key.replace("embedding_A", "embedding_B")]
            found[module] = config["lora_alpha"] / A.shape[0] * (B @ A).T
    return found


def cut(matrix: Tensor, k: int) -> Tensor:
    u, s, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy(u[:, :k] * s[:k] @ vt[:k]).float()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("r", [1, 2, 4, 9])
def test_a_resized_adapter_gives_the_logits_of_the_truncated_update(tmp_path: Path, r: int, rslora: bool) -> None:
    model = llama()
    adapter = save_peft(model, tmp_path / "a", use_rslora=rslora)
    result = resize(adapter, Rank(r), tmp_path / "out")
    expected = with_updates(model, {name: cut(delta, r) for name, delta in deltas(adapter).items()})
    torch.testing.assert_close(with_peft(model, tmp_path / "out"), expected, **CLOSE)
    if r < 4:  # negative control: it is not the whole update's answer
        assert (expected - with_peft(model, adapter)).abs().max() > 0.01
    assert {layer.rank_after for layer in result.layers} == {min(r, 4)}


@pytest.mark.parametrize("choice", [Energy(0.8), Budget(900)])
def test_ranks_that_differ_by_layer_are_honoured_by_peft(tmp_path: Path, choice: Any) -> None:
    model = llama()
    adapter = save_peft(model, tmp_path / "a", r=6)
    result = resize(adapter, choice, tmp_path / "out")
    ranks = {layer.name: layer.rank_after or 0 for layer in result.layers}
    assert len(set(ranks.values())) > 1
    expected = with_updates(model, {name: cut(delta, ranks[name]) for name, delta in deltas(adapter).items()})
    torch.testing.assert_close(with_peft(model, tmp_path / "out"), expected, **CLOSE)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == sum(rank != config["r"] for rank in ranks.values()) > 0
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["lora_alpha"] == config["r"]


SETTINGS: dict[str, dict[str, Any]] = {
    "biases": {"bias": "all"},
    "biases of targets": {"bias": "lora_only"},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": [*LINEAR, "embed_tokens"]},
    "dora": {"use_dora": True},
    "bias of B": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "token rows": {"trainable_token_indices": {"embed_tokens": [1, 5]}},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 11}},
    "regular expression": {"target_modules": r"model\.layers\.\d\.mlp\..*_proj"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resizing_to_full_rank_changes_nothing(tmp_path: Path, name: str) -> None:
    model = llama()
    adapter = save_peft(model, tmp_path / "a", **SETTINGS[name])
    result = resize(adapter, Energy(1), tmp_path / "out")
    torch.testing.assert_close(with_peft(model, tmp_path / "out"), with_peft(model, adapter), **CLOSE)
    assert result.total.relative_error < 1e-6


def test_a_resized_dora_adapter_is_the_truncated_product_with_the_magnitude(tmp_path: Path) -> None:
    model = llama()
    adapter = save_peft(model, tmp_path / "a", use_dora=True)
    resize(adapter, Rank(2), tmp_path / "out")
    tensors = load_file(adapter / "adapter_model.safetensors")
    updates = {}
    for name, delta in deltas(adapter).items():
        weight = model.get_submodule(name).weight.detach()
        moved = weight + cut(delta, 2)
        m = tensors[f"base_model.model.{name}.lora_magnitude_vector"]
        updates[name] = m[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight
    torch.testing.assert_close(with_peft(model, tmp_path / "out"), with_updates(model, updates), **CLOSE)


def test_gpt2_is_resized_merged_and_unmerged(tmp_path: Path) -> None:
    model = gpt2()
    base = save_model(model, tmp_path / "base")
    adapter = save_peft(model, tmp_path / "a", target_modules=GPT, fan_in_fan_out=True)
    expected = with_updates(model, deltas(adapter))
    torch.testing.assert_close(with_peft(model, adapter), expected, **CLOSE)
    resize(adapter, Energy(1), tmp_path / "same")
    torch.testing.assert_close(with_peft(model, tmp_path / "same"), expected, **CLOSE)
    merge(base, [adapter], tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), expected, **CLOSE)
    unmerge(tmp_path / "merged", [adapter], tmp_path / "back")
    torch.testing.assert_close(logits(load_model(tmp_path / "back")), logits(model), **CLOSE)


@pytest.mark.parametrize("target", ["c_attn", "wte", "lm_head"])
def test_gpt2_as_it_was_published(tmp_path: Path, target: str) -> None:
    """Its checkpoint lacks the name of the inner model, and its configuration does not say that it ties."""
    model = gpt2()
    base = save_model(model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_peft(model, tmp_path / "a", target_modules=["c_fc", target], fan_in_fan_out=True)
    expected = with_peft(model, adapter)
    merge(base, [adapter], tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(tmp_path / "merged")), expected, **CLOSE)
    if target != "lm_head":
        result = extract(tmp_path / "merged", Energy(1), tmp_path / "again", base)
        assert bool(result.carried) == (target == "wte")
        torch.testing.assert_close(with_peft(load_model(base), tmp_path / "again"), expected, **CLOSE)


@pytest.mark.parametrize("name", [*SETTINGS, "tied embedding", "tied head", "tied, both whole"])
def test_merged_equals_unmerged(tmp_path: Path, name: str) -> None:
    """What PEFT computes with the adapter attached is what transformers computes with the merged weights."""
    settings = {
        **SETTINGS,
        "tied embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "tied head": {"target_modules": ["q_proj", "lm_head"]},
        "tied, both whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    }[name]
    model = llama(tie=name.startswith("tied"))
    base = save_model(model, tmp_path / "base")
    adapter = save_peft(model, tmp_path / "a", **settings)
    if name == "token rows":
        with pytest.raises(Exception, match="trainable_token_indices is set"):
            merge(base, [adapter], tmp_path / "merged")
        return
    result = merge(base, [adapter], tmp_path / "merged")
    expected = with_peft(model, adapter)
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, **CLOSE)
    assert (expected - logits(model)).abs().max() > 0.05
    if name.startswith("tied"):
        assert merged.config.tie_word_embeddings is False
        assert any("weight of its own" in note for note in result.notes)


def test_the_merge_is_that_of_peft(tmp_path: Path, peft: Any) -> None:
    model = llama()
    base = save_model(model, tmp_path / "base")
    adapter = save_peft(model, tmp_path / "a")
    merge(base, [adapter], tmp_path / "merged")
    with quietly():
        theirs = peft.PeftModel.from_pretrained(llama(), adapter).merge_and_unload().state_dict()
    ours = load_model(tmp_path / "merged").state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice", [None, Energy(1)])
def test_adapters_of_different_ranks_become_one(tmp_path: Path, choice: Any) -> None:
    model = llama()
    one = save_peft(model, tmp_path / "1", seed=1, r=4)
    two = save_peft(model, tmp_path / "2", seed=2, r=3, use_rslora=True, target_modules=["q_proj", "o_proj"])
    result = merge_adapters([one, two], tmp_path / "out", [0.5, -2.0], choice)
    total = {name: 0.5 * delta for name, delta in deltas(one).items()}
    for name, delta in deltas(two).items():
        total[name] = total.get(name, 0) - 2 * delta
    torch.testing.assert_close(with_peft(model, tmp_path / "out"), with_updates(model, total), **CLOSE)
    assert result["model.layers.0.self_attn.q_proj"].rank_after == 7
    assert result["model.layers.0.self_attn.v_proj"].rank_after == 4
    assert result["model.layers.1.self_attn.o_proj"].rank_after == 3


@pytest.mark.parametrize("name", ["biases", "head", "embedding", "bias of B", "patterns"])
def test_the_average_of_equal_adapters_is_the_adapter(tmp_path: Path, name: str) -> None:
    model = llama()
    adapter = save_peft(model, tmp_path / "a", **SETTINGS[name])
    result = average([adapter, adapter, adapter], tmp_path / "out", [1, 2, 5], Energy(1))
    torch.testing.assert_close(with_peft(model, tmp_path / "out"), with_peft(model, adapter), **CLOSE)
    for layer in result.layers:
        assert layer.rank_after == open_store(adapter).info(layer.name).nominal_rank
        assert layer.rank_before == 3 * layer.rank_after


@pytest.mark.parametrize("name", ["biases", "head", "embedding", "bias of B", "patterns"])
def test_a_minus_a_is_the_base(tmp_path: Path, name: str) -> None:
    model = llama()
    adapter = save_peft(model, tmp_path / "a", **SETTINGS[name])
    result = subtract(adapter, adapter, tmp_path / "out")
    torch.testing.assert_close(with_peft(model, tmp_path / "out"), logits(model), **CLOSE)
    assert {layer.rank_after for layer in result.layers} == {1}
    assert result.total.norm == 0


def test_a_difference_of_adapters(tmp_path: Path) -> None:
    model = gpt2()
    one, two = (save_peft(model, tmp_path / str(s), seed=s, target_modules=GPT, fan_in_fan_out=True) for s in (1, 2))
    subtract(one, two, tmp_path / "out")
    first, second = deltas(one), deltas(two)
    expected = with_updates(model, {name: first[name] - second[name] for name in first})
    torch.testing.assert_close(with_peft(model, tmp_path / "out"), expected, **CLOSE)


def tuned_from(model: Any, scale: float = 0.05, seed: int = 8) -> Any:
    """The same model with every weight moved."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=source))
    return model


@pytest.mark.parametrize("make", [llama, lambda: llama(tie=True), gpt2], ids=["llama", "tied llama", "gpt2"])
@pytest.mark.parametrize("embeddings", ["whole", "low-rank"])
def test_extraction_at_full_rank_gives_the_tuned_model(tmp_path: Path, make: Any, embeddings: Any) -> None:
    base, tuned = save_model(make(), tmp_path / "base"), save_model(tuned_from(make()), tmp_path / "tuned")
    result = extract(tuned, Energy(1), tmp_path / "out", base, embeddings=embeddings)
    expected = logits(load_model(tuned))
    torch.testing.assert_close(with_peft(load_model(base), tmp_path / "out"), expected, **CLOSE)
    assert (expected - logits(load_model(base))).abs().max() > 0.1
    assert result.skipped == ()
    assert result.total.relative_error < 1e-5


def test_a_truncated_extraction(tmp_path: Path) -> None:
    model, moved = llama(), tuned_from(llama())
    base, tuned = save_model(model, tmp_path / "base"), save_model(moved, tmp_path / "tuned")
    extract(tuned, Rank(3), tmp_path / "out", base)
    before, after = model.state_dict(), moved.state_dict()
    mixed = llama()
    with torch.no_grad():
        for name, parameter in mixed.named_parameters():
            change = after[name] - before[name]
            low = parameter.ndim == 2 and "embed" not in name
            parameter.add_(cut(change, 3) if low else change)
    torch.testing.assert_close(with_peft(model, tmp_path / "out"), logits(mixed), **CLOSE)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_is_extracted_from_a_merge_is_the_adapter(tmp_path: Path, make: Any) -> None:
    model = make()
    base = save_model(model, tmp_path / "base")
    targets = {"target_modules": GPT, "fan_in_fan_out": True} if make is gpt2 else {}
    adapter = save_peft(model, tmp_path / "a", **targets)
    merge(base, [adapter], tmp_path / "merged")
    result = extract(tmp_path / "merged", Energy(1 - 1e-9), tmp_path / "out", base)
    assert {layer.rank_after for layer in result.layers} == {4}
    assert result.carried == ()
    found, truth = deltas(tmp_path / "out"), deltas(adapter)
    assert found.keys() == truth.keys()
    for name, delta in truth.items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=1e-5 * float(delta.abs().max()))
    torch.testing.assert_close(with_peft(model, tmp_path / "out"), with_peft(model, adapter), **CLOSE)


def test_one_bias_goes_along_as_a_bias(tmp_path: Path) -> None:
    """Beside a low-rank weight, and where the weight of its layer did not change."""
    tensors = {k: v.clone() for k, v in llama().state_dict().items()}
    base = save_model(llama(), tmp_path / "base")
    layer = "model.layers.0.self_attn."
    tensors[layer + "q_proj.weight"] += 0.1
    tensors[layer + "q_proj.bias"] += 0.2
    tensors[layer + "v_proj.bias"] -= 0.3
    tuned = save_model(llama(), tmp_path / "tuned")
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    result = extract(tuned, Rank(1), tmp_path / "out", base)
    assert [one.removeprefix("base_model.model." + layer) for one in result.carried] == [
        "q_proj.base_layer.bias",
        "v_proj.bias",
    ]
    assert [one.name for one in result.layers] == [layer + "q_proj"]
    torch.testing.assert_close(with_peft(llama(), tmp_path / "out"), logits(load_model(tuned)), **CLOSE)
