"""Runs trained in one pass: each is what it would have been alone, whatever happens to the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rankscope.errors import ConfigError
from rankscope.formats.file_io import read_tensors
from rankscope.train.config import StudyConfig, make_study_config
from rankscope.train.events import Event, RunStarted, Silent, TrainingNote
from rankscope.train.loop import InterruptedTrainingError, RunGroup, set_precision
from rankscope.train.runs import Run
from rankscope.train.study import Study, run_study
from rankscope.train.sweep import Sweep

SMALL = {"task": "planted", "ranks": (1, 4), "full": False, "steps": 24, "batch": 16, "evaluations": 1, "dropout": 0.2}
MIXED = {
    "methods": ("lora", "rslora", "lora+", "frozen-a", "pissa"),
    "targets": ("first", "first,second"),
    "lrs": (0.003, 0.01),
    "seeds": (0, 5),
}
# Sums of float32 in another order, carried through 24 steps of AdamW, which divides by √v.
ROUNDING = 2e-4


def small(**changes: object) -> StudyConfig:
    return make_study_config({**SMALL, **changes}, "test")


def curve(study: Study, run: Run) -> list[float]:
    """The training loss of each step."""
    lines = (study.path(run) / "metrics.jsonl").read_text().splitlines()
    return [loss for line in lines for loss in json.loads(line).get("train_losses", [])]


def assert_equal_to_rounding(together: Study, alone: Study) -> None:
    assert [r.run for r in together.records] == [r.run for r in alone.records]
    for ours, theirs in zip(together.records, alone.records, strict=True):
        if ours.run.method == "base":
            continue
        assert ours.status == theirs.status
        if ours.status != "done":
            continue
        assert curve(together, ours.run) == pytest.approx(curve(alone, ours.run), rel=1e-5), ours.run.name
        mine, other = together.store(ours.run), alone.store(ours.run)
        assert list(mine) == list(other)
        for name in mine:
            a, b = mine[name].dense(), other[name].dense()
            assert float((a - b).norm()) <= ROUNDING * float(b.norm()), (ours.run.name, name)


def sizes(study: Study) -> set[int]:
    """How many runs were trained together."""
    return {record.cost.together for record in study.records if record.cost}


def test_runs_of_every_kind_in_one_pass_are_what_they_are_alone(tmp_path: Path) -> None:
    """Mixed methods, target sets, ranks, rates, seeds and initial factors, with dropout."""
    together = run_study(small(**MIXED, tokens=10**9), tmp_path / "together")
    alone = run_study(small(**MIXED, tokens=1), tmp_path / "alone")
    assert sizes(together) == {5 * 2 * 2 * 2 * 2}
    assert sizes(alone) == {1}
    assert len(together.done()) == 2 + 80
    assert_equal_to_rounding(together, alone)


def test_different_settings_give_different_curves(tmp_path: Path) -> None:
    """No two runs of the grid share data, factors and rate by accident."""
    study = run_study(small(**MIXED, tokens=10**9), tmp_path / "study")
    curves = {record.run.name: tuple(curve(study, record.run)) for record in study.records if record.run.lr}
    assert len(set(curves.values())) == len(curves) == 80
    assert all(len(losses) == 24 for losses in curves.values())


def test_accumulated_batches_are_the_same_together(tmp_path: Path) -> None:
    settings = {"accumulate": 3, "lrs": (0.003, 0.01)}
    together = run_study(small(**settings, tokens=10**9), tmp_path / "together")
    assert sizes(together) == {4}
    assert_equal_to_rounding(together, run_study(small(**settings, tokens=1), tmp_path / "alone"))


def test_a_run_that_diverges_leaves_and_does_not_touch_its_neighbours(tmp_path: Path) -> None:
    settings = {"lrs": (0.01, 1e30), "clip": 1e30, "warmup": 0.0, "evaluations": 3}
    together = run_study(small(**settings, tokens=10**9), tmp_path / "together")
    alone = run_study(small(**settings, tokens=1), tmp_path / "alone")
    status = {record.run.name: record.status for record in together.records}
    assert status["lora-r1-lr1e+30-s0"] == status["lora-r4-lr1e+30-s0"] == "diverged"
    assert status["lora-r1-lr0.01-s0"] == "done"
    assert_equal_to_rounding(together, alone)


@pytest.mark.parametrize(("first", "then"), [(10**9, 1), (1, 10**9), (10**9, 40)])
def test_a_stopped_run_goes_on_in_other_company(tmp_path: Path, first: int, then: int) -> None:
    """The state of a run is its own: it can be taken up alone, or among runs of larger rank."""
    settings = {**MIXED, "methods": ("lora", "pissa"), "targets": ("first,second",)}
    whole = run_study(small(**settings, tokens=1), tmp_path / "whole")
    asked = iter([False] * 9 + [True])
    with pytest.raises(InterruptedTrainingError):
        run_study(small(**settings, tokens=first), tmp_path / "cut", Silent(), lambda: next(asked))
    assert list((tmp_path / "cut").glob("runs/*/state.pt"))
    assert_equal_to_rounding(run_study(small(**settings, tokens=then), tmp_path / "cut"), whole)


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def tell(self, event: Event) -> None:
        if isinstance(event, TrainingNote):
            self.texts.append(event.text)


def test_out_of_memory_halves_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"lrs": (0.003, 0.01), "seeds": (0, 1)}
    alone = run_study(small(**settings, tokens=1), tmp_path / "alone")
    honest, sizes_tried = RunGroup._step, []

    def step(group: RunGroup) -> None:
        sizes_tried.append(len(group.states))
        if len(group.states) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        honest(group)

    monkeypatch.setattr(RunGroup, "_step", step)
    notes = Notes()
    together = run_study(small(**settings, tokens=10**9), tmp_path / "together", notes)
    assert list(dict.fromkeys(sizes_tried)) == [8, 4, 2]
    assert notes.texts == [
        "out of memory with 8 runs in one pass; going on with 4",
        "out of memory with 4 runs in one pass; going on with 2",
    ]
    assert_equal_to_rounding(together, alone)


def test_ranks_far_apart_do_not_share_a_pass(tmp_path: Path) -> None:
    """A rank-1 adapter padded to rank 64 would cost as much as that one."""
    study = run_study(small(ranks=(1, 2, 4, 8, 16, 64), steps=2, tokens=10**9), tmp_path / "study")
    assert [r.cost.together for r in study.records if r.cost] == [3, 3, 3, 2, 2, 1]


def test_the_budget_of_tokens_bounds_a_pass(tmp_path: Path) -> None:
    study = run_study(small(seeds=(0, 1), lrs=(0.001, 0.01), steps=2, tokens=3 * 16), tmp_path / "study")
    assert [r.cost.together for r in study.records if r.cost].count(3) == 6
    assert sizes(study) == {3, 2}


# The grid


def test_frozen_a_stays_as_it_was_drawn(tmp_path: Path) -> None:
    study = run_study(small(methods=("frozen-a", "lora"), tokens=10**9), tmp_path / "study")
    for record in study.done():
        if not record.run.is_lora:
            continue
        folder = study.path(record.run)
        before, after = (read_tensors(folder / part / "adapter_model.safetensors") for part in ("initial", "adapter"))
        key = "base_model.model.first.lora_A.weight"
        assert torch.equal(before[key], after[key]) == (record.run.method == "frozen-a")
        assert after[key.replace("_A", "_B")].norm() > 0
        whole = (64 + 96) * 2 * (record.run.rank or 0)
        assert record.cost is not None
        assert record.cost.trainable == (whole // 2 if record.run.method == "frozen-a" else whole)


def test_lora_plus_trains_b_at_a_multiple_of_the_rate(tmp_path: Path) -> None:
    """AdamW's first step moves every number by the rate, whatever its gradient."""
    settings = {"steps": 1, "warmup": 0.0, "schedule": "constant", "dropout": 0.0, "lrs": (0.001,), "ranks": (4,)}
    study = run_study(small(methods=("lora", "lora+"), lora_plus_ratio=8.0, **settings), tmp_path / "study")
    moved = {}
    for record in study.done()[1:]:
        after = read_tensors(study.path(record.run) / "adapter" / "adapter_model.safetensors")
        moved[record.run.method] = float(after["base_model.model.first.lora_B.weight"].abs().median())
    assert moved["lora"] == pytest.approx(0.001, rel=1e-3)
    assert moved["lora+"] == pytest.approx(0.008, rel=1e-3)


