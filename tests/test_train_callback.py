"""RankCallback in real runs of transformers' Trainer; values against numpy on PEFT's own dense updates."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rankscope
from rankscope import AdapterSpec, Bank, RankCallback, Spectrum
from rankscope.errors import ConfigError, RankscopeError
from rankscope.formats.file_io import read_tensors
from rankscope.subspace import chance
from rankscope.train.callback import INITIAL_NAME
from rankscope.train.tracked_weights import (
    TrackedAdapter,
    TrackedFullWeight,
    find_tracked_weights,
    measure_update,
    strip_wrappers,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT uses transformers' old name
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
]
MEASURES = ("stable", "entropy", "k90", "overlap_init", "overlap_init_chance")
SMALL: dict[str, Any] = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="rankscope")
    return caplog


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, intermediate_size=24))


def lora(model: Any = None, **settings: Any) -> Any:
    """PEFT's LoRA of rank 4 on q and v of the tiny Llama."""
    model = llama() if model is None else model
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def rows(n: int = 32) -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 48, (n, 8), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_of(model: Any, folder: Path, callbacks: Sequence[Any], **settings: Any) -> Any:
    settings = {
        "max_steps": 4, "logging_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, **settings,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **settings)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows(), callbacks=list(callbacks))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train(model: Any, folder: Path, *callbacks: Any, resume: bool = False, **settings: Any) -> list[dict[str, Any]]:
    """The lines of the training log."""
    trainer = trainer_of(model, folder, callbacks, **settings)
    trainer.train(resume_from_checkpoint=resume or None)
    return [line for line in trainer.state.log_history if "loss" in line]


class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
    """A reporter: keeps what it is given, when it is given."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append(dict(logs))


def ranks(dense: np.ndarray[Any, Any]) -> dict[str, float]:
    """Stable rank, entropy rank and k90 from numpy's SVD of a whole matrix."""
    s = np.linalg.svd(dense.astype(np.float64), compute_uv=False)
    s = s[s > 1e-6 * s[0]]  # float32 factors multiplied out leave 1e-8·σ₁ behind the true rank
    p, energy = s / s.sum(), np.cumsum(s**2) / (s**2).sum()
    return {
        "stable": float((s**2).sum() / s[0] ** 2),
        "entropy": float(np.exp(-(p * np.log(p)).sum())),
        "k90": float(1 + np.argmax(energy >= 0.9)),
    }


def phi(dense: np.ndarray[Any, Any], span: np.ndarray[Any, Any], k: int) -> float:
    """Overlap of the top k right singular vectors of a matrix with the span of some columns (in, j)."""
    V = np.linalg.svd(dense.astype(np.float64))[2][:k].T
    Q = np.linalg.qr(span.astype(np.float64))[0]
    return float(((V.T @ Q) ** 2).sum() / min(k, Q.shape[1]))


def delta(module: Any, adapter: str = "default") -> np.ndarray[Any, Any]:
    """PEFT's own dense update of a layer, flattened to (out, in)."""
    weight: Tensor = module.get_delta_weight(adapter).detach().flatten(1)
    return weight.numpy()


def peft_layers(model: Any) -> dict[str, Any]:
    """Its LoRA layers by the path within the base model."""
    named = model.base_model.model.named_modules()
    return {name: module for name, module in named if isinstance(module, peft.tuners.lora.LoraLayer)}


def initial_rows(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A of every linear layer, transposed and copied."""
    return {name: m.lora_A["default"].weight.detach().numpy().T.copy() for name, m in peft_layers(model).items()}


# Values


@pytest.mark.parametrize("k", [2, 8])
def test_lora_in_a_real_run(tmp_path: Path, k: int) -> None:
    model, reporter = lora(), Recorder()
    before = initial_rows(model)
    lines = train(model, tmp_path, reporter, RankCallback(k=k))
    assert [line["step"] for line in lines] == [2, 4]
    model.save_pretrained(tmp_path / "saved")
    store, found = rankscope.open(tmp_path / "saved"), peft_layers(model)
    assert set(store) == set(found)
    assert len(found) == 4
    dense = {name: delta(module) for name, module in found.items()}
    for name in found:
        spectrum, line = Spectrum.of(store[name]), {m: lines[-1][f"rank/{m}/{name}"] for m in MEASURES}
        # The same factors in float64; what the file holds is what the model holds.
        assert line["stable"] == pytest.approx(spectrum.stable_rank, rel=1e-12)
        assert line["entropy"] == pytest.approx(spectrum.entropy_rank, rel=1e-12)
        assert line["k90"] == spectrum.k90
        # numpy's SVD of the float32 product: 1e-7 of σ₁ on each of the few values.
        expected = ranks(dense[name]) | {"overlap_init": phi(dense[name], before[name], min(k, 4))}
        assert {m: line[m] for m in expected} == pytest.approx(expected, rel=1e-5)
        assert line["overlap_init_chance"] == chance(np.ones((min(k, 4), 4)), 16).expected[-1, -1]
    for measured in MEASURES:
        values = [lines[-1][f"rank/{measured}/{name}"] for name in found]
        assert lines[-1][f"rank/median/{measured}"] == np.median(values)
    # A reporter that stands in front of it is shown the same numbers.
    shown = [{k: v for k, v in line.items() if k.startswith("rank/")} for line in reporter.lines if "loss" in line]
    assert shown == [{k: v for k, v in line.items() if k.startswith("rank/")} for line in lines]
    assert not any(key.startswith("rank/") for line in reporter.lines if "loss" not in line for key in line)
    assert all(type(value) is float for line in shown for value in line.values())
    json.dumps(lines, allow_nan=False)


def test_full_fine_tuning(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    model = llama()
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    lines = train(model, tmp_path, RankCallback(k=3))
    matrices = [name.removesuffix(".weight") for name, p in start.items() if p.ndim == 2]
    assert len(matrices) == 16
    for name in matrices:
        W0 = start[f"{name}.weight"]
        update = model.get_parameter(f"{name}.weight").detach().numpy() - W0
        # float32 singular values err by 1e-7·σ₁; the vectors by that over gaps of some percent.
        expected = ranks(update) | {
            "overlap_init": phi(update, np.linalg.svd(W0)[2][:3].T, 3),
            "overlap_init_chance": 3 / W0.shape[1],
        }
        assert {m: lines[-1][f"rank/{m}/{name}"] for m in MEASURES} == pytest.approx(expected, rel=2e-3)
    norms = [message for message in said.messages if "left out" in message]
    assert len(norms) == 1
    assert "5 (one-dimensional: no spectrum; first model.layers.0.input_layernorm)" in norms[0]
    # Nothing is saved here, so no resumed run will ask for a copy of the weights.
    assert read_tensors(tmp_path / INITIAL_NAME) == {}


class Mixed(nn.Module):
    """One module of each kind that PEFT's LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.linear = nn.Linear(6, 10)
        self.turned = transformers.pytorch_utils.Conv1D(8, 10)
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.series = nn.Conv1d(4, 6, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.turned(self.linear(self.embed(x))))
        return out


KINDS = ["embed", "linear", "turned", "conv", "grouped", "series"]


def moved(model: nn.Module, seed: int = 3) -> nn.Module:
    """Every trained parameter a step away."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=source)
    return model


def watched(model: nn.Module) -> dict[str, Any]:
    return {layer.name: layer for layer in find_tracked_weights(model).layers}


def dense_of(layer: Any) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = layer.update().dense().numpy()
    return array


@pytest.mark.parametrize("rslora", [False, True])
def test_every_kind_of_layer(rslora: bool) -> None:
    model = lora(Mixed(), target_modules=KINDS, use_rslora=rslora, modules_to_save=["head"])
    layers = watched(model)
    assert set(layers) == {*KINDS, "head"}
    assert [type(layers[name]) for name in ("linear", "head")] == [TrackedAdapter, TrackedFullWeight]
    for layer in layers.values():
        layer.remember()
        assert measure_update(layer, 2) == {}  # nothing has moved
    head = model.get_parameter("base_model.model.head.modules_to_save.default.weight").detach().numpy().copy()
    moved(model)
    for name, module in peft_layers(model).items():
        if name == "grouped":  # PEFT's dense form needs a kernel that it cannot make
            continue
        # PEFT keeps the update of a Conv1D in the layout of its weight (in, out).
        dense = delta(module).T if name == "turned" else delta(module)
        np.testing.assert_allclose(dense_of(layers[name]), dense, rtol=1e-5, atol=1e-5)
        found = measure_update(layers[name], 2)
        assert {m: found[m] for m in ("stable", "entropy", "k90")} == pytest.approx(ranks(dense), rel=1e-4)
    saved = model.get_parameter("base_model.model.head.modules_to_save.default.weight").detach().numpy()
    np.testing.assert_allclose(dense_of(layers["head"]), saved - head, rtol=1e-6)


def test_a_grouped_convolution_does_what_its_update_says() -> None:
    model = lora(Mixed(), target_modules=["grouped"])
    layer = watched(moved(model))["grouped"]
    module = peft_layers(model)["grouped"]
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(5))
    added = module(x) - module.base_layer(x)
    kernel = layer.update().dense().view(6, 4, 3, 3)
    torch.testing.assert_close(nn.functional.conv2d(x, kernel), added, rtol=1e-4, atol=1e-4)


def test_an_embedding_is_compared_with_its_random_side() -> None:
    """PEFT starts an embedding's A at zero and B at random; the update (BA)ᵀ has the rows of Bᵀ for its right side."""
    model = lora(Mixed(), target_modules=["embed"])
    layer, module = watched(model)["embed"], peft_layers(model)["embed"]
    B0 = module.lora_embedding_B["default"].detach().numpy().copy()
    layer.remember()
    moved(model)
    assert measure_update(layer, 2)["overlap_init"] == pytest.approx(phi(delta(module), B0, 2), rel=1e-5)


def test_a_conv1d_trained_whole_is_read_as_out_by_in() -> None:
    layer = watched(model := Mixed())["turned"]
    layer.remember()
    start = layer.weight.detach().numpy().T.copy()
    moved(model)
    update = layer.weight.detach().numpy().T - start
    assert layer.update().shape == (8, 10)
    assert measure_update(layer, 2)["overlap_init"] == pytest.approx(
        phi(update, np.linalg.svd(start)[2][:2].T, 2), rel=1e-4
    )


def test_dora_is_measured_without_its_magnitude() -> None:
    model = lora(use_dora=True)
    layers = watched(moved(model))
    for name, module in peft_layers(model).items():
        A, B = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
        np.testing.assert_allclose(dense_of(layers[name]), 2 * (B @ A).numpy(), rtol=1e-5, atol=1e-6)
    assert not find_tracked_weights(model).left_out


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_does_not_start_at_zero(init: str) -> None:
    """s(BA − B0A0): what training changed, and not the part of the weight that it started from."""
    model = lora(init_lora_weights=init)
    before = {name: delta(module) for name, module in peft_layers(model).items()}
    rows_before = initial_rows(model)
    layers = watched(model)
    for layer in layers.values():
        assert set(layer.remember()) == {f"{layer.name}.A", f"{layer.name}.B"}
        assert measure_update(layer, 8) == {}
    moved(model)
    for name, module in peft_layers(model).items():
        change = delta(module) - before[name]
        found = measure_update(layers[name], 8)
        assert {m: found[m] for m in ("stable", "entropy", "k90")} == pytest.approx(ranks(change), rel=1e-4)
        assert found["overlap_init"] == pytest.approx(phi(change, rows_before[name], 8), rel=1e-4)


def test_several_adapters() -> None:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    assert len(watched(moved(model))) == 4  # the active one alone
    model.set_adapter("other")
    moved(model, seed=7)
    layers, modules = watched(model), peft_layers(model)
    assert set(layers) == {name for name in modules if name.endswith("q_proj")}
    for name, layer in layers.items():
        np.testing.assert_allclose(dense_of(layer), delta(modules[name], "other"), rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    for name, layer in watched(model).items():
        total = sum(delta(modules[name], a) for a in ("default", "other") if a in modules[name].lora_A)
        np.testing.assert_allclose(dense_of(layer), total, rtol=1e-4, atol=1e-5)


# A bank of our own


def bank_of(model: nn.Module, n: int = 1, init: str = "kaiming") -> Bank:
    specs = [AdapterSpec(rank=3 + i, alpha=6, targets=["q_proj"], init=init) for i in range(n)]  # type: ignore[arg-type]
    return Bank.attach(model, specs, [torch.Generator().manual_seed(i) for i in range(n)])


def test_a_bank_in_a_real_run(tmp_path: Path) -> None:
    bank = bank_of(model := llama())
    before = {name: A.numpy().T for name, (A, _) in bank.factors(0).items()}
    lines = train(model, tmp_path, RankCallback())
    for name, update in bank.updates(0).items():
        expected = Spectrum.of(update)
        assert lines[-1][f"rank/entropy/{name}"] == pytest.approx(expected.entropy_rank, rel=1e-12)
        overlap = phi(update.dense().numpy(), before[name], 3)
        assert lines[-1][f"rank/overlap_init/{name}"] == pytest.approx(overlap, rel=1e-5)
    assert len({key for key in lines[-1] if key.startswith("rank/stable/")}) == 2


def test_a_bank_of_several_adapters_and_pissa() -> None:
    bank = bank_of(model := llama(), 2, "pissa")
    bank.select(None)
    layers = watched(model)
    assert set(layers) == {f"model.layers.{i}.self_attn.q_proj.{j}" for i in range(2) for j in range(2)}
    for layer in layers.values():
        layer.remember()
    moved(model)
    for j in range(2):
        for name, update in bank.updates(j).items():
            np.testing.assert_allclose(dense_of(layers[f"{name}.{j}"]), update.dense(), rtol=1e-4, atol=1e-5)
    bank.select(1)
    assert set(watched(model)) == set(bank.updates(1))


# Training is not touched


def test_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for name, callbacks in {"with": [RankCallback(every=1)], "without": []}.items():
        model = lora(lora_dropout=0.2)
        lines = train(model, tmp_path / name, *callbacks, logging_steps=1)
        losses = [(line["loss"], line["grad_norm"]) for line in lines]
        ends.append((losses, copy.deepcopy(model.state_dict()), torch.get_rng_state()))
    (losses, weights, stream), (other_losses, other_weights, other_stream) = ends
    assert len(losses) == 4
    assert losses == other_losses
    assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
    assert torch.equal(stream, other_stream)


def test_every(tmp_path: Path) -> None:
    lines = train(lora(), tmp_path, RankCallback(every=3, per_layer=False), max_steps=7, logging_steps=2)
    measured = [line["step"] for line in lines if "rank/median/stable" in line]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert measured == [3, 6]


def test_layers_and_medians(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    lines = train(llama(), tmp_path / "a", RankCallback(layers=["*.1.*.q_proj"]), max_steps=2)
    keys = {key for key in lines[-1] if key.startswith("rank/")}
    name = "model.layers.1.self_attn.q_proj"
    expected = {f"rank/{m}/{name}" for m in MEASURES} | {f"rank/median/{m}" for m in MEASURES}
    assert keys == expected | {"rank/share_of_time"}
    lines = train(lora(), tmp_path / "b", RankCallback(layers="q_proj", per_layer=False), max_steps=2)
    keys = {key for key in lines[-1] if key.startswith("rank/")}
    assert keys == {f"rank/median/{m}" for m in MEASURES} | {"rank/share_of_time"}
    assert not said.messages  # norms were not asked for
    with pytest.raises(RankscopeError, match=r"RankCallback: no layer fits 'nowhere'; it has model\.layers"):
        train(lora(), tmp_path / "c", RankCallback(layers=["nowhere"]))


def test_evaluation_lines_are_left_alone(tmp_path: Path) -> None:
    trainer = trainer_of(lora(), tmp_path, [RankCallback()])
    trainer.eval_dataset, trainer.args.eval_strategy = rows(4), transformers.IntervalStrategy.STEPS
    trainer.args.eval_steps = 1
    trainer.train()
    assert sum("eval_loss" in line for line in trainer.state.log_history) == 4
    ranked = [line for line in trainer.state.log_history if any(key.startswith("rank/") for key in line)]
    assert [line["step"] for line in ranked] == [2, 4]
    assert all("loss" in line for line in ranked)


def test_two_trainings_with_one_callback(tmp_path: Path) -> None:
    callback = RankCallback()
    first = train(lora(), tmp_path / "a", callback)
    again = train(lora(), tmp_path / "b", callback)
    pairs = zip(first, again, strict=True)
    assert all(a[k] == b[k] for a, b in pairs for k in a if k.startswith("rank/") and "time" not in k)
    assert not callback._watched  # initial weights are let go


# Taking up a training


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_training_is_compared_with_the_first_start(tmp_path: Path, kind: str) -> None:
    make = lora if kind == "lora" else llama
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    whole = train(make(), tmp_path, RankCallback(k=2), **settings)
    (tmp_path / "checkpoint-4").rename(tmp_path / "away")  # as if it had been killed after step 2
    model = make()
    moved(model)  # what it holds before the checkpoint is loaded does not matter
    resumed = train(model, tmp_path, RankCallback(k=2), resume=True, **settings)
    for line, other in zip(whole[2:], resumed[2:], strict=True):
        ranked = {key: value for key, value in line.items() if key.startswith("rank/") and "time" not in key}
        assert len(ranked) > 10
        assert {key: other[key] for key in ranked} == pytest.approx(ranked, rel=1e-6)


def test_a_resumed_training_without_the_start(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = train(lora(), tmp_path, RankCallback(), **settings)
    (tmp_path / "checkpoint-4").rename(tmp_path / "away")
    (tmp_path / INITIAL_NAME).unlink()
    resumed = train(lora(), tmp_path, RankCallback(), resume=True, **settings)
    keys = [key for key in whole[-1] if key.startswith("rank/") and "overlap" not in key and "time" not in key]
    assert {key: resumed[-1][key] for key in keys} == pytest.approx({key: whole[-1][key] for key in keys}, rel=1e-6)
    assert not any("overlap" in key for key in resumed[-1])
    assert len(said.messages) == 1
    assert "no such file" in said.messages[0]
    assert "overlap with the initialisation is left out" in said.messages[0]
    assert not (tmp_path / INITIAL_NAME).exists()  # what it resumed from must not pass for the start


def begin(callback: RankCallback, model: nn.Module, folder: Path, step: int = 0, zero: bool = True) -> Any:
    """on_train_begin without a Trainer; returns the state."""
    args = SimpleNamespace(output_dir=str(folder), save_strategy="steps")
    state = SimpleNamespace(is_world_process_zero=zero, global_step=step, log_history=[])
    callback.on_train_begin(args, state, SimpleNamespace(), model=model)
    return state


def line_of(callback: RankCallback, state: Any) -> dict[str, Any]:
    """What it adds to one line of the log."""
    logs: dict[str, Any] = {"loss": 1.0}
    callback.on_log(SimpleNamespace(), state, SimpleNamespace(), logs=logs)
    return {key: value for key, value in logs.items() if key != "loss"}


def test_the_file_of_the_start(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    model = lora(modules_to_save=["lm_head"])
    begin(RankCallback(), model, tmp_path)
    stored = read_tensors(tmp_path / INITIAL_NAME)
    names = set(peft_layers(model))
    assert set(stored) == {f"{name}.A" for name in names} | {"lm_head.weight"}
    for name, A0 in initial_rows(model).items():
        assert np.array_equal(stored[f"{name}.A"].numpy().T, A0)
    assert [path.name for path in tmp_path.iterdir()] == [INITIAL_NAME]
    # Of another rank: refused, and said once.
    callback = RankCallback()
    other = moved(lora(r=2))
    state = begin(callback, other, tmp_path, step=5)
    line = line_of(callback, state)
    assert "rank/median/stable" in line
    assert "rank/median/overlap_init" not in line
    assert sum("does not fit the model" in message for message in said.messages) == 1


def test_weights_trained_whole_without_their_start_are_left_out(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    callback = RankCallback()
    state = begin(callback, llama(), tmp_path, step=5)
    assert line_of(callback, state) == {}
    assert "16 weights trained whole are left out" in said.text


def test_a_folder_that_cannot_be_written(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    callback, model = RankCallback(), lora()
    state = begin(callback, model, tmp_path / "file")
    moved(model)
    assert "rank/median/overlap_init" in line_of(callback, state)
    assert "cannot be written" in said.text


# What cannot be measured


def test_nothing_is_logged_before_the_first_step(tmp_path: Path) -> None:
    callback = RankCallback()
    assert line_of(callback, begin(callback, lora(), tmp_path)) == {}


def test_weights_that_are_not_finite_do_not_stop_training(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    callback, model = RankCallback(), lora()
    state = begin(callback, model, tmp_path)
    moved(model)
    name, module = next(iter(peft_layers(model).items()))
    with torch.no_grad():
        module.lora_B["default"].weight[0, 0] = torch.nan
    said.clear()
    for _ in range(2):
        line = line_of(callback, state)
        assert f"rank/stable/{name}" not in line
        assert "rank/median/stable" in line
    assert len(said.messages) == 1
    assert name in said.messages[0]
    assert "NaN" in said.messages[0]


class FullyShardedDataParallel(nn.Module):
    """Named as torch's, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


def test_sharded_models(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    fsdp = FullyShardedDataParallel(lora())
    zero3 = lora()
    for parameter in zero3.parameters():  # as DeepSpeed leaves them between passes
        if parameter.requires_grad:
            parameter.ds_id, parameter.data = 1, torch.empty(0)
    dtensor, meta = lora(), nn.Linear(3, 3, device="meta")
    for parameter in dtensor.parameters():
        parameter.device_mesh = None
    for model in (fsdp, zero3, dtensor, meta):
        said.clear()
        callback = RankCallback()
        state = begin(callback, model, tmp_path)
        assert line_of(callback, state) == {}
        assert any("sharded" in message for message in said.messages)
        assert sum("nothing is trained that a rank" in message for message in said.messages) == 1


def test_a_real_dtensor(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = nn.Linear(3, 4)
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
        found = find_tracked_weights(model)
        assert not found.layers
        assert ("", "sharded: no process holds the whole weight") in found.left_out
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("config", ["AdaLoraConfig", "LoHaConfig"])
def test_other_adapters_are_left_out_and_said(tmp_path: Path, said: pytest.LogCaptureFixture, config: str) -> None:
    extra = {"total_step": 10} if config == "AdaLoraConfig" else {}
    model = peft.get_peft_model(llama(), getattr(peft, config)(target_modules=["q_proj"], **extra))
    callback = RankCallback()
    assert line_of(callback, begin(callback, moved(model), tmp_path)) == {}
    assert sum("which is no plain LoRA layer; first model.layers.0" in message for message in said.messages) == 1


def test_only_world_process_zero_measures(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    callback, model = RankCallback(every=2), lora()
    state = begin(callback, model, tmp_path, zero=False)
    moved(model)
    state.global_step = 2
    assert line_of(callback, state) == {}
    assert not list(tmp_path.iterdir())
    assert not said.messages
    control = SimpleNamespace(should_log=False)
    # Logging gathers the loss over all processes: each has to ask for it, or they wait for each other.
    assert callback.on_step_end(SimpleNamespace(), state, control).should_log
    with pytest.raises(RankscopeError, match="no layer fits"):
        begin(RankCallback(layers="nowhere"), model, tmp_path, zero=False)


def test_a_callback_that_cannot_go_first_says_so(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    begin(RankCallback(), lora(), tmp_path)
    assert sum("reporters that stand before" in message for message in said.messages) == 1


def test_order_of_the_callbacks(tmp_path: Path) -> None:
    """Each callback is called once at the start, in spite of the change of order."""
    begun: list[str] = []

    class Counting(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            begun.append(self.name)

    counting = []
    for name in ("before", "after"):
        counting.append(type(name, (Counting,), {"name": name})())
    callback = RankCallback()
    trainer = trainer_of(lora(), tmp_path, [counting[0], callback, counting[1]], max_steps=1)
    trainer.train()
    assert begun == ["before", "after"]
    assert trainer.callback_handler.callbacks[0] is callback
    assert trainer.pop_callback(RankCallback) is callback


# Time


def test_share_of_time(tmp_path: Path) -> None:
    ticks = count(0.0, 1.0)  # each look at the clock takes a second
    callback, model = RankCallback(clock=lambda: next(ticks)), lora()
    state = begin(callback, model, tmp_path)  # looks at 0 and 1
    assert callback.seconds == 1.0
    moved(model)
    assert line_of(callback, state)["rank/share_of_time"] == 2 / 3  # looks at 2 and 3
    assert callback.seconds == 2.0
    assert line_of(callback, state)["rank/share_of_time"] == 3 / 5


# The object


@pytest.mark.parametrize(
    ("settings", "name"), [({"every": 0}, "every"), ({"every": True}, "every"), ({"k": 0}, "k"), ({"k": 1.5}, "k")]
)
def test_settings(settings: Mapping[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is a whole number from 1"):
        RankCallback(**settings)


def test_events_it_does_not_know() -> None:
    callback = RankCallback()
    for event in (name for name in dir(transformers.TrainerCallback) if name.startswith("on_")):
        assert callable(getattr(callback, event))
    assert callback.on_something_new(1, 2, 3, model=None) is None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = callback.nothing_of_the_kind
    assert copy.deepcopy(callback).k == 8


def test_transformers_is_asked_for_only_here() -> None:
    code = """
import sys, rankscope
rankscope.RankCallback()
assert "transformers" not in sys.modules and "peft" not in sys.modules
sys.modules["transformers"] = None
try:
    rankscope.RankCallback()
except rankscope.RankscopeError as error:
    print(type(error).__name__, error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == 'ConfigError RankCallback needs transformers; pip install "rankscope[hf]"'


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("base_model.model.model.layers.0.q_proj", "model.layers.0.q_proj"),
        ("_orig_mod.base_model.model.q_proj", "q_proj"),
        ("module._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.q_proj", "layers.0.q_proj"),
        ("base_model.model.score.modules_to_save.default", "score"),
        ("base_model.model.head.modules_to_save.mine.dense", "head.dense"),
        ("my_module.layer", "my_module.layer"),
    ],
)
def test_names(path: str, name: str) -> None:
    assert strip_wrappers(path) == name
