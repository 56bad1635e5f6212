"""Streams of their own for runs that share a pass: each chunk is what it is alone, in models of transformers too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankscope.errors import ConfigError, TrainingError
from rankscope.lora import AdapterSpec, Bank
from rankscope.train.hf import ClassifyTask
from rankscope.train.randomness import RANDOM_FUNCTIONS, replay_contexts, use_run_streams
from rankscope.train.task import Batch

CPU = torch.device("cpu")
SEEDS = (11, 7, 2**62)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apart_and_alone(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What a function gives for three chunks together, and for each of them alone."""
    with use_run_streams(CPU, SEEDS):
        together = function(x.clone())
    alone = []
    for seed, part in zip(SEEDS, x.chunk(3), strict=True):
        with use_run_streams(CPU, [seed]):
            alone.append(function(part.clone()))
    return list(together.chunk(3)), alone


def attention(x: Tensor) -> Tensor:
    """With a mask for each row."""
    q = x.view(x.shape[0], 2, 2, -1)
    mask = torch.ones(x.shape[0], 1, 2, 2).tril()
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=0.5)


def attention_with_one_mask(x: Tensor) -> Tensor:
    """Six places, so that the mask that all rows share is as long as there are rows."""
    q = x[:, None, :6, None]
    return F.scaled_dot_product_attention(q, q, q, torch.ones(6, 6).tril(), 0.5)


class Written(nn.Module):
    """Dropout in place on something that autograd follows."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = F.dropout(y, 0.5, True, True)
        assert z is y
        return y


# Every way to draw that has a rule, on rows of 8 numbers in [0, 1].
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.dropout": lambda x: F.dropout(x, 0.5),
    "F.dropout by name": lambda x: F.dropout(input=x, p=0.5, training=True),
    "F.dropout in place": Written(),
    "nn.Dropout": nn.Dropout(0.5).train(),
    "F.dropout1d": lambda x: F.dropout1d(x.view(-1, 4, 2), 0.5),
    "F.dropout2d": lambda x: F.dropout2d(x.view(-1, 4, 2, 1), 0.5),
    "F.dropout3d": lambda x: F.dropout3d(x.view(-1, 4, 2, 1, 1), 0.5),
    "F.alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, True),
    "F.feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x.view(-1, 4, 2), 0.5, True),
    "F.rrelu": lambda x: F.rrelu(x - 0.5, training=True),
    "F.rrelu_": lambda x: F.rrelu_(x.sub_(0.5), training=True),
    "F.gumbel_softmax": F.gumbel_softmax,
    "attention": attention,
    "attention with one mask": attention_with_one_mask,
    "causal attention by place": lambda x: F.scaled_dot_product_attention(*[x[:, None]] * 3, None, 0.5, True),
    "torch.dropout": lambda x: torch.dropout(x, 0.5, True),
    "torch.dropout_": lambda x: torch.dropout_(x, 0.5, True),
    "torch.alpha_dropout": lambda x: torch.alpha_dropout(x, 0.5, True),
    "torch.alpha_dropout_": lambda x: torch.alpha_dropout_(x, 0.5, True),
    "torch.feature_dropout": lambda x: torch.feature_dropout(x.view(-1, 4, 2), 0.5, True),
    "torch.feature_dropout_": lambda x: torch.feature_dropout_(x.view(-1, 4, 2), 0.5, True),
    "torch.feature_alpha_dropout": lambda x: torch.feature_alpha_dropout(x.view(-1, 4, 2), 0.5, True),
    "torch.feature_alpha_dropout_": lambda x: torch.feature_alpha_dropout_(x.view(-1, 4, 2), 0.5, True),
    "torch.native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "torch.rrelu": lambda x: torch.rrelu(x - 0.5, 0.1, 0.3, True),
    "torch.rrelu_": lambda x: torch.rrelu_(x.sub_(0.5), 0.1, 0.3, True),
    "torch.bernoulli": torch.bernoulli,
    "torch.binomial": lambda x: torch.binomial(torch.full_like(x, 9.0), x),
    "torch.multinomial": lambda x: torch.multinomial(x, 3),
    "torch.normal": lambda x: torch.normal(x, x),
    "torch.poisson": lambda x: torch.poisson(9 * x),
    "torch.rand_like": torch.rand_like,
    "torch.randint_like": lambda x: torch.randint_like(x, 100),
    "torch.randn_like": torch.randn_like,
    "Tensor.bernoulli": lambda x: x.bernoulli(),
    "Tensor.bernoulli_ of numbers": lambda x: x.bernoulli_(0.5),
    "Tensor.bernoulli_ of rows": lambda x: torch.empty_like(x).bernoulli_(x),
    "Tensor.cauchy_": lambda x: x.cauchy_(),
    "Tensor.exponential_": lambda x: x.exponential_(),
    "Tensor.geometric_": lambda x: x.geometric_(0.5),
    "Tensor.log_normal_": lambda x: x.log_normal_(),
    "Tensor.multinomial": lambda x: x.multinomial(3),
    "Tensor.normal_": lambda x: x.normal_(),
    "Tensor.random_": lambda x: x.random_(0, 100),
    "Tensor.uniform_": lambda x: x.uniform_(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_chunk_draws_what_it_draws_alone(name: str) -> None:
    before = torch.get_rng_state()
    x = torch.rand(6, 8, generator=source())
    together, alone = apart_and_alone(DRAWS[name], x)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)
    same_rows = x[:2].repeat(3, 1)
    together, _ = apart_and_alone(DRAWS[name], same_rows)
    assert not torch.equal(together[0], together[1])  # streams differ: it does draw
    assert torch.equal(torch.get_rng_state(), before)


def test_every_function_of_torch_that_draws_is_known() -> None:
    """By torch's own tag of what draws; what is left out is no function of rows, or lies below those that are here."""
    tagged = set()
    for schema in torch._C._jit_get_all_schemas():
        packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"), None) if "aten::" in schema.name else None
        found = getattr(packet, schema.overload_name or "default", None)
        if found is not None and torch.Tag.nondeterministic_seeded in found.tags:
            tagged.add(schema.name.removeprefix("aten::"))
    assert len(tagged) > 40
    public = {name for name in tagged if not name.startswith("_")}
    callable_ = {getattr(owner, n) for n in public for owner in (torch, torch.Tensor, F) if hasattr(owner, n)}
    # Recurrent layers keep time in the first axis; torch.random is a module.
    left_out = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch.miopen_rnn, torch.random}
    assert callable_ - set(RANDOM_FUNCTIONS) == left_out


