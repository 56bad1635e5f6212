"""``compare``: planted overlap, independent references, both sides, every skip with its reason, the same-seed trap."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import PREFIX, linear, write_adapter, write_checkpoint
from makers import float64, frame, normal, planted, planted_dense
from scipy.linalg import subspace_angles

from rankscope.analysis.comparison import CompareResult, compare
from rankscope.analysis.layer_comparison import MAX_DIRECTIONS, difference_norm
from rankscope.errors import ConfigError, FormatError, NonFiniteError, RankscopeError
from rankscope.structured import Hadamard, Kronecker
from rankscope.updates import Dense, LowRank

SHAPE = (50, 40)


def sharing(shared_left: int, shared_right: int, r: int = 6) -> tuple[LowRank, LowRank]:
    """Two updates of rank r whose spans share this many directions, the rest of each orthogonal to the other's."""
    U, V = frame(SHAPE[0], 2 * r), frame(SHAPE[1], 2 * r, seed=1)
    sigma = torch.linspace(3, 1, r, dtype=torch.float64)
    a = LowRank(U[:, :r] * sigma, V[:, :r].T)
    b = LowRank(U[:, r - shared_left : 2 * r - shared_left] * sigma, V[:, r - shared_right : 2 * r - shared_right].T)
    return a, b


@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 5), (3, 0), (6, 6)])
def test_planted_overlap_is_exact(left: int, right: int) -> None:
    a, b = sharing(left, right)
    layer = compare({"w": a}, {"w": b})["w"]
    assert layer.left is not None
    assert layer.right is not None
    for side, shared, d in ((layer.left, left, SHAPE[0]), (layer.right, right, SHAPE[1])):
        assert side.overlap.shape == (6, 6)
        assert side.whole.overlap == pytest.approx(shared / 6, abs=1e-12)
        assert side.whole.expected == pytest.approx(6 / d)
        assert side.d == d
        assert np.sum(side.angles < 1e-9) == shared
        assert side.distance["projection"] == pytest.approx(math.sqrt(6 - shared), abs=1e-9)


def test_an_update_with_itself() -> None:
    update = planted(SHAPE, [5, 3, 1, 0.5])
    result = compare({"w": update}, {"w": update})
    layer = result["w"]
    for side in layer.sides.values():
        np.testing.assert_allclose(np.diag(side.overlap), 1, atol=1e-14)
        assert side.whole.p < 1e-12
    assert layer.cosine == result.summary.cosine == pytest.approx(1, abs=1e-14)
    assert layer.relative_difference == pytest.approx(0, abs=1e-15)
    assert layer.inner == pytest.approx(update.energy)
    assert result.summary.relative_difference == pytest.approx(0, abs=1e-15)


def test_dense_with_itself_and_its_factors() -> None:
    """Two kinds of update of one matrix: float32 storage leaves 1e-7."""
    a, b = planted(SHAPE, [5, 3, 1]), planted_dense(SHAPE, [5, 3, 1])
    layer = compare({"w": a}, {"w": b}, top=3)["w"]
    assert layer.cosine == pytest.approx(1, abs=1e-6)
    assert layer.relative_difference == pytest.approx(0, abs=1e-6)
    assert layer.left is not None
    assert layer.left.whole.overlap == pytest.approx(1, abs=1e-6)


def write_pair(folder: Path) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """Two adapters of different rank and scale on disk, and their matrices by numpy from the raw tensors."""
    matrices = {}
    paths = []
    for name, r, alpha, seed in (("a", 2, 8, 3), ("b", 3, 5, 7)):
        tensors = linear("block.q", out=23, n=17, r=r, seed=seed)
        paths.append(write_adapter(folder / name, tensors, r=r, lora_alpha=alpha))
        B, A = (tensors[f"{PREFIX}block.q.lora_{x}.weight"].double().numpy() for x in "BA")
        matrices[name] = alpha / r * B @ A
    return paths[0], paths[1], matrices


