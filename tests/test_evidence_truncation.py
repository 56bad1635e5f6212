"""The cut update, evaluated: against numpy, against planted ranks, and with heads, tied and transposed weights."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hf_makers import enlarge_weights, save_word_tokenizer
from safetensors.torch import load_file
from torch import Tensor, nn

from rankscope import lora
from rankscope.evidence.material import Material
from rankscope.evidence.truncation.cut_model import CutModel
from rankscope.evidence.truncation.figure import plot_truncation
from rankscope.evidence.truncation.measure import (
    KindPoint,
    Truncation,
    TruncationCurve,
    TruncationPoint,
    cut_ranks,
    measure_truncation,
    verdicts,
)
from rankscope.evidence.truncation.section import build_section
from rankscope.inference import Interval, Reach, first_reaching
from rankscope.result import json_values
from rankscope.train.config import StudyConfig, make_study_config
from rankscope.train.planted import PlantedTask
from rankscope.train.study import Study, run_study
from rankscope.verdict import MissingEvidenceError

transformers = pytest.importorskip("transformers")

SETTINGS: dict[str, Any] = {"task": "planted", "seeds": (0, 1), "batch": 64, "steps": 80, "evaluations": 0}


def planted(folder: Path, rank: int, **changes: object) -> Study:
    config = make_study_config({**SETTINGS, "planted_rank": rank, "ranks": (1, 16), **changes}, "test")
    return run_study(config, folder / f"planted{rank}")


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(planted(tmp_path_factory.mktemp("low"), 4))


@pytest.fixture(scope="module")
def high(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(planted(tmp_path_factory.mktemp("high"), 48, ranks=(16,)))


@pytest.fixture(scope="module")
def found(low: Material) -> Truncation:
    return measure_truncation(low)


def share(points: tuple[TruncationPoint, ...], k: int) -> Interval:
    (point,) = [point for point in points if point.k == k]
    assert point.share is not None
    return point.share


def test_ranks_double_up_to_the_whole_and_hold_the_largest_low_one() -> None:
    assert cut_ranks(64, 64) == [0, 1, 2, 4, 8, 16, 32, 64]
    assert cut_ranks(96, 96) == [0, 1, 2, 4, 8, 12, 16, 32, 64, 96]
    assert cut_ranks(3, 100) == [0, 1, 2, 3]
    assert cut_ranks(1, 4) == [0, 1]


def test_the_whole_update_gives_the_recorded_score(found: Truncation, low: Material) -> None:
    recorded = [low.study.score(row.record) for row in low.full_rows()]
    assert found.full.recorded == tuple(recorded)
    assert found.full.kept[-1].k == found.full.limit == 64
    np.testing.assert_allclose(found.full.kept[-1].scores, recorded, rtol=1e-6)
    assert found.full.reproduction_error < 1e-6
    assert found.lora is not None
    assert found.lora.kept[-1].k == found.lora.limit == 16
    np.testing.assert_allclose(found.lora.kept[-1].scores, found.lora.recorded, rtol=1e-6)


def test_nothing_kept_is_the_base(found: Truncation, low: Material) -> None:
    """The planted model has no biases or norms."""
    base = [low.base_score(seed) for seed in (0, 1)]
    for point in (found.full.kept[0], found.full.removed[-1]):
        assert point.scores == pytest.approx(base, rel=1e-6)
        assert point.share is not None
        assert point.share.value == pytest.approx(0.0, abs=1e-5)
    assert found.full.whole == 0


def dense(low: Material, run: Any) -> dict[str, np.ndarray]:
    """Updates by numpy from the raw files."""
    folder = low.study.path(run)
    if run.method == "full":
        return {name: tensor.double().numpy() for name, tensor in load_file(folder / "update.safetensors").items()}
    raw = load_file(folder / "adapter" / "adapter_model.safetensors")
    scale = run.alpha / run.rank
    stem = "base_model.model.{}.lora_{}.weight"
    return {
        name: scale * raw[stem.format(name, "B")].double().numpy() @ raw[stem.format(name, "A")].double().numpy()
        for name in ("first", "second")
    }


def loss(task: PlantedTask, updates: dict[str, np.ndarray]) -> float:
    """Mean squared error on the test split, by numpy."""
    x, y = task.inputs["test"].double().numpy(), task.answers["test"].double().numpy()
    W = {name: task.base[name].double().numpy() + update for name, update in updates.items()}
    split = W["first"].shape[1]
    guess = np.concatenate([x[:, :split] @ W["first"].T, x[:, split:] @ W["second"].T], axis=1)
    return float(((guess - y) ** 2).mean())


def best(matrix: np.ndarray, k: int) -> np.ndarray:
    U, s, Vt = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :k] * s[:k]) @ Vt[:k]


def test_every_score_is_that_of_numpys_truncation(found: Truncation, low: Material) -> None:
    """Kept and removed parts of full fine-tuning and of LoRA, in an implementation that shares nothing."""
    assert isinstance(low.task, PlantedTask)
    assert found.lora is not None
    cuts = [(found.full, low.full_rows()), (found.lora, [row for row in low.lora_rows() if row.record.run.rank == 16])]
    for cut, rows in cuts:
        for i, row in enumerate(rows):
            matrices = dense(low, row.record.run)
            for point in cut.kept:
                expected = loss(low.task, {name: best(matrix, point.k) for name, matrix in matrices.items()})
                assert point.scores[i] == pytest.approx(expected, rel=1e-5), (cut.name, point.k)
            for point in cut.removed:
                rest = {name: matrix - best(matrix, point.k) for name, matrix in matrices.items()}
                assert point.scores[i] == pytest.approx(loss(low.task, rest), rel=1e-5), (cut.name, -point.k)
    assert [point.k for point in found.full.removed] == [point.k for point in found.full.kept]
    assert found.lora.removed == ()


def test_a_planted_rank_is_found(found: Truncation, low: Material) -> None:
    """White inputs: the share of the gain is the share of the planted energy, a little more without the noise."""
    assert isinstance(low.task, PlantedTask)
    energies = low.task.singular_values.double().numpy() ** 2
    for k in (1, 2):
        expected = energies[:k].sum() / energies.sum()
        assert share(found.full.kept, k).value == pytest.approx(expected, abs=0.06)
    for k in (4, 8, 16, 32):
        assert share(found.full.kept, k).value > 0.99
        assert abs(share(found.full.removed, k).value) < 0.12
    assert found.k90 == found.full.k90 == Reach(4, 4, 4)
    assert found.lora is not None
    assert found.lora.k90.rank == 4
    enough, needed, of_lora = verdicts(found)
    assert (enough.answer, enough.value, enough.low, enough.high) == ("yes", 4, 4, 4)
    assert needed.answer == of_lora.answer == "yes"


def test_a_high_planted_rank_is_answered_no(high: Material) -> None:
    """The negative control: 48 of 64 directions are needed, and fewer do not do."""
    found = measure_truncation(high)
    assert share(found.full.kept, 8).value < 0.35
    assert share(found.full.kept, 32).value < 0.9
    assert found.k90 == Reach(64, 64, 64)
    update = CutModel(high, high.full_rows()[0])
    gains = {k: high.gain(update.score_top_part(k), 0) / high.gain(found.full.recorded[0], 0) for k in (40, 48)}
    assert gains[40] < gains[48]
    assert gains[48] > 0.97
    enough, _, of_lora = verdicts(found)
    assert enough.answer == "no"
    assert "Only the whole update" in enough.sentence
    assert of_lora.answer == "no"


def test_kinds_add_up_where_they_do_not_interact(found: Truncation) -> None:
    """Each planted map has outputs of its own: what is lost without one and without the other is all there is."""
    without = {point.kind: point for point in found.kinds if point.k == 0}
    assert set(without) == {"first", "second"}
    lost = [1 - point.share for point in without.values() if point.share is not None]
    assert sum(lost) == pytest.approx(1.0, abs=1e-5)
    assert min(lost) > 0.3
    at_four = [point.share for point in found.kinds if point.k == 4]
    assert all(value is not None and value > 0.99 for value in at_four)
    assert found.kinds_seed == 0


def test_an_accelerator_gives_the_same(low: Material, classified: Watching) -> None:
    fake_device = pytest.importorskip("fake_device")
    rows = [(low, low.full_rows()[0]), (low, low.lora_rows()[-1]), (classified, classified.full_rows()[0])]
    rows.append((classified, classified.lora_rows()[0]))

    def scores(device: str) -> list[float]:
        parts = [CutModel(Material(material.study, device), row) for material, row in rows]
        return [score for part in parts for score in (part.score_top_part(2), part.score_without_top(2))]

    with fake_device.accelerated():
        there = scores("fake")
    here = scores("cpu")
    assert there[:4] == pytest.approx(here[:4], rel=1e-5)
    assert there[4:] == pytest.approx(here[4:], abs=0.051)  # of 20 texts one may lie on the edge


def test_the_result_comes_back_from_json(found: Truncation) -> None:
    assert msgspec.convert(json_values(found), Truncation) == found


def test_what_is_lacking_is_said(low: Material, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(low.study.folder, copy)
    for run in copy.glob("runs/full-*"):
        shutil.rmtree(run)
    with pytest.raises(MissingEvidenceError, match="no full fine-tuning"):
        measure_truncation(Material(Study(copy)))


def test_without_a_base_score_nothing_is_evaluated(low: Material, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(low.study.folder, copy)
    shutil.rmtree(copy / "runs" / "base-s1")
    with pytest.raises(MissingEvidenceError, match="base of seed 1"):
        measure_truncation(Material(Study(copy)))


def test_without_lora_full_fine_tuning_is_cut_alone(low: Material, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(low.study.folder, copy)
    for run in {*copy.glob("runs/lora-*"), *copy.glob("runs/*-s1")}:
        shutil.rmtree(run)
    found = measure_truncation(Material(Study(copy)))
    assert found.lora is None
    assert [verdict.answer for verdict in verdicts(found)] == ["undecided", "undecided"]
    assert "One seed gives no interval" in verdicts(found)[0].sentence
    assert verdicts(found)[0].value == 4
    assert verdicts(found)[0].low is None


# Models of transformers: heads that are new, biases and norms, transposed and tied weights.


class Watching(Material):
    """Remembers the weights of the model that was evaluated last."""

    seen: dict[str, Tensor]

    def score(self, model: nn.Module, split: Any = "test") -> float:
        self.seen = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        return super().score(model, split)


SMALL: dict[str, Any] = {"max_length": 16, "seeds": (1,), "steps": 25, "batch": 8, "evaluations": 0}


def texts(folder: Path, count: int = 200) -> Path:
    source = random.Random(0)
    lines = ["text\tlabel"]
    for i in range(count):
        words = [f"w{source.randrange(20) + 20 * (i % 2)}" for _ in range(6)]
        lines.append(f"{' '.join(words)}\t{'ab'[i % 2]}")
    path = folder / "data.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Watching:
    """A tiny BERT with a new head, and an adapter with biases of the base."""
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=44, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    enlarge_weights(transformers.BertModel(config)).save_pretrained(folder / "model")
    save_word_tokenizer(folder / "model")
    settings = {**SMALL, "ranks": (4,), "lrs": (1e-2,), "full_lrs": (1e-2,), "bias": "lora_only"}
    study = StudyConfig(task="classify", model=str(folder / "model"), data=str(texts(folder)), **settings)
    return Watching(run_study(study, folder / "study"))


def is_matrix(name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and not name.startswith("classifier")


def test_heads_biases_and_norms_are_whole_at_every_rank(classified: Watching) -> None:
    row = classified.full_rows()[0]
    base = dict(classified.task.model(1).named_parameters())
    raw = load_file(classified.study.path(row.record.run) / "update.safetensors")
    changes = {name: raw.get(name, raw.get(name.removesuffix(".weight"))) for name in base}
    update = CutModel(classified, row)
    assert "classifier" not in update.names
    for k in (0, 2, 16):
        update.score_top_part(k)
        for name, weight in base.items():
            change = changes[name].double().numpy()
            expected = best(change, k) if is_matrix(name, weight) else change
            moved = (classified.seen[name] - weight).detach().double().numpy()
            np.testing.assert_allclose(moved, expected, atol=1e-6, err_msg=name)
    for name, weight in base.items():  # k = 16 was the whole: the stored update itself, to the last bit
        assert torch.equal(classified.seen[name], weight.detach() + changes[name]), name
    assert np.abs(changes["classifier.weight"].numpy()).max() > 1e-3
    assert np.abs(changes["bert.encoder.layer.0.output.LayerNorm.bias"].numpy()).max() > 1e-3


def test_one_kind_alone_is_cut(classified: Watching) -> None:
    row = classified.full_rows()[0]
    base = dict(classified.task.model(1).named_parameters())
    update = CutModel(classified, row)
    update.score_top_part(16)
    whole = classified.seen
    update.score_top_part(0, "query")
    for name, weight in base.items():
        expected = weight.detach() if name.endswith("query.weight") else whole[name]
        torch.testing.assert_close(classified.seen[name], expected, atol=1e-6, rtol=1e-6, msg=name)


def test_a_whole_adapter_computes_what_the_stored_one_does(classified: Watching) -> None:
    """Its head, its biases and its factors, against the adapter layers' own forward pass."""
    row = classified.lora_rows()[0]
    update = CutModel(classified, row)
    stored = classified.task.model(1)
    lora.load(stored, classified.study.path(row.record.run) / "adapter")
    batch = classified.task.batch(1, 0, 8)

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return classified.task.outputs(model.eval(), batch)

    def at(k: int) -> Tensor:
        update.score_top_part(k)
        model = classified.task.model(1)
        model.load_state_dict(classified.seen, strict=False)
        return logits(model)

    torch.testing.assert_close(at(update.max_rank), logits(stored), atol=1e-5, rtol=1e-5)
    assert (at(0) - logits(stored)).abs().max() > 0.01  # the head and the biases alone do not do it


