"""``rankscope average``."""

from __future__ import annotations

import click

from rankscope.cli.common import tracker
from rankscope.cli.surgery_output import (
    choice_options,
    chosen,
    command_line,
    dtype_option,
    parsed_dtype,
    parsed_weights,
    place_options,
    report_options,
    show,
)


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--weights", metavar="W,…", help="One for each adapter, divided by their sum [equal].")
@choice_options
@place_options
@dtype_option
@report_options
def command(
    adapters: tuple[str, ...],
    weights: str | None,
    rank: int | None,
    energy: float | None,
    sigma_ratio: float | None,
    noise: bool,
    budget: int | None,
    output: str,
    device: str,
    dtype: str | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """The adapter whose update is the mean of several.

    The mean of the updates sBA, not of the factors. Exact, with the ranks added, or lower by --rank and its like;
    --energy 1 drops only what is rounding. Heads and biases that all of them hold are averaged too.

    \b
    Examples:
      rankscope average ./seed0 ./seed1 ./seed2 --energy 1 -o ./mean
      rankscope average ./one ./two --weights 3,1 --rank 16 -o ./mixed
    """
    from rankscope.surgery.algebra import average

    result = average(
        adapters,
        output,
        parsed_weights(weights),
        chosen(rank, energy, sigma_ratio, noise, budget),
        dtype=parsed_dtype(dtype),
        device=device,
        track=tracker(quiet, "layers"),
        command=command_line(),
    )
    show(result, as_json, verbose, quiet)
