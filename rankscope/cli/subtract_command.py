"""``rankscope subtract``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rankscope.cli.surgery_output import surgery_command

if TYPE_CHECKING:
    from rankscope.surgery.surgery_result import SurgeryResult


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@surgery_command(chooses="maybe")
def command(a: str, b: str, **shared: Any) -> SurgeryResult:
    """The adapter whose update is that of A minus that of B.

    Exact, with the sum of both ranks, or of lower rank by --rank and its like; --energy 1 drops only rounding errors.
    A layer that one of them lacks counts as unchanged there.

    \b
    Examples:
      rankscope subtract ./after ./before -o ./learned-since
      rankscope subtract ./one ./two --energy 1 -o ./difference --json
    """
    from rankscope.surgery.algebra import subtract

    return subtract(a, b, **shared)