def test_pissa_starts_as_the_base_and_its_update_is_tuned_minus_base(tmp_path: Path) -> None:
    study = run_study(small(methods=("pissa",), steps=1, lrs=(1e-12,), dropout=0.0), tmp_path / "still")
    for record in study.done()[1:]:
        assert record.metrics["validation"] == pytest.approx(record.before["validation"], rel=1e-6)
        assert study.store(record.run)["first"].B.shape[1] == 2 * (record.run.rank or 0)


@pytest.mark.parametrize(
    ("alpha", "method", "rank", "expected"),
    [
        (None, "lora", 8, 16.0),
        (None, "rslora", 8, 16.0),
        (None, "rslora", 64, 16.0),
        ("2r", "lora", 64, 128.0),
        ("r", "lora", 4, 4.0),
        ("0.5r", "rslora", 4, 2.0),
        (16, "lora", 4, 16.0),
        ("32", "lora", 4, 32.0),
    ],
)
def test_alpha_follows_its_rule(tmp_path: Path, alpha: Any, method: str, rank: int, expected: float) -> None:
    from rankscope.train.runs import plan_runs
    from rankscope.train.tasks import make_task

    config = small(alpha=alpha, methods=(method,), ranks=(rank,))
    assert [run.alpha for run in plan_runs(config, make_task(config)) if run.is_lora] == [expected]


