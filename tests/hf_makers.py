"""Tokenizers and weights for tiny models of transformers. Tests that import this are skipped without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def save_word_tokenizer(folder: Path) -> None:
    """[CLS] text [SEP], a token a word, with a padding token: as BERT's."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)


def save_byte_tokenizer(folder: Path, added: str = "", **names: str) -> None:
    """A token a byte and <end>, nothing to pad with, padding in front: as GPT-2's."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate([*alphabet, "<end>"])}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    if added:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {added}", special_tokens=[("<end>", 256)]
        )
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **names).save_pretrained(folder)


def enlarge_weights(model: Any) -> Any:
    """Weights large enough that each token changes the logits by far more than rounding."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=source)
    return model
