"""Every route from a file to its numbers, on inputs that break shortcuts, against numpy on the whole matrix in float64.

Thin factors: one worker and three, and sixteen squared together on a device. Full updates: the Gram matrix, the SVD, a
sketch, and the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fake_device
import numpy as np
import pytest
import torch
from adapters import PREFIX, write_adapter, write_checkpoint
from makers import frame, normal
from scipy.linalg import subspace_angles
from torch import Tensor

from rankscope import linalg
from rankscope.analysis.comparison import compare
from rankscope.analysis.layer_spectra import SpectrumResult, spectrum
from rankscope.analysis.matrix import compare_all

R, OUT, INTO, SCALE = 24, 150, 110, 0.5
EPS = 2.0**-52
AT = np.arange(R)


def conditioned(d: int, condition: float, seed: int) -> Tensor:
    """Columns (d, R), none of them short, of this condition."""
    Q = frame(R, R, seed=seed + 50)
    return normal(d, R, seed=seed) @ (Q * torch.logspace(0, -np.log10(condition), R, dtype=torch.float64)) @ Q.T


def factors(sigma: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    root = torch.from_numpy(np.sqrt(sigma))
    return frame(OUT, R, seed=seed) * root, root[:, None] * frame(INTO, R, seed=seed + 1).T


def hard_factors(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(B, A) by what is hard about them."""
    B, A = normal(OUT, R, seed=seed), normal(R, INTO, seed=seed + 1)
    twice, zeros = B.clone(), A.clone()
    twice[:, 3] = twice[:, 7]
    zeros[5] = 0
    return {
        "plain": (B, A),
        "bfloat16": (B.bfloat16(), A.bfloat16()),
        "float16": (B.half(), A.half()),
        "condition 1e8": (conditioned(OUT, 1e8, seed), conditioned(INTO, 1e8, seed + 1).T),
        "a column twice": (twice, A),
        "a row of zeros": (B, zeros),
        "both": (twice.bfloat16(), zeros.bfloat16()),
        "subnormal": ((B * 1e-40).float(), A.float()),
        "small": (B * 1e-70, A * 1e-70),
        "flat": factors(np.ones(R), seed),
        "cliff": factors(np.where(AT < 5, 1.0, 1e-9), seed),
        "decay": factors(10.0 ** (-AT / 3.0), seed),
    }


def in_file(folder: Path, seed: int = 0) -> Path:
    tensors = {}
    for name, (B, A) in hard_factors(seed).items():
        tensors |= {f"{PREFIX}{name}.lora_B.weight": B, f"{PREFIX}{name}.lora_A.weight": A}
    tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    return write_adapter(folder, tensors, r=R, lora_alpha=SCALE * R, target_modules=sorted(hard_factors(seed)))


def exactly(B: Tensor, A: Tensor) -> np.ndarray:
    product: np.ndarray = SCALE * (B.double().numpy() @ A.double().numpy())
    return product


ROUTES = {"one worker": ("cpu", 1), "three workers": ("cpu", 3), "a device": ("fake", 2)}


@pytest.fixture(autouse=True)
def _accelerated() -> Iterator[None]:
    with fake_device.accelerated():
        yield