def test_functions_in_a_row_go_on_from_each_other() -> None:
    """A run's stream runs on from draw to draw, among draws that name a stream of their own."""

    def function(x: Tensor) -> Tensor:
        own = source(3)
        first = F.dropout(x, 0.5)
        noise = torch.empty(first.shape[-1]).uniform_(generator=own)
        return first + torch.randn_like(x) + noise

    together, alone = apart_and_alone(function, torch.rand(6, 8, generator=source()))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(together[0] != 0, together[0] == 0)


def test_gradients_pass_through_dropout_in_place() -> None:
    x = torch.rand(6, 8, generator=source())
    gradients = []
    for rows, seeds in ((x, SEEDS), *((part, [seed]) for part, seed in zip(x.chunk(3), SEEDS, strict=True))):
        leaf = rows.clone().requires_grad_()
        with use_run_streams(CPU, seeds):
            out = Written()(leaf)
        out.square().sum().backward()
        assert torch.equal(leaf.grad == 0, out == 0)
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], torch.cat(gradients[1:]))


def test_what_draws_nothing_is_called_once() -> None:
    calls = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    x = torch.rand(5, 8, generator=source())  # 5 rows are not 3 chunks: to cut them would raise
    q = x[:, None]
    with Count(), use_run_streams(CPU, SEEDS):
        F.dropout(x, 0.5, False)
        F.dropout(x, 0.0)
        F.rrelu(x)
        torch.rrelu(x)
        torch.dropout(x, 0.5, False)
        torch.native_dropout(x, 0.5, False)
        F.scaled_dot_product_attention(q, q, q)
    assert calls.count("scaled_dot_product_attention") == 1
    assert calls.count("dropout") == 3


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: F.dropout(x, 0.5), r"dropout for a tensor of shape \(4, 8\), so its runs cannot share a pass"),
        (lambda x: torch.rand([]), "rand for no tensor"),
        (lambda x: F.dropout(x.sum(), 0.5), r"of shape \(\)"),
        # It draws inside, where no mode can see it.
        (lambda x: nn.MultiheadAttention(8, 2, dropout=0.5)(x, x, x), "in a way of its own"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(function: Callable[[Tensor], Any], message: str) -> None:
    before = torch.get_rng_state()
    x = torch.rand(4, 8, generator=source())
    with pytest.raises(TrainingError, match=message) as caught, use_run_streams(CPU, SEEDS):
        function(x)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_run_has_the_global_stream_to_itself() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = torch.rand(3)
        before = torch.get_rng_state()
        with use_run_streams(CPU, [5]):
            assert torch.equal(torch.rand(3), expected)
        assert torch.equal(torch.get_rng_state(), before)
        with pytest.raises(KeyError), use_run_streams(CPU, [5]):
            raise KeyError
        assert torch.equal(torch.get_rng_state(), before)


# Models of transformers

SIZES: dict[str, Any] = {"vocab_size": 44, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = 9


def wide(model: Any) -> Any:
    """Weights large enough that what is dropped changes the logits by far more than rounding."""
    own = source()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=own)
    return model


def make(name: str) -> Any:
    t = pytest.importorskip("transformers")
    kind, _, how = name.partition(" ")
    more = {"attn_implementation": how} if how else {}
    bert = {"intermediate_size": 24, "max_position_embeddings": 32, **SIZES}
    dropped = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    rates = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
    gpt2 = {"vocab_size": 44, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
    opt = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, **SIZES}
    xlnet = {"vocab_size": 44, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
    models = {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**bert, **dropped, **more)),
        "distilbert": lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(vocab_size=44, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32)
        ),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**bert, pad_token_id=0)),
        "gpt2": lambda: t.GPT2ForSequenceClassification(t.GPT2Config(**gpt2, **rates, **more)),
        "opt": lambda: t.OPTForSequenceClassification(t.OPTConfig(**opt, layerdrop=0.1, pad_token_id=0)),
        "xlnet": lambda: t.XLNetForSequenceClassification(t.XLNetConfig(**xlnet)),
    }
    return wide(models[kind]())


