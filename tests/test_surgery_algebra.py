"""Sums of adapters on files: exact, of any ranks, and refused where the base would be needed. No PEFT needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import PREFIX, linear, normal, write_adapter
from safetensors.torch import load_file
from torch import Tensor

from rankscope.errors import ConfigError, FormatError, NonFiniteError, RankscopeError, ShapeError
from rankscope.formats.store import open as open_store
from rankscope.surgery.algebra import average, merge_adapters, subtract
from rankscope.surgery.truncate import Budget, Energy, Rank


def dense(folder: Path, name: str) -> np.ndarray:
    found: np.ndarray = open_store(folder)[name].dense().double().numpy()
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Ranks 2, 3 and 5, scales 4, 8/√3 and 1; the third has one layer of its own and lacks one."""
    return [
        write_adapter(tmp_path / "1", {**linear("a.q", r=2), **linear("a.v", r=2, seed=1)}),
        write_adapter(tmp_path / "2", {**linear("a.q", r=3, seed=2), **linear("a.v", r=3, seed=3)}, use_rslora=True),
        write_adapter(tmp_path / "3", {**linear("a.q", r=5, seed=4), **linear("b.q", r=5, seed=5)}, lora_alpha=5),
    ]


def expected(folders: list[Path], weights: list[float], name: str) -> np.ndarray:
    parts = [w * dense(f, name) for f, w in zip(folders, weights, strict=True) if name in open_store(f)]
    return np.sum(parts, axis=0)


@pytest.mark.parametrize("weights", [None, [1.0, -2.5, 0.25], [0.0, 1.0, 0.0]])
@pytest.mark.parametrize("choice", [None, Energy(1)])
def test_a_sum_is_the_sum_of_the_updates(tmp_path: Path, three: list[Path], weights: Any, choice: Any) -> None:
    result = merge_adapters(three, tmp_path / "out", weights, choice)
    for name in ("a.q", "a.v", "b.q"):
        truth = expected(three, weights or [1.0] * 3, name)
        np.testing.assert_allclose(dense(tmp_path / "out", name), truth, atol=2e-5)
        assert result[name].relative_error < 1e-6
        assert result[name].norm == pytest.approx(np.linalg.norm(truth), rel=1e-6)
    if weights != [0.0, 1.0, 0.0]:
        ranks = {layer.name: (layer.rank_before, layer.rank_after) for layer in result.layers}
        # In 5 × 7 at most 5 directions differ from zero.
        assert ranks == {"a.q": (10, 10 if choice is None else 5), "a.v": (5, 5), "b.q": (5, 5)}
    config = config_of(tmp_path / "out")
    assert config["target_modules"] == ["a.q", "a.v", "b.q"]
    assert config["not_invented_yet"] == {"x": [1]}
    assert result.schema == "rankscope.merge/1"
    assert result.weights == tuple(weights or [1.0] * 3)


def test_scales_that_are_powers_of_two_are_added_without_any_rounding(tmp_path: Path) -> None:
    one, two = (write_adapter(tmp_path / str(i), linear("q", seed=i), lora_alpha=2**i) for i in range(2))
    # What is left is the float64 of the measurement; a factor of 3 has to be rounded to float32.
    assert merge_adapters([one, two], tmp_path / "out", [2, -0.5]).total.relative_error < 1e-14
    assert merge_adapters([one, two], tmp_path / "rounded", [3, -0.5]).total.relative_error > 1e-9


def test_a_sum_can_be_compressed(tmp_path: Path, three: list[Path]) -> None:
    result = merge_adapters(three, tmp_path / "out", None, Rank(2))
    truth = expected(three, [1.0] * 3, "a.q")
    s = np.linalg.svd(truth, compute_uv=False)
    assert result["a.q"].rank_after == 2
    assert result["a.q"].error == pytest.approx(np.sqrt((s[2:] ** 2).sum()), rel=1e-5)
    assert result["a.q"].retained == pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), rel=1e-5)
    budget = merge_adapters(three, tmp_path / "budget", None, Budget(result.total.parameters_after))
    assert budget.total.error <= result.total.error


