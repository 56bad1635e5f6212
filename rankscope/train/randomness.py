"""A stream of random numbers for each of the runs that share a pass, for models that draw from torch's global one.

A model of others, such as BERT with its dropout, draws from the global stream and takes no other. Where N runs are
joined in one batch, chunk i has to draw what run i would draw alone. So while the model computes, each function that
draws is called chunk by chunk, with the global stream standing where that run's has got to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rankscope.errors import TrainingError
from rankscope.train.config import global_generators

SHARING_ADVICE = "so its runs cannot share a pass; set tokens = 1, which trains one at a time"


def _always(*_: object, **__: object) -> bool:
    return True


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return training and p > 0


def _raw_dropout(input: Tensor, p: float, train: bool | None = True) -> bool:
    return train is not False and p > 0


def _rrelu(input: Tensor, lower: float = 0, upper: float = 0, training: bool = False, *_: Any, **__: Any) -> bool:
    return training


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *_: Any, **__: Any
) -> bool:
    return dropout_p > 0


def _map_functions(owner: Any, names: str, draws: Callable[..., bool]) -> dict[Any, Callable[..., bool]]:
    return {getattr(owner, name): draws for name in names.split()}


RANDOM_FUNCTIONS: Mapping[Any, Callable[..., bool]] = {
    **_map_functions(F, "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout", _dropout),
    **_map_functions(
        torch, "dropout dropout_ alpha_dropout alpha_dropout_ feature_dropout feature_dropout_", _raw_dropout
    ),
    **_map_functions(torch, "feature_alpha_dropout feature_alpha_dropout_ native_dropout", _raw_dropout),
    F.scaled_dot_product_attention: _attention,
    **_map_functions(F, "rrelu rrelu_", _rrelu),
    **_map_functions(torch, "rrelu rrelu_", _rrelu),
    F.gumbel_softmax: _always,
    **_map_functions(torch, "bernoulli binomial multinomial normal poisson rand_like randint_like randn_like", _always),
    **_map_functions(torch, "rand randint randn randperm", _always),
    **_map_functions(
        torch.Tensor, "bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial", _always
    ),
    **_map_functions(torch.Tensor, "normal_ random_ uniform_", _always),
}
"""Functions that draw, with whether they do so for given arguments: those of torch whose tag is nondeterministic_seeded
and that can be called on rows of examples (a test compares)."""


class PerRunStreams(TorchFunctionMode):
    """Calls functions that draw once for each run, on its rows and with its stream.

    Args:
        generators: the global streams.
        states: where each run's own stream stands, (stream, run).
    """

    def __init__(self, generators: Sequence[Generator], states: Sequence[Sequence[Tensor]]) -> None:
        super().__init__()
        self.generators = generators
        self.states = [list(each) for each in states]

    def copy(self) -> PerRunStreams:
        """The same runs, each to go on from where it stands now."""
        return PerRunStreams(self.generators, self.states)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        draws = RANDOM_FUNCTIONS.get(func)
        if draws is None or kwargs.get("generator") is not None or not draws(*args, **kwargs):
            return func(*args, **kwargs)
        # Torch leaves the mode while this runs, so what func calls in turn is not taken apart again.
        return self._call_per_run(func, args, kwargs)

    def _call_per_run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        count = len(self.states[0])
        rows = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if rows is None or rows.ndim == 0 or rows.shape[0] % count:
            shape = "no tensor" if rows is None else f"a tensor of shape {tuple(rows.shape)}"
            raise TrainingError(f"the base draws random numbers with {func.__name__} for {shape}, {SHARING_ADVICE}")
        # A view of its own is slower in the backward pass than a share of one split, but may be written to.
        written = func.__name__.endswith("_") or any(value is True for value in (*args[3:], kwargs.get("inplace")))
        cut = narrow_chunks if written else Tensor.chunk
        names, values = list(kwargs), [*args, *kwargs.values()]
        pieces = [cut(value, count) if has_same_rows(value, rows) else [value] * count for value in values]
        results = []
        with self._stream(rows.device) as go_to:
            for i, piece in enumerate(zip(*pieces, strict=True)):
                go_to(i)
                own = piece[len(args) :]
                results.append(func(*piece[: len(args)], **dict(zip(names, own, strict=True))))
        if written and any(results[0] is piece[0] for piece in pieces):
            return rows
        return join_results(results)

    @contextmanager
    def _stream(self, device: torch.device) -> Iterator[Callable[[int], None]]:
        """Within, the global stream of a device stands where that of the run does that was last asked for."""
        places = [place for place, source in enumerate(self.generators) if source.device.type == device.type]
        place = places[0] if places else 0
        source, states = self.generators[place], self.states[place]
        before, now = source.get_state(), None

        def leave() -> None:
            if now is not None:
                states[now] = source.get_state()

        def go_to(i: int) -> None:
            nonlocal now
            leave()
            now = i
            source.set_state(states[i])

        try:
            yield go_to
        finally:
            leave()
            source.set_state(before)


def has_same_rows(value: object, rows: Tensor) -> bool:
    """Whether a value is a tensor (rows, …) with as many rows and axes as ``rows`` (rows, …)."""
    return isinstance(value, Tensor) and value.ndim == rows.ndim and value.shape[0] == rows.shape[0]


def narrow_chunks(tensor: Tensor, count: int) -> list[Tensor]:
    """``count`` chunks (rows / count, …) of a tensor (rows, …), as views that autograd lets a function write to."""
    size = tensor.shape[0] // count
    return [tensor.narrow(0, i * size, size) for i in range(count)]


def join_results(results: Sequence[Any]) -> Any:
    """What a function gave for each chunk, put together."""
    if isinstance(results[0], Tensor):
        return torch.cat(list(results))
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


ACTIVE_MODE: ContextVar[PerRunStreams | None] = ContextVar("ACTIVE", default=None)


@contextmanager
def use_run_streams(device: torch.device, seeds: Sequence[int]) -> Iterator[None]:
    """Within, what a model draws from torch's global streams for the i-th of N chunks of its rows depends on
    ``seeds[i]`` alone: it is what the same rows alone would draw within ``own_streams(device, [seeds[i]])``.

    The calls have to be the same for both, so rows that are padded further draw something else. Random numbers must
    belong to the first axis of a tensor that has N equal chunks of rows; ``Task.can_share`` tells whether a model
    keeps to that. Recomputed blocks draw the same again if ``replay_contexts`` is given to the checkpoint. Code made by
    torch.compile draws for all rows at once, past this, and without an error. Afterwards the global streams are what
    they were.

    Raises:
        TrainingError: with N > 1, the model draws something that cannot be shared out.
    """
    generators = global_generators(device)
    before = [source.get_state() for source in generators]
    try:
        if len(seeds) == 1:
            for source in generators:
                source.manual_seed(seeds[0])
            yield
        else:
            states = [[source.manual_seed(seed).get_state() for seed in seeds] for source in generators]
            restore_states(generators, before)
            with activate_mode(PerRunStreams(generators, states)):
                yield
            after = [source.get_state() for source in generators]
            if not all(map(torch.equal, before, after)):
                raise TrainingError(f"the base draws random numbers in a way of its own, {SHARING_ADVICE}")
    finally:
        restore_states(generators, before)


def restore_states(generators: Sequence[Generator], states: Sequence[Tensor]) -> None:
    for source, state in zip(generators, states, strict=True):
        source.set_state(state)


@contextmanager
def activate_mode(mode: PerRunStreams) -> Iterator[None]:
    token = ACTIVE_MODE.set(mode)
    try:
        with mode:
            yield
    finally:
        ACTIVE_MODE.reset(token)


class ReplayedStreams:
    """A context, to be entered any number of times, where each run draws what it drew from now on."""

    def __init__(self, mode: PerRunStreams) -> None:
        self.start = mode.copy()

    def __enter__(self) -> None:
        self.mode = self.start.copy()
        self.mode.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)  # type: ignore[no-untyped-call]


def replay_contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """``context_fn`` of torch.utils.checkpoint: a block draws again what it drew within ``use_run_streams`` when it is
    recomputed in the backward pass, outside. (With one run the checkpoint sees to that itself.)"""
    mode = ACTIVE_MODE.get()
    return nullcontext(), nullcontext() if mode is None else ReplayedStreams(mode)
