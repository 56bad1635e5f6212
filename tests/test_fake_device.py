"""The fake accelerator refuses, allows and counts what a GPU would: what the other tests on it rest on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from both_devices import close
from fake_device import DEVICE, waits
from makers import generator, normal


def test_what_a_gpu_refuses_is_refused() -> None:
    there, here = normal(3, 3).to("fake"), normal(3, 3)
    assert there.device == torch.zeros(2, device="fake").device == DEVICE
    for mixed in (
        lambda: there + here,
        lambda: here @ there,
        lambda: here.add_(there),
        lambda: torch.cat([there, here]),
        lambda: here[torch.tensor([0]).to("fake")],
        lambda: torch.zeros(()).add_(there.sum()),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(RuntimeError, match="generator"):
        torch.zeros(2, device="fake").normal_(generator=generator())
    for to_numpy in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises((RuntimeError, TypeError)):
            to_numpy()
    with pytest.raises(AssertionError):
        there.to("cuda")


def test_what_a_gpu_allows_is_allowed() -> None:
    there, here = normal(3, 3).to("fake"), normal(3, 3)
    assert close(there * torch.tensor(2.0), here * 2, 0)
    assert close(there[torch.tensor([2, 0])], here[[2, 0]], 0)
    assert close(torch.zeros(3, 3, dtype=torch.float64).copy_(there), here, 0)
    assert close(torch.zeros_like(there).copy_(here), here, 0)


@pytest.mark.parametrize(
    ("use", "count"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: float(x[0, 0]), 1),
        (lambda x: bool((x > 0).any()), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.to("cpu", non_blocking=True), 1),  # into memory that is not pinned
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: torch.zeros(3, 3).to(x.device), 1),
        (lambda x: torch.zeros(3, 3).to(x.device, non_blocking=True), 0),
        (lambda x: torch.tensor(1.0, device=x.device), 1),
        (lambda x: x.double().to(x.device), 0),
        (lambda x: x[torch.zeros(2, dtype=torch.long, device=x.device)], 0),
        (lambda x: (x @ x).softmax(0).sum() + torch.ones(3, device=x.device), 0),
    ],
)
def test_waits_are_counted(use: Any, count: int) -> None:
    x = normal(3, 3, dtype=torch.float32).to("fake")
    with waits() as noted:
        use(x)
    assert len(noted) == count, noted
