"""Effective rank against performance: measures, ρ and β by numpy and scipy from the files, verdicts by their rules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from makers import normal, planted
from safetensors.numpy import load_file
from scipy import stats

from rankscope.analysis.layer_spectra import spectrum
from rankscope.evidence.effective.figure import plot_effective
from rankscope.evidence.effective.measure import (
    EffectiveRanks,
    PowerLawFit,
    RankMeasures,
    RunPoint,
    _noise,
    measure_effective,
    measure_names,
    random_measures,
    verdicts,
)
from rankscope.evidence.effective.section import build_section
from rankscope.evidence.material import Material
from rankscope.evidence.performance.measure import measure_performance
from rankscope.inference import Interval
from rankscope.result import json_values
from rankscope.spectra import noise_measures
from rankscope.train.config import StudyConfig
from rankscope.train.planted import PlantedModel
from rankscope.train.results import RunResult
from rankscope.train.runs import Run, RunRecord
from rankscope.train.study import Study, run_study
from rankscope.updates import Dense
from rankscope.verdict import Answer, MissingEvidenceError

RANKS, SEEDS, RATES = (1, 2, 4, 8), (0, 1), (1e-3, 1e-2, 1e-1)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    grid: dict[str, Any] = {"ranks": RANKS, "lrs": RATES, "seeds": SEEDS}
    config = StudyConfig(task="planted", steps=20, batch=16, evaluations=0, **grid)
    return run_study(config, tmp_path_factory.mktemp("effective") / "study")


@pytest.fixture(scope="module")
def found(study: Study) -> EffectiveRanks:
    return measure_effective(Material(study))


def without(study: Study, folder: Path, *patterns: str) -> Material:
    """The study without the runs of these names."""
    shutil.copytree(study.folder, folder, ignore=shutil.ignore_patterns(*patterns))
    return Material(Study(folder))


def measures(sigma: np.ndarray) -> dict[str, float]:
    """By their formulas."""
    p, energy = sigma / sigma.sum(), sigma**2 / (sigma**2).sum()
    kept = p[p > 0]
    return {
        "entropy_rank": float(np.exp(-(kept * np.log(kept)).sum())),
        "stable_rank": float((sigma**2).sum() / sigma[0] ** 2),
        "k90": float(np.searchsorted(energy.cumsum(), 0.9) + 1),
    }


def of_adapter(folder: Path, rank: int) -> dict[str, float]:
    """Medians over the layers of an adapter, from its file."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    layers = sorted({name.split(".lora_")[0] for name in tensors})
    assert len(layers) == 2
    each = []
    for layer in layers:
        A, B = (tensors[f"{layer}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
        each.append(measures(np.linalg.svd(B @ A, compute_uv=False)[:rank]))
    return {name: float(np.median([one[name] for one in each])) for name in each[0]}


# Numbers


def test_every_run_is_a_point(study: Study, found: EffectiveRanks) -> None:
    names = {(r.run.label, r.run.lr, r.run.seed) for r in study.done() if r.run.method != "base"}
    assert {(point.label, point.lr, point.seed) for point in found.points} == names
    assert len(found.points) == len(RANKS) * len(RATES) * len(SEEDS) + len(SEEDS)
    best = {record.run.name for record in study.best()}
    for record in study.done():
        if not record.run.is_lora:
            continue
        key = (record.run.label, record.run.lr, record.run.seed)
        point = next(p for p in found.points if (p.label, p.lr, p.seed) == key)
        assert point.score == record.metrics["test"]["loss"]
        assert point.ranks == pytest.approx(of_adapter(study.path(record.run), record.run.rank or 0), rel=1e-6)
        assert point.best == (record.run.name in best)


def test_the_curve_has_the_shares_of_the_performance(study: Study, found: EffectiveRanks) -> None:
    entries = {entry.rank: entry for entry in measure_performance(Material(study)).lora_curve}
    assert [one.rank for one in found.curve] == list(RANKS)
    for one in found.curve:
        assert one.share == entries[one.rank].share
        values = [p.ranks["entropy_rank"] for p in found.points if p.best and p.rank == one.rank]
        low, high = stats.ttest_1samp(values, 0).confidence_interval() if one.rank > 1 else (1.0, 1.0)
        assert one.measures["entropy_rank"] == pytest.approx((np.mean(values), low, high))


def test_correlations_are_spearmans_with_better_scores(found: EffectiveRanks) -> None:
    """Lower loss is better: ρ is that of the rank with the score turned round."""
    best = [point for point in found.points if point.best and point.method == "lora"]
    assert len(best) == len(RANKS) * len(SEEDS)
    sets = {
        "LoRA at its best rates, a point a run": best,
        "every run of the study": list(found.points),
    }
    for one in found.correlations:
        if one.among in sets:
            points = sets[one.among]
            x, y = [p.ranks[one.measure] for p in points], [-p.score for p in points]
            assert one.points == len(points)
            assert one.rho is not None
            assert one.rho.value == pytest.approx(stats.spearmanr(x, y).statistic)
            assert one.rho.known
    ranks = [one for one in found.correlations if one.among.endswith("a point a rank")]
    assert [one.measure for one in ranks] == ["entropy_rank", "stable_rank", "k90"]
    means = [
        [np.mean([getter(p) for p in best if p.rank == rank]) for rank in RANKS]
        for getter in (lambda p: p.ranks["entropy_rank"], lambda p: -p.score)
    ]
    assert ranks[0].points == len(RANKS)
    assert ranks[0].rho is not None
    assert ranks[0].rho.value == pytest.approx(stats.spearmanr(*means).statistic)
    assert ranks[0].rho.value > 0  # more rank helped


def test_higher_may_be_better(study: Study, found: EffectiveRanks, tmp_path: Path) -> None:
    material = without(study, tmp_path / "higher")
    path = material.study.folder / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "higher_is_better": True}))
    turned = measure_effective(Material(Study(material.study.folder)))
    assert turned.points[0].score == found.points[0].score
    for one, other in zip(turned.correlations, found.correlations, strict=True):
        if one.among == "every run of the study":
            assert one.rho is not None
            assert other.rho is not None
            assert one.rho.value == pytest.approx(-other.rho.value)


