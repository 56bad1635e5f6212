"""``bench``: how fast this machine is, and how close the analysis of an adapter comes to it.

The floor of a spectrum is the time of the products BᵀB and AAᵀ, 2·(out + in)·r² float64 operations a layer, at the rate
of large matrix products on the same machine in the same minute. The floor of a comparison is three times as long: BᵀB
and AAᵀ of both adapters, B₁ᵀB₂ and A₁A₂ᵀ. The floor is a reference, not a limit: ``linalg.transpose_matmul`` computes a
symmetric product on a CPU with half of these operations. Every time is the least of several, as other programs can only
add to it.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar

import msgspec
import torch
from torch import Tensor

from rankscope.analysis.comparison import compare
from rankscope.analysis.layer_spectra import spectrum
from rankscope.analysis.worker_threads import single_threaded_map, worker_count
from rankscope.formats.abstract_store import check_device
from rankscope.linalg import transpose_matmul, working_dtype
from rankscope.result import Result
from rankscope.updates import LowRank, Update

SCHEMA = "rankscope.bench/1"
LLAMA_SHAPES = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
"""(out, in) of the linear layers in one layer of Llama 3 8B, and how many there are of each."""
READ_BYTES = 2**28  # bytes


class TimeRatio(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that were measured, and the ``floor`` in seconds that the operations alone take."""

    seconds: float
    floor: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.floor


class MachineRates(msgspec.Struct, frozen=True, kw_only=True):
    """Operations a second of matrix products and of Householder's QR of (4096, r), by all workers together.

    ``read``: bytes a second from a file that the system has cached. ``float64`` is None on a GPU without it.
    """

    read: float
    float32: float
    float64: float | None
    qr: float


class BenchResult(Result, frozen=True, kw_only=True):
    """One machine, and one adapter in memory: ``modules`` layers of rank ``rank`` in bfloat16."""

    schemas: ClassVar = (SCHEMA,)
    schema: str = SCHEMA
    machine: str
    device: str
    torch: str
    workers: int
    rates: MachineRates
    rank: int
    modules: int
    spectrum: TimeRatio
    compare: TimeRatio


def bench(
    rank: int = 64,
    layers: int = 4,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    repeats: int = 5,
) -> BenchResult:
    """Measure this machine, and the analysis of ``layers`` layers of Llama 3 8B on it. Takes some ten seconds.

    Raises:
        ConfigError: a device that cannot be used, or fewer than one worker.
    """
    target = check_device(device)
    count = worker_count(workers, target)
    a, b = (random_adapter(rank, layers, seed) for seed in (0, 1))
    before = measure_rates(target, count, rank)
    copies_a, copies_b = _copies(a, 2 * repeats + 2), _copies(b, repeats + 1)
    spectrum_time = least_seconds(lambda: spectrum(next(copies_a), device=target, workers=count), target, repeats)
    compare_time = least_seconds(
        lambda: compare(next(copies_a), next(copies_b), device=target, workers=count), target, repeats
    )
    rates = best_rates(before, measure_rates(target, count, rank))
    floor = spectrum_flops((update.shape for update in a.values()), rank) / (rates.float64 or rates.float32)
    return BenchResult(
        machine=machine_name(target),
        device=str(target),
        torch=str(torch.__version__),
        workers=count,
        rates=rates,
        rank=rank,
        modules=len(a),
        spectrum=TimeRatio(seconds=spectrum_time, floor=floor),
        compare=TimeRatio(seconds=compare_time, floor=3 * floor),
    )


def spectrum_flops(shapes: Iterable[tuple[int, int]], rank: int) -> float:
    """Operations of BᵀB and AAᵀ over layers (out, in)."""
    return float(sum(2 * (out + into) * rank**2 for out, into in shapes))


def random_adapter(rank: int, layers: int, seed: int) -> dict[str, Update]:
    """Random factors in bfloat16 for every shape of ``LLAMA_SHAPES``, ``layers`` times."""
    source = torch.Generator().manual_seed(seed)

    def factor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).bfloat16()

    shapes = [shape for shape, count in LLAMA_SHAPES.items() for _ in range(count)]
    return {
        f"layers.{layer}.{i}": LowRank(factor(out, rank), factor(rank, into), 2.0)
        for layer in range(layers)
        for i, (out, into) in enumerate(shapes)
    }


def _copies(updates: Mapping[str, Update], n: int) -> Iterator[dict[str, Update]]:
    """The same updates n times as new objects, which have cached nothing yet."""
    return iter([{name: update * 1.0 for name, update in updates.items()} for _ in range(n)])


def measure_rates(device: torch.device, workers: int, rank: int) -> MachineRates:
    """The rates of this moment; of matrix products the faster of all cores together and one-thread workers."""
    working = working_dtype(device)
    size = 1024 if device.type == "cpu" else 8192
    products = {}
    for dtype in dict.fromkeys((torch.float32, working)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        products[dtype] = _measure_rate(partial(transpose_matmul, a, b), 2.0 * size**3, device, workers)
    tall = torch.randn(4096, rank, device=device).to(working)
    flops = 2.0 * 4096 * rank**2 - 2 / 3 * rank**3
    qr = _measure_rate(lambda: torch.linalg.qr(tall, mode="r"), flops, device, workers)
    return MachineRates(read=_read_rate(), float32=products[torch.float32], float64=products.get(torch.float64), qr=qr)


def best_rates(a: MachineRates, b: MachineRates) -> MachineRates:
    """The larger of each rate."""
    float64 = None if a.float64 is None or b.float64 is None else max(a.float64, b.float64)
    return MachineRates(
        read=max(a.read, b.read), float32=max(a.float32, b.float32), float64=float64, qr=max(a.qr, b.qr)
    )


def least_seconds(act: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The least seconds of ``repeats`` calls, after one that does not count."""
    act()
    return min(_seconds(act, device) for _ in range(repeats))


def _seconds(act: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _measure_rate(act: Callable[[], object], flops: float, device: torch.device, workers: int) -> float:
    calls = max(1, round(1e9 / flops))  # some 20 ms of one core

    def several(_: int = 0) -> None:
        for _ in range(calls):
            act()

    alone = flops * calls / least_seconds(several, device, 5)
    if device.type != "cpu" or workers == 1:
        return alone
    with single_threaded_map(workers) as run:
        shared = least_seconds(lambda: list(run(several, range(workers))), device, 5)
    return max(alone, workers * flops * calls / shared)


def _read_rate() -> float:
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "bytes"
        buffer = bytearray(READ_BYTES)
        path.write_bytes(buffer)

        def read() -> None:
            with path.open("rb", buffering=0) as file:
                file.readinto(buffer)

        return READ_BYTES / least_seconds(read, torch.device("cpu"), 3)


def machine_name(device: torch.device) -> str:
    """The processor's name and cores, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} logical cores"
