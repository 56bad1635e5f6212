"""``compare_all``: planted groups, agreement with ``compare``, symmetry, order, names across tools, every refusal."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import PREFIX, linear, write_adapter, write_checkpoint
from makers import frame, normal, planted
from safetensors.torch import save_file

import rankscope
from rankscope.analysis.comparison import compare
from rankscope.analysis.display import distinct_names
from rankscope.analysis.layer_matrices import combine_p_values
from rankscope.analysis.matrix import MatrixResult, compare_all
from rankscope.errors import ConfigError, FormatError, NonFiniteError, RankscopeError
from rankscope.formats.peft_lora import PeftStore
from rankscope.updates import Dense, LowRank, Update

SHAPE = (90, 80)
Updates = dict[str, Update]


def group_member(group: int, seed: int, layers: int = 5, r: int = 4) -> Updates:
    """Updates in the spans of their group, mixed and scaled by their own seed."""
    found: Updates = {}
    for layer in range(layers):
        U, V = frame(SHAPE[0], r, 100 * group + layer), frame(SHAPE[1], r, 100 * group + 50 + layer)
        found[f"l{layer}"] = LowRank(U @ normal(r, r, seed=1000 * seed + layer), V.T, 0.5 + seed)
    return found


def two_groups() -> list[Updates]:
    """Members 0, 2, 4 of one group and 1, 3 of the other."""
    return [group_member(seed % 2, seed) for seed in range(5)]


def test_planted_groups_join_first() -> None:
    result = compare_all(two_groups())
    for side, d in ((result.left, SHAPE[0]), (result.right, SHAPE[1])):
        assert side is not None
        for i, j in result.pairs:
            same = i % 2 == j % 2
            assert side.expected[i, j] == pytest.approx(4 / d)
            if same:
                assert side.overlap[i, j] == pytest.approx(1, abs=1e-10)
                assert side.p[i, j] < 1e-12
            else:
                assert side.overlap[i, j] == pytest.approx(4 / d, abs=0.05)
                assert side.p[i, j] > 0.05
    assert set(result.order[:3]) in ({0, 2, 4}, {1, 3} | {result.order[2]})
    assert [i % 2 for i in result.order] in ([0, 0, 0, 1, 1], [1, 1, 0, 0, 0])
    assert result.beyond_chance == (True, True, True, False)
    assert result.joins[-1, 2] == pytest.approx(
        np.mean([result.distance[i, j] for i, j in result.pairs if (i + j) % 2])
    )
    assert 1 - result.joins[-1, 2] == pytest.approx(4 / 85, abs=0.02)


def mixed_sources() -> list[Updates]:
    """Ranks that differ, a full update among products, and one that nearly equals another."""
    a = {f"l{i}": planted(SHAPE, np.linspace(3, 1, 5), seed=10 * i) for i in range(3)}
    b = {f"l{i}": planted(SHAPE, [2, 1], seed=10 * i + 4) for i in range(3)}
    near = {name: update * (1 + 1e-9) for name, update in a.items()}
    full = {f"l{i}": Dense(normal(*SHAPE, seed=70 + i)) for i in range(3)}
    other = {f"l{i}": Dense(normal(*SHAPE, seed=80 + i)) for i in range(3)}
    return [a, b, near, full, other]


@pytest.mark.parametrize("top", [None, 1, 3])
def test_every_pair_is_that_of_compare(top: int | None) -> None:
    sources = mixed_sources()
    result = compare_all(sources, top=top)
    assert result.cosine is not None
    assert result.relative_difference is not None
    for i, j in result.pairs:
        pair = compare(sources[i], sources[j], top=top)
        assert pair.summary.cosine == pytest.approx(result.cosine[i, j], abs=1e-10)
        assert pair.summary.relative_difference == pytest.approx(result.relative_difference[i, j], rel=1e-10)
        assert result.norms[i] == pytest.approx(pair.summary.norm_a, rel=1e-12)
        for side, found in result.sides.items():
            expected = getattr(pair.summary, side)
            assert found.overlap[i, j] == pytest.approx(expected.overlap, abs=1e-10)
            assert found.expected[i, j] == pytest.approx(expected.expected, abs=1e-12)


def test_relative_difference_of_nearly_equal_ones_is_exact() -> None:
    result = compare_all(mixed_sources()[:3])
    assert result.relative_difference is not None
    assert result.relative_difference[0, 2] == pytest.approx(1e-9, rel=1e-5)


@pytest.mark.parametrize("of", ["A", "B"])
def test_factors(of: str) -> None:
    sources = two_groups()
    result = compare_all(sources, of=of)  # type: ignore[arg-type]
    side = "right" if of == "A" else "left"
    assert list(result.sides) == [side]
    assert result.cosine is None
    assert result.relative_difference is None
    for i, j in result.pairs:
        pair = compare(sources[i], sources[j], of=of)  # type: ignore[arg-type]
        assert result.sides[side].overlap[i, j] == pytest.approx(getattr(pair.summary, side).overlap, abs=1e-10)
    assert MatrixResult.from_json(result.to_json()).to_json() == result.to_json()


def test_symmetric_and_one_with_itself() -> None:
    result = compare_all(mixed_sources())
    for side in result.sides.values():
        np.testing.assert_array_equal(np.diag(side.overlap), 1)
        assert np.isnan(np.diag(side.p)).all()
        for matrix in (side.overlap, side.expected, side.p):
            np.testing.assert_array_equal(matrix, matrix.T)
    assert result.cosine is not None
    assert result.relative_difference is not None
    np.testing.assert_array_equal(np.diag(result.cosine), 1)
    np.testing.assert_array_equal(result.cosine, result.cosine.T)
    for matrix in (result.distance, result.relative_difference):
        np.testing.assert_array_equal(np.diag(matrix), 0)
        np.testing.assert_array_equal(matrix, matrix.T)


def test_the_order_of_the_sources_is_irrelevant() -> None:
    sources = mixed_sources()
    order = [3, 0, 4, 2, 1]
    straight, turned = compare_all(sources), compare_all([sources[i] for i in order])
    picked = np.ix_(order, order)
    assert straight.cosine is not None
    assert turned.cosine is not None
    np.testing.assert_allclose(turned.cosine, straight.cosine[picked], atol=1e-12)
    np.testing.assert_allclose(turned.distance, straight.distance[picked], atol=1e-12)
    for side in ("left", "right"):
        np.testing.assert_allclose(turned.sides[side].p, straight.sides[side].p[picked], rtol=1e-6, atol=1e-300)
    np.testing.assert_allclose(turned.joins[:, 2], straight.joins[:, 2], atol=1e-12)


def test_each_layer_of_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {**linear("x.q"), **linear("x.k", seed=3)}
    paths = [write_adapter(tmp_path / name, {k: v + i for k, v in tensors.items()}) for i, name in enumerate("abcd")]
    reads: Counter[tuple[str, str]] = Counter()
    original = PeftStore.__getitem__

    def counted(self: PeftStore, name: str) -> Update:
        reads[str(self.path), name] += 1
        return original(self, name)

    monkeypatch.setattr(PeftStore, "__getitem__", counted)
    compare_all(paths)
    assert len(reads) == 8
    assert set(reads.values()) == {1}


def test_layers_that_all_share_across_tools(tmp_path: Path) -> None:
    """PEFT's names, a checkpoint minus its base with a wrapper in front, a mapping; a layer that one of them lacks."""
    q, k = f"{PREFIX}model.layers.0.self_attn.q_proj", f"{PREFIX}model.layers.0.self_attn.k_proj"
    peft = write_adapter(
        tmp_path / "peft",
        {**linear(q.removeprefix(PREFIX), out=20, n=16), **linear(k.removeprefix(PREFIX), out=20, n=16)},
    )
    base = {f"model.layers.0.self_attn.{x}_proj.weight": normal(20, 16, seed=i).float() for i, x in enumerate("qkv")}
    tuned = {name: weight + 0.1 * normal(20, 16, seed=9).float() for name, weight in base.items()}
    write_checkpoint(tmp_path / "base.safetensors", base)
    write_checkpoint(tmp_path / "tuned.safetensors", tuned)
    mapping: Updates = {
        "layers.0.self_attn.q_proj": planted((20, 16), [2.0, 1.0]),
        "layers.0.self_attn.v_proj": planted((20, 16), [2.0, 1.0]),
    }
    result = compare_all([peft, tmp_path / "tuned.safetensors", mapping], base=tmp_path / "base.safetensors")
    assert [name.rsplit(".", 1)[-1] for name in result.layers] == ["q_proj"]
    assert [len(names) for names in result.alone] == [1, 2, 1]
    assert result.alone[2] == ("layers.0.self_attn.v_proj",)
    pair = compare(peft, tmp_path / "tuned.safetensors", base=tmp_path / "base.safetensors", layers="q_proj")
    assert result.cosine is not None
    assert result.cosine[0, 1] == pytest.approx(pair.summary.cosine, abs=1e-10)
    with pytest.raises(RankscopeError, match=r"no layer that all share fits 'k_proj'; they share .*q_proj"):
        compare_all(
            [peft, tmp_path / "tuned.safetensors", mapping], base=tmp_path / "base.safetensors", layers="k_proj"
        )


