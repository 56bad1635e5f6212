"""Overlap across ranks and seeds: planted directions are found again, random ones are not, and a shared start fools no
one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from makers import frame, generator, normal
from torch import Tensor

from rankscope.analysis.layer_comparison import MatrixKind
from rankscope.errors import ConfigError, RankscopeError
from rankscope.evidence.material import Material
from rankscope.evidence.overlap.figure import plot_directions, plot_overlaps
from rankscope.evidence.overlap.measure import Overlap, measure_overlap, random_pair, verdicts
from rankscope.evidence.overlap.pairs import OverlapGrid, RunComparison, RunUpdates, SideOverlap, compare_runs
from rankscope.evidence.overlap.section import build_section
from rankscope.inference import Interval
from rankscope.result import _array, json_values
from rankscope.train.config import StudyConfig
from rankscope.train.study import Study, run_study
from rankscope.updates import LowRank, Update
from rankscope.verdict import MissingEvidenceError

LAYERS = tuple(f"layers.{i}.q_proj" for i in range(8))
OUT, INTO = 48, 64


def planted_study(folder: Path, **settings: object) -> Study:
    values = {
        "task": "planted",
        "ranks": (2, 4),
        "seeds": (0, 1),
        "steps": 120,
        "full": False,
        "device": "cpu",
        **settings,
    }
    return run_study(StudyConfig(**values), folder / "study")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return planted_study(tmp_path_factory.mktemp("overlap"))


@pytest.fixture(scope="module")
def found(study: Study) -> Overlap:
    return measure_overlap(Material(study))


def run(name: str, rank: int, updates: Mapping[str, Update], initial: Mapping[str, Update] | None = None) -> RunUpdates:
    return RunUpdates(name, rank, updates, initial or {})


def gaussian(rank: int, seed: int) -> dict[str, Update]:
    """Layers with nothing in common with those of another seed."""
    return {
        name: LowRank(normal(OUT, rank, seed=97 * seed + 2 * i), normal(rank, INTO, seed=97 * seed + 2 * i + 1))
        for i, name in enumerate(LAYERS)
    }


def factors(B: Mapping[str, Tensor], A: Mapping[str, Tensor]) -> dict[str, Update]:
    return {name: LowRank(B[name], A[name]) for name in LAYERS}


def drawn_like_torch(rank: int, seed: int) -> dict[str, Tensor]:
    """A of each layer as ``nn.Linear`` starts it, each layer from one stream: row by row."""
    bound = math.sqrt(1 / INTO)
    return {
        name: torch.empty(rank, INTO).uniform_(-bound, bound, generator=generator(seed + i)).double()
        for i, name in enumerate(LAYERS)
    }


# A study


def test_planted_directions_are_found_again_at_another_rank_and_seed(found: Overlap) -> None:
    assert found.ranks is not None
    assert (found.ranks.rank_a, found.ranks.rank_b) == (2, 4)
    assert [[name.split("-lr")[0] for name in pair] for pair in found.ranks.pairs] == [["lora-r2", "lora-r4"]] * 2
    assert all(a[-2:] == b[-2:] for a, b in found.ranks.pairs)  # the same seed
    assert [(one.rank_a, one.rank_b, len(one.pairs)) for one in found.seeds] == [(2, 2, 1), (4, 4, 1)]
    for one in (found.ranks, *found.seeds):
        for side in one.sides.values():
            assert side.top.value > 0.9
            assert side.significant == side.layers == 2
            assert side.top_expected == pytest.approx((1 / 64 + 1 / 96) / 2)
            assert side.is_informative
    assert [v.answer for v in verdicts(found)] == ["yes", "yes"]
    assert verdicts(found)[0].value == found.ranks.left.top.value  # type: ignore[union-attr]


def test_a_random_pair_beside_it_is_at_chance(found: Overlap) -> None:
    assert [(one.rank_a, one.rank_b) for one in found.random] == [(2, 2), (4, 4)]
    for one in found.random:
        for side in one.sides.values():
            assert side.significant == 0
            assert side.square.value < 4 * side.square_expected
            assert side.initial_z is None


def test_initial_factors_of_a_study_are_no_more_alike_than_chance(found: Overlap) -> None:
    for one in (found.ranks, *found.seeds):
        assert one is not None
        assert one.left.initial_z is None  # type: ignore[union-attr]
        assert one.right.initial_z < 3  # type: ignore[union-attr, operator]
        assert len(one.right.grid.initial) == one.right.k  # type: ignore[union-attr]


@pytest.mark.parametrize(("of", "sides"), [("A", ["right"]), ("B", ["left"])])
def test_factors_alone(study: Study, of: MatrixKind, sides: list[str]) -> None:
    said = measure_overlap(Material(study, of=of))
    assert said.ranks is not None
    assert list(said.ranks.sides) == sides
    assert all(v.claim.startswith(f"Top directions of {of} ") for v in verdicts(said))
    assert f"{sides[0]} side" in verdicts(said)[0].sentence
    assert plot_overlaps(said).axes
    assert build_section(said, verdicts(said)).pictures


def test_one_seed_or_one_rank_leaves_a_part_undecided(study: Study, tmp_path: Path) -> None:
    one_seed = measure_overlap(Material(_part(study, tmp_path / "seed", "*-s0")))
    assert (one_seed.seeds, one_seed.random) == ((), ())
    ranks, seeds = verdicts(one_seed)
    assert ranks.answer == "yes"
    assert "1 pair of runs" in ranks.sentence
    assert (seeds.answer, seeds.value) == ("undecided", None)
    assert "not enough seeds" in seeds.sentence
    one_rank = measure_overlap(Material(_part(study, tmp_path / "rank", "*-r2-*")))
    ranks, seeds = verdicts(one_rank)
    assert (ranks.answer, seeds.answer) == ("undecided", "yes")
    assert "only one rank" in ranks.sentence
    for part in (one_seed, one_rank):
        assert len(plot_directions(part).axes) == 2
        assert len(build_section(part, verdicts(part)).verdicts) == 2
    with pytest.raises(MissingEvidenceError, match="--ranks or --seeds"):
        measure_overlap(Material(_part(study, tmp_path / "run", "*-r2-*-s0")))


def _part(study: Study, folder: Path, pattern: str) -> Study:
    """A study of some of the runs."""
    (folder / "runs").mkdir(parents=True)
    (folder / "study.json").write_bytes((study.folder / "study.json").read_bytes())
    for path in (study.folder / "runs").glob(pattern):
        (folder / "runs" / path.name).symlink_to(path)
    return Study(folder)


# What is compared, and how it is counted


def test_numbers_are_those_of_the_layers() -> None:
    """Medians by hand, from overlaps by numpy."""
    a, b = gaussian(3, 1), gaussian(5, 2)
    one = compare_runs([(run("a", 3, a), run("b", 5, b))])
    by_layer = []
    for name in LAYERS:
        U, V = (np.linalg.svd(x[name].dense().double().numpy())[0] for x in (a, b))
        by_layer.append(((U[:, 0] @ V[:, 0]) ** 2, np.linalg.norm(U[:, :3].T @ V[:, :3]) ** 2 / 3))
    assert one.left is not None
    rows = [row for row in one.rows if row.side == "left"]
    assert [row.top.overlap for row in rows] == pytest.approx([top for top, _ in by_layer], rel=1e-4)
    assert [row.square.overlap for row in rows] == pytest.approx([square for _, square in by_layer], rel=1e-4)
    assert one.left.top.value == pytest.approx(np.median([top for top, _ in by_layer]), rel=1e-4)
    assert one.left.square.value == pytest.approx(np.median([square for _, square in by_layer]), rel=1e-4)
    assert (one.left.k, one.left.square_expected, one.left.top_expected) == (3, 3 / OUT, 1 / OUT)
    assert {row.d for row in rows} == {OUT}
    assert one.left.grid.overlap.shape == (3, 5)
    assert one.left.grid.diagonal[0][2] == pytest.approx(one.left.square.value)
    assert len(one.left.grid.high) == 3
    assert (one.left.grid.high > one.left.grid.diagonal[1]).all()


def test_holm_counts_every_layer_and_side() -> None:
    one = compare_runs([(run("a", 2, gaussian(2, 1)), run("b", 2, gaussian(2, 2)))])
    p = sorted(row.p for row in one.rows)
    assert len(p) == 2 * len(LAYERS)
    assert min(row.holm for row in one.rows) == pytest.approx(min(1.0, len(p) * p[0]))
    assert max(row.holm for row in one.rows) <= 1


def test_every_pair_of_runs_has_to_pass() -> None:
    """Two runs that agree and a third that does not: of three pairs two are at chance."""
    same, other = gaussian(2, 1), gaussian(2, 2)
    runs = [run("a", 2, same), run("b", 2, same), run("c", 2, other)]
    agreeing = compare_runs([(runs[0], runs[1])])
    assert agreeing.left is not None
    assert agreeing.left.significant == len(LAYERS)
    assert agreeing.left.top.value == pytest.approx(1)
    three = compare_runs([(runs[0], runs[1]), (runs[0], runs[2]), (runs[1], runs[2])])
    assert three.left is not None
    assert three.left.significant == 0
    assert three.left.top.value < 0.2


def test_layers_that_only_some_runs_have_are_left_out() -> None:
    a, b = gaussian(2, 1), gaussian(2, 1)
    b.pop(LAYERS[0])
    b[LAYERS[1]] = LowRank(torch.zeros(OUT, 2), normal(2, INTO))
    one = compare_runs([(run("a", 2, a), run("b", 2, b))])
    assert {row.layer for row in one.rows} == set(LAYERS[2:])
    assert len(one.skipped) == 1
    assert LAYERS[1] in one.skipped[0]
    with pytest.raises(RankscopeError, match="every pair"):
        compare_runs(
            [
                (run("a", 2, {LAYERS[0]: a[LAYERS[0]]}), run("b", 2, {LAYERS[0]: a[LAYERS[0]]})),
                (run("a", 2, {LAYERS[1]: a[LAYERS[1]]}), run("b", 2, {LAYERS[1]: a[LAYERS[1]]})),
            ]
        )


def test_a_random_pair_has_the_shapes_and_nothing_in_common() -> None:
    a, b = random_pair(gaussian(2, 1), 3)
    again, _ = random_pair(gaussian(2, 5), 3)
    for name in LAYERS:
        assert (a.updates[name].shape, a.updates[name].nominal_rank) == ((OUT, INTO), 3)
        assert torch.equal(a.updates[name].dense(), again.updates[name].dense())
        assert abs(a.updates[name].inner(b.updates[name])) < 0.3 * a.updates[name].norm * b.updates[name].norm
    one, other = (a.updates[name].dense() for name in LAYERS[:2])
    assert not torch.equal(one, other)


# The same-seed confound


def test_with_one_seed_a_small_a_begins_as_a_part_of_a_large_one() -> None:
    """METHODS §2: φ(8, 64) is 1.000 before any training."""
    small, large = drawn_like_torch(4, seed=0), drawn_like_torch(16, seed=0)
    for name in LAYERS:
        assert torch.equal(small[name], large[name][:4])
    zero = {name: torch.zeros(OUT, 16) for name in LAYERS}
    starts = [run("r4", 4, factors(_rows(zero, 4), small)), run("r16", 16, factors(zero, large))]
    one = compare_runs([tuple(run(s.name, s.rank, s.updates) for s in starts)], of="A")  # type: ignore[list-item, misc]
    assert one.right is not None
    assert one.right.grid.overlap[-1, -1] == pytest.approx(1.000, abs=1e-9)


def _rows(zero: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {name: B[:, :rank] for name, B in zero.items()}


def confounded(same_start: bool, kept: bool = True) -> RunComparison:
    """Random B on an A that hardly moved: what training leaves where it has not learned any direction."""
    A = {4: drawn_like_torch(4, 0), 16: drawn_like_torch(16, 0 if same_start else 500)}
    runs = []
    for rank in (4, 16):
        B = {name: normal(OUT, rank, seed=40 * rank + i) for i, name in enumerate(LAYERS)}
        moved = {name: A[rank][name] + 1e-3 * normal(rank, INTO, seed=50 * rank) for name in LAYERS}
        zero = {name: torch.zeros(OUT, rank) for name in LAYERS}
        runs.append(run(f"r{rank}", rank, factors(B, moved), factors(zero, A[rank]) if kept else None))
    return compare_runs([(runs[0], runs[1])])


def test_a_shared_start_does_not_fool_the_verdict() -> None:
    shared = confounded(same_start=True)
    assert shared.left is not None
    assert shared.right is not None
    assert shared.right.significant == len(LAYERS)  # the trap: the right side overlaps far beyond chance
    assert shared.right.initial_z is not None
    assert shared.right.initial_z > 10
    assert not shared.right.is_informative
    assert shared.left.significant == 0
    said = verdicts(Overlap(of="update", ranks=shared, seeds=(), random=()))[0]
    assert said.answer == "no"
    assert "it does not count: A overlapped with z =" in said.sentence
    apart = confounded(same_start=False)
    assert apart.right is not None
    assert apart.right.is_informative
    assert apart.right.significant == 0


def test_of_a_alone_a_shared_start_decides_nothing() -> None:
    """The paper's literal form has no other side to judge by."""
    for kept, why in ((True, "overlapped with z ="), (False, "not known where A began")):
        one = confounded(same_start=True, kept=kept)
        assert one.right is not None
        alone = msgspec.structs.replace(one, left=None)
        said = verdicts(Overlap(of="A", ranks=alone, seeds=(), random=()))[0]
        assert said.answer == "undecided"
        assert why in said.sentence


