"""``rankscope unmerge``."""

from __future__ import annotations

import click

from rankscope.cli.common import tracker
from rankscope.cli.surgery_output import command_line, parsed_weights, place_options, report_options, show


@click.command()
@click.argument("merged", metavar="MERGED")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--weights", metavar="W,…", help="Those that the adapters were merged with [1 each].")
@place_options
@report_options
def command(
    merged: str,
    adapters: tuple[str, ...],
    weights: str | None,
    output: str,
    device: str,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Take adapters off the weights that they were merged into.

    Rounding lost a part of the original weight wherever the sum was the larger number. The column "from original"
    says how far each layer is expected to be from it, if the sum was rounded once.

    \b
    Examples:
      rankscope unmerge ./merged ./adapter -o ./base-again
      rankscope unmerge ./merged ./one ./two --weights 1,0.5 -o ./base-again
    """
    from rankscope.surgery.merge import unmerge

    result = unmerge(
        merged,
        adapters,
        output,
        parsed_weights(weights),
        device=device,
        track=tracker(quiet, "layers"),
        command=command_line(),
    )
    show(result, as_json, verbose, quiet)
