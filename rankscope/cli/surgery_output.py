"""What the commands that change adapters share: how ranks are chosen, where the output goes, how it is shown."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

import click

from rankscope.cli.options import Command, combine_options
from rankscope.cli.output import format_count, print_json, print_notes, print_table, progress_tracker, skipped_lines

if TYPE_CHECKING:
    import torch

    from rankscope.surgery.surgery_result import SurgeryResult
    from rankscope.surgery.truncate import RankChoice

SurgeryFunction = Callable[..., "SurgeryResult"]
CHOICES = ("rank", "energy", "sigma_ratio", "noise", "budget")
choice_options = combine_options(
    click.option("--rank", type=click.IntRange(min=1), metavar="R", help="At most rank R in every layer."),
    click.option(
        "--energy", type=float, metavar="SHARE", help="The fewest σ that hold this share of each layer's energy."
    ),
    click.option("--sigma-ratio", type=float, metavar="X", help="In every layer the σ of at least X·σ₁."),
    click.option("--noise", is_flag=True, help="The σ that noise, or rounding to half precision, cannot explain."),
    click.option(
        "--budget",
        type=click.IntRange(min=1),
        metavar="PARAMS",
        help="This many parameters in all layers together, with the least total error.",
    ),
)
dtype_option = click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the written factors [as they were]."
)
place_options = combine_options(
    click.option("-o", "--output", required=True, metavar="OUT", help="Folder to be made; nothing is overwritten."),
    click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="Where to compute: cpu, cuda …"),
)
report_options = combine_options(
    click.option("--json", "as_json", is_flag=True, help="Print everything as JSON."),
    click.option("-v", "--verbose", is_flag=True, help="List what was left out, each with its reason."),
    click.option("--quiet", is_flag=True, help="No notes and no progress."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)


def surgery_command(
    chooses: Literal["never", "maybe", "always"] = "never",
) -> Callable[[SurgeryFunction], Callable[..., None]]:
    """A decorator for commands that write an adapter or a model: adds the shared options, and shows the result.

    The function is called with its own arguments, and with those that the functions of ``rankscope.surgery`` share:
    ``out``, ``device``, ``track`` and ``command``; where ranks can be chosen, also ``choice`` and, if given, ``dtype``.
    """
    several = [] if chooses == "never" else [choice_options, dtype_option]

    def decorate(function: SurgeryFunction) -> Callable[..., None]:
        @wraps(function)
        def command(as_json: bool, verbose: bool, quiet: bool, debug: bool, output: str, **arguments: Any) -> None:
            arguments |= {"out": output, "track": progress_tracker(quiet, "layers"), "command": command_line()}
            if chooses != "never":
                choices = {name: arguments.pop(name) for name in CHOICES}
                arguments["choice"] = choice_from_options(chooses == "always", **choices)
                if dtype := arguments.pop("dtype"):
                    arguments["dtype"] = parse_dtype(dtype)
            print_surgery(function(**arguments), as_json, verbose, quiet)

        return combine_options(*several, place_options, report_options)(command)

    return decorate


def choice_from_options(
    required: bool, rank: int | None, energy: float | None, sigma_ratio: float | None, noise: bool, budget: int | None
) -> RankChoice | None:
    """The choice of ranks that the options make; None where they make none.

    Raises:
        UsageError: the options make several choices, or none where one is required.
    """
    from rankscope.surgery.truncate import AboveNoise, Budget, Energy, Rank, SigmaRatio

    makers: list[tuple[Callable[[Any], RankChoice], Any]] = [
        (Rank, rank),
        (Energy, energy),
        (SigmaRatio, sigma_ratio),
        (lambda _: AboveNoise(), noise or None),
        (Budget, budget),
    ]
    given = [(make, value) for make, value in makers if value is not None]
    names = ", ".join(f"--{name.replace('_', '-')}" for name in CHOICES)
    if len(given) > 1:
        raise click.UsageError(f"choose one of {names}, not {len(given)}")
    if required and not given:
        raise click.UsageError(f"no ranks are chosen; give one of {names}")
    return given[0][0](given[0][1]) if given else None


def weights_option(help_text: str) -> Callable[[Command], Command]:
    """``--weights``, which gives a list of numbers."""
    return click.option("--weights", metavar="W,…", callback=_parse_weights, help=help_text)


def _parse_weights(context: click.Context, parameter: click.Parameter, text: str | None) -> list[float] | None:
    """``1,-0.5`` as numbers."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--weights takes numbers with commas between them, not {text!r}") from error


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of that name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def command_line() -> str:
    """The command line, for the record."""
    from rankscope.formats.file_io import as_text

    return as_text(shlex.join(["rankscope", *sys.argv[1:]]))


def print_surgery(result: SurgeryResult, as_json: bool, verbose: bool, quiet: bool) -> None:
    """Notes, then the table or JSON, then where the output is."""
    print_notes(quiet, result.notes)
    if result.carried:
        print_notes(quiet, [f"copied {format_count(len(result.carried), 'tensor')} whole, beside the low-rank layers"])
    print_notes(quiet, skipped_lines(result.skipped, verbose))
    if as_json:
        print_json(result.to_json())
    else:
        print_table(result.table())
    if not quiet:
        click.echo(f"wrote {result.output}", err=True)