def test_fused_projections_are_compared_by_their_blocks() -> None:
    """Two sources with a fused projection and one without: partners of partners, whatever their order."""
    parts = [{name: planted((12, 10), [2.0, 1.0], seed=10 * i + j) for j, name in enumerate("qkv")} for i in range(3)]

    def fused(updates: dict[str, LowRank]) -> Updates:
        left = torch.block_diag(*(update.B for update in updates.values()))
        return {"attn.qkv_proj": LowRank(left, torch.cat([update.A for update in updates.values()]))}

    split: Updates = {f"attn.{name}_proj": update for name, update in parts[1].items()}
    first, last = fused(parts[0]), fused(parts[2])
    result = compare_all([first, split, last])
    assert result.layers == ("attn.qkv_proj:k", "attn.qkv_proj:q", "attn.qkv_proj:v")
    assert result.alone == ((), (), ())
    pair = compare(first, split)
    assert result.cosine is not None
    assert result.cosine[0, 1] == pytest.approx(pair.summary.cosine, abs=1e-10)
    turned = compare_all([split, last, first])
    assert turned.cosine is not None
    assert turned.cosine[0, 1] == pytest.approx(result.cosine[1, 2], abs=1e-12)
    whole = compare_all([first, last, fused(parts[1])])
    assert whole.layers == ("attn.qkv_proj",)
    extra = {"o": parts[0]["q"]}
    unsplit = compare_all([{"attn.query_key_value": first["attn.qkv_proj"], **extra}, split | extra, split | extra])
    assert unsplit.layers == ("o",)
    assert [(one.name, "alternate head by head" in one.reason) for one in unsplit.skipped] == [
        ("attn.query_key_value", True)
    ]


