"""Training in a random subspace: the weights are θ₀ + P·z, in the pass, in the gradient, in what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from makers import generator, normal
from torch import Tensor, nn

from rankscope.cli import cli
from rankscope.errors import ConfigError
from rankscope.formats.file_io import read_tensors
from rankscope.train.config import StudyConfig, make_study_config
from rankscope.train.docs import DocsTask
from rankscope.train.events import Event, Silent, StepsTaken
from rankscope.train.loop import InterruptedTrainingError, evaluate_splits
from rankscope.train.method_table import find_method
from rankscope.train.methods import TrainableSubspace, make_trainable
from rankscope.train.planted import PlantedTask
from rankscope.train.random_subspace import RandomSubspace, count_parameters_and_modules
from rankscope.train.runs import Run, feasible_dims, plan_runs
from rankscope.train.study import Study, run_study
from rankscope.train.tasks import make_task
from rankscope.train.weights import add_updates

SMALL = {"task": "planted", "methods": ("subspace",), "ranks": (), "dims": (32,), "full": False}
SHORT = {**SMALL, "steps": 12, "batch": 16, "evaluations": 1}


def settings(**changes: object) -> StudyConfig:
    return make_study_config({**SHORT, **changes}, "test")


class Tied(nn.Module):
    """A weight in two places, and a module with two of its own: θ of 3·4 + 4 + 4 + 3 numbers in 3 modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)
        with torch.no_grad():
            self.embed.weight.copy_(normal(3, 4))
            self.out.bias.copy_(normal(3, seed=1))
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(self.embed(tokens)))
        return out


TOKENS = torch.tensor([0, 2, 1, 1])
NAMES = ("embed.weight", "norm.weight", "norm.bias", "out.bias")
SIZES = [12, 4, 4, 3]


def moved(layered: bool, dim: int = 7) -> tuple[Tied, RandomSubspace]:
    """A model in a subspace, away from its start."""
    model = Tied().double()
    subspace = RandomSubspace(model, NAMES, dim, generator(1), layered).double()
    with torch.no_grad():
        subspace.z.copy_(normal(len(subspace.z), seed=2))
        if subspace.scales is not None:
            subspace.scales.copy_(1 + 0.3 * normal(len(subspace.scales), seed=3))
    return model, subspace


def factors(subspace: RandomSubspace) -> Tensor:
    """λ of each of ``NAMES``: one for each module, the embedding, the norm, the output."""
    scales = subspace.scales.detach() if subspace.scales is not None else torch.ones(3)
    return scales[[0, 1, 1, 2]]


def shifted(subspace: RandomSubspace) -> tuple[Tied, Tensor]:
    """A plain model with the weights θ₀ + λ·P·z written into it, and P·z, which takes the parameters in order."""
    model = Tied().double()
    flat = subspace.product(subspace.z).detach()
    with torch.no_grad():
        for name, part, scale in zip(NAMES, flat.split(SIZES), factors(subspace), strict=True):
            weight = model.get_parameter(name)
            weight.add_((scale * part).view_as(weight))
    return model, flat


def test_tied_weights_count_once() -> None:
    assert count_parameters_and_modules(Tied(), NAMES) == (23, 3)
    assert count_parameters_and_modules(Tied(), ["norm.weight"]) == (4, 1)


def test_at_the_start_the_model_is_the_base() -> None:
    model = Tied()
    before = model(TOKENS)
    RandomSubspace(model, NAMES, 7, generator(), layered=True)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("layered", [False, True])
def test_a_pass_is_that_of_the_shifted_weights(layered: bool) -> None:
    model, subspace = moved(layered)
    plain, _ = shifted(subspace)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), plain(TOKENS))
    assert not torch.allclose(model(TOKENS), Tied().double()(TOKENS))


@pytest.mark.parametrize("layered", [False, True])
def test_gradients_are_those_of_the_weights_projected(layered: bool) -> None:
    """∂/∂z = Pᵀ(λ·∂/∂θ), ∂/∂λ_i = ⟨(P·z)_i, ∂/∂θ_i⟩; a tied weight has the sum of both places' gradients."""
    model, subspace = moved(layered)
    plain, flat = shifted(subspace)
    model(TOKENS).square().sum().backward()
    plain(TOKENS).square().sum().backward()
    gradients = [plain.get_parameter(name).grad.flatten() for name in NAMES]
    scaled = torch.cat([scale * g for scale, g in zip(factors(subspace), gradients, strict=True)])
    torch.testing.assert_close(subspace.z.grad, subspace.product.transposed_product(scaled))
    if subspace.scales is not None:
        first, weight, bias, last = (part @ g for part, g in zip(flat.split(SIZES), gradients, strict=True))
        torch.testing.assert_close(subspace.scales.grad, torch.stack([first, weight + bias, last]))
    assert all(weight.grad is None for name, weight in model.named_parameters() if name in NAMES)