def test_files_against_numpy_and_scipy(tmp_path: Path) -> None:
    path_a, path_b, matrices = write_pair(tmp_path)
    a, b = matrices["a"], matrices["b"]
    Ua, _, Vta = np.linalg.svd(a)
    Ub, _, Vtb = np.linalg.svd(b)
    layer = compare(path_a, path_b)["block.q"]
    assert layer.left is not None
    assert layer.right is not None
    for side, X, Y in ((layer.left, Ua, Ub), (layer.right, Vta.T, Vtb.T)):
        np.testing.assert_allclose(side.angles, np.sort(subspace_angles(X[:, :2], Y[:, :3])), atol=1e-8)
        for i in (1, 2):
            for j in (1, 2, 3):
                expected = np.linalg.norm(X[:, :i].T @ Y[:, :j]) ** 2 / min(i, j)
                assert side.at(i, j).overlap == pytest.approx(expected, abs=1e-10)
                assert side.at(i, j).expected == pytest.approx(max(i, j) / len(X))
    assert layer.inner == pytest.approx(np.sum(a * b), rel=1e-10)
    assert layer.norm_a == pytest.approx(np.linalg.norm(a))
    assert layer.norm_b == pytest.approx(np.linalg.norm(b))
    assert layer.cosine == pytest.approx(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-10)
    apart = np.linalg.norm(a - b) / max(np.linalg.norm(a), np.linalg.norm(b))
    assert layer.relative_difference == pytest.approx(apart, rel=1e-10)
    assert layer.left.square.j == 2
    summary = compare(path_a, path_b).summary.left
    assert summary is not None
    assert (summary.expected, summary.whole_expected) == pytest.approx((2 / 23, 3 / 23))
    assert summary.whole == pytest.approx(layer.left.overlap[1, 2])


def test_lora_against_full_from_files(tmp_path: Path) -> None:
    path_a, _, matrices = write_pair(tmp_path)
    base = {"block.q.weight": normal(23, 17, seed=20).float()}
    change = 0.1 * normal(23, 17, seed=21)
    tuned = {"block.q.weight": base["block.q.weight"] + change.float()}
    write_checkpoint(tmp_path / "base.safetensors", base)
    full = write_checkpoint(tmp_path / "tuned.safetensors", tuned)
    layer = compare(path_a, full, base=tmp_path / "base.safetensors")["block.q"]
    b = (tuned["block.q.weight"] - base["block.q.weight"]).double().numpy()
    Ua, Ub = np.linalg.svd(matrices["a"])[0], np.linalg.svd(b)[0]
    assert layer.left is not None
    assert layer.left.overlap.shape == (2, 17)
    # The SVD of a full update is taken in float32.
    np.testing.assert_allclose(layer.left.angles, np.sort(subspace_angles(Ua[:, :2], Ub[:, :17])), atol=1e-4)
    apart = np.linalg.norm(matrices["a"] - b) / max(np.linalg.norm(matrices["a"]), np.linalg.norm(b))
    assert layer.relative_difference == pytest.approx(apart, rel=1e-6)
    assert (layer.nominal_rank_a, layer.nominal_rank_b) == (2, None)


def test_summary_is_of_all_layers_as_one_vector() -> None:
    one = {"p": planted(SHAPE, [2.0, 1.0]), "q": planted(SHAPE, [4.0], seed=5)}
    other = {"p": planted(SHAPE, [1.0, 1.0], seed=9), "q": planted(SHAPE, [3.0], seed=5)}
    result = compare(one, other)
    a, b = (np.concatenate([float64(layers[x]).ravel() for x in "pq"]) for layers in (one, other))
    norms = np.linalg.norm(a), np.linalg.norm(b)
    assert result.summary.norm_a == pytest.approx(norms[0])
    assert result.summary.norm_b == pytest.approx(norms[1])
    assert result.summary.cosine == pytest.approx(a @ b / norms[0] / norms[1])
    assert result.summary.relative_difference == pytest.approx(np.linalg.norm(a - b) / max(norms))
    assert result.summary.left is not None
    left = [layer.left.square for layer in result.layers if layer.left]
    assert result.summary.left.overlap == pytest.approx(np.median([cell.overlap for cell in left]))
    assert result.summary.left.expected == pytest.approx(np.median([2 / 50, 1 / 50]))


