"""Performance against rank: numbers by hand and by scipy from scores that were planted, verdicts by their rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from rankscope.evidence.entries import Entry
from rankscope.evidence.material import Material
from rankscope.evidence.performance.figure import plot_costs, plot_rank_curve
from rankscope.evidence.performance.measure import Performance, measure_performance, verdicts
from rankscope.evidence.performance.section import build_section, entries_at_budget
from rankscope.inference import Interval, Reach, first_reaching
from rankscope.result import json_values
from rankscope.train.config import StudyConfig
from rankscope.train.runs import Run, RunRecord
from rankscope.train.study import Study, run_study
from rankscope.verdict import GAIN_SHARE, LOW_RANK_SHARE, MARGIN, Answer, MissingEvidenceError

RATES, FULL_RATES = (1e-3, 1e-2, 1e-1), (3e-4, 3e-3, 3e-2)
SEEDS = (0, 1, 2)
BASE = {0: 1.0, 1: 1.2, 2: 0.9}
GAINS = {
    "r = 1": (0.30, 0.32, 0.28),
    "r = 4": (0.47, 0.505, 0.435),
    "r = 16": (0.498, 0.543, 0.4625),
    "full": (0.50, 0.54, 0.46),
}
Scores = Callable[[Run], float | None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study whose scores are overwritten: what was trained gives the files, shapes and costs."""
    folder = tmp_path_factory.mktemp("performance") / "study"
    grid: dict[str, Any] = {"ranks": (1, 4, 16), "lrs": RATES[1:2], "full_lrs": FULL_RATES[1:2], "seeds": SEEDS}
    return run_study(StudyConfig(task="planted", steps=4, batch=8, evaluations=0, **grid), folder)


@pytest.fixture
def plant(trained: Study, tmp_path: Path) -> Callable[..., Material]:
    """A copy of the study with the given test scores; with ``best`` at three rates, of which the validation split
    likes that one most.
    """

    def make(scores: Scores, best: Callable[[Run], int] | None = None, higher_is_better: bool = False) -> Material:
        folder = tmp_path / f"study{len(list(tmp_path.iterdir()))}"
        (folder / "runs").mkdir(parents=True)
        described = json.loads((trained.folder / "study.json").read_text())
        (folder / "study.json").write_text(json.dumps({**described, "higher_is_better": higher_is_better}))
        for record in trained.records:
            rates = FULL_RATES if record.run.method == "full" else RATES
            for place, rate in enumerate(rates) if best and record.run.lr else [(1, record.run.lr)]:
                run = msgspec.structs.replace(record.run, lr=rate)
                score = scores(run)
                if score is None:
                    continue
                path = folder / "runs" / run.name
                shutil.copytree(trained.path(record.run), path)
                off = abs(place - best(run)) if best and rate else 0
                worse = -off if higher_is_better else off
                # At other rates the test split would be better: a rate chosen by it would be found out.
                metrics = {"validation": {"loss": 5.0 + worse}, "test": {"loss": score - worse}}
                msgspec.structs.replace(record, run=run, metrics=metrics).write(path)
        return Material(Study(folder))

    return make


def middle(run: Run) -> int:
    return 1


def planted(run: Run) -> float:
    """Lower is better: the base of the seed less the planted gain."""
    return BASE[run.seed] - (0.0 if run.method == "base" else GAINS[run.label][SEEDS.index(run.seed)])


def by_label(found: Performance) -> dict[str, Entry]:
    return {entry.label: entry for entry in found.entries}


def answers(found: Performance) -> list[Answer]:
    return [verdict.answer for verdict in verdicts(found)]


# Numbers


