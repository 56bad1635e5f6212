"""Spectra as evidence: planted updates, noise, rounding floors, and LoRA that uses its rank or does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from makers import normal, planted, planted_dense
from safetensors.torch import load_file

from rankscope.analysis.layer_spectra import spectrum
from rankscope.evidence.material import Material
from rankscope.evidence.spectra.figure import plot_joint_spectra, plot_ranks_by_kind, rank_colours
from rankscope.evidence.spectra.measure import FULL_LABEL, Spectra, measure_spectra, verdicts
from rankscope.evidence.spectra.section import build_section
from rankscope.result import json_values
from rankscope.spectra import MEASURES, gd_count, mp_count, noise_measures
from rankscope.spectra import Spectrum as OneSpectrum
from rankscope.train.config import make_study_config
from rankscope.train.results import RunResult
from rankscope.train.runs import Run, RunRecord
from rankscope.train.study import GridEdge, LearningRateChoice, run_study
from rankscope.updates import Dense, LowRank, Update
from rankscope.verdict import MissingEvidenceError

Updates = Mapping[str, Update]
NAMES = [f"layers.{i}.{kind}" for i in range(4) for kind in ("q_proj", "down_proj")]
SHAPES = {"q_proj": (64, 64), "down_proj": (64, 128)}


class Stand(Material):
    """A study with these updates: full fine-tuning's by seed, LoRA's by rank and seed."""

    def __init__(self, full: list[Updates], lora: Mapping[int, list[Updates]], edge: GridEdge = None) -> None:
        self._full = [row(Run(method="full", seed=i, lr=1e-3), found, edge) for i, found in enumerate(full)]
        self._lora = [
            row(Run(method="lora", seed=i, rank=rank, alpha=2.0 * rank, lr=1e-2), found, edge)
            for rank, by_seed in lora.items()
            for i, found in enumerate(by_seed)
        ]
        methods = [*([full] if full else []), *lora.values()]
        self.layers = list(methods[0][0]) if methods else []  # in place of the property

    def full_rows(self) -> list[RunResult]:
        return self._or_missing(self._full)

    def lora_rows(self) -> list[RunResult]:
        return self._or_missing(self._lora)

    @staticmethod
    def _or_missing(rows: list[RunResult]) -> list[RunResult]:
        if not rows:
            raise MissingEvidenceError("none")
        return rows


def row(run: Run, updates: Updates, edge: GridEdge) -> RunResult:
    choice = LearningRateChoice(run.lr or 0.0, edge, (run.lr or 0.0,))
    return RunResult(RunRecord(run=run, status="done", steps=1), 0.0, 0.0, {}, spectrum(updates), choice)


def shape_of(name: str) -> tuple[int, int]:
    return SHAPES[name.rpartition(".")[2]]


def noise(seed: int = 0, names: list[str] = NAMES) -> dict[str, Dense]:
    return {name: Dense(normal(*shape_of(name), seed=100 * seed + i)) for i, name in enumerate(names)}


def signal(seed: int = 0) -> dict[str, Dense]:
    """Rank 3 with a little noise."""
    return {
        name: Dense(planted_dense(shape_of(name), [9.0, 8.0, 7.0], seed=i).matrix + 1e-3 * one.matrix)
        for i, (name, one) in enumerate(noise(seed).items())
    }


def adapters(sigma: object, seed: int = 0) -> dict[str, LowRank]:
    return {name: planted(shape_of(name), sigma, seed=10 * seed + i) for i, name in enumerate(NAMES)}


# Numbers.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Material:
    settings = {"task": "planted", "ranks": (1, 4), "seeds": (0, 1), "batch": 32, "steps": 30, "evaluations": 0}
    return Material(run_study(make_study_config(settings, "test"), tmp_path_factory.mktemp("study") / "planted"))


def test_numbers_are_means_over_seeds_of_a_study(trained: Material) -> None:
    """k90 and the entropy rank by numpy from the raw files."""
    found = measure_spectra(trained)
    assert {layer.label for layer in found.layers} == {"full", "r = 1", "r = 4"}
    assert found.seeds == {"full": 2, "r = 1": 2, "r = 4": 2}
    for layer in found.layers_of(FULL_LABEL):
        folders = [trained.study.path(one.record.run) for one in trained.full_rows()]
        values = [
            np.linalg.svd(load_file(folder / "update.safetensors")[layer.name].double().numpy(), compute_uv=False)
            for folder in folders
        ]
        energies = [np.cumsum(s**2) / (s**2).sum() for s in values]
        assert layer.measures["k90"] == pytest.approx(np.mean([(e < 0.9).sum() + 1 for e in energies]))
        shares = [s / s.sum() for s in values]
        assert layer.measures["entropy_rank"] == pytest.approx(
            np.mean([np.exp(-(p @ np.log(p))) for p in shares]), rel=1e-5
        )
        assert layer.norm == pytest.approx(np.mean([np.sqrt((s**2).sum()) for s in values]), rel=1e-6)
        assert layer.noise == pytest.approx(noise_measures(layer.shape))
    for layer in found.layers_of("r = 1"):
        assert layer.measures["entropy_rank"] == pytest.approx(1.0)
        assert (layer.noise, layer.mp_count, layer.gd_count, layer.floor) == (None, None, None, None)


def test_counts_above_the_noise_are_means_over_seeds() -> None:
    found = measure_spectra(Stand([signal(0), noise(1)], {}))
    for layer in found.layers:
        both = [OneSpectrum.of(updates[layer.name]) for updates in (signal(0), noise(1))]
        assert layer.mp_count == np.mean([mp_count(one) for one in both])
        assert layer.gd_count == np.mean([gd_count(one) for one in both])
        assert layer.mp_count >= 1.5  # three planted, none or so in noise


def test_kinds_are_medians_of_layers_and_share_the_energy() -> None:
    updates = {name: one * (1.0 + NAMES.index(name)) for name, one in noise().items()}
    found = measure_spectra(Stand([updates], {2: [adapters([3.0, 1.0])]}))
    total = sum(one.energy for one in updates.values())
    for kind in found.kinds:
        same = [layer for layer in found.layers_of(kind.label) if layer.kind == kind.kind]
        assert kind.layers == len(same) == 4
        for measure in MEASURES:
            assert kind.measures[measure] == np.median([layer.measures[measure] for layer in same])
        if kind.label == FULL_LABEL:
            own = sum(one.energy for name, one in updates.items() if name.endswith(kind.kind))
            assert kind.energy == pytest.approx(own / total)
            assert kind.noise is not None
            assert kind.noise["k90"] == noise_measures(SHAPES[kind.kind])["k90"]
        else:
            assert kind.noise is None
    for label in ("full", "r = 2"):
        assert sum(kind.energy for kind in found.kinds if kind.label == label) == pytest.approx(1.0)


def test_one_axis_holds_the_layer_of_median_energy() -> None:
    sizes = {"layers.0": 5.0, "layers.1": 1.0, "layers.2": 2.0, "layers.3": 9.0}
    updates = [{name: one * sizes[name.rpartition(".")[0]] for name, one in noise(seed).items()} for seed in (0, 1)]
    found = measure_spectra(Stand(updates, {1: [adapters([2.0])], 2: [adapters([3.0, 1.0])]}))
    assert [one.name for one in found.joint] == ["layers.2.down_proj", "layers.2.q_proj"]
    for one in found.joint:
        assert [curve.label for curve in one.curves] == ["full", "r = 1", "r = 2"]
        values = [np.linalg.svd(updates[seed][one.name].matrix.double().numpy(), compute_uv=False) for seed in (0, 1)]
        np.testing.assert_allclose(one.curves[0].values, np.sqrt(values[0] * values[1]), rtol=1e-5)
        np.testing.assert_allclose(one.curves[2].values, [3.0, 1.0], rtol=1e-9)
        energy = np.mean([(s**2).sum() for s in values])
        assert (np.array(one.noise) ** 2).sum() == pytest.approx(energy, rel=1e-6)
        assert one.noise[0] / values[0][0] == pytest.approx(1.0, abs=0.1)  # noise it is
        assert one.mp_edge is not None
        assert one.rounding_edge is None


def test_the_result_comes_back_from_json() -> None:
    found = measure_spectra(Stand([signal(0), signal(1)], {2: [adapters([3.0, 1.0])]}))
    assert msgspec.convert(json_values(found), Spectra) == found


def test_with_nothing_to_look_at_the_line_is_missing() -> None:
    with pytest.raises(MissingEvidenceError, match="the weights of no LoRA run"):
        measure_spectra(Stand([], {}))


# Verdicts.


def test_one_layer_gives_no_answer() -> None:
    one = {NAMES[0]: signal()[NAMES[0]]}
    for verdict in verdicts(measure_spectra(Stand([one], {8: [{NAMES[0]: adapters([1.0] * 8)[NAMES[0]]}]}))):
        assert (verdict.answer, verdict.low, verdict.high) == ("undecided", None, None)


def test_what_a_saved_update_can_have_is_not_what_was_asked_for() -> None:
    """PiSSA asked for r = 4 saves plain LoRA of rank 8: its eight equal σ are all of what it can have, not twice it."""
    found = verdicts(measure_spectra(Stand([], {4: [adapters([1.0] * 8)]})))[1]
    assert found.value == pytest.approx(1.0)


def test_a_planted_low_rank_is_answered_yes() -> None:
    verdict = verdicts(measure_spectra(Stand([signal(0), signal(1)], {})))[0]
    assert verdict.answer == "yes"
    assert verdict.value == pytest.approx(3 / 64)
    assert "median of 8 layers, 2 seeds: 3 of 64" in verdict.sentence
    assert "pure noise of these shapes would read 0.5" in verdict.sentence


def test_pure_noise_is_answered_no_and_reads_what_noise_reads() -> None:
    """The negative control; a square matrix of noise has its k90 at .51 of the side, a 2:1 one at .62."""
    names = [name for name in NAMES if name.endswith("q_proj")]
    verdict = verdicts(measure_spectra(Stand([noise(0, names), noise(1, names)], {})))[0]
    assert verdict.answer == "no"
    assert verdict.value == pytest.approx(0.51, abs=0.02)
    assert "pure noise of these shapes would read 0.5" in verdict.sentence
    assert "0.125" in verdict.sentence
    assert "4 layers, from the least to the largest" in verdict.sentence


def test_between_low_and_not_low_is_undecided() -> None:
    """Half of the layers have rank 3 of 64, half are noise."""
    mixed = {name: one for i, name in enumerate(NAMES) for one in [(signal() if i % 2 else noise())[name]]}
    assert verdicts(measure_spectra(Stand([mixed], {})))[0].answer == "undecided"


def bfloat(size: float) -> dict[str, Dense]:
    """A tuned checkpoint in bfloat16 minus a base with entries around 1: its rounding is 2⁻⁸/√12 or so an entry."""
    found = {}
    for i, name in enumerate(NAMES):
        base = normal(*shape_of(name), seed=50 + i).to(torch.bfloat16)
        change = planted_dense(shape_of(name), [9.0, 8.0, 7.0], seed=i).matrix * size
        found[name] = Dense.difference((base.float() + change).to(torch.bfloat16), base)
    return found


def test_below_the_rounding_floor_nothing_is_answered() -> None:
    buried, clear = measure_spectra(Stand([bfloat(0.005)], {})), measure_spectra(Stand([bfloat(1.0)], {}))
    assert min(layer.floor or 0.0 for layer in buried.layers) > 0.5
    assert max(layer.floor or 0.0 for layer in clear.layers) < 0.1
    verdict = verdicts(buried)[0]
    assert (verdict.answer, "below the rounding floor" in verdict.sentence) == ("undecided", True)
    assert verdicts(clear)[0].answer == "yes"
    assert "rounding floor" not in verdicts(clear)[0].sentence
    assert all(layer.above_floor == 3 for layer in clear.layers)
    assert all(one.rounding_edge for one in clear.joint)


def test_without_full_fine_tuning_its_verdict_is_open() -> None:
    full, lora = verdicts(measure_spectra(Stand([], {4: [adapters([1.0, 1.0, 1.0, 1.0])]})))
    assert (full.answer, full.value) == ("undecided", None)
    assert "by construction" in full.sentence
    assert lora.answer == "no"


def test_an_unchanged_model_has_no_rank() -> None:
    zero = {name: Dense(torch.zeros(shape_of(name))) for name in NAMES}
    verdict = verdicts(measure_spectra(Stand([zero], {})))[0]
    assert (verdict.answer, verdict.value, verdict.sentence) == (
        "undecided", None, "Full fine-tuning changed no matrix."
    )  # fmt: skip


USED, UNUSED = [1.0] * 8, [1.0] * 2 + [1e-6] * 6  # entropy ranks of 8 and of 2


@pytest.mark.parametrize(
    ("even", "odd", "answer", "value"),
    [(USED, USED, "no", 1.0), (UNUSED, UNUSED, "yes", 0.25), (USED, UNUSED, "undecided", 0.625)],
)
def test_lora_uses_its_rank_or_not(even: list[float], odd: list[float], answer: str, value: float) -> None:
    both = adapters(even), adapters(odd)
    updates = {name: both[i % 2][name] for i, name in enumerate(NAMES)}
    verdict = verdicts(measure_spectra(Stand([], {8: [updates], 2: [adapters([1.0, 1.0])]})))[1]
    assert verdict.answer == answer
    assert verdict.value == pytest.approx(value, rel=1e-3)
    assert verdict.claim == "LoRA of rank 8 leaves most of its rank unused."
    assert "It is 2 at r = 2" in verdict.sentence


def test_a_rank_above_the_side_is_measured_by_the_side() -> None:
    """r = 96 on 64 × 64: no more than 64 directions can be used."""
    wide = {name: LowRank(normal(64, 96, seed=i), normal(96, 64, seed=9 + i)) for i, name in enumerate(NAMES[:2])}
    found = measure_spectra(Stand([], {96: [wide]}))
    entropy = np.median([layer.measures["entropy_rank"] for layer in found.layers])
    assert verdicts(found)[1].value == pytest.approx(entropy / 64)


@pytest.mark.parametrize(("edge", "word"), [("low", "lowest"), ("high", "highest")])
def test_a_rate_at_the_edge_is_said(edge: Any, word: str) -> None:
    for verdict in verdicts(measure_spectra(Stand([signal()], {2: [adapters([2.0, 1.0])]}, edge))):
        assert f"is the {word} that was tried" in verdict.sentence
        assert verdict.answer == "undecided"
    for verdict in verdicts(measure_spectra(Stand([signal()], {2: [adapters([2.0, 1.0])]}))):
        assert "tried" not in verdict.sentence


# Pictures and page.


@pytest.fixture(scope="module")
def both() -> Spectra:
    lora = {1: [adapters([2.0])], 2: [adapters([3.0, 1.0])], 8: [adapters(np.linspace(3, 1, 8))]}
    return measure_spectra(Stand([signal(0), signal(1)], lora))


def test_every_method_is_on_the_one_axis(both: Spectra) -> None:
    figure = plot_joint_spectra(both)
    figure.canvas.draw()
    assert [axes.get_title() for axes in figure.axes] == ["down_proj (64 × 128)", "q_proj (64 × 64)"]
    for axes, one in zip(figure.axes, both.joint, strict=True):
        drawn = {tuple(line.get_ydata()) for line in axes.lines}
        assert {curve.values for curve in one.curves} | {one.noise} <= drawn
        assert (one.mp_edge, one.mp_edge) in drawn
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == [
        "full fine-tuning",
        "LoRA r = 1",
        "LoRA r = 2",
        "LoRA r = 8",
        "noise of equal energy",
        "noise edge (MP)",
    ]


def test_ranks_stand_beside_noise_and_the_smaller_side(both: Spectra) -> None:
    figure = plot_ranks_by_kind(both)
    figure.canvas.draw()
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert names == ["down_proj", "q_proj"]
    for axes, measure in zip(figure.axes, ("k90", "entropy_rank"), strict=True):
        for place, name in enumerate(names):
            drawn = {line.get_ydata()[0] for line in axes.lines if np.mean(line.get_xdata()) == pytest.approx(place)}
            own = [kind for kind in both.kinds if kind.kind == name]
            expected = {kind.measures[measure] for kind in own} | {64.0, 8.0}
            expected |= {kind.noise[measure] for kind in own if kind.noise}
            assert drawn == expected


def test_higher_ranks_are_darker() -> None:
    colours = rank_colours([64, 1, 8])
    light = {rank: sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for rank, colour in colours.items()}
    assert light[1] > light[8] > light[64]


def test_the_section_lists_every_layer_beside_its_noise(both: Spectra) -> None:
    made = build_section(both, verdicts(both))
    (table,) = made.tables
    assert len(table.rows) == 8 * (4 + 1)
    assert all(len(row) == len(table.header) for row in table.rows)
    first = both.layers_of(FULL_LABEL)[0]
    rows = {(row[0], row[1]): row for row in table.rows}
    place = table.header.index("k90")
    assert rows[first.name, "full fine-tuning"][place] == first.measures["k90"]
    assert rows[first.name, "noise"][place] == noise_measures(first.shape)["k90"]
    assert rows[first.name, "LoRA r = 8"][place] == both.layers_of("r = 8")[0].measures["k90"]
    for picture in made.pictures:
        assert all(len(row) == len(picture.data.header) for row in picture.data.rows)
    joint, kinds = made.pictures
    assert len(joint.data.rows) == 2 * (64 + 64 + 1 + 2 + 8)
    assert "k90 3 (noise" in kinds.alt
    assert made.verdicts == verdicts(both)
    assert "there is no rounding floor" in " ".join(made.notes)


def test_a_rounding_floor_gets_its_columns() -> None:
    (table,) = build_section(measure_spectra(Stand([bfloat(1.0)], {2: [adapters([2.0, 1.0])]})), []).tables
    assert table.header[-2:] == ("rounding share", "above rounding")
    assert all(len(row) == len(table.header) for row in table.rows)
    full = next(row for row in table.rows if row[1] == "full fine-tuning")
    assert full[-1] == 3
    assert next(row for row in table.rows if row[1] == "LoRA r = 2")[-2:] == (None, None)


def test_layers_stand_in_natural_order(both: Spectra, tmp_path: Path) -> None:
    names = list(dict.fromkeys(row[0] for row in build_section(both, verdicts(both)).tables[0].rows))
    assert names == sorted(NAMES)
