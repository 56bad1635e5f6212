"""The training loop: schedules, determinism, stopping and going on, divergence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rankscope.errors import ConfigError, FormatError, TrainingError
from rankscope.train.config import StudyConfig, make_generator, make_study_config, read_study_config
from rankscope.train.events import Event, RunEvaluated, RunStarted, Silent, StepsTaken
from rankscope.train.loop import InterruptedTrainingError, evaluation_steps
from rankscope.train.methods import TrainableWeights
from rankscope.train.run_state import make_optimizer, schedule_factor
from rankscope.train.runs import Run, RunRecord, plan_runs
from rankscope.train.study import Study, run_study
from rankscope.train.task import epoch_indices
from rankscope.train.tasks import make_task

SMALL = {"task": "planted", "ranks": (1, 4), "steps": 30, "batch": 32, "evaluations": 2}


def small(**changes: object) -> StudyConfig:
    return make_study_config({**SMALL, **changes}, "test")


def tensors_of(study: Study) -> dict[str, torch.Tensor]:
    """Every number that a study's runs learned."""
    found = {}
    for record in study.done():
        if record.run.method != "base":
            store = study.store(record.run)
            found |= {f"{record.run.name} {name}": store[name].dense() for name in store}
    return found


def assert_same(a: Study, b: Study) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    assert len(left) > 0
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert [r.metrics for r in a.records] == [r.metrics for r in b.records]


class StopAfter(Silent):
    """Asks for a stop once ``count`` steps have been taken in all."""

    def __init__(self, count: int) -> None:
        self.left = count

    def tell(self, event: Event) -> None:
        self.left -= isinstance(event, StepsTaken)

    def __call__(self) -> bool:
        return self.left <= 0


class Curve(Silent):
    """Keeps the validation curve of each run, and where each began."""

    def __init__(self) -> None:
        self.lines: dict[str, list[tuple[int, float]]] = {}
        self.begun: dict[str, int] = {}

    def tell(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.begun[event.run.name] = event.at
        if isinstance(event, RunEvaluated):
            self.lines.setdefault(event.run.name, []).append((event.step, event.metrics["loss"]))


def test_schedule_is_the_closed_form() -> None:
    config = small(warmup=0.2, schedule="cosine")
    shares = [schedule_factor(step, 10, config) for step in range(10)]
    assert shares[:2] == pytest.approx([1 / 3, 2 / 3])
    assert shares[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])
    linear = [schedule_factor(step, 10, small(warmup=0.2, schedule="linear")) for step in range(2, 10)]
    assert linear == pytest.approx([1 - i / 8 for i in range(8)])
    assert schedule_factor(9, 10, small(warmup=0, schedule="constant")) == 1.0


def test_evaluations_are_before_during_and_after() -> None:
    assert evaluation_steps(100, 3) == {0, 25, 50, 75, 100}
    assert evaluation_steps(100, 0) == {0, 100}


def test_weight_decay_spares_vectors() -> None:
    weights = {"matrix": torch.nn.Parameter(torch.ones(2, 2)), "bias": torch.nn.Parameter(torch.ones(2))}
    run = Run(method="full", seed=0, lr=0.1)
    trained = TrainableWeights(make_task(small()), small(), [run])
    optimizer = make_optimizer(trained, 0, weights, run, small(weight_decay=0.5), torch.device("cpu"))
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.allclose(weights["matrix"], torch.full((2, 2), 1 - 0.1 * 0.5))
    assert torch.equal(weights["bias"], torch.ones(2))


@pytest.mark.parametrize("clip", [0.05, 0.3])
def test_a_step_is_that_of_plain_adamw(tmp_path: Path, clip: float) -> None:
    """The loop against the same training written out: batches, clipping, schedule, accumulation."""
    config = small(ranks=(), full_lrs=(0.01,), steps=5, accumulate=2, clip=clip, dropout=0.0, warmup=0.4)
    study = run_study(config, tmp_path / "study")
    task = make_task(config)
    model = task.model(0)
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=config.weight_decay)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.01 * schedule_factor(step, 5, config)
        batches = [task.batch(0, 2 * step + micro, 32) for micro in range(2)]
        joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        optimizer.zero_grad()
        loss = task.loss(task.outputs(model, joined), joined)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    path = study.path(study.done()[-1].run)
    assert json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])["train_loss"] == pytest.approx(
        sum(losses[3:]) / 2, rel=1e-5
    )
    store = study.store(study.done()[-1].run)
    base = task.model(0)
    for name in ("first", "second"):
        expected = model.get_submodule(name).weight - base.get_submodule(name).weight
        # float32 sums in another order; Adam divides by √v, which enlarges rounding of small gradients
        assert torch.allclose(store[name].dense(), expected, atol=2e-5)
        assert expected.norm() > 0.1


