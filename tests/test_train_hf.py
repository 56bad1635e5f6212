"""Tasks on transformers' models: tiny ones made here, checked against transformers' own losses, padding and heads."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_makers import WORDS, enlarge_weights, save_byte_tokenizer, save_word_tokenizer
from torch.nn import functional as F

from rankscope.errors import ConfigError, FormatError, RankscopeError
from rankscope.train import hf
from rankscope.train.config import StudyConfig
from rankscope.train.hf import ClassifyTask, LmTask, macro_f1, make_hf_task
from rankscope.train.pretrained import PretrainedModel, check_tokens, draws_random_numbers, dtype_keyword, length_limit
from rankscope.train.tasks import make_task

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    t, root = transformers, tmp_path_factory.mktemp("models")
    bert = {"vocab_size": 44, "max_position_embeddings": 32, "pad_token_id": 0, **SMALL}
    llama = t.LlamaConfig(vocab_size=257, max_position_embeddings=64, num_key_value_heads=1, pad_token_id=None, **SMALL)
    gpt2 = t.GPT2Config(
        vocab_size=257, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256
    )
    models = {
        "bert": t.BertModel(t.BertConfig(**bert)),
        "bare": t.BertModel(t.BertConfig(**bert), add_pooling_layer=False),
        "headed": t.BertForSequenceClassification(
            t.BertConfig(**bert, id2label={0: "up", 1: "down"}, label2id={"up": 0, "down": 1})
        ),
        "roberta": t.RobertaModel(t.RobertaConfig(**{**bert, "max_position_embeddings": 12, "pad_token_id": 0})),
        "masked": t.BertForMaskedLM(t.BertConfig(**bert)),
        "llama": t.LlamaForCausalLM(llama),
        "gpt2": t.GPT2LMHeadModel(gpt2),
    }
    with hf_quiet():
        for name, model in models.items():
            enlarge_weights(model).save_pretrained(root / name)
            if name in ("llama", "gpt2"):  # one of them ends each text, with what it is then padded with
                save_byte_tokenizer(root / name, added="<end>" * (name == "llama"), eos_token="<end>")
            else:
                save_word_tokenizer(root / name)
    return {name: root / name for name in models}


def hf_quiet() -> Any:
    from rankscope.train.pretrained import silence_transformers

    return silence_transformers(transformers)


def save_bert(folder: Path) -> None:
    """A small encoder with its tokenizer."""
    shape = {"vocab_size": 44, "max_position_embeddings": 32, "pad_token_id": 0, **SMALL}
    with hf_quiet():
        enlarge_weights(transformers.BertModel(transformers.BertConfig(**shape))).save_pretrained(folder)
    save_word_tokenizer(folder)


def classified(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of 1 to 20 words; "up" if w0 is among them."""
    source = random.Random(seed)
    texts = [source.choices(WORDS[1:], k=source.randint(1, 20)) for _ in range(count)]
    return [
        {"text": " ".join([*words, *["w0"] * (i % 2)]), "label": ("down", "up")[i % 2]} for i, words in enumerate(texts)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(tmp_path: Path, model: Path | str, rows: list[dict[str, Any]] | None = None, **more: Any) -> StudyConfig:
    data = write(tmp_path / "data.jsonl", classified(60) if rows is None else rows)
    return StudyConfig(**{"task": "classify", "model": str(model), "data": data, **more})


def classifier(
    tmp_path: Path, model: Path | str, rows: list[dict[str, Any]] | None = None, **more: Any
) -> ClassifyTask:
    task = make_task(settings(tmp_path, model, rows, **more))
    assert isinstance(task, ClassifyTask)
    return task


def documents(count: int = 40) -> list[dict[str, Any]]:
    return [{"text": f"Document {i}: " + " ".join(random.Random(i).choices(WORDS, k=12)) + "."} for i in range(count)]


def lm(tmp_path: Path, model: Path | str, rows: list[dict[str, Any]] | None = None, **more: Any) -> LmTask:
    task = make_hf_task(settings(tmp_path, model, documents() if rows is None else rows, task="lm", **more))
    assert isinstance(task, LmTask)
    return task


# Classification


@pytest.mark.parametrize("name", ["bert", "bare", "roberta", "llama", "gpt2"])
def test_metrics_are_transformers_own_on_single_rows(tmp_path: Path, folders: dict[str, Path], name: str) -> None:
    """One row at a time there is no padding, so this is also padding invariance; decoders here have no pad token."""
    task = classifier(tmp_path, folders[name])
    model: Any = enlarge_weights(task.model(0))
    truth, losses, right = [], [], []
    for place in task.splits["test"].tolist():
        out = model(input_ids=task.rows[place][None], labels=task.truth[place][None])
        alone = task.outputs(model, task.collate([place]))
        assert torch.equal(alone, out.logits)
        truth.append(out.logits.detach())
        losses.append(out.loss.item())
        right.append(bool(out.logits.argmax() == task.truth[place]))
    together = task.outputs(model, task.collate(task.splits["test"]))
    # Float32 sums over some 20 tokens and 16 features in another order.
    torch.testing.assert_close(together, torch.cat(truth), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        found = task.evaluate(model, "test", CPU)
        task.evaluation_rows = 2
        again = task.evaluate(model, "test", CPU)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert again == pytest.approx(found, rel=1e-5)
    assert len({row.numel() for row in task.rows}) > 5
    assert together.std(dim=0).max() > 0.1  # rows differ: equal logits would prove nothing


def test_batches_are_those_of_transformers_collator(tmp_path: Path, folders: dict[str, Path]) -> None:
    rows = classified(60)
    task = classifier(tmp_path, folders["bert"], rows, max_length=9)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bert"])
    places = [3, 1, 4, 15]
    with hf_quiet():
        encoded = [tokenizer(rows[i]["text"], truncation=True, max_length=9) for i in places]
        expected = transformers.DataCollatorWithPadding(tokenizer)(encoded)
    batch = task.collate(places)
    assert batch["input_ids"].shape == (4, 9)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert batch["labels"].tolist() == [1, 1, 0, 1]
    assert task.labels == ["down", "up"]


def test_an_epoch_shows_every_training_row_once(tmp_path: Path, folders: dict[str, Path]) -> None:
    rows = [{"text": f"w{i % 40} w{i // 40}", "label": i % 3} for i in range(80)]
    task = classifier(tmp_path, folders["bert"], rows, batch=8, epochs=1.5)
    assert {name: len(part) for name, part in task.splits.items()} == {"train": 64, "validation": 8, "test": 8}
    assert sorted(torch.cat(list(task.splits.values())).tolist()) == list(range(80))
    seen = torch.cat([task.batch(5, i, 8)["input_ids"] for i in range(8)])
    wanted = torch.stack([task.rows[i] for i in task.splits["train"].tolist()])
    assert sorted(seen.tolist()) == sorted(wanted.tolist())
    assert torch.equal(task.batch(5, 3, 8)["input_ids"], task.batch(5, 3, 8)["input_ids"])
    assert not torch.equal(task.batch(5, 3, 8)["input_ids"], task.batch(6, 3, 8)["input_ids"])
    assert task.steps == 12  # 1.5 · 64 / 8
    assert classifier(tmp_path, folders["bert"], rows, batch=8, accumulate=3, epochs=1.0).steps == 3  # ⌈64 / 24⌉
    assert classifier(tmp_path, folders["bert"], rows, steps=7).steps == 7


def test_eval_file_is_the_test_split(tmp_path: Path, folders: dict[str, Path]) -> None:
    held_out = write(tmp_path / "eval.jsonl", classified(10, seed=9))
    task = classifier(tmp_path, folders["bert"], classified(60), eval=held_out)
    assert {name: len(part) for name, part in task.splits.items()} == {"train": 54, "validation": 6, "test": 10}
    own = task.base.tokenizer([row["text"] for row in classified(10, seed=9)])["input_ids"]
    assert [task.rows[i].tolist() for i in task.splits["test"].tolist()] == own
    assert set(task.fingerprint()) == {"base", "base_sha256", "data", "data_sha256", "eval", "eval_sha256"}


def test_learns_what_can_be_learned(tmp_path: Path, folders: dict[str, Path]) -> None:
    rows = [{"text": f"w{1 + i % 2}", "label": i % 2} for i in range(40)]
    task = classifier(tmp_path, folders["bert"], rows)
    model = task.model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(20):
        optimizer.zero_grad()
        batch = task.batch(0, step, 8)
        task.loss(task.outputs(model, batch), batch).backward()
        optimizer.step()
    with torch.no_grad():
        assert task.evaluate(model, "validation", CPU)["accuracy"] == 1.0


def test_loss_is_computed_in_float32(tmp_path: Path, folders: dict[str, Path]) -> None:
    task = classifier(tmp_path, folders["bert"])
    model, batch = task.model(0), task.batch(0, 0, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = task.loss(task.outputs(model, batch), batch)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(logits.double(), batch["labels"]).item(), rel=1e-6)
    assert task.loss(task.outputs(model.to(torch.bfloat16), batch), batch).dtype == torch.float32


def test_evaluation_pads_little(tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of like length are evaluated together."""
    task = classifier(tmp_path, folders["bert"])
    model, widths = task.model(0), []
    model.register_forward_pre_hook(lambda _, __, given: widths.append(given["input_ids"].shape), with_kwargs=True)
    task.evaluation_rows = 2
    with torch.no_grad():
        task.evaluate(model, "test", CPU)
    lengths = sorted(task.rows[i].numel() for i in task.splits["test"].tolist())
    assert widths == [(2, lengths[1]), (2, lengths[3]), (2, lengths[5])]


def gradients(task: Any, model: Any, batches: list[Any]) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Loss of each batch and its gradient, from one pass over all."""
    joined, n = task.join(batches), len(batches)
    parts = {key: value.chunk(n) for key, value in joined.items()}
    outputs = task.outputs(model, joined).chunk(n)
    losses = [task.loss(out, {key: value[i] for key, value in parts.items()}) for i, out in enumerate(outputs)]
    where = list(model.parameters())
    return [(loss, list(torch.autograd.grad(loss, where, retain_graph=True))) for loss in losses]


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("classify", name) for name in ("bert", "roberta", "llama", "gpt2")), ("lm", "llama"), ("lm", "gpt2")],
)
def test_a_joined_batch_gives_each_run_what_it_has_alone(
    tmp_path: Path, folders: dict[str, Path], name: str, kind: str
) -> None:
    """Padding to the longest of all changes nothing: decoders, too, read the last token that is none."""
    task: Any = classifier(tmp_path, folders[name]) if kind == "classify" else lm(tmp_path, folders[name])
    model: Any = enlarge_weights(task.model(0))
    batches = [task.batch(seed, 0, 2) for seed in (0, 1, 2)]
    joined = task.join(batches)
    if kind == "classify":
        widths = [batch["input_ids"].shape[1] for batch in batches]
        assert len(set(widths)) > 1
        assert joined["input_ids"].shape == (6, max(widths))
        assert task.tokens(joined) == 6 * max(widths) <= 6 * task.tokens_per_example()
        assert task.tokens_per_example() == max(len(task.rows[place]) for place in task.splits["train"].tolist())
    else:
        assert task.tokens(joined) == 6 * task.tokens_per_example() == 6 * task.length
    assert task.can_share(task.model(0), CPU)
    model.eval()
    for (loss, together), batch in zip(gradients(task, model, batches), batches, strict=True):
        [(expected, alone)] = gradients(task, model, [batch])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for a, b in zip(together, alone, strict=True):
            # Float32 sums over some 20 tokens in another order.
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-7)


