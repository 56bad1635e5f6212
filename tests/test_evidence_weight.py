"""Updates against their weights: a study with planted directions, one that was trained, and verdicts by their rules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from makers import frame, normal
from matplotlib.figure import Figure
from torch import Tensor

from rankscope.analysis import svd_cache as bases
from rankscope.analysis.amplification import Amplification
from rankscope.analysis.svd_cache import SVDCache
from rankscope.cli import main
from rankscope.evidence.material import Material
from rankscope.evidence.weight.figure import plot_intruders, plot_positions, plot_weight
from rankscope.evidence.weight.layers import FULL_RANKS
from rankscope.evidence.weight.measure import (
    INTRUDER_COUNT_THRESHOLD,
    REACH_THRESHOLD,
    AmplificationSlope,
    AmplificationSummary,
    IntruderSummary,
    WeightComparison,
    measure_weight,
    verdicts,
)
from rankscope.evidence.weight.section import build_section
from rankscope.inference import Interval
from rankscope.linalg import dense_svd
from rankscope.result import json_values
from rankscope.train.config import StudyConfig
from rankscope.train.study import Study, run_study
from rankscope.updates import Dense, LowRank, Update
from rankscope.verdict import MissingEvidenceError, Verdict

# A study whose updates are planted

LAYERS = tuple(f"blocks.{at}.proj" for at in range(8))
SIDE = 24


def base_weight(at: int) -> Tensor:
    """σ_l = 1/l, in float32 as a model's weights are."""
    sigma = 1 / torch.arange(1.0, SIDE + 1, dtype=torch.float64)
    return (frame(SIDE, SIDE, at) * sigma @ frame(SIDE, SIDE, 50 + at).T).float()


WEIGHTS = {name: base_weight(at) for at, name in enumerate(LAYERS)}


def along(name: str, places: Sequence[int], sigma: float, scale: float = 1.0) -> LowRank:
    """scale · σ · Σ u_l·v_lᵀ over these of the weight's own directions, from 1."""
    U, _, Vt = dense_svd(WEIGHTS[name].double())
    at = [place - 1 for place in places]
    return LowRank(U[:, at] * torch.linspace(1.01, 1, len(at), dtype=torch.float64) * sigma, Vt[at], scale)


class Planted:
    """What ``weight`` reads of a study: runs are (rank, seed, edge), their updates given."""

    device = "cpu"

    def __init__(self, runs: Mapping[tuple[int | None, int], Mapping[str, Update]], edge: Sequence[int] = ()) -> None:
        self.runs, self.edge, self.decomposed, self.bases = runs, edge, [], SVDCache()
        self.layers = list(LAYERS)

    def _rows(self, full: bool) -> list[Any]:
        return [
            SimpleNamespace(
                record=SimpleNamespace(run=SimpleNamespace(rank=rank, seed=seed)),
                choice=SimpleNamespace(edge="high" if rank in self.edge else None),
            )
            for rank, seed in self.runs
            if (rank is None) == full
        ]

    def lora_rows(self) -> list[Any]:
        return self._rows(full=False)

    def best_rows(self, method: str) -> list[Any]:
        assert method == "full"
        return self._rows(full=True)

    def store(self, row: Any) -> Mapping[str, Update]:
        return self.runs[row.record.run.rank, row.record.run.seed]

    def weight(self, name: str) -> Tensor:
        self.decomposed.append(name)
        return WEIGHTS[name]

    def track(self, names: Sequence[str]) -> Sequence[str]:
        return names


def measured(runs: Mapping[tuple[int | None, int], Mapping[str, Update]], edge: Sequence[int] = ()) -> WeightComparison:
    return measure_weight(cast(Material, Planted(runs, edge)))


def everywhere(places: Sequence[int], sigma: float, scale: float = 1.0) -> dict[str, Update]:
    return {name: along(name, places, sigma, scale) for name in LAYERS}