def test_shared_output_directions_are_seen_whatever_a_does() -> None:
    B = {name: normal(OUT, 4, seed=i) for i, name in enumerate(LAYERS)}
    core = {name: torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)) for name in LAYERS}
    updates = [
        factors(
            {n: torch.linalg.qr(B[n])[0] @ core[n] for n in LAYERS},
            {n: frame(INTO, 4, seed + i).T for i, n in enumerate(LAYERS)},
        )
        for seed in (100, 300)
    ]
    one = compare_runs([(run("a", 4, updates[0]), run("b", 4, updates[1]))])
    said = verdicts(Overlap(of="update", ranks=None, seeds=(one,), random=()))[1]
    assert said.answer == "yes"
    assert said.value == pytest.approx(1)
    assert one.right is not None
    assert one.right.significant == 0


def test_a_start_at_directions_of_the_weight_is_seen_on_the_left() -> None:
    """PiSSA: B begins as singular vectors of the weight, the same with every seed."""
    began = gaussian(2, 9)
    one = compare_runs([(run("a", 2, gaussian(2, 1), began), run("b", 2, gaussian(2, 1), began))])
    assert one.left is not None
    assert one.left.initial_z is not None
    assert one.left.initial_z > 3
    said = verdicts(Overlap(of="update", ranks=None, seeds=(one,), random=()))[1]
    assert said.answer == "undecided"
    assert "B overlapped" in said.sentence


