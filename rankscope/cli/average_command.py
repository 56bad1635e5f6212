"""``rankscope average``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rankscope.cli.surgery_output import surgery_command, weights_option

if TYPE_CHECKING:
    from rankscope.surgery.surgery_result import SurgeryResult


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@weights_option("One for each adapter, divided by their sum [equal].")
@surgery_command(chooses="maybe")
def command(adapters: tuple[str, ...], weights: list[float] | None, **shared: Any) -> SurgeryResult:
    """The adapter whose update is the mean of several.

    The mean of the updates sBA, not of the factors. Exact, with the sum of the ranks, or of lower rank by --rank and
    its like; --energy 1 drops only rounding errors. Heads and biases that all of them hold are averaged too.

    \b
    Examples:
      rankscope average ./seed0 ./seed1 ./seed2 --energy 1 -o ./mean
      rankscope average ./one ./two --weights 3,1 --rank 16 -o ./mixed
    """
    from rankscope.surgery.algebra import average

    return average(adapters, weights=weights, **shared)