def test_planted_table() -> None:
    """r = 1 along the third direction (1/3) with ‖ΔW‖ = 2·σ, r = 2 along the second and fourth."""
    found = measured({(1, 0): everywhere([3], 0.5, 2.0), (2, 0): everywhere([2, 4], 0.5)})
    one, two = found.lora_strengths
    assert (one.rank, one.r, one.layers, one.seeds) == (1, 1, 8, 1)
    assert one.median.own == pytest.approx(1 / 3, rel=1e-5)
    assert one.median.top == pytest.approx(1, rel=1e-5)
    assert one.median.norm == pytest.approx(1.01, rel=1e-5)
    assert one.amplification is not None
    assert one.amplification == pytest.approx(Interval(3.03, 3.03, 3.03), rel=1e-4)
    assert one.reach.value == pytest.approx(1 / 3, rel=1e-5)
    rms = math.sqrt(sum(1 / place**2 for place in range(1, SIDE + 1))) / SIDE
    assert one.median.random == pytest.approx(rms, rel=1e-5)
    assert one.ratio.value == pytest.approx(1 / 3 / rms, rel=1e-4)
    assert two.median.own == pytest.approx(math.sqrt(1 / 4 + 1 / 16), rel=1e-4)
    assert two.median.random == pytest.approx(2 * rms, rel=1e-5)
    assert found.fall is not None
    slope = math.log(two.median.amplification / one.median.amplification) / math.log(2)  # type: ignore[operator]
    assert found.fall.slope.value == pytest.approx(slope, rel=1e-4)
    norms = two.median.norm / one.median.norm
    assert found.fall.random == pytest.approx(math.log(norms / 2) / math.log(2), rel=1e-4)
    assert found.full_strengths == []


def test_seeds_are_averaged_and_the_largest_p_kept() -> None:
    both = measured({(1, 0): everywhere([1], 0.5), (1, 1): everywhere([5], 0.5)})
    single = [measured({(1, 0): everywhere([place], 0.5)}).columns[0].found for place in (1, 5)]
    cell = both.columns[0].found
    assert both.columns[0].seeds == 2
    assert cell.own == pytest.approx((1 + 1 / 5) / 2, rel=1e-5)
    assert cell.p == pytest.approx(max(one.p for one in single))
    assert min(one.p for one in single) < cell.p / 2
    assert cell.amplification == pytest.approx(0.505 / 0.6, rel=1e-5)  # of the means
    assert both.columns[0].holm == pytest.approx(min(1, 8 * cell.p))  # eight layers alike


def test_positions_of_the_planted_directions() -> None:
    """Directions 2 and 3 of the weight: all energy at the places 2 and 3, none elsewhere."""
    found = measured({(2, 0): everywhere([2, 3], 0.5)})
    (curve,) = found.curves
    assert (curve.i, curve.ends) == (2, (1, 2, 4, 8, 16, 24))
    for places in curve.sides.values():
        # φ(2, 1) = 0, φ(2, 2) = 1/2, then 1; energy in units of 2/24, the mean over the places of an octave.
        assert places.overlap == pytest.approx((0, 1 / 2, 1, 1, 1, 1), abs=1e-6)
        assert places.energy == pytest.approx((0, 12, 6, 0, 0, 0), abs=1e-4)
        assert places.expected == pytest.approx((2 / 24, 2 / 24, 4 / 24, 8 / 24, 16 / 24, 1))


def test_a_planted_intruder() -> None:
    """A direction spread over all old ones, three times as strong as the strongest, in every second layer."""
    updates: dict[str, Update] = {}
    for at, name in enumerate(LAYERS):
        U, _, Vt = dense_svd(WEIGHTS[name].double())
        spread = torch.full((SIDE,), 1 / math.sqrt(SIDE), dtype=torch.float64)
        strength = 3.0 if at % 2 else 1e-4
        updates[name] = LowRank((U @ spread)[:, None] * strength, (spread @ Vt)[None])
    found = measured({(4, 0): updates, (None, 0): {name: Dense(u.dense() * 1e-3) for name, u in updates.items()}})
    lora, full = found.novelties
    assert [one.count >= 1 for one in found.intruders if one.rank == 4] == [False, True] * 4
    assert (lora.some, lora.layers, lora.directions) == (4, 8, 10)
    assert lora.count.value == pytest.approx(0.5)
    assert (full.mean, full.some, full.share) == (0, 0, None)
    first = found.intruders[1]
    total = math.fsum(1 / place**2 for place in range(1, SIDE + 1))
    assert first.share > 0.8 * 9 / (9 + total)
    assert first.cosines[0][0] < 0.5
    assert len(first.cosines[0]) == 10