def test_scores_and_gains_are_those_of_each_seed(plant: Callable[..., Material]) -> None:
    found = measure_performance(plant(planted, best=middle))
    entries = by_label(found)
    assert list(entries) == ["base", "r = 1", "r = 4", "r = 16", "full"]
    for label, gains in GAINS.items():
        entry = entries[label]
        scores = np.array([BASE[seed] - gain for seed, gain in zip(SEEDS, gains, strict=True)])
        assert entry.seeds == SEEDS
        assert entry.scores == pytest.approx(scores)
        half = stats.t.ppf(0.975, 2) * scores.std(ddof=1) / np.sqrt(3)
        assert entry.score == pytest.approx((scores.mean(), scores.mean() - half, scores.mean() + half))
        low, high = stats.ttest_1samp(gains, 0).confidence_interval()
        assert entry.gain == pytest.approx((np.mean(gains), low, high))
        assert entry.edge is None
        assert entry.rates == 3
    assert entries["base"].gain is None
    assert entries["base"].scores == pytest.approx(list(BASE.values()))
    assert entries["r = 4"].lr == 1e-2
    assert entries["full"].lr == 3e-3


def test_shares_and_differences_are_paired_by_seed(plant: Callable[..., Material]) -> None:
    found = measure_performance(plant(planted))
    full = np.array(GAINS["full"])
    allowed = MARGIN * full.mean()
    assert found.allowed == pytest.approx(allowed)
    p = {}
    for entry in found.lora_curve:
        gains = np.array(GAINS[entry.label])
        assert entry.paired == SEEDS
        assert entry.share is not None
        assert entry.share.value == pytest.approx(gains.mean() / full.mean())
        # Fieller: at the ends the paired t test is just at its level.
        ends = [stats.ttest_1samp(gains - end * full, 0).pvalue for end in entry.share[1:]]
        assert ends == pytest.approx([0.05, 0.05], rel=1e-6)
        low, high = stats.ttest_1samp(gains - full, 0).confidence_interval()
        assert entry.difference == pytest.approx(((gains - full).mean(), low, high))
        sides = [
            stats.ttest_1samp(gains - full, -allowed, alternative="greater").pvalue,
            stats.ttest_1samp(gains - full, allowed, alternative="less").pvalue,
        ]
        p[entry.label] = max(sides)
        assert entry.p == pytest.approx(p[entry.label])
    ordered = sorted(p.values())
    stepped = np.minimum(np.maximum.accumulate([ordered[0] * 3, ordered[1] * 2, ordered[2]]), 1)
    corrected = {entry.label: entry.corrected for entry in found.lora_curve}
    assert sorted(corrected.values(), key=lambda q: q or 0) == pytest.approx(stepped)
    full_entry = found.entry_of("full")
    assert full_entry is not None
    assert full_entry.share is full_entry.p is full_entry.difference is None


def test_the_smallest_ranks_that_do(plant: Callable[..., Material]) -> None:
    """r = 4 has .94 of the gain; its difference passes no test of 5 %, that of r = 16 does."""
    found = measure_performance(plant(planted))
    assert found.r90 == Reach(4, 4, 4)
    assert found.equivalent == 16
    assert found.dim == 64
    assert found.missing is None
    assert answers(found) == ["yes", "yes"]
    low, equal = verdicts(found)
    assert (low.value, low.low, low.high) == (4, 4, 4)
    assert "r = 4 is the smallest rank tried" in low.sentence
    assert "3 seeds" in low.sentence
    assert "Low is up to 8, 0.125 of the median smaller side 64" in low.sentence
    assert "r = 16 is the smallest rank equivalent" in equal.sentence
    assert "5% of its gain" in equal.sentence
    assert equal.value == pytest.approx(np.mean(GAINS["r = 16"]) - 0.5)


def test_a_wider_margin_is_equivalent_sooner(plant: Callable[..., Material]) -> None:
    found = measure_performance(plant(planted), margin=0.2)
    assert found.allowed == pytest.approx(0.1)
    assert found.equivalent == 4
    assert "within 20%" in verdicts(found)[1].claim


def test_higher_may_be_better(plant: Callable[..., Material]) -> None:
    """Scores mirrored: the same gains, shares and answers."""
    lower = measure_performance(plant(planted))
    higher = measure_performance(plant(lambda run: 3 - planted(run), higher_is_better=True))
    assert higher.higher_is_better
    for one, other in zip(lower.entries, higher.entries, strict=True):
        assert (one.gain is None) == (other.gain is None)
        assert one.gain is None or one.gain == pytest.approx(other.gain)
        assert one.share is None or one.share == pytest.approx(other.share)
    assert higher.r90 == lower.r90
    assert answers(higher) == answers(lower)


