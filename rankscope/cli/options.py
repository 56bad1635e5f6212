"""Options that several commands have, and the values that they hand to a command."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from rankscope.cli.output import OutputOptions

Command = TypeVar("Command", bound=Callable[..., Any])


def combine_options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, shown in the order given."""

    def apply(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def _plot_path(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse a suffix that cannot be drawn before any work is done."""
    if value is not None:
        from rankscope.errors import ConfigError
        from rankscope.plots import check_suffix

        try:
            check_suffix(value)
        except ConfigError as error:
            raise click.BadParameter(str(error), context, parameter) from error
    return value


def _page_path(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse what cannot be a page before any work is done."""
    if value is not None and Path(value).suffix.lower() != ".html":
        raise click.BadParameter(f"{value}: a page is written as .html", context, parameter)
    if value is not None and Path(value).expanduser().is_dir():
        raise click.BadParameter(f"{value}: is a folder; give the page a name of its own", context, parameter)
    return value


def _as_opening(function: Command) -> Command:
    """Hand a command its options --base, --alpha and --device as one value ``opening``, those that it has."""

    @wraps(function)
    def with_opening(*args: Any, **values: Any) -> Any:
        from rankscope.formats.opening import Opening

        settings = {name: values.pop(name) for name in ("base", "alpha", "device") if name in values}
        return function(*args, opening=Opening(**settings), **values)

    return cast(Command, with_opening)


def _as_output(function: Command) -> Command:
    """Hand a command its options on output as one value ``output``.

    Raises:
        UsageError: JSON and CSV were both asked for.
    """

    @wraps(function)
    def with_output(*args: Any, debug: bool, **values: Any) -> Any:
        output = OutputOptions(**{name: values.pop(name) for name in OutputOptions._fields})
        output.check()
        return function(*args, output=output, **values)

    return cast(Command, with_output)


alpha_option = click.option("--alpha", type=float, metavar="α", help="LoRA's α where the file has none (loralib).")
device_option = click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="Where to compute: cpu, cuda …"
)
reading_options = combine_options(
    click.option("--base", metavar="PATH", help="Pre-trained checkpoint that full weights were tuned from."),
    alpha_option,
    click.option(
        "--layers",
        multiple=True,
        metavar="PATTERN",
        help="Only these: a glob of the whole name ('*v_proj'), or dotted parts of it (q_proj, layers.0). Repeatable.",
    ),
    device_option,
    _as_opening,
)
"""--base, --alpha and --device as ``opening``, and --layers as ``layers``."""
initial_option = click.option(
    "--initial",
    multiple=True,
    metavar="PATH",
    help="A LoRA adapter as it was before training, where that moved the base (PiSSA and others). Repeatable: for the "
    "first source, the second …",
)
inspection_options = combine_options(
    click.option("--base", metavar="PATH", help="Pre-trained checkpoint, where it decides what can be read."),
    alpha_option,
    _as_opening,
)
"""--base and --alpha as ``opening``."""
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads that adapters' layers are shared out over [the cores]; the numbers are the same.",
)
debug_option = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
output_options = combine_options(
    json_option,
    click.option("--csv", "as_csv", is_flag=True, help="Print one row a layer as CSV."),
    click.option("--plot", metavar="FILE", callback=_plot_path, help="Draw to a .png, .svg or .pdf file."),
    click.option(
        "--report", metavar="FILE.html", callback=_page_path, help="Write it all as one page that needs nothing else."
    ),
    click.option("-v", "--verbose", is_flag=True, help="List what was skipped, each with its reason."),
    click.option("--quiet", is_flag=True, help="No notes and no progress."),
    debug_option,
    _as_output,
)
"""The options on output as ``output``, an ``OutputOptions``."""
