"""The exceptions of the package. Each message says what happened, where, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RankscopeError(Exception):
    """Base class of every error that bad input can cause; the command line prints it as one sentence.

    Names in a message come from files, so characters that are not printable are written as escapes: they could break
    the line or control the terminal.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class FormatError(RankscopeError):
    """A file that is missing, damaged, or does not fit its name or the files beside it."""


class ShapeError(RankscopeError):
    """Matrices whose shapes do not fit each other, or more directions than a space has."""


class NonFiniteError(RankscopeError):
    """A weight that holds NaN or infinity, of which no spectrum can be computed."""


class ConfigError(RankscopeError):
    """A setting that is unknown, missing, or contradicts another."""


class TrainingError(RankscopeError):
    """A training run or a study that cannot continue."""


class ProcessError(RankscopeError):
    """A process of torchrun that ended early or never connected."""


@contextmanager
def prefix_errors(where: object) -> Iterator[None]:
    """Put ``where: `` before the message of an error that is raised inside; its class stays the same."""
    try:
        yield
    except RankscopeError as error:
        raise type(error)(f"{where}: {error}") from error
