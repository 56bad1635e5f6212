"""Output layers that are tied to the embedding: a merge that changes only one of the two has to write both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rankscope.errors import FormatError
from rankscope.formats.file_io import TensorInfo

HEAD_WEIGHT = "lm_head.weight"
# Names of weights that output layers are tied to. They are never tied to embeddings of positions or token types.
TIED_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings?|embed_in|shared|tok_embeddings|embeddings?)\.weight$"
)
HEAD_CLASSES = re.compile(r"(?:CausalLM|LMHeadModel|ConditionalGeneration)$")  # classes whose output layer is lm_head
TIE_KEY = "tie_word_embeddings"


def is_tied(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> bool:
    """Whether the output layer is tied to the embedding: as the configuration says, or by the default of its class."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get(TIE_KEY), bool):
            return bool(part[TIE_KEY])
    return has_head(config) and HEAD_WEIGHT not in infos


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether the model is of a class with an output layer over the vocabulary."""
    classes = config.get("architectures")
    return isinstance(classes, list) and any(isinstance(name, str) and HEAD_CLASSES.search(name) for name in classes)


def untie_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same model with an output layer that has its own weight."""
    untied = {**config, TIE_KEY: False}
    if isinstance(text := config.get("text_config"), Mapping) and TIE_KEY in text:
        untied["text_config"] = {**text, TIE_KEY: False}
    return untied


def find_tied_embedding(infos: Mapping[str, TensorInfo], shape: tuple[int, int] | None = None) -> str:
    """The embedding that an output layer absent from the checkpoint is tied to.

    Raises:
        FormatError: there is none (of this shape), or there are several candidates.
    """
    candidates = [
        name
        for name, info in infos.items()
        if TIED_EMBEDDING.search(name) and len(info.shape) == 2 and shape in (None, tuple(info.shape))
    ]
    if len(candidates) != 1:
        size = f" of its shape {shape[0]} × {shape[1]}" if shape else ""
        names = f" ({', '.join(candidates)})" if candidates else ""
        raise FormatError(
            f"has no {HEAD_WEIGHT}, and {len(candidates)} embeddings{size} that it could be tied to{names}; "
            "is this the base that was tuned?"
        )
    return candidates[0]
