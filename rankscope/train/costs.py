"""Counting what a run costs: parameters, bytes by kind, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def total_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of tensors of any shape, together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def optimizer_bytes(state: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of an optimizer's state: for AdamW two moments a parameter and a step count."""
    return total_bytes(value for values in state.values() for value in values.values() if isinstance(value, Tensor))


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak anew; on a CPU this works on Linux alone."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak since ``reset_peak_memory``: the allocator's on CUDA, the process's resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(sizes[0]) * 1024 if sizes else None


USABLE_SHARE = 0.8  # of the free memory: allocators lose some of it to fragments


def memory_capacity(device: torch.device, probe: Callable[[], None]) -> int:
    """How many times what ``probe`` takes fits into the GPU's free memory."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    probe()
    taken = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(USABLE_SHARE * free) // max(1, taken)