def test_the_mean_of_updates_is_not_that_of_factors(tmp_path: Path, three: list[Path]) -> None:
    """The same update factored in two ways: its mean with itself is itself, which a mean of factors is not."""
    q = linear("q", r=2)
    A, B = f"{PREFIX}q.lora_A.weight", f"{PREFIX}q.lora_B.weight"
    turned = {A: -3 * q[A].flip(0), B: -q[B].flip(1) / 3}
    one, two = write_adapter(tmp_path / "one", q), write_adapter(tmp_path / "two", turned)
    result = average([one, two], tmp_path / "out", None, Energy(1))
    np.testing.assert_allclose(dense(tmp_path / "out", "q"), dense(one, "q"), atol=1e-5)
    assert result["q"].rank_after == 2
    naive = 4 * ((q[B] + turned[B]) / 2 @ ((q[A] + turned[A]) / 2)).double().numpy()
    assert np.linalg.norm(naive - dense(one, "q")) > 0.3 * np.linalg.norm(dense(one, "q"))


def test_weights_of_an_average_are_divided_by_their_sum(tmp_path: Path, three: list[Path]) -> None:
    result = average(three, tmp_path / "out", [1, 2, 5])
    assert result.weights == (0.125, 0.25, 0.625)
    np.testing.assert_allclose(dense(tmp_path / "out", "a.q"), expected(three, [0.125, 0.25, 0.625], "a.q"), atol=2e-5)
    np.testing.assert_allclose(dense(tmp_path / "out", "b.q"), 0.625 * dense(three[2], "b.q"), atol=2e-5)


def test_a_minus_a_is_zero_and_a_minus_b_is_not(tmp_path: Path, three: list[Path]) -> None:
    nothing = subtract(three[0], three[0], tmp_path / "zero")
    assert nothing.total.norm == nothing.total.error == 0
    assert not any(tensor.any() for tensor in tensors_of(tmp_path / "zero").values())
    assert {layer.rank_after for layer in nothing.layers} == {1}
    assert "2 layers change nothing" in nothing.notes[-1]
    result = subtract(three[0], three[1], tmp_path / "difference")
    for name in ("a.q", "a.v"):
        np.testing.assert_allclose(
            dense(tmp_path / "difference", name), dense(three[0], name) - dense(three[1], name), atol=2e-5
        )
    assert result.schema == "rankscope.subtract/1"


def test_adding_back_what_was_subtracted(tmp_path: Path, three: list[Path]) -> None:
    subtract(three[0], three[1], tmp_path / "difference")
    merge_adapters([tmp_path / "difference", three[1]], tmp_path / "again", None, Energy(1 - 1e-9))
    for name in ("a.q", "a.v"):
        np.testing.assert_allclose(dense(tmp_path / "again", name), dense(three[0], name), atol=5e-5)
        assert open_store(tmp_path / "again").info(name).nominal_rank == 2


def test_layers_that_one_of_them_lacks_are_noted(tmp_path: Path, three: list[Path]) -> None:
    notes = merge_adapters(three, tmp_path / "out").notes
    assert any(str(three[2]) in note and "1 layer that another adapter does not have: b.q" in note for note in notes)


def test_kinds_are_kept(tmp_path: Path) -> None:
    def tensors(seed: int, r: int) -> dict[str, Tensor]:
        return {
            f"{PREFIX}emb.lora_embedding_A": normal(r, 11, seed=seed),
            f"{PREFIX}emb.lora_embedding_B": normal(6, r, seed=seed + 1),
            f"{PREFIX}conv.lora_A.weight": normal(r, 4, 3, 3, seed=seed + 2),
            f"{PREFIX}conv.lora_B.weight": normal(5, r, 1, 1, seed=seed + 3),
        }

    one, two = write_adapter(tmp_path / "1", tensors(1, 2)), write_adapter(tmp_path / "2", tensors(11, 3))
    for choice in (None, Rank(4)):
        out = tmp_path / f"out-{choice}"
        merge_adapters([one, two], out, None, choice)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors_of(out).items()}
        r = 5 if choice is None else 4
        assert shapes[f"{PREFIX}emb.lora_embedding_A"] == (r, 11)
        assert shapes[f"{PREFIX}conv.lora_A.weight"] == (r, 4, 3, 3)
        if choice is None:
            for name in ("emb", "conv"):
                np.testing.assert_allclose(dense(out, name), dense(one, name) + dense(two, name), atol=1e-4)