def test_which_bases_draw(tmp_path: Path, folders: dict[str, Path]) -> None:
    assert {name: classifier(tmp_path, folders[name]).draws for name in ("bert", "gpt2", "llama")} == {
        "bert": True,
        "gpt2": True,
        "llama": False,
    }
    assert (lm(tmp_path, folders["gpt2"]).draws, lm(tmp_path, folders["llama"]).draws) == (True, False)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

    def bert(**more: Any) -> Any:
        config = transformers.BertConfig(vocab_size=44, **SMALL, **{**none, **more})
        return transformers.BertForSequenceClassification(config)

    assert not draws_random_numbers(bert())
    assert draws_random_numbers(bert(attention_probs_dropout_prob=0.1))  # eager attention has no module for it
    assert draws_random_numbers(bert(router_jitter_noise=0.01))
    assert draws_random_numbers(bert(text={"layerdrop": 0.5}))
    assert not draws_random_numbers(bert(use_dropout=True, text={"layerdrop": 0.0}))
    model = bert()
    model.bert.encoder.layer[1].output.dropout = torch.nn.Dropout(0.2)
    assert draws_random_numbers(model)


def test_default_rates_and_batch(tmp_path: Path, folders: dict[str, Path]) -> None:
    for task in (classifier(tmp_path, folders["bert"]), lm(tmp_path, folders["llama"])):
        assert task.learning_rates(full=True) == (6e-5, 2e-4, 6e-4)
        assert task.learning_rates(full=False) == (6e-4, 2e-3, 6e-3)
        assert task.default_batch == 16
    assert classifier(tmp_path, folders["bert"], epochs=1.0).steps == 3  # 48 rows, 16 at a time
    assert classifier(tmp_path, folders["bert"], epochs=1.0, batch=8).steps == 6


