"""``rankscope unmerge``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rankscope.cli.surgery_output import surgery_command, weights_option

if TYPE_CHECKING:
    from rankscope.surgery.surgery_result import SurgeryResult


@click.command()
@click.argument("merged", metavar="MERGED")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@weights_option("Those that the adapters were merged with [1 each].")
@surgery_command()
def command(merged: str, adapters: tuple[str, ...], weights: list[float] | None, **shared: Any) -> SurgeryResult:
    """Subtract adapters from the weights that they were merged into.

    Rounding lost a part of the original weight wherever the sum was the larger number. The column "from original"
    gives the expected distance of each layer from its original weight, if the sum was rounded once.

    \b
    Examples:
      rankscope unmerge ./merged ./adapter -o ./base-again
      rankscope unmerge ./merged ./one ./two --weights 1,0.5 -o ./base-again
    """
    from rankscope.surgery.merge import unmerge

    return unmerge(merged, adapters, weights=weights, **shared)
