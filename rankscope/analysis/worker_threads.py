"""Layers computed by worker threads, each of which uses one core; torch releases Python's lock while it computes.

A small decomposition gains little from a second core and loses much where threads outnumber cores. So updates with thin
factors go to workers, and every number is the same to the bit for any number of workers. A full matrix uses all cores
and much memory: full matrices come one after another, and the next one is read meanwhile.
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
from rankscope.analysis.sources import Source
from rankscope.errors import ConfigError
from rankscope.track import Track
from rankscope.updates import Update, cache_gram_matrices

T = TypeVar("T")
V = TypeVar("V")
MAX_WORKERS_ON_DEVICE = 4
"""Default limit of workers for one GPU: they copy, and decompose small matrices, while it computes."""
BATCH_SIZE = 16
"""Layers of one shape that go to a GPU together."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT_BLOCK = 2**22
"""Freed blocks up to so many bytes stay with the process, as page faults for every small block would take time."""


def worker_count(workers: int | None, device: torch.device) -> int:
    """The number of workers; by default as many threads as torch would use (the cores, or ``OMP_NUM_THREADS``).

    Raises:
        ConfigError: fewer than one.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers = {workers}: at least one is needed")
    cores = torch.get_num_threads()
    return workers or (cores if device.type == "cpu" else min(cores, MAX_WORKERS_ON_DEVICE))


@dataclass(frozen=True)
class Job(Generic[T, V]):
    """What an analysis does with each of its items (a layer, or the names of a layer in several sources).

    ``kind``: equal for items that may go to a GPU as one batch; None for an item that gets all cores. ``read``: the
    updates of an item, on the device. ``compute``: the result of an item from its updates; several threads call it and
    ``read`` at once. ``cost``: cost of an item in any unit, by which items are divided among processes.
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
    """The results of a job on all items, in their order; the error of an item is raised after the results before it.

    Inside ``process_sharing.processes`` each process computes a part of the items and gets all results.

    Args:
        workers: None takes the default of ``worker_count``.
        track: wraps the items of this process.
        ahead: whether a thread may read the next of the items that get all cores while this one is computed.

    Raises:
        ConfigError: fewer than one worker.
    """
    count = worker_count(workers, device)
    if device.type == "cuda":  # torch loads its solver when first used, and cannot load it in two threads at once
        torch.linalg.qr(torch.eye(2, device=device))

    def work(batch: Sequence[T]) -> list[V]:
        updates_of = [job.read(item) for item in batch]
        if device.type != "cpu":
            cache_gram_matrices([update for updates in updates_of for update in updates])
        return [job.compute(item, updates) for item, updates in zip(batch, updates_of, strict=True)]

    def results(share: Sequence[T]) -> Generator[V, None, None]:
        for alone, run in groupby(share, key=lambda item: job.kind(item) is None):
            if alone and ahead:
                yield from _read_ahead(list(run), job)
            elif alone:
                yield from map(job.run, run)
            else:
                yield from _compute_batches(list(run), job, work, device, count)

    def collect(share: Sequence[T], outcomes: list[V]) -> None:
        # Closed even after an error, so that torch's number of threads is restored at once.
        with closing(results(share)) as arriving:
            for _ in track(list(share)):
                outcomes.append(next(arriving))

    return distribute_items(items, job.cost, collect)


def _read_ahead(items: Sequence[T], job: Job[T, V]) -> Iterator[V]:
    """Results one after another; a thread with one core reads the next item, and no further ones, meanwhile."""
    before = torch.get_num_threads()
    with release_freed_memory(), ThreadPoolExecutor(1, "rankscope-read", torch.set_num_threads, (1,)) as reader:
        try:
            pending = [reader.submit(job.read, items[0])]
            for index, item in enumerate(items):
                updates = pending.pop().result()  # popped, as a future would keep its updates in memory
                pending += [reader.submit(job.read, following) for following in items[index + 1 : index + 2]]
                yield job.compute(item, updates)
        finally:
            torch.set_num_threads(before)


@contextmanager
def release_freed_memory() -> Iterator[None]:
    """Inside, glibc returns freed blocks above ``KEPT_BLOCK`` to the system.

    By default its threshold grows to the largest freed block, up to 32 MB, and the memory that it keeps is fragmented:
    for a checkpoint with matrices of 235 MB, 0.4 GB more than was in use.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, KEPT_BLOCK)
    try:
        yield
    finally:  # the values that the thresholds grow to by default
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
        outcomes = run(lambda indices: work([items[index] for index in indices]), batches)
        arriving = zip(batches, outcomes, strict=True)
        for index in range(len(items)):
            while index not in done:
                indices, results = next(arriving)
                done.update(zip(indices, results, strict=True))
            yield done.pop(index)


def _batches(kinds: Sequence[Hashable], size: int) -> list[list[int]]:
    """Indices of at most ``size`` items of one kind, in the order of the first of each batch."""
    indices_of: dict[Hashable, list[int]] = defaultdict(list)
    for index, kind in enumerate(kinds):
        indices_of[kind].append(index)
    return sorted(indices[i : i + size] for indices in indices_of.values() for i in range(0, len(indices), size))


@contextmanager
def single_threaded_map(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A ``map`` over this many threads, each with one thread of torch and numpy; restores their settings."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ExitStack() as stack:
            stack.enter_context(threadpool_limits(1, "blas"))  # numpy's BLAS has one setting for the whole process
            if workers == 1:
                yield map
                return
            # OpenMP and MKL have a setting for each thread: every new thread sets its own.
            pool = stack.enter_context(ThreadPoolExecutor(workers, "rankscope", torch.set_num_threads, (1,)))
            stack.callback(pool.shutdown, cancel_futures=True)
            yield pool.map
    finally:
        torch.set_num_threads(before)