def test_factors_are_their_own_mode() -> None:
    """SVD(A) is not SVD(BA): ordered directions of A, by numpy from A alone."""
    a = LowRank(normal(20, 4, seed=1), normal(4, 15, seed=2), 3.0)
    b = LowRank(normal(20, 3, seed=3), normal(3, 15, seed=4), 0.5)
    of_A, of_B = compare({"w": a}, {"w": b}, of="A"), compare({"w": a}, {"w": b}, of="B")
    V, W = (np.linalg.svd(x.A.numpy())[2].T for x in (a, b))
    right = of_A["w"].right
    assert right is not None
    assert of_A["w"].left is None
    assert right.at(2, 1).overlap == pytest.approx(np.linalg.norm(V[:, :2].T @ W[:, :1]) ** 2, abs=1e-12)
    U, X = (np.linalg.svd(x.B.numpy())[0] for x in (a, b))
    left = of_B["w"].left
    assert left is not None
    assert of_B["w"].right is None
    assert left.at(2, 3).overlap == pytest.approx(np.linalg.norm(U[:, :2].T @ X[:, :3]) ** 2 / 2, abs=1e-12)
    assert of_A["w"].norm_a == pytest.approx(float(a.A.norm()))
    assert of_A["w"].cosine is None
    assert of_A.summary.cosine is None
    assert of_A.to_json()["of"] == "A"
    assert "factors A" in repr(of_A)
    assert "left" not in repr(of_A)
    plain = compare({"w": a}, {"w": b})["w"].right
    assert plain is not None
    assert abs(plain.at(2, 1).overlap - right.at(2, 1).overlap) > 1e-3


def test_nothing_is_dropped_without_a_reason() -> None:
    good, zero = planted(SHAPE, [1.0]), LowRank(torch.zeros(50, 2), torch.ones(2, 40))
    result = compare(
        {"both": good, "zero": zero, "shape": good, "mine": good},
        {"both": good, "zero": good, "shape": planted((40, 50), [1.0]), "yours": good},
    )
    assert [layer.name for layer in result.layers] == ["both"]
    reasons = {one.name: one.reason for one in result.skipped}
    assert "is zero" in reasons["zero"]
    assert "(50, 40)" in reasons["shape"]
    assert "(40, 50)" in reasons["shape"]
    assert (result.unmatched.a, result.unmatched.b) == (("mine",), ("yours",))
    factors = compare({"both": good, "full": good}, {"both": good, "full": planted_dense(SHAPE, [1.0])}, of="A")
    assert "no product of factors" in factors.skipped[0].reason


def test_what_cannot_be_compared_is_an_error(tmp_path: Path) -> None:
    good, zero = planted(SHAPE, [1.0]), LowRank(torch.zeros(50, 2), torch.ones(2, 40))
    with pytest.raises(RankscopeError, match="no layer in common; the one has p, the other q"):
        compare({"p": good}, {"q": good})
    with pytest.raises(RankscopeError, match=r"no layer can be compared; p: .*is zero"):
        compare({"p": good}, {"p": zero})
    with pytest.raises(RankscopeError, match="no layer in common fits 'k_proj'; they share p"):
        compare({"p": good}, {"p": good}, layers="k_proj")
    with pytest.raises(ConfigError, match="top = 0"):
        compare({"p": good}, {"p": good}, top=0)
    with pytest.raises(ConfigError, match="'C'"):
        compare({"p": good}, {"p": good}, of="C")  # type: ignore[arg-type]
    tensors = linear("block.q")
    tensors[f"{PREFIX}block.q.lora_B.weight"][1, 1] = math.inf
    with pytest.raises(NonFiniteError, match=r"block\.q"):
        compare(write_adapter(tmp_path, tensors), write_adapter(tmp_path / "other"))


def test_names_with_a_wrapper_and_layers_of_either_name() -> None:
    a, b = planted(SHAPE, [1.0]), planted(SHAPE, [1.0], seed=4)
    result = compare({"bert.x.q": a, "bert.x.k": a}, {"x.q": b, "x.k": b, "x.v": b}, layers="bert.x.q")
    assert [(layer.name, layer.name_b) for layer in result.layers] == [("bert.x.q", "x.q")]
    assert result.unmatched.b == ()


def test_top_limits_the_grid() -> None:
    rank8, full = planted(SHAPE, np.linspace(4, 1, 8)), Dense(normal(90, 80))
    layer = compare({"w": rank8}, {"w": rank8}, top=3)["w"]
    assert layer.left is not None
    assert layer.left.overlap.shape == layer.left.z.shape == (3, 3)
    whole = compare({"w": full}, {"w": full})
    assert whole.layers[0].left is not None
    assert whole.layers[0].left.overlap.shape == (MAX_DIRECTIONS, MAX_DIRECTIONS)
    assert any("top 64" in note for note in whole.notes)
    small = compare({"w": Dense(normal(9, 8))}, {"w": Dense(normal(9, 8))})  # all 8 are compared
    assert small.notes == ()
    wide = planted((90, 80), np.linspace(4, 1, 64))
    assert not any("top 64" in note for note in compare({"w": wide}, {"w": wide}).notes)