class Rows(ClassifyTask):
    """Classification of rows that are made up, by models that are given."""

    draws = True
    pad_id = 0

    def __init__(self) -> None:
        pass

    def batch(self, seed: int, index: int, size: int, length: int = WORDS) -> Batch:
        ids = torch.randint(1, 44, (size, length), generator=source(seed))
        mask = torch.ones_like(ids)
        ids[0, length - 2 :] = mask[0, length - 2 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(size) % 2}


def losses_and_gradients(
    model: Any, batches: Sequence[Batch], seeds: Sequence[int], where: Sequence[nn.Parameter]
) -> list[tuple[Tensor, list[Tensor]]]:
    """The loss of each batch and its gradient, from one pass over all."""
    task, n = Rows(), len(batches)
    batch = task.join(batches)
    with use_run_streams(CPU, seeds):
        outputs = task.outputs(model, batch)
    parts = {key: value.chunk(n) for key, value in batch.items()}
    found = []
    for i, out in enumerate(outputs.chunk(n)):
        loss = task.loss(out, {key: value[i] for key, value in parts.items()})
        found.append((loss, list(torch.autograd.grad(loss, where, retain_graph=True))))
    return found


def assert_same(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> None:
    """To float32 rounding through two layers: other dropout would be off by a tenth."""
    assert a[0].item() == pytest.approx(b[0].item(), rel=1e-5)
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6 + 1e-5 * float(y.abs().max()))


