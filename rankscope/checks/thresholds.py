"""Where the checks draw their lines, each with its reason; ``--set NAME=VALUE`` moves one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rankscope.errors import ConfigError

FP16_MAX = 65504.0
"""The largest number that float16 has."""


@dataclass(frozen=True)
class Threshold:
    """A line: its name, its value, and why it is drawn there."""

    name: str
    value: float
    reason: str


THRESHOLDS: tuple[Threshold, ...] = (
    Threshold(
        "scale_low", 1 / 128, "a smaller scale than that of the default α = 1 of kohya's scripts at their largest rank"
    ),
    Threshold("scale_high", 16.0, "twice the largest scale of the founding paper (α = 32 at r = 4 on GPT-2)"),
    Threshold("size_low", 1e-4, "a sixteenth of what rounding W to bfloat16 changes (.0017 of ‖W‖)"),
    Threshold(
        "size_high",
        0.5,
        "a convention: an update of half its weight's size overwrites much of what the model knew",
    ),
    Threshold("size_broken", 2.0, "the update is twice its weight, so what the model knew is a third of what is left"),
    Threshold("layer_size_high", 2.0, "the same for a single layer, which others can make good"),
    Threshold(
        "spike_ratio",
        10.0,
        "a convention: σ₁ beside the median σ₁ of the layers, of which kinds differ among themselves",
    ),
    Threshold("spike_stable_rank", 1.5, "a stable rank below it: one direction has two thirds of the energy or more"),
    Threshold("unused_sigma", 1e-3, "a direction below a thousandth of σ₁ has a millionth of its energy"),
    Threshold("unused_share", 0.5, "half of the rank does nothing: half of the memory and of the products is spared"),
    Threshold("fp16_share", 0.25, "a quarter of float16's largest number, 65504: two doublings are left"),
    Threshold("fp16_smallest", 1e-6, "a matrix whose largest entry is below it keeps four bits or fewer in float16"),
    Threshold(
        "merge_scale", 0.05, "how far the scale at which a checkpoint has the adapter may be from what it should"
    ),
    Threshold(
        "merge_precision", 0.01, "a hundredth of ‖ΔW‖; products that a tool forms in bfloat16 differ by .0017 of it"
    ),
    Threshold(
        "merge_residual",
        2.0,
        "‖checkpoint − (W + ΔW)‖ in units of what rounding leaves; two steps in bfloat16 reach 1.97",
    ),
    Threshold("merge_lost", 0.5, "half of the adapter's update is lost in the rounding of the merged weights"),
)
Limits = Mapping[str, float]


def resolve_thresholds(settings: Mapping[str, float] | None = None) -> dict[str, float]:
    """The thresholds by name, with those of ``settings`` in place of their own.

    Raises:
        ConfigError: a name that is none, or a value that is not a positive finite number.
    """
    limits = {row.name: row.value for row in THRESHOLDS}
    for name, value in (settings or {}).items():
        if name not in limits:
            close = difflib.get_close_matches(name, limits, n=1)
            guess = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(limits)}"
            raise ConfigError(f"no threshold is called {name!r}; {guess}")
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"the threshold {name} = {value}: give a positive number")
        limits[name] = float(value)
    return limits


def parse_settings(texts: Iterable[str]) -> dict[str, float]:
    """``NAME=VALUE`` texts as numbers by name.

    Raises:
        ConfigError: a text of another form.
    """
    settings = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            settings[name.strip()] = float(value)
        except ValueError as error:
            raise ConfigError(f"{text!r} is no NAME=VALUE with a number, as in scale_high=32") from error
    return settings
