"""``resize`` on files: what is written, what goes along, what is refused. No PEFT needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import PREFIX, linear, normal, write_adapter
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rankscope.errors import ConfigError, FormatError, NonFiniteError, RankscopeError
from rankscope.formats.store import open as open_store
from rankscope.surgery.resize import resize
from rankscope.surgery.surgery_result import SurgeryResult
from rankscope.surgery.truncate import AboveNoise, Budget, Energy, Rank


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


def dense(folder: Path, name: str) -> np.ndarray:
    update = open_store(folder)[name]
    found: np.ndarray = update.dense().double().numpy()
    return found


def cut(matrix: np.ndarray, k: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    found: np.ndarray = u[:, :k] * s[:k] @ vt[:k]
    return found


def test_the_folder_that_is_written(tmp_path: Path) -> None:
    tensors = {**linear("h.0.q", r=4), **linear("h.1.q", r=4, seed=1), **linear("h.1.v", r=2, seed=2)}
    adapter = write_adapter(
        tmp_path / "a", tensors, use_rslora=True, lora_alpha=6, loftq_config={}, eva_config={"rho": 2}
    )
    for name in ("tokenizer.json", "chat_template.jinja", "training_args.bin", "README.md"):
        (adapter / name).write_text(name)
    result = resize(adapter, Rank(3), tmp_path / "out", command="rankscope resize …")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "rankscope.json", "tokenizer.json",
    ]  # fmt: skip
    config = config_of(tmp_path / "out")
    assert config["not_invented_yet"] == {"x": [1]}
    assert config["target_modules"] == ["q"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^h\.1\.v": 2}
    assert config["init_lora_weights"] is True
    assert not {"eva_config", "loftq_config"} & config.keys()
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt", "rankscope": "resize", "rankscope_command": "rankscope resize …"
        }  # fmt: skip
    written = json.loads((tmp_path / "out" / "rankscope.json").read_text())
    assert written == result.to_json()
    assert written["schema"] == "rankscope.resize/1"
    assert SurgeryResult.from_json(written) == result
    for name in ("h.0.q", "h.1.q"):
        np.testing.assert_allclose(dense(tmp_path / "out", name), cut(dense(adapter, name), 3), atol=1e-5)
    np.testing.assert_allclose(dense(tmp_path / "out", "h.1.v"), dense(adapter, "h.1.v"), atol=1e-5)


def test_the_report_is_exact(tmp_path: Path) -> None:
    tensors = {key: value.bfloat16() for key, value in {**linear("a.q", r=4), **linear("b.q", r=4, seed=1)}.items()}
    adapter = write_adapter(tmp_path / "a", tensors)
    result = resize(adapter, Rank(2), tmp_path / "out")
    before = {name: open_store(adapter)[name] for name in ("a.q", "b.q")}
    after = {name: open_store(tmp_path / "out")[name] for name in ("a.q", "b.q")}
    for layer in result.layers:
        truth = before[layer.name].left @ before[layer.name].right  # type: ignore[attr-defined]
        moved = after[layer.name].left @ after[layer.name].right  # type: ignore[attr-defined]
        s = np.linalg.svd(truth.numpy(), compute_uv=False)
        assert layer.error == pytest.approx(float((truth - moved).norm()), rel=1e-9)
        assert layer.error > np.sqrt((s[2:] ** 2).sum())  # rounding to bfloat16 adds to what was cut off
        assert layer.norm == pytest.approx(np.sqrt((s**2).sum()))
        assert layer.retained == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
        assert (layer.rank_before, layer.rank_after) == (4, 2)
        assert (layer.parameters_before, layer.parameters_after) == (4 * 12, 2 * 12)
    total = result.total
    assert total.error == pytest.approx(np.sqrt(sum(layer.error**2 for layer in result.layers)))
    assert total.norm == pytest.approx(np.sqrt(sum(layer.norm**2 for layer in result.layers)))
    kept = sum(layer.retained * layer.norm**2 for layer in result.layers) / total.norm**2
    assert total.retained == pytest.approx(kept)
    assert (total.parameters_before, total.parameters_after) == (96, 48)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_kept_or_chosen(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = write_adapter(tmp_path / "a", {key: value.to(dtype) for key, value in linear("q").items()})
    resize(adapter, Rank(1), tmp_path / "same")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "same").values()} == {dtype}
    resize(adapter, Rank(1), tmp_path / "other", dtype=torch.float16)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "other").values()} == {torch.float16}


def test_eight_bit_factors_are_written_in_float32(tmp_path: Path) -> None:
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in linear("q").items()}
    resize(write_adapter(tmp_path / "a", tensors), Energy(1), tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float32}
    np.testing.assert_allclose(dense(tmp_path / "out", "q"), dense(tmp_path / "a", "q"), rtol=1e-5, atol=1e-5)


def test_embeddings_and_convolutions_keep_their_kind(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}emb.lora_embedding_A": normal(3, 11, seed=1),
        f"{PREFIX}emb.lora_embedding_B": normal(6, 3, seed=2),
        f"{PREFIX}conv.lora_A.weight": normal(3, 4, 3, 2, seed=3),
        f"{PREFIX}conv.lora_B.weight": normal(5, 3, 1, 1, seed=4),
        f"{PREFIX}line.lora_A.weight": normal(3, 4, 3, seed=5),
        f"{PREFIX}line.lora_B.weight": normal(5, 3, 1, seed=6),
    }
    adapter = write_adapter(tmp_path / "a", tensors)
    result = resize(adapter, Rank(2), tmp_path / "out")
    shapes = {key.removeprefix(PREFIX): tuple(tensor.shape) for key, tensor in tensors_of(tmp_path / "out").items()}
    assert shapes == {
        "emb.lora_embedding_A": (2, 11), "emb.lora_embedding_B": (6, 2),
        "conv.lora_A.weight": (2, 4, 3, 2), "conv.lora_B.weight": (5, 2, 1, 1),
        "line.lora_A.weight": (2, 4, 3), "line.lora_B.weight": (5, 2, 1),
    }  # fmt: skip
    for name in ("emb", "conv", "line"):
        np.testing.assert_allclose(dense(tmp_path / "out", name), cut(dense(adapter, name), 2), atol=1e-5)
    assert {layer.name: layer.kind for layer in result.layers} == {"emb": "embedding", "conv": "conv", "line": "conv"}
    assert result["conv"].parameters_after == 2 * (5 + 24)


@pytest.mark.parametrize("choice", [Rank(2), Budget(4 * 22 + 12)], ids=str)
def test_convolutions_with_groups_go_along_as_they_are(tmp_path: Path, choice: Rank | Budget) -> None:
    tensors = {
        f"{PREFIX}conv.lora_A.weight": normal(4, 4, 2, 2, seed=3),
        f"{PREFIX}conv.lora_B.weight": normal(12, 2, 1, 1, seed=4),
        **linear("q", r=3),
    }
    adapter = write_adapter(tmp_path / "a", tensors, lora_alpha=6)
    result = resize(adapter, choice, tmp_path / "out")
    np.testing.assert_allclose(dense(tmp_path / "out", "conv"), dense(adapter, "conv"), rtol=1e-5, atol=1e-6)
    assert tensors_of(tmp_path / "out")[f"{PREFIX}conv.lora_B.weight"].shape == (12, 2, 1, 1)
    assert result["conv"].rank_after == 4
    assert result["conv"].parameters_after == 4 * (6 + 16)
    assert result["q"].rank_after == (2 if isinstance(choice, Rank) else 1)
    assert "convolution with groups" in result.notes[-1]


def test_dora_keeps_its_magnitude_and_says_so(tmp_path: Path) -> None:
    m = normal(5, seed=9)
    adapter = write_adapter(tmp_path / "a", {**linear("q", r=3), f"{PREFIX}q.lora_magnitude_vector": m}, use_dora=True)
    result = resize(adapter, Rank(1), tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[f"{PREFIX}q.lora_magnitude_vector"], m)
    assert config_of(tmp_path / "out")["use_dora"] is True
    assert any("the product scale·B·A was resized, the magnitude is as it was" in note for note in result.notes)
    np.testing.assert_allclose(dense(tmp_path / "out", "q"), cut(dense(adapter, "q"), 1), atol=1e-5)


def test_the_bias_of_b_gets_the_scale_that_the_configuration_had(tmp_path: Path) -> None:
    bias = normal(5, seed=9)
    adapter = write_adapter(
        tmp_path / "a", {**linear("q"), f"{PREFIX}q.lora_B.bias": bias}, lora_bias=True, lora_alpha=6
    )
    resize(adapter, Rank(1), tmp_path / "out")
    torch.testing.assert_close(tensors_of(tmp_path / "out")[f"{PREFIX}q.lora_B.bias"], 3 * bias)


def test_a_bias_of_b_that_its_scale_makes_too_large(tmp_path: Path) -> None:
    tensors = {key: value.half() for key, value in linear("q").items()}
    tensors[f"{PREFIX}q.lora_B.bias"] = torch.full((5,), 3e4, dtype=torch.float16)
    resize(write_adapter(tmp_path / "fits", tensors, lora_bias=True, lora_alpha=4), Rank(1), tmp_path / "out")
    large = write_adapter(tmp_path / "a", tensors, lora_bias=True, lora_alpha=8)
    with pytest.raises(NonFiniteError, match=r"layer q: scale · lora_B\.bias \(5,\) holds 5 values"):
        resize(large, Rank(1), tmp_path / "again")


def test_a_bias_of_b_in_eight_bits(tmp_path: Path) -> None:
    bias = torch.tensor([1.0, -2.0, 0.5, 4.0, 0.0])
    tensors = {**linear("q"), f"{PREFIX}q.lora_B.bias": bias.to(torch.float8_e4m3fn)}
    resize(write_adapter(tmp_path / "a", tensors, lora_bias=True), Rank(1), tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[f"{PREFIX}q.lora_B.bias"], 4 * bias)


@pytest.mark.parametrize("live", ["mine", "default"])
def test_a_head_is_found_under_any_live_name(tmp_path: Path, live: str) -> None:
    """The factors' keys name no adapter, so nothing but the reader's rule tells what ``mine`` is."""
    tensors = {**linear("q"), f"{PREFIX}score.modules_to_save.{live}.dense.weight": normal(2, 5)}
    adapter = write_adapter(tmp_path / "a", tensors, modules_to_save=["score"])
    assert resize(adapter, Rank(1), tmp_path / "out").carried == (f"{PREFIX}score.dense.weight",)


def test_names_of_a_live_model_become_those_of_a_saved_one(tmp_path: Path) -> None:
    tensors = {
        **{key.replace(".weight", ".mine.weight"): value for key, value in linear("q").items()},
        f"{PREFIX}score.modules_to_save.mine.weight": normal(2, 5),
        f"{PREFIX}score.original_module.weight": normal(2, 5, seed=1),
        f"{PREFIX}q.base_layer.bias": normal(5),
    }
    adapter = write_adapter(tmp_path / "a", tensors, modules_to_save=["score"], bias="all")
    result = resize(adapter, Rank(1), tmp_path / "out")
    keys = {key.removeprefix(PREFIX) for key in tensors_of(tmp_path / "out")}
    assert keys == {"q.lora_A.weight", "q.lora_B.weight", "score.weight", "q.base_layer.bias"}
    assert set(result.carried) == {f"{PREFIX}score.weight", f"{PREFIX}q.base_layer.bias"}
    assert torch.equal(tensors_of(tmp_path / "out")[f"{PREFIX}score.weight"], normal(2, 5))


def test_a_layer_that_was_never_trained_gets_rank_1_of_zeros(tmp_path: Path) -> None:
    tensors = {**linear("q", r=3), **linear("k", r=3, seed=1)}
    tensors[f"{PREFIX}k.lora_B.weight"] = torch.zeros(5, 3)
    adapter = write_adapter(tmp_path / "a", tensors)
    result = resize(adapter, Energy(0.5), tmp_path / "out")
    layer = result["k"]
    assert (layer.rank_after, layer.norm, layer.error, layer.relative_error, layer.retained) == (1, 0, 0, 0, 1)
    assert not any(tensor.any() for key, tensor in tensors_of(tmp_path / "out").items() if ".k." in key)
    assert result.notes[-1] == "1 layer changes nothing and was given rank 1 of zeros: k"


def test_a_budget_beats_the_uniform_rank_of_its_size(tmp_path: Path) -> None:
    tensors = {}
    for i in range(4):
        tensors.update({key: value * 2.0**i for key, value in linear(f"h.{i}.q", r=6, seed=i).items()})
    adapter = write_adapter(tmp_path / "a", tensors)
    uniform = resize(adapter, Rank(3), tmp_path / "uniform")
    shared = resize(adapter, Budget(uniform.total.parameters_after), tmp_path / "shared")
    assert shared.total.parameters_after <= uniform.total.parameters_after
    assert shared.total.error < 0.7 * uniform.total.error
    with pytest.raises(ConfigError, match=r"a budget of 47 parameters is below the 48 of rank 1 in each of 4 layers"):
        resize(adapter, Budget(47), tmp_path / "none")


def test_a_run_of_a_study_and_a_bin_file_are_read(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "run" / "adapter")
    resize(tmp_path / "run", Rank(1), tmp_path / "out")
    torch.save(tensors_of(adapter), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    resize(adapter, Rank(1), tmp_path / "again")
    found, again = (tensors_of(tmp_path / name) for name in ("out", "again"))
    assert found.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in found.items())


def test_an_adapter_that_moved_its_base_becomes_plain(tmp_path: Path) -> None:
    """PiSSA with its initial factors: the learned update is s(BA − B₀A₀), on the base as published."""
    adapter = write_adapter(tmp_path / "a", linear("q", r=2), init_lora_weights="pissa")
    with pytest.raises(FormatError, match="pissa subtracted an initial product"):
        resize(adapter, Rank(2), tmp_path / "out")
    start = write_adapter(adapter / "initial", linear("q", r=2, seed=5), init_lora_weights="pissa")
    result = resize(adapter, Energy(1), tmp_path / "out")
    factors, initial = tensors_of(adapter), tensors_of(start)
    A, B = f"{PREFIX}q.lora_A.weight", f"{PREFIX}q.lora_B.weight"
    learned = 4 * (factors[B] @ factors[A] - initial[B] @ initial[A])
    np.testing.assert_allclose(dense(tmp_path / "out", "q"), learned.numpy(), atol=1e-4)
    assert config_of(tmp_path / "out")["init_lora_weights"] is True
    assert (result["q"].rank_before, result["q"].parameters_before, result["q"].rank_after) == (4, 24, 4)


REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "another method": ({}, {"peft_type": "LOHA"}, "LOHA"),
    "no method": ({}, {"peft_type": ...}, "peft_type"),
    "starts that move the base": ({}, {"init_lora_weights": "olora"}, "olora subtracted an initial product"),
    "a random update": ({}, {"monteclora_config": {"num_samples": 8}}, "monteclora_config is set"),
    "odd bias": ({}, {"bias": "some"}, "bias is 'some', not one of none, lora_only, all"),
    "odd modules": ({}, {"modules_to_save": "score"}, "modules_to_save is no list"),
    "unknown factor": ({f"{PREFIX}block.q.lora_C.weight": normal(2, 2)}, {}, "lora_C.weight, which is not known"),
    "magnitude alone": ({f"{PREFIX}block.k.lora_magnitude_vector": normal(5)}, {"use_dora": True}, "layer block.k"),
    "not finite": ({f"{PREFIX}block.q.lora_A.weight": torch.full((2, 7), torch.nan)}, {}, "layer block.q.*14 values"),
    "the bias of A": ({f"{PREFIX}block.q.lora_A.bias": normal(2)}, {}, "lora_A.bias, which is not known"),
    "a factor without a leaf": ({f"{PREFIX}block.q.lora_A": normal(2, 7)}, {}, "q.lora_A, which is not known"),
    "a head twice": (
        {f"{PREFIX}score.weight": normal(2), f"{PREFIX}score.modules_to_save.default.weight": -normal(2)},
        {},
        "score.* and .*score.*, which are one and the same",
    ),
    "a bias of B twice": (
        {f"{PREFIX}block.q.lora_B.bias": normal(5), f"{PREFIX}block.q.lora_B.default.bias": -normal(5)},
        {},
        "lora_B.*bias and .*, which are one and the same",
    ),
    "a bias of B that is too long": (
        {f"{PREFIX}block.q.lora_B.bias": normal(7)},
        {},
        r"lora_B.bias is \(7,\) of float32, where floating-point numbers \(5,\) are needed",
    ),
    "a bias of B for all": ({f"{PREFIX}block.q.lora_B.bias": normal(1)}, {}, r"lora_B.bias is \(1,\)"),
    "a bias of B in whole numbers": (
        {f"{PREFIX}block.q.lora_B.bias": torch.ones(5, dtype=torch.int64)},
        {},
        r"lora_B.bias is \(5,\) of int64",
    ),
    "a bias of B that is none": (
        {f"{PREFIX}block.q.lora_B.bias": torch.full((5,), torch.nan)},
        {},
        r"layer block.q: scale · lora_B.bias \(5,\) holds 5 values",
    ),
    "half": ({f"{PREFIX}block.k.lora_A.weight": normal(2, 7)}, {}, "half of the pair is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_the_file_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    tensors, config, message = REFUSED[name]
    adapter = write_adapter(tmp_path / "a", {**linear("block.q"), **tensors}, **config)
    with pytest.raises(RankscopeError, match=message) as caught:
        resize(adapter, Rank(1), tmp_path / "out")
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_configuration_that_json_cannot_hold(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", lora_dropout=float("nan"))
    with pytest.raises(FormatError, match=r"out/adapter_config\.json: cannot be written as JSON \(.*\); correct what"):
        resize(adapter, Rank(1), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file or folder"):
        resize(tmp_path / "nowhere", Rank(1), tmp_path / "out")
    store = open_store(write_adapter(tmp_path / "a"))
    resize(store, Rank(1), tmp_path / "out")  # a store is taken as well as a path
    with pytest.raises(ConfigError, match=r"layer block\.q: the noise in a product of float32 factors is not known"):
        resize(store, AboveNoise(), tmp_path / "none")


def test_factors_that_overflow_the_chosen_dtype(tmp_path: Path) -> None:
    tensors = {key: value * 1e6 for key, value in linear("q").items()}
    with pytest.raises(NonFiniteError, match="layer q"):
        resize(write_adapter(tmp_path / "a", tensors), Rank(1), tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_results_of_other_schemas_are_refused(tmp_path: Path) -> None:
    value = resize(write_adapter(tmp_path / "a"), Rank(1), tmp_path / "out").to_json()
    for wrong in ({}, [], {**value, "schema": "rankscope.spectrum/1"}, {**value, "layers": 3}):
        with pytest.raises(FormatError):
            SurgeryResult.from_json(wrong)  # type: ignore[arg-type]
    assert "out" in repr(SurgeryResult.from_json(value))
    with pytest.raises(KeyError):
        SurgeryResult.from_json(value)["nowhere"]
