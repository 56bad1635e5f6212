"""``extract`` on files: which matrices become low-rank, what goes along whole, what is listed. No PEFT needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import PREFIX, linear, normal, write_adapter, write_checkpoint, write_shards
from makers import planted
from safetensors.torch import load_file
from torch import Tensor

from rankscope.errors import FormatError, RankscopeError
from rankscope.formats.file_io import TensorFile
from rankscope.formats.store import open as open_store
from rankscope.formats.store import write_updates
from rankscope.surgery.extract import extract
from rankscope.surgery.merge import merge
from rankscope.surgery.truncate import AboveNoise, Budget, Energy, Rank

CONFIG = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix(PREFIX): tensor for key, tensor in found.items()}


def dense(folder: Path, name: str) -> np.ndarray:
    found: np.ndarray = open_store(folder)[name].dense().double().numpy()
    return found


def low(shape: tuple[int, int], sigma: list[float], seed: int) -> Tensor:
    update = planted(shape, sigma, seed)
    return (update.B @ update.A).float()


BASE = {
    "model.embed_tokens.weight": normal(11, 6, seed=1),
    "model.layers.0.q_proj.weight": normal(5, 6, seed=2),
    "model.layers.0.q_proj.bias": normal(5, seed=3),
    "model.layers.0.v_proj.weight": normal(5, 6, seed=4),
    "model.layers.0.o_proj.weight": normal(6, 5, seed=5),
    "model.norm.weight": normal(6, seed=6),
    "lm_head.weight": normal(11, 6, seed=7),
}
CHANGE = {
    "model.embed_tokens.weight": low((11, 6), [1.0], 11),
    "model.layers.0.q_proj.weight": low((5, 6), [3.0, 1.0, 0.5], 12),
    "model.layers.0.q_proj.bias": normal(5, seed=13),
    "model.layers.0.o_proj.weight": low((6, 5), [2.0, 1.5], 14),
    "model.norm.weight": normal(6, seed=15),
    "lm_head.weight": low((11, 6), [2.0], 16),
}
TUNED = {name: weight + CHANGE.get(name, 0.0) for name, weight in BASE.items()}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", BASE, CONFIG).parent
    return base, write_checkpoint(tmp_path / "tuned" / "model.safetensors", TUNED, CONFIG).parent


def test_the_folder_that_is_written(tmp_path: Path, models: tuple[Path, Path]) -> None:
    base, tuned = models
    (tuned / "tokenizer.json").write_text("{}")
    result = extract(tuned, Rank(2), tmp_path / "out", base)
    names = ["lm_head", "model.layers.0.o_proj", "model.layers.0.q_proj"]
    assert [layer.name for layer in result.layers] == names  # v_proj did not change
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "rankscope.json", "tokenizer.json",
    ]  # fmt: skip
    config = config_of(tmp_path / "out")
    assert sorted(config["target_modules"]) == names
    assert sorted(config["modules_to_save"]) == ["model.embed_tokens", "model.norm"]
    assert (config["bias"], config["task_type"], config["fan_in_fan_out"]) == ("all", "CAUSAL_LM", False)
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {"^lm_head": 1})
    found = tensors_of(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(found[name], TUNED[name])
    assert torch.equal(found["model.layers.0.q_proj.base_layer.bias"], TUNED["model.layers.0.q_proj.bias"])
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert result.skipped == ()
    assert json.loads((tmp_path / "out" / "rankscope.json").read_text()) == result.to_json()


def test_the_report_is_relative_to_the_exact_energy(tmp_path: Path, models: tuple[Path, Path]) -> None:
    base, tuned = models
    layer = extract(tuned, Rank(1), tmp_path / "out", base)["model.layers.0.q_proj"]
    assert layer.norm == pytest.approx(np.sqrt(9 + 1 + 0.25), rel=1e-5)
    assert layer.retained == pytest.approx(9 / 10.25, rel=1e-5)
    assert layer.error == pytest.approx(np.sqrt(1.25), rel=1e-5)
    assert (layer.rank_before, layer.rank_after, layer.parameters_before, layer.parameters_after) == (None, 1, 30, 11)
    difference = TUNED["model.layers.0.q_proj.weight"] - BASE["model.layers.0.q_proj.weight"]
    assert np.linalg.norm(difference.double().numpy() - dense(tmp_path / "out", layer.name)) == pytest.approx(
        layer.error, rel=1e-6
    )


def test_embeddings_can_be_low_rank(tmp_path: Path, models: tuple[Path, Path]) -> None:
    base, tuned = models
    result = extract(tuned, Energy(0.9999), tmp_path / "out", base, embeddings="low-rank")
    assert result["model.embed_tokens"].kind == "embedding"
    assert result["model.embed_tokens"].rank_after == 1
    found = tensors_of(tmp_path / "out")
    assert found["model.embed_tokens.lora_embedding_A"].shape == (1, 11)
    assert "model.embed_tokens.weight" not in found
    np.testing.assert_allclose(
        dense(tmp_path / "out", "model.embed_tokens"), CHANGE["model.embed_tokens.weight"].numpy(), atol=1e-5
    )


@pytest.mark.parametrize("embeddings", ["whole", "low-rank"])
def test_a_tied_output_layer_follows_its_embedding(tmp_path: Path, embeddings: Any) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = [{k: v for k, v in model.items() if k != "lm_head.weight"} for model in (BASE, TUNED)]
    base, tuned = (
        write_checkpoint(tmp_path / name / "model.safetensors", model, config).parent
        for name, model in zip(("base", "tuned"), tensors, strict=True)
    )
    result = extract(tuned, Energy(0.9999), tmp_path / "out", base, embeddings=embeddings)
    found = tensors_of(tmp_path / "out")
    if embeddings == "whole":
        assert torch.equal(found["lm_head.weight"], TUNED["model.embed_tokens.weight"])
        assert "lm_head" in config_of(tmp_path / "out")["modules_to_save"]
    else:
        assert torch.equal(found["lm_head.lora_B.weight"], found["model.embed_tokens.lora_embedding_A"].T)
        assert torch.equal(found["lm_head.lora_A.weight"], found["model.embed_tokens.lora_embedding_B"].T)
        assert {"lm_head", "model.embed_tokens"} < {layer.name for layer in result.layers}
        assert {"lm_head", "model.embed_tokens"} < set(config_of(tmp_path / "out")["target_modules"])


def test_a_merge_gives_its_adapter_back_and_nothing_else(tmp_path: Path) -> None:
    base = write_shards(tmp_path / "base", {"a.safetensors": dict(list(BASE.items())[:3]),
                                            "b.safetensors": dict(list(BASE.items())[3:])})  # fmt: skip
    adapter = write_adapter(tmp_path / "a", linear("model.layers.0.q_proj", out=5, n=6))
    merge(base, [adapter], tmp_path / "merged")
    result = extract(tmp_path / "merged", AboveNoise(), tmp_path / "out", base)
    assert [(layer.name, layer.rank_after) for layer in result.layers] == [("model.layers.0.q_proj", 2)]
    assert result.carried == result.skipped == ()
    np.testing.assert_allclose(
        dense(tmp_path / "out", "model.layers.0.q_proj"), dense(adapter, "model.layers.0.q_proj"), atol=1e-5
    )


def test_half_precision_noise_is_left_out(tmp_path: Path) -> None:
    W = normal(120, 90, seed=1).bfloat16()
    tuned = (W.float() + low((120, 90), [4.0, 3.0], 3)).bfloat16()
    base = write_checkpoint(tmp_path / "base.safetensors", {"q.weight": W})
    moved = write_checkpoint(tmp_path / "tuned.safetensors", {"q.weight": tuned})
    assert extract(moved, AboveNoise(), tmp_path / "1", base)["q"].rank_after == 2
    assert (extract(moved, Energy(0.9999), tmp_path / "2", base)["q"].rank_after or 0) > 10


def test_budgets_are_shared_out_over_layers(tmp_path: Path, models: tuple[Path, Path]) -> None:
    base, tuned = models
    result = extract(tuned, Budget(3 * 11 + 17), tmp_path / "out", base)
    # σ² 9 | 4, 2.25 | 4 (of 17 parameters): one rank each is given, the fourth goes to the 2.25 of o_proj.
    assert {layer.name.rpartition(".")[2]: layer.rank_after for layer in result.layers} == {
        "lm_head": 1, "o_proj": 2, "q_proj": 1,
    }  # fmt: skip


def test_conv1d_and_convolutions(tmp_path: Path) -> None:
    base = {
        "h.0.attn.c_attn.weight": normal(4, 12, seed=1),
        "h.0.attn.c_proj.weight": normal(4, 4, seed=2),
        "conv.weight": normal(5, 3, 2, 2, seed=3),
        "depthwise.weight": normal(6, 1, 3, 3, seed=4),
    }
    change = {
        "h.0.attn.c_attn.weight": low((12, 4), [2.0], 5).T,
        "h.0.attn.c_proj.weight": low((4, 4), [3.0], 6).T,
        "conv.weight": low((5, 12), [1.0, 0.5], 7).reshape(5, 3, 2, 2),
        "depthwise.weight": normal(6, 1, 3, 3, seed=8),
    }
    tuned = {name: weight + change[name] for name, weight in base.items()}
    files = [
        write_checkpoint(tmp_path / name / "model.safetensors", tensors, {"model_type": "gpt2"}).parent
        for name, tensors in (("base", base), ("tuned", tuned))
    ]
    extract(files[1], Energy(0.9999), tmp_path / "out", files[0])
    np.testing.assert_allclose(dense(tmp_path / "out", "h.0.attn.c_attn"), low((12, 4), [2.0], 5), atol=1e-5)
    np.testing.assert_allclose(dense(tmp_path / "out", "h.0.attn.c_proj"), low((4, 4), [3.0], 6), atol=1e-5)
    found = tensors_of(tmp_path / "out")
    assert found["conv.lora_A.weight"].shape == (2, 3, 2, 2)
    assert found["conv.lora_B.weight"].shape == (5, 2, 1, 1)
    assert torch.equal(found["depthwise.weight"], tuned["depthwise.weight"])
    config = config_of(tmp_path / "out")
    assert config["fan_in_fan_out"] is True
    assert config["modules_to_save"] == ["depthwise"]


def moved(base: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: weight + 1 if name in names else weight for name, weight in base.items()}


def of(tmp_path: Path, base: dict[str, Tensor], tuned: dict[str, Tensor]) -> Any:
    one = write_checkpoint(tmp_path / "base.safetensors", base)
    return extract(write_checkpoint(tmp_path / "tuned.safetensors", tuned), Rank(1), tmp_path / "out", one)


def test_a_bias_whose_layer_did_not_change(tmp_path: Path) -> None:
    base = {"a.weight": normal(3, 4), "b.weight": normal(3, 4), "b.bias": normal(3)}
    result = of(tmp_path, base, moved(base, "a.weight", "b.bias"))
    assert result.carried == (f"{PREFIX}b.bias",)
    assert config_of(tmp_path / "out")["bias"] == "all"
    assert config_of(tmp_path / "out")["modules_to_save"] is None


def test_what_peft_cannot_carry_is_listed(tmp_path: Path) -> None:
    base = {
        "a.weight": normal(3, 4),
        "token": normal(4),
        "block.position": normal(4),
        "block.fc.weight": normal(4, 4),
        "a.scale": normal(3),
        "gone.weight": normal(2, 2),
    }
    tuned = moved(base, "a.weight", "token", "block.position", "a.scale")
    del tuned["gone.weight"]
    result = of(tmp_path, base, tuned)
    assert {one.name for one in result.skipped} == {"token", "block.position", "a.scale", "gone.weight"}
    assert result.carried == ()


def test_a_module_whose_path_ends_another_takes_it_along(tmp_path: Path) -> None:
    """PEFT compares ends: norm is found in pre_norm too, and asks for its weights when it loads."""
    base = {"a.weight": normal(3, 4), "norm.weight": normal(3), "block.pre_norm.weight": normal(3, seed=1)}
    result = of(tmp_path, base, moved(base, "a.weight", "norm.weight"))
    assert set(result.carried) == {f"{PREFIX}norm.weight", f"{PREFIX}block.pre_norm.weight"}
    other = {"a.weight": normal(3, 4), "head.scale": normal(3), "big.head.weight": normal(3, 4)}
    (tmp_path / "2").mkdir()
    result = of(tmp_path / "2", other, moved(other, "a.weight", "head.scale", "big.head.weight"))
    assert [(one.name, "low-rank big.head" in one.reason) for one in result.skipped] == [("head.scale", True)]


def test_new_modules_and_grown_embeddings_go_along_whole(tmp_path: Path) -> None:
    base = {"wte.weight": normal(11, 6), "q.weight": normal(5, 6)}
    tuned = {
        "wte.weight": torch.cat([normal(11, 6), normal(2, 6, seed=9)]),
        "q.weight": normal(5, 6, seed=3),
        "score.weight": normal(2, 5, seed=4),
    }
    result = of(tmp_path, base, tuned)
    assert set(result.carried) == {f"{PREFIX}wte.weight", f"{PREFIX}score.weight"}
    assert result.notes == ("wte has 13 rows, 11 in the base: resize the base's embeddings before loading the adapter",)


def test_a_file_of_updates(tmp_path: Path) -> None:
    """As a study's run has it: matrices by module, the rest by parameter, all in float32 and (out, in)."""
    updates = {
        "model.layers.0.q_proj": CHANGE["model.layers.0.q_proj.weight"],
        "model.layers.0.v_proj": torch.zeros(5, 6),
        "model.embed_tokens": CHANGE["model.embed_tokens.weight"],
        "model.layers.0.q_proj.bias": CHANGE["model.layers.0.q_proj.bias"],
        "model.norm.weight": CHANGE["model.norm.weight"],
    }
    run = tmp_path / "run"
    write_updates(run / "update.safetensors", updates)
    alone = extract(run, Energy(0.9999), tmp_path / "alone")
    assert [layer.name for layer in alone.layers] == ["model.layers.0.q_proj"]
    assert {one.name for one in alone.skipped} == {
        "model.embed_tokens", "model.layers.0.q_proj.bias", "model.norm.weight",
    }  # fmt: skip
    assert all("--base" in one.reason for one in alone.skipped)
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", BASE, CONFIG).parent
    result = extract(run, Energy(0.9999), tmp_path / "out", base)
    assert result.skipped == ()
    found = tensors_of(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        torch.testing.assert_close(found[name], TUNED[name])
    torch.testing.assert_close(found["model.layers.0.q_proj.base_layer.bias"], TUNED["model.layers.0.q_proj.bias"])
    for folder in ("alone", "out"):
        np.testing.assert_allclose(
            dense(tmp_path / folder, "model.layers.0.q_proj"), updates["model.layers.0.q_proj"].numpy(), atol=1e-5
        )


def test_updates_of_conv1d_layers_are_there_turned_already(tmp_path: Path) -> None:
    base = write_checkpoint(
        tmp_path / "base" / "model.safetensors",
        {"h.0.c_fc.weight": normal(4, 16), "h.0.q.weight": normal(3, 4)},
        {"model_type": "gpt2"},
    ).parent
    change = low((16, 4), [1.0], 1)
    write_updates(tmp_path / "update.safetensors", {"h.0.c_fc": change, "h.0.q": torch.ones(3, 4)})
    extract(tmp_path / "update.safetensors", Rank(1), tmp_path / "out", base)
    np.testing.assert_allclose(dense(tmp_path / "out", "h.0.c_fc"), change.numpy(), atol=1e-5)
    assert config_of(tmp_path / "out")["fan_in_fan_out"] is True


def test_one_pair_of_tensors_is_read_at_a_time(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices are read once, as pairs one after the other; a budget reads them twice."""
    seen: list[str] = []
    original = TensorFile.read_rows

    def rows(self: TensorFile, name: str, start: int, stop: int) -> Tensor:
        assert (start, stop) == (0, self.infos[name].shape[0])  # small ones are one block
        seen.append(name)
        return original(self, name, start, stop)

    monkeypatch.setattr(TensorFile, "read_rows", rows)
    base, tuned = models
    extract(tuned, Rank(1), tmp_path / "1", base)
    matrices = [name for name in seen if "proj.weight" in name]
    assert matrices[::2] == matrices[1::2]
    assert len(matrices) == 2 * 3
    seen.clear()
    extract(tuned, Budget(1000), tmp_path / "2", base)
    assert len([name for name in seen if "o_proj.weight" in name]) == 4


WRONG: dict[str, tuple[dict[str, Tensor], dict[str, Tensor] | None, str]] = {
    "equal": (BASE, BASE, "no matrix that can be low-rank differs from the base"),
    "no base": (TUNED, None, "say with --base"),
    "another base": (TUNED, {"x.weight": normal(2, 2)}, "shares no weight with the base"),
    "only norms": (moved(BASE, "model.norm.weight"), BASE, "no matrix that can be low-rank"),
    "not finite": (
        {**BASE, "model.layers.0.q_proj.weight": torch.full((5, 6), torch.inf)},
        BASE,
        "q_proj: .*30 values",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_extracted(tmp_path: Path, name: str) -> None:
    tuned, base, message = WRONG[name]
    moved_file = write_checkpoint(tmp_path / "tuned.safetensors", tuned)
    base_file = write_checkpoint(tmp_path / "base.safetensors", base) if base else None
    with pytest.raises(RankscopeError, match=message) as caught:
        extract(moved_file, Rank(1), tmp_path / "out", base_file)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_no_full_fine_tuning(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is no full fine-tuning"):
        extract(write_adapter(tmp_path / "a"), Rank(1), tmp_path / "out")


@pytest.mark.parametrize("shapes", [((), ()), ((), (3,)), ((3,), ()), ((), (3, 2))])
def test_weights_that_are_single_numbers(tmp_path: Path, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Such as the learned temperature of a CLIP: they have no rows, and go along whole."""
    base, tuned = (
        write_checkpoint(tmp_path / name, {"q.weight": normal(5, 7, seed=i), "t.weight": normal(*shape, seed=i)})
        for i, (name, shape) in enumerate(zip(("base.safetensors", "tuned.safetensors"), shapes, strict=True))
    )
    result = extract(tuned, Rank(1), tmp_path / "out", base)
    assert result.carried == (f"{PREFIX}t.weight",)


@pytest.mark.parametrize("same", [True, False])
def test_eight_bit_weights_go_along_where_they_changed(tmp_path: Path, same: bool) -> None:
    base, tuned = (
        write_checkpoint(
            tmp_path / f"{i}.safetensors",
            {"q.weight": normal(5, 7, seed=i), "k.weight": normal(3, 2, seed=0 if same else i).to(torch.float8_e4m3fn)},
        )
        for i in range(2)
    )
    result = extract(tuned, Rank(1), tmp_path / "out", base)
    assert result.carried == (() if same else (f"{PREFIX}k.weight",))
