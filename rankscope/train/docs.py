"""The embedded task: the small byte-level base that comes along, adapted to the text of the language reference."""

from __future__ import annotations

import hashlib
import math
import platform
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from rankscope.train.llama import load_llama
from rankscope.train.task import (
    WindowTask,
    file_hash,
)


class DocsTask(WindowTask):
    """The embedded default: a byte-level decoder that knows Python source adapts to its documentation."""

    metric = "bits_per_byte"
    steps = 200
    full_rate = 1e-3
    default_batch = 8
    targets = ("all-linear",)
    peft_task = "CAUSAL_LM"

    def __init__(self, length: int = 128) -> None:
        self.text = read_documentation()
        self.folder = embedded_base_folder()
        self.base_name = "rankscope/embedded-base"
        super().__init__(*split_blocks(self.text), length)

    def model(self, seed: int) -> nn.Module:
        return load_llama(self.folder)

    def loss_metrics(self, loss: float) -> dict[str, float]:
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    def fingerprint(self) -> dict[str, str]:
        return {
            "base": "embedded",
            "base_sha256": file_hash(self.folder / "model.safetensors"),
            "data": f"pydoc_data.topics of CPython {platform.python_version()}",
            "data_sha256": hashlib.sha256(self.text).hexdigest(),
        }


def embedded_base_folder() -> Path:
    """Where the embedded base lies; transformers' ``from_pretrained`` reads the same folder."""
    return Path(str(resources.files("rankscope.train") / "base"))


def read_documentation() -> bytes:
    """The language reference that every Python carries, each paragraph once.

    Topics quote each other (``specialnames`` holds all of ``customization``): a paragraph that came
    before is left out, or held-out text would have been seen in training.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph)
    return "\n\n".join(kept).encode()


def split_blocks(text: bytes, block: int = 4096) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test bytes, each (bytes,) of uint8: of each ten blocks in a row eight, one and one.

    Blocks keep neighbouring paragraphs together and still give each part the same mix of topics.
    """
    blocks = torch.split(torch.frombuffer(bytearray(text), dtype=torch.uint8), block)
    train = torch.cat([b for i, b in enumerate(blocks) if i % 10 not in (8, 9)])
    validation = torch.cat([b for i, b in enumerate(blocks) if i % 10 == 8])
    return train, validation, torch.cat([b for i, b in enumerate(blocks) if i % 10 == 9])
