"""Tasks on the user's own model and data: classify texts, or predict their next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from rankscope.errors import ConfigError
from rankscope.train.config import StudyConfig, make_generator
from rankscope.train.data_tables import read_table
from rankscope.train.pretrained import (
    PretrainedModel,
    check_causal,
    check_tokens,
    draws_random_numbers,
    head_modules,
    initialise_parameters,
    length_limit,
    padding_id,
    vocabulary_size,
)
from rankscope.train.task import Batch, Split, Task, WindowTask, epoch_indices, file_hash, weighted_mean

MAX_VALIDATION_ROWS = 1000
MAX_LOGITS = 2**25  # numbers that one evaluation pass may make: 128 MiB in float32


def make_hf_task(config: StudyConfig) -> Task:
    """The task ``classify`` or ``lm`` of the settings.

    Raises:
        ConfigError: transformers is not installed; the model cannot be loaded or does not fit the task or the
            data; labels are too few, or new in the evaluation file; there is too little data.
        FormatError: a data file is missing or broken.
    """
    return ClassifyTask(config) if config.task == "classify" else LmTask(config)


class ClassifyTask(Task):
    """A label for each text: cross-entropy on the logits of transformers' sequence classification model.

    Texts are truncated to ``max_length`` or to what the model takes; a batch is padded to its longest.
    """

    metric = "accuracy"
    higher_is_better = True
    full_rate = 2e-4
    peft_task = "SEQ_CLS"

    def __init__(self, config: StudyConfig, evaluation_rows: int = 64) -> None:
        self.config, self.base_name, self.evaluation_rows = config, config.model, evaluation_rows
        texts, labels = read_texts_and_labels(config)
        self.splits = split_rows([len(part) for part in texts], str(config.data))
        self.base = PretrainedModel(str(config.model))
        self.labels = self.base.label_order(find_classes(labels, config))
        index = {label: i for i, label in enumerate(self.labels)}
        self.truth = torch.tensor([index[label] for part in labels for label in part])
        self.pad_id = padding_id(self.base)
        model, self.missing = self._load()
        self.heads = head_modules(model, self.missing, self.base.name)
        self.draws = draws_random_numbers(model)
        self.rows = self._encode([text for part in texts for text in part], model)
        self.longest = max(len(self.rows[place]) for place in self.splits["train"].tolist())
        self.steps = steps_for_epochs(config, len(self.splits["train"]), self.default_batch)

    def _load(self) -> tuple[Any, list[str]]:
        names = dict(enumerate(self.labels))
        model, missing = self.base.model(
            "AutoModelForSequenceClassification",
            num_labels=len(names),
            id2label=names,
            label2id={name: i for i, name in names.items()},
        )
        model.config.pad_token_id = self.pad_id  # decoders read the logits at the last token that is not padding
        return model, missing

    def _encode(self, texts: list[str], model: Any) -> list[Tensor]:
        most = length_limit(model, self.base.tokenizer)
        limit = min(self.config.max_length or most, most)
        special = self.base.tokenizer.num_special_tokens_to_add()
        if limit <= special:
            raise ConfigError(f"max_length = {limit}: {special} of the tokens are the tokenizer's own; give more")
        rows = self.base.encode(texts, truncation=True, max_length=limit)
        check_tokens(rows, model, self.base.name)
        return [torch.tensor(row) for row in rows]

    def model(self, seed: int) -> nn.Module:
        model, missing = self._load()
        initialise_parameters(model, missing, seed)
        out: nn.Module = model.eval()
        return out

    def collate(self, places: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """The rows at these places: ids and mask, both (rows, longest), and labels (rows,).

        Padding is at the end whatever the tokenizer says: at the front it shifts the positions of the text.
        """
        rows = [self.rows[int(place)] for place in places]
        masks = [torch.ones_like(row) for row in rows]
        batch = {"input_ids": pad_sequence(rows, batch_first=True, padding_value=self.pad_id)}
        if "attention_mask" in self.base.tokenizer.model_input_names:
            batch["attention_mask"] = pad_sequence(masks, batch_first=True)
        return {**batch, "labels": self.truth[torch.as_tensor(places)]}

    def batch(self, seed: int, index: int, size: int) -> Batch:
        train = self.splits["train"]
        return self.collate(train[epoch_indices(seed, index, size, len(train))])

    def join(self, batches: Sequence[Batch]) -> Batch:
        """One batch, padded to the longest of all.

        A padded row has the loss and gradient that it has alone; but where ``draws``, dropout of other shape is other
        dropout, so only batches of the same number of ``tokens`` drop the same entries joined and alone. Those of runs
        with the same seed, at the same step, are the same.
        """
        width = max(batch["input_ids"].shape[1] for batch in batches)
        return super().join([{key: self._widen(key, value, width) for key, value in b.items()} for b in batches])

    def _widen(self, key: str, value: Tensor, width: int) -> Tensor:
        if value.ndim < 2:
            return value
        return F.pad(value, (0, width - value.shape[1]), value=self.pad_id if key == "input_ids" else 0)

    def tokens(self, batch: Batch) -> int:
        return batch["input_ids"].numel()

    def tokens_per_example(self) -> int:
        return self.longest

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (rows, labels) in float32."""
        out: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return out.float()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the logits (rows, classes) against the labels (rows,): a scalar."""
        return F.cross_entropy(outputs, batch["labels"])

    def evaluate(self, model: nn.Module, split: Split, device: torch.device) -> dict[str, float]:
        places = sorted(self.splits[split].tolist(), key=lambda place: len(self.rows[place]))
        losses, counts, predicted = [], [], []
        for start in range(0, len(places), self.evaluation_rows):
            batch = {k: v.to(device) for k, v in self.collate(places[start : start + self.evaluation_rows]).items()}
            logits = self.outputs(model, batch)
            losses.append(self.loss(logits, batch))
            counts.append(len(logits))
            predicted.append(logits.argmax(-1))
        guess, truth = torch.cat(predicted).cpu(), self.truth[places]
        accuracy = float((guess == truth).double().mean())
        return {"accuracy": accuracy, "macro_f1": macro_f1(truth, guess), "loss": weighted_mean(losses, counts)}

    def fingerprint(self) -> dict[str, str]:
        return {**self.base.fingerprint(), **data_fingerprint(self.config)}


class LmTask(WindowTask):
    """The next token of running text: documents joined by the end-of-text token, cut into windows."""

    full_rate = 2e-4
    peft_task = "CAUSAL_LM"

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.base_name = config, config.model
        tables = read_data_tables(config, (config.text,))
        texts = [table[config.text] for table in tables]
        splits = split_rows([len(part) for part in texts], str(config.data))
        self.base = PretrainedModel(str(config.model))
        model = self._load()
        rows = self.base.encode([text for part in texts for text in part], add_special_tokens=False)
        check_tokens(rows, model, self.base.name)
        length = min(config.max_length or 256, length_limit(model, self.base.tokenizer))
        parts = {name: self._join([rows[i] for i in places.tolist()]) for name, places in splits.items()}
        for name, tokens in parts.items():
            if len(tokens) < length:
                few = f"the {name} part has {len(tokens)} tokens, fewer than one window of {length}"
                raise ConfigError(f"{config.data}: {few}; give more text or a smaller max_length")
        super().__init__(parts["train"], parts["validation"], parts["test"], length)
        check_causal(model, self.train[:length], self.base.name)
        self.evaluation_rows = max(1, min(self.evaluation_rows, MAX_LOGITS // (length * vocabulary_size(model))))
        self.draws = draws_random_numbers(model)
        self.steps = steps_for_epochs(config, len(self.train) // length, self.default_batch)

    def _join(self, documents: list[list[int]]) -> Tensor:
        between = self.base.tokenizer.eos_token_id
        joined: list[int] = []
        for i, document in enumerate(documents):
            joined += ([between] if i and between is not None else []) + document
        return torch.tensor(joined, dtype=torch.int32)

    def _load(self) -> Any:
        model, missing = self.base.model("AutoModelForCausalLM")
        if missing:
            lacks = f"its files lack {len(missing)} of the weights, such as {missing[0]}"
            raise ConfigError(f"model {self.base.name!r}: {lacks}, so it cannot predict the next token")
        return model

    def model(self, seed: int) -> nn.Module:
        out: nn.Module = self._load().eval()
        return out

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (batch, length, vocabulary)."""
        out: Tensor = model(input_ids=batch["tokens"]).logits
        return out

    def fingerprint(self) -> dict[str, str]:
        return {**self.base.fingerprint(), **data_fingerprint(self.config)}


