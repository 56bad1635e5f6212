"""The embedded base and the tasks: against transformers, closed forms, and the planted answer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rankscope.errors import FormatError
from rankscope.lora import AdapterSpec, Bank
from rankscope.spectra import Spectrum, mp_count
from rankscope.train.config import make_study_config
from rankscope.train.docs import DocsTask, embedded_base_folder, read_documentation, split_blocks
from rankscope.train.llama import Llama, LlamaConfig, load_llama, save_llama
from rankscope.train.planted import PlantedTask
from rankscope.train.results import baseline_score, run_results
from rankscope.train.study import run_study
from rankscope.train.task import Batch, Task, WindowTask, weighted_mean


@pytest.fixture(scope="module")
def docs() -> DocsTask:
    return DocsTask()


def test_the_base_gives_the_logits_of_transformers(docs: DocsTask) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        embedded_base_folder(), attn_implementation="sdpa"
    ).eval()
    tokens = docs.batch(0, 0, 4)["tokens"]
    with torch.no_grad():
        expected, ours = theirs(tokens).logits, docs.model(0)(tokens)
    # float32 through four layers; logits are of size 10
    assert torch.allclose(ours, expected, atol=2e-4)
    assert expected.std() > 1


def test_a_model_survives_its_folder(tmp_path: Path) -> None:
    model = Llama(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2))
    save_llama(model, tmp_path)
    again = load_llama(tmp_path)
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(model.eval()(tokens), again(tokens))
    (tmp_path / "config.json").write_text('{"hidden_size": 32}')
    with pytest.raises(FormatError, match="do not fit"):
        load_llama(tmp_path)


def test_attention_looks_back_only(docs: DocsTask) -> None:
    model = docs.model(0)
    tokens = docs.batch(0, 0, 1)["tokens"]
    changed = tokens.clone()
    changed[0, 60] ^= 1
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    assert torch.equal(a[0, :60], b[0, :60])
    assert not torch.allclose(a[0, 60:], b[0, 60:])


def test_no_paragraph_is_both_trained_on_and_held_out() -> None:
    paragraphs = [" ".join(part.split()) for part in read_documentation().decode().split("\n\n")]
    kept = [paragraph for paragraph in paragraphs if paragraph]
    assert len(kept) == len(set(kept)) > 1000


def test_splits_share_out_every_byte() -> None:
    text = bytes(range(256)) * 200
    train_part, validation, test = split_blocks(text, block=512)
    assert len(train_part) + len(validation) + len(test) == len(text)
    assert len(validation) == len(test) == len(text) // 10


def test_bits_per_byte_of_a_uniform_model_is_eight(docs: DocsTask) -> None:
    class Uniform(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens.shape, 256)

    measured = docs.evaluate(Uniform(), "test", torch.device("cpu"))
    assert measured["bits_per_byte"] == pytest.approx(8.0, abs=1e-5)
    assert measured["loss"] == pytest.approx(8 * math.log(2), abs=1e-5)


def test_window_loss_is_the_mean_of_each_next_token() -> None:
    tokens = torch.randint(7, (40,), generator=torch.Generator().manual_seed(1))
    logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(2))

    class Bigram(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return logits[rows]

    class Windows(WindowTask):
        def model(self, seed: int) -> torch.nn.Module:
            return Bigram()

        def fingerprint(self) -> dict[str, str]:
            return {}

    task = Windows(tokens, tokens, tokens, length=10)
    probabilities = logits.log_softmax(-1)
    pairs = [(int(tokens[i]), int(tokens[i + 1])) for i in range(39) if i % 10 != 9]
    expected = -sum(float(probabilities[a, b]) for a, b in pairs) / len(pairs)
    measured = task.evaluate(Bigram(), "test", torch.device("cpu"))
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_batches_are_functions_of_seed_and_index(docs: DocsTask) -> None:
    assert torch.equal(docs.batch(0, 5, 4)["tokens"], docs.batch(0, 5, 4)["tokens"])
    assert not torch.equal(docs.batch(0, 5, 4)["tokens"], docs.batch(1, 5, 4)["tokens"])
    assert not torch.equal(docs.batch(0, 5, 4)["tokens"], docs.batch(0, 6, 4)["tokens"])


def test_default_rates_are_half_a_decade_apart_and_ten_times_higher_for_lora(docs: DocsTask) -> None:
    assert docs.learning_rates(full=True) == (3e-4, 1e-3, 3e-3)
    assert docs.learning_rates(full=False) == (3e-3, 1e-2, 3e-2)
    planted = PlantedTask(2, 0.5)
    assert (planted.learning_rates(full=True), planted.learning_rates(full=False)) == ((3e-3,), (1e-2,))
    assert (docs.default_batch, planted.default_batch) == (8, 16)


def gradients(task: Task, model: torch.nn.Module, batches: list[Batch]) -> list[list[torch.Tensor]]:
    """The gradient of each batch's own loss, from one pass over all."""
    joined, n = task.join(batches), len(batches)
    parts = {key: value.chunk(n) for key, value in joined.items()}
    outputs = task.outputs(model, joined).chunk(n)
    losses = [task.loss(out, {key: value[i] for key, value in parts.items()}) for i, out in enumerate(outputs)]
    where = list(model.parameters())
    return [list(torch.autograd.grad(loss, where, retain_graph=True)) for loss in losses]


