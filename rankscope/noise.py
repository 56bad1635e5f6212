"""Singular values of noise in closed form: Marchenko–Pastur and Gavish–Donoho. Imports no module of the package."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mp_quantile(levels: Array, beta: float) -> Array:
    """Quantiles of σ²/(n·variance) of an m × n noise matrix, β = m/n ≤ 1, as both grow (Marchenko & Pastur 1967).

    With λ = 1 + β − 2√β·cos t the density has no singularity, and its integral has the closed form
    π·F(t) = t + (1 − 1/β)·arg(1/(1 − √β·e^{it})) + sin t/√β, which is inverted by bisection.

    Args:
        levels: probabilities, of any shape; the quantiles have the same.
    """
    root = math.sqrt(beta)
    low, high = np.zeros_like(levels), np.full_like(levels, math.pi)
    for _ in range(60):
        t = (low + high) / 2
        angle = np.arctan2(root * np.sin(t), 1 - root * np.cos(t))
        below = t + (1 - 1 / beta) * angle + np.sin(t) / root < math.pi * levels
        low, high = np.where(below, t, low), np.where(below, high, t)
    quantiles: Array = (1 - root) ** 2 + 4 * root * np.sin((low + high) / 4) ** 2
    return quantiles


@lru_cache(maxsize=64)
def mp_median(beta: float) -> float:
    """Median of the Marchenko–Pastur law, μ_β."""
    return float(mp_quantile(np.array([0.5]), beta)[0])


def gd_omega(beta: float) -> float:
    """ω(β), the optimal hard threshold in units of the median σ. Gavish & Donoho, IEEE Trans. Inf. Theory 2014."""
    known_noise = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return known_noise / math.sqrt(mp_median(beta))


def noise_edge(per_entry: float, shape: tuple[int, int]) -> float:
    """Largest σ of a noise matrix (out, in) with this root mean square per entry."""
    return per_entry * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def shrink_singular_values(values: Array, per_entry: float, shape: tuple[int, int]) -> Array:
    """Singular values after the optimal shrinkage of noise with a known root mean square per entry.

    η(y) = √((y² − β − 1)² − 4β)/y for y > 1 + √β, else 0, with y = σ/(per_entry·√max(out, in)). No other rule has a
    smaller asymptotic squared error (Gavish & Donoho, IEEE Trans. Inf. Theory 2017).
    """
    m, n = sorted(shape)
    beta, unit = m / n, per_entry * math.sqrt(n)
    y = np.maximum(values / unit, 1 + math.sqrt(beta))
    shrunk = unit * np.sqrt(np.maximum((y**2 - beta - 1) ** 2 - 4 * beta, 0.0)) / y
    return np.where(values > noise_edge(per_entry, shape), shrunk, 0.0)