def test_seeds_in_common_alone_are_compared(plant: Callable[..., Material]) -> None:
    found = measure_performance(plant(lambda run: None if run.method == "full" and run.seed == 1 else planted(run)))
    entry = by_label(found)["r = 4"]
    assert entry.seeds == SEEDS
    assert entry.paired == (0, 2)
    assert entry.share is not None
    assert entry.share.value == pytest.approx((0.47 + 0.435) / (0.50 + 0.46))
    assert any("seeds in common" in note for note in build_section(found, verdicts(found)).notes)
    alone = measure_performance(plant(lambda run: None if run.method == "full" and run.seed != 1 else planted(run)))
    assert by_label(alone)["r = 4"].paired == (1,)
    assert answers(alone) == ["undecided", "undecided"]
    assert "Not enough seeds" in verdicts(alone)[0].sentence


def test_a_seed_without_its_base_has_no_gain(plant: Callable[..., Material]) -> None:
    found = measure_performance(plant(lambda run: None if run.method == "base" and run.seed == 0 else planted(run)))
    entry = by_label(found)["r = 4"]
    assert entry.seeds == SEEDS
    assert entry.paired == (1, 2)
    assert entry.gain is not None
    assert entry.gain.value == pytest.approx((0.505 + 0.435) / 2)
    none = measure_performance(plant(lambda run: None if run.method == "base" else planted(run)))
    assert none.missing is not None
    assert "base was not measured" in none.missing
    assert answers(none) == ["undecided", "undecided"]
    assert len(none.lora_curve) == 3


def test_the_gap_is_of_the_last_quarter_and_the_test_split(plant: Callable[..., Material]) -> None:
    material = plant(planted)
    for row in material.best_rows("lora"):
        path = material.study.path(row.record.run) / "metrics.jsonl"
        lines = [{"step": 0}, {"step": 4, "train_losses": [9.0, 9.0, 9.0, 9.0]}]
        lines.append({"step": 8, "train_losses": [9.0, 9.0, 1.0, 3.0]})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = measure_performance(material)
    entry = by_label(found)["r = 1"]
    assert entry.gap == pytest.approx(2.0 - entry.score.value)
    for row in material.best_rows("lora"):
        (material.study.path(row.record.run) / "metrics.jsonl").unlink()
    assert by_label(measure_performance(material))["r = 1"].gap is None


def test_costs_are_means_over_seeds(plant: Callable[..., Material]) -> None:
    material = plant(planted)
    found = measure_performance(material)
    for label in ("r = 4", "full"):
        costs = [row.record.cost for row in material.rows if row.is_best and row.record.run.label == label]
        entry = by_label(found)[label]
        assert entry.seconds_per_step == pytest.approx(np.mean([c.seconds_per_step for c in costs if c]))
        assert entry.saved_bytes == pytest.approx(np.mean([c.saved_bytes for c in costs if c]))
        assert entry.together == max(c.together for c in costs if c)
    # Factors of (64, 96) and (96, 64), and both whole.
    assert by_label(found)["r = 4"].trainable == 2 * 4 * (64 + 96)
    assert by_label(found)["full"].trainable == 2 * 64 * 96


def test_results_are_strict_json(plant: Callable[..., Material]) -> None:
    for scores in (planted, lambda run: None if run.method == "full" else planted(run)):
        found = measure_performance(plant(scores))
        values = json_values(found)
        json.dumps(values, allow_nan=False)
        assert msgspec.convert(values, Performance) == found


# What a study may lack


def test_without_full_fine_tuning_the_curve_is_there(plant: Callable[..., Material]) -> None:
    found = measure_performance(plant(lambda run: None if run.method == "full" else planted(run)))
    assert [entry.rank for entry in found.lora_curve] == [1, 4, 16]
    assert all(entry.gain and entry.share is None for entry in found.lora_curve)
    assert found.r90 is None
    assert answers(found) == ["undecided", "undecided"]
    assert all("--no-full" in verdict.sentence for verdict in verdicts(found))
    check_section(found)


def test_without_lora_there_is_no_evidence(plant: Callable[..., Material]) -> None:
    with pytest.raises(MissingEvidenceError, match="--ranks"):
        measure_performance(plant(lambda run: planted(run) if run.method in ("base", "full") else None))


