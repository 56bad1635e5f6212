"""``rankscope resize``."""

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
    required,
    show,
)


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@choice_options
@place_options
@dtype_option
@report_options
def command(
    adapter: str,
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
    """Shrink an adapter: the same update at lower rank, as close as that rank allows.

    ADAPTER is a LoRA adapter in PEFT's layout, or a run of a study. Each layer keeps its largest singular values;
    --budget gives rank to the layers where it counts. The output has α = r and loads in PEFT; heads, biases and
    DoRA's magnitudes go along. The table gives what was lost, exactly.

    \b
    Examples:
      rankscope resize ./adapter --energy 0.95 -o ./small
      rankscope resize ./adapter --budget 1000000 -o ./small --json
    """
    from rankscope.surgery.resize import resize

    choice = required(chosen(rank, energy, sigma_ratio, noise, budget))
    result = resize(
        adapter,
        choice,
        output,
        dtype=parsed_dtype(dtype),
        device=device,
        track=tracker(quiet, "layers"),
        command=command_line(),
    )
    show(result, as_json, verbose, quiet)
