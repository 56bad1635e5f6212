"""benchmarks/peers.py: what it takes for right, and that rankscope is right by it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

HERE = Path(__file__).parents[1] / "benchmarks" / "peers.py"
CASES = [
    "adapter, DoRA",
    "adapter, alpha = 2r",
    "adapter, norm 1e-7",
    "adapter, rank 4",
    "adapter, rsLoRA",
    "pair",
    "pair, a head added",
    "pair, bfloat16, update of rank 16 and relative size 2e-3",
]


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", HERE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def home(peers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("planted")
    assert peers.write_planted_cases(home, large=False) == CASES
    return home


@pytest.mark.parametrize("case", CASES)
def test_rankscope_is_right(peers: ModuleType, home: Path, case: str) -> None:
    result, right = peers.SIDES["rankscope"](home / case)(), peers.exact(home / case)
    assert result.keys() == right.keys()
    errors = {name: error for name, (error, _, _) in peers.measure_errors(result, right).items()}
    assert errors.keys() == {"values", "stable", "entropy"}
    assert max(errors.values()) < 1e-8, errors  # float32 checkpoints are subtracted in float32


def test_a_wrong_answer_is_seen(peers: ModuleType) -> None:
    right = {"layer": {"values": np.array([4.0, 2.0, 1.0]), "stable": 1.3125, "entropy": 2.6}}
    result = {"layer": {"values": [4.0, 3.0], "stable": 1.3125}}
    assert peers.measure_errors(result, right) == {"values": (0.25, 3.0, 2.0), "stable": (0.0, 1.3125, 1.3125)}
    line = peers.verdict({"layers": {**result, "other": {}}}, {**right, "lost": {}})
    assert line == "1 of 2 layers missing, 1 not of the update, σ 2e-01 (3, right 2), stable rank 0e+00"
    assert peers.verdict({"error": "ValueError: no"}, right) == "ValueError: no"
