"""LoRA adapters of the shapes that people train: every linear layer of Llama 3, 8B and 70B, in PEFT's layout.

python benchmarks/shapes.py OUT --model 8b --rank 64
python benchmarks/shapes.py OUT --model 8b --full --layers 4      OUT/base and OUT/tuned, sharded checkpoints

A as it is initialised (uniform) and moved; B with directions whose strength falls by a power law, mixed over all
columns as training mixes them: normalised, the columns of B have a condition number of about 20 at rank 64. All is
drawn tensor by tensor from seeds of their own, and written without holding the adapter in memory.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rankscope.formats.file_io import TensorInfo, write_json
from rankscope.formats.peft_keys import factor_keys
from rankscope.formats.peft_write import write_peft_folder
from rankscope.formats.streaming import LazyTensor, write_streamed

FULL_RANK = 128  # directions of a full update that stand out of its noise
FALL = 0.7  # strength of the l-th direction of B: l^-FALL


class Model(NamedTuple):
    """Sizes that decide the shapes of a Llama's linear layers."""

    layers: int
    hidden: int
    key_value: int
    intermediate: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) by the name of the projection, of one layer."""
        h, kv, wide = self.hidden, self.key_value, self.intermediate
        attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
        mlp = {"gate_proj": (wide, h), "up_proj": (wide, h), "down_proj": (h, wide)}
        return {f"self_attn.{name}": shape for name, shape in attention.items()} | {
            f"mlp.{name}": shape for name, shape in mlp.items()
        }


MODELS = {"8b": Model(32, 4096, 1024, 14336), "70b": Model(80, 8192, 1024, 28672)}


def down(shape: tuple[int, int], rank: int, seed: int) -> Tensor:
    """A (r, in): uniform as torch initialises it, and a tenth of that learned."""
    source = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(shape[1])
    start = (torch.rand(rank, shape[1], generator=source) * 2 - 1) * bound
    return start + 0.1 * bound * torch.randn(rank, shape[1], generator=source)


def up(shape: tuple[int, int], rank: int, seed: int) -> Tensor:
    """B (out, r)."""
    source = torch.Generator().manual_seed(seed)
    strength = torch.arange(1, rank + 1) ** -FALL
    mixing = torch.linalg.qr(torch.randn(rank, rank, generator=source))[0]
    return torch.randn(shape[0], rank, generator=source) @ (strength[:, None] * mixing) * (0.01 / math.sqrt(rank))


def write_adapter(
    folder: Path, model: Model, rank: int, layers: int | None = None, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Write an adapter of the first ``layers`` layers (all); returns the bytes of its weights."""
    tensors: dict[str, LazyTensor] = {}
    for layer in range(model.layers if layers is None else layers):
        for i, (name, shape) in enumerate(model.shapes().items()):
            keys = factor_keys(f"model.layers.{layer}.{name}")
            number = 2 * (1000 * seed + 10 * layer + i)
            for key, make, size, n in ((keys.A, down, (rank, shape[1]), 0), (keys.B, up, (shape[0], rank), 1)):
                read = lambda make=make, shape=shape, n=n, number=number: make(shape, rank, number + n).to(dtype)  # noqa: E731
                tensors[key] = LazyTensor(TensorInfo(size, dtype), read)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    config["target_modules"] = sorted(name.rpartition(".")[2] for name in model.shapes())
    write_peft_folder(folder, config, tensors)
    return sum(pending.size for pending in tensors.values())


def write_checkpoints(
    folder: Path, model: Model, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, shard_layers: int = 1
) -> int:
    """Write ``base`` and ``tuned``, full checkpoints in shards of ``shard_layers`` layers; returns the bytes of one.

    The tuned weight is the base plus a hundredth of it in ``FULL_RANK`` directions of falling strength and a thousandth
    of it in noise. One tensor is in memory at a time.
    """
    size = 0
    for name, moved in (("base", False), ("tuned", True)):
        weight_map, number = {}, 0
        for first in range(0, layers or model.layers, shard_layers):
            tensors: dict[str, LazyTensor] = {}
            for layer in range(first, min(first + shard_layers, layers or model.layers)):
                for key, shape in model.shapes().items():
                    number += 1
                    read = lambda a=(shape, number, moved): weight(*a).to(dtype)  # noqa: E731
                    tensors[f"model.layers.{layer}.{key}.weight"] = LazyTensor(TensorInfo(shape, dtype), read)
            file = f"model-{first:05d}.safetensors"
            write_streamed(folder / name / file, tensors)
            weight_map.update(dict.fromkeys(tensors, file))
            size += 0 if moved else sum(pending.size for pending in tensors.values())
        write_json(folder / name / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return size


def weight(shape: tuple[int, int], seed: int, moved: bool) -> Tensor:
    """A weight (out, in), before or after fine-tuning."""
    source = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=source).div_(math.sqrt(shape[1]))
    if not moved:
        return start
    strength = torch.arange(1, FULL_RANK + 1) ** -FALL
    left = torch.randn(shape[0], FULL_RANK, generator=source) * strength
    start.addmm_(left, torch.randn(FULL_RANK, shape[1], generator=source), alpha=1e-2 / math.sqrt(shape[1]))
    return start.add_(torch.randn(shape, generator=source), alpha=1e-3 / math.sqrt(shape[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", type=int, help="only so many [all]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="a checkpoint and its base instead of an adapter")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of --full")
    arguments = parser.parse_args()
    if arguments.full:
        model, dtype = MODELS[arguments.model], getattr(torch, arguments.dtype)
        size = write_checkpoints(arguments.out, model, arguments.layers, dtype)
        print(f"{arguments.out}: two checkpoints of {size / 1e6:.0f} MB")
        return
    size = write_adapter(arguments.out, MODELS[arguments.model], arguments.rank, arguments.layers, arguments.seed)
    print(f"{arguments.out}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