def test_what_is_not_chosen_stays_as_it_is() -> None:
    model = Tied().double()
    subspace = RandomSubspace(model, ["norm.weight"], 2, generator()).double()
    nn.init.ones_(subspace.z)
    model(TOKENS).sum().backward()
    assert model.embed.weight.grad is not None
    assert set(subspace.changes()) == {"norm.weight"}


def test_the_factors_are_paid_out_of_the_dimension() -> None:
    _, direct = moved(False)
    _, layered = moved(True)
    assert [sum(p.numel() for p in subspace.parameters()) for subspace in (direct, layered)] == [7, 7]
    assert (len(direct.z), len(layered.z), len(layered.scales)) == (7, 4, 3)


@pytest.mark.parametrize(("dim", "layered"), [(0, False), (24, False), (3, True)])
def test_a_dimension_that_does_not_fit_is_refused(dim: int, layered: bool) -> None:
    with pytest.raises(ValueError, match=f"a subspace of {dim} numbers in a model of 23 with 3 layers"):
        RandomSubspace(Tied(), NAMES, dim, generator(), layered)


def test_a_step_moves_the_weights_as_far_as_one_of_full_fine_tuning() -> None:
    """Adam's first step is the rate in each number: rate·√D in θ, and rate·factor·√d in z, which P keeps."""
    model = Tied()
    subspace = RandomSubspace(model, NAMES, 4, generator())
    assert subspace.learning_rate_factor * 4**0.5 == pytest.approx(23**0.5)


def test_recomputing_activations_sees_the_same_weights() -> None:
    """Blocks are recomputed in the backward pass, when the forward pass is long over."""
    task = DocsTask(16)
    batch = task.batch(0, 0, 2)
    gradients = []
    for checkpointing in (False, True):
        trained = TrainableSubspace(task, StudyConfig(), [Run(method="subspace", seed=0, dim=8)])
        if checkpointing:
            task.checkpoint(trained.model)
        nn.init.ones_(trained.subspace.z)
        trained.train()
        task.loss(task.outputs(trained.model, batch), batch).backward()
        gradients.append(trained.subspace.z.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert float(gradients[0].abs().min()) > 0


# As a method of a study


class HeadedTask(PlantedTask):
    """The planted task with its second map as a head that is new to the base."""

    heads = ("second",)


def test_heads_are_trained_whole_and_outside_the_subspace() -> None:
    task = HeadedTask(4, 0.5, count=64)
    trained = make_trainable(task, settings(), [Run(method="subspace", seed=0, dim=8)])
    assert isinstance(trained, TrainableSubspace)
    shapes = {name: tuple(p.shape) for name, p in trained.parameters(0).items()}
    assert shapes == {"second.weight": (96, 64), "subspace.z": (8,)}
    assert trained.subspace.product.rows == 64 * 96
    assert trained.learning_rate_factor(0, "second.weight") == 1.0
    assert trained.learning_rate_factor(0, "subspace.z") == pytest.approx((64 * 96 / 8) ** 0.5)
    with torch.no_grad():
        for weight in trained.parameters(0).values():
            weight.add_(0.5)
    updates = trained.updates()
    assert set(updates) == {"first", "second"}
    assert torch.allclose(updates["second"], torch.full((96, 64), 0.5))
    expected = trained.subspace.product(torch.full((8,), 0.5)).view(64, 96)
    torch.testing.assert_close(updates["first"], expected)


def test_the_grid_has_each_dimension_that_fits() -> None:
    """12 288 numbers in two layers: said pays 2."""
    config = settings(methods=("subspace", "said"), dims=(2, 3, 12288, 12289), lrs=(0.1,))
    runs = [run for run in plan_runs(config, make_task(config)) if run.method != "base"]
    assert [(run.method, run.dim) for run in runs] == [
        *(("subspace", dim) for dim in (2, 3, 12288)),
        *(("said", dim) for dim in (3, 12288)),
    ]
    assert [run.rank for run in runs] == [None] * 5
    assert (runs[0].name, runs[0].label) == ("subspace-d2-lr0.1-s0", "subspace d = 2")
    with pytest.raises(ConfigError, match="said needs some from 3 to 12288"):
        feasible_dims((1, 2, 20000), make_task(config), find_method("said"))


def test_rates_stand_beside_those_of_full_fine_tuning() -> None:
    config = settings(methods=("subspace", "lora"), ranks=(1,), task="docs", full=True)
    rates: dict[str, list[float | None]] = {}
    for run in plan_runs(config, make_task(config)):
        rates.setdefault(run.method, []).append(run.lr)
    assert rates["subspace"] == [0.0009, 0.003, 0.009]
    assert (rates["lora"], rates["full"]) == ([0.003, 0.01, 0.03], [0.0003, 0.001, 0.003])
    chosen = plan_runs(settings(methods=("subspace",), lrs=(0.5,)), make_task(settings()))
    assert [run.lr for run in chosen] == [None, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (0,)}, "dimensions of at least 1"),
        ({"dims": (4, 4)}, "each value once"),
        ({"dims": ()}, "at least one dimension"),
        ({"methods": ("lora",)}, "at least one rank"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def tensors_of(study: Study) -> dict[str, Tensor]:
    found = {}
    for record in study.done():
        if record.run.method != "base":
            store = study.store(record.run)
            found |= {f"{record.run.name} {name}": store[name].dense() for name in store}
    return found


class StopAfter(Silent):
    def __init__(self, count: int) -> None:
        self.left = count

    def tell(self, event: Event) -> None:
        self.left -= isinstance(event, StepsTaken)

    def __call__(self) -> bool:
        return self.left <= 0


@pytest.mark.parametrize("after", [5, 17])
def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path: Path, after: int) -> None:
    """Stopped in the first and in the second run."""
    config = settings(methods=("subspace", "said"))
    whole = run_study(config, tmp_path / "whole")
    stop = StopAfter(after)
    with pytest.raises(InterruptedTrainingError):
        run_study(config, tmp_path / "cut", stop, stop)
    assert list((tmp_path / "cut").glob("runs/*/state.pt"))
    resumed = run_study(config, tmp_path / "cut")
    left, right = tensors_of(whole), tensors_of(resumed)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert [record.metrics for record in whole.records] == [record.metrics for record in resumed.records]


