"""``rankscope inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from rankscope.cli.format_names import FormatsCommand
from rankscope.cli.options import debug_option, inspection_options, json_option
from rankscope.cli.output import format_count, print_json, print_table, remove_control_characters
from rankscope.table import Column, Table

if TYPE_CHECKING:
    from rankscope.analysis.inspection import Inspection, TargetGroup
    from rankscope.formats.abstract_store import SkippedItem
    from rankscope.formats.opening import Opening


@click.command(cls=FormatsCommand)
@click.argument("path", metavar="PATH")
@inspection_options
@json_option
@click.option("-v", "--verbose", is_flag=True, help="Name every tensor that is skipped.")
@debug_option
def command(path: str, opening: Opening, as_json: bool, verbose: bool, debug: bool) -> None:
    """What a file or folder is, from its headers: format, method, base, ranks, α, targets, size.

    PATH is an adapter in any format that is read ({formats}), full weights with or
    without their base, a file of updates, a run, or a study. What the other commands will leave out is listed with the
    reason.

    \b
    Examples:
      rankscope inspect ./lora.safetensors
      rankscope inspect ./adapter --json
    """
    from rankscope.analysis.inspection import describe_source

    inspection = describe_source(path, opening)
    if as_json:
        print_json(inspection.to_json())
        return
    for title, text in inspection_lines(inspection, verbose):
        click.echo(f"{title:<12}{remove_control_characters(text)}")
    if inspection.targets:
        click.echo()
        print_table(target_table(inspection))


def inspection_lines(inspection: Inspection, verbose: bool) -> Iterator[tuple[str, str]]:
    """Titles and what stands behind them."""
    yield "path", inspection.path
    yield "is", inspection.says
    if inspection.base:
        yield "base", inspection.base
    if inspection.training:
        yield "made by", inspection.training
    if inspection.tensors:
        dtypes = ", ".join(f"{numbers} {dtype}" for dtype, numbers in inspection.dtypes.items())
        yield (
            "numbers",
            f"{inspection.parameters} in {format_count(inspection.tensors, 'tensor')}: {dtypes}; "
            f"{format_megabytes(inspection.size)}",
        )
    for text in skip_reason_lines(inspection.skipped, verbose):
        yield "skipped", text
    for note in inspection.notes:
        yield "note", note


def target_table(inspection: Inspection) -> Table:
    """A row for each kind of layer."""
    columns: list[Column[TargetGroup]] = [
        Column.of(lambda target: target.name, terminal="target"),
        Column.of(lambda target: target.layers, terminal="layers"),
        Column.of(lambda target: f"{target.shape[0]} × {target.shape[1]}", terminal="out × in"),
        Column.of(lambda target: target.nominal_rank, terminal="r"),
        Column.of(lambda target: target.alpha, terminal="α"),
        Column.of(lambda target: target.scale, terminal="scale"),
        Column.of(lambda target: target.dtype, terminal="stored"),
        Column.of(lambda target: target.method, terminal="method"),
    ]
    return Table.of(columns, inspection.targets, "terminal")


def skip_reason_lines(skipped: tuple[SkippedItem, ...], verbose: bool) -> Iterator[str]:
    """One line a reason: how many, the first, or all."""
    by_reason: dict[str, list[str]] = {}
    for item in skipped:
        by_reason.setdefault(item.reason, []).append(item.name)
    for reason, names in by_reason.items():
        shown = ", ".join(names if verbose else names[:1]) + ("" if verbose or len(names) == 1 else ", …")
        yield f"{len(names)} ({shown}): {reason}"


def format_megabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"
