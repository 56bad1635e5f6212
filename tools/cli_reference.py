"""Write docs/cli.md from the commands' own help.

    python tools/cli_reference.py

A test compares the page with what this prints.
"""

from __future__ import annotations

from pathlib import Path

import click

from rankscope.cli import COMMANDS, cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """# Commands

Written by `python tools/cli_reference.py` from the commands' own help.

stdout is data, stderr is talk. Exit codes: 0 done; 1 the data or the run failed, in one sentence (`--debug` shows the
traceback); 2 wrong usage; 3 `check` found an error in what it was given; 130 interrupted, state saved.
"""


def reference() -> str:
    """The whole page."""
    width = {"terminal_width": 110, "max_content_width": 110}
    root = click.Context(cli, info_name="rankscope", **{**cli.context_settings, **width})
    parts = [HEAD, "\n## rankscope\n\n```\n" + cli.get_help(root) + "\n```\n"]
    for name in COMMANDS:
        command = cli.get_command(root, name)
        if command is not None:
            context = click.Context(command, info_name=name, parent=root, **width)
            parts.append(f"\n## rankscope {name}\n\n```\n{command.get_help(context)}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