def test_an_adapter_cut_to_nothing_keeps_its_head_and_biases(classified: Watching) -> None:
    row = classified.lora_rows()[0]
    raw = load_file(classified.study.path(row.record.run) / "adapter" / "adapter_model.safetensors")
    update = CutModel(classified, row)
    update.score_top_part(0)
    base = dict(classified.task.model(1).named_parameters())
    stored = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for key, tensor in raw.items()
        if "lora_" not in key
    }
    assert "classifier.weight" in stored
    assert len(stored) == update.whole > 2
    for name, weight in base.items():
        torch.testing.assert_close(classified.seen[name], stored.get(name, weight.detach()), atol=1e-6, rtol=1e-6)


def test_a_score_for_which_higher_is_better_gives_a_share(classified: Watching) -> None:
    found = measure_truncation(classified)
    assert found.higher_is_better
    gain = found.full.recorded[0] - found.base.value
    assert gain > 0
    for point in found.full.kept:
        assert point.share is not None
        assert point.share.value == pytest.approx((point.scores[0] - found.base.value) / gain)
    assert found.full.reproduction_error < 1e-6
    assert "higher is better" in plot_truncation(found).axes[0].get_ylabel()


def test_transposed_and_tied_weights_are_cut_as_they_are_used(tmp_path: Path) -> None:
    """GPT-2 stores (in, out) and shares its embedding with its head."""
    config = transformers.GPT2Config(
        vocab_size=44, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    enlarge_weights(transformers.GPT2LMHeadModel(config)).save_pretrained(tmp_path / "model")
    save_word_tokenizer(tmp_path / "model")
    settings = {**SMALL, "methods": (), "ranks": (), "full_lrs": (1e-2,)}
    study = StudyConfig(task="lm", model=str(tmp_path / "model"), data=str(texts(tmp_path)), **settings)
    material = Watching(run_study(study, tmp_path / "study"))
    row = material.full_rows()[0]
    update = CutModel(material, row)
    assert update.score_top_part(16) == pytest.approx(row.score, rel=1e-6)
    whole = material.seen
    update.score_top_part(1)
    base = dict(material.task.model(1).named_parameters())
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"):
        change = (whole[name] - base[name]).detach().double().numpy()
        moved = (material.seen[name] - base[name]).detach().double().numpy()
        np.testing.assert_allclose(moved, best(change, 1), atol=2e-6, err_msg=name)
        assert np.abs(moved).max() > 1e-3
    assert "lm_head.weight" not in base  # the same parameter as wte.weight: counted, and cut, once
    assert "lm_head" not in update.names


# Verdicts follow from the numbers.

RANKS = (0, 1, 2, 4, 8, 16, 32, 64)


def cut(shares: dict[int, tuple[float, float | None, float | None]], **changes: Any) -> TruncationCurve:
    """A cut of which these shares are known; every other k keeps what the last one did."""
    points = tuple(
        TruncationPoint(
            k=k,
            scores=(1.0, 1.0),
            score=Interval(1.0, 0.9, 1.1),
            share=Interval(*shares[max(s for s in shares if s <= k)]),
        )
        for k in RANKS
    )

    values: dict[str, Any] = {
        "name": "full fine-tuning", "rank": None, "lr": 1e-3, "edge": None, "seeds": (0, 1), "matrices": 3, "whole": 2,
        "dim": 64, "limit": 64, "recorded": (1.0, 1.0), "gain": Interval(0.5, 0.4, 0.6), "kept": points,
        "removed": points, "k90": first_reaching([(p.k, p.share) for p in points if p.share], 0.9),
    }  # fmt: skip
    return TruncationCurve(**{**values, **changes})


def result(full: TruncationCurve, lora: TruncationCurve | None = None) -> Truncation:
    kinds = (KindPoint(kind="q", matrices=3, k=0, score=1.0, share=0.5),)
    return Truncation(
        metric="loss", higher_is_better=False, base=Interval(1.5), full=full, lora=lora, kinds=kinds, kinds_seed=0
    )


NOTHING, WHOLE = (0.0, -0.1, 0.1), (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("shares", "answer"),
    [
        ({0: NOTHING, 8: (0.95, 0.91, 0.99), 64: WHOLE}, "yes"),  # 8 is an eighth of 64
        ({0: NOTHING, 8: (0.95, 0.89, 0.99), 64: WHOLE}, "undecided"),
        ({0: NOTHING, 8: (0.89, 0.80, 0.91), 64: WHOLE}, "undecided"),
        ({0: NOTHING, 8: (0.85, 0.80, 0.89), 16: (0.95, 0.91, 0.99), 64: WHOLE}, "no"),
        ({0: NOTHING, 64: WHOLE}, "no"),
        ({0: (0.95, 0.92, 0.98), 64: WHOLE}, "yes"),
    ],
)
def test_a_low_rank_is_enough_where_its_interval_is(shares: dict[int, Any], answer: str) -> None:
    full = cut(shares)
    verdict = verdicts(result(full))[0]
    assert verdict.answer == answer
    assert verdict.value == full.k90.rank
    assert "low up to 8, 0.125 of the smaller side 64" in verdict.sentence


def test_what_stops_an_answer_is_said() -> None:
    shares = {0: NOTHING, 4: (0.95, 0.92, 0.98), 64: WHOLE}
    assert verdicts(result(cut(shares)))[0].answer == "yes"
    off = verdicts(result(cut(shares, recorded=(1.0, 1.1))))[0]
    assert (off.answer, "0.1 off" in off.sentence) == ("undecided", True)
    alone = {k: (value, None, None) for k, (value, _, _) in shares.items()}
    one = verdicts(result(cut(alone, seeds=(0,))))[0]
    assert (one.answer, one.value, "One seed" in one.sentence) == ("undecided", 4, True)
    unsure = verdicts(result(cut(alone)))[0]
    assert (unsure.answer, "not told from zero" in unsure.sentence) == ("undecided", True)
    none = cut(shares)
    points = tuple(msgspec.structs.replace(point, share=None) for point in none.kept)
    none = cut(shares, gain=Interval(-0.1, -0.2, 0.0), kept=points, removed=points, k90=Reach(None, None, None))
    for verdict in verdicts(result(none)):
        assert (verdict.answer, verdict.value) == ("undecided", None)
        assert "no gain" in verdict.sentence


@pytest.mark.parametrize(("edge", "word"), [("low", "lowest"), ("high", "highest")])
def test_a_rate_at_the_edge_is_said(edge: Any, word: str) -> None:
    shares = {0: NOTHING, 4: (0.95, 0.92, 0.98), 64: WHOLE}
    assert word not in verdicts(result(cut(shares)))[0].sentence
    for verdict in verdicts(result(cut(shares, edge=edge), cut(shares, edge=edge))):
        assert f"is the {word} that was tried" in verdict.sentence
        assert verdict.answer == "undecided"


@pytest.mark.parametrize(
    ("shares", "answer"),
    [
        ({0: NOTHING, 4: (0.95, 0.91, 0.99), 8: WHOLE}, "yes"),  # half of the 8 it has, and far below the side of 64
        ({0: NOTHING, 4: (0.95, 0.89, 0.99), 8: WHOLE}, "undecided"),
        ({0: NOTHING, 4: (0.8, 0.7, 0.89), 8: WHOLE}, "no"),
        ({0: NOTHING, 8: WHOLE}, "no"),
    ],
)
def test_lora_is_held_to_the_rank_that_it_has(shares: dict[int, Any], answer: str) -> None:
    own = cut({**shares, 64: WHOLE}, name="LoRA r = 8", rank=8, limit=8)
    verdict = verdicts(result(cut({0: NOTHING, 64: WHOLE}), own))[2]
    assert verdict.answer == answer
    assert verdict.claim == "LoRA r = 8 needs at most half of its directions."
    assert "Half of what it has is 4" in verdict.sentence


@pytest.mark.parametrize(
    ("left", "answer"),
    [
        ((0.5, 0.4, 0.6), "yes"),
        ((0.95, 0.91, 0.99), "no"),
        ((0.85, 0.8, 0.95), "undecided"),
        ((0.5, None, None), "undecided"),
    ],
)
def test_directions_are_needed_where_the_rest_does_not_make_up_for_them(left: Any, answer: str) -> None:
    kept = cut({0: NOTHING, 4: (0.95, 0.92, 0.98), 64: WHOLE})
    removed = cut({0: WHOLE, 4: left, 8: NOTHING}).kept
    verdict = verdicts(result(cut({0: NOTHING, 4: (0.95, 0.92, 0.98), 64: WHOLE}, removed=removed)))[1]
    assert kept.k90.rank == 4
    assert (verdict.answer, verdict.value, verdict.low, verdict.high) == (answer, *left)
    assert "Without its top 4 directions" in verdict.sentence


def test_where_nothing_is_needed_nothing_is_removed() -> None:
    verdict = verdicts(result(cut({0: (0.95, 0.92, 0.98), 64: WHOLE})))[1]
    assert (verdict.answer, "No direction is needed" in verdict.sentence) == ("undecided", True)


# Pictures and page.


def test_the_figure_shows_every_curve_and_marks_enough(found: Truncation) -> None:
    figure = plot_truncation(found)
    figure.canvas.draw()
    left, right = figure.axes
    labels = [label.get_text() for label in left.get_xticklabels()]
    assert labels == ["0", "1", "2", "4", "8", "16", "32", "64"]
    lines = {tuple(np.round(line.get_ydata(), 9)) for line in left.lines if len(line.get_ydata()) > 2}
    for points in (found.full.kept, found.full.removed, found.lora.kept if found.lora else ()):
        assert tuple(round(point.score.value, 9) for point in points) in lines
    rings = [line.get_xdata()[0] for line in left.lines if line.get_markersize() == 11]
    assert rings == [4, 4]
    assert "lower is better" in left.get_ylabel()
    assert {label.get_text() for label in right.get_yticklabels()} == {"first × 1", "second × 1"}
    said = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"untouched base", "90% of its gain", "low: k up to 8", "LoRA r = 16: best rank k"} <= said


def test_the_section_has_the_numbers(found: Truncation) -> None:
    made = build_section(found, verdicts(found))
    (picture,) = made.pictures
    assert len(picture.data.rows) == 8 + 8 + 6
    assert all(len(row) == len(picture.data.header) for row in picture.data.rows)
    row = next(row for row in picture.data.rows if row[:3] == ("full fine-tuning", "best rank k", 4))
    assert row[3:] == (*found.full.kept[3].score, *share(found.full.kept, 4))
    assert f"{found.full.kept[3].score.value:.4g} at k = 4" in picture.alt
    (kinds,) = made.tables
    assert [row[0] for row in kinds.rows] == sorted(
        ("first", "second"), key=lambda kind: {p.kind: p.share for p in found.kinds if p.k == 0}[kind]
    )
    assert kinds.header == ("kind", "matrices", "k = 0", "k = 1", "k = 4", "k = 16")
    assert made.verdicts == verdicts(found)
