"""``rankscope check``."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click

from rankscope.cli.format_names import FormatsCommand
from rankscope.cli.options import debug_option, device_option, inspection_options, json_option
from rankscope.cli.output import print_json, progress_tracker, remove_control_characters

if TYPE_CHECKING:
    from rankscope.checks.check import CheckResult
    from rankscope.formats.opening import Opening

EXIT_CODE = 3
"""Of a check that found an error."""
WIDTH = 80
MARKS = {"error": "ERROR", "warning": "warning", "unchecked": "unknown", "ok": "ok"}
COLOURS = {"error": "red", "warning": "yellow", "unchecked": "cyan", "ok": "green"}


def _print_thresholds(context: click.Context, _: click.Parameter, is_asked: bool) -> None:
    if not is_asked:
        return
    from rankscope.checks.thresholds import THRESHOLDS

    width = max(len(row.name) for row in THRESHOLDS)
    for row in THRESHOLDS:
        print_wrapped(row.reason, " " * (width + 10), f"{row.name:<{width}}  {row.value:<6.4g}  ")
    context.exit()


@click.command(cls=FormatsCommand)
@click.argument("path", metavar="PATH")
@inspection_options
@click.option("--adapter", metavar="ADAPTER", help="PATH is a checkpoint: does it contain this adapter?")
@click.option(
    "--for", "server", metavar="SERVER", help="Also check what this server takes: vllm (ranks, layers, parts)."
)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Move a threshold. Repeatable.")
@click.option(
    "--thresholds",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_thresholds,
    help="List the thresholds with their reasons, and end.",
)
@device_option
@json_option
@click.option("--sarif", "as_sarif", is_flag=True, help="Print the findings as SARIF 2.1.0, for code hosts.")
@click.option("-v", "--verbose", is_flag=True, help="Name every layer that a finding concerns.")
@click.option("--quiet", is_flag=True, help="No progress, and no findings that are ok.")
@debug_option
@click.pass_context
def command(
    context: click.Context,
    path: str,
    opening: Opening,
    adapter: str | None,
    server: str | None,
    settings: tuple[str, ...],
    as_json: bool,
    as_sarif: bool,
    verbose: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """What is wrong with an adapter, or whether a checkpoint contains one.

    PATH is an adapter in any format that is read ({formats}), or, with --adapter and
    --base, a merged checkpoint. Each finding is ok, a warning, an error, or unknown (what it needs was not given), with
    its number and what to do. With --base names, shapes and ‖ΔW‖/‖W‖ are checked too: an adapter whose names match
    nothing is ignored by loaders and servers without an error. The first line is the answer, the second the command to
    run next. The exit code is 3 where an error is found.

    \b
    Examples:
      rankscope check ./adapter --base ./base
      rankscope check ./adapter --for vllm --set scale_high=32
      rankscope check ./merged --base ./base --adapter ./adapter
    """
    from rankscope.checks.check import examine
    from rankscope.checks.thresholds import parse_settings

    if as_json and as_sarif:
        raise click.UsageError("--json and --sarif both write to stdout; choose one")
    result = examine(path, opening, adapter, server, parse_settings(settings), progress_tracker(quiet, "check"))
    if as_json:
        print_json(result.to_json())
    elif as_sarif:
        import rankscope
        from rankscope.checks.sarif import to_sarif

        print_json(to_sarif(result, rankscope.__version__))
    else:
        print_findings(result, verbose, quiet)
    context.exit(EXIT_CODE if result.has_errors else 0)


def print_findings(result: CheckResult, verbose: bool, quiet: bool) -> None:
    """The answer, the next command, and each finding with its mark and its check, at most 80 columns wide."""
    print_wrapped(result.answer, "")
    click.echo(f"next: {remove_control_characters(result.next)}")
    click.echo()
    width = max((len(finding.check) for finding in result.findings), default=0)
    for finding in result.findings:
        if quiet and finding.level == "ok":
            continue
        mark = click.style(f"{MARKS[finding.level]:<8}", fg=COLOURS[finding.level])
        head, indent = f"{mark}{finding.check:<{width}}  ", " " * (8 + width + 2)
        print_wrapped(finding.says, indent, head)
        if finding.advice:
            print_wrapped(f"→ {finding.advice}", indent)
        if verbose:
            for name in finding.layers:
                click.echo(f"{indent}· {remove_control_characters(name)}")


def print_wrapped(text: str, indent: str, head: str | None = None) -> None:
    """A sentence within ``WIDTH`` columns; ``head`` stands before it in place of the first indent."""
    lines = textwrap.wrap(
        remove_control_characters(text), WIDTH - len(indent), break_long_words=False, break_on_hyphens=False
    )
    for i, line in enumerate(lines or [""]):
        click.echo((head if head is not None and i == 0 else indent) + line)
