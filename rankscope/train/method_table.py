"""The table of training methods: what each is called, what it trains, at which learning rates, and how plots draw it.

A further method is one row here, and a file of its own where no trainer of ``methods.py`` fits it. This module loads
no torch: the command line reads it for its help.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rankscope.errors import ConfigError

Family = Literal["base", "lora", "weights", "subspace"]

ADAPTERS = "rankscope.train.methods:TrainableAdapters"
WEIGHTS = "rankscope.train.methods:TrainableWeights"
SUBSPACE = "rankscope.train.methods:TrainableSubspace"
SUBSPACE_RATE_OVER_FULL = 3.0
"""The best learning rate in a random subspace over that of full fine-tuning, about, where a step moves the weights as
far: with 16 to 16 384 numbers of the embedded base it was 1 to 3 times as high (60 steps, factors of 3)."""


@dataclass(frozen=True)
class LoraVariant:
    """How a method differs from plain LoRA.

    Attributes:
        rslora: the update is scaled by α/√r instead of α/r.
        plus: LoRA+: B has a learning rate of its own, a multiple of A's (Hayou et al. 2024).
        trains_a: without it, A stays the random projection that it starts as (Zhang et al. 2023, LoRA-FA).
        init: how A and B start; None is what the settings say.
    """

    rslora: bool = False
    plus: bool = False
    trains_a: bool = True
    init: str | None = None


def train_every(name: str) -> bool:
    """Every parameter of the base is trained."""
    return True


def train_none(name: str) -> bool:
    """No parameter of the base is trained, only heads that are new to it."""
    return False


def train_biases(name: str) -> bool:
    """Biases are trained."""
    return name.endswith("bias")


@dataclass(frozen=True, kw_only=True)
class TrainingMethod:
    """One way to train.

    Attributes:
        name: in settings, in names of runs, and in every file.
        title: in plots and pages.
        family: "lora" trains adapters, one run for each rank; "subspace" trains numbers of a random subspace, one run
            for each dimension; "weights" trains weights of the base, one run; "base" trains nothing.
        trainer: "module:class" of the ``TrainableModel`` that is made of a task, the settings and the runs.
        variant: how it differs from plain LoRA (family "lora").
        trains: whether it trains the parameter of the base that has this name (families "weights" and "subspace").
        has_spectrum: whether it changes matrices of the base so that effective ranks of them are shown (family
            "weights"; adapters always do, and the update of a subspace has the ranks of noise).
        layered: whether a subspace spends some of its numbers on one factor for each layer.
        alpha: α where the settings name none; None is 2r.
        rate_over_full: default learning rates as a multiple of those of full fine-tuning; None takes the task's own
            for LoRA.
        colour, marker: in the plot of intrinsic dimension, the colour's place in the palette and the marker. Other
            plots give each line the next of both, since a method has a line for each set of targets.
    """

    name: str
    title: str
    family: Family
    trainer: str
    variant: LoraVariant = LoraVariant()
    trains: Callable[[str], bool] = train_none
    has_spectrum: bool = False
    layered: bool = False
    alpha: float | None = None
    rate_over_full: float | None = None
    colour: int = 0
    marker: str = "o"


METHODS = [
    TrainingMethod(name="base", title="untouched base", family="base", trainer=WEIGHTS),
    TrainingMethod(name="lora", title="LoRA", family="lora", trainer=ADAPTERS),
    TrainingMethod(
        name="rslora", title="rsLoRA", family="lora", trainer=ADAPTERS, variant=LoraVariant(rslora=True), alpha=16.0
    ),
    TrainingMethod(name="lora+", title="LoRA+", family="lora", trainer=ADAPTERS, variant=LoraVariant(plus=True)),
    TrainingMethod(
        name="frozen-a", title="LoRA, A frozen", family="lora", trainer=ADAPTERS, variant=LoraVariant(trains_a=False)
    ),
    TrainingMethod(name="pissa", title="PiSSA", family="lora", trainer=ADAPTERS, variant=LoraVariant(init="pissa")),
    TrainingMethod(name="bias", title="biases only", family="weights", trainer=WEIGHTS, trains=train_biases),
    TrainingMethod(name="head", title="head only", family="weights", trainer=WEIGHTS),
    TrainingMethod(
        name="subspace",
        title="random subspace",
        family="subspace",
        trainer=SUBSPACE,
        trains=train_every,
        rate_over_full=SUBSPACE_RATE_OVER_FULL,
        colour=2,
        marker="s",
    ),
    TrainingMethod(
        name="said",
        title="random subspace with layer factors",
        family="subspace",
        trainer=SUBSPACE,
        trains=train_every,
        layered=True,
        rate_over_full=SUBSPACE_RATE_OVER_FULL,
        colour=3,
        marker="^",
    ),
    TrainingMethod(
        name="full",
        title="full fine-tuning",
        family="weights",
        trainer=WEIGHTS,
        trains=train_every,
        has_spectrum=True,
        rate_over_full=1.0,
        colour=1,
        marker="D",
    ),
]
"""Every method, in the order in which studies list their runs."""
IMPLIED = ("base", "full")
"""The base belongs to every study, and the setting ``full`` asks for full fine-tuning: ``methods`` names neither."""


def find_method(name: str) -> TrainingMethod:
    """The method of this name.

    Raises:
        ConfigError: there is none.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise ConfigError(f"method {name!r} is not known; choose from {', '.join(selectable_methods())}")


def selectable_methods() -> list[str]:
    """Names that the setting ``methods`` may hold."""
    return [method.name for method in METHODS if method.name not in IMPLIED]


def methods_of(family: Family) -> list[str]:
    """Names of the methods of a family."""
    return [method.name for method in METHODS if method.family == family]