def test_clusters_are_marked() -> None:
    update = planted(SHAPE, [3, 2.999, 1, 0.5])
    side = compare({"w": update}, {"w": planted(SHAPE, [3, 2, 1], seed=6)})["w"].left
    assert side is not None
    assert side.cluster_a == (True, False, False, False)
    assert side.cluster_b == (False, False, False)
    np.testing.assert_allclose(side.gaps_b, [1 / 3, 1 / 2, 1], rtol=1e-9)
    np.testing.assert_allclose(side.gaps_a, [0.001 / 3, 1.999 / 2.999, 0.5, 1], rtol=1e-9)


def test_json_round_trip_and_contract() -> None:
    # Top 2 of a full update: the gap after the last is known, so nothing is NaN; a cut at the limit is.
    a = {"p": planted(SHAPE, [2.0, 1.0]), "full": Dense(normal(*SHAPE, seed=3))}
    b = {"p": planted(SHAPE, [1.0], seed=9), "full": Dense(normal(*SHAPE, seed=4)), "z": planted(SHAPE, [1.0])}
    result = compare(a, b)
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert value["schema"] == "rankscope.compare/1"
    assert value["of"] == "update"
    assert value["unmatched"] == {"a": [], "b": ["z"]}
    for layer in value["layers"]:
        keys = {"name", "shape", "left", "right", "cosine", "norm_a", "norm_b", "relative_difference"}
        assert layer.keys() >= keys
        for side in (layer["left"], layer["right"]):
            assert side.keys() >= {"overlap", "expected", "z", "p", "angles", "distance"}
            assert side["distance"].keys() >= {"projection", "geodesic"}
            sizes = {(len(side[grid]), len(side[grid][0])) for grid in ("overlap", "expected", "z", "p")}
            assert len(sizes) == 1
            assert side["angles"] == sorted(side["angles"])
    again = CompareResult.from_json(value)
    assert again.to_json() == value
    assert again["p"].left is not None
    assert result["p"].left is not None
    np.testing.assert_array_equal(again["p"].left.overlap, result["p"].left.overlap)
    assert compare(a, b).to_json() == value


def test_unknown_gaps_are_null_in_json() -> None:
    result = compare({"w": planted(SHAPE, [2.0, 1.0])}, {"w": planted(SHAPE, [2.0, 1.0], seed=2)})
    side = result["w"].left
    assert side is not None
    side.gaps_a[0] = math.nan
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert value["layers"][0]["left"]["gaps_a"][0] is None
    back = CompareResult.from_json(value)["w"].left
    assert back is not None
    assert math.isnan(back.gaps_a[0])


@pytest.mark.parametrize("value", [{}, {"schema": "rankscope.compare/2"}, {"schema": "rankscope.compare/1"}])
def test_other_json_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="schema"):
        CompareResult.from_json(value)


def test_ragged_grid_is_refused() -> None:
    value = compare({"w": planted(SHAPE, [2.0])}, {"w": planted(SHAPE, [1.0])}).to_json()
    value["layers"][0]["left"]["overlap"] = [[1.0], [1.0, 2.0]]
    with pytest.raises(FormatError, match="schema"):
        CompareResult.from_json(value)


def same_rows(seed: int, r: int, rows: torch.Tensor) -> LowRank:
    return LowRank(normal(SHAPE[0], r, seed=seed), rows[:r])


def test_shared_initial_factors_are_suspected() -> None:
    rows = normal(8, SHAPE[1], seed=11)
    a, b = {"w": same_rows(1, 8, rows)}, {"w": same_rows(2, 3, rows)}
    result = compare(a, b)
    assert result.summary.right is not None
    assert result.summary.right.whole == pytest.approx(1.0)
    assert any("proves nothing" in note for note in result.notes)
    assert any("proves nothing" in note for note in compare(a, b, of="A").notes)
    assert not any("proves nothing" in note for note in compare(a, a).notes)  # the left agrees too
    other = {"w": LowRank(normal(SHAPE[0], 3, seed=5), normal(3, SHAPE[1], seed=6))}
    assert not any("proves nothing" in note for note in compare(a, other).notes)


