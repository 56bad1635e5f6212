"""Full updates: the time of a matrix, the accuracy of a sketch, the memory of a whole checkpoint pair.

python benchmarks/full.py matrix --shape 2048x2048       all σ, mergekit-extract-lora's way, --sketch, torch.svd_lowrank
python benchmarks/full.py layer --threads 2              the same of each matrix of a layer of Llama 3 8B, and their sum
python benchmarks/full.py memory PAIR --sketch 64        PAIR as benchmarks/shapes.py --full writes it
python benchmarks/full.py memory PAIR --sketch 64 --curve rss.csv --plot rss.png
python benchmarks/full.py intruders --shape 2048x2048    with and without the base's decomposition on disk

``matrix``: mergekit-extract-lora decomposes the difference of two weights by ``torch.linalg.svd(delta.float(),
full_matrices=False)`` and keeps the first r directions; its time here is that of this call. Times are processor time of
one thread, which other programs cannot lengthen much, or of several threads by the clock; the least of ``--repeats``.
The sketch's floor: its products at the rates of large ones in the same run (2 · out · in operations a column: of the
Krylov space twice in float32, of the k directions twice in float64), and the reading of both weights in bfloat16.

``memory``: ``spectrum`` in a process of its own, which does nothing else. The peak resident set beyond that of torch
and rankscope is divided by the largest matrix in float32, for the first layer and for all: it must not grow.
``--curve``: the resident set of the last of these through time, twice a second.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from shapes import MODELS, down, up, weight
from threadpoolctl import threadpool_limits

from rankscope.analysis.benchmark import machine_name, measure_rates
from rankscope.analysis.intruders import Intruders, intruders
from rankscope.analysis.layer_spectra import spectrum
from rankscope.analysis.svd_cache import SVDCache
from rankscope.formats.store import open as open_store
from rankscope.linalg import dense_singular_values, krylov_columns, leading_triplets
from rankscope.train.costs import peak_memory, reset_peak_memory
from rankscope.updates import LowRank

CPU = torch.device("cpu")
MERGEKIT = "SVD with vectors (mergekit)"


def least(act: Callable[[], object], repeats: int) -> float:
    """Seconds: of the processor with one thread, by the clock with several."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeats):
        began = clock()
        act()
        times.append(clock() - began)
    return min(times)