MODELS = ["bert sdpa", "bert eager", "gpt2 sdpa", "gpt2 eager", "distilbert", "roberta"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_run_among_others_has_the_dropout_it_has_alone(name: str, recompute: bool) -> None:
    model = make(name).train()
    assert Rows().can_share(model, CPU)
    where = list(model.parameters())
    batches = [Rows().batch(seed, 0, 4) for seed in (1, 2, 3)]
    alone = [losses_and_gradients(model, [b], [s], where)[0] for b, s in zip(batches, SEEDS, strict=True)]
    assert not torch.allclose(alone[0][1][0], losses_and_gradients(model, batches[:1], [0], where)[0][1][0], rtol=0.1)
    if recompute:
        Rows().checkpoint(model)
    before = torch.get_rng_state()
    for a, b in zip(losses_and_gradients(model, batches, SEEDS, where), alone, strict=True):
        assert_same(a, b)
    assert torch.equal(torch.get_rng_state(), before)


def test_recomputing_without_replay_would_go_wrong() -> None:
    """That the test above can fail: outside of the streams a block saves other tensors, which torch notices."""
    model = make("bert sdpa").train()
    type("Plain", (Rows,), {"draws": False})().checkpoint(model)
    batches = [Rows().batch(seed, 0, 4) for seed in (1, 2, 3)]
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        losses_and_gradients(model, batches, SEEDS, list(model.parameters()))


def test_masks_are_equal_bit_for_bit() -> None:
    """What a hidden dropout of BERT leaves, among others and alone."""
    model, seen = make("bert eager").train(), []
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in drops:
        module.register_forward_hook(lambda _, given, out: seen.append((given[0] != 0) & (out == 0)))
    batches = [Rows().batch(seed, 0, 4) for seed in (1, 2, 3)]
    with use_run_streams(CPU, SEEDS):
        Rows().outputs(model, Rows().join(batches))
    together, seen[:] = list(seen), []
    assert len(together) == 1 + 2 * 2 + 1  # embeddings; two outputs a layer (attention calls the function); the head
    for i, (batch, seed) in enumerate(zip(batches, SEEDS, strict=True)):
        seen.clear()
        with use_run_streams(CPU, [seed]):
            Rows().outputs(model, batch)
        for a, b in zip(together, seen, strict=True):
            assert torch.equal(a.chunk(3)[i], b)
    assert 0.05 < torch.cat([mask.flatten().float() for mask in together]).mean() < 0.15


def test_rows_of_other_lengths_drop_other_entries() -> None:
    """What ``ClassifyTask.join`` says: with dropout, padding is not nothing. Without, it is."""
    model = make("bert sdpa")
    where = list(model.parameters())
    batches = [Rows().batch(1, 0, 4), Rows().batch(2, 0, 4, length=WORDS + 4)]
    assert Rows().tokens(batches[0]) == 4 * WORDS != Rows().tokens(batches[1])
    for drops in (False, True):
        model.train(drops)
        together = losses_and_gradients(model, batches, SEEDS[:2], where)
        alone = [losses_and_gradients(model, [b], [s], where)[0] for b, s in zip(batches, SEEDS, strict=False)]
        assert_same(together[1], alone[1])
        if drops:
            with pytest.raises(AssertionError):
                assert_same(together[0], alone[0])
        else:
            assert_same(together[0], alone[0])


@pytest.mark.parametrize("name", ["opt", "xlnet"])
def test_models_that_cannot_share_a_pass_are_noticed(name: str) -> None:
    """With layerdrop, OPT draws once for all rows whether to leave out a layer; XLNet's first axis is time."""
    model = make(name)
    assert not Rows().can_share(model, CPU)


def test_rows_that_see_each_other_are_noticed() -> None:
    class Normed(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Embedding(44, 8), nn.Flatten(), norm, nn.Linear(8 * WORDS, 2))

        def forward(self, input_ids: Tensor, **_: Tensor) -> Any:
            return type("Out", (), {"logits": self.layers(input_ids)})

    assert Rows().can_share(Normed(nn.LayerNorm(8 * WORDS)), CPU)
    assert not Rows().can_share(Normed(nn.BatchNorm1d(8 * WORDS)), CPU)


def test_adapters_learn_through_recomputed_blocks() -> None:
    """Nothing below the first adapter needs a gradient, and still it gets its own."""
    found = []
    batch = Rows().batch(1, 0, 4)
    for recompute in (False, True):
        model = make("bert sdpa")
        bank = Bank.attach(model, AdapterSpec(2, 4.0, ("query", "value")), source(5))
        if recompute:
            Rows().checkpoint(model)
        model.train()
        # B starts at zero, where A has no gradient.
        with torch.no_grad():
            for layer in bank.layers.values():
                layer.B.normal_(generator=source(6))
        where = [p for layer in bank.layers.values() for p in (layer.A, layer.B)]
        found.append(losses_and_gradients(model, [batch], SEEDS[:1], where)[0])
    assert all(gradient.abs().sum() > 0 for gradient in found[0][1])
    assert_same(found[1], found[0])


def test_what_is_compiled_has_no_replay() -> None:
    """torch.compile refuses a context of ours around a block."""
    asked: list[dict[str, Any]] = []

    class Noting(nn.Linear):
        def gradient_checkpointing_enable(self, how: dict[str, Any]) -> None:
            asked.append(how)

    Rows().checkpoint(Noting(2, 2), compiled=True)
    Rows().checkpoint(Noting(2, 2))
    assert asked == [{"use_reentrant": False}, {"use_reentrant": False, "context_fn": replay_contexts}]


def test_models_that_cannot_recompute_are_refused() -> None:
    class Stubborn(nn.Linear):
        def gradient_checkpointing_enable(self, *_: object) -> None:
            raise ValueError("not supported")

    for model in (nn.Linear(2, 2), Stubborn(2, 2)):
        with pytest.raises(ConfigError, match=f"checkpointing: a {type(model).__name__} cannot recompute"):
            Rows().checkpoint(model)