def test_full_fine_tuning_is_measured_at_its_top_directions() -> None:
    dense = {name: Dense(normal(SIDE, SIDE, seed=500 + at) * 0.01) for at, name in enumerate(LAYERS)}
    found = measured({(1, 0): everywhere([2], 0.1), (None, 0): dense})
    assert [(one.rank, one.r) for one in found.full_strengths] == [(None, 1), (None, 4), (None, 16)]  # 64 do not fit
    for one in found.full_strengths:
        own = []
        for name in LAYERS:
            U, _, Vt = np.linalg.svd(dense[name].matrix.double().numpy())
            own.append(np.linalg.norm(U[:, : one.r].T @ WEIGHTS[name].double().numpy() @ Vt[: one.r].T))
        assert one.median.own == pytest.approx(float(np.median(own)), rel=1e-4)
        assert one.significant == 0  # noise points nowhere
    assert found.fall is None  # one LoRA rank


def test_each_weight_is_read_once() -> None:
    study = Planted({(rank, seed): everywhere([rank], 0.1) for rank in (1, 2, 3) for seed in (0, 1)})
    measure_weight(cast(Material, study))
    assert study.decomposed == list(LAYERS)


def test_what_cannot_be_measured_is_said() -> None:
    updates = everywhere([2], 0.5)
    updates[LAYERS[0]] = along(LAYERS[0], [1], 0.0)
    updates[LAYERS[1]] = LowRank(normal(5, 1), normal(1, 4))
    del updates[LAYERS[2]]
    found = measured({(1, 0): updates})
    assert found.lora_strengths[0].layers == 5
    assert len(found.skipped) == 2
    assert LAYERS[0] in found.skipped[0]
    assert "is zero" in found.skipped[0]
    assert "differ in shape" in found.skipped[1]
    assert "2 not measured" in build_section(found, verdicts(found)).notes[-1]
    with pytest.raises(MissingEvidenceError, match="is zero"):
        measured({(1, 0): {LAYERS[0]: updates[LAYERS[0]]}, (None, 0): {LAYERS[3]: Dense(normal(SIDE, SIDE))}})


# A study that was trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Study:
    config = StudyConfig(task="planted", ranks=(1, 4), seeds=(0, 1), steps=10)
    return run_study(config, tmp_path_factory.mktemp("weight") / "study")


def test_a_trained_study_against_numpy(trained: Study) -> None:
    material = Material(trained)
    found = measure_weight(material)
    assert [(one.rank, one.r) for one in found.lora_strengths] == [(1, 1), (4, 4)]
    assert [(one.rank, one.r) for one in found.full_strengths] == [(None, r) for r in FULL_RANKS]
    assert [curve.rank for curve in found.curves] == [1, 4, None]
    for column in (one for one in found.columns if one.rank == 4):
        W = material.weight(column.layer).double().numpy()
        own, norms = [], []
        for row in (row for row in material.lora_rows() if row.record.run.rank == 4):
            update = material.store(row)[column.layer].dense().double().numpy()
            U, _, Vt = np.linalg.svd(update)
            own.append(np.linalg.norm(U[:, :4].T @ W @ Vt[:4].T))
            norms.append(np.linalg.norm(update))
        assert column.found.own == pytest.approx(np.mean(own), rel=1e-4)
        assert column.found.amplification == pytest.approx(np.mean(norms) / np.mean(own), rel=1e-4)
        assert column.shape == W.shape
    said = verdicts(found)
    assert [one.answer for one in said] == ["undecided"] * 3  # two layers
    assert all("too few layers" in one.sentence for one in said)


def test_a_cache_of_the_base_changes_no_number(
    trained: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = measure_weight(Material(trained))
    assert measure_weight(Material(trained, cache=tmp_path / "kept")) == plain
    assert len(list((tmp_path / "kept").iterdir())) == len(Material(trained).layers)
    monkeypatch.setattr(bases, "dense_svd", lambda _: pytest.fail("decomposed again"))
    assert measure_weight(Material(trained, cache=tmp_path / "kept")) == plain
    out = tmp_path / "page"
    ask = ["report", str(trained.folder), "--lines", "weight", "--cache", str(tmp_path / "kept"), "-o", str(out)]
    with pytest.raises(SystemExit) as ended:
        main([*ask, "--device", "cpu"])
    assert ended.value.code == 0
    assert re.search(r"keeps 2 decompositions, \d+\.\d MB", capsys.readouterr().err)


def test_results_round_trip_and_are_drawn(trained: Study) -> None:
    found = measure_weight(Material(trained))
    value = json_values(found)
    assert msgspec.convert(json.loads(json.dumps(value, allow_nan=False)), WeightComparison) == found
    for draw, panels in ((plot_weight, 2), (plot_positions, 4), (plot_intruders, 2)):
        figure = draw(found)
        assert isinstance(figure, Figure)
        figure.canvas.draw()
        assert len(figure.axes) == panels
        labelled = [axes for axes in figure.axes if axes.get_xlabel()]
        assert labelled
    said = build_section(found, verdicts(found))
    assert said.lead
    assert [picture.name for picture in said.pictures] == ["weight", "weight-positions", "weight-intruders"]
    for table in (*said.tables, *(picture.data for picture in said.pictures)):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.header)}, table.name
    published = [row for row in said.tables[0].rows if str(row[0]).startswith("published")]
    assert [row[1] for row in published] == [4, 64]
    assert published[0][3:6] == [0.32, 21.67, 0.02]
    # Amplification and ‖ΔW‖ of the paper fit its ‖UᵀWV‖.
    header = said.tables[0].header
    for row in published:
        norm, factor = (cast(float, row[header.index(name)]) for name in ("‖ΔW‖", "amplification"))
        assert norm / factor == pytest.approx(cast(float, row[3]), rel=0.02)


