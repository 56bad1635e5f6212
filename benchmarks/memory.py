"""Memory of N adapters in training: one bank on one base, and N models with an adapter each (PEFT).

python benchmarks/memory.py --model minilm --count 16

Each side is measured in a process of its own: peak resident set after two training steps of every adapter on two
sentences' worth of tokens, less that of the same process before the first model was made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings

import torch

from rankscope.lora import AdapterSpec, Bank
from rankscope.train.config import make_generator
from rankscope.train.costs import peak_memory
from rankscope.train.pretrained import import_transformers

CPU = torch.device("cpu")


def load(path: str) -> torch.nn.Module:
    model: torch.nn.Module = import_transformers().AutoModel.from_pretrained(path)
    return model.train()


def train(model: torch.nn.Module, weights: list[torch.nn.Parameter], rows: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    for _ in range(2):
        model(input_ids=torch.randint(1000, (rows, 32))).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def bank(path: str, count: int, rank: int) -> None:
    model = load(path)
    specs = [AdapterSpec(rank=rank, alpha=2 * rank, targets=("query", "value"))] * count
    made = Bank.attach(model, specs, [make_generator("memory", i) for i in range(count)])
    made.select(None if count > 1 else 0)
    train(model, made.trainable_parameters(), 2 * count)


def models(path: str, count: int, rank: int) -> None:
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
    kept = []
    for _ in range(count):
        model = peft.get_peft_model(load(path), config)
        kept.append((model, train(model, [p for p in model.parameters() if p.requires_grad], 2)))


def measure(side: str, path: str, count: int, rank: int) -> int:
    """Bytes, in a process of its own."""
    command = [sys.executable, __file__, "--model", path, "--count", str(count), "--rank", str(rank), "--side", side]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a transformers model with query and value")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--side", choices=["bank", "models"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        warnings.simplefilter("ignore")
        import peft  # noqa: F401  (both sides have it loaded, so that only models are counted)

        import_transformers()
        before = peak_memory(CPU) or 0
        (bank if arguments.side == "bank" else models)(arguments.model, arguments.count, arguments.rank)
        print((peak_memory(CPU) or 0) - before)
        return
    for count in (1, arguments.count):
        ours, theirs = (measure(side, arguments.model, count, arguments.rank) for side in ("bank", "models"))
        print(
            f"{count:3} adapters: bank {ours / 2**20:6.0f} MiB, models {theirs / 2**20:6.0f} MiB, {theirs / ours:.1f} x"
        )


if __name__ == "__main__":
    main()
