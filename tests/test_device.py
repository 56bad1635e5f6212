"""The package on an accelerator: the fake one of ``fake_device``, and shapes on torch's "meta" device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_device
import pytest
import torch
from both_devices import CPU, SPECS, adapt, close, fill, losses, next_token_loss, tiny, tokens
from fake_device import DEVICE, DeviceTensor, waits
from makers import MAKERS, generator, normal, planted_dense
from torch import Tensor, nn

from rankscope import linalg, subspace, updates
from rankscope.analysis import layer_comparison as pairs
from rankscope.analysis import worker_threads as analysis_workers
from rankscope.analysis.comparison import compare
from rankscope.analysis.layer_comparison import compare_layers
from rankscope.analysis.layer_spectra import spectrum
from rankscope.formats.file_io import read_tensors, write_json, write_tensors
from rankscope.formats.store import open as open_store
from rankscope.formats.store import write_updates
from rankscope.lora import AdapterSpec, Bank, load
from rankscope.spectra import Spectrum
from rankscope.subspace import Subspace, angles, chance, overlap
from rankscope.train.config import StudyConfig, resolve_device
from rankscope.train.events import Silent
from rankscope.train.llama import Llama, LlamaConfig
from rankscope.train.loop import InterruptedTrainingError, RunGroup, move_batch
from rankscope.train.runs import plan_runs
from rankscope.train.session import Session
from rankscope.train.study import run_study
from rankscope.train.tasks import make_task
from rankscope.updates import Dense, LowRank, Update

# The fake device computes with the CPU's kernels; only the order of sums may differ, with the layout of a tensor.
FLOAT64, FLOAT32 = 1e-12, 1e-5


@pytest.fixture(autouse=True)
def _accelerated() -> Iterator[None]:
    with fake_device.accelerated():
        yield


# Analysis


@pytest.mark.parametrize("name", MAKERS)
def test_spectra_and_subspaces_on_the_device(name: str) -> None:
    pair = [MAKERS[name].make(40, 28, seed) for seed in (0, 5)]
    there = [update.to("fake") for update in pair]
    assert all(isinstance(update.dense(), DeviceTensor) and update.device == DEVICE for update in there)
    exact = MAKERS[name].exact
    for mine, other in zip(pair, there, strict=True):
        a, b = Spectrum.of(mine), Spectrum.of(other)
        assert close(a.values, b.values, exact)
        assert a.measures() == pytest.approx(b.measures(), rel=10 * exact)  # squares of σ, and sums of them
        assert close(mine.T @ normal(40, 2), other.T @ normal(40, 2).to("fake"), FLOAT64)
        assert mine.energy == pytest.approx(other.energy, rel=FLOAT64)
    assert pair[0].inner(pair[1]) == pytest.approx(there[0].inner(there[1]), rel=1e-10)
    sides = [[Subspace.pair(update, 3) for update in updates] for updates in (pair, there)]
    for (a, b), (c, d) in zip(*(zip(*side, strict=True) for side in sides), strict=True):
        assert isinstance(c.basis, DeviceTensor)
        assert close(overlap(a, b), overlap(c, d), 10 * exact)
        assert close(angles(a, b), angles(c, d), 10 * exact)
        assert close(chance(overlap(a, b), a.dim).p, chance(overlap(c, d), c.dim).p, 100 * exact)


def test_stores_and_results_on_the_device(tmp_path: Path) -> None:
    bank = Bank.attach(tiny(CPU), SPECS[0], generator(1))
    fill(bank)
    bank.save(0, tmp_path / "adapter")
    write_updates(tmp_path / "update.safetensors", {n: update.dense() for n, update in bank.updates().items()})
    for path in (tmp_path / "adapter", tmp_path / "update.safetensors"):
        store = open_store(path, device="fake")
        assert {store[name].device for name in store} == {DEVICE}
        here, there = (spectrum(path, device=device) for device in ("cpu", "fake"))
        for a, b in zip(here.layers, there.layers, strict=True):
            assert close(a.singular_values, b.singular_values, FLOAT32)
    one, two = (compare(tmp_path / "adapter", tmp_path / "update.safetensors", device=d) for d in ("cpu", "fake"))
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a.left is not None
        assert b.left is not None
        assert close(a.left.overlap, b.left.overlap, FLOAT32)
        assert a.cosine == pytest.approx(b.cosine, rel=FLOAT32)


@pytest.mark.parametrize("r", [3, 24])
@pytest.mark.parametrize("workers", [1, 3])
def test_layers_of_one_shape_go_to_the_device_together(r: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them with factors that only a QR on the device serves."""
    together: list[int] = []
    square = analysis_workers.cache_gram_matrices
    monkeypatch.setattr(
        analysis_workers, "cache_gram_matrices", lambda updates: together.append(len(updates)) or square(updates)
    )

    def made(seed: int) -> dict[str, Update]:
        found: dict[str, Update] = {}
        for i in range(9):
            B = normal(120 if i % 2 else 90, r, seed=seed + i)
            B[:, 1] = B[:, 2] if i in (3, 4) else B[:, 1]
            found[f"layers.{i}"] = LowRank(B.bfloat16(), normal(r, 70, seed=seed + 20 + i).bfloat16(), -0.5)
        return found

    a, b = made(0), made(50)
    here, there = (spectrum(a, device=device, workers=workers) for device in ("cpu", "fake"))
    assert sorted(together) == [4, 5]  # one batch a shape
    assert [layer.name for layer in there.layers] == list(a)
    for mine, other in zip(here.layers, there.layers, strict=True):
        assert close(mine.singular_values, other.singular_values, FLOAT64)
        assert mine.measures == pytest.approx(other.measures, rel=1e-10)
        assert mine.measures["numerical_rank"] == other.measures["numerical_rank"]
    one, two = (compare(a, b, device=device, workers=workers) for device in ("cpu", "fake"))
    for left, right in zip(one.layers, two.layers, strict=True):
        for name, side in left.sides.items():
            assert close(side.overlap, right.sides[name].overlap, 1e-10)
            assert close(side.angles, right.sides[name].angles, 1e-9)
        assert left.inner == pytest.approx(right.inner, rel=1e-9, abs=1e-9)
        assert left.relative_difference == pytest.approx(right.relative_difference, rel=1e-10)