def test_growth_is_the_log_log_slope_without_rank_one(found: EffectiveRanks) -> None:
    growth = found.growth
    assert growth is not None
    assert growth.ranks == (2, 4, 8)
    logs = [
        np.mean([np.log(p.ranks["stable_rank"]) for p in found.points if p.best and p.rank == rank])
        for rank in growth.ranks
    ]
    expected = stats.linregress(np.log(growth.ranks), logs)
    half = stats.t.ppf(0.975, 1) * expected.stderr
    assert growth.beta == pytest.approx((expected.slope, expected.slope - half, expected.slope + half))
    assert growth.factor == pytest.approx(np.exp(expected.intercept))
    random = [np.log(one.random["stable_rank"]) for one in found.curve if one.rank > 1]
    assert growth.random == pytest.approx(np.polyfit(np.log(growth.ranks), random, 1)[0])


@pytest.mark.parametrize(("out", "into", "rank"), [(64, 96, 1), (64, 96, 8), (200, 50, 40), (30, 30, 64)], ids=str)
def test_random_factors_against_sampled_ones(out: int, into: int, rank: int) -> None:
    rng = np.random.default_rng(0)
    products = [rng.standard_normal((out, rank)) @ rng.standard_normal((rank, into)) for _ in range(40)]
    sampled = [measures(np.linalg.svd(product, compute_uv=False)[:rank]) for product in products]
    drawn = random_measures([(out, into, rank)])
    for name, value in drawn.items():
        # Four draws against forty: the stable rank of one varies by a tenth.
        assert value == pytest.approx(np.mean([one[name] for one in sampled]), rel=0.1, abs=1e-9), name
    assert random_measures([(out, into, rank)]) == drawn


def test_random_factors_are_the_median_over_layers() -> None:
    small, large = (20, 20, 4), (400, 400, 4)
    assert random_measures([small, small, large]) == random_measures([small])
    assert random_measures([large, small, large]) == random_measures([large])
    assert random_measures([large])["stable_rank"] > random_measures([small])["stable_rank"]


def test_noise_is_that_of_the_shapes_of_full_fine_tuning(found: EffectiveRanks) -> None:
    assert found.noise is not None
    expected = [noise_measures(shape) for shape in PlantedModel.SHAPES]
    assert found.noise == {name: np.median([one[name] for one in expected]) for name in found.noise}
    full = [point.ranks["entropy_rank"] for point in found.points if point.method == "full"]
    assert max(full) < found.noise["entropy_rank"]


