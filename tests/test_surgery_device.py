"""Surgery on an accelerator, the fake one of ``fake_device``: the same files, to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_device
import pytest
import torch
from adapters import PREFIX, linear, normal, write_adapter, write_checkpoint
from safetensors.torch import load_file

from rankscope.formats.store import open as open_store
from rankscope.surgery.algebra import average, subtract
from rankscope.surgery.extract import extract
from rankscope.surgery.merge import merge, unmerge
from rankscope.surgery.resize import resize
from rankscope.surgery.truncate import AboveNoise, Budget, Rank


@pytest.fixture(autouse=True)
def _accelerated() -> Iterator[None]:
    with fake_device.accelerated():
        yield


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two adapters with every kind of layer, a DoRA adapter, half-precision factors, a base and its tuned weights."""
    tensors = {
        **linear("q", out=9, n=8, r=3),
        f"{PREFIX}emb.lora_embedding_A": normal(2, 11, seed=1),
        f"{PREFIX}emb.lora_embedding_B": normal(6, 2, seed=2),
        f"{PREFIX}conv.lora_A.weight": normal(4, 4, 2, 2, seed=3),
        f"{PREFIX}conv.lora_B.weight": normal(6, 2, 1, 1, seed=4),
        f"{PREFIX}k.lora_A.weight": torch.zeros(2, 4),
        f"{PREFIX}k.lora_B.weight": torch.zeros(3, 2),
        f"{PREFIX}q.lora_B.bias": normal(9),
    }
    write_adapter(tmp_path / "one", tensors, lora_bias=True)
    write_adapter(tmp_path / "two", linear("q", out=9, n=8, r=2, seed=5))
    write_adapter(tmp_path / "half", {key: value.bfloat16() for key, value in linear("q", out=9, n=8, r=3).items()})
    magnitude = {f"{PREFIX}q.lora_magnitude_vector": normal(9, seed=9)}
    write_adapter(tmp_path / "dora", {**linear("q", out=9, n=8), **magnitude}, use_dora=True)
    base = {"q.weight": normal(9, 8), "norm.weight": normal(8)}
    tuned = {"q.weight": base["q.weight"] + normal(9, 8, seed=7), "norm.weight": normal(8, seed=8)}
    write_checkpoint(tmp_path / "base" / "model.safetensors", {key: value.bfloat16() for key, value in base.items()})
    write_checkpoint(tmp_path / "tuned" / "model.safetensors", {key: value.bfloat16() for key, value in tuned.items()})
    return tmp_path


ACTS: dict[str, Callable[[Path, Path, str], Any]] = {
    "resize": lambda home, out, on: resize(home / "one", Rank(2), out, device=on),
    "budget": lambda home, out, on: resize(home / "one", Budget(180), out, device=on),
    "noise": lambda home, out, on: resize(home / "half", AboveNoise(), out, device=on),
    "subtract": lambda home, out, on: subtract(home / "one", home / "two", out, device=on),
    "average": lambda home, out, on: average([home / "one", home / "one"], out, None, Rank(2), device=on),
    "extract": lambda home, out, on: extract(home / "tuned", Rank(2), out, home / "base", device=on),
    "merge": lambda home, out, on: merge(home / "base", [home / "two", home / "half"], out, [1, 0.5], device=on),
    "merge dora": lambda home, out, on: merge(home / "base", [home / "dora"], out, device=on),
    "unmerge": lambda home, out, on: unmerge(home / "base", [home / "two"], out, device=on),
}


@pytest.mark.parametrize("name", ACTS)
def test_the_device_gives_what_the_cpu_gives(home: Path, name: str) -> None:
    here = ACTS[name](home, home / "here", "cpu")
    there = ACTS[name](home, home / "there", "fake")
    for a, b in zip(here.layers, there.layers, strict=True):
        assert (a.name, a.rank_after) == (b.name, b.rank_after)
        assert a.error == pytest.approx(b.error, rel=1e-5, abs=1e-6)
        assert a.norm == pytest.approx(b.norm, rel=1e-6)
        assert (a.from_original is None) == (b.from_original is None)
        if a.rank_after is not None:
            one, two = (open_store(home / folder)[a.name].dense() for folder in ("here", "there"))
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    weights = next((home / "here").glob("*.safetensors")).name
    one, two = (load_file(home / folder / weights) for folder in ("here", "there"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype
        if ".lora_" not in key:
            assert torch.equal(tensor, two[key])