def test_one_run_is_a_point_and_no_answer(plant: Callable[..., Material]) -> None:
    found = measure_performance(
        plant(lambda run: planted(run) if run.rank == 4 and run.seed == 0 and run.lr == 1e-2 else None)
    )
    assert [entry.label for entry in found.entries] == ["r = 4"]
    assert found.lora_curve[0].score == Interval(pytest.approx(0.53))
    assert answers(found) == ["undecided", "undecided"]
    check_section(found)


def test_one_seed_is_not_enough(plant: Callable[..., Material]) -> None:
    found = measure_performance(plant(lambda run: planted(run) if run.seed == 0 else None))
    assert found.r90 == Reach(4, 1, None)
    assert found.equivalent is None
    assert answers(found) == ["undecided", "undecided"]
    assert all("Not enough seeds" in verdict.sentence for verdict in verdicts(found))
    check_section(found)


def test_no_gain_is_not_shared(plant: Callable[..., Material]) -> None:
    """Full fine-tuning worse than the base, and one that may be."""
    worse = measure_performance(plant(lambda run: planted(run) + (1.0 if run.method == "full" else 0.0)))
    assert all(entry.share is None and entry.p is None for entry in worse.lora_curve)
    assert worse.r90 is worse.allowed is None
    assert "no better than the untouched base" in verdicts(worse)[0].sentence
    wide = {0: -0.4, 1: 0.0, 2: 0.4}
    unsure = measure_performance(plant(lambda run: planted(run) + (wide[run.seed] if run.method == "full" else 0.0)))
    assert "not surely improve" in verdicts(unsure)[0].sentence
    assert answers(worse) == answers(unsure) == ["undecided", "undecided"]
    check_section(worse)


def test_a_run_that_diverged_is_named_and_in_no_number(plant: Callable[..., Material]) -> None:
    material = plant(planted, best=middle)
    path = material.study.path(next(row.record.run for row in material.best_rows("lora") if row.record.run.seed == 2))
    record = RunRecord.read(path)
    msgspec.structs.replace(record, status="diverged", metrics={}).write(path)
    found = measure_performance(Material(Study(material.study.folder)))
    assert found.lost == (record.run.name,)
    entry = by_label(found)["r = 1"]
    # Another rate has every seed: it is the best of those that lost none, and lies on the edge.
    assert entry.lr != 1e-2
    assert entry.edge is not None
    assert any(record.run.name in note for note in build_section(found, verdicts(found)).notes)


@pytest.mark.parametrize(("place", "end", "word"), [(0, "low", "lowest"), (2, "high", "highest")])
def test_full_fine_tuning_on_the_edge_decides_nothing(
    plant: Callable[..., Material], place: int, end: str, word: str
) -> None:
    found = measure_performance(plant(planted, best=lambda run: place if run.method == "full" else 1))
    full = found.entry_of("full")
    assert full is not None
    assert full.edge == end
    assert answers(found) == ["undecided", "undecided"]
    assert all(word in verdict.sentence for verdict in verdicts(found))


# Verdicts by hand


def entry(rank: int, share: tuple[float, ...] | None, **changes: Any) -> Entry:
    """A rank of LoRA's curve with this share of a gain of 1, compared over three seeds."""
    found = Interval(*share) if share else None
    shift = [None if end is None else end - 1 for end in (*found, None, None)[:3]] if found else None
    fields: dict[str, Any] = {
        "label": f"r = {rank}",
        "method": "lora",
        "targets": None,
        "rank": rank,
        "lr": 1e-2,
        "edge": None,
        "rates": 3,
        "seeds": SEEDS,
        "scores": (0.0, 0.0, 0.0),
        "score": Interval(0.0),
        "gain": found,
        "paired": SEEDS,
        "share": found,
        "difference": Interval(*shift) if shift else None,  # type: ignore[arg-type]
        "p": 0.5,
        "corrected": 1.0,
        "gap": None,
        "trainable": 320 * rank,
        "seconds_per_step": 0.1,
        "peak_memory": None,
        "saved_bytes": 100.0,
        "together": 1,
    }
    return Entry(**{**fields, **changes})