def test_noise_is_of_the_layers_that_the_adapter_has() -> None:
    """Full fine-tuning changes a head and an embedding, too, of other shapes."""
    shapes = {"a": (40, 40), "b": (40, 40), "head": (200, 10), "embedding": (90, 12), "more": (80, 12)}
    whole = spectrum({name: Dense(normal(*shape)) for name, shape in shapes.items()})
    thin = spectrum({name: planted(shapes[name], [2.0, 1.0]) for name in ("a", "b")})
    full, adapter = (
        RunResult(RunRecord(run=Run(method=method, seed=0), status="done", steps=1), 0.0, 0.0, {}, spectra, None)
        for method, spectra in (("full", whole), ("lora", thin))
    )
    material = SimpleNamespace(best_rows=lambda method: [full])
    expected = noise_measures((40, 40))
    assert _noise(material, adapter) == {name: expected[name] for name in measure_names()}  # type: ignore[arg-type]


def test_results_are_strict_json(found: EffectiveRanks) -> None:
    values = json_values(found)
    json.dumps(values, allow_nan=False)
    assert msgspec.convert(values, EffectiveRanks) == found


# What a study may lack


def test_without_full_fine_tuning_growth_is_there(study: Study, tmp_path: Path) -> None:
    alone = measure_effective(without(study, tmp_path / "study", "full-*"))
    assert alone.noise is None
    assert alone.doubt is not None
    assert alone.growth is not None
    low, _ = verdicts(alone)
    assert low.answer == "undecided"
    assert "--no-full" in low.sentence
    check_section(alone)


def test_one_run_is_a_point_and_no_answer(study: Study, tmp_path: Path) -> None:
    # The middle rate of one rank and seed; the base as well.
    material = without(
        study, tmp_path / "study", "full-*", "*-s1", "lora-r[128]-*", "lora-r4-lr0.001*", "lora-r4-lr0.1*"
    )
    one = measure_effective(material)
    assert [point.label for point in one.points] == ["r = 4"]
    assert one.growth is None
    assert all(correlation.rho is None for correlation in one.correlations)
    assert [verdict.answer for verdict in verdicts(one)] == ["undecided", "undecided"]
    check_section(one)


def test_one_seed_is_not_enough(study: Study, tmp_path: Path) -> None:
    alone = measure_effective(without(study, tmp_path / "study", "*-s1"))
    low, growth = verdicts(alone)
    assert low.answer == growth.answer == "undecided"
    assert "Not enough seeds" in low.sentence
    assert "Not enough seeds" in growth.sentence
    assert growth.value is not None


def test_a_run_that_diverged_is_no_point(study: Study, tmp_path: Path) -> None:
    material = without(study, tmp_path / "study")
    run = next(point.record.run for point in material.best_rows("lora") if point.record.run.rank == 4)
    path = material.study.path(run)
    msgspec.structs.replace(RunRecord.read(path), status="diverged", metrics={}).write(path)
    found = measure_effective(Material(Study(material.study.folder)))
    assert (run.label, run.lr, run.seed) not in {(point.label, point.lr, point.seed) for point in found.points}
    check_section(found)


def test_without_lora_there_is_no_evidence(study: Study, tmp_path: Path) -> None:
    with pytest.raises(MissingEvidenceError, match="--ranks"):
        measure_effective(without(study, tmp_path / "study", "lora-*"))


def test_an_adapter_of_rank_two_at_r_one_is_in_the_fit(tmp_path: Path) -> None:
    """PiSSA's update at r is a difference of two products: rank 2r, so that at r = 1 its stable rank is not given."""
    config = StudyConfig(task="planted", methods=("pissa",), ranks=(1, 2), steps=2, batch=8, evaluations=0, full=False)
    found = measure_effective(Material(run_study(config, tmp_path / "study")))
    assert found.growth is not None
    assert found.growth.ranks == (1, 2)
    assert found.curve[0].random["stable_rank"] > 1
    assert "left out" not in verdicts(found)[1].sentence


# Verdicts by hand