@pytest.mark.parametrize("name", ["docs", "planted"])
def test_a_joined_batch_gives_each_run_its_own_gradient(docs: DocsTask, name: str) -> None:
    task = docs if name == "docs" else PlantedTask(2, 0.5)
    model = task.model(0)
    batches = [task.batch(seed, 0, 2) for seed in (0, 1, 2)]
    joined = task.join(batches)
    assert task.tokens(joined) == 3 * task.tokens(batches[0]) == 6 * task.tokens_per_example()
    assert task.tokens_per_example() == (128 if name == "docs" else 1)
    for together, batch in zip(gradients(task, model, batches), batches, strict=True):
        for a, b in zip(together, gradients(task, model, [batch])[0], strict=True):
            # float32 sums in another order
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    assert task.can_share(task.model(0), torch.device("cpu"))


def test_recomputed_blocks_have_the_same_gradients(docs: DocsTask) -> None:
    model = docs.model(0).train()
    batch = docs.batch(0, 0, 2)
    passes = [0]
    model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    kept = gradients(docs, model, [batch])[0]
    assert passes == [1]
    docs.checkpoint(model)
    again = gradients(docs, model, [batch])[0]
    assert passes == [3]
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    gradients(docs, model.eval(), [batch])
    assert passes == [4]


def test_adapters_learn_through_recomputed_blocks_of_the_embedded_base(docs: DocsTask) -> None:
    found = []
    for recompute in (False, True):
        model = docs.model(0)
        spec = AdapterSpec(2, 4.0, ("q_proj", "down_proj"), dropout=0.3)
        bank = Bank.attach(model, [spec, spec], [torch.Generator().manual_seed(i) for i in (1, 2)])
        bank.select(None)
        if recompute:
            docs.checkpoint(model)
        bank.route.seeds = (3, 4)
        batch = docs.join([docs.batch(seed, 0, 2) for seed in (0, 1)])
        docs.loss(docs.outputs(model.train(), batch), batch).backward()
        found.append([layer.B.grad for layer in bank.layers.values()])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert a.abs().sum() > 0
        assert torch.equal(a, b)


def test_weighted_mean_is_that_of_all_rows() -> None:
    assert weighted_mean([torch.tensor(1.0), torch.tensor(4.0)], [3, 1]) == 1.75


def test_the_planted_floor_is_eckart_and_young() -> None:
    task = PlantedTask(rank=3, noise=0.0)
    s = torch.linalg.svdvals(task.updates["first"].double())
    assert s[:3].tolist() == pytest.approx([2.0, 1.5, 1.0], rel=1e-5)
    assert float(s[3]) < 1e-5
    student = task.model(0)
    with torch.no_grad():
        for name in ("first", "second"):
            u, s, vt = torch.linalg.svd(task.updates[name], full_matrices=False)
            student.get_submodule(name).weight += u[:, :1] * s[:1] @ vt[:1]
        loss = task.evaluate(student, "test", torch.device("cpu"))["loss"]
    # the sample's covariance is white to 1/√8192 in each direction
    assert loss == pytest.approx(task.floor(1), rel=0.05)


@pytest.mark.parametrize("planted", [2, 5])
def test_the_planted_rank_is_recovered(tmp_path: Path, planted: int) -> None:
    """By the sweep: loss falls to the floor of each rank and stops falling at the planted one. By the full
    update's spectrum: as many singular values stand above the noise edge, and they are the planted ones."""
    ranks = (1, 2, 3, 5, 8)
    settings = {"planted_rank": planted, "ranks": ranks, "batch": 128, "steps": 500, "evaluations": 0}
    config = make_study_config({"task": "planted", **settings}, "test")
    study = run_study(config, tmp_path / "study")
    task = PlantedTask(planted, config.planted_noise)
    scores = {record.run.rank: study.score(record) for record in study.done() if record.run.method == "lora"}
    for rank, score in scores.items():
        # noise of 8192 held-out rows: .5² · √(2/(8192 · 160)); and the students' own error on as many
        assert score == pytest.approx(task.floor(rank), rel=0.01)
    enough = [rank for rank in ranks if scores[rank] < 1.01 * config.planted_noise**2]
    assert min(enough) == planted
    store = study.store(study.done()[-1].run)
    for name in ("first", "second"):
        spectrum = Spectrum.of(store[name])
        assert mp_count(spectrum) == planted
        assert spectrum.values[:planted] == pytest.approx(task.singular_values.numpy(), rel=0.05)


def test_rows_of_a_study_say_what_its_runs_did(tmp_path: Path) -> None:
    config = make_study_config({"task": "planted", "ranks": (2,), "lrs": (1e-2, 1e-4), "steps": 40}, "test")
    study = run_study(config, tmp_path / "study")
    found = {row.record.run.name: row for row in run_results(study)}
    assert found["lora-r2-lr0.01-s0"].is_best
    assert not found["lora-r2-lr0.0001-s0"].is_best
    assert found["lora-r2-lr0.01-s0"].ranks["numerical_rank"] == 2
    assert found["full-lr0.003-s0"].ranks["numerical_rank"] > 2
    assert found["base-s0"].ranks == {}
    assert baseline_score(study) == found["base-s0"].score
    store = study.store(found["full-lr0.003-s0"].record.run)
    stable = [Spectrum.of(store[name]).stable_rank for name in store]
    # the median of two layers is their mean
    assert found["full-lr0.003-s0"].ranks["stable_rank"] == pytest.approx(sum(stable) / 2)
    assert stable[0] != pytest.approx(stable[1], rel=1e-3)
    cost = found["lora-r2-lr0.01-s0"].record.cost
    assert cost is not None
    # A (2, in) and B (out, 2) of a 64 × 96 and a 96 × 64 map, float32; AdamW keeps two moments and a step count
    assert cost.trainable == 2 * (64 + 96) * 2
    assert cost.parameter_bytes == cost.gradient_bytes == 4 * cost.trainable
    assert cost.optimizer_bytes == 2 * 4 * cost.trainable + 4 * 4
