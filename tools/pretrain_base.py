"""Pre-train the embedded base on the Python standard library's source text.

    python tools/pretrain_base.py rankscope/train/base

Byte-level Llama, 4 layers of width 128. The weights depend on the Python that runs
this (its library is the text) and, in the last digits, on the machine. The shipped
ones were made by CPython 3.11 with the defaults below.
"""

from __future__ import annotations

import argparse
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from rankscope.train.llama import Llama, LlamaConfig, save_llama

LEFT_OUT = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "__pycache__", "lib2to3"}


def library_text() -> bytes:
    """Source of the standard library without its tests, its data tables and its documentation text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    return b"\n".join(path.read_bytes() for path in files)


def initialise(model: Llama, generator: torch.Generator) -> None:
    """Normal(0, .02) matrices, those that write to the residual stream scaled by depth (GPT-2)."""
    depth = len(model.model.layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(0, 0.02 / (math.sqrt(2 * depth) if deep else 1), generator=generator)


def rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then cosine to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(text: torch.Tensor, steps: int, batch: int, length: int, peak: float, seed: int) -> Llama:
    generator = torch.Generator().manual_seed(seed)
    model = Llama(LlamaConfig())
    initialise(model, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    started, smooth = time.monotonic(), 8.0
    for step in range(steps):
        starts = torch.randint(len(text) - length - 1, (batch, 1), generator=generator)
        rows = text[starts + torch.arange(length + 1)].long()
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth += 0.02 * (loss.item() / math.log(2) - smooth)
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}/{steps}  {smooth:.3f} bits per byte  {time.monotonic() - started:.0f} s", flush=True
            )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    text = torch.frombuffer(bytearray(library_text()), dtype=torch.uint8)
    print(f"{len(text):,} bytes of source from CPython {platform.python_version()}", flush=True)
    model = pretrain(text, args.steps, args.batch, args.length, args.rate, args.seed)
    save_llama(model, args.folder, corpus=f"CPython {platform.python_version()} standard library, {len(text)} bytes")


if __name__ == "__main__":
    main()