def test_the_same_settings_give_the_same_numbers(tmp_path: Path) -> None:
    a = run_study(small(dropout=0.1), tmp_path / "a")
    torch.rand(3)  # the global stream must not matter
    assert_same(a, run_study(small(dropout=0.1), tmp_path / "b"))


def test_seeds_and_ranks_start_apart() -> None:
    draws = [torch.rand(4, generator=make_generator(seed, "init", rank)) for seed in (0, 1) for rank in (4, 8)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert torch.equal(draws[0], torch.rand(4, generator=make_generator(0, "init", 4)))


def test_initial_factors_of_ranks_are_unrelated(tmp_path: Path) -> None:
    """The same-seed confound: A at rank 8 must not contain A at rank 4."""
    config = small(ranks=(4, 8), steps=2, full=False)
    study = run_study(config, tmp_path / "study")
    from rankscope.formats.file_io import read_tensors

    key = "base_model.model.first.lora_A.weight"
    a, b = (read_tensors(study.path(r.run) / "initial" / "adapter_model.safetensors")[key] for r in study.done()[1:])
    overlap = torch.linalg.svdvals(torch.linalg.qr(a.T)[0].T @ torch.linalg.qr(b.T)[0])
    # expected Σcos² = 4·8/96 = 1/3 with deviation .2; the confound would give 4
    assert float(overlap.square().sum()) < 1.5


@pytest.mark.parametrize("after", [1, 17, 30, 31, 44, 59])
def test_a_stopped_study_goes_on_to_the_same_numbers(tmp_path: Path, after: int) -> None:
    config = small(dropout=0.2)
    whole = run_study(config, tmp_path / "whole")
    stopper = StopAfter(after)
    with pytest.raises(InterruptedTrainingError):
        run_study(config, tmp_path / "cut", stopper, stopper)
    curve = Curve()
    resumed = run_study(config, tmp_path / "cut", curve)
    assert_same(whole, resumed)
    assert max(curve.begun.values()) > 0 or after % 30 == 0
    for record in whole.done()[1:]:
        lines = [
            [json.loads(line) for line in (study.path(record.run) / "metrics.jsonl").read_text().splitlines()]
            for study in (whole, resumed)
        ]
        for line in (*lines[0], *lines[1]):
            line.pop("seconds")
        assert lines[0] == lines[1]
    assert not list((tmp_path / "cut").glob("runs/*/state.pt"))


def test_a_finished_study_is_not_trained_again(tmp_path: Path) -> None:
    run_study(small(), tmp_path / "study")
    curve = Curve()
    run_study(small(), tmp_path / "study", curve)
    assert curve.begun == {}


def test_the_grid_may_grow(tmp_path: Path) -> None:
    run_study(small(ranks=(1,)), tmp_path / "study")
    curve = Curve()
    study = run_study(small(ranks=(1, 2), lrs=(0.01, 0.02)), tmp_path / "study", curve)
    assert set(curve.begun) == {"lora-r1-lr0.02-s0", "lora-r2-lr0.01-s0", "lora-r2-lr0.02-s0"}
    assert len(study.best()) == 4  # base, full, and one rate of each rank


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    run_study(small(), tmp_path / "study")
    with pytest.raises(ConfigError, match=r"weight_decay = 0\.01, not 0\.5"):
        run_study(small(weight_decay=0.5), tmp_path / "study")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is not a study"):
        run_study(small(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    study = run_study(small(lrs=(1e30, 0.01), clip=1e30, full=False, warmup=0.0), tmp_path / "study")
    status = {record.run.name: record.status for record in study.records}
    assert status["lora-r1-lr1e+30-s0"] == "diverged"
    assert status["lora-r1-lr0.01-s0"] == "done"
    assert {record.run.lr for record in study.best()} == {None, 0.01}


def test_a_damaged_state_is_one_sentence(tmp_path: Path) -> None:
    stopper = StopAfter(5)
    with pytest.raises(InterruptedTrainingError):
        run_study(small(), tmp_path / "study", stopper, stopper)
    state = next((tmp_path / "study").glob("runs/*/state.pt"))
    for damage in (b"", b"garbage", state.read_bytes()[:2000]):
        state.write_bytes(damage)
        with pytest.raises(FormatError, match="not the state of this run"):
            run_study(small(), tmp_path / "study")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "rankscope.run/1"}', '{"run": {"method": "magic"}}'])
def test_a_damaged_record_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(FormatError, match=r"run\.json"):
        RunRecord.read(tmp_path)


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    config = small(ranks=(1,), steps=2, full=False)
    leftover = tmp_path / "study" / "runs" / "lora-r1-lr0.01-s0" / ".state.pt.abc.tmp"
    run_study(config, tmp_path / "study")
    (leftover.parent / "run.json").unlink()
    leftover.write_bytes(b"half")
    run_study(config, tmp_path / "study")
    assert not leftover.exists()


def test_epochs_visit_every_example_once() -> None:
    seen = torch.cat([epoch_indices(3, index, 4, 10) for index in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_grid_order_and_names() -> None:
    config = small(seeds=(0, 1), lrs=(0.1, 0.2), full_lrs=(0.01,))
    runs = plan_runs(config, make_task(config))
    assert [run.name for run in runs[:4]] == ["base-s0", "base-s1", "lora-r1-lr0.1-s0", "lora-r1-lr0.2-s0"]
    assert len({run.name for run in runs}) == len(runs) == 2 + 2 * 2 * 2 + 2
    assert [run.alpha for run in runs if run.rank == 4] == [8.0] * 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": (0,)}, r"ranks = \(0,\): expected ranks of at least 1"),
        ({"ranks": (1, 1)}, "each value once"),
        ({"lrs": (-1.0,)}, "rates above 0"),
        ({"dropout": 1.0}, "a share from 0 up to 1"),
        ({"task": "classify"}, "needs --model"),
        ({"rank": 4}, "unknown field `rank`"),
        ({"batch": "many"}, "Expected `int"),
        ({"ranks": (), "full": False}, "at least one rank"),
        ({"seeds": ()}, "at least one seed"),
    ],
)
def test_bad_settings_are_one_sentence(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_study_config(values, "study.toml")


def test_options_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text('task = "planted"\nranks = [1, 2]\nsteps = 7\n')
    config = read_study_config(path, {"steps": 9})
    assert (config.task, config.ranks, config.steps) == ("planted", (1, 2), 9)
    path.write_text("ranks = [1,")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_study_config(path, {})


def test_bfloat16_is_near_float32_and_not_it(tmp_path: Path) -> None:
    exact = run_study(small(), tmp_path / "float32")
    coarse = run_study(small(dtype="bfloat16"), tmp_path / "bfloat16")
    for a, b in zip(exact.done()[1:], coarse.done()[1:], strict=True):
        assert exact.score(a) != coarse.score(b)
        assert exact.score(a) == pytest.approx(coarse.score(b), rel=0.02)  # bfloat16 keeps eight bits


def test_a_kill_at_the_very_start_or_end_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / ".study.json.abc.tmp").write_text("{")
    config = small(ranks=(1,), full=False, steps=2)
    study = run_study(config, folder)
    state = study.path(study.done()[-1].run) / "state.pt"
    state.write_bytes(b"left by a kill after run.json was written")
    run_study(config, folder)
    assert not state.exists()
    assert not list(folder.glob(".study.json.*"))


def test_who_made_a_study_is_kept_when_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(ranks=(1,), full=False, steps=2)
    run_study(config, tmp_path / "study")
    monkeypatch.setattr("rankscope.train.study.versions", lambda: {"torch": "99"})
    study = run_study(config, tmp_path / "study")
    assert study.description["versions"] == {"torch": "99"}
    assert study.description["earlier"][0]["versions"]["torch"] == torch.__version__


def test_rates_that_differ_late_are_runs_of_their_own() -> None:
    a, b = (Run(method="full", seed=0, lr=lr).name for lr in (0.01234567, 0.01234568))
    assert a != b


def test_running_out_of_memory_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for raised in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):

        def fail(*_: object, error: Exception = raised) -> None:
            raise error

        monkeypatch.setattr("rankscope.train.loop.RunGroup._step", fail)
        with pytest.raises(TrainingError, match="smaller --batch"):
            run_study(small(ranks=(1,), full=False, steps=2), tmp_path / "study")


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("study.json", "rankscope.study/2", "rankscope.study/99", "its schema is"),
        ("study.json", '"config": {', '"config": 3, "more": {', "expected settings by name"),
        ("runs/base-s0/run.json", "rankscope.run/1", "rankscope.run/99", "its schema is"),
        ("runs/base-s0/run.json", '"validation"', '"valid"', "lacks loss"),
        ("runs/base-s0/run.json", '"seed": 0', '"seed": 5', "give the folder that name back"),
    ],
)
def test_a_study_that_was_tampered_with_is_one_sentence(
    tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    run_study(small(ranks=(1,), full=False, steps=2), tmp_path / "study")
    path = tmp_path / "study" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises((FormatError, ConfigError), match=message):
        Study(tmp_path / "study")


def test_tied_weights_are_one_update(tmp_path: Path) -> None:
    from rankscope.train.planted import PlantedTask

    class Tied(PlantedTask):
        def model(self, seed: int) -> torch.nn.Module:
            model = super().model(seed)
            model.again = torch.nn.Linear(96, 64, bias=False)
            model.again.weight = model.get_submodule("first").weight  # type: ignore[assignment]
            return model

    trained = TrainableWeights(Tied(2, 0.1, 64), small(), [Run(method="full", seed=0, lr=0.1)])
    assert set(trained.updates()) == {"first", "second"}