@pytest.mark.parametrize("route", ROUTES)
def test_thin_factors(route: str, tmp_path: Path) -> None:
    device, workers = ROUTES[route]
    found = spectrum(in_file(tmp_path / "a"), device=device, workers=workers)
    assert len(found.layers) == len(hard_factors(0))
    for name, (B, A) in hard_factors(0).items():
        layer, exact = found[name], np.linalg.svd(exactly(B, A), compute_uv=False)[:R]
        # What rounding of a factor's largest entries can move.
        terms = SCALE * float((B.double().norm(dim=0) * A.double().norm(dim=1)).max())
        off = 20 * OUT * EPS * max(terms, exact[0])
        assert np.allclose(layer.singular_values, exact, rtol=0, atol=off), name
        strong = exact[exact > 1e-7 * exact[0]]
        assert layer.energy == pytest.approx(float(exact @ exact), rel=1e-12), name
        assert layer.measures["stable_rank"] == pytest.approx(float(exact @ exact) / exact[0] ** 2, rel=1e-12), name
        p = strong / strong.sum()
        assert layer.measures["entropy_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5), name


def directions(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left and right ones that are well above rounding."""
    U, s, Vt = np.linalg.svd(matrix)
    kept = int((s > 1e-6 * s[0]).sum())
    return U[:, :kept], Vt[:kept].T


@pytest.mark.parametrize("route", ROUTES)
def test_two_adapters(route: str, tmp_path: Path) -> None:
    device, workers = ROUTES[route]
    a, b = in_file(tmp_path / "a"), in_file(tmp_path / "b", seed=7)
    found = compare(a, b, device=device, workers=workers)
    for name, first in hard_factors(0).items():
        layer, one, two = found[name], exactly(*first), exactly(*hard_factors(7)[name])
        norms = np.linalg.norm(one), np.linalg.norm(two)
        cosine = float(((one / norms[0]) * (two / norms[1])).sum())
        assert layer.cosine == pytest.approx(cosine, abs=1e-12), name
        assert layer.relative_difference == pytest.approx(np.linalg.norm(one - two) / max(norms), rel=1e-9), name
        for side, U, V in zip(("left", "right"), directions(one), directions(two), strict=True):
            grid = layer.sides[side].overlap
            k = U.shape[1], V.shape[1]
            whole = np.linalg.norm(U.T @ V) ** 2 / min(k)
            assert grid[k[0] - 1, k[1] - 1] == pytest.approx(whole, rel=1e-6), (name, side)
            if grid.shape == k:
                assert np.allclose(layer.sides[side].angles, np.sort(subspace_angles(U, V)), atol=1e-7), (name, side)


@pytest.mark.parametrize("route", ROUTES)
def test_three_adapters_are_compared_like_two(route: str, tmp_path: Path) -> None:
    device, workers = ROUTES[route]
    paths = [in_file(tmp_path / str(seed), seed) for seed in (0, 7, 13)]
    names = ["plain", "bfloat16", "a column twice", "condition 1e8", "subnormal"]
    found = compare_all(paths, layers=names, device=device, workers=workers)
    assert found.left is not None
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pair = compare(paths[i], paths[j], layers=names, device=device)
        assert found.cosine is not None
        assert found.cosine[i, j] == pytest.approx(pair.summary.cosine, rel=1e-9)
        median = float(np.median([layer.sides["left"].square.overlap for layer in pair.layers]))
        assert found.left.overlap[i, j] == pytest.approx(median, rel=1e-9)


SIDE = 700  # of the full updates: a sketch of 4 values is taken from 640 on
FULL = {
    "flat": np.ones(SIDE),
    "cliff": np.where(np.arange(SIDE) < 4, 1.0, 1e-5),
    "decay": (1.0 + np.arange(SIDE)) ** -1.0,
    "noise": np.linspace(2.0, 0.0, SIDE),
    "rank one": np.where(np.arange(SIDE) < 1, 1.0, 0.0),
}


def pair_of_checkpoints(folder: Path) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """Tuned, base, and the exact difference of what is stored, in float32 and bfloat16, small and of common size."""
    old, new = {}, {}
    for i, (name, sigma) in enumerate(FULL.items()):
        U, V = frame(SIDE + 40, SIDE, seed=i), frame(SIDE, SIDE, seed=i + 20)
        change = U * torch.from_numpy(sigma) @ V.T
        for dtype, size in ((torch.float32, 1.0), (torch.float32, 1e-20), (torch.bfloat16, 1.0)):
            key = f"{name} {str(dtype).removeprefix('torch.')} {size:g}".replace(".", "_") + ".weight"
            start = torch.zeros(change.shape) if size < 1 else normal(*change.shape, seed=i + 40) / 30
            old[key], new[key] = start.to(dtype), (start + change * size).to(dtype)
    exact = {key: (new[key].float() - old[key].float()).double().numpy() for key in new}
    return (
        write_checkpoint(folder / "tuned.safetensors", new),
        write_checkpoint(folder / "base.safetensors", old),
        {key.removesuffix(".weight"): np.linalg.svd(matrix, compute_uv=False) for key, matrix in exact.items()},
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, np.ndarray]]:
    return pair_of_checkpoints(tmp_path_factory.mktemp("pair"))


def check_full(found: SpectrumResult, exact: dict[str, np.ndarray], off: float) -> None:
    """``off``: of σ₁. What ``Spectrum`` counts as zero is 3e-6 of it here."""
    for name, sigma in exact.items():
        layer = found[name]
        assert np.abs(np.array(layer.singular_values) - sigma).max() <= off * sigma[0], name
        assert layer.energy == pytest.approx(float(sigma @ sigma), rel=1e-10), name
        assert layer.measures["stable_rank"] == pytest.approx(float(sigma @ sigma) / sigma[0] ** 2, rel=3 * off), name


@pytest.mark.parametrize("route", ["squares", "svd", "a device"])
def test_full_updates(
    route: str, pair: tuple[Path, Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, base, exact = pair
    if route == "svd":
        monkeypatch.setattr(linalg, "GRAM_MAX_SIDE", 0)
    off = 1e-5 if route == "svd" else 2e-7  # LAPACK in float32 leaves some 5e-6 of a flat spectrum
    check_full(spectrum(tuned, base, device="fake" if route == "a device" else "cpu"), exact, off)


def test_a_sketch_of_full_updates(pair: tuple[Path, Path, dict[str, np.ndarray]]) -> None:
    """Its bounds hold what the exact spectrum says, its values are not above the exact ones."""
    tuned, base, exact = pair
    rough, whole = spectrum(tuned, base, sketch=4), spectrum(tuned, base)
    for name, sigma in exact.items():
        layer = rough[name]
        assert layer.bounds is not None
        assert (np.array(layer.singular_values) <= sigma[:4] * (1 + 1e-9)).all(), name
        for measure, value in whole[name].measures.items():
            low, high = layer.bounds[measure]
            assert low * (1 - 1e-6) <= value <= high * (1 + 1e-6), (name, measure)
