"""Processes that share out the layers of an analysis: torchrun's. Each computes a share, and each gets all results.

Only results travel, as Python objects over gloo, so GPUs need no nccl for it. Every number is computed by the code that
one process alone runs, and is the same to the bit where a process has the threads that the one would have.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import count
from typing import Any, NamedTuple, TypeVar, cast

from rankscope.errors import ConfigError, ProcessError, RankscopeError

T = TypeVar("T")
V = TypeVar("V")
_groups = count()
SHARE_TIMEOUT = timedelta(days=1)
"""For a process whose share takes longer; one that is lost is noticed at once, by its connection."""
EXIT_TIMEOUT = timedelta(minutes=1)
"""For a process to be told the end."""
OUTSIDE_ITEMS = -1
"""The place of an error outside of any item: before all of them."""


class ProcessMessage(NamedTuple):
    """What a process says when all meet. ``step``: its position; ``results``: by place in the list of items;
    ``failure``: its first error, with the place of the item."""

    step: str
    results: Sequence[tuple[int, Any]] = ()
    failure: tuple[int, RankscopeError] | None = None


class SharingGroup:
    """``size`` processes, of which this is number ``rank``; ``group`` is torch's.

    Attributes:
        over: the error with which one of them went away; there is nobody to meet any more.
    """

    def __init__(self, rank: int, size: int, group: Any) -> None:
        self.rank, self.size, self.group = rank, size, group
        self.over: RankscopeError | None = None

    def exchange(self, word: ProcessMessage) -> list[ProcessMessage]:
        """The words of all, once all are here.

        Raises:
            RankscopeError: the first failure of any, by its place among the items; in every process the same.
            ConfigError: the processes stand at different steps.
            ProcessError: one of them was lost.
        """
        from torch import distributed as dist

        if self.over:
            raise self.over
        words: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(words, word, self.group)
        except RuntimeError as error:
            self.over = ProcessError("another process of torchrun was lost; start the command again")
            raise self.over from error
        words[self.rank] = word  # not a copy: its error has a traceback
        failures = [(heard.failure[0], rank) for rank, heard in enumerate(words) if heard.failure]
        if failures:
            place, rank = min(failures)
            failure: RankscopeError = words[rank].failure[1]
            self.over = failure if place == OUTSIDE_ITEMS else None
            raise failure
        if len({heard.step for heard in words}) > 1:
            raise ConfigError("the processes differ in what they analyse; give all the same files and settings")
        return words


_sharing: ContextVar[SharingGroup | None] = ContextVar(
    "sharing", default=None
)  # a new thread has None, and computes alone


def torchrun_rank_and_size() -> tuple[int, int]:
    """(rank, number of processes) that torchrun has given this process; (0, 1) without it."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1


@contextmanager
def processes() -> Iterator[None]:
    """Within, ``spectrum``, ``compare`` and ``compare_all`` share layers out over the processes that torchrun started.

    All processes have to make the same calls in the same order, on the same files; each gets the whole result. An error
    in one is raised in all. Without torchrun nothing changes. Where torch's process group is open already, the
    processes are those of it, and it stays open.

    Raises:
        ProcessError: the others did not come, or were lost.
        RankscopeError: another process failed.
    """
    from torch import distributed as dist

    opened = dist.is_available() and dist.is_initialized()
    if _sharing.get() is not None or not (opened or torchrun_rank_and_size()[1] > 1):
        yield
        return
    with _gloo(opened) as group:
        sharing = SharingGroup(dist.get_rank(), dist.get_world_size(), group)
        del group  # as in _gloo
        token = _sharing.set(sharing)
        try:
            yield
        except RankscopeError as error:
            if not sharing.over:
                sharing.exchange(ProcessMessage("end", failure=(OUTSIDE_ITEMS, error)))
            raise
        else:
            sharing.exchange(ProcessMessage("end"))
        finally:
            _sharing.reset(token)
            sharing.group = None


@contextmanager
def _gloo(opened: bool) -> Iterator[Any]:
    """A gloo group of all processes, beside the main one where that is open already; closed once all have left it."""
    from torch import distributed as dist

    try:
        group, store = _beside() if opened else _main()
        rank, size = dist.get_rank(), dist.get_world_size()
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"the processes of torchrun did not find each other ({error})") from error
    try:
        yield group
    except ProcessError:
        raise  # there is nobody to wait for
    except RankscopeError:
        _leave(store, rank, size)
        raise
    else:
        _leave(store, rank, size)
    finally:
        dist.destroy_process_group(group)
        # An error keeps the frames it came through: a group that lived until Python ends could abort it by its threads.
        del group, store


def _main() -> tuple[Any, Any]:
    """The main group of torch, opened by us, and a store of its own."""
    from torch import distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    shared, rank, size = next(rendezvous("env://"))
    # torchrun's store keeps the addresses of a group that was closed; another one must not read those.
    store = PrefixStore(f"rankscope/{next(_groups)}", shared)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=SHARE_TIMEOUT)
    return dist.group.WORLD, store


def _beside() -> tuple[Any, Any]:
    """A gloo group of the processes of a main group, which may be nccl's, and a store of its own."""
    from torch import distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    group = dist.new_group(backend="gloo", timeout=SHARE_TIMEOUT)
    return group, PrefixStore(f"rankscope/{next(_groups)}", _get_default_store())


def _leave(store: Any, rank: int, size: int) -> None:
    """Wait until all have heard the last words: a connection that is closed loses what is on its way."""
    try:
        store.set(f"left/{rank}", "")
        store.wait([f"left/{other}" for other in range(size)], EXIT_TIMEOUT)
    except RuntimeError:
        pass  # one was lost after it had spoken, or whoever held the store has gone: what it had to say is here


def distribute_items(
    items: Sequence[T], cost: Callable[[T], float], collect: Callable[[Sequence[T], list[V]], None]
) -> list[V]:
    """The results of all items, in order; within ``processes``, each process collects those of a share of them.

    Args:
        cost: of an item, in any unit; the same in every process.
        collect: appends the results of some items, in order, to a list.

    Raises:
        RankscopeError: the first of any process, by the order of the items.
    """
    results: list[V] = []
    sharing = _sharing.get()
    if sharing is None:
        collect(items, results)
        return results
    costs = [cost(item) for item in items]
    places = divide_by_cost(costs, sharing.size)[sharing.rank]
    step = hashlib.sha256(repr((items, costs)).encode()).hexdigest()
    failure = None
    try:
        collect([items[place] for place in places], results)
    except RankscopeError as error:
        failure = places[len(results)], error
    words = sharing.exchange(ProcessMessage(step, list(zip(places, results, strict=failure is None)), failure))
    done = dict(pair for word in words for pair in word.results)
    return [cast(V, done[place]) for place in range(len(items))]


def divide_by_cost(costs: Sequence[float], size: int) -> list[list[int]]:
    """The places of each of ``size`` processes, ascending: most expensive items first, each to the least busy process.

    The longest share is at most 4/3 − 1/(3·size) times that of the best division (Graham 1969).
    """
    loads = [0.0] * size
    shares: list[list[int]] = [[] for _ in range(size)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least = loads.index(min(loads))
        shares[least].append(place)
        loads[least] += costs[place]
    return [sorted(places) for places in shares]
