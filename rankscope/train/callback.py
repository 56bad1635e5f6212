"""Effective rank while someone's own training runs: a callback for transformers' Trainer."""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from rankscope.analysis.sources import matches_pattern, select_layers
from rankscope.errors import ConfigError, RankscopeError
from rankscope.formats.file_io import read_tensors, write_tensors
from rankscope.train.tracked_weights import TrackedFullWeight, TrackedWeight, find_tracked_weights, measure_update

INITIAL_NAME = "rank_initial.safetensors"
logger = logging.getLogger(__name__)


class RankCallback:
    """Logs, during a training by transformers' ``Trainer``, what rank the update of each layer has by then.

    ``Trainer(..., callbacks=[RankCallback()])`` adds to each line of the training log (TensorBoard, W&B, whatever
    ``report_to`` names, and ``state.log_history``), where the update is not zero:

    - ``rank/stable/<layer>``, ``rank/entropy/<layer>``, ``rank/k90/<layer>``: Σσ²/σ₁²; exp of the entropy of σ/Σσ;
      the number of directions that hold 90 % of the energy.
    - ``rank/overlap_init/<layer>``: overlap φ in [0, 1] of the update's top k right directions with the
      initialisation; ``rank/overlap_init_chance/<layer>``: what random directions would overlap. For LoRA the
      initialisation is the row space of A at step 0 (of an embedding's B), with B zero the only side there is; for a
      weight trained whole the top k right directions of the pre-trained weight.
    - ``rank/median/...``: each of these five as the median over the layers that have it.
    - ``rank/share_of_time``: ``seconds`` as a share of the time since training began.

    The update is what training has changed since step 0: scale·B·A of the active adapters of PEFT (Linear, Conv1D,
    Embedding, convolutions; without DoRA's magnitude, which makes it full rank) or of a ``Bank``, read from the
    factors and never multiplied out; scale·(B A − B0 A0) where an adapter did not start at zero. Every other trained
    matrix is compared with its initial value, and takes its full SVD: for full fine-tuning choose few ``layers``, or
    measure seldom. That needs a copy of each such weight, in its dtype, in host memory, and in ``output_dir`` where
    the Trainer saves checkpoints. Biases, norms and what else is no matrix are left out, which is said once.

    Only reads: no hooks, no random numbers, the training is the same bit for bit. Runs on world process zero alone,
    where the weights are; weights sharded by FSDP or DeepSpeed's ZeRO 3 are left out. The initial factors are kept in
    ``output_dir/rank_initial.safetensors`` so that a training that is resumed goes on being compared with them.

    Attributes:
        seconds: time spent measuring since training began.

    Args:
        every: measure at multiples of this many steps, and have the Trainer log there; by default whenever it logs.
        k: directions of the update to compare with the initialisation; fewer where it has fewer.
        layers: names to measure: globs, or dotted parts such as ``q_proj`` or ``layers.0``. All by default.
        per_layer: log each layer, and not only the medians.
        clock: seconds, as ``time.perf_counter``.

    Raises:
        ConfigError: transformers is not installed, or ``every`` or ``k`` is not a whole number from 1. When training
            begins, a RankscopeError where ``layers`` fits nothing.
    """

    def __init__(
        self,
        every: int | None = None,
        k: int = 8,
        layers: str | Sequence[str] | None = None,
        per_layer: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if find_spec("transformers") is None:
            raise ConfigError('RankCallback needs transformers; pip install "rankscope[hf]"')
        _check_count("k", k)
        if every is not None:
            _check_count("every", every)
        self.every, self.k, self.layers, self.per_layer, self.clock = every, k, layers, per_layer, clock
        self.seconds = 0.0
        self._watched: list[TrackedWeight] = []
        self._begun = 0.0
        self._said: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        # Trainer calls every event of its version on every callback, and asks for no base class: not to have one
        # keeps transformers out of the import.
        if name.startswith("on_"):
            return _ignore_event
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # Events

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Find what is trained, and where it started."""
        self._begun, self.seconds, self._said = self.clock(), 0.0, set()
        tracked = find_tracked_weights(model)  # by every process: an error must stop all of them
        names = [layer.name for layer in tracked.layers]
        chosen = set(select_layers(names, self.layers, "RankCallback")) if names else set()
        self._watched = []
        if not state.is_world_process_zero:
            return
        if not self._go_first():
            self._say("reporters that stand before RankCallback among the callbacks do not see its values")
        self._say_left_out(tracked.left_out, of_all=not names)
        self._watched = [layer for layer in tracked.layers if layer.name in chosen]
        if not self._watched:
            self._say("nothing is trained that a rank could be measured of")
            return
        self._start(args, resumed=state.global_step > 0)
        self.seconds += self.clock() - self._begun

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for a line of the log where one is due; on every process, because logging gathers the loss."""
        if self.every and state.global_step % self.every == 0:
            control.should_log = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the measures to a line of the training log (evaluations and the summary have no loss)."""
        due = not self.every or state.global_step % self.every == 0
        if not self._watched or logs is None or "loss" not in logs or not due:
            return
        added = self._measure_layers()
        logs.update(added)
        # The Trainer has put a copy of the line into its history before it calls the callbacks.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the initial weights."""
        self._watched = []

    # Steps

    def _go_first(self) -> bool:
        """Stand before the reporters, which Trainer puts in front; they then find the measures in their logs.

        Nothing that a callback is given leads to the other callbacks; the frame of the handler that calls it does.
        """
        frame = inspect.currentframe()
        for _ in range(8):
            callbacks = getattr(frame.f_locals.get("self"), "callbacks", None) if frame else None
            if isinstance(callbacks, list) and any(callback is self for callback in callbacks):
                # In place, so that whoever walks along the list meets neither of the others twice.
                callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
                return True
            frame = frame.f_back if frame else None
        return False

    def _start(self, args: Any, resumed: bool) -> None:
        """Remember where training starts, or, where it is resumed, read where it did."""
        path = Path(args.output_dir) / INITIAL_NAME
        if resumed:
            self._recall(path)
            return
        saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"
        kept = {}
        for layer in self._watched:
            tensors = layer.remember()
            kept.update(tensors if saves or not isinstance(layer, TrackedFullWeight) else {})
        try:
            write_tensors(path, kept, {"rankscope": "initial"})
        except RankscopeError as error:
            self._say(f"{error}; a resumed training will not know what it started from")

    def _recall(self, path: Path) -> None:
        try:
            stored = read_tensors(path)
        except RankscopeError as error:
            stored, reason = {}, str(error)
        else:
            reason = f"{path} does not fit the model"
        lost = [layer for layer in self._watched if not layer.recall(stored)]
        if not lost:
            return
        whole = [layer for layer in lost if isinstance(layer, TrackedFullWeight)]  # whose update is None from here on
        parts = []
        if len(whole) < len(lost):
            parts.append(
                "the overlap with the initialisation is left out, and updates are taken to be all of scale·B·A"
            )
        if whole:
            parts.append(f"{len(whole)} weights trained whole are left out")
        self._say(f"{reason}, so where this resumed training started is not known: {'; '.join(parts)}")

    @torch.no_grad()
    def _measure_layers(self) -> dict[str, float]:
        begun = self.clock()  # the Trainer has just read the loss: no kernels of the training are left to wait for
        readings = {}
        for layer in self._watched:
            try:
                readings[layer.name] = measure_update(layer, self.k)
            except (RankscopeError, RuntimeError) as error:  # torch's: no convergence, or no memory for a large SVD
                self._say(f"{layer.name} is left out: {error}", about=layer.name)
        now = self.clock()
        self.seconds += now - begun
        added = log_entries(readings, self.per_layer)
        if added and now > self._begun:
            added["rank/share_of_time"] = self.seconds / (now - self._begun)
        return added

    # Messages

    def _say_left_out(self, left_out: Sequence[tuple[str, str]], of_all: bool) -> None:
        if self.layers is not None and not of_all:  # what the user did not ask for is not missed
            patterns = [self.layers] if isinstance(self.layers, str) else self.layers
            left_out = [item for item in left_out if any(matches_pattern(item[0], pattern) for pattern in patterns)]
        reasons = Counter(reason for _, reason in left_out)
        first = {reason: name for name, reason in reversed(left_out)}
        parts = [f"{count} ({reason}; first {first[reason]})" for reason, count in reasons.most_common()]
        if parts:
            self._say(f"left out, of what is trained: {', '.join(parts)}")

    def _say(self, message: str, about: str | None = None) -> None:
        """Once in a training."""
        if (about or message) not in self._said:
            self._said.add(about or message)
            logger.warning("RankCallback: %s", message)


def log_entries(readings: dict[str, dict[str, float]], per_layer: bool) -> dict[str, float]:
    """``rank/<measure>/<layer>`` and ``rank/median/<measure>`` of measures by layer; empty where there are none."""
    added = {}
    for name, values_of_layer in readings.items() if per_layer else ():
        added.update({f"rank/{measure}/{name}": value for measure, value in values_of_layer.items()})
    for measure in dict.fromkeys(measure for layer in readings.values() for measure in layer):
        values = [layer[measure] for layer in readings.values() if measure in layer]
        added[f"rank/median/{measure}"] = median(values)
    return {key: float(value) for key, value in added.items() if math.isfinite(value)}


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is a whole number from 1, not {value!r}")


def _ignore_event(*args: Any, **kwargs: Any) -> None:
    """An event that does not matter here."""
