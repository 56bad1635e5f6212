"""``rankscope merge``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from rankscope.cli.surgery_output import surgery_command, weights_option

if TYPE_CHECKING:
    from rankscope.surgery.surgery_result import SurgeryResult


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="BASE ADAPTER...")
@click.option("--as-adapter", is_flag=True, help="Every PATH is an adapter; make one adapter of them.")
@weights_option("One for each adapter [1 each].")
@surgery_command(chooses="maybe")
def command(paths: tuple[str, ...], as_adapter: bool, weights: list[float] | None, **shared: Any) -> SurgeryResult:
    """Add adapters to the weights of their base, or to each other.

    BASE is a checkpoint; its shards, configuration and tokenizer are kept, and each weight is rounded once. With
    --as-adapter there is no BASE: the adapters, of any ranks, become one exactly, whose rank is the sum of theirs, or
    of lower rank by --rank and its like. The table gives the rounding errors.

    \b
    Examples:
      rankscope merge ./base ./adapter -o ./merged
      rankscope merge --as-adapter ./one ./two --weights 1,0.5 --energy 0.99 -o ./both
    """
    from rankscope.surgery.algebra import merge_adapters
    from rankscope.surgery.merge import merge

    if as_adapter:
        return merge_adapters(paths, weights=weights, **shared)
    if shared.pop("choice") or "dtype" in shared:
        raise click.UsageError(
            "ranks and dtype can be chosen with --as-adapter only; a merged weight keeps the dtype of BASE"
        )
    if len(paths) < 2:
        raise click.UsageError("give BASE and at least one ADAPTER, or --as-adapter and two adapters")
    return merge(paths[0], paths[1:], weights=weights, **shared)
