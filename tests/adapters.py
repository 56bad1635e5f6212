"""Small adapters and checkpoints on disk, written without the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "lora_alpha": 8, "r": 2, "target_modules": ["q"], "not_invented_yet": {"x": [1]}}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(module: str, out: int = 5, n: int = 7, r: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Keys of one linear layer's factors."""
    return {
        f"{PREFIX}{module}.lora_A.weight": normal(r, n, seed=2 * seed + 1),
        f"{PREFIX}{module}.lora_B.weight": normal(out, r, seed=2 * seed + 2),
    }


def write_adapter(folder: Path, tensors: dict[str, Tensor] | None = None, **config: object) -> Path:
    """A PEFT folder; a configuration value of ``...`` leaves that key out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in {**CONFIG, **config}.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(linear("block.q") if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def write_checkpoint(path: Path, tensors: dict[str, Tensor], config: dict[str, object] | None = None) -> Path:
    """One safetensors file, with config.json beside it where given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))
    return path


def write_shards(folder: Path, shards: dict[str, dict[str, Tensor]], **weight_map: str) -> Path:
    """Shards and their index; ``weight_map`` overrides where a tensor is said to be."""
    folder.mkdir(parents=True, exist_ok=True)
    where = {}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
        where.update(dict.fromkeys(tensors, shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**where, **weight_map}}))
    return folder