@pytest.mark.parametrize("alpha", ["x", "-2r", "0", -1.0, "2rr", ""])
def test_an_alpha_that_makes_no_sense_is_refused(alpha: Any) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        small(alpha=alpha)


def test_a_budget_gives_each_set_of_targets_its_rank(tmp_path: Path) -> None:
    """A rank of one matrix has 64 + 96 numbers here, of both 320."""
    study = run_study(small(targets=("first", "first,second"), budget=1280, steps=2), tmp_path / "study")
    found = {r.run.targets: (r.run.rank, r.cost.trainable) for r in study.records if r.run.is_lora and r.cost}
    assert found == {"first": (8, 1280), "first,second": (4, 1280)}


# Rates


class Rates(Silent):
    """Which rates were begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def tell(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.begun.append(event.run.name)


def test_the_best_rate_is_chosen_over_seeds_on_validation_and_edges_are_flagged(tmp_path: Path) -> None:
    study = run_study(small(ranks=(4,), lrs=(1e-5, 1e-4, 0.01), seeds=(0, 1), dropout=0.0), tmp_path / "study")
    choice = study.choices()["r = 4"]
    assert (choice.lr, choice.edge, choice.tried) == (0.01, "high", (1e-5, 1e-4, 0.01))
    assert [r.run.name for r in study.best() if r.run.lr] == ["lora-r4-lr0.01-s0", "lora-r4-lr0.01-s1"]
    again = run_study(small(ranks=(4,), lrs=(1e-5, 0.01, 10.0), seeds=(0, 1), dropout=0.0), tmp_path / "inside")
    assert again.choices()["r = 4"].edge is None


def test_the_choice_does_not_see_the_test_split(tmp_path: Path) -> None:
    study = run_study(small(ranks=(4,), lrs=(1e-5, 0.01)), tmp_path / "study")
    record = study.path(next(r.run for r in study.records if r.run.lr == 1e-5)) / "run.json"
    text = json.loads(record.read_text())
    text["metrics"]["test"]["loss"] = 0.0
    record.write_text(json.dumps(text))
    assert Study(tmp_path / "study").choices()["r = 4"].lr == 0.01


def test_a_rate_that_one_seed_diverged_at_is_not_the_best(tmp_path: Path) -> None:
    study = run_study(small(ranks=(4,), lrs=(1e-3, 0.01), seeds=(0, 1)), tmp_path / "study")
    record = study.path(next(r.run for r in study.records if r.run.lr == 0.01 and r.run.seed == 1)) / "run.json"
    text = json.loads(record.read_text())
    record.write_text(json.dumps({**text, "status": "diverged", "metrics": {}}))
    choice = Study(tmp_path / "study").choices()["r = 4"]
    assert (choice.lr, choice.edge) == (1e-3, "low")


def test_rates_are_extended_until_the_best_is_inside(tmp_path: Path) -> None:
    config = small(ranks=(4,), lrs=(1e-4, 1e-3), seeds=(0, 1), dropout=0.0, extend_lrs=True)
    study = run_study(config, tmp_path / "study")
    choice = study.choices()["r = 4"]
    assert choice.tried[:3] == (1e-4, 1e-3, 0.01)
    assert choice.edge is None or len(choice.tried) == 2 + 3
    assert all(sum(r.run.lr == lr for r in study.records) == 2 for lr in choice.tried)
    rates = Rates()
    assert run_study(config, tmp_path / "study", rates).choices()["r = 4"] == choice
    assert rates.begun == []


def test_halving_drops_the_worse_half_of_the_rates(tmp_path: Path) -> None:
    lrs = (1e-5, 1e-4, 1e-3, 0.01)
    whole = run_study(small(lrs=lrs, evaluations=2), tmp_path / "whole")
    halved = run_study(small(lrs=lrs, evaluations=2, halving=True), tmp_path / "halved")
    status = {record.run.lr: record.status for record in halved.records if record.run.rank == 4}
    assert status == {1e-5: "stopped", 1e-4: "stopped", 1e-3: "done", 0.01: "done"}
    assert {record.steps for record in halved.records if record.status == "stopped"} == {8}
    for label, choice in whole.choices().items():
        assert halved.choices()[label].lr == choice.lr
    by_name = {record.run.name: record for record in whole.records}
    for record in halved.done():
        other = by_name[record.run.name]
        assert record.metrics["test"]["loss"] == pytest.approx(other.metrics["test"]["loss"], rel=1e-4)


def test_halving_that_is_stopped_goes_on_to_the_same_answer(tmp_path: Path) -> None:
    settings = {"lrs": (1e-5, 1e-4, 1e-3, 0.01), "halving": True}
    whole = run_study(small(**settings), tmp_path / "whole")
    for after in (5, 14, 20):
        asked = iter([False] * after + [True])
        with pytest.raises(InterruptedTrainingError):
            run_study(small(**settings), tmp_path / str(after), Silent(), lambda asked=asked: next(asked))
        resumed = run_study(small(**settings), tmp_path / str(after))
        assert [(r.run.name, r.status) for r in resumed.records] == [(r.run.name, r.status) for r in whole.records]


def test_a_pass_is_not_begun_before_its_base_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base first, for each seed: its metrics are step 0 of every run."""
    seen: list[Sequence[str]] = []
    honest = Sweep._train_group

    def train(sweep: Sweep, group: list[Run], until: int | None) -> None:
        seen.append([run.name for run in group])
        honest(sweep, group, until)

    monkeypatch.setattr(Sweep, "_train_group", train)
    run_study(small(ranks=(1,), seeds=(0, 1), steps=2, tokens=10**9), tmp_path / "study")
    assert seen == [["base-s0"], ["base-s1"], ["lora-r1-lr0.01-s0", "lora-r1-lr0.01-s1"]]