def needed(rank: int, share: tuple[float, ...] | None, entropy: tuple[float, ...], **changes: Any) -> RankMeasures:
    values = {name: Interval(*entropy) for name in ("entropy_rank", "stable_rank", "k90")}
    fields: dict[str, Any] = {
        "rank": rank,
        "seeds": 3,
        "edge": False,
        "share": Interval(*share) if share else None,
        "measures": values,
        "random": dict.fromkeys(values, float(rank)),
    }
    return RankMeasures(**{**fields, **changes})


def result(*curve: RankMeasures, growth: PowerLawFit | None = None, doubt: str | None = None) -> EffectiveRanks:
    """dim 64: low up to 8."""
    ranks = dict.fromkeys(("entropy_rank", "stable_rank", "k90"), 2.0)
    point = RunPoint(
        label="r = 2",
        method="lora",
        targets=None,
        rank=2,
        lr=1.0,
        seed=0,
        best=True,
        edge=False,
        score=1.0,
        ranks=ranks,
    )
    return EffectiveRanks(
        metric="loss",
        higher_is_better=False,
        method="lora",
        targets=None,
        dim=64,
        base=None,
        points=(point,),
        curve=curve,
        correlations=(),
        growth=growth,
        noise=None,
        doubt=doubt,
    )


BELOW, ABOVE, ACROSS = (0.5, 0.4, 0.6), (0.95, 0.92, 0.98), (0.88, 0.8, 1.0)


@pytest.mark.parametrize(
    ("curve", "answer", "words"),
    [
        ([needed(64, ABOVE, (7.0, 6.5, 7.5))], "yes", "r = 64"),
        ([needed(64, ABOVE, (8.0, 8.0, 8.0))], "yes", "up to 8, 0.125 of 64"),
        ([needed(64, ABOVE, (8.0, 7.5, 8.5))], "undecided", "surely"),
        ([needed(64, ABOVE, (9.0, 8.5, 9.5))], "undecided", "no rank from 1 to 8 is enough is not shown"),
        (
            [needed(16, ACROSS, (9.0, 8.5, 9.5)), needed(64, ABOVE, (30.0, 29.0, 31.0))],
            "undecided",
            "no rank from 1 to 8",
        ),
        ([needed(8, BELOW, (7.0, 6.9, 7.1)), needed(64, ABOVE, (9.0, 8.5, 9.5))], "no", "r = 64"),
        (
            [needed(8, BELOW, (7, 6.9, 7.1)), needed(16, ACROSS, (9, 8.5, 9.5)), needed(64, ABOVE, (30, 29, 31))],
            "no",
            "r = 64",
        ),
        ([needed(16, ACROSS, (7.0, 6.5, 7.5)), needed(64, ABOVE, (30.0, 29.0, 31.0))], "undecided", "r = 16"),
        ([needed(4, ACROSS, (3.0, 2.9, 3.1))], "undecided", "may reach"),
        ([needed(4, BELOW, (3.0, 2.9, 3.1))], "undecided", "No rank tried"),
        ([needed(4, BELOW, (3.0, 2.9, 3.1)), needed(64, ABOVE, (30.0, 29.0, 31.0))], "undecided", "rank from 5 to 8"),
        ([needed(8, BELOW, (7.0, 6.9, 7.1), edge=True), needed(64, ABOVE, (30.0, 29.0, 31.0))], "undecided", "edge"),
        ([needed(4, (0.95,), (3.0, 2.9, 3.1)), needed(64, ABOVE, (30.0, 29.0, 31.0))], "undecided", "r = 4"),
        ([needed(64, ABOVE, (7.0,))], "undecided", "r = 64"),
    ],
)
def test_whether_what_is_enough_has_a_low_effective_rank(curve: list[RankMeasures], answer: Answer, words: str) -> None:
    verdict = verdicts(result(*curve))[0]
    assert verdict.answer == answer
    assert words in verdict.sentence
    assert verdict.line == "effective"


def test_a_doubt_about_full_fine_tuning_is_one_here() -> None:
    verdict = verdicts(result(needed(64, ABOVE, (7.0, 6.5, 7.5)), doubt="Not enough seeds."))[0]
    assert (verdict.answer, verdict.sentence, verdict.value) == ("undecided", "Not enough seeds.", None)


