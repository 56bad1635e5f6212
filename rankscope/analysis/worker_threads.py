"""Layers shared out over threads that compute with one thread each; torch lets go of Python's lock while it computes.

A small decomposition gains little from a second thread and loses much where threads outnumber cores. So updates that
have thin factors go to workers, and every number is the same to the bit however many there are. A full matrix has work
for all cores and takes much memory: those come one after another, the next one read meanwhile.
"""

from __future__ import annotations

import ctypes
import platform
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

import torch

from rankscope.analysis.process_sharing import distribute_items
from rankscope.analysis.sources import Source, Track
from rankscope.errors import ConfigError
from rankscope.updates import Update, cache_gram_matrices

T = TypeVar("T")
V = TypeVar("V")
MAX_WORKERS_ON_DEVICE = 4
"""Workers at one GPU unless more are asked for: they copy, and decompose small cores, while it computes."""
BATCH_SIZE = 16
"""Layers of one shape that go to a GPU together."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT_BLOCK = 2**22
"""Bytes up to which freed memory may stay with the process: page faults for every small block would take time."""


def worker_count(workers: int | None, device: torch.device) -> int:
    """How many workers: as asked for, or as many threads as torch would use (the cores, or ``OMP_NUM_THREADS``).

    Raises:
        ConfigError: fewer than one.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers = {workers}: at least one has to do the work")
    cores = torch.get_num_threads()
    return workers or (cores if device.type == "cpu" else min(cores, MAX_WORKERS_ON_DEVICE))


@dataclass(frozen=True)
class Job(Generic[T, V]):
    """What an analysis does with each of its items (a layer, or the names of a layer in several sources).

    ``kind``: what items have in common that may go to a GPU as one batch; None for an item that gets all cores.
    ``read``: the updates of an item, on the device. ``compute``: the result of an item from its updates; several
    threads call it and ``read`` at once. ``cost``: of an item, in any unit, by which processes share the items out.
    """

    kind: Callable[[T], Hashable | None]
    read: Callable[[T], Sequence[Update]]
    compute: Callable[[T, Sequence[Update]], V]
    cost: Callable[[T], float] = lambda item: 1.0

    def run(self, item: T) -> V:
        """The result of one item."""
        return self.compute(item, self.read(item))


def job_on_sources(
    sources: Sequence[Source], compute: Callable[[tuple[str, ...], Sequence[Update]], V]
) -> Job[tuple[str, ...], V]:
    """The job whose items are the names of one layer in each of the sources."""

    def kind(names: tuple[str, ...]) -> Hashable | None:
        kinds = tuple(source.batch_key(name) for source, name in zip(sources, names, strict=True))
        return None if None in kinds else kinds

    def read(names: tuple[str, ...]) -> list[Update]:
        return [source.read(name) for source, name in zip(sources, names, strict=True)]

    def cost(names: tuple[str, ...]) -> float:
        return sum(source.cost(name) for source, name in zip(sources, names, strict=True))

    return Job(kind, read, compute, cost)


def compute_items(
    items: Sequence[T],
    job: Job[T, V],
    device: torch.device,
    workers: int | None = None,
    track: Track = iter,
    ahead: bool = False,
) -> list[V]:
    """The results of a job on all items, in their order; an error is raised when the turn of its item comes.

    Within ``process_sharing.processes`` each process computes a share of the items, and gets all results.

    Args:
        workers: None takes the default of ``worker_count``.
        track: wraps the items of this process.
        ahead: whether a thread may read the next of the items that get all cores while this one is computed.

    Raises:
        ConfigError: fewer than one worker.
    """
    count = worker_count(workers, device)
    if device.type == "cuda":  # torch loads this part when it is first used, and not from two threads at once
        torch.linalg.qr(torch.eye(2, device=device))

    def work(batch: Sequence[T]) -> list[V]:
        updates = [job.read(item) for item in batch]
        if device.type != "cpu":
            cache_gram_matrices([update for several in updates for update in several])
        return [job.compute(item, several) for item, several in zip(batch, updates, strict=True)]

    def results(share: Sequence[T]) -> Generator[V, None, None]:
        for alone, run in groupby(share, key=lambda item: job.kind(item) is None):
            if alone and ahead:
                yield from _read_ahead(list(run), job)
            elif alone:
                yield from map(job.run, run)
            else:
                yield from _compute_batches(list(run), job, work, device, count)

    def collect(share: Sequence[T], outcomes: list[V]) -> None:
        # Closed also where an error ends it: torch's threads are put back now, not later.
        with closing(results(share)) as arriving:
            for _ in track(list(share)):
                outcomes.append(next(arriving))

    return distribute_items(items, job.cost, collect)


def _read_ahead(items: Sequence[T], job: Job[T, V]) -> Iterator[V]:
    """One after another, with at most the next one in memory besides; its thread leaves the other cores alone."""
    before = torch.get_num_threads()
    with release_freed_memory(), ThreadPoolExecutor(1, "rankscope-read", torch.set_num_threads, (1,)) as reader:
        try:
            coming = [reader.submit(job.read, items[0])]
            for place, item in enumerate(items):
                updates = coming.pop().result()  # what was read is held here alone, not by its future
                coming += [reader.submit(job.read, following) for following in items[place + 1 : place + 2]]
                yield job.compute(item, updates)
        finally:
            torch.set_num_threads(before)


@contextmanager
def release_freed_memory() -> Iterator[None]:
    """Inside, glibc gives blocks above ``KEPT_BLOCK`` back to the system when they are freed.

    By itself it begins to keep what is as large as any block up to 32 MB that was ever freed, in pieces that other
    sizes do not fit into: of a checkpoint with matrices of 235 MB, .4 GB beyond all that was in use.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, KEPT_BLOCK)
    try:
        yield
    finally:  # what it would have come to
        libc.mallopt(MMAP_THRESHOLD, 2**25)
        libc.mallopt(TRIM_THRESHOLD, 2**26)


def _compute_batches(
    items: Sequence[T],
    job: Job[T, V],
    work: Callable[[Sequence[T]], list[V]],
    device: torch.device,
    workers: int,
) -> Iterator[V]:
    batches = _batches([job.kind(item) for item in items], 1 if device.type == "cpu" else BATCH_SIZE)
    done: dict[int, V] = {}
    with single_threaded_map(min(workers, len(batches))) as run:
        outcomes = run(lambda places: work([items[place] for place in places]), batches)
        arriving = zip(batches, outcomes, strict=True)
        for place in range(len(items)):
            while place not in done:
                places, results = next(arriving)
                done.update(zip(places, results, strict=True))
            yield done.pop(place)


def _batches(kinds: Sequence[Hashable], size: int) -> list[list[int]]:
    """Places of at most ``size`` items of one kind, in the order of their first."""
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for place, kind in enumerate(kinds):
        alike[kind].append(place)
    return sorted(places[i : i + size] for places in alike.values() for i in range(0, len(places), size))


@contextmanager
def single_threaded_map(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A ``map`` over this many threads, in which torch and numpy use one thread; settings are put back afterwards."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ExitStack() as stack:
            stack.enter_context(threadpool_limits(1, "blas"))  # numpy's BLAS has one setting for the whole process
            if workers == 1:
                yield map
                return
            # OpenMP and MKL keep a setting for each thread: every new one is told.
            pool = stack.enter_context(ThreadPoolExecutor(workers, "rankscope", torch.set_num_threads, (1,)))
            stack.callback(pool.shutdown, cancel_futures=True)
            yield pool.map
    finally:
        torch.set_num_threads(before)