FULL = msgspec.structs.replace(
    entry(1, None, gain=Interval(1.0, 0.9, 1.1)), label="full", method="full", rank=None, p=None, corrected=None
)


def result(*curve: Entry, full: Entry = FULL, dim: int = 64) -> Performance:
    """``dim`` 64: low up to r = 8."""
    shares = [(one.rank, one.share) for one in curve if one.rank and one.share]
    passed = [one.rank for one in curve if one.rank and one.corrected is not None and one.corrected < 0.05]
    return Performance(
        metric="loss",
        higher_is_better=False,
        method="lora",
        targets=curve[0].targets,
        dim=dim,
        margin=MARGIN,
        allowed=MARGIN,
        entries=(*curve, full),
        r90=first_reaching(shares, GAIN_SHARE),
        equivalent=min(passed, default=None),
        missing=None,
        budget=None,
        lost=(),
    )


BELOW, ABOVE, ACROSS = (0.5, 0.4, 0.6), (0.95, 0.92, 0.98), (0.88, 0.8, 1.0)


@pytest.mark.parametrize(
    ("curve", "answer", "words"),
    [
        ([(1, BELOW), (8, ABOVE)], "yes", "r = 8"),
        ([(1, ABOVE), (64, BELOW)], "yes", "r = 1"),
        ([(1, BELOW), (8, ACROSS), (16, ABOVE)], "undecided", "from r = 8 to 16"),
        ([(1, BELOW), (8, ACROSS), (16, (0.92, 0.8, 1.04))], "undecided", "upwards, as none surely"),
        ([(1, BELOW), (8, BELOW), (16, ABOVE)], "no", "r = 16"),
        ([(1, BELOW), (8, BELOW), (16, BELOW)], "no", "No rank tried reaches 90%"),
        # What was not tried may be enough: between 5 and 8, or all but 1.
        ([(1, BELOW), (4, BELOW), (16, ABOVE)], "undecided", "No rank from 5 to 8 was tried"),
        ([(1, BELOW), (4, BELOW)], "undecided", "No rank from 5 to 8 was tried"),
        ([(64, ABOVE)], "undecided", "No rank from 1 to 8 was tried"),
        # A rank that has no interval may be enough.
        ([(1, BELOW), (8, (0.7,)), (16, ABOVE)], "undecided", "from r = 8 to 16"),
    ],
)
def test_whether_a_low_rank_is_enough(curve: list[tuple[int, tuple[float, ...]]], answer: Answer, words: str) -> None:
    assert LOW_RANK_SHARE * 64 == 8
    found = result(*(entry(rank, share) for rank, share in curve))
    verdict = verdicts(found)[0]
    assert verdict.answer == answer
    assert words in verdict.sentence
    assert verdict.line == "performance"


def test_a_rank_on_the_edge_could_only_do_better() -> None:
    edge: dict[str, Any] = {"edge": "high"}
    enough = result(entry(1, BELOW, **edge), entry(8, ABOVE, **edge))
    assert answers(enough)[0] == "yes"
    short = result(entry(1, BELOW), entry(8, BELOW, **edge), entry(16, ABOVE))
    verdict = verdicts(short)[0]
    assert verdict.answer == "undecided"
    assert "r = 8 lies on the edge" in verdict.sentence
    # Above the line it has no say.
    assert answers(result(entry(1, BELOW), entry(8, BELOW), entry(16, BELOW, **edge)))[0] == "no"


SAME: dict[str, Any] = {"p": 0.001, "corrected": 0.003}


