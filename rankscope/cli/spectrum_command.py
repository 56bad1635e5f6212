"""``rankscope spectrum``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rankscope.cli.format_names import FormatsCommand
from rankscope.cli.options import initial_option, output_options, reading_options, workers_option
from rankscope.cli.output import OutputOptions, print_table, progress_tracker, skipped_lines
from rankscope.cli.torchrun import share_analyses
from rankscope.formats.study_layout import STUDY_NAME

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rankscope.analysis.layer_spectra import SpectrumResult
    from rankscope.formats.opening import Opening
    from rankscope.report.document import Document


@click.command(cls=FormatsCommand)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@reading_options
@initial_option
@click.option("--top", type=click.IntRange(min=1), metavar="K", help="Keep K singular values of each layer.")
@click.option(
    "--sketch",
    type=click.IntRange(min=1),
    metavar="K",
    help="Of full updates, find only the K largest singular values, where that is faster; what the others could change "
    "is given as bounds.",
)
@workers_option
@output_options
def command(
    paths: tuple[str, ...],
    opening: Opening,
    layers: tuple[str, ...],
    initial: tuple[str, ...],
    top: int | None,
    sketch: int | None,
    workers: int | None,
    output: OutputOptions,
) -> None:
    """Singular spectra and effective ranks.

    PATH is an adapter ({formats}), a run, a checkpoint (with --base), or a study, which
    stands for each of its runs. Updates
    that are no product of thin factors have beside them k90 of a noise matrix of their shape, and how many singular
    values noise does not explain (MP, GD). --json gives one object for one PATH, and {"results": [...]} for several
    or a study; --top shortens its lists, and the curves of --plot. --sketch is for checkpoints whose full spectra take
    too long: the energy stays exact, each value has its residual, and a measure that is not determined reads low–high.
    Processes of torchrun -m rankscope share the layers out; the result is that of one.

    \b
    Examples:
      rankscope spectrum ./adapter
      rankscope spectrum ./tuned --base ./base --layers "*v_proj" --plot spectra.png
      rankscope spectrum ./tuned --base ./base --sketch 64
    """
    from rankscope.analysis.layer_spectra import measure_spectra

    if sketch and output.report:
        raise click.UsageError("--report shows every measure, and --sketch leaves some open; leave one of them out")
    with share_analyses():
        places, several = expand_studies(paths)
        if len(initial) > len(places):
            raise click.UsageError(f"{len(initial)} times --initial, and {len(places)} sources")
        results = [
            measure_spectra(
                place, own, layers or None, top, progress_tracker(output.quiet, Path(place).name), workers, sketch
            )
            for place, own in zip(places, opening.for_sources(initial, len(places)), strict=True)
        ]
    _write(results, several, output)


def _write(results: Sequence[SpectrumResult], several: bool, output: OutputOptions) -> None:
    from rankscope.analysis.spectrum_tables import csv_table

    def notes() -> Iterator[str]:
        for result in results:
            prefix = f"{result.title}: " if len(results) > 1 else ""
            yield from (prefix + line for line in (*result.notes, *skipped_lines(result.skipped, output.verbose)))

    def draw() -> Figure:
        from rankscope.plots import plot_spectra

        return plot_spectra(results)

    def page(command: str) -> Document:
        from rankscope.report.spectrum_page import build_document

        return build_document(results, command)

    def as_json() -> dict[str, Any]:
        if not several:
            return results[0].to_json()
        return {"schema": "rankscope.spectrum-list/1", "results": [result.to_json() for result in results]}

    output.write_result(notes(), draw, page, as_json, lambda: csv_table(results), lambda: print_spectra(results))


def expand_studies(paths: Sequence[str]) -> tuple[list[str], bool]:
    """Paths with the runs of a study in its place, and whether the result is a list.

    Raises:
        FormatError: a study without a run that ended and has an update.
    """
    from rankscope.errors import FormatError

    sources: list[str] = []
    if "" in paths:
        raise FormatError("a PATH is empty; name a folder or a file")
    studies = [path for path in paths if _is_study(path)]
    for path in paths:
        if path not in studies:
            sources.append(path)
            continue
        from rankscope.train.study import Study

        study = Study(path)
        runs = [str(study.path(record.run)) for record in study.done() if record.run.method != "base"]
        if not runs:
            raise FormatError(f"{path}: no run of this study has ended yet; let it go on with rankscope train")
        sources += runs
    return sources, len(paths) > 1 or bool(studies)


def _is_study(path: str) -> bool:
    try:
        return (Path(path) / STUDY_NAME).is_file()
    except OSError:  # a name that no file can have: what opens it says so
        return False


def print_spectra(results: Sequence[SpectrumResult]) -> None:
    """A table for each; a heading where there are several."""
    from rankscope.analysis.spectrum_tables import layer_table

    for i, result in enumerate(results):
        if len(results) > 1:
            click.echo(("\n" if i else "") + result.path)
        print_table(layer_table(result))
