"""On a real CUDA GPU: the same numbers as on the CPU, no waits in a step, real memory running out. Skipped without one.

What the fake accelerator of ``test_device`` cannot show: autocast, device generators, streams, fused kernels, pinned
batches and the allocator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from both_devices import CPU, adapt, close, losses
from makers import MAKERS
from test_train_bank import MIXED, Notes, assert_equal_to_rounding, curve, sizes, small

from rankscope.analysis.comparison import compare
from rankscope.analysis.layer_spectra import spectrum
from rankscope.formats.store import open as open_store
from rankscope.formats.store import write_updates
from rankscope.spectra import Spectrum
from rankscope.subspace import Subspace, angles, overlap
from rankscope.surgery.resize import resize
from rankscope.surgery.truncate import Rank
from rankscope.train.config import StudyConfig, make_study_config
from rankscope.train.costs import peak_memory
from rankscope.train.events import Silent
from rankscope.train.loop import InterruptedTrainingError, RunGroup, set_precision
from rankscope.train.runs import plan_runs
from rankscope.train.session import Session
from rankscope.train.study import run_study
from rankscope.train.tasks import make_task

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")
FLOAT32 = 1e-5
DOCS = {"task": "docs", "batch": 4, "max_length": 64, "steps": 12, "evaluations": 0}


def docs(**changes: Any) -> StudyConfig:
    return make_study_config({**DOCS, "device": "cuda", **changes}, "test")


@contextmanager
def no_waits() -> Iterator[None]:
    """Within, torch raises where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Analysis


@pytest.mark.parametrize("name", MAKERS)
def test_spectra_and_subspaces_are_those_of_the_cpu(name: str) -> None:
    pair = [MAKERS[name].make(40, 28, seed) for seed in (0, 5)]
    there = [update.to(CUDA) for update in pair]
    exact = max(MAKERS[name].exact, 1e-12)
    for mine, other in zip(pair, there, strict=True):
        assert other.device.type == "cuda"
        assert close(Spectrum.of(mine).values, Spectrum.of(other).values, exact)
        assert mine.energy == pytest.approx(other.energy, rel=10 * exact)
    sides = [[Subspace.pair(update, 3) for update in updates] for updates in (pair, there)]
    for (a, b), (c, d) in zip(*(zip(*side, strict=True) for side in sides), strict=True):
        assert close(overlap(a, b), overlap(c, d), 100 * exact)
        assert close(angles(a, b), angles(c, d), 100 * exact)


def test_files_give_the_results_of_the_cpu(tmp_path: Path) -> None:
    bank, _ = adapt(CPU, move_first=True, count=1, select=0)
    bank.save(0, tmp_path / "adapter")
    write_updates(tmp_path / "update.safetensors", {n: update.dense() for n, update in bank.updates().items()})
    for path in (tmp_path / "adapter", tmp_path / "update.safetensors"):
        here, there = (spectrum(path, device=device) for device in ("cpu", "cuda"))
        for a, b in zip(here.layers, there.layers, strict=True):
            assert close(a.singular_values, b.singular_values, FLOAT32)
    one, two = (compare(tmp_path / "adapter", tmp_path / "update.safetensors", device=d) for d in ("cpu", "cuda"))
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a.cosine == pytest.approx(b.cosine, rel=FLOAT32)
    cut, other = (resize(tmp_path / "adapter", Rank(1), tmp_path / d, device=d) for d in ("cpu", "cuda"))
    assert other.total.error == pytest.approx(cut.total.error, rel=1e-9)
    for name in (a := open_store(tmp_path / "cpu")):
        assert close(a[name].dense(), open_store(tmp_path / "cuda")[name].dense(), FLOAT32)


# Adapters and training


@pytest.mark.parametrize("move_first", [True, False], ids=["moved, attached", "attached, moved"])
@pytest.mark.parametrize(("count", "select"), [(1, 0), (2, None), (2, 1)])
def test_adapters_learn_the_same(move_first: bool, count: int, select: int | None) -> None:
    here, expected = adapt(CPU, move_first, count, select)
    there, found = adapt(CUDA, move_first, count, select)
    assert close(expected, [loss.cpu() for loss in found], FLOAT32)
    for i in range(count):
        updates = there.updates(i)
        for name, update in here.updates(i).items():
            # Adam divides by √v, which enlarges the rounding of small gradients.
            assert close(update.dense(), updates[name].dense().cpu(), 1e-3), name


def test_runs_in_one_pass_are_what_they_are_alone(tmp_path: Path) -> None:
    together = run_study(small(**MIXED, tokens=10**9, device="cuda"), tmp_path / "together")
    alone = run_study(small(**MIXED, tokens=1, device="cuda"), tmp_path / "alone")
    assert max(sizes(together)) > 1 == max(sizes(alone))
    assert_equal_to_rounding(together, alone)