# Verdicts by their rules

CELL = Amplification(
    r=4, own=0.32, top=21.67, random=0.02, random_sd=0.004, z=9.0, p=1e-6, norm=6.91, amplification=21.5,
    random_amplification=345.0,
)  # fmt: skip


def strength(rank: int | None, r: int, **changes: Any) -> AmplificationSummary:
    values: dict[str, Any] = {
        "rank": rank,
        "r": r,
        "layers": 28,
        "seeds": 3,
        "edge": False,
        "significant": 20,
        "median": msgspec.structs.replace(CELL, r=r),
        "ratio": Interval(3.0, 2.0, 4.0),
        "reach": Interval(0.1, 0.08, 0.2),
        "amplification": Interval(10.0, 8.0, 12.0),
    }
    return AmplificationSummary(**{**values, **changes})


def novelty(rank: int | None, **changes: Any) -> IntruderSummary:
    values: dict[str, Any] = {
        "rank": rank,
        "layers": 28,
        "seeds": 3,
        "edge": False,
        "directions": 10,
        "count": Interval(0.0, 0.0, 0.0),
        "mean": 0.1,
        "some": 2,
        "sweep": tuple(0.1 * at for at in range(9)),
        "share": 0.02,
        "inside": 0.3,
        "chance": 0.25,
        "inside_chance": 0.25,
    }
    return IntruderSummary(**{**values, **changes})


FALL = AmplificationSlope(ranks=(1, 4), slope=Interval(-1.5, -1.7, -1.3), random=-0.9)


def result(
    fall: AmplificationSlope | None = FALL, count: Interval | None = None, edge: bool = False, **changes: Any
) -> WeightComparison:
    new = {} if count is None else {"count": count}
    return WeightComparison(
        strengths=(strength(1, 1), strength(4, 4, edge=edge, **changes), strength(64, 64), strength(None, 1)),
        curves=(),
        novelties=(novelty(1), novelty(4, **new), novelty(64), novelty(None, mean=0.0)),
        fall=fall,
        columns=(),
        intruders=(),
        skipped=(),
    )


@pytest.mark.parametrize(
    ("ratio", "reach", "answer"),
    [
        (Interval(3, 2, 4), Interval(0.1, 0.05, 0.2), "yes"),
        (Interval(1.1, 0.9, 1.3), Interval(0.1, 0.05, 0.2), "undecided"),
        (Interval(0.8, 0.7, 0.9), Interval(0.1, 0.05, 0.2), "no"),
        (Interval(3, 2, 4), Interval(REACH_THRESHOLD, REACH_THRESHOLD - 0.1, REACH_THRESHOLD + 0.1), "undecided"),
        (Interval(3, 2, 4), Interval(0.8, REACH_THRESHOLD + 0.1, 0.9), "no"),
        (Interval(1.1, 0.9, 1.3), Interval(0.8, REACH_THRESHOLD + 0.1, 0.9), "no"),
        (Interval(3), Interval(0.1), "undecided"),
    ],
)
def test_where_the_update_points(ratio: Interval, reach: Interval, answer: str) -> None:
    first = verdicts(result(ratio=ratio, reach=reach))[0]
    assert first.answer == answer
    assert "At r = 4" in first.sentence or not ratio.known
    assert (first.value, first.low, first.high) == ratio