def test_a_state_holds_z_and_no_weights(tmp_path: Path) -> None:
    stop = StopAfter(3)
    with pytest.raises(InterruptedTrainingError):
        run_study(settings(methods=("said",)), tmp_path / "study", stop, stop)
    (state,) = (tmp_path / "study").glob("runs/said-*/state.pt")
    shapes = {name: tuple(p.shape) for name, p in torch.load(state, weights_only=True)["parameters"].items()}
    assert shapes == {"subspace.z": (30,), "subspace.scales": (2,)}


def test_seeds_dimensions_and_methods_have_subspaces_of_their_own_and_rates_share_one() -> None:
    task = PlantedTask(4, 0.5, count=64)
    runs = [
        Run(method="subspace", seed=0, dim=32, lr=0.1),
        Run(method="subspace", seed=0, dim=32, lr=0.2),
        Run(method="subspace", seed=1, dim=32, lr=0.1),
        Run(method="subspace", seed=0, dim=31, lr=0.1),
        Run(method="said", seed=0, dim=34, lr=0.1),
    ]
    made = [TrainableSubspace(task, StudyConfig(), [run]).subspace for run in runs]
    first, same, *others = (subspace.product(torch.ones_like(subspace.z)).detach() for subspace in made)
    assert torch.equal(first, same)
    for other in others:
        assert abs(float(nn.functional.cosine_similarity(first, other, dim=0))) < 0.1


def test_what_is_saved_gives_the_score_back(tmp_path: Path) -> None:
    """Added to an untouched base, the saved update is the trained model; a run trains and saves d numbers' worth."""
    config = settings(methods=("subspace", "said"), dims=(512,), steps=40, lrs=(0.003,))
    study = run_study(config, tmp_path / "study")
    task = make_task(config)
    base = study.score(study.done()[0])
    for record in study.done()[1:]:
        model = task.model(0)
        add_updates(model, read_tensors(study.path(record.run) / "update.safetensors"))
        again = evaluate_splits(task, model, ("test",), config, torch.device("cpu"))["test"]["loss"]
        assert again == pytest.approx(study.score(record), rel=1e-6)
        assert study.score(record) < base
        assert record.cost is not None
        assert (record.cost.trainable, record.cost.parameters) == (512, 12288)
        lines = (study.path(record.run) / "metrics.jsonl").read_text().splitlines()
        scores = [json.loads(line)["validation"]["loss"] for line in lines]
        assert scores == sorted(scores, reverse=True)


def test_a_subspace_reaches_its_share_of_the_numbers(tmp_path: Path) -> None:
    """The planted task is a quadratic in θ, the same in every direction: d random ones of D hold d/D of the gain.

    The planted update is of rank 4. A low rank makes no low dimension.
    """
    config = settings(dims=(1024, 2048), steps=100, batch=64, lrs=(0.003,), evaluations=0)
    study = run_study(config, tmp_path / "study")
    task = PlantedTask(config.planted_rank, config.planted_noise)
    base, *scores = (study.score(record) for record in study.done())
    gain = base - task.floor(task.rank)
    assert [(base - score) / gain for score in scores] == pytest.approx([1 / 12, 1 / 6], rel=0.2)


def test_the_command_takes_one_method_and_its_dimensions(tmp_path: Path) -> None:
    arguments = ["--task", "planted", "--method", "subspace", "--dims", "4,16", "--no-full", "--steps", "2", "--quiet"]
    done = CliRunner().invoke(cli, ["train", *arguments, "--json", "-o", str(tmp_path / "study")])
    assert done.exit_code == 0, done.output
    runs = json.loads(done.stdout)["runs"]
    assert [(run["method"], run["dim"], run["trainable"]) for run in runs] == [
        ("base", None, 0),
        ("subspace", 4, 4),
        ("subspace", 16, 16),
    ]


def test_alone_the_command_is_what_it_was() -> None:
    config = StudyConfig()
    assert {run.method for run in plan_runs(config, make_task(config))} == {"base", "lora", "full"}