def test_the_decoder_learns_what_it_learns_on_the_cpu(tmp_path: Path) -> None:
    settings = {"ranks": (2, 8), "lrs": (3e-3,), "full_lrs": (1e-3,)}
    here = run_study(docs(**{**settings, "device": "cpu"}), tmp_path / "cpu")
    there = run_study(docs(**settings), tmp_path / "cuda")
    assert losses(there) == pytest.approx(losses(here), rel=1e-4)
    assert max(sizes(there)) == 2


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"checkpointing": True}, 1e-4),
        ({"compile": True}, 1e-3),
        ({"tf32": True}, 1e-2),
        ({"dtype": "bfloat16"}, 2e-2),
        ({"dtype": "float16"}, 2e-2),
    ],
    ids=["checkpointing", "compile", "tf32", "bfloat16", "float16"],
)
def test_other_arithmetic_stays_near(tmp_path: Path, changes: dict[str, Any], tolerance: float) -> None:
    settings = {"ranks": (4,), "lrs": (3e-3,), "full_lrs": (1e-3,)}
    plain = run_study(docs(**settings), tmp_path / "plain")
    other = run_study(docs(**settings, **changes), tmp_path / "other")
    assert len(other.done()) == 3
    for record in plain.done()[1:]:
        assert curve(other, record.run) == pytest.approx(curve(plain, record.run), rel=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "full", "subspace"])
def test_a_training_step_never_waits_for_the_device(tmp_path: Path, method: str, dtype: str) -> None:
    config = docs(methods=("lora", "subspace"), dims=(8,), ranks=(2, 4), lrs=(1e-3,), dtype=dtype, dropout=0.1)
    task = make_task(config)
    runs = [run for run in plan_runs(config, task) if run.method == method][: 2 if method == "lora" else 1]
    group = RunGroup(Session(task, config, tmp_path, CUDA), runs, {0: {"validation": {"loss": 1.0}}})
    with set_precision(CUDA, config):
        group.try_step()  # allocates, and picks kernels
        with no_waits():
            group.try_step()
            group.try_step()
    assert all(min(state.new_losses()) > 0 for state in group.states)


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_a_stopped_study_goes_on(tmp_path: Path, first: str) -> None:
    settings = {"ranks": (2, 3), "lrs": (3e-3,), "full_lrs": (1e-3,), "dropout": 0.1}
    whole = run_study(docs(**settings), tmp_path / "whole")
    asked = iter([False] * 5 + [True])
    with pytest.raises(InterruptedTrainingError):
        run_study(docs(**{**settings, "device": first}), tmp_path / "cut", Silent(), lambda: next(asked))
    assert list((tmp_path / "cut").glob("runs/*/state.pt"))
    assert losses(run_study(docs(**settings), tmp_path / "cut")) == pytest.approx(losses(whole), rel=1e-4)


def test_the_gpus_memory_decides_how_many_pass_together(tmp_path: Path) -> None:
    settings = {"ranks": (4,), "lrs": (1e-3, 3e-3, 1e-2), "seeds": (0, 1), "full": False}
    study = run_study(docs(**settings), tmp_path / "study")
    assert sizes(study) == {6}
    assert all(record.cost.peak_memory for record in study.done() if record.cost)


def test_memory_that_runs_out_halves_the_group(tmp_path: Path) -> None:
    settings = {"ranks": (4,), "lrs": (1e-3, 3e-3, 5e-3, 1e-2), "full": False, "batch": 16, "max_length": 128}
    alone = run_study(docs(**settings, tokens=1), tmp_path / "alone")
    one = max(record.cost.peak_memory for record in alone.done() if record.cost)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    # Room for two runs: what four take at once does not fit.
    torch.cuda.set_per_process_memory_fraction(2.6 * one / total)
    notes = Notes()
    try:
        study = run_study(docs(**settings, tokens=10**9), tmp_path / "halved", notes)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("out of memory with 4 runs in one pass" in text for text in notes.texts)
    assert max(sizes(study)) in (1, 2)
    assert len(study.done()) == 5
    for record in study.done()[1:]:
        assert curve(study, record.run) == pytest.approx(curve(alone, record.run), rel=1e-3)
    assert (peak_memory(CUDA) or 0) < 2.6 * one


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_of_transformers_with_its_dropout(tmp_path: Path, method: str) -> None:
    """Runs that share a pass draw from the device's stream what they draw alone."""
    hf = pytest.importorskip("test_train_hf")
    hf.save_bert(tmp_path / "bert")
    chosen = {"lora": {"ranks": (2, 3), "lrs": (1e-3, 3e-3), "full": False}, "full": {"ranks": (), "full_lrs": (1e-4,)}}
    more = {"steps": 6, "batch": 4, "evaluations": 0, "device": "cuda", **chosen[method]}
    together, alone = (
        run_study(hf.settings(tmp_path, tmp_path / "bert", tokens=tokens, **more), tmp_path / str(tokens))
        for tokens in (10**9, 1)
    )
    assert max(sizes(together)) == (4 if method == "lora" else 1)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)


def test_the_fake_accelerator_is_not_what_ran(tmp_path: Path) -> None:
    """The tests above would pass on a CPU too, were the setting lost on the way."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    study = run_study(small(ranks=(2,), device="cuda"), tmp_path / "study")
    assert torch.cuda.max_memory_allocated() > 0
    assert all(record.cost.peak_memory < 2**28 for record in study.done() if record.cost)
