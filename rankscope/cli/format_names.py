"""The formats of the table in help texts and in ``--to``; the table is loaded when a text or a value is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click


class FormatsCommand(click.Command):
    """A command whose help has the names of the formats that are read where it says ``{formats}``."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from rankscope.formats.file_formats import adapter_tools

        marked = self.help
        self.help = (marked or "").replace("{formats}", ", ".join(adapter_tools()))
        super().format_help_text(ctx, formatter)
        self.help = marked


if TYPE_CHECKING:
    FormatName = click.ParamType[str]
else:
    FormatName = click.ParamType  # not generic in older versions of click


class WritableFormat(FormatName):
    """The kind of a format that can be written."""

    name = "format"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self._choice().choices)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self._choice().convert(value, param, ctx)

    def _choice(self) -> click.Choice[str]:
        from rankscope.formats.file_formats import writers

        return click.Choice(list(writers()))
