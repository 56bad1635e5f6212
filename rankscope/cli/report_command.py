"""``rankscope report``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from rankscope.cli.output import print_json, print_table, progress_tracker
from rankscope.table import Table

if TYPE_CHECKING:
    from rankscope.evidence.hypothesis import Hypothesis
    from rankscope.train.results import RunResult
    from rankscope.train.study import Study


class ReportCommand(click.Command):
    """Its help ends with the lines of evidence, as their table has them. Loads them only where help is asked for."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from rankscope.evidence import lines as table

        rows = [(line.name, f"{line.title}{' *' if line.decisive else ''}") for line in table.LINES]
        with formatter.section("Lines of evidence (*: the answer rests on these)"):
            formatter.write_dl(rows)


@click.command(cls=ReportCommand)
@click.argument("study", metavar="STUDY")
@click.option("-o", "--output", metavar="FOLDER", help="Where to write [the study's folder].")
@click.option("--lines", metavar="NAME,…", help="Only these lines of evidence [all].")
@click.option(
    "--of",
    type=click.Choice(["update", "A", "B"]),
    default="update",
    show_default=True,
    help="What overlaps across ranks and seeds: ΔW, or the factors A, as the LoRA paper has it, or B.",
)
@click.option("--device", default="auto", show_default=True, metavar="DEVICE", help="Where to compute.")
@click.option(
    "--cache", metavar="FOLDER", help="Keep the decompositions of the base's weights here; may be deleted [keep none]."
)
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of the table.")
@click.option("--quiet", is_flag=True, help="No notes and no progress.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(
    study: str,
    output: str | None,
    lines: str | None,
    of: Literal["update", "A", "B"],
    device: str,
    cache: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Is the update low-rank, how much rank does the task need, and does effective rank go with performance?

    Reads a study of rankscope train, evaluates the model with updates cut to lower rank, and answers along each
    line of evidence. Writes report.html (one page that needs nothing else), results.json, and figures/ (png, svg
    and csv of each).

    \b
    Examples:
      rankscope report study
      rankscope report study --lines performance,truncation -o what-rank
    """
    from rankscope.train.study import Study

    wanted = [part.strip() for part in lines.split(",") if part.strip()] if lines else None
    result = write_study_report(Study(study), Path(output or study), wanted, of, device, quiet, cache)
    if as_json:
        print_json(result.to_json())
    else:
        print_verdicts(result)


def write_study_report(
    study: Study,
    folder: Path,
    lines: Sequence[str] | None = None,
    of: Literal["update", "A", "B"] = "update",
    device: str = "auto",
    quiet: bool = False,
    cache: str | None = None,
    rows: Sequence[RunResult] | None = None,
) -> Hypothesis:
    """Measure, and write page, results and figures; ``rows`` are the results of the runs, where they are known."""
    from rankscope.analysis.svd_cache import SVDCache
    from rankscope.evidence.hypothesis import hypothesis
    from rankscope.evidence.study_page import build_document
    from rankscope.formats.file_io import write_json
    from rankscope.report.figure_files import write_figures
    from rankscope.report.page import write_page

    result = hypothesis(study, lines, of, device, progress_tracker(quiet, "evidence"), cache, rows)
    if cache and not quiet:
        entries, size = SVDCache(Path(cache).expanduser()).disk_usage
        click.echo(f"{cache} keeps {entries} decompositions, {size / 1e6:.1f} MB", err=True)
    page = build_document(result, shlex.join(["rankscope", *sys.argv[1:]]))
    write_json(folder / "results.json", result.to_json())
    write_figures(page, folder / "figures")
    written = write_page(page, folder / "report.html")
    if not quiet:
        click.echo(f"wrote {written}, results.json and figures/ beside it", err=True)
    return result


def print_verdicts(result: Hypothesis) -> None:
    """A row a verdict, and what is missing."""
    rows = [[verdict.line, verdict.answer, verdict.sentence] for verdict in result.verdicts]
    rows += [[line, "missing", reason] for line, reason in result.missing.items()]
    print_table(Table("verdicts", "", ("line", "answer", "what the numbers say"), rows), left=3)
    click.echo(f"\n{result.sentence}")