def test_a_checkpoint_against_its_base_on_the_device() -> None:
    base = normal(24, 16, dtype=torch.float32)
    tuned = (base + planted_dense((24, 16), [3.0, 1.0]).matrix).bfloat16()
    here, there = Dense.difference(tuned, base), Dense.difference(tuned.to("fake"), base.to("fake"))
    assert there.device == DEVICE
    assert close(here.matrix, there.matrix, 0)
    assert here.rounding == pytest.approx(there.rounding, rel=FLOAT64)


def test_a_device_without_float64_is_never_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Apple's GPUs: what needs float64 is done on the CPU."""
    check = fake_device.check

    def refuse(op: Any, args: Any, kwargs: Any) -> None:
        check(op, args, kwargs)
        on_device = [leaf for leaf in args if isinstance(leaf, DeviceTensor)]
        if on_device and torch.float64 in (kwargs.get("dtype"), *(tensor.dtype for tensor in on_device)):
            raise TypeError(f"{op}: the device has no float64")

    monkeypatch.setattr(fake_device, "check", refuse)
    for module in (linalg, updates, subspace, pairs):
        monkeypatch.setattr(module, "working_dtype", lambda device: torch.float32)
    with pytest.raises(TypeError, match="no float64"):
        torch.ones(2).to("fake").double()
    full = planted_dense((40, 28), [3.0, 2.0, 1.0])
    thin = LowRank(normal(40, 3, dtype=torch.float32), normal(3, 28, seed=1, dtype=torch.float32), 0.5)
    here = [full, thin, full * 0.5, thin * 2.0]
    there = [update.to("fake") for update in here]
    for a, b in zip(here, there, strict=True):
        assert close(Spectrum.of(a).values, Spectrum.of(b).values, FLOAT32)
    for of, i, j in (("update", 0, 1), ("update", 0, 2), ("update", 1, 3), ("A", 1, 3)):
        layer, other = (compare_layers("w", "w", x[i], x[j], None, of) for x in (here, there))
        for name, side in layer.sides.items():
            assert close(side.overlap, other.sides[name].overlap, FLOAT32)
        if layer.inner is not None:
            assert layer.inner == pytest.approx(other.inner, rel=1e-4)  # a sum of terms of either sign


