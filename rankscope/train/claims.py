"""Which process trains which run: locks that vanish with their process, however it ends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rankscope.errors import FormatError

LOCK_NAME = ".lock"


class Claims:
    """The claims of this process on the runs of a study.

    One byte of one file stands for each run. Such locks are the system's (POSIX): they are seen by every process that
    sees the folder, on NFS too, and vanish with the process that holds them. On Windows there are none: every claim
    is granted, and a study must be trained by one process.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._held: set[str] = set()

    def try_claim(self, name: str) -> bool:
        """Claim a run; False where another process holds it."""
        if name not in self._held and lock_byte(self._file, lock_offset(name)):
            self._held.add(name)
        return name in self._held

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._held:
                unlock_byte(self._file, lock_offset(name))
                self._held.discard(name)


def lock_offset(name: str) -> int:
    """The byte that stands for a name; 0 is kept for the study itself."""
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def lock_byte(file: IO[str], at: int, wait: bool = False) -> bool:
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, at)
    except BlockingIOError:
        return False
    except PermissionError:  # what some systems say instead
        return False
    return True


def unlock_byte(file: IO[str], at: int) -> None:
    try:
        import fcntl
    except ImportError:
        return
    fcntl.lockf(file, fcntl.LOCK_UN, 1, at)


@contextmanager
def open_claims(folder: Path) -> Iterator[Claims]:
    """Make the folder, and give this process its claims there; they are released at the end.

    Raises:
        FormatError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_NAME).open("a")
    except OSError as error:
        raise FormatError(f"{folder}: cannot be made ({error.strerror or error})") from error
    with file:
        yield Claims(file)


@contextmanager
def lock_study(claims: Claims) -> Iterator[None]:
    """Hold the lock of the study: only one process at a time is within such a block."""
    lock_byte(claims._file, 0, wait=True)
    try:
        yield
    finally:
        unlock_byte(claims._file, 0)