# A model of others, with dropout and a head of its own


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT, with the dropout that BERT has."""
    hf = pytest.importorskip("test_train_hf")
    folder = tmp_path_factory.mktemp("bert")
    hf.save_bert(folder / "bert")
    return folder / "bert"


def classified(folder: Path, bert: Path, **changes: object) -> StudyConfig:
    hf = pytest.importorskip("test_train_hf")
    grid = {"ranks": (1, 4), "seeds": (0, 1), "lrs": (1e-3, 1e-2), "full": False, "dropout": 0.1}
    config: StudyConfig = hf.settings(folder, bert, **{**grid, "steps": 6, "batch": 4, "evaluations": 0, **changes})
    return config


def test_runs_on_a_base_with_dropout_and_a_new_head_are_what_they_are_alone(tmp_path: Path, bert: Path) -> None:
    together = run_study(classified(tmp_path, bert, tokens=10**9), tmp_path / "together")
    alone = run_study(classified(tmp_path, bert, tokens=1), tmp_path / "alone")
    assert sizes(together) == {4}  # the runs of a seed
    assert_equal_to_rounding(together, alone)
    for ours, theirs in zip(together.done(), alone.done(), strict=True):
        if ours.run.method == "base":
            continue
        mine, other = (
            read_tensors(study.path(record.run) / "adapter" / "adapter_model.safetensors")
            for study, record in ((together, ours), (alone, theirs))
        )
        heads = [name for name in mine if "classifier" in name]
        assert len(heads) == 2
        for name in heads:
            assert torch.allclose(mine[name], other[name], rtol=1e-3, atol=1e-6), name


def test_checkpointing_changes_nothing_but_the_memory(tmp_path: Path, bert: Path) -> None:
    kept = run_study(classified(tmp_path, bert, tokens=10**9), tmp_path / "kept")
    recomputed = run_study(classified(tmp_path, bert, tokens=10**9, checkpointing=True), tmp_path / "recomputed")
    assert_equal_to_rounding(recomputed, kept)


def test_biases_alone_and_the_head_alone(tmp_path: Path, bert: Path) -> None:
    config = classified(tmp_path, bert, methods=("bias", "head"), ranks=(1,), seeds=(0,))
    study = run_study(config, tmp_path / "study")
    found = {}
    for record in study.done()[1:]:
        found[record.run.method] = set(read_tensors(study.path(record.run) / "update.safetensors"))
    assert found["head"] == {"classifier", "classifier.bias"}
    assert found["head"] < found["bias"]
    assert all(name.endswith("bias") for name in found["bias"] - {"classifier"})
    assert len(found["bias"]) > 10


def test_a_head_where_there_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing of that kind"):
        run_study(small(methods=("lora", "head")), tmp_path / "study")
    assert not list((tmp_path / "study").glob("runs/*"))  # said before anything is trained


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32_and_not_it(tmp_path: Path, dtype: str) -> None:
    """float16 with loss scaling: a loss is scaled by 65536 before and its gradients unscaled after."""
    exact = run_study(small(dropout=0.0, tokens=10**9), tmp_path / "float32")
    coarse = run_study(small(dropout=0.0, dtype=dtype, tokens=10**9), tmp_path / dtype)
    for a, b in zip(exact.done()[1:], coarse.done()[1:], strict=True):
        assert exact.score(a) != coarse.score(b)
        assert exact.score(a) == pytest.approx(coarse.score(b), rel=0.02)


def test_an_overflow_in_float16_skips_the_step_of_its_own_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient too large for its scale is dropped and the scale halved; the neighbour's step is taken."""
    from rankscope.train.run_state import RunState

    honest, scales = RunState.step, {}

    def step(state: RunState) -> None:
        if state.run.rank == 4 and state.progress.step == 0:
            for weight in state.parameters.values():
                if weight.grad is not None:
                    weight.grad.fill_(float("inf"))
        before = {name: weight.clone() for name, weight in state.parameters.items()}
        honest(state)
        moved = any(not torch.equal(weight, before[name]) for name, weight in state.parameters.items())
        scales.setdefault(state.run.rank, []).append((moved, state.scaler.get_scale()))

    monkeypatch.setattr(RunState, "step", step)
    study = run_study(small(dropout=0.0, dtype="float16", steps=3, tokens=10**9), tmp_path / "study")
    assert scales[4][0] == (False, 32768.0)
    assert [moved for moved, _ in scales[4][1:]] == [True, True]
    assert scales[1] == [(True, 65536.0)] * 3
    assert all(record.status == "done" for record in study.records)


@pytest.mark.parametrize("wanted", [True, False])
def test_tf32_is_as_asked_for_on_cuda(wanted: bool) -> None:
    """The switches exist without a GPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    with set_precision(torch.device("cuda"), small(tf32=wanted)):
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == wanted
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_tf32_is_only_for_cuda(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only CUDA has it"):
        run_study(small(tf32=True), tmp_path / "study")