def test_macro_f1_closed_form() -> None:
    truth, predicted = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 3])
    # Class 0: precision 1, recall 1/2. Class 1: 2/3, 1. Classes 2 and 3 are never hit; class 4 is in neither.
    assert macro_f1(truth, predicted) == pytest.approx((2 / 3 + 4 / 5 + 0 + 0) / 4)
    assert macro_f1(truth, truth) == 1.0
    assert macro_f1(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0])) == pytest.approx((6 / 7 + 0) / 2)


def test_labels_of_any_kind_of_file(tmp_path: Path, folders: dict[str, Path]) -> None:
    rows = [{"text": "w1", "label": label} for label in (10, 9, "10", 9.0, 2, 2)]
    task = classifier(tmp_path, folders["bert"], rows)
    assert task.labels == ["2", "9", "10"]
    assert task.truth.tolist() == [2, 1, 2, 1, 0, 0]
    model: Any = task.model(0)
    assert model.config.id2label == {0: "2", 1: "9", 2: "10"}
    assert model.config.label2id == {"2": 0, "9": 1, "10": 2}
    mixed = [{"text": "w1", "label": label} for label in ("b", 10, 9, "b", 10, 9)]
    assert classifier(tmp_path, folders["bert"], mixed).labels == ["10", "9", "b"]


