"""The command line: a skin over the library, and the only place that prints or exits.

Commands are imported when they are run, so that ``rankscope --help`` loads neither torch nor matplotlib.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import NamedTuple

import click

from rankscope.cli.torchrun import SHARED_COMMANDS, is_first_process
from rankscope.errors import RankscopeError


class CommandEntry(NamedTuple):
    """The module whose ``command`` it is, and its line in the list of commands."""

    module: str
    summary: str


COMMANDS = {
    "train": CommandEntry("rankscope.cli.train_command", "Train LoRA at many ranks, and full fine-tuning beside it."),
    "spectrum": CommandEntry(
        "rankscope.cli.spectrum_command", "Singular spectra and effective ranks of adapters or of a tuned checkpoint."
    ),
    "compare": CommandEntry(
        "rankscope.cli.compare_command", "Overlap, angles and distance of two adapters or updates, with chance levels."
    ),
    "inspect": CommandEntry(
        "rankscope.cli.inspect_command",
        "What a file or folder is: format, method, ranks, targets, what cannot be read.",
    ),
    "check": CommandEntry(
        "rankscope.cli.check_command", "What is wrong with an adapter; whether a merged checkpoint contains it."
    ),
    "report": CommandEntry(
        "rankscope.cli.report_command",
        "The hypothesis tested on a study, along several lines of evidence, as one page.",
    ),
    "resize": CommandEntry("rankscope.cli.resize_command", "Shrink an adapter: the same update at lower rank."),
    "convert": CommandEntry("rankscope.cli.convert_command", "An adapter in the format of another tool."),
    "extract": CommandEntry("rankscope.cli.extract_command", "A LoRA adapter from a full fine-tune."),
    "merge": CommandEntry("rankscope.cli.merge_command", "Adapters into their base, or into one adapter."),
    "unmerge": CommandEntry("rankscope.cli.unmerge_command", "Take adapters out of a merged model."),
    "subtract": CommandEntry(
        "rankscope.cli.subtract_command", "What one adapter learned beyond another, as an adapter."
    ),
    "average": CommandEntry("rankscope.cli.average_command", "The mean of adapters, as an adapter."),
    "bench": CommandEntry("rankscope.cli.bench_command", "How fast this machine is, and how close the analysis comes."),
    "calibrate": CommandEntry(
        "rankscope.cli.calibrate_command", "The whole instrument on planted truth: can it find a rank, can it say no?"
    ),
}
"""The commands by name, in the order of the help; a module is imported when its command runs."""


class LazyGroup(click.Group):
    """Imports a command of ``COMMANDS`` when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name].module).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="rankscope")
@click.pass_context
def cli(context: click.Context) -> None:
    """Test the low-intrinsic-rank hypothesis of LoRA on any model.

    \b
    Examples:
      rankscope train                           the embedded task, ranks 1 to 64 and full fine-tuning
      rankscope spectrum study                  what rank each run's update really has
      rankscope compare adapterA adapterB       do two adapters learn the same directions?
      rankscope inspect lora.safetensors        what is in this file?
      rankscope check adapter --base base       did it learn anything, is it applied, is it too strong?
      rankscope report study                    how much rank does the task need? one page
    """
    if not is_first_process() and context.invoked_subcommand not in SHARED_COMMANDS:
        context.exit()


def main(args: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 1 the data or the run failed, 2 wrong usage, 3 ``check`` found an
    error, 130 interrupted."""
    try:
        code = cli.main(args=args, prog_name="rankscope", standalone_mode=False)
    except click.ClickException as error:
        code = 0  # of any process of torchrun but the first, which says it for all
        if is_first_process():
            error.show()
            code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        if is_first_process():
            click.echo("interrupted", err=True)
        code = 130
    except RankscopeError as error:
        if "--debug" in (sys.argv[1:] if args is None else args):
            raise
        click.echo(f"rankscope: {one_line(str(error))}", err=True)
        code = 1
    except BrokenPipeError:
        # The reader (head, less) has gone; Python would complain again when it closes stdout.
        sys.stderr.close()
        code = 1
    except OSError as error:
        # The library turns what its files raise into its own errors: this is stdout, on a full disk.
        click.echo(f"rankscope: the output cannot be written ({error.strerror or error})", err=True)
        discard_output()
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def discard_output() -> None:
    """Send what is still unwritten to nowhere, or Python would try again, and complain, when it ends."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def one_line(message: str) -> str:
    return " ".join(message.split())