@pytest.mark.parametrize(
    ("curve", "answer", "words"),
    [
        ([entry(1, BELOW), entry(4, (0.99, 0.98, 1.0), **SAME)], "yes", "r = 4 is the smallest rank equivalent"),
        ([entry(4, (0.99, 0.98, 1.0), **SAME), entry(8, (1.0, 0.98, 1.02), **SAME)], "yes", "r = 4"),
        ([entry(4, (0.99, 0.9, 1.08), p=0.04, corrected=0.08)], "undecided", "No rank is shown"),
        ([entry(1, BELOW), entry(4, BELOW)], "no", "worse than full fine-tuning by more than the margin"),
        ([entry(1, BELOW), entry(4, (0.9, 0.84, 0.96))], "undecided", "No rank is shown"),
        ([entry(1, BELOW), entry(4, (0.6,))], "undecided", "No rank is shown"),
        ([entry(4, (1.2, 1.1, 1.3))], "undecided", "LoRA is better"),
        ([entry(4, (0.99, 0.98, 1.0), edge="low", **SAME)], "undecided", "edge"),
        ([entry(4, (0.99, 0.98, 1.0), edge="low", **SAME), entry(8, (1.0, 0.98, 1.02), **SAME)], "yes", "r = 8"),
        ([entry(1, BELOW), entry(4, BELOW, edge="low")], "undecided", "edge"),
    ],
)
def test_whether_some_rank_is_equivalent(curve: list[Entry], answer: Answer, words: str) -> None:
    verdict = verdicts(result(*curve))[1]
    assert verdict.answer == answer
    assert words in verdict.sentence


# Figures and page


def texts(figure: Figure) -> str:
    found = [text.get_text() for axes in figure.axes for text in (*axes.texts, axes.xaxis.label, axes.yaxis.label)]
    return "\n".join([*found, *(text.get_text() for legend in figure.legends for text in legend.get_texts())])


def check_section(found: Performance) -> None:
    """Every table has as many cells as columns, every picture draws, every axis is named."""
    made = build_section(found, verdicts(found))
    for table in (*made.tables, *(picture.data for picture in made.pictures)):
        assert table.rows
        assert all(len(row) == len(table.header) for row in table.rows)
    for picture in made.pictures:
        figure = picture.draw()
        assert all(axes.get_ylabel() for axes in figure.axes if axes.get_subplotspec().is_first_col())
        assert picture.alt
    names = [table.name for table in made.tables] + [picture.name for picture in made.pictures]
    assert len(set(names)) == len(names)


def test_the_figure_shows_the_numbers(plant: Callable[..., Material]) -> None:
    found = measure_performance(plant(planted, best=lambda run: 2 if run.rank == 16 else 1))
    figure = plot_rank_curve(found)
    left, right = figure.axes
    means = [entry.score.value for entry in found.lora_curve]
    drawn = {tuple(line.get_xdata()): list(line.get_ydata()) for line in left.lines if len(line.get_xdata()) == 3}
    assert drawn[1.0, 4.0, 16.0] == pytest.approx(means)
    by_size = {tuple(line.get_xdata()): list(line.get_ydata()) for line in right.lines}
    assert by_size[320.0, 1280.0, 5120.0] == pytest.approx(means)
    hollow = [line for line in left.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in hollow] == [16.0]
    full, base = found.entry_of("full"), found.entry_of("base")
    assert full is not None
    assert base is not None
    levels = {line.get_label(): line.get_ydata()[0] for line in left.lines if len(line.get_ydata())}
    assert levels["full fine-tuning"] == pytest.approx(full.score.value)
    assert levels["untouched base"] == pytest.approx(base.score.value)
    assert levels["90% of its gain"] == pytest.approx(base.score.value - 0.9 * 0.5)
    said = texts(figure)
    for part in ("r90 = 4", "r≈ = 16", "lower is better", "low rank: up to 8", "trained parameters", "on the edge"):
        assert part in said
    low, high = left.get_ylim()
    assert low < min(full.scores)
    assert high > max(base.scores)


def test_methods_without_rank_stand_by_their_size() -> None:
    """One alone is a named point, one of several sizes a line; neither has a place among the ranks."""

    def sized(method: str, trainable: int, score: float) -> Entry:
        changes: dict[str, Any] = {"label": f"{method} {trainable}", "method": method, "rank": None}
        return msgspec.structs.replace(entry(1, None, trainable=trainable, score=Interval(score)), **changes)

    found = result(entry(1, BELOW), entry(4, ABOVE))
    others = (sized("subspace", 900, 0.2), sized("subspace", 30, 0.4), sized("bias", 64, 0.3))
    figure = plot_rank_curve(msgspec.structs.replace(found, entries=(*found.entries, *others)))
    left, right = figure.axes
    lines = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in right.lines}
    assert lines[30.0, 900.0] == (0.4, 0.2)
    assert lines[(64.0,)] == (0.3,)
    assert "bias" in texts(figure)
    assert "subspace, mean" in texts(figure)
    assert not {30.0, 900.0, 64.0} & {float(x) for line in left.lines for x in np.ravel(line.get_xdata())}