def test_convolutions_with_groups_are_added_group_by_group(tmp_path: Path) -> None:
    def tensors(seed: int, r: int) -> dict[str, Tensor]:
        return {
            f"{PREFIX}conv.lora_A.weight": normal(r, 4, 3, 3, seed=seed),
            f"{PREFIX}conv.lora_B.weight": normal(6, r // 2, 1, 1, seed=seed + 1),
        }

    one, two = write_adapter(tmp_path / "1", tensors(1, 2)), write_adapter(tmp_path / "2", tensors(11, 4))
    merge_adapters([one, two], tmp_path / "out", [1, 3])
    assert tensors_of(tmp_path / "out")[f"{PREFIX}conv.lora_B.weight"].shape == (6, 3, 1, 1)
    np.testing.assert_allclose(dense(tmp_path / "out", "conv"), dense(one, "conv") + 3 * dense(two, "conv"), atol=1e-4)
    result = subtract(one, one, tmp_path / "zero")
    assert result["conv"].rank_after == 2
    assert tensors_of(tmp_path / "zero")[f"{PREFIX}conv.lora_B.weight"].shape == (6, 1, 1, 1)


def test_the_finer_dtype_is_written(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "1", {key: value.half() for key, value in linear("q").items()})
    two = write_adapter(tmp_path / "2", {key: value.bfloat16() for key, value in linear("q", seed=1).items()})
    merge_adapters([one, two], tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float32}
    merge_adapters([one, one], tmp_path / "half")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "half").values()} == {torch.float16}
    merge_adapters([one, one], tmp_path / "chosen", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "chosen").values()} == {torch.bfloat16}


def with_whole(folder: Path, value: float, seed: int = 0, **config: Any) -> Path:
    tensors = {
        **linear("q", seed=seed),
        f"{PREFIX}score.weight": torch.full((2, 3), value),
        f"{PREFIX}q.base_layer.bias": torch.full((5,), -value),
        f"{PREFIX}q.lora_B.bias": torch.full((5,), value),
    }
    settings = {"modules_to_save": ["score"], "bias": "lora_only", "lora_bias": True, "lora_alpha": 4, **config}
    return write_adapter(folder, tensors, **settings)


def test_what_was_trained_whole_is_averaged(tmp_path: Path) -> None:
    one, two = with_whole(tmp_path / "1", 1.0), with_whole(tmp_path / "2", 4.0, seed=3, bias="all", lora_alpha=8)
    result = average([one, two], tmp_path / "out", [2, 1])
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found[f"{PREFIX}score.weight"], torch.full((2, 3), 2.0))
    assert torch.equal(found[f"{PREFIX}q.base_layer.bias"], torch.full((5,), -2.0))
    # Scales 2 and 4: (2·2·1 + 1·4·4)/3.
    torch.testing.assert_close(found[f"{PREFIX}q.lora_B.bias"], torch.full((5,), 20 / 3))
    config = config_of(tmp_path / "out")
    assert (config["bias"], config["modules_to_save"], config["lora_bias"]) == ("all", ["score"], True)
    assert set(result.carried) == {f"{PREFIX}score.weight", f"{PREFIX}q.base_layer.bias"}


