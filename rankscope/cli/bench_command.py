"""``rankscope bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from rankscope.cli.options import debug_option, device_option, json_option, workers_option
from rankscope.cli.output import print_json, print_rows

if TYPE_CHECKING:
    from rankscope.analysis.benchmark import BenchResult


@click.command()
@click.option("--rank", type=click.IntRange(min=1, max=1024), default=64, show_default=True, help="LoRA's r.")
@click.option(
    "--modules",
    "layers",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    metavar="L",
    help="Layers of Llama 3 8B, seven matrices each.",
)
@device_option
@workers_option
@json_option
@debug_option
def command(rank: int, layers: int, device: str, workers: int | None, as_json: bool, debug: bool) -> None:
    """How fast this machine is, and how close the analysis comes.

    Rates of large matrix products, of QR and of reading; then the time of spectrum and compare on made-up adapters
    against the floor: the time that their float64 operations would take as large matrix products. Times are the least
    of five.

    \b
    Examples:
      rankscope bench
      rankscope bench --rank 16 --device cuda --json
    """
    from rankscope.analysis.benchmark import bench

    result = bench(rank, layers, device, workers)
    if as_json:
        print_json(result.to_json())
        return
    click.echo(f"{result.machine}; device {result.device}, torch {result.torch}, workers {result.workers}")
    print_rows(["", "rate"], _rates(result))
    click.echo(f"\nadapter: {result.modules} matrices of Llama 3 8B, rank {result.rank}")
    rows = [
        [name, f"{1e3 * one.seconds:.1f} ms", f"{1e3 * one.floor:.1f} ms", f"{one.ratio:.2f}"]
        for name, one in (("spectrum", result.spectrum), ("compare", result.compare))
    ]
    print_rows(["", "time", "floor", "time/floor"], rows)


def _rates(result: BenchResult) -> list[list[str]]:
    rates = result.rates
    products = {"float32": rates.float32, "float64": rates.float64}
    rows = [["read of a file in memory", format_rate(rates.read, "GB/s")]]
    rows += [[f"matrix product, {name}", format_rate(rate, "Gflop/s")] for name, rate in products.items() if rate]
    return [*rows, [f"QR of 4096 × {result.rank}", format_rate(rates.qr, "Gflop/s")]]


def format_rate(rate: float, unit: str) -> str:
    """A rate in units of 10⁹ a second."""
    return f"{rate / 1e9:.3g} {unit}"
