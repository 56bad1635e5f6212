"""``rankscope inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from rankscope.cli.format_names import FormatsCommand
from rankscope.cli.options import debug_option, inspection_options, json_option
from rankscope.cli.output import format_count, print_json, print_rows, remove_control_characters
from rankscope.table import format_number

if TYPE_CHECKING:
    from rankscope.analysis.inspection import Inspection
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

    found = describe_source(path, opening)
    if as_json:
        print_json(found.to_json())
        return
    for title, text in inspection_lines(found, verbose):
        click.echo(f"{title:<12}{remove_control_characters(text)}")
    if found.targets:
        click.echo()
        print_rows(HEADER, [list(row) for row in target_rows(found)])


HEADER = ("target", "layers", "out × in", "r", "α", "scale", "stored", "method")


def inspection_lines(found: Inspection, verbose: bool) -> Iterator[tuple[str, str]]:
    """Titles and what stands behind them."""
    yield "path", found.path
    yield "is", found.says
    if found.base:
        yield "base", found.base
    if found.training:
        yield "made by", found.training
    if found.tensors:
        dtypes = ", ".join(f"{numbers} {dtype}" for dtype, numbers in found.dtypes.items())
        yield (
            "numbers",
            f"{found.parameters} in {format_count(found.tensors, 'tensor')}: {dtypes}; {format_megabytes(found.size)}",
        )
    for text in skip_reason_lines(found.skipped, verbose):
        yield "skipped", text
    for note in found.notes:
        yield "note", note


def target_rows(found: Inspection) -> Iterator[tuple[str, ...]]:
    """One for each kind of layer."""
    for target in found.targets:
        shape = f"{target.shape[0]} × {target.shape[1]}"
        numbers = (format_number(target.nominal_rank), format_number(target.alpha), format_number(target.scale))
        yield (target.name, str(target.layers), shape, *numbers, target.dtype, target.method)


def skip_reason_lines(skipped: tuple[SkippedItem, ...], verbose: bool) -> Iterator[str]:
    """One line a reason: how many, the first, or all."""
    by_reason: dict[str, list[str]] = {}
    for one in skipped:
        by_reason.setdefault(one.reason, []).append(one.name)
    for reason, names in by_reason.items():
        shown = ", ".join(names if verbose else names[:1]) + ("" if verbose or len(names) == 1 else ", …")
        yield f"{len(names)} ({shown}): {reason}"


def format_megabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"
