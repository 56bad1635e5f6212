"""Analysis of a whole adapter of Llama 3's shapes, from the file to the measures, against its floor and PEFT's route.

python benchmarks/analysis.py                                   8B, rank 64, growth, comparison
python benchmarks/analysis.py --device cuda --no-peft           the same on a GPU
python benchmarks/analysis.py --model 70b --layers 8

The floor is the time of 2·(out + in)·r² operations a layer at the rate of large float64 matrix products, measured
before and after in the same run (for a comparison three times as many); see ``rankscope.analysis.benchmark``. On a
GPU the file also has to cross the bus, which is measured as well. Times are the least of ``--repeats``. Processor
time is the whole process's in one more run: it does not count what other programs took.

PEFT's route is what PEFT's ``convert_to_lora`` does: the product BA formed in float32 and torch.linalg.svd of it; one
layer of each shape is decomposed, and the adapter's time is the sum over shapes of that time and their number.

Peak resident set is that of a process of its own, which does nothing else; the mapped file is in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from shapes import MODELS, down, up, write_adapter

from rankscope.analysis.benchmark import best_rates, least_seconds, machine_name, measure_rates, spectrum_flops
from rankscope.analysis.comparison import compare
from rankscope.analysis.layer_spectra import spectrum
from rankscope.analysis.matrix import compare_all
from rankscope.analysis.worker_threads import worker_count
from rankscope.formats.peft_keys import factor_keys
from rankscope.train.costs import peak_memory, reset_peak_memory

CPU = torch.device("cpu")
MOST_ADAPTERS = 32
TALL = 8  # numpy's largest difference is looked for in so many layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--layers", type=int, help="only so many [all]")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--growth", default="8,16,32,64,128,256", help="ranks, at a quarter of the layers; none: ''")
    parser.add_argument("--growth-only", action="store_true", help="nothing but the growth")
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT's route out (minutes)")
    parser.add_argument("--alone", metavar="FOLDER", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(alone(arguments.alone, arguments.device, arguments.workers)))
        return
    with tempfile.TemporaryDirectory() as home:
        report(arguments, Path(home))


def report(arguments: argparse.Namespace, home: Path) -> None:
    model, device = MODELS[arguments.model], torch.device(arguments.device)
    layers, rank = arguments.layers or model.layers, arguments.rank
    workers = worker_count(arguments.workers, device)
    print(f"{machine_name(device)}; {device}, torch {torch.__version__}, {workers} workers")
    ranks = [int(r) for r in arguments.growth.split(",") if r]
    if arguments.growth_only:
        growth(arguments, home, ranks, max(1, layers // 4), layers)
        growth_of_many(arguments, home)
        return
    size = write_adapter(home / "a", model, rank, layers)
    write_adapter(home / "b", model, rank, layers, seed=1)
    shapes = [shape for shape in model.shapes().values() for _ in range(layers)]
    print(f"Llama 3 {arguments.model}, {len(shapes)} matrices, rank {rank}, bfloat16: {size / 1e6:.0f} MB\n")

    before = measure_rates(device, workers, rank)

    def spectrum_once() -> object:
        return spectrum(home / "a", device=device, workers=workers)

    def compare_once() -> object:
        return compare(home / "a", home / "b", device=device, workers=workers)

    one, two = (least_seconds(act, device, arguments.repeats) for act in (spectrum_once, compare_once))
    found = best_rates(before, measure_rates(device, workers, rank))
    rate = found.float64 or found.float32
    floor = spectrum_flops(shapes, rank) / rate
    print(f"matrix products in float64 {rate / 1e9:.0f} Gflop/s, in float32 {found.float32 / 1e9:.0f} Gflop/s")
    for name, seconds, least_time in (("spectrum", one, floor), ("compare", two, 3 * floor)):
        print(f"{name:9} {seconds:8.3f} s   floor {least_time:7.4f} s   {seconds / least_time:5.2f} x floor")
    for name, act in (("spectrum", spectrum_once), ("compare", compare_once)):
        print(f"{name}: {processor(act, 1):.3f} s of processor time")
    if device.type == "cuda":
        crossing(home / "a", device)
    for what, folders in (("spectrum", ["a"]), ("compare", ["a", "b"])):
        memory = in_own_process([str(home / folder) for folder in folders], arguments)
        files = size * len(folders)
        print(
            f"{what}: peak resident set {memory['start'] / 1e6:.0f} MB with torch and rankscope loaded, "
            f"{memory['peak'] / 1e6:.0f} MB at the peak, of it {files / 1e6:.0f} MB the files "
            f"(peak - start - files: {(memory['peak'] - memory['start'] - files) / 1e6:.0f} MB)"
        )
    print(f"largest difference of any singular value from numpy: {difference(home / 'a', device):.1e} of the largest")
    if not arguments.no_peft:
        peft = peft_route(model, rank, layers)
        print(f"PEFT's route, extrapolated from one matrix of each shape: {peft:.0f} s, {peft / one:.0f} x")
    if ranks:
        growth(arguments, home, ranks, max(1, layers // 4), layers)
        growth_of_many(arguments, home)


def growth(args: argparse.Namespace, home: Path, ranks: list[int], few: int, layers: int) -> None:
    """Processor time against r and against the number of layers, with the exponents of power laws through them."""
    model, device = MODELS[args.model], torch.device(args.device)

    def measure_seconds(rank: int, number: int) -> float:
        folder = home / f"{rank}-{number}"
        write_adapter(folder, model, rank, number)
        return processor(lambda: spectrum(folder, device=device, workers=args.workers), args.repeats)

    print(f"\nprocessor time against r, {few} layers")
    times = {rank: measure_seconds(rank, few) for rank in ranks}
    for rank, seconds in times.items():
        flops = spectrum_flops([s for s in model.shapes().values() for _ in range(few)], rank)
        print(f"  r = {rank:4d}: {seconds:8.4f} s, {flops / seconds / 1e9:6.1f} Gflop/s of the floor's operations")
    for part in (ranks, [r for r in ranks if r >= 32]):
        if len(part) > 1:
            print(f"  time ~ r^{exponent({r: times[r] for r in part}):.2f} for r = {part[0]} … {part[-1]}")
    numbers = sorted({max(1, layers // n) for n in (8, 4, 2, 1)})
    counts = {number: measure_seconds(args.rank, number) for number in numbers}
    print(f"against layers, r = {args.rank}: " + ", ".join(f"{n}: {t:.3f} s" for n, t in counts.items()))
    if len(counts) > 1:
        print(f"  time ~ layers^{exponent(counts):.2f}")


def growth_of_many(args: argparse.Namespace, home: Path) -> None:
    """Processor time of comparing k adapters of one layer, each with each."""
    several = [home / f"adapter-{number}" for number in range(MOST_ADAPTERS)]
    for seed, folder in enumerate(several):
        write_adapter(folder, MODELS[args.model], args.rank, 1, seed=seed)

    def together(k: int) -> object:
        return compare_all(several[:k], device=args.device, workers=args.workers)

    times = {k: processor(lambda: together(k), args.repeats) for k in (2, 4, 8, 16, MOST_ADAPTERS)}  # noqa: B023
    said = ", ".join(f"{k}: {seconds:.3f} s" for k, seconds in times.items())
    print(f"k adapters of one layer, each with each, r = {args.rank}: {said}")
    for part in ((2, 4, 8), (8, 16, MOST_ADAPTERS)):
        print(f"  time ~ k^{exponent({k: times[k] for k in part}):.2f} for k = {part[0]} … {part[-1]}")


def processor(act: Callable[[], object], repeats: int) -> float:
    """Seconds of processor time of the whole process, the least of ``repeats``."""
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        act()
        seconds.append(time.process_time() - began)
    return min(seconds)


def exponent(times: dict[int, float]) -> float:
    """Slope of the least-squares line through log time against log size."""
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])


def crossing(folder: Path, device: torch.device) -> None:
    """The time to bring the factors to the GPU as they lie in the file, which no computation there can undercut."""

    def copy() -> None:
        for tensor in load_file(folder / "adapter_model.safetensors").values():
            tensor.to(device)

    print(f"all factors read and copied to the GPU, one after another: {least_seconds(copy, device, 3):.3f} s")


def alone(folders: list[str], device: str, workers: int | None) -> dict[str, int]:
    """Resident set before, and at its peak."""
    reset_peak_memory(CPU)
    start = peak_memory(CPU) or 0
    reset_peak_memory(CPU)
    if len(folders) == 1:
        spectrum(folders[0], device=device, workers=workers)
    else:
        compare(folders[0], folders[1], device=device, workers=workers)
    return {"start": start, "peak": peak_memory(CPU) or 0}


def in_own_process(folders: list[str], arguments: argparse.Namespace) -> dict[str, int]:
    command = [sys.executable, __file__, "--device", arguments.device, "--alone", *folders]
    if arguments.workers:
        command += ["--workers", str(arguments.workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def difference(folder: Path, device: torch.device) -> float:
    """Against numpy's QR and SVD in float64, relative to σ₁, over some layers of every shape."""
    found = spectrum(folder, device=device).layers
    tensors = load_file(folder / "adapter_model.safetensors")
    worst = 0.0
    for layer in found[: 7 * TALL : 3] + found[:7]:
        keys = factor_keys(layer.name)
        r_left = np.linalg.qr(tensors[keys.B].double().numpy(), mode="r")
        r_right = np.linalg.qr(tensors[keys.A].double().numpy().T, mode="r")
        exact = np.linalg.svd(layer.scale * r_left @ r_right.T, compute_uv=False)
        worst = max(worst, float(np.abs(np.array(layer.singular_values) - exact).max() / exact[0]))
    return worst


def peft_route(model: object, rank: int, layers: int) -> float:
    """Seconds, on the CPU with all its threads."""
    total = 0.0
    for shape, count in Counter(model.shapes().values()).items():  # type: ignore[attr-defined]
        A, B = down(shape, rank, 0), up(shape, rank, 1)
        began = time.perf_counter()
        torch.linalg.svd(2.0 * (B @ A), full_matrices=False)
        seconds = time.perf_counter() - began
        print(f"  torch.linalg.svd of {shape[0]} x {shape[1]}: {seconds:.1f} s", flush=True)
        total += seconds * count * layers
    return total


if __name__ == "__main__":
    main()
