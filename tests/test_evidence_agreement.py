"""LoRA against full fine-tuning on a planted task, where both must find one update; totals against whole matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rankscope.evidence.agreement.figure import plot_agreement
from rankscope.evidence.agreement.measure import Agreement, RankAgreement, measure_agreement, verdicts
from rankscope.evidence.agreement.section import build_section
from rankscope.evidence.material import Material
from rankscope.inference import Interval
from rankscope.result import _array, json_values
from rankscope.train.config import StudyConfig
from rankscope.train.study import Study, run_study
from rankscope.verdict import MissingEvidenceError

RANKS, SEEDS, LAYERS = (2, 4), (0, 1), ("first", "second")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    config = StudyConfig(task="planted", ranks=RANKS, seeds=SEEDS, steps=200, device="cpu")
    return run_study(config, tmp_path_factory.mktemp("agreement") / "study")


@pytest.fixture(scope="module")
def found(study: Study) -> Agreement:
    return measure_agreement(Material(study))


def part(study: Study, folder: Path, *patterns: str) -> Study:
    """A study of some of the runs."""
    (folder / "runs").mkdir(parents=True)
    (folder / "study.json").write_bytes((study.folder / "study.json").read_bytes())
    for pattern in patterns:
        for path in (study.folder / "runs").glob(pattern):
            (folder / "runs" / path.name).symlink_to(path)
    return Study(folder)


def matrices(study: Study, method: str, seed: int, rank: int | None = None) -> dict[str, np.ndarray]:
    """The updates of one run, whole, in float64."""
    for record in study.best():
        if (record.run.method, record.run.seed, record.run.rank) == (method, seed, rank):
            return {name: study.store(record.run)[name].dense().double().numpy() for name in LAYERS}
    raise LookupError(method)


# A study


def test_where_the_task_is_linear_both_find_the_same_update(found: Agreement) -> None:
    """Planted rank 4: LoRA of rank 2 is the top half of the full update, of rank 4 all that is not noise."""
    assert [one.rank for one in found.ranks] == [2, 4]
    for one in found.ranks:
        assert (one.seeds, one.edge, len(one.rows)) == (SEEDS, False, 2)
        assert one.efficiency.value > 0.95
        assert one.total.scaled.value == pytest.approx(one.total.floor.value, abs=0.1)
        assert one.significant_left == one.significant_right == 2
        assert one.top_left.value > 0.8
        assert 0.8 < one.total.ratio.value < 1.2
    two, four = found.ranks
    assert four.cosine.value > two.cosine.value + 0.1
    said = verdicts(found)
    assert [v.answer for v in said] == ["yes"]
    assert said[0].value == four.efficiency.value
    assert "At r = 4 LoRA's update" in said[0].sentence


def test_full_fine_tuning_agrees_with_itself(found: Agreement) -> None:
    assert [one.rank for one in found.repeat] == [2, 4]
    for one in found.repeat:
        assert one.efficiency.value > 0.9
        assert one.seeds == SEEDS


def test_totals_are_those_of_all_layers_as_one_vector(study: Study, found: Agreement) -> None:
    for one in found.ranks:
        by_seed = []
        for seed in SEEDS:
            full, lora = matrices(study, "full", seed), matrices(study, "lora", seed, one.rank)
            norm = math.sqrt(sum((F**2).sum() for F in full.values()))
            pairs = [(full[name], lora[name]) for name in LAYERS]
            best = [max(0.0, (F * L).sum() / (L**2).sum()) for F, L in pairs]
            missed = sum((np.linalg.svd(F, compute_uv=False)[one.rank :] ** 2).sum() for F, _ in pairs)
            scaled = math.sqrt(sum(((F - c * L) ** 2).sum() for (F, L), c in zip(pairs, best, strict=True)))
            by_seed.append(
                {
                    "floor": math.sqrt(missed) / norm,
                    "achieved": math.sqrt(sum(((F - L) ** 2).sum() for F, L in pairs)) / norm,
                    "scaled": scaled / norm,
                    "cosine": sum((F * L).sum() for F, L in pairs)
                    / norm
                    / math.sqrt(sum((L**2).sum() for _, L in pairs)),
                    "efficiency": (1 - scaled**2 / norm**2) / (1 - missed / norm**2),
                    "ratio": math.sqrt(sum((L**2).sum() for _, L in pairs)) / norm,
                }
            )
        for name in by_seed[0]:
            value = getattr(one.total, name)
            assert value.value == pytest.approx(np.mean([each[name] for each in by_seed]), rel=1e-4), name
            assert value.low <= value.value <= value.high


def test_rows_are_means_over_seeds_against_full_of_the_same_seed(study: Study, found: Agreement) -> None:
    for one in found.ranks:
        for row in one.rows:
            pairs = [
                (matrices(study, "full", seed)[row.layer], matrices(study, "lora", seed, one.rank)[row.layer])
                for seed in SEEDS
            ]
            errors = [np.linalg.norm(F - L) / np.linalg.norm(F) for F, L in pairs]
            assert row.achieved == pytest.approx(np.mean(errors), rel=1e-4)
            left = [np.linalg.svd(L)[0][:, : one.rank] for _, L in pairs]
            shares = [(np.linalg.norm(U.T @ F) / np.linalg.norm(F)) ** 2 for U, (F, _) in zip(left, pairs, strict=True)]
            assert row.left == pytest.approx(np.mean(shares), rel=1e-4)
            assert row.left_chance == pytest.approx(one.rank / row.shape[0])
            assert row.right_chance == pytest.approx(one.rank / row.shape[1])
            assert row.p_left <= row.holm_left
    first = found.ranks[0]
    assert first.left.value == pytest.approx(np.median([row.left for row in first.rows]))
    assert first.left_chance == pytest.approx(np.median([2 / 64, 2 / 96]))


def test_repeat_is_the_full_update_of_the_other_seed_cut(study: Study, found: Agreement) -> None:
    cosines = []
    for seed, other in ((0, 1), (1, 0)):
        F, G = (matrices(study, "full", s)["first"] for s in (seed, other))
        U, s, Vt = np.linalg.svd(G, full_matrices=False)
        cut = (U[:, :2] * s[:2]) @ Vt[:2]
        cosines.append((F * cut).sum() / np.linalg.norm(F) / np.linalg.norm(cut))
    row = next(row for row in found.repeat[0].rows if row.layer == "first")
    assert row.cosine == pytest.approx(np.mean(cosines), rel=1e-4)


def test_the_p_of_a_layer_is_the_largest_over_seeds(study: Study, tmp_path: Path, found: Agreement) -> None:
    alone = [measure_agreement(Material(part(study, tmp_path / str(seed), f"*-s{seed}"))) for seed in SEEDS]
    for i, row in enumerate(found.ranks[0].rows):
        assert row.p_left == max(one.ranks[0].rows[i].p_left for one in alone)


def test_one_seed_has_nothing_to_repeat(study: Study, tmp_path: Path) -> None:
    one = measure_agreement(Material(part(study, tmp_path / "one", "*-s0")))
    assert one.repeat == ()
    assert one.ranks[0].total.cosine.low is None
    said = verdicts(one)[0]
    assert said.answer == "yes"
    assert "Not enough seeds" in said.sentence
    assert "1 seed;" in said.sentence
    assert plot_agreement(one).axes
    assert build_section(one, verdicts(one)).pictures


def test_what_is_missing_is_said(study: Study, tmp_path: Path) -> None:
    with pytest.raises(MissingEvidenceError, match="without --no-full"):
        measure_agreement(Material(part(study, tmp_path / "lora", "lora-*")))
    with pytest.raises(MissingEvidenceError, match="--ranks"):
        measure_agreement(Material(part(study, tmp_path / "full", "full-*")))
    with pytest.raises(MissingEvidenceError, match="same --seeds"):
        measure_agreement(Material(part(study, tmp_path / "seeds", "lora-*-s0", "full-*-s1")))


def test_layers_that_cannot_be_compared_are_named(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = Material(part(study, tmp_path / "some", "*-s0"))
    monkeypatch.setattr(Material, "layers", [*LAYERS, "third"])
    assert measure_agreement(material).skipped == ("third: not every run changes it",)
    monkeypatch.setattr(Material, "layers", ["third"])
    with pytest.raises(MissingEvidenceError, match="third: not every run changes it"):
        measure_agreement(material)


# Verdicts from numbers


def rank(like: RankAgreement, efficiency: Interval, significant: int = 2, edge: bool = False) -> RankAgreement:
    return msgspec.structs.replace(like, rank=8, efficiency=efficiency, significant_left=significant, edge=edge)


LOW, HIGH = Interval(0.1, 0.05, 0.2), Interval(0.7, 0.6, 0.8)
RULES = {
    "half and more": (HIGH, 2, False, HIGH, "yes"),
    "half and more, by directions of chance": (HIGH, 1, False, HIGH, "undecided"),
    "no one can tell where the half lies": (Interval(0.5, 0.4, 0.6), 2, False, HIGH, "undecided"),
    "less, and full agrees with itself": (LOW, 2, False, HIGH, "no"),
    "less, and full hardly agrees with itself": (LOW, 2, False, Interval(0.15, 0.1, 0.2), "undecided"),
    "less, and full agrees less than half, but more": (LOW, 2, False, Interval(0.35, 0.3, 0.4), "no"),
    "less, and full agrees more, but not for sure": (LOW, 2, False, Interval(0.25, 0.15, 0.4), "undecided"),
    "less, and no other seed": (LOW, 2, False, None, "undecided"),
    "less, and a better rate may be beyond": (LOW, 2, True, HIGH, "undecided"),
    "half and more at the edge": (HIGH, 2, True, HIGH, "yes"),
}


@pytest.mark.parametrize("rule", RULES)
def test_verdicts_follow_from_numbers(rule: str, found: Agreement) -> None:
    efficiency, significant, edge, again, answer = RULES[rule]
    like = found.ranks[0]
    repeat = () if again is None else (rank(like, again),)
    said = verdicts(Agreement(ranks=(rank(like, efficiency, significant, edge),), repeat=repeat, skipped=()))[0]
    assert said.answer == answer
    assert (said.value, said.low, said.high) == efficiency
    assert f"{efficiency.value:.3g} (" in said.sentence
    assert ("end of those tried" in said.sentence) == edge
    assert ("Not enough seeds" in said.sentence) == (again is None)


def test_the_verdict_is_about_the_rank_nearest_8(found: Agreement) -> None:
    like = found.ranks[0]
    ranks = tuple(msgspec.structs.replace(like, rank=r, efficiency=Interval(r / 100)) for r in (1, 4, 6, 64))
    said = verdicts(Agreement(ranks=ranks, repeat=(), skipped=()))[0]
    assert said.value == 0.06
    assert "It explains 0.01 at r = 1 and 0.64 at r = 64." in said.sentence


# Results as files, figures and text


def test_results_are_json(found: Agreement) -> None:
    values = json_values(found)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    again = msgspec.convert(values, Agreement, dec_hook=_array)
    assert again == found
    assert verdicts(again) == verdicts(found)


def test_figure(found: Agreement) -> None:
    figure = plot_agreement(found)
    errors, cosines, efficiencies, captured = figure.axes
    for axes in figure.axes:
        assert axes.get_ylabel()
        assert axes.get_legend() is not None
    floor = next(line for line in errors.lines if str(line.get_label()).startswith("floor"))
    assert list(floor.get_ydata()) == [one.total.floor.value for one in found.ranks]
    assert list(floor.get_xdata()) == [2, 4]
    ours = next(line for line in cosines.lines if line.get_label() == "LoRA")
    assert list(ours.get_ydata()) == [one.total.cosine.value for one in found.ranks]
    assert any("line of the verdict" in str(line.get_label()) for line in efficiencies.lines)
    chance = next(line for line in captured.lines if line.get_label() == "random input space (right)")
    assert list(chance.get_ydata()) == [one.right_chance for one in found.ranks]


def test_section(found: Agreement) -> None:
    made = build_section(found, verdicts(found))
    assert (len(made.verdicts), len(made.pictures), len(made.tables)) == (1, 1, 2)
    assert f"{found.ranks[-1].left.value:.2g}" in made.pictures[0].alt
    assert "another full fine-tuning explains" in made.pictures[0].alt
    assert made.pictures[0].draw().axes
    for table in (*made.tables, made.pictures[0].data):
        assert table.rows
        assert all(len(row) == len(table.header) for row in table.rows)
    assert len(made.tables[0].rows) == 4
    assert len(made.tables[1].rows) == 4
    left_out = msgspec.structs.replace(found, skipped=("head: is zero",))
    assert "Left out: head: is zero." in build_section(left_out, verdicts(left_out)).notes