def read_data_tables(config: StudyConfig, columns: Sequence[str]) -> list[dict[str, list[Any]]]:
    """The tables of ``data`` and, where there is one, of ``eval``; the texts are strings."""
    paths = [path for path in (config.data, config.eval) if path is not None]
    tables = [read_table(path, columns) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        for row, text in enumerate(table[config.text], 1):
            if not isinstance(text, str):
                raise ConfigError(f"{path}, entry {row}: {config.text!r} holds a {type(text).__name__}, not text")
    return tables


def read_texts_and_labels(config: StudyConfig) -> tuple[list[list[str]], list[list[str]]]:
    """Texts and labels of each file."""
    if config.text == config.label:
        raise ConfigError(f"text and label are both {config.text!r}; name two columns")
    tables = read_data_tables(config, (config.text, config.label))
    paths = (config.data, config.eval)
    labels = [label_names(table[config.label], str(path)) for table, path in zip(tables, paths, strict=False)]
    return [table[config.text] for table in tables], labels


def label_names(values: list[Any], where: str) -> list[str]:
    """Labels as strings: 1, 1.0 and "1" are one label, since not every kind of file can tell them apart."""
    names = []
    for row, value in enumerate(values, 1):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, str | int):
            raise ConfigError(f"{where}, entry {row}: {value!r} is no label; labels are names or whole numbers")
        names.append(str(value))
    return names


