"""Put LoRA on any torch module, train it, read its effective rank while it trains, merge it and save it for PEFT.

python examples/own_model.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import rankscope


def main() -> None:
    source = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(512, 32, generator=source)
    y = torch.sin(x @ torch.randn(32, 8, generator=source))
    bank = rankscope.Bank.attach(model, rankscope.AdapterSpec(rank=8, alpha=16, targets=["0", "2"]), source)
    optimizer = torch.optim.AdamW(bank.trainable_parameters(), lr=1e-2)
    for step in range(201):
        loss = (model(x) - y).square().mean()
        if step % 50 == 0 and step > 0:
            ranks = {name: rankscope.Spectrum.of(update).entropy_rank for name, update in bank.updates(0).items()}
            shown = "  ".join(f"layer {name}: {rank:.2f}" for name, rank in ranks.items())
            print(f"step {step}  loss {loss.item():.4f}  entropy rank of 8  {shown}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        unmerged = model(x)
        bank.merge(0)
        print(f"merged and unmerged outputs differ by {float((model(x) - unmerged).abs().max()):.1e}")
    bank.unmerge()
    with tempfile.TemporaryDirectory() as folder:
        bank.save(0, Path(folder) / "adapter")
        print(rankscope.open(Path(folder) / "adapter"))


if __name__ == "__main__":
    main()