@pytest.mark.parametrize(
    ("slope", "random", "answer"),
    [
        (Interval(-1.5, -1.7, -1.3), -0.9, "yes"),
        (Interval(-1.0, -1.2, -0.8), -0.9, "undecided"),  # no faster than chance
        (Interval(-0.5, -0.6, -0.4), -0.9, "undecided"),
        (Interval(-0.5, -0.6, -0.4), 0.2, "yes"),
        (Interval(0.1, -0.1, 0.3), 0.2, "undecided"),
        (Interval(0.5, 0.3, 0.7), -0.9, "no"),
        (Interval(0.5, 0.3, 0.7), 0.9, "no"),
        (Interval(-1.5), -0.9, "undecided"),
    ],
)
def test_falling_amplification(slope: Interval, random: float, answer: str) -> None:
    second = verdicts(result(fall=AmplificationSlope(ranks=(1, 4), slope=slope, random=random)))[1]
    assert second.answer == answer
    assert ("Chance alone" in second.sentence) == (answer == "undecided" and (slope.high or 0) < 0)
    assert f"with a slope of {random:.3g}." in second.sentence


def test_random_updates_prove_nothing() -> None:
    """Their amplification falls as 1/r, and they lie where chance puts them."""
    runs = {
        (rank, 0): {
            name: LowRank(normal(SIDE, rank, seed=1000 * rank + at), normal(rank, SIDE, seed=9000 * rank + at), 0.001)
            for at, name in enumerate(LAYERS)
        }
        for rank in (1, 2, 4, 8)
    }
    first, second, _ = verdicts(found := measured(runs))
    assert found.fall is not None
    assert found.fall.slope.value < -0.4
    assert first.answer != "yes"
    assert second.answer == "undecided"
    assert all(one.significant == 0 for one in found.lora_strengths)


@pytest.mark.parametrize(
    ("count", "answer"),
    [
        (Interval(0, 0, 0.3), "yes"),
        (Interval(0.5, 0.3, 1), "undecided"),
        (Interval(2, 1, 3), "no"),
        (Interval(0), "undecided"),
    ],
)
def test_intruders_in_most_layers(count: Interval, answer: str) -> None:
    assert 0 < INTRUDER_COUNT_THRESHOLD < 1  # between no intruder and one
    third = verdicts(result(count=count))[2]
    assert third.answer == answer
    assert "Full fine-tuning: a mean of 0" in third.sentence


@pytest.mark.parametrize(("chance", "answer"), [(0.49, "yes"), (0.5, "undecided"), (0.6, "undecided")])
def test_where_a_random_direction_is_no_intruder_there_is_none_to_find(chance: float, answer: str) -> None:
    found = result()
    news = tuple(msgspec.structs.replace(one, chance=chance) for one in found.novelties)
    third = verdicts(msgspec.structs.replace(found, novelties=news))[2]
    assert third.answer == answer
    assert ("too small" in third.sentence) == (answer == "undecided")


def test_a_rate_at_the_end_of_the_grid_decides_nothing() -> None:
    first, second, third = verdicts(result(edge=True))
    for one in (first, third):
        assert one.answer == "undecided"
        assert one.sentence.startswith("Undecided, as the best rate of r = 4 lies at the end of the grid: ")
    assert second.answer == "yes"
    assert "Left out" in second.sentence
    lacking = verdicts(result(edge=True, fall=None))[1]
    assert (lacking.answer, lacking.value) == ("undecided", None)


def test_ranks_with_a_rate_at_the_end_are_left_out_of_the_fall() -> None:
    runs = {(rank, 0): everywhere(list(range(2, 2 + rank)), 0.5) for rank in (1, 2, 3)}
    found = measured(runs, edge=(3,))
    assert found.fall is not None
    assert found.fall.ranks == (1, 2)
    assert [one.edge for one in found.lora_strengths] == [False, False, True]
    assert measured({key: runs[key] for key in ((1, 0), (3, 0))}, edge=(3,)).fall is None


def test_the_rank_nearest_the_papers_is_judged() -> None:
    assert result().judged_strength.r == 4
    few = msgspec.structs.replace(result(), strengths=(strength(2, 2), strength(16, 16), strength(None, 4)))
    assert few.judged_strength.rank == 2


def test_sentences_are_whole() -> None:
    said: list[Verdict] = verdicts(result())
    for one in said:
        assert one.line == "weight"
        assert one.sentence[0].isupper()
        assert one.sentence.rstrip().endswith(".")
        assert "28 layers, 3 seeds each" in one.sentence
        assert "nan" not in one.sentence