def test_costs_are_drawn_relative_to_full_fine_tuning(plant: Callable[..., Material]) -> None:
    found = measure_performance(plant(planted))
    full = found.entry_of("full")
    assert full is not None
    assert full.saved_bytes is not None
    figure = plot_costs(found)
    saved = figure.axes[2]
    ratios = [(one.saved_bytes or 0) / full.saved_bytes for one in found.lora_curve]
    drawn = next(line for line in saved.lines if len(line.get_xdata()) == 3)
    assert list(drawn.get_ydata()) == pytest.approx(ratios)
    assert "full fine-tuning" in texts(figure)
    gaps = next(line for line in figure.axes[3].lines if len(line.get_xdata()) == 3)
    assert list(gaps.get_ydata()) == pytest.approx([one.gap for one in found.lora_curve])
    alone = plot_costs(measure_performance(plant(lambda run: None if run.method == "full" else planted(run))))
    assert "in bytes" in texts(alone)


def test_two_seeds_leave_room_for_the_scores() -> None:
    """Student's interval of two seeds is thirteen standard errors wide either way: it must not fill the axes."""
    wide = entry(1, BELOW, scores=(0.4, 0.6), score=Interval(0.5, -0.8, 1.8))
    figure = plot_rank_curve(result(wide, full=msgspec.structs.replace(FULL, scores=(0.1,), score=Interval(0.1))))
    low, high = figure.axes[0].get_ylim()
    assert high - low < 5 * 0.5


def test_the_section_says_what_was_found(plant: Callable[..., Material]) -> None:
    found = measure_performance(plant(planted))
    check_section(found)
    made = build_section(found, verdicts(found))
    for picture in made.pictures:
        picture.draw().canvas.draw()
    assert "The smallest rank with 90% of full fine-tuning's gain is 4" in made.pictures[0].alt
    assert "The smallest equivalent to it is 16" in made.pictures[0].alt
    rows = {row[0]: row for row in made.tables[0].rows}
    assert rows["r = 4"][10] == pytest.approx(1.41 / 1.5)
    assert any("test split" in note for note in made.notes)


# Which matrices


def target_entries() -> list[Entry]:
    """q or v alone have 100 parameters a rank, both together 200."""
    return [
        entry(rank, BELOW, targets=targets, label=f"{targets} r = {rank}", trainable=rank * size, score=Interval(rank))
        for targets, size in (("q", 100), ("v", 103), ("q,v", 200))
        for rank in (1, 2, 4)
    ]


def test_one_budget_takes_ranks_of_the_same_size() -> None:
    chosen = entries_at_budget(target_entries(), None)
    assert [(one.targets, one.rank) for one in chosen] == [("q", 4), ("v", 4), ("q,v", 2)]
    # Without sizes that agree there is no such table.
    apart = [msgspec.structs.replace(one, trainable=one.trainable * (9 if one.targets == "v" else 1)) for one in chosen]
    assert [one.targets for one in entries_at_budget(apart, None)] == ["q", "q,v"]


def test_the_papers_tables_are_there_for_several_targets() -> None:
    found = result(*target_entries())
    tables = {table.name: table for table in build_section(found, verdicts(found)).tables}
    which, crossed = tables["which-matrices"], tables["ranks-of-targets"]
    assert which.header == ("", "q", "v", "q,v")
    assert which.rows[0] == ("rank r", 4, 4, 2)
    assert which.rows[1] == ("trained parameters", 400, 412, 400)
    assert crossed.header == ("matrices", "r = 1", "r = 2", "r = 4")
    assert crossed.rows[2] == ("q,v", 1, 2, 4)
    budget = msgspec.structs.replace(found, budget=400, entries=(*entries_at_budget(target_entries(), None), FULL))
    assert [table.name for table in build_section(budget, verdicts(budget)).tables] == [
        "performance-scores",
        "which-matrices",
    ]
    assert [table.name for table in build_section(result(entry(1, BELOW)), []).tables] == ["performance-scores"]