def test_initial_factors_of_runs_are_laid_beside(tmp_path: Path) -> None:
    """Runs keep their step 0 beside the adapter, where B is zero: only A can be compared, and is."""
    for run, seed in (("one", 1), ("two", 1), ("three", 2)):
        start = linear("block.q", out=40, n=60, r=2, seed=seed)
        start[f"{PREFIX}block.q.lora_B.weight"].zero_()
        write_adapter(tmp_path / run / "initial", start)
        trained = linear("block.q", out=40, n=60, r=2, seed=30 + len(run))
        write_adapter(tmp_path / run / "adapter", trained)
        (tmp_path / run / "run.json").write_text("{}")
    shared = compare(tmp_path / "one", tmp_path / "two")
    assert shared.summary.initial is not None
    assert shared.summary.initial.whole == pytest.approx(1.0)
    assert shared.summary.initial.whole_expected == pytest.approx(2 / 60)
    assert any("before training" in note for note in shared.notes)
    apart = compare(tmp_path / "one", tmp_path / "three")
    assert apart.summary.initial is not None
    assert apart.summary.initial.whole < 0.3
    assert not any("before training" in note for note in apart.notes)
    assert compare(tmp_path / "one", tmp_path / "two", of="B").summary.initial is None
    (tmp_path / "two" / "initial" / "adapter_config.json").write_text("damaged")
    damaged = compare(tmp_path / "one", tmp_path / "two")
    assert damaged.summary.initial is None
    assert len(damaged.layers) == 1
    assert any("before training cannot be compared" in note for note in damaged.notes)


def test_a_folder_that_happens_to_be_called_initial_is_not_ours(tmp_path: Path) -> None:
    for name, seed in (("adapter", 1), ("other", 2), ("initial", 3)):
        write_adapter(tmp_path / name, linear("block.q", out=40, n=60, r=2, seed=seed))
    for run in ("one", "two"):  # a run.json does not make every folder beside it ours
        for name, seed in (("mine", len(run)), ("initial", 3)):
            write_adapter(tmp_path / run / name, linear("block.q", out=40, n=60, r=2, seed=seed))
        (tmp_path / run / "run.json").write_text("{}")
    pairs = [("adapter", "adapter"), ("adapter", "other"), ("one/mine", "two/mine")]
    for result in (compare(tmp_path / a, tmp_path / b) for a, b in pairs):
        assert result.summary.initial is None
        assert not any("before training" in note for note in result.notes)


@pytest.mark.parametrize("scale", [1e-161, 1e-163, 1e-310])
def test_an_update_too_small_to_have_a_norm_is_listed(scale: float) -> None:
    """The first has a norm, with few digits left: the cosine with itself would not be 1."""
    a, b = sharing(1, 1)
    tiny = LowRank(b.B, b.A, scale)
    result = compare({"w": a, "v": a}, {"w": tiny, "v": b})
    assert [layer.name for layer in result.layers] == ["v"]
    assert [skipped.name for skipped in result.skipped] == ["w"]
    assert "too small to compare" in result.skipped[0].reason
    small = b * 1e-140
    assert compare({"w": b}, {"w": small})["w"].cosine == pytest.approx(1, abs=1e-14)


def test_reprs_carry_the_chance_level() -> None:
    a, b = sharing(3, 3)
    result = compare({"<w>": a}, {"<w>": b})
    assert "left overlap 0.500 (chance 0.120)" in repr(result)
    assert "right overlap 0.500 (chance 0.150)" in repr(result)
    page = result._repr_html_()
    assert "0.500 (0.120)" in page
    assert "&lt;w&gt;" in page


def test_layer_by_name() -> None:
    a, b = sharing(1, 1)
    with pytest.raises(KeyError):
        compare({"w": a}, {"w": b})["v"]


def test_thin_products_of_any_kind_are_subtracted_exactly() -> None:
    """By norms and inner product, a difference of 1e-9 of the norm would drown in rounding."""
    one, two = LowRank(normal(30, 2), normal(2, 20, seed=1)), LowRank(normal(30, 2, seed=2), normal(2, 20, seed=3))
    three, four = LowRank(normal(5, 1), normal(1, 4, seed=1)), LowRank(normal(6, 2, seed=2), normal(2, 5, seed=3))
    for a, b in (
        (Hadamard(one, two), Hadamard(one * (1 + 1e-9), two)),
        (Kronecker(three, four), Kronecker(three, four * (1 + 1e-9))),
    ):
        assert difference_norm(a, b, a.inner(b), (a.norm, b.norm)) == pytest.approx(1e-9 * a.norm, rel=1e-5)
