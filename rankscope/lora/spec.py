"""What one adapter is: its rank, its scale, and the modules it goes to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeVar, get_args

from rankscope.errors import ConfigError
from rankscope.formats.names import matches_path_end

Init = Literal["kaiming", "gaussian", "pissa"]
Bias = Literal["none", "lora_only", "all"]
ALL_LINEAR = "all-linear"
T = TypeVar("T")


class Slot(NamedTuple):
    """One adapter on one layer. Rank 0 means that the adapter does not change this layer."""

    rank: int = 0
    scale: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True)
class AdapterSpec:
    """One LoRA adapter; the names, patterns and conventions are PEFT's, so that a spec can be saved as its config.

    Args:
        rank: nominal rank r, at least 1.
        alpha: the update is scaled by alpha / r, or alpha / √r with ``rslora``.
        targets: which modules get the adapter. A sequence of names, each matching the whole dotted path or its end
            ("q_proj" matches "layers.0.q_proj"); or one regular expression for whole paths; or "all-linear": every
            Linear and Conv1D except the output layer.
        init: how A starts; B starts at zero. "kaiming" is uniform in ±1/√in, "gaussian" has deviation 1/r. An
            embedding is the other way round, as in PEFT and loralib: A, whose columns the tokens look up, is zero and
            B is standard normal, so that tokens that are never seen, and the padding token, never move. "pissa" starts
            both from the r largest singular directions of the weight and subtracts that start again (``lora.pissa``);
            dropout then acts on the whole difference.
        dropout: probability, in [0, 1), that an entry of the input of A is dropped (embeddings look up: none there).
        rslora: the rank-stabilised scale (Kalajdzievski 2023).
        bias: which biases of the base are trained along: "none", those of the targets ("lora_only"), or "all".
        modules_to_save: names (matched as in ``targets``) of modules, such as a fresh head, that are trained whole.
        rank_pattern, alpha_pattern: other ranks and alphas by module: regular expressions for the end of the path;
            the first that matches counts.

    Raises:
        ConfigError: a value that is out of range, unknown, or not a regular expression.
    """

    rank: int
    alpha: float
    targets: str | Sequence[str]
    init: Init = "kaiming"
    dropout: float = 0.0
    rslora: bool = False
    bias: Bias = "none"
    modules_to_save: Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"a rank is a whole number of at least 1, not {rank!r}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise ConfigError(f"alpha is a finite number, not {alpha!r}")
            if self.init == "pissa" and alpha <= 0:
                raise ConfigError(f'init "pissa" divides by the scale, so alpha must be positive, not {alpha!r}')
        if not (isinstance(self.dropout, int | float) and 0.0 <= self.dropout < 1.0):
            raise ConfigError(f"dropout is a probability in [0, 1), not {self.dropout!r}")
        for name, value, known in (("init", self.init, get_args(Init)), ("bias", self.bias, get_args(Bias))):
            if value not in known:
                raise ConfigError(f"{name} is one of {', '.join(known)}; not {value!r}")
        self._check_names()

    def _check_names(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"modules_to_save is a sequence of names; write ({self.modules_to_save!r},)")
        names = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        if not names or not all(isinstance(name, str) and name for name in (*names, *self.modules_to_save)):
            raise ConfigError(f"targets and modules_to_save hold names of modules; got {names!r}")
        expressions = [*self.rank_pattern, *self.alpha_pattern]
        if isinstance(self.targets, str):
            expressions.append(self.targets)
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ConfigError(f"{expression!r} is not a regular expression ({error})") from error

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / √r with ``rslora``, where no pattern says otherwise."""
        return scaling(self.alpha, self.rank, self.rslora)

    def slot(self, module: str) -> Slot:
        """Rank, scale and dropout on the module of this path."""
        rank = first_match(self.rank_pattern, module, self.rank)
        alpha = first_match(self.alpha_pattern, module, self.alpha)
        return Slot(rank, scaling(alpha, rank, self.rslora), float(self.dropout))

    def as_plain(self) -> AdapterSpec:
        """The spec of the adapter's file: with "pissa" B A − B0 A0 is stored, of twice the rank and the same scale."""
        if self.init != "pissa":
            return self
        factor = math.sqrt(2) if self.rslora else 2
        return replace(
            self,
            init="kaiming",
            rank=2 * self.rank,
            alpha=factor * self.alpha,
            rank_pattern={name: 2 * rank for name, rank in self.rank_pattern.items()},
            alpha_pattern={name: factor * alpha for name, alpha in self.alpha_pattern.items()},
        )


def scaling(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / r (Hu et al. 2021), or alpha / √r (Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def first_match(patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first pattern that matches the end of the path, at a dot: PEFT's rule."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def select_names(names: str | Sequence[str], paths: Sequence[str], what: str, shown: Sequence[str]) -> list[str]:
    """The paths, in order, that a regular expression or a sequence of names matches.

    Raises:
        ConfigError: the expression or one of the names matches nothing; the message lists last parts of ``shown``.
    """
    if isinstance(names, str):
        selected = [path for path in paths if re.fullmatch(names, path)]
        unmatched = [] if selected else [names]
    else:
        selected = [path for path in paths if any(matches_path_end(name, path) for name in names)]
        unmatched = [name for name in names if not any(matches_path_end(name, path) for path in paths)]
    if unmatched:
        known = list(dict.fromkeys(path.rpartition(".")[2] for path in shown))
        listed = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
        raise ConfigError(f"{what} {unmatched[0]!r} matches no module of the model; it has {listed or 'none'}")
    return selected
