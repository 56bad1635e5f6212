"""``rankscope subtract``."""

from __future__ import annotations

import click

from rankscope.cli.common import tracker
from rankscope.cli.surgery_output import (
    choice_options,
    chosen,
    command_line,
    dtype_option,
    parsed_dtype,
    place_options,
    report_options,
    show,
)


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@choice_options
@place_options
@dtype_option
@report_options
def command(
    a: str,
    b: str,
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
    """The adapter whose update is that of A minus that of B.

    Exact, with the ranks added, or lower by --rank and its like; --energy 1 drops only what is rounding. Layers that
    one of them lacks count as unchanged there.

    \b
    Examples:
      rankscope subtract ./after ./before -o ./learned-since
      rankscope subtract ./one ./two --energy 1 -o ./difference --json
    """
    from rankscope.surgery.algebra import subtract

    result = subtract(
        a,
        b,
        output,
        chosen(rank, energy, sigma_ratio, noise, budget),
        dtype=parsed_dtype(dtype),
        device=device,
        track=tracker(quiet, "layers"),
        command=command_line(),
    )
    show(result, as_json, verbose, quiet)