def test_renaming_goes_to_every_source_that_it_fits() -> None:
    a, b, c = (planted(SHAPE, [1.0], seed=seed) for seed in range(3))
    result = compare_all([{"p.x": a}, {"p.y": b}, {"p.y": c}], rename=[("y", "x")])
    assert result.layers == ("p.x",)
    with pytest.raises(ConfigError, match="no name has 'z' in any source"):
        compare_all([{"p.x": a}, {"p.x": b}, {"p.x": c}], rename=[("z", "x")])


def test_nothing_is_dropped_without_a_reason() -> None:
    good, zero = planted(SHAPE, [1.0]), LowRank(torch.zeros(90, 2), torch.ones(2, 80))
    turned = planted((80, 90), [1.0])
    result = compare_all(
        [{"a": good, "b": zero, "c": good}, {"a": good, "b": good, "c": turned}, {"a": good, "b": good, "c": good}]
    )
    assert result.layers == ("a",)
    reasons = {one.name: one.reason for one in result.skipped}
    assert "in source 1" in reasons["b"]
    assert "is zero" in reasons["b"]
    assert "(80, 90) in source 2 and (90, 80) in source 1" in reasons["c"]


def test_what_cannot_be_compared_is_an_error(tmp_path: Path) -> None:
    good, zero = planted(SHAPE, [1.0]), LowRank(torch.zeros(90, 2), torch.ones(2, 80))
    with pytest.raises(ConfigError, match="at least two"):
        compare_all([{"p": good}])
    with pytest.raises(ConfigError, match="at least two"):
        compare_all("adapter")
    with pytest.raises(RankscopeError, match="no layer is in all 3 sources: source 1 has p, q; source 2 has p, r; "):
        compare_all([{"p": good, "q": good}, {"p": good, "r": good}, {"q": good, "r": good}])
    with pytest.raises(RankscopeError, match="source 1 and source 3 have no layer in common"):
        compare_all([{"p": good}, {"p": good}, {"q": good}])
    with pytest.raises(RankscopeError, match=r"no layer can be compared in all sources; p: in source 3: .* is zero"):
        compare_all([{"p": good}, {"p": good}, {"p": zero}])
    with pytest.raises(ConfigError, match="top = 0"):
        compare_all([{"p": good}] * 3, top=0)
    with pytest.raises(ConfigError, match="'C'"):
        compare_all([{"p": good}] * 3, of="C")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="4 initial adapters were given for 3"):
        compare_all([{"p": good}] * 3, initial=["x"] * 4)
    with pytest.raises(ConfigError, match="initial adapter"):
        compare_all([{"p": good}] * 3, initial=["x"])
    tensors = linear("block.q")
    paths = [write_adapter(tmp_path / name, tensors) for name in "ab"]
    tensors[f"{PREFIX}block.q.lora_B.weight"][1, 1] = math.inf
    with pytest.raises(NonFiniteError, match=r"bad.*block\.q"):
        compare_all([*paths, write_adapter(tmp_path / "bad", tensors)])