def test_a_dora_adapter_on_the_device(tmp_path: Path) -> None:
    """Factors, magnitudes and base come from three places and meet on the device."""
    B, A, W = normal(12, 2), normal(2, 8, seed=1), normal(12, 8, seed=2)
    tensors = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": W.norm(dim=1) * 1.5}
    write_tensors(tmp_path / "base.safetensors", {"q.weight": W.float()})
    write_tensors(
        tmp_path / "adapter_model.safetensors", {f"base_model.model.q.{k}": v.float() for k, v in tensors.items()}
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": True, "target_modules": ["q"]}
    write_json(tmp_path / "adapter_config.json", config)
    here, there = (
        open_store(tmp_path, base=tmp_path / "base.safetensors", device=device) for device in ("cpu", "fake")
    )
    assert here.info("q:whole").method == "dora"
    for name in ("q", "q:whole"):
        assert there[name].device == there.weight(name).device == DEVICE
        assert close(here[name].dense(), there[name].dense(), FLOAT32)
        assert close(here.weight(name), there.weight(name), 0)


# Adapters


@pytest.mark.parametrize("move_first", [True, False], ids=["moved, attached", "attached, moved"])
@pytest.mark.parametrize(("count", "select"), [(1, 0), (2, None), (2, 1)])
def test_adapters_learn_the_same_on_the_device(move_first: bool, count: int, select: int | None) -> None:
    here, expected = adapt(CPU, move_first, count, select)
    there, losses = adapt(DEVICE, move_first, count, select)
    assert {p.device for p in there.model.parameters()} == {DEVICE}
    assert close(expected, [loss.cpu() for loss in losses], FLOAT32)
    assert float(losses[0]) != float(losses[-1])
    for i in range(count):
        updates = there.updates(i)
        for name, update in here.updates(i).items():
            assert updates[name].device == DEVICE
            # Adam divides by √v, which enlarges the rounding of small gradients.
            assert close(update.dense(), updates[name].dense(), 1e-3), name


def test_merged_adapters_on_the_device(tmp_path: Path) -> None:
    model = tiny(DEVICE).eval()
    bank = Bank.attach(model, SPECS, [generator(0), generator(1)])
    fill(bank)
    weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
    x = tokens(DEVICE)
    for i, put in enumerate((bank.merge, bank.switch)):
        apart = on_cpu_after_load(bank, i, tmp_path / str(i))
        put(i)
        assert close(apart, model(x), FLOAT32)
    bank.unmerge()
    assert all(torch.equal(weights[name], weight.cpu()) for name, weight in model.state_dict().items())
    base = tiny(CPU)
    assert close(base(tokens(CPU)), bank.detach()(x), FLOAT32)


def on_cpu_after_load(bank: Bank, i: int, folder: Path) -> Tensor:
    """Save an adapter from the device, load it on the CPU and on the device, and run it on both."""
    bank.save(i, folder)
    here, there = tiny(CPU).eval(), tiny(DEVICE).eval()
    load(here, folder)
    load(there, folder)
    result: Tensor = here(tokens(CPU)).detach()
    assert close(result, there(tokens(DEVICE)), FLOAT32)
    return result


def test_biases_and_heads_go_along_to_the_device(tmp_path: Path) -> None:
    """What is trained whole is found, trained and saved after the move."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    spec = AdapterSpec(rank=2, alpha=2, targets=("0", "1"), bias="lora_only", modules_to_save=("2",))
    bank = Bank.attach(model, spec, generator())
    model.to(DEVICE)
    weights = bank.trainable_parameters()
    assert {weight.device for weight in weights} == {DEVICE}
    before = bank.biases["0"].detach().cpu()
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    model(normal(7, 6, dtype=torch.float32).to(DEVICE)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, bank.biases["0"].cpu())
    bank.save(0, tmp_path)
    saved = read_tensors(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.0.base_layer.bias"], bank.biases["0"].cpu())
    assert torch.equal(saved["base_model.model.2.weight"], model[2].weight.cpu())


# Training

STEPS = 8


def settings(device: str, **changes: Any) -> StudyConfig:
    planted = {"task": "planted", "ranks": (3,), "steps": STEPS, "batch": 16, "evaluations": 2, "dropout": 0.1}
    return StudyConfig(**{**planted, **changes, "device": device})


def test_training_on_the_device_gives_the_losses_of_the_cpu(tmp_path: Path) -> None:
    assert resolve_device("fake").type == DEVICE.type
    here, there = (run_study(settings(device), tmp_path / device) for device in ("cpu", "fake"))
    assert [record.run.method for record in there.done()] == ["base", "lora", "full"]
    assert len(losses(here)) == 2 * (2 + 1 + 1 + 2 + 3)
    assert losses(there) == pytest.approx(losses(here), rel=FLOAT32)
    for record in here.done()[1:]:
        a, b = here.store(record.run), there.store(record.run)
        assert all(close(a[name].dense(), b[name].dense(), 1e-3) for name in a)


@pytest.mark.parametrize("after", [3, STEPS + 5])
@pytest.mark.parametrize("first", ["cpu", "fake"])
def test_a_study_stopped_on_one_device_goes_on_on_another(tmp_path: Path, after: int, first: str) -> None:
    whole = run_study(settings("fake"), tmp_path / "whole")
    asked = iter([False] * after + [True])
    with pytest.raises(InterruptedTrainingError):
        run_study(settings(first), tmp_path / "cut", Silent(), lambda: next(asked))
    assert list((tmp_path / "cut").glob("runs/*/state.pt"))
    resumed = run_study(settings("fake"), tmp_path / "cut")
    assert losses(resumed) == pytest.approx(losses(whole), rel=0 if first == "fake" else FLOAT32)


def looped(folder: Path, task: str = "planted", method: str = "lora", **changes: Any) -> RunGroup:
    """A run on the device, ready to step."""
    config = settings("fake", task=task, methods=("lora", "subspace"), dims=(8,), **changes)
    made = make_task(config)
    run = next(run for run in plan_runs(config, made) if run.method == method)
    return RunGroup(Session(made, config, folder, DEVICE), [run], {run.seed: {"validation": {"loss": 1.0}}})


@pytest.mark.parametrize("method", ["lora", "full", "subspace"])
@pytest.mark.parametrize(
    ("task", "changes"),
    [("planted", {}), ("planted", {"accumulate": 2, "dropout": 0.0}), ("docs", {"max_length": 16, "batch": 2})],
    ids=["planted", "accumulating", "docs"],
)
def test_a_training_step_never_waits_for_the_device(
    tmp_path: Path, task: str, method: str, changes: dict[str, Any]
) -> None:
    loop = looped(tmp_path, task, method, **changes)
    with waits() as noted:
        loop._step()
        loop._step()
    assert noted == []
    assert loop.states[0].progress.step == 2
    assert min(loop.states[0].new_losses()) > 0


def test_a_step_after_a_resumption_does_not_wait_either(tmp_path: Path) -> None:
    """The optimizer's count of steps stays with the host, which reads it."""
    loop = looped(tmp_path)
    loop._step()
    loop._save_states()
    again = looped(tmp_path)
    assert again.states[0].resume()
    assert {weight.device for weight in again.states[0].parameters.values()} == {DEVICE}
    with waits() as noted:
        again._step()
    assert noted == []


def test_a_wait_in_a_step_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = looped(tmp_path)
    honest = loop.task.loss

    def reading(outputs: Tensor, batch: Any) -> Tensor:
        loss = honest(outputs, batch)
        assert float(loss.detach()) > 0
        return loss

    monkeypatch.setattr(loop.task, "loss", reading)
    with waits() as noted:
        loop._step()
    assert noted == ["aten._local_scalar_dense.default"]


@pytest.mark.parametrize("method", ["lora", "full", "subspace"])
def test_a_model_of_transformers_on_the_device(tmp_path: Path, method: str) -> None:
    """Classification: padded batches, a new head and the model's own dropout go along."""
    hf = pytest.importorskip("test_train_hf")
    hf.save_bert(tmp_path / "bert")
    grids = {
        "lora": {"ranks": (2,), "full": False},
        "subspace": {"methods": ("subspace",), "dims": (8,), "full": False},
        "full": {"ranks": ()},
    }
    more = {"steps": 3, "batch": 4, "evaluations": 0, **grids[method]}
    here, there = (
        run_study(hf.settings(tmp_path, tmp_path / "bert", device=device, **more), tmp_path / device)
        for device in ("cpu", "fake")
    )
    assert len(there.done()) == 1 + 3
    assert losses(there) == pytest.approx(losses(here), rel=FLOAT32)


def test_batches_wait_for_apple_gpus_alone() -> None:
    """There a copy that does not wait can read memory that has been freed meanwhile."""
    asked = []

    class Batch:
        def pin_memory(self) -> Batch:
            asked.append(("pinned", True))
            return self

        def to(self, device: torch.device, non_blocking: bool) -> None:
            asked.append((device.type, non_blocking))

    for name in ("cuda", "mps"):
        move_batch({"x": Batch()}, torch.device(name))
    assert asked == [("pinned", True), ("cuda", True), ("mps", False)]


# Shapes


@pytest.mark.parametrize("select", [0, None])
def test_the_embedded_decoder_with_a_bank_on_the_meta_device(select: int | None) -> None:
    """Full size, no memory: forward, backward and AdamW agree on shapes and stay on one device."""
    meta = torch.device("meta")
    with meta:
        model = Llama(LlamaConfig())
    bank = Bank.attach(model, SPECS, [generator(0), generator(1)])
    bank.select(select)
    optimizer = torch.optim.AdamW(bank.trainable_parameters(), lr=1e-2)
    x = torch.zeros(4, 128, dtype=torch.long, device=meta)
    logits = model.train()(x)
    assert (logits.shape, logits.device) == ((4, 128, 256), meta)
    next_token_loss(model, x).backward()
    layers = [layer for layer in bank.layers.values() if select is None or layer.slots[select].rank]
    weights = [weight for layer in layers for weight in (layer.A, layer.B)]
    assert len(weights) == 2 * (4 * 7 + 1 if select is None else 4 * 2 + 1)
    for weight in weights:
        assert weight.grad is not None
        assert (weight.grad.shape, weight.grad.device) == (weight.shape, meta)
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values() if value.ndim]
    assert {value.device for value in state} == {meta}
    assert sum(value.numel() for value in state) == 2 * sum(weight.numel() for weight in weights)
