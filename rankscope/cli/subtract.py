"""``rankscope subtract``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rankscope.cli.surgery_output import acts

if TYPE_CHECKING:
    from rankscope.surgery.result import Surgery
    from rankscope.surgery.truncate import Choice


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@acts(chooses="maybe")
def command(a: str, b: str, choice: Choice | None, output: str, options: dict[str, Any]) -> Surgery:
    """The adapter whose update is that of A minus that of B.

    Exact, with the ranks added, or lower by --rank and its like; --energy 1 drops only what is rounding. Layers that
    one of them lacks count as unchanged there.

    \b
    Examples:
      rankscope subtract ./after ./before -o ./learned-since
      rankscope subtract ./one ./two --energy 1 -o ./difference --json
    """
    from rankscope.surgery.algebra import subtract

    return subtract(a, b, output, choice, **options)
