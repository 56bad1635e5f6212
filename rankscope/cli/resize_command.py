"""``rankscope resize``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rankscope.cli.surgery_output import surgery_command

if TYPE_CHECKING:
    from rankscope.surgery.surgery_result import SurgeryResult


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@click.option(
    "--initial",
    metavar="PATH",
    help="The adapter as it was before training, where that moved the base (PiSSA and others).",
)
@surgery_command(chooses="always")
def command(adapter: str, initial: str | None, **shared: Any) -> SurgeryResult:
    """Shrink an adapter: the same update at lower rank, as close as that rank allows.

    ADAPTER is a LoRA adapter in PEFT's layout, or a run of a study. Each layer keeps its largest singular values;
    --budget chooses the ranks for which the total error is least. The output has α = r and loads in PEFT; heads,
    biases and DoRA's magnitudes are copied. The table gives the exact error.

    \b
    Examples:
      rankscope resize ./adapter --energy 0.95 -o ./small
      rankscope resize ./adapter --budget 1000000 -o ./small --json
    """
    from rankscope.surgery.resize import resize

    return resize(adapter, initial=initial, **shared)
