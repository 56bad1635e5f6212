"""How the commands write to stdout and stderr: tables, CSV, JSON, notes, progress, and the files that are asked for."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import click

from rankscope.cli.torchrun import is_first_process
from rankscope.table import Table

MIN_NAME_WIDTH = 16
PROGRESS_DELAY = 2.0  # seconds after which a bar is shown


def print_json(value: Any) -> None:
    """Strict JSON on one line (grids are long): NaN and infinity would be an error, not an extension."""
    click.echo(json.dumps(value, allow_nan=False, ensure_ascii=False))


def print_csv(table: Table) -> None:
    """A table with every digit of its numbers; None is an empty field."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows(table.rows)


def print_table(table: Table, left: int = 1) -> None:
    """A table on stdout, its numbers rounded, its total below a line; see ``print_rows``."""
    print_rows(table.header, table.text_rows(), left, totals=table.total is not None)


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, totals: int = 0) -> None:
    """A table on stdout: the first ``left`` columns flush left, the others right; ``totals`` rows below a line.

    In a pipe every name is whole and nothing but text is written. A narrow terminal gets the ends of the names in
    the first column, which tell layers apart, and every number whole.
    """
    screen = sys.stdout.isatty()
    table = [[remove_control_characters(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    if screen:
        room = shutil.get_terminal_size().columns - sum(widths[1:]) - 2 * (len(widths) - 1)
        widths[0] = min(widths[0], max(room, MIN_NAME_WIDTH))
    for number, row in enumerate(table):
        cells = (_align(cell, width, i < left) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        line = "  ".join(cells).rstrip()
        if screen and totals and number == len(table) - totals:
            click.echo("─" * (sum(widths) + 2 * (len(widths) - 1)))
        click.echo(click.style(line, bold=True) if screen and number == 0 else line)


def _align(cell: str, width: int, left: bool) -> str:
    cell = cell if len(cell) <= width else "…" + cell[len(cell) - width + 1 :]
    return cell.ljust(width) if left else cell.rjust(width)


def remove_control_characters(text: str) -> str:
    """Text without control characters: names come from files, and must not steer the terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def print_notes(quiet: bool, lines: Iterable[str]) -> None:
    """Notes on stderr."""
    if not quiet:
        for line in lines:
            click.echo(f"note: {remove_control_characters(line)}", err=True)


def format_count(n: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def skipped_lines(skipped: Sequence[Any], verbose: bool) -> Iterator[str]:
    """How many were skipped, or all of them with their reasons."""
    if verbose:
        yield from (f"skipped {one.name}: {one.reason}" for one in skipped)
    elif skipped:
        yield f"skipped {format_count(len(skipped), 'tensor')} ({skipped[0].name}: {skipped[0].reason}); -v lists them"


def progress_tracker(quiet: bool, what: str) -> Callable[[list[Any]], Iterable[Any]]:
    """For the ``track`` of an analysis: a bar on stderr, on a terminal only, after ``PROGRESS_DELAY`` seconds."""

    def track(items: list[Any]) -> Iterator[Any]:
        if quiet or not is_first_process() or not sys.stderr.isatty():
            yield from items
            return
        from rich.console import Console
        from rich.progress import Progress

        began = time.monotonic()
        progress = Progress(console=Console(stderr=True), transient=True)
        task = progress.add_task(what, total=len(items))
        try:
            for done, item in enumerate(items):
                progress.update(task, completed=done)
                if time.monotonic() - began > PROGRESS_DELAY:
                    progress.start()
                yield item
        finally:
            progress.stop()

    return track


def write_plot(draw: Callable[[], Any], path: str | None, quiet: bool) -> None:
    """Draw and save where a path was given."""
    if path is None:
        return
    from rankscope.plots import save

    save(draw(), path)
    if not quiet:
        click.echo(f"wrote {path}", err=True)


def write_report(build: Callable[[str], Any], path: str | None, quiet: bool) -> None:
    """Write a page where a path was given; ``build`` makes its document from the command that asks for it."""
    if path is None:
        return
    from rankscope.report.page import write_page

    write_page(build(shlex.join(["rankscope", *sys.argv[1:]])), path)
    if not quiet:
        click.echo(f"wrote {path}", err=True)


class OutputOptions(NamedTuple):
    """How a result is to be given: the values of ``output_options``."""

    as_json: bool
    as_csv: bool
    plot: str | None
    report: str | None
    verbose: bool
    quiet: bool

    def check(self) -> None:
        """Refuse, before any work is done, what would mix two formats on stdout.

        Raises:
            UsageError: JSON and CSV were both asked for.
        """
        if self.as_json and self.as_csv:
            raise click.UsageError("--json and --csv both write to stdout; choose one")

    def write_result(
        self,
        notes: Iterable[str],
        draw: Callable[[], Any],
        page: Callable[[str], Any],
        as_json: Callable[[], Any],
        as_csv: Callable[[], Table],
        table: Callable[[], None],
    ) -> None:
        """Notes, files, then the result on stdout; of the forms only those that were asked for are made.

        Of the processes of torchrun the first gives it, and the others have nothing left to do.

        Pictures and pages come first: what they refuse is said before a table and not after it, and whoever pipes the
        table into head may end this process.
        """
        if not is_first_process():
            return
        print_notes(self.quiet, notes)
        write_plot(draw, self.plot, self.quiet)
        write_report(page, self.report, self.quiet)
        if self.as_json:
            print_json(as_json())
        elif self.as_csv:
            print_csv(as_csv())
        else:
            table()