def find_classes(labels: list[list[str]], config: StudyConfig) -> list[str]:
    """The classes of the training file: whole numbers by value, anything else by name."""
    names = sorted(set(labels[0]))
    if len(names) < 2:
        raise ConfigError(f"{config.data}: every {config.label!r} is {names[0]!r}; classification needs two")
    if len(names) == len(labels[0]) > 2:
        raise ConfigError(f"{config.data}: no two rows share a {config.label!r}; is it the column of labels?")
    unknown = sorted(set(labels[-1]) - set(names))
    if unknown:
        raise ConfigError(f"{config.eval}: label {unknown[0]!r} does not occur in {config.data}")
    try:
        return sorted(names, key=int)
    except ValueError:
        return names


def split_rows(counts: list[int], where: str) -> dict[str, Tensor]:
    """Rows of each split, when the rows of all files follow each other; the same for every seed.

    With a second file it is the test split and a tenth of the first is for validation; with one file
    a tenth each. Validation is looked at over and over: it takes ``MAX_VALIDATION_ROWS`` rows at most.
    """
    order = torch.randperm(counts[0], generator=make_generator("split"))
    tenth = max(1, counts[0] // 10)
    validation, rest = order[: min(tenth, MAX_VALIDATION_ROWS)], order[min(tenth, MAX_VALIDATION_ROWS) :]
    test, train = (torch.arange(counts[0], sum(counts)), rest) if counts[1:] else (rest[:tenth], rest[tenth:])
    if not len(train) or not len(test):
        raise ConfigError(f"{where}: {counts[0]} rows are too few to hold some out; give more")
    return {"train": train, "validation": validation, "test": test}


def steps_for_epochs(config: StudyConfig, examples: int, default_batch: int) -> int:
    """``steps``, or as many as ``epochs`` need."""
    return config.steps or math.ceil(config.epochs * examples / ((config.batch or default_batch) * config.accumulate))


def macro_f1(truth: Tensor, predicted: Tensor) -> float:
    """Mean over classes of F1 = 2·hits / (true + predicted), of true and predicted classes (examples,).

    Classes in neither are left out, as in scikit-learn.
    """
    scores = []
    for label in {*truth.tolist(), *predicted.tolist()}:
        hits = ((truth == label) & (predicted == label)).sum()
        scores.append(2 * float(hits) / float((truth == label).sum() + (predicted == label).sum()))
    return sum(scores) / len(scores)


def data_fingerprint(config: StudyConfig) -> dict[str, str]:
    """Names and sha256 of the data files, without the way to them."""
    identity: dict[str, str] = {}
    for key, path in (("data", config.data), ("eval", config.eval)):
        if path is not None:
            identity |= {key: Path(path).name, f"{key}_sha256": file_hash(Path(path))}
    return identity