def test_what_was_trained_whole_needs_the_base_in_other_sums(tmp_path: Path) -> None:
    one, two = with_whole(tmp_path / "1", 1.0), with_whole(tmp_path / "2", 4.0, seed=3)
    for act in (lambda: merge_adapters([one, two], tmp_path / "x"), lambda: subtract(one, two, tmp_path / "x")):
        with pytest.raises(FormatError, match="was trained whole, so its sum needs the base"):
            act()
    other = write_adapter(tmp_path / "3", linear("q"))
    with pytest.raises(FormatError, match="was trained whole"):
        average([one, other], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_is_the_same_in_both_falls_out_of_a_difference(tmp_path: Path) -> None:
    one, two = with_whole(tmp_path / "1", 1.0), with_whole(tmp_path / "2", 1.0, seed=3, lora_alpha=2)
    result = subtract(one, two, tmp_path / "out")
    assert f"{PREFIX}score.weight" not in tensors_of(tmp_path / "out")
    assert config_of(tmp_path / "out")["modules_to_save"] is None
    assert {one.name for one in result.skipped} == {f"{PREFIX}score.weight", f"{PREFIX}q.base_layer.bias"}
    torch.testing.assert_close(tensors_of(tmp_path / "out")[f"{PREFIX}q.lora_B.bias"], torch.full((5,), 1.0))


@pytest.mark.parametrize("other", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_eight_bit_floats_are_averaged_in_float32(tmp_path: Path, other: torch.dtype) -> None:
    """torch promotes float8 with no other dtype."""
    folders = []
    for name, value, dtype in (("1", 1.0, torch.float8_e4m3fn), ("2", 2.0, other)):
        tensors = {
            f"{PREFIX}score.weight": torch.full((2, 3), value),
            f"{PREFIX}q.lora_B.bias": torch.full((5,), value),
        }
        tensors = {**linear("q"), **{key: tensor.to(dtype) for key, tensor in tensors.items()}}
        folders.append(write_adapter(tmp_path / name, tensors, modules_to_save=["score"], lora_bias=True))
    average(folders, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found[f"{PREFIX}score.weight"], torch.full((2, 3), 1.5))
    assert torch.equal(found[f"{PREFIX}q.lora_B.bias"], torch.full((5,), 6.0))
    same = subtract(folders[0], folders[0], tmp_path / "same")
    assert [one.name for one in same.skipped] == [f"{PREFIX}score.weight"]


def test_sums_that_overflow_are_refused(tmp_path: Path) -> None:
    folders = []
    for name, value in (("1", 6e4), ("2", -6e4)):
        whole = {key: tensor.half() for key, tensor in linear("q").items()}
        whole[f"{PREFIX}score.weight"] = torch.full((2, 3), value, dtype=torch.float16)
        folders.append(write_adapter(tmp_path / name, whole, modules_to_save=["score"]))
    with pytest.raises(NonFiniteError, match=r"score\.weight: the sum in float16 .* holds 6 values"):
        average(folders, tmp_path / "out", [3, -1])
    folders = [
        write_adapter(
            tmp_path / f"b{i}",
            {**linear("q"), f"{PREFIX}q.lora_B.bias": torch.full((5,), sign * 2e38)},
            lora_bias=True,
            lora_alpha=2,
        )
        for i, sign in enumerate((1, -1))
    ]
    with pytest.raises(NonFiniteError, match=r"q: the sum of lora_B\.bias"):
        subtract(*folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_base_weight_saved_along_stays(tmp_path: Path) -> None:
    base = {f"{PREFIX}q.base_layer.weight": normal(5, 7, seed=99)}
    one = write_adapter(tmp_path / "1", {**linear("q"), **base})
    two = write_adapter(tmp_path / "2", {**linear("q", seed=1), **base})
    merge_adapters([one, two], tmp_path / "out", [3, 4])
    assert torch.equal(tensors_of(tmp_path / "out")[f"{PREFIX}q.base_layer.weight"], normal(5, 7, seed=99))


def dora(folder: Path) -> Path:
    return write_adapter(folder, {**linear("a.q"), f"{PREFIX}a.q.lora_magnitude_vector": normal(5)}, use_dora=True)


OTHERS: dict[str, tuple[Any, type[RankscopeError], str]] = {
    "dora": (dora, FormatError, "is a DoRA adapter, whose magnitudes do not add"),
    "shape": (lambda f: write_adapter(f, linear("a.q", out=6)), ShapeError, r"layer a\.q is \(5, 7\).*\(6, 7\)"),
    "kind": (
        lambda f: write_adapter(
            f, {f"{PREFIX}a.q.lora_A.weight": normal(2, 7, 1, 1), f"{PREFIX}a.q.lora_B.weight": normal(5, 2, 1, 1)}
        ),
        ShapeError,
        "linear in .* conv in",
    ),
    "names": (lambda f: write_adapter(f, linear("model.a.q")), FormatError, r"'a\.q' of .*'model\.a\.q'; save both"),
    "layers repeated": (
        lambda f: write_adapter(f, linear("a.q"), layer_replication=[[0, 2]]),
        FormatError,
        "has another layer_replication than",
    ),
    "nothing": (lambda f: f, FormatError, "no such file or folder"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_added(tmp_path: Path, name: str) -> None:
    make, kind, message = OTHERS[name]
    one, other = write_adapter(tmp_path / "one", linear("a.q")), make(tmp_path / "other")
    for pair in ([one, other], [other, one]):
        with pytest.raises(kind) as caught:
            merge_adapters(pair, tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(kind, match=message):
        subtract(one, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_bases_are_noted(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "1", linear("q"), base_model_name_or_path="here/one")
    two = write_adapter(tmp_path / "2", linear("q", seed=1), base_model_name_or_path="there/two")
    assert any("trained on there/two" in note for note in merge_adapters([one, two], tmp_path / "out").notes)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0, 4.0], [1.0, float("nan"), 1.0], [1.0, float("inf"), 1.0]])
def test_weights_that_do_not_fit(tmp_path: Path, three: list[Path], weights: list[float]) -> None:
    for act in (merge_adapters, average):
        with pytest.raises(ConfigError, match="weight"):
            act(three, tmp_path / "out", weights)


def test_too_little_to_combine(tmp_path: Path, three: list[Path]) -> None:
    for act in (merge_adapters, average):
        with pytest.raises(ConfigError, match="at least two adapters"):
            act(three[:1], tmp_path / "out")
    with pytest.raises(ConfigError, match="add up to zero"):
        average(three[:2], tmp_path / "out", [1, -1])