# Verdicts from numbers


def side(top: Interval, significant: int, initial_z: float | None = None, name: str = "left") -> SideOverlap:
    flat = np.full((2, 2), top.value)
    grid = OverlapGrid(layers=20, overlap=flat, expected=flat, low=flat[0], high=flat[0], initial=np.empty(0))
    return SideOverlap(
        side=name,  # type: ignore[arg-type]
        layers=20,
        top=top,
        top_expected=0.01,
        top_z=1.0,
        square=top,
        square_expected=0.02,
        square_z=1.0,
        significant=significant,
        initial_z=initial_z,
        grid=grid,
    )


RULES = {
    "shared": (Interval(0.7, 0.6, 0.8), 20, False, "yes", "above the 0.5"),
    "beyond chance, and yet not shared": (Interval(0.1, 0.05, 0.2), 11, False, "yes", "below the 0.5"),
    "as much as chance": (Interval(0.01, 0.004, 0.03), 1, False, "no", "below the 0.5"),
    "half of the layers": (Interval(0.1, 0.05, 0.2), 10, False, "no", "below the 0.5"),
    "half of the layers, maybe shared": (Interval(0.4, 0.005, 0.6), 10, False, "undecided", "about the 0.5"),
    "the subspace and not its first direction": (
        Interval(0.02, 0.004, 0.05),
        19,
        False,
        "undecided",
        "do not for sure",
    ),
    "a better rate may be beyond": (Interval(0.01, 0.004, 0.03), 1, True, "undecided", "end of those tried"),
    "a better rate changes no yes": (Interval(0.7, 0.6, 0.8), 20, True, "yes", "end of those tried"),
    "no interval": (Interval(0.7), 20, False, "undecided", "0.7, median"),
    "no interval, low": (Interval(0.01), 1, False, "undecided", "0.01, median"),
}


