"""``rankscope merge``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rankscope.cli.surgery_output import parse_weights, surgery_command

if TYPE_CHECKING:
    from rankscope.surgery.surgery_result import SurgeryResult
    from rankscope.surgery.truncate import RankChoice


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="BASE ADAPTER...")
@click.option("--as-adapter", is_flag=True, help="Every PATH is an adapter; make one adapter of them.")
@click.option("--weights", metavar="W,…", help="One for each adapter [1 each].")
@surgery_command(chooses="maybe")
def command(
    paths: tuple[str, ...],
    as_adapter: bool,
    weights: str | None,
    choice: RankChoice | None,
    output: str,
    options: dict[str, Any],
) -> SurgeryResult:
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

    if as_adapter:
        return merge_adapters(paths, output, parse_weights(weights), choice, **options)
    if choice or "dtype" in options:
        raise click.UsageError("ranks and dtype are those of BASE's weights; choose them with --as-adapter only")
    if len(paths) < 2:
        raise click.UsageError("give BASE and at least one ADAPTER, or --as-adapter and two adapters")
    return merge(paths[0], paths[1:], output, parse_weights(weights), **options)
