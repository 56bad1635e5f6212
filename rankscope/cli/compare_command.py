"""``rankscope compare``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import click

from rankscope.cli import matrix_output as matrix
from rankscope.cli.format_names import FormatsCommand
from rankscope.cli.options import initial_option, output_options, reading_options, workers_option
from rankscope.cli.output import OutputOptions, format_count, print_table, progress_tracker, skipped_lines
from rankscope.cli.spectrum_command import expand_studies
from rankscope.cli.torchrun import share_analyses
from rankscope.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rankscope.analysis.comparison import CompareResult
    from rankscope.analysis.layer_comparison import ComparisonSettings
    from rankscope.formats.opening import Opening
    from rankscope.report.document import Document


@click.command(cls=FormatsCommand)
@click.argument("sources", nargs=-1, metavar="A B [C...]")
@reading_options
@initial_option
@click.option("--top", type=click.IntRange(min=1), metavar="K", help="Compare the top K directions at most.")
@click.option(
    "--of",
    type=click.Choice(["update", "A", "B"]),
    default="update",
    show_default=True,
    help="Which matrices: ΔW, the factors A (right side, as in the LoRA paper), or the factors B (left side).",
)
@click.option(
    "--rename",
    multiple=True,
    metavar="FROM=TO",
    help="Read FROM in the names of A (of three or more sources: of each that has it) as TO; with nothing before =, "
    "put TO in front. Repeatable, in this order.",
)
@click.option("--layer", metavar="NAME", help="The layer that --plot and --report draw [the median].")
@workers_option
@output_options
def command(
    sources: tuple[str, ...],
    opening: Opening,
    layers: tuple[str, ...],
    initial: tuple[str, ...],
    top: int | None,
    of: Literal["update", "A", "B"],
    rename: tuple[str, ...],
    layer: str | None,
    workers: int | None,
    output: OutputOptions,
) -> None:
    """Overlap, angles and distance of two sets of updates, or of each with each.

    A and B are adapters ({formats}), runs, or checkpoints (with --base). Layers are
    paired by name, across the conventions of these tools; a fused qkv projection is split where the other side has q,
    k and v. Left is the output space, right the input space. φ
    is the overlap of the top k directions of each, k the smaller number of the two, with the overlap of random
    directions in brackets; z and p say how far from random it is. --json has φ for every pair of cuts.
    Processes of torchrun -m rankscope share the layers out; the result is that of one.

    \b
    Examples:
      rankscope compare adapterA adapterB
      rankscope compare adapter lora.safetensors --rename base.=model.
      rankscope compare study/runs/lora-r8-lr0.007-s0 study/runs/full-lr0.002-s0 --plot overlap.png
      rankscope compare adapters/* --plot alike.png
    """
    # A study is one path and several sources; of two paths each is what it was.
    paths = list(sources) if len(sources) in (0, 2) else expand_studies(sources)[0]
    if len(paths) < 2:
        raise click.UsageError(f"Missing argument '{'AB'[len(paths)]}'.")
    if len(initial) > len(paths):
        raise click.UsageError(f"{len(initial)} times --initial, and {len(paths)} sources")
    if layer and not output.plot and not output.report:
        raise click.UsageError("--layer says what --plot and --report draw; give --plot FILE or --report FILE too")
    if layer and len(paths) > 2:
        raise click.UsageError("--layer says which layer of two sources is drawn; a matrix of several shows them all")
    renames = [parse_rename(text) for text in rename]
    openings = opening.for_sources(initial, len(paths))

    from rankscope.analysis.layer_comparison import ComparisonSettings

    settings = ComparisonSettings(layers or None, top, of, progress_tracker(output.quiet, "layers"), renames, workers)
    if len(paths) == 2:
        _compare_two(paths, openings, settings, layer, output)
    else:
        _compare_all(paths, openings, settings, output)


def _compare_two(
    paths: Sequence[str],
    openings: Sequence[Opening],
    settings: ComparisonSettings,
    layer: str | None,
    output: OutputOptions,
) -> None:
    from rankscope.analysis.comparison import compare_sources
    from rankscope.analysis.comparison_tables import layer_columns, layer_table

    with share_analyses():
        result = compare_sources(paths, openings, settings)

    def draw() -> Figure:
        from rankscope.plots import plot_overlap

        return plot_overlap(result, layer)

    def page(command: str) -> Document:
        from rankscope.report.compare_page import build_document

        return build_document(result, layer, command)

    verbose = output.verbose
    output.write_result(
        [*result.notes, *unmatched_lines(result, verbose), *skipped_lines(result.skipped, verbose)],
        draw,
        page,
        result.to_json,
        lambda: Table.of(layer_columns(result), result.layers, "csv"),
        lambda: print_table(layer_table(result)),
    )


def _compare_all(
    paths: Sequence[str], openings: Sequence[Opening], settings: ComparisonSettings, output: OutputOptions
) -> None:
    from rankscope.analysis.matrix import compare_each_with_each
    from rankscope.analysis.matrix_tables import pair_table

    with share_analyses():
        result = compare_each_with_each(paths, openings, settings)

    def draw() -> Figure:
        from rankscope.plots import plot_matrix

        return plot_matrix(result)

    def page(command: str) -> Document:
        from rankscope.report.matrix_page import build_document

        return build_document(result, command)

    verbose = output.verbose
    output.write_result(
        [*result.notes, *matrix.uncommon_layer_lines(result, verbose), *skipped_lines(result.skipped, verbose)],
        draw,
        page,
        result.to_json,
        lambda: pair_table(result, "csv"),
        lambda: matrix.print_matrix(result),
    )


def parse_rename(text: str) -> tuple[str, str]:
    """``FROM=TO`` as a pair.

    Raises:
        UsageError: there is no "=" in it, or nothing beside it.
    """
    old, equals, new = text.partition("=")
    if not equals or old == new:
        raise click.UsageError(f"--rename takes FROM=TO, not {text!r}")
    return old, new


def unmatched_lines(result: CompareResult, verbose: bool) -> Iterator[str]:
    """Layers without a partner: how many, or all of them."""
    for side, names in (("a", result.unmatched.a), ("b", result.unmatched.b)):
        if names:
            shown = ", ".join(names if verbose else names[:1]) + ("" if verbose or len(names) == 1 else ", …")
            yield f"{format_count(len(names), 'layer')} only in {side}: {shown}"
