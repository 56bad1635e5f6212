"""Rules from names on disk to names in memory, and a small table of them for machines without transformers.

transformers renames tensors on loading, stacks the experts of a mixture, and splits fused projections. Its own rules
are read in ``model_outline.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

Step = Literal[
    "stack", "stack and concatenate", "concatenate", "chunk", "split", "transpose", "transpose to fit", "unknown"
]
"""What becomes of the stored tensors: they are stacked along a new first dimension; each of several lists is stacked,
and the rows put one below the other; rows put one below the other; equal blocks of rows, or blocks as large as the
parameters, become parameters; each matrix of a stack is transposed, always or where the shape is not the parameter's;
something else."""


class Conversion(NamedTuple):
    """A rule that changes more than a name; ``sources`` and ``targets`` are patterns of the names."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    step: Step


class RenamedKey(NamedTuple):
    """A name in memory and, where a conversion makes that tensor, which one and from which of its sources."""

    name: str
    conversion: Conversion | None = None
    source: int = 0


class NameRules(Protocol):
    """The rules of one model, for the names of one checkpoint."""

    def rename(self, stored: str) -> RenamedKey:
        """The name in memory of a stored tensor; of the first tensor, where a conversion makes several."""


class PlainRules:
    """The rules of models whose names on disk are those in memory, but for what TensorFlow called gamma and beta."""

    def rename(self, stored: str) -> RenamedKey:
        return RenamedKey(re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", _name_of_norm, stored))


def _name_of_norm(match: re.Match[str]) -> str:
    return "weight" if match[1] == "gamma" else "bias"


class TableRules:
    """The rules of the small table below, for a machine without transformers."""

    def __init__(self, model_type: str) -> None:
        self._renamings = [rule for types, rules in _RENAMINGS if model_type in types for rule in rules]
        self._conversions = [rule for types, rules in _CONVERSIONS if model_type in types for rule in rules]

    def rename(self, stored: str) -> RenamedKey:
        for pattern, replacement in self._renamings:
            stored = re.sub(pattern, replacement, stored, count=1)
        for conversion in self._conversions:
            for number, pattern in enumerate(conversion.sources):
                if re.search(pattern, stored):
                    return RenamedKey(re.sub(pattern, conversion.targets[0], stored), conversion, number)
        return PlainRules().rename(stored)


def _stack_experts(gate: str, up: str, down: str) -> Sequence[Conversion]:
    """The conversions of experts whose three projections have these names on disk."""
    gate, up, down = (rf"\.experts\.\d+\.{name}\.weight$" for name in (gate, up, down))
    return (
        Conversion((gate, up), (".experts.gate_up_proj",), "stack and concatenate"),
        Conversion((down,), (".experts.down_proj",), "stack"),
    )


_VISION_LANGUAGE = (
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^(?=(?:language_model|vision_tower|multi_modal_projector)\b)", "model."),
    (r"^model\.language_model\.model\b", "model.language_model"),
)
_QWEN2_VL = (
    (r"^visual\b", "model.visual"),
    (r"^model(?!\.(?:language_model|visual))\b", "model.language_model"),
)
_VIT = (
    (r"\bencoder\.layer\.", "layers."),
    (r"\battention\.attention\.(query|key|value)\b", lambda match: f"attention.{match[1][0]}_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"(?<!attention\.)\boutput\.dense\b", "mlp.fc2"),
)
_RENAMINGS: tuple[tuple[frozenset[str], Sequence[tuple[str, Any]]], ...] = (
    (
        frozenset({"llava", "llava_next", "gemma3", "paligemma", "mistral3", "internvl", "vipllava", "aya_vision"}),
        _VISION_LANGUAGE,
    ),
    (frozenset({"qwen2_vl", "qwen2_5_vl"}), _QWEN2_VL),
    (frozenset({"vit", "deit"}), _VIT),
    (frozenset({"mixtral"}), ((r"\.block_sparse_moe\.", ".mlp."),)),
)
_CONVERSIONS: tuple[tuple[frozenset[str], Sequence[Conversion]], ...] = (
    (frozenset({"mixtral"}), _stack_experts("w1", "w3", "w2")),
    (
        frozenset({"qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"}),
        _stack_experts("gate_proj", "up_proj", "down_proj"),
    ),
)
# Models that transformers loads under the names that they have on disk, so that it need not be asked.
PLAIN_TYPES = frozenset(
    (
        "albert", "bart", "bert", "bloom", "cohere", "distilbert", "electra", "falcon", "gemma", "gemma2", "gpt2",
        "gpt_neo", "gpt_neox", "gptj", "granite", "llama", "mamba", "marian", "mistral", "mpt", "opt", "phi", "phi3",
        "qwen2", "qwen3", "roberta", "stablelm", "starcoder2", "t5", "whisper", "xlm-roberta",
    )
)  # fmt: skip
# Models of which transformers stores the stacked experts as (experts, in, out).
INPUTS_FIRST_TYPES = frozenset({"gpt_oss", "aria"})
