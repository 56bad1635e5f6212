"""The machine's rates: that they are of what they say, by counting calls, not by timing them."""

from __future__ import annotations

import json

import pytest
import torch

from rankscope import linalg
from rankscope.analysis import benchmark as rates
from rankscope.analysis.benchmark import BenchResult, MachineRates, bench, best_rates, spectrum_flops
from rankscope.cli import main
from rankscope.errors import ConfigError


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "LLAMA_SHAPES", {(60, 40): 2, (90, 30): 1})
    monkeypatch.setattr(rates, "READ_BYTES", 2**12)
    monkeypatch.setattr(
        rates, "measure_rates", lambda device, workers, rank: MachineRates(read=1e9, float32=4e9, float64=2e9, qr=1e9)
    )


def test_floors_and_ratios(small: None) -> None:
    threads = torch.get_num_threads()
    found = bench(rank=20, layers=3, workers=2, repeats=1)
    assert torch.get_num_threads() == threads
    assert (found.modules, found.rank, found.workers, found.device) == (9, 20, 2, "cpu")
    flops = 3 * (2 * 2 * (60 + 40) + 2 * (90 + 30)) * 20**2
    assert found.spectrum.floor == pytest.approx(flops / 2e9)
    assert found.compare.floor == pytest.approx(3 * flops / 2e9)
    assert found.spectrum.ratio == pytest.approx(found.spectrum.seconds / found.spectrum.floor)
    assert BenchResult.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_every_repetition_computes_anew(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates remember what was found of them; a copy must not."""
    squared: list[int] = []
    product = linalg.gram
    monkeypatch.setattr(linalg, "gram", lambda tall: squared.append(1) or product(tall))
    bench(rank=20, layers=1, workers=1, repeats=2)
    # 3 modules: 2 factors each for spectrum, 4 for compare; once to warm up and twice measured.
    assert len(squared) == 3 * (2 + 4) * 3


def test_a_rate_is_operations_over_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(rates, "least_seconds", lambda act, device, repeats: (act(), 0.5)[1])
    found = rates._measure_rate(lambda: calls.append(1), 1e8, torch.device("cpu"), 1)
    assert found == 1e8 * len(calls) / 0.5 == 2e9
    assert rates._measure_rate(lambda: None, 1e8, torch.device("cpu"), 3) == 3 * 2e9


def test_the_operations_of_an_adapter() -> None:
    """8B at rank 64: 81 920 rows and columns a layer."""
    shapes = [shape for shape, count in rates.LLAMA_SHAPES.items() for _ in range(count)]
    assert spectrum_flops(shapes, 64) == 2 * 81_920 * 64**2


def test_the_best_of_two_measurements() -> None:
    a, b = MachineRates(read=1, float32=5, float64=2, qr=1), MachineRates(read=2, float32=4, float64=3, qr=0.5)
    assert best_rates(a, b) == MachineRates(read=2, float32=5, float64=3, qr=1)
    assert best_rates(a, MachineRates(read=1, float32=1, float64=None, qr=1)).float64 is None


def test_real_rates_are_those_of_a_machine() -> None:
    found = rates.measure_rates(torch.device("cpu"), 2, 8)
    assert found.float64 is not None
    for rate in (found.read, found.float32, found.float64, found.qr):
        assert 1e6 < rate < 1e15


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        bench(device="nowhere")
    with pytest.raises(ConfigError, match="at least one"):
        bench(workers=0)


def test_the_command(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["bench", "--modules", "1", "--rank", "8"], ["bench", "--modules", "1", "--rank", "8", "--json"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        said = capsys.readouterr().out
        if "--json" in arguments:
            assert json.loads(said)["schema"] == "rankscope.bench/1"
        else:
            assert "matrix product, float64" in said
            assert "spectrum" in said
            assert "time/floor" in said