@pytest.mark.parametrize(
    ("beta", "changes", "answer", "words"),
    [
        ((0.3, 0.2, 0.4), {}, "yes", "β = 0.3 (0.2 to 0.4)"),
        ((0.5, 0.4, 0.7), {}, "undecided", "random factors"),
        ((0.6, 0.4, 0.6), {}, "undecided", "random factors"),
        ((0.8, 0.6, 0.9), {}, "no", "would have 0.6"),
        ((0.3,), {}, "undecided", "Two ranks give no interval"),
        ((0.3, 0.2, 0.4), {"seeds": 1}, "undecided", "Not enough seeds"),
        ((0.3, 0.2, 0.4), {"edge": True}, "undecided", "r = 2, r = 4 lies on the edge"),
    ],
)
def test_whether_rank_is_left_unused(beta: tuple[float, ...], changes: Any, answer: Answer, words: str) -> None:
    growth = PowerLawFit(beta=Interval(*beta), factor=1.0, ranks=(2, 4), random=0.6)
    # r = 1 is not in the fit: neither its edge nor its seeds count.
    first = needed(1, BELOW, (1.0, 1.0, 1.0), edge=True, seeds=1)
    curve = [needed(rank, BELOW, (float(rank), 1.0, 8.0), **changes) for rank in (2, 4)]
    verdict = verdicts(result(first, *curve, growth=growth))[1]
    assert verdict.answer == answer
    assert words in verdict.sentence
    assert "r = 1 is left out" in verdict.sentence
    assert verdict.value == beta[0]


def test_without_ranks_there_is_nothing_to_fit() -> None:
    verdict = verdicts(result(needed(1, BELOW, (1.0, 1.0, 1.0))))[1]
    assert verdict.answer == "undecided"
    assert "Fewer than two ranks" in verdict.sentence


# Figure and page


def check_section(found: EffectiveRanks) -> None:
    made = build_section(found, verdicts(found))
    for table in (*made.tables, *(picture.data for picture in made.pictures)):
        assert all(len(row) == len(table.header) for row in table.rows)
    figure = made.pictures[0].draw()
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
    assert made.pictures[0].alt


def test_the_figure_shows_every_run(found: EffectiveRanks) -> None:
    figure = plot_effective(found)
    figure.canvas.draw()
    left, right = figure.axes
    markers = [line for line in left.lines if line.get_linestyle() == "None" and line.get_transform() == left.transData]
    drawn = {(x, y) for line in markers for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    low, high = left.get_ylim()
    for point in found.points:
        # Runs that are far worse than the base stand on the edge, at their effective rank.
        y = point.score if point.score <= high else high
        assert (point.ranks["entropy_rank"], y) in drawn
    assert low < min(point.score for point in found.points)
    assert found.noise is not None
    noise = next(line for line in left.lines if line.get_label().startswith("noise"))
    assert noise.get_xdata()[0] == found.noise["entropy_rank"]
    reference = next(line for line in right.lines if line.get_label() == "stable rank = r")
    assert list(reference.get_xdata()) == list(reference.get_ydata()) == [1, 8]
    fit = next(line for line in right.lines if line.get_label().startswith("fit"))
    assert found.growth is not None
    fitted = [found.growth.factor * rank**found.growth.beta.value for rank in (2, 4, 8)]
    assert list(fit.get_ydata()) == pytest.approx(fitted)
    hollow = {tuple(line.get_xdata()) for line in right.lines if line.get_markerfacecolor() == "white"}
    assert hollow == {(1, 1)}  # two seeds of r = 1


def test_a_run_far_worse_than_the_base_stands_on_the_edge(found: EffectiveRanks) -> None:
    bad = msgspec.structs.replace(found.points[0], score=50.0, best=False)
    figure = plot_effective(msgspec.structs.replace(found, points=(*found.points, bad)))
    left = figure.axes[0]
    assert left.get_ylim()[1] < 2
    marked = next(line for line in left.lines if line.get_label().startswith("worse than shown"))
    assert bad.ranks["entropy_rank"] in marked.get_xdata()
    assert set(marked.get_ydata()) == {left.get_ylim()[1]}


def test_the_section_says_what_was_found(found: EffectiveRanks) -> None:
    check_section(found)
    made = build_section(found, verdicts(found))
    assert "Full fine-tuning has" in made.pictures[0].alt
    assert "to the power" in made.pictures[0].alt
    assert any("not independent" in note for note in made.notes)
    correlations = made.tables[0]
    assert len(correlations.rows) == 9
    assert all(row[3] is not None for row in correlations.rows)
