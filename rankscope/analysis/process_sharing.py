"""The processes of torchrun share the layers of an analysis: each computes a part, and each gets all results.

Only results are sent, as Python objects over gloo, so GPUs need no nccl. A single process runs the same code; its
numbers are the same to the bit if it has as many threads as each of the processes.
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
"""How long a process waits for a slower one; a lost process is noticed at once, by its connection."""
EXIT_TIMEOUT = timedelta(minutes=1)
"""How long a process waits at the end for the others to receive its last message."""
OUTSIDE_ITEMS = -1
"""The index of an error outside of all items; it sorts before them."""


class ProcessMessage(NamedTuple):
    """What a process sends to all. ``step``: identifies the call; ``results``: (index of the item, result);
    ``failure``: its first error, with the index of the item."""

    step: str
    results: Sequence[tuple[int, Any]] = ()
    failure: tuple[int, RankscopeError] | None = None


class SharingGroup:
    """``size`` processes, of which this is number ``rank``; ``group`` is torch's.

    Attributes:
        final_error: the error with which a process left the group; no further exchange is possible.
    """

    def __init__(self, rank: int, size: int, group: Any) -> None:
        self.rank, self.size, self.group = rank, size, group
        self.final_error: RankscopeError | None = None

    def exchange(self, message: ProcessMessage) -> list[ProcessMessage]:
        """The messages of all processes, once all have sent theirs.

        Raises:
            RankscopeError: the failure at the lowest index of an item; the same in every process.
            ConfigError: the processes are at different steps.
            ProcessError: a process was lost.
        """
        from torch import distributed as dist

        if self.final_error:
            raise self.final_error
        messages: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(messages, message, self.group)
        except RuntimeError as error:
            self.final_error = ProcessError("another process of torchrun was lost; start the command again")
            raise self.final_error from error
        messages[self.rank] = message  # not a copy: its error has a traceback
        failures = [(received.failure[0], rank) for rank, received in enumerate(messages) if received.failure]
        if failures:
            index, rank = min(failures)
            failure: RankscopeError = messages[rank].failure[1]
            self.final_error = failure if index == OUTSIDE_ITEMS else None
            raise failure
        if len({received.step for received in messages}) > 1:
            raise ConfigError("the processes differ in what they analyse; give all the same files and settings")
        return messages


# A new thread has None and computes alone.
_sharing: ContextVar[SharingGroup | None] = ContextVar("sharing", default=None)


def torchrun_rank_and_size() -> tuple[int, int]:
    """(rank, number of processes) that torchrun has given this process; (0, 1) without it."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1


@contextmanager
def processes() -> Iterator[None]:
    """Inside, ``spectrum``, ``compare`` and ``compare_all`` divide layers among the processes that torchrun started.

    All processes must make the same calls in the same order on the same files; each gets the whole result. An error in
    one is raised in all. Without torchrun nothing changes. If torch's process group is open already, its processes are
    used and it stays open.

    Raises:
        ProcessError: another process did not start, or was lost.
        RankscopeError: another process failed.
    """
    from torch import distributed as dist

    opened = dist.is_available() and dist.is_initialized()
    if _sharing.get() is not None or not (opened or torchrun_rank_and_size()[1] > 1):
        yield
        return
    with _gloo(opened) as group:
        sharing = SharingGroup(dist.get_rank(), dist.get_world_size(), group)
        del group  # see _gloo
        token = _sharing.set(sharing)
        try:
            yield
        except RankscopeError as error:
            if not sharing.final_error:
                sharing.exchange(ProcessMessage("end", failure=(OUTSIDE_ITEMS, error)))
            raise
        else:
            sharing.exchange(ProcessMessage("end"))
        finally:
            _sharing.reset(token)
            sharing.group = None


@contextmanager
def _gloo(opened: bool) -> Iterator[Any]:
    """A gloo group of all processes, the main one unless that is open already; closed once all have left it."""
    from torch import distributed as dist

    try:
        group, store = _open_second_group() if opened else _open_main_group()
        rank, size = dist.get_rank(), dist.get_world_size()
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"the processes of torchrun did not find each other ({error})") from error
    try:
        yield group
    except ProcessError:
        raise  # a process is lost: do not wait for it
    except RankscopeError:
        _leave(store, rank, size)
        raise
    else:
        _leave(store, rank, size)
    finally:
        dist.destroy_process_group(group)
        # An error keeps its frames alive; a group that lives until Python exits could abort it by its threads.
        del group, store


def _open_main_group() -> tuple[Any, Any]:
    """The main group of torch, opened here, and a store of its own."""
    from torch import distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    shared, rank, size = next(rendezvous("env://"))
    # torchrun's store keeps the addresses of a closed group; the next group must not read them.
    store = PrefixStore(f"rankscope/{next(_groups)}", shared)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=SHARE_TIMEOUT)
    return dist.group.WORLD, store


def _open_second_group() -> tuple[Any, Any]:
    """A gloo group of the processes of the main group, which may be one of nccl, and a store of its own."""
    from torch import distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    group = dist.new_group(backend="gloo", timeout=SHARE_TIMEOUT)
    return group, PrefixStore(f"rankscope/{next(_groups)}", _get_default_store())


def _leave(store: Any, rank: int, size: int) -> None:
    """Wait until all have received the last messages: closing a connection loses what is being sent."""
    try:
        store.set(f"left/{rank}", "")
        store.wait([f"left/{other}" for other in range(size)], EXIT_TIMEOUT)
    except RuntimeError:
        pass  # a process, maybe the one with the store, was lost after its last message arrived here


def distribute_items(
    items: Sequence[T], cost: Callable[[T], float], collect: Callable[[Sequence[T], list[V]], None]
) -> list[V]:
    """The results of all items, in order; inside ``processes``, each process computes a part of them.

    Args:
        cost: cost of an item, in any unit; the same in every process.
        collect: appends the results of given items, in order, to a list.

    Raises:
        RankscopeError: the first error of any process, by the order of the items.
    """
    results: list[V] = []
    sharing = _sharing.get()
    if sharing is None:
        collect(items, results)
        return results
    costs = [cost(item) for item in items]
    indices = divide_by_cost(costs, sharing.size)[sharing.rank]
    step = hashlib.sha256(repr((items, costs)).encode()).hexdigest()
    failure = None
    try:
        collect([items[index] for index in indices], results)
    except RankscopeError as error:
        failure = indices[len(results)], error
    message = ProcessMessage(step, list(zip(indices, results, strict=failure is None)), failure)
    result_at = dict(pair for received in sharing.exchange(message) for pair in received.results)
    return [cast(V, result_at[index]) for index in range(len(items))]


def divide_by_cost(costs: Sequence[float], size: int) -> list[list[int]]:
    """Indices of the items of each of ``size`` processes: the costliest item first, to the process with the least work.

    The largest total is at most 4/3 − 1/(3·size) times that of the best division (Graham 1969).
    """
    loads = [0.0] * size
    shares: list[list[int]] = [[] for _ in range(size)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += costs[index]
    return [sorted(indices) for indices in shares]
