"""Adapters that PEFT trained for some steps on tiny models, and ways to break what it saved, one mistake each."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from surgery_makers import import_peft, quietly
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, Tensor]
STEPS = 6


def train_adapter(
    model: Any, folder: Path, base: Path | None, lr: float = 3e-3, dtype: torch.dtype = torch.float32, **config: Any
) -> Any:
    """A LoRA adapter after some steps of AdamW on random tokens, saved by PEFT; the adapted model."""
    peft = import_peft()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], **config}
    with quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**{"task_type": "CAUSAL_LM", **settings}))
        adapted.peft_config["default"].base_model_name_or_path = None if base is None else str(base)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=lr)
        for _ in range(STEPS):
            tokens = torch.randint(0, 40, (4, 12))
            adapted(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.to(dtype).save_pretrained(folder)
    return adapted


def break_adapter(
    healthy: Path,
    folder: Path,
    change: Callable[[Tensors], Tensors | None] | None = None,
    **config: Any,
) -> Path:
    """A copy of an adapter with other tensors (``change`` gets them, and may return new ones) or settings."""
    shutil.copytree(healthy, folder)
    if change is not None:
        tensors = load_file(folder / WEIGHTS)
        save_file({key: value.contiguous() for key, value in (change(tensors) or tensors).items()}, folder / WEIGHTS)
    if config:
        settings = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**settings, **config}))
    return folder


def rename_keys(old: str, new: str) -> Callable[[Tensors], Tensors]:
    """A change of keys."""
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def set_tensor(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    """A change of the tensors whose key contains ``end``."""
    return lambda tensors: {key: change(value) if end in key else value for key, value in tensors.items()}