def matrix(arguments: argparse.Namespace) -> None:
    print(f"{machine_name(CPU)}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for text in arguments.shape:
        out, into = map(int, text.split("x"))
        one_matrix(out, into, arguments.sketch or 64, arguments.repeats)


def layer(arguments: argparse.Namespace) -> None:
    print(f"{machine_name(CPU)}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    total: Counter[str] = Counter()
    for (out, into), count in Counter(MODELS["8b"].shapes().values()).items():
        for name, seconds in one_matrix(out, into, arguments.sketch or 64, arguments.repeats).items():
            total[name] += count * seconds
    print(f"\nall {len(MODELS['8b'].shapes())} matrices of a layer")
    tell(dict(total))


def tell(rows: dict[str, float]) -> None:
    for name, seconds in rows.items():
        print(f"  {name:32} {seconds:8.3f} s   {rows[MERGEKIT] / seconds:6.1f} x", flush=True)


def one_matrix(out: int, into: int, k: int, repeats: int) -> dict[str, float]:
    delta = weight((out, into), 1, True) - weight((out, into), 1, False)
    exact = dense_singular_values(delta)
    rows = {
        MERGEKIT: least(lambda: torch.linalg.svd(delta, full_matrices=False), 1),
        "torch svdvals, float32": least(lambda: torch.linalg.svdvals(delta), 1),
        "rankscope, all σ": least(lambda: dense_singular_values(delta), repeats),
        f"rankscope, sketch {k}": least(lambda: leading_triplets(delta, k), repeats),
        f"torch.svd_lowrank {k} + 8": least(lambda: torch.svd_lowrank(delta, k + 8), repeats),
    }
    print(f"\n{out} x {into}")
    tell(rows)
    products, reading = sketch_floor(out, into, k)
    sketch, floor = rows[f"rankscope, sketch {k}"], products + reading
    print(f"  the sketch's products {products:.3f} s, reading {reading:.3f} s: {sketch / floor:.2f} x this floor")
    found, lowrank = leading_triplets(delta, k), torch.svd_lowrank(delta, k + 8)[1][:k]
    for name, s in (("sketch", found.svd.s), ("svd_lowrank", lowrank)):
        off = (exact[:k] - s).abs() / exact[:k]
        print(f"  {name}: relative error of the top {k}: largest {off.max():.1e}, median {off.median():.1e}")
    print(f"  residuals of the sketch: largest {(found.residuals / found.svd.s[0]).max():.1e} of the first value")
    return rows


def sketch_floor(out: int, into: int, k: int) -> tuple[float, float]:
    """Seconds of its products, and of reading two weights in bfloat16."""
    found = measure_rates(CPU, torch.get_num_threads(), 64)
    column = 4.0 * out * into
    products = column * krylov_columns(k) / found.float32 + column * k / (found.float64 or found.float32)
    return products, 2 * 2 * out * into / found.read


def intruder_dimensions(arguments: argparse.Namespace) -> None:
    """Of an adapter of rank 64: two dense SVDs in float32, as the paper's code does; ours the first time and after."""
    print(f"{machine_name(CPU)}; torch {torch.__version__}, {torch.get_num_threads()} threads, top 10")
    for text in arguments.shape:
        out, into = map(int, text.split("x"))
        before = (
            weight((out, into), 1, False) * torch.arange(1, into + 1) ** -0.3
        )  # σ fall as those of a trained weight
        update = LowRank(up((out, into), 64, 1), down((out, into), 64, 2), 2.0)
        tuned = before + update.dense()
        with tempfile.TemporaryDirectory() as folder:

            def dense() -> None:
                old, new = (torch.linalg.svd(matrix, full_matrices=False)[0] for matrix in (before, tuned))  # noqa: B023
                (old.T @ new[:, :10]).abs().amax(0)

            def ours(bases: SVDCache) -> Intruders:
                return intruders(update, before.double(), bases.svd(before))  # noqa: B023

            kept = SVDCache(Path(folder))
            first = least(lambda: ours(kept), 1)  # noqa: B023
            read = least(lambda: ours(kept), arguments.repeats)  # noqa: B023
            base = kept.svd(before)
            held = least(lambda: intruders(update, before.double(), base), arguments.repeats)  # noqa: B023
            size = kept.disk_usage[1]
        two = least(dense, 1)
        print(f"\n{out} x {into}, entry of {size / 1e6:.0f} MB")
        for name, seconds in (
            ("two dense SVDs", two),
            ("first time", first),
            ("base read from the cache", read),
            ("base in memory", held),
        ):
            print(f"  {name:26} {seconds:8.3f} s   {two / seconds:7.1f} x")


def memory(arguments: argparse.Namespace) -> None:
    store = open_store(arguments.pair / "tuned", arguments.pair / "base")
    shapes = [store.info(name).shape for name in store]
    largest = 4 * max(out * into for out, into in shapes)
    layers = sorted({name.split(".")[2] for name in store}, key=int)
    size = sum(file.stat().st_size for file in arguments.pair.glob("*/*.safetensors"))
    print(f"{machine_name(CPU)}; pair of {size / 1e9:.2f} GB, largest matrix {largest / 1e6:.0f} MB in float32")
    for n in sorted({1, len(layers)}):
        command = [sys.executable, __file__, "alone", str(arguments.pair), "--layers", str(n)]
        command += ["--sketch", str(arguments.sketch)] if arguments.sketch else []
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        beyond = found["peak"] - found["start"]
        print(
            f"  {n:3} layers: {found['seconds']:7.1f} s, peak {found['peak'] / 1e6:.0f} MB, "
            f"{beyond / 1e6:.0f} MB beyond the start = {beyond / largest:.2f} largest matrices",
            flush=True,
        )
    bound = 4 * largest + 5e8
    if arguments.curve:
        rows = [f"{seconds:.2f},{resident}\n" for seconds, resident in found["curve"]]
        arguments.curve.write_text("seconds,resident_bytes\n" + "".join(rows))
    if arguments.plot:
        draw(found["curve"], bound, size, arguments.plot)


def draw(curve: list[tuple[float, int]], bound: float, size: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    seconds, resident = zip(*curve, strict=True)
    axes.plot(seconds, [value / 1e9 for value in resident], color="#0072b2", label="resident set")
    axes.axhline(bound / 1e9, color="#d55e00", linestyle="--", label="4 largest matrices in float32 + 0.5 GB")
    axes.set(xlabel="seconds", ylabel="GB", ylim=(0, None), title=f"A pair of checkpoints, {size / 1e9:.0f} GB")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    figure.savefig(path, dpi=150)


def alone(arguments: argparse.Namespace) -> None:
    reset_peak_memory(CPU)
    start = peak_memory(CPU) or 0
    began = time.perf_counter()
    kept = [f"model.layers.{layer}" for layer in range(arguments.layers)]
    curve: list[tuple[float, int]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            curve.append((time.perf_counter() - began, pages * resource.getpagesize()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    spectrum(arguments.pair / "tuned", arguments.pair / "base", kept, sketch=arguments.sketch)
    done.set()
    watcher.join()
    seconds = time.perf_counter() - began
    print(json.dumps({"start": start, "peak": peak_memory(CPU) or 0, "seconds": seconds, "curve": curve}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["matrix", "layer", "memory", "intruders", "alone"])
    parser.add_argument("pair", type=Path, nargs="?")
    parser.add_argument("--shape", action="append", help="OUTxIN, repeatable [2048x2048]")
    parser.add_argument("--sketch", type=int)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of matrix, layer and intruders")
    parser.add_argument("--curve", type=Path, help="of memory: .csv")
    parser.add_argument("--plot", type=Path, help="of memory: .png")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    arguments.shape = arguments.shape or ["2048x2048"]
    if arguments.what in ("memory", "alone"):
        {"memory": memory, "alone": alone}[arguments.what](arguments)
        return
    torch.set_num_threads(arguments.threads)
    with threadpool_limits(arguments.threads, "blas"):
        {"matrix": matrix, "layer": layer, "intruders": intruder_dimensions}[arguments.what](arguments)


if __name__ == "__main__":
    main()
