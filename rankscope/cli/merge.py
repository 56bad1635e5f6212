"""``rankscope merge``."""

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
@click.argument("paths", nargs=-1, required=True, metavar="BASE ADAPTER...")
@click.option("--as-adapter", is_flag=True, help="Every PATH is an adapter; make one adapter of them.")
@click.option("--weights", metavar="W,…", help="One for each adapter [1 each].")
@choice_options
@place_options
@dtype_option
@report_options
def command(
    paths: tuple[str, ...],
    as_adapter: bool,
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
    """Add adapters to the weights of their base, or to each other.

    BASE is a checkpoint; its shards, configuration and tokenizer are kept, and each weight is rounded once. With
    --as-adapter there is no BASE: the adapters, of any ranks, become one whose rank is their sum, exactly, or lower
    by --rank and its like. The table gives what rounding took.

    \b
    Examples:
      rankscope merge ./base ./adapter -o ./merged
      rankscope merge --as-adapter ./one ./two --weights 1,0.5 --energy 0.99 -o ./both
    """
    from rankscope.surgery.algebra import merge_adapters
    from rankscope.surgery.merge import merge

    choice = chosen(rank, energy, sigma_ratio, noise, budget)
    if as_adapter:
        result = merge_adapters(
            paths,
            output,
            parsed_weights(weights),
            choice,
            dtype=parsed_dtype(dtype),
            device=device,
            track=tracker(quiet, "layers"),
            command=command_line(),
        )
    else:
        if choice or dtype:
            raise click.UsageError("ranks and dtype are those of BASE's weights; choose them with --as-adapter only")
        if len(paths) < 2:
            raise click.UsageError("give BASE and at least one ADAPTER, or --as-adapter and two adapters")
        result = merge(
            paths[0],
            paths[1:],
            output,
            parsed_weights(weights),
            device=device,
            track=tracker(quiet, "layers"),
            command=command_line(),
        )
    show(result, as_json, verbose, quiet)