# Heads


def test_new_head_depends_on_the_seed_alone(tmp_path: Path, folders: dict[str, Path]) -> None:
    rows = [{"text": "w1", "label": i % 50} for i in range(100)]
    task = classifier(tmp_path, folders["bare"], rows)
    assert task.heads == ("bert.pooler", "classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = task.model(3).state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        second = classifier(tmp_path, folders["bare"], rows).model(3).state_dict()
    other = task.model(4).state_dict()
    base = transformers.BertModel.from_pretrained(folders["bare"], add_pooling_layer=False).state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert value.dtype == torch.float32
        fresh = name.startswith(("bert.pooler", "classifier"))
        assert torch.equal(value, other[name]) != (fresh and name.endswith("weight")), name
        assert fresh or torch.equal(value, base[name.removeprefix("bert.")])
        assert not (fresh and name.endswith("bias")) or not value.any()
    # 800 normal numbers: their deviation is right within 1/√1600 = 2.5 %, three times that allowed.
    assert first["classifier.weight"].std().item() == pytest.approx(0.02, rel=0.075)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
def test_heads_are_what_peft_trains_and_saves(tmp_path: Path, folders: dict[str, Path]) -> None:
    peft = pytest.importorskip("peft")
    expected = {"bert": {"classifier"}, "bare": {"classifier", "bert.pooler"}, "llama": {"score"}, "gpt2": {"score"}}
    for name, heads in {**expected, "roberta": {"classifier"}, "headed": {"classifier"}}.items():
        task = classifier(tmp_path, folders[name])
        assert set(task.heads) == heads
        wanted = peft.LoraConfig(
            task_type=task.peft_task,
            r=2,
            target_modules="all-linear",
            modules_to_save=list(task.heads),
            fan_in_fan_out=name == "gpt2",
        )
        with hf_quiet():
            adapted = peft.get_peft_model(task.model(0), wanted)
        trained = {n for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n}
        fresh = {n for n, _ in task.model(0).named_parameters() if n.startswith(tuple(f"{h}." for h in heads))}
        assert {n.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for n in trained} == fresh


def test_a_head_for_the_same_labels_is_kept_with_its_order(tmp_path: Path, folders: dict[str, Path]) -> None:
    task = classifier(tmp_path, folders["headed"])
    assert task.labels == ["up", "down"]
    assert task.missing == []
    stored = transformers.BertForSequenceClassification.from_pretrained(folders["headed"]).classifier.weight
    assert torch.equal(task.model(0).get_parameter("classifier.weight"), stored)


def test_a_head_for_other_labels_is_drawn_anew(tmp_path: Path, folders: dict[str, Path]) -> None:
    task = classifier(tmp_path, folders["headed"], [{"text": "w1", "label": i % 3} for i in range(60)])
    assert task.missing == ["classifier.weight", "classifier.bias"]
    weight = task.model(0).get_parameter("classifier.weight")
    assert weight.shape == (3, 16)
    assert weight.abs().max() < 0.1  # five deviations of .02; the stored one has .3
    assert torch.equal(weight, task.model(0).get_parameter("classifier.weight"))


def test_a_head_that_is_new_in_part_is_trained_whole(tmp_path: Path, folders: dict[str, Path]) -> None:
    config = transformers.RobertaConfig.from_pretrained(folders["roberta"], num_labels=2)
    folder = copied(folders, "roberta", tmp_path / "headed")
    with hf_quiet():
        transformers.RobertaForSequenceClassification(config).save_pretrained(folder)
    task = classifier(tmp_path, folder, [{"text": "w1", "label": i % 3} for i in range(60)])
    assert task.missing == ["classifier.out_proj.weight", "classifier.out_proj.bias"]
    assert task.heads == ("classifier",)


# Lengths


def test_lengths(tmp_path: Path, folders: dict[str, Path]) -> None:
    long = [{"text": " ".join(["w1"] * 50), "label": i % 2} for i in range(10)]
    for name, most in {"bert": 32, "roberta": 11}.items():  # RoBERTa: 12 positions, counted from padding index + 1 = 1
        task = classifier(tmp_path, folders[name], long)
        assert {row.numel() for row in task.rows} == {most}
        assert task.rows[0][-1] == 3  # [SEP] stays
        with torch.no_grad():
            task.evaluate(task.model(0), "test", CPU)
    assert {row.numel() for row in classifier(tmp_path, folders["bert"], long, max_length=7).rows} == {7}
    assert {row.numel() for row in classifier(tmp_path, folders["bert"], long, max_length=999).rows} == {32}
    with pytest.raises(ConfigError, match="max_length = 2: 2 of the tokens are the tokenizer's own"):
        classifier(tmp_path, folders["bert"], long, max_length=2)


def test_the_tokenizers_own_limit_counts(folders: dict[str, Path]) -> None:
    base = PretrainedModel(str(folders["bert"]))
    model, _ = base.model("AutoModel")
    assert length_limit(model, base.tokenizer) == 32
    base.tokenizer.model_max_length = 20
    assert length_limit(model, base.tokenizer) == 20


# Language models


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loss_and_perplexity_are_transformers_own(
    tmp_path: Path, folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = lm(tmp_path, folders[name], max_length=16)
    model: Any = task.model(0)
    tokens = task.held_out["test"].long()
    windows = [tokens[i : i + 16][None] for i in range(0, len(tokens) - 15, 16)]
    with torch.no_grad():
        expected = sum(model(input_ids=w, labels=w).loss.item() for w in windows) / len(windows)
        found = task.evaluate(model, "test", CPU)
        task.evaluation_rows = 3
        again = task.evaluate(model, "test", CPU)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert again == pytest.approx(found, rel=1e-4)
    assert [len(rows) for rows in task.windows("test")][:2] == [3, 3]
    monkeypatch.setattr(hf, "MAX_LOGITS", 5 * 16 * 257)
    assert lm(tmp_path, folders[name], max_length=16).evaluation_rows == 5


def test_documents_stay_whole_and_apart(tmp_path: Path, folders: dict[str, Path]) -> None:
    task = lm(tmp_path, folders["llama"], max_length=16, batch=4, epochs=2.0)
    parts = {"train": task.train, **task.held_out}
    texts = {name: task.base.tokenizer.decode(tokens).split("<end>") for name, tokens in parts.items()}
    assert {name: len(part) for name, part in texts.items()} == {"train": 32, "validation": 4, "test": 4}
    assert sorted(text for part in texts.values() for text in part) == sorted(row["text"] for row in documents())
    assert task.steps == math.ceil(2 * (len(task.train) // 16) / 4)
    assert task.batch(0, 0, 4)["tokens"].shape == (4, 16)
    held_out = write(tmp_path / "eval.jsonl", [{"text": "Something else entirely."}])
    other = lm(tmp_path, folders["llama"], max_length=16, eval=held_out)
    assert other.base.tokenizer.decode(other.held_out["test"]) == "Something else entirely."
    assert other.length == 16


def test_window_length(tmp_path: Path, folders: dict[str, Path]) -> None:
    assert lm(tmp_path, folders["gpt2"]).length == 64  # the model's most; the default is 256
    assert lm(tmp_path, folders["gpt2"], max_length=999).length == 64


def test_gradients_reach_the_language_model(tmp_path: Path, folders: dict[str, Path]) -> None:
    task = lm(tmp_path, folders["llama"], max_length=16)
    model = task.model(0)
    batch = task.batch(0, 0, 4)
    task.loss(task.outputs(model, batch), batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# Identity, quiet, network


def test_fingerprint_holds_no_paths(tmp_path: Path, folders: dict[str, Path]) -> None:
    found = classifier(tmp_path, folders["bert"]).fingerprint()
    weights = hashlib.sha256((folders["bert"] / "model.safetensors").read_bytes()).hexdigest()
    data = hashlib.sha256((tmp_path / "data.jsonl").read_bytes()).hexdigest()
    assert found == {"base": "bert", "base_sha256": weights, "data": "data.jsonl", "data_sha256": data}


def test_shards_are_read_and_all_hashed(tmp_path: Path, folders: dict[str, Path]) -> None:
    whole = PretrainedModel(str(folders["gpt2"]))
    model, _ = whole.model("AutoModelForCausalLM")
    parts = tmp_path / "parts"
    with hf_quiet():
        model.save_pretrained(parts, max_shard_size="20KB")
    save_byte_tokenizer(parts, eos_token="<end>")
    shards = sorted(parts.glob("model-*.safetensors"))
    assert len(shards) > 1
    base = PretrainedModel(str(parts))
    again, missing = base.model("AutoModelForCausalLM")
    assert missing == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    first = base.fingerprint()
    assert first == base.fingerprint()
    shutil.copy(shards[0], shards[-1])
    assert base.fingerprint()["base_sha256"] != first["base_sha256"]


def test_half_precision_checkpoints_come_up_in_float32(tmp_path: Path, folders: dict[str, Path]) -> None:
    base = PretrainedModel(str(folders["gpt2"]))
    model, _ = base.model("AutoModelForCausalLM")
    with hf_quiet():
        model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    save_byte_tokenizer(tmp_path / "half", eos_token="<end>")
    again, _ = PretrainedModel(str(tmp_path / "half")).model("AutoModelForCausalLM")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert dtype_keyword("5.23.0") == dtype_keyword("4.56.1") == "dtype"
    assert dtype_keyword("4.48.0.dev0") == "torch_dtype"


def test_a_folder_is_silent_and_offline(
    tmp_path: Path, folders: dict[str, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    log = transformers.utils.logging
    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    monkeypatch.setattr(listener, "emit", said.append)
    log.add_handler(listener)
    was = log.get_verbosity()
    log.set_verbosity_info()
    assert log.is_progress_bar_enabled()
    classifier(tmp_path, folders["bare"]).model(0)
    lm(tmp_path, folders["gpt2"], max_length=16).model(0)
    with pytest.raises(ConfigError):
        lm(tmp_path, folders["bert"])
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == (log.INFO, True)
    log.set_verbosity(was)
    log.remove_handler(listener)
    assert said == []
    assert capfd.readouterr() == ("", "")


def test_a_hub_id_is_found_in_the_cache(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match="model 'someone/tiny': transformers' AutoTokenizer cannot load it"):
        PretrainedModel("someone/tiny")
    entry = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folders["bert"], entry / "snapshots" / ("0" * 40))
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0" * 40)
    task = classifier(tmp_path, "someone/tiny")
    assert task.base_name == "someone/tiny"
    local = classifier(tmp_path, folders["bert"])
    assert task.fingerprint() == {**local.fingerprint(), "base": "someone/tiny"}
    assert torch.equal(
        task.model(0).get_parameter("classifier.weight"), local.model(0).get_parameter("classifier.weight")
    )


# What goes wrong


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for task in ("classify", "lm"):
        with pytest.raises(ConfigError, match=r'needs transformers .*pip install "rankscope\[hf\]"'):
            make_hf_task(settings(tmp_path, "x", task=task))


def copied(folders: dict[str, Path], name: str, target: Path) -> Path:
    shutil.copytree(folders[name], target)
    return target


def one_sentence(tmp_path: Path, model: Path | str, message: str, **more: Any) -> None:
    with pytest.raises(RankscopeError) as caught:
        make_hf_task(settings(tmp_path, model, **more))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_models_that_cannot_be_used(tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, base: str = "bert") -> Path:
        return copied(folders, base, tmp_path / name)

    one_sentence(tmp_path, tmp_path / "nothing", "neither a folder nor an id of the hub")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.bin").write_bytes(b"")
    one_sentence(tmp_path, "file.bin", "neither a folder nor an id of the hub")
    (tmp_path / "empty").mkdir()
    one_sentence(tmp_path, tmp_path / "empty", "cannot load it (")
    (broken("adapter") / "adapter_config.json").write_text("{}")
    one_sentence(tmp_path, tmp_path / "adapter", "an adapter, not a whole model; merge it into its base first")
    (broken("no weights") / "model.safetensors").unlink()
    one_sentence(tmp_path, tmp_path / "no weights", "AutoModelForSequenceClassification cannot load it (")
    weights = broken("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    one_sentence(tmp_path, tmp_path / "cut", "cannot load it (")
    (broken("config") / "config.json").write_text('{"model_type": "nonsense"')
    one_sentence(tmp_path, tmp_path / "config", "cannot load it (")
    (broken("kind") / "config.json").write_text('{"model_type": "nonsense"}')
    one_sentence(tmp_path, tmp_path / "kind", "cannot load it (")


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_a_folder_without_tokenizer(tmp_path: Path, folders: dict[str, Path], name: str) -> None:
    folder = copied(folders, name, tmp_path / "bald")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        classifier(tmp_path, folder)


def test_weights_of_the_base_itself_are_missing(tmp_path: Path, folders: dict[str, Path]) -> None:
    from safetensors.torch import load_file, save_file

    for lost in ("encoder.layer.1.", "embeddings.", ""):
        folder = copied(folders, "bert", tmp_path / f"without {lost}")
        kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith(lost)}
        save_file(kept or {"stranger": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
        one_sentence(tmp_path, folder, f"its files lack the weights of bert{'.' * bool(lost)}{lost.rstrip('.')};")


def test_tokenizers_that_do_not_fit(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = copied(folders, "bert", tmp_path / "byte-level")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    save_byte_tokenizer(folder, eos_token="<end>")
    one_sentence(tmp_path, folder, "but it has 44 embeddings")
    folder = copied(folders, "gpt2", tmp_path / "no end")
    save_byte_tokenizer(folder)
    one_sentence(tmp_path, folder, "neither a padding nor an end-of-text token")
    model, _ = PretrainedModel(str(folders["bert"])).model("AutoModel")
    with pytest.raises(ConfigError, match="makes nothing of text 2"):
        check_tokens([[1, 2], [], [3]], model, "bert")


def test_models_that_cannot_predict_the_next_token(tmp_path: Path, folders: dict[str, Path]) -> None:
    rows = documents()
    one_sentence(tmp_path, folders["bert"], "its files lack ", task="lm", rows=rows)
    one_sentence(tmp_path, folders["masked"], "looks ahead", task="lm", rows=rows, max_length=8)


def test_data_that_does_not_fit(tmp_path: Path, folders: dict[str, Path]) -> None:
    bert = folders["bert"]
    one_sentence(tmp_path, bert, "name two columns", label="text")
    one_sentence(tmp_path, bert, "no column 'genre'; there are 'text', 'label'", label="genre")
    one_sentence(tmp_path, bert, "no such file", eval=str(tmp_path / "none.csv"))
    one_sentence(tmp_path, bert, "entry 1: 'text' holds a int, not text", rows=[{"text": 1, "label": 1}])
    for label in (0.5, [1], {"a": 1}):
        one_sentence(tmp_path, bert, f"{label!r} is no label", rows=[{"text": "w1", "label": label}])
    one_sentence(tmp_path, bert, "every 'label' is '1'", rows=[{"text": "w1", "label": 1}] * 9)
    rows = [{"text": "w1", "label": f"name {i}"} for i in range(9)]
    one_sentence(tmp_path, bert, "no two rows share a 'label'", rows=rows)
    one_sentence(tmp_path, bert, "2 rows are too few", rows=classified(2))
    strange = write(tmp_path / "eval.jsonl", [{"text": "w1", "label": "sideways"}])
    one_sentence(tmp_path, bert, "eval.jsonl: label 'sideways' does not occur in", eval=strange)
    one_sentence(tmp_path, folders["gpt2"], "fewer than one window of 64", task="lm", rows=[{"text": "abc"}] * 5)
    blank = [{"text": "\u200b", "label": i % 2} for i in range(9)]
    with pytest.raises(FormatError, match="is empty"):
        classifier(tmp_path, bert, [{"text": " ", "label": 1}])
    assert len(classifier(tmp_path, bert, blank).rows) == 9  # [CLS] [UNK] [SEP]: odd, but text


def test_dropout_of_the_base_is_the_runs_own(tmp_path: Path, folders: dict[str, Path]) -> None:
    """BERT drops from torch's global stream: a run must not depend on it, nor on being stopped half-way."""
    from rankscope.train.events import Silent
    from rankscope.train.loop import InterruptedTrainingError
    from rankscope.train.study import Study, run_study

    config = settings(
        tmp_path, folders["bert"], classified(60), ranks=(2,), full=False, steps=6, batch=8, targets=("query,value",)
    )

    def learned(study: Study) -> list[torch.Tensor]:
        store = study.store(study.done()[-1].run)
        return [store[name].dense() for name in store]

    whole = learned(run_study(config, tmp_path / "whole"))
    torch.rand(5)
    state = torch.get_rng_state()
    asked = iter([False] * 3 + [True])
    with pytest.raises(InterruptedTrainingError):
        run_study(config, tmp_path / "cut", Silent(), lambda: next(asked))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(whole, learned(run_study(config, tmp_path / "cut")), strict=True):
        assert torch.equal(a, b)
        assert a.norm() > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
def test_an_adapter_with_its_head_gives_peft_the_same_logits(tmp_path: Path, folders: dict[str, Path]) -> None:
    import peft

    from rankscope.lora import load
    from rankscope.train.study import run_study

    config = settings(
        tmp_path, folders["bert"], classified(60), ranks=(2,), full=False, steps=6, batch=8, targets=("query,value",)
    )
    study = run_study(config, tmp_path / "study")
    adapter = study.path(study.done()[-1].run) / "adapter"
    task = ClassifyTask(config)
    batch = {key: value for key, value in task.batch(0, 0, 8).items() if key in ("input_ids", "attention_mask")}
    ours = task.model(0)
    with torch.no_grad():
        untrained = ours.eval()(**batch).logits
        load(ours, adapter)
        theirs = peft.PeftModel.from_pretrained(task.model(1), adapter).eval()
        expected = theirs(**batch).logits
        assert torch.allclose(ours.eval()(**batch).logits, expected, atol=1e-5)
        assert (untrained - expected).abs().max() > 1e-3
