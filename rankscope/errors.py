"""The one exception root. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RankscopeError(Exception):
    """Root of every error that bad input can cause; the command line prints it as one sentence.

    Names come from files: a character in one that would break the line or steer a terminal is written as its escape.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class FormatError(RankscopeError):
    """A file that is missing, damaged, or not what its name or its neighbours promise."""


class ShapeError(RankscopeError):
    """Matrices that do not fit each other, or a number of directions that does not exist."""


class NonFiniteError(RankscopeError):
    """A weight that holds NaN or infinity; a spectrum of it would mean nothing."""


class ConfigError(RankscopeError):
    """A setting that is unknown, missing, or contradicts another."""


class TrainingError(RankscopeError):
    """A training run or a study that cannot go on."""


class ProcessError(RankscopeError):
    """A process of torchrun that was lost, or did not come."""


@contextmanager
def prefix_errors(where: object) -> Iterator[None]:
    """Put ``where: `` before the message of an error raised inside, keeping its class."""
    try:
        yield
    except RankscopeError as error:
        raise type(error)(f"{where}: {error}") from error