def test_json_round_trip() -> None:
    result = compare_all(mixed_sources())
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert value["schema"] == "rankscope.matrix/1"
    assert value["left"]["p"][0][0] is None
    again = MatrixResult.from_json(value)
    assert again.to_json() == value
    assert again.order == result.order
    assert again.beyond_chance == result.beyond_chance
    with pytest.raises(FormatError, match="schema"):
        MatrixResult.from_json({**value, "schema": "rankscope.matrix/2"})


def test_p_of_more_than_half_of_the_layers() -> None:
    """By hand: two pairs would need three sources; one side of one pair, layers' p of .01 to .05."""
    layers = np.array([0.05, 0.01, 0.03, 0.02, 0.04])[:, None, None] * np.ones((2, 2))
    assert combine_p_values([layers])[0][0, 1] == pytest.approx(0.03 * 5 / 3)  # the third of five
    assert combine_p_values([layers, layers])[1][0, 1] == pytest.approx(2 * 0.03 * 5 / 3)
    assert combine_p_values([layers[:1]])[0][0, 1] == pytest.approx(0.05)
    assert combine_p_values([layers[:2]])[0][1, 0] == pytest.approx(0.05)  # both of two
    assert combine_p_values([layers * 40])[0][0, 1] == 1


def test_chance_is_beyond_it_no_more_often_than_said() -> None:
    """Random directions: of 20 matrices of six sources, hardly any has a pair that is called more than chance."""
    false = 0
    for trial in range(20):
        sources: list[Updates] = [
            {f"l{i}": planted((30, 24), [2.0, 1.0], seed=7919 * trial + 101 * s + 10 * i) for i in range(3)}
            for s in range(6)
        ]
        result = compare_all(sources)
        false += any(np.nanmin(side.p) < 0.05 for side in result.sides.values())
    assert false <= 3


