"""The processes of torchrun at one command: all compute where it shares its work out, and the first alone speaks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from rankscope.analysis.process_sharing import processes, torchrun_rank_and_size
from rankscope.errors import ProcessError, RankscopeError

SHARED_COMMANDS = ("train", "spectrum", "compare")
"""Commands that processes share out; any other is the first one's, so that no two write one file."""


def is_first_process() -> bool:
    """Whether this process prints and writes; there is one, with torchrun or without."""
    return torchrun_rank_and_size()[0] == 0


@contextmanager
def share_analyses() -> Iterator[None]:
    """Within, analyses are shared out, and every process meets the same errors: the first one's exit code is theirs.

    Raises:
        ProcessError: another process was lost.
        RankscopeError: what the analysis raised, in the first process.
        Exit: the same, in any other. Its code is 0, for torchrun ends the others as soon as one of them fails, and the
            first has yet to say why.
    """
    if torchrun_rank_and_size()[1] == 1:
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_terminated if is_first_process() else signal.SIG_DFL)
    try:
        with processes():
            yield
    except ProcessError:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself, once it has said why
        raise
    except RankscopeError as error:
        if is_first_process():
            raise
        raise click.exceptions.Exit(0) from error
    signal.signal(signal.SIGTERM, before)


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    """torchrun ends what is left when it finds that a process was lost, maybe sooner than gloo does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise ProcessError(
        "torchrun ended this process: another one was lost, or all were stopped; start the command again"
    )