@pytest.mark.parametrize("rule", RULES)
def test_verdicts_follow_from_numbers(rule: str) -> None:
    top, significant, edge, answer, words = RULES[rule]
    one = RunComparison(
        rank_a=2,
        rank_b=4,
        pairs=(("a", "b"),),
        edge=edge,
        left=side(top, significant),
        right=side(Interval(0.99), 20, 0.1, "right"),
        rows=(),
        skipped=(),
    )
    for said in (
        verdicts(Overlap(of="update", ranks=one, seeds=(), random=()))[0],
        verdicts(Overlap(of="update", ranks=None, seeds=(one,), random=()))[1],
    ):
        assert said.answer == answer
        assert words in said.sentence
        assert (said.value, said.low, said.high) == top
        assert f"{significant} of 20 layers" in said.sentence


def test_seeds_are_judged_at_the_highest_rank(found: Overlap) -> None:
    assert "r = 4 against r = 4" in verdicts(found)[1].sentence


# Results as files, figures and text


def test_results_are_json(found: Overlap) -> None:
    values = json_values(found)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    again = msgspec.convert(values, Overlap, dec_hook=_array)
    assert json_values(again) == values
    assert verdicts(again) == verdicts(found)


def test_figures(found: Overlap) -> None:
    maps = plot_overlaps(found)
    images = [axes.images[0] for axes in maps.axes if axes.images]
    assert len(images) == 8
    assert {image.get_clim() for image in images} == {(0.0, 1.0)}  # one scale for what is measured and for chance
    assert np.array_equal(images[0].get_array(), found.ranks.left.grid.overlap)  # type: ignore[union-attr]
    assert np.array_equal(images[1].get_array(), found.ranks.left.grid.expected)  # type: ignore[union-attr]
    assert np.array_equal(images[5].get_array(), found.random[-1].left.grid.overlap)  # type: ignore[union-attr]
    lines = plot_directions(found)
    assert len(lines.axes) == 4
    labels = {text.get_text() for legend in lines.legends for text in legend.get_texts()}
    assert {"expected by chance, i/d", "95 % of layers by chance", "factors before training", "random pair"} <= labels
    for axes in (*maps.axes, *lines.axes):
        assert axes.get_xlabel() or axes.get_ylabel()
    with pytest.raises(ConfigError, match="nothing to plot"):
        plot_overlaps(Overlap(of="update", ranks=None, seeds=(), random=()))


def test_section(found: Overlap) -> None:
    made = build_section(found, verdicts(found))
    assert (len(made.verdicts), len(made.pictures), len(made.tables)) == (2, 2, 2)
    for picture in made.pictures:
        assert f"{found.ranks.left.top.value:.2g}" in picture.alt  # type: ignore[union-attr]
        assert picture.draw().axes
    for table in (*made.tables, *(picture.data for picture in made.pictures)):
        assert table.rows
        assert all(len(row) == len(table.header) for row in table.rows)
    summary, layers = made.tables
    assert len(summary.rows) == 2 * (1 + 2 + 2)
    assert len(layers.rows) == 2 * 2 * (1 + 2)
    assert "counts: A overlapped" in " ".join(made.notes)