def test_shared_initial_factors_are_suspected() -> None:
    rows = normal(4, SHAPE[1], seed=11)
    sources: list[Updates] = [{"w": LowRank(normal(SHAPE[0], 4, seed=seed), rows)} for seed in range(3)]
    assert any("in 3 pairs the A side" in note for note in compare_all(sources).notes)
    assert not any("A side" in note for note in compare_all(two_groups()).notes)


def test_runs_that_began_alike_are_told(tmp_path: Path) -> None:
    for run, seed in (("one", 1), ("two", 1), ("three", 2)):
        start = linear("block.q", out=40, n=60, r=2, seed=seed)
        start[f"{PREFIX}block.q.lora_B.weight"].zero_()
        write_adapter(tmp_path / run / "initial", start)
        write_adapter(tmp_path / run / "adapter", linear("block.q", out=40, n=60, r=2, seed=30 + len(run)))
        (tmp_path / run / "run.json").write_text("{}")
    result = compare_all([tmp_path / run for run in ("one", "two", "three")])
    assert any("in 1 pair the rows of A overlapped before training" in note for note in result.notes)


def test_initial_adapters_are_taken_off_in_turn(tmp_path: Path) -> None:
    start = linear("block.q", out=20, n=16, r=2, seed=5)
    pissa = write_adapter(tmp_path / "pissa", linear("block.q", out=20, n=16, r=2, seed=6), init_lora_weights="pissa")
    initial = write_adapter(tmp_path / "start", start, init_lora_weights="pissa")
    plain = [write_adapter(tmp_path / str(i), linear("block.q", out=20, n=16, r=2, seed=i)) for i in range(2)]
    result = compare_all([plain[0], pissa, plain[1]], initial=[None, initial])
    pair = compare(plain[0], pissa, initial=[None, initial])
    without = compare(plain[0], pissa)
    assert result.cosine is not None
    assert result.cosine[0, 1] == pytest.approx(pair.summary.cosine, abs=1e-10)
    assert abs(result.cosine[0, 1] - (without.summary.cosine or 0)) > 1e-3


def test_names_that_can_be_told_apart() -> None:
    assert distinct_names(["/x/study/runs/a/adapter", "/x/study/runs/b/adapter"]) == ["a", "b"]
    assert distinct_names(["/x/one/runs/a/adapter", "/x/two/runs/a/adapter", "/x/c"]) == [
        "one/runs/a",
        "two/runs/a",
        "c",
    ]
    assert distinct_names(["/x/a", "/x/a", "/x/b"]) == ["a", "a (2)", "b"]
    assert distinct_names(["source 1", "source 2"]) == ["source 1", "source 2"]


def test_repr_carries_the_chance_level() -> None:
    result = compare_all(two_groups())
    assert "5 sources, 5 layers" in repr(result)
    assert "(chance 0.044)" in repr(result)
    assert "source 1" in result._repr_html_()
    assert rankscope.compare_all is compare_all
    assert rankscope.MatrixResult is MatrixResult


def test_a_kohya_file_beside_peft_adapters(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    tensors = linear(name, out=20, n=16, r=2)
    kohya = {
        "lora_unet_" + name.replace(".", "_") + f".lora_{side}.weight": tensors[f"{PREFIX}{name}.lora_{half}.weight"]
        for side, half in (("down", "A"), ("up", "B"))
    }
    save_file(kohya | {"lora_unet_" + name.replace(".", "_") + ".alpha": torch.tensor(2.0)}, tmp_path / "k.safetensors")
    one = write_adapter(tmp_path / "one", tensors, r=2, lora_alpha=2)
    two = write_adapter(tmp_path / "two", linear(name, out=20, n=16, r=2, seed=9), r=2, lora_alpha=2)
    result = compare_all([one, tmp_path / "k.safetensors", two])
    assert result.cosine is not None
    assert result.cosine[0, 1] == pytest.approx(1, abs=1e-12)
    assert sorted(map(sorted, combinations(result.order[:2], 2))) in ([[0, 1]], [[0, 2]], [[1, 2]])
