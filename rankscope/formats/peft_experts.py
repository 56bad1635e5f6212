"""LoRA on bare parameters (PEFT's ``target_parameters``): stacked experts, one update each.

A has rows expert by expert, (E·r, in); B has columns expert by expert within each of the r, (out, r·E) (PEFT's
ParamWrapper). Where several parameters of one module are adapted, its wrappers are nested, and the file names no
parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.abstract_store import UpdateInfo
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.peft_config import AdapterConfig
from rankscope.formats.peft_store import BaseCheckpoint
from rankscope.updates import LowRank

AMBIGUOUS_FACTORS = (
    "target_parameters: factors of several parameters of one module, and nothing in the file tells whose; "
    "with --base the shapes tell"
)
AMBIGUOUS_PARAMETERS = (
    "target_parameters: factors that fit several parameters of the base; nothing tells whose they are"
)


@dataclass(frozen=True)
class Experts:
    """One parameter's factors. ``module`` is the wrapper's path, ``name`` the parameter's; ``count`` is E.

    ``stacked``: whether the parameter has three dimensions, so that its parts are called ``name[e]``.
    """

    module: str
    name: str
    count: int
    stacked: bool
    shape: tuple[int, int]
    rank: int
    scale: float
    A: TensorInfo

    def infos(self) -> Iterator[tuple[str, UpdateInfo]]:
        """Names and infos of all experts."""
        info = UpdateInfo(self.shape, self.rank, self.scale, self.A.dtype, "lora")
        for e in range(self.count):
            yield (f"{self.name}[{e}]" if self.stacked else self.name), info

    def update(self, A: Tensor, B: Tensor, name: str) -> LowRank:
        """One expert's update (out, in) from the factors of all experts, A (E·r, in) and B (out, r·E)."""
        e = self._number(name)
        return LowRank(B[:, e :: self.count], A[e * self.rank : (e + 1) * self.rank], self.scale)

    def weight(self, name: str, origin: BaseCheckpoint | None) -> Tensor | None:
        """The expert's weight as (out, in), None where the base lacks it, or where it is square and
        nothing shows how it is stored."""
        info = origin.info(self.name) if origin is not None else None
        if origin is None or info is None or (self.stacked and self.shape[0] == self.shape[1]):
            return None
        tensor = origin.read(self.name)
        weight = tensor[self._number(name)] if self.stacked else tensor
        return weight if tuple(weight.shape) == self.shape else weight.T

    def _number(self, name: str) -> int:
        return int(name.removeprefix(self.name)[1:-1]) if self.stacked else 0


def find_experts(
    owner: str, pairs: Mapping[str, tuple[TensorInfo, ...]], config: AdapterConfig, origin: BaseCheckpoint | None
) -> list[Experts] | str:
    """The parameters behind the nested wrappers of a module, from (A, B) by path; or why they are not known.

    Raises:
        FormatError: factors that do not multiply or do not divide into experts.
    """
    names = [f"{owner}.{name}" for name in config.target_parameter_names(owner)]
    for A, B in pairs.values():
        if not (len(A.shape) == len(B.shape) == 2 and A.shape[0] == B.shape[1]) or 0 in A.shape + B.shape:
            raise FormatError(f"A {A.shape} and B {B.shape} do not multiply; expected (experts · r, in) and (out, …)")
        if not (A.dtype.is_floating_point and B.dtype.is_floating_point):
            raise FormatError(f"A {A.shape} and B {B.shape} are no floating-point numbers")
    parameters = []
    for module, (A, B) in pairs.items():
        fitting = [name for name in names if origin is None or _fits(origin.info(name), A, B)]
        if not fitting:
            return "target_parameters: factors that fit no parameter of the base"
        if len(fitting) > 1:
            return AMBIGUOUS_FACTORS if origin is None else AMBIGUOUS_PARAMETERS
        parameters.append(_make_experts(module, fitting[0], A, B, config, origin))
    if len({parameter.name for parameter in parameters}) < len(parameters):
        return AMBIGUOUS_FACTORS if origin is None else AMBIGUOUS_PARAMETERS
    return parameters


def _fits(parameter: TensorInfo | None, A: TensorInfo, B: TensorInfo) -> bool:
    if parameter is None or len(parameter.shape) not in (2, 3):
        return False
    *stack, rows, columns = parameter.shape
    count = stack[0] if stack else 1
    return sorted((rows, columns)) == sorted((B.shape[0], A.shape[1])) and count > 0 and A.shape[0] % count == 0


def _make_experts(
    module: str, name: str, A: TensorInfo, B: TensorInfo, config: AdapterConfig, origin: BaseCheckpoint | None
) -> Experts:
    info = origin.info(name) if origin is not None else None
    if info is not None:
        count, stacked = (info.shape[0], True) if len(info.shape) == 3 else (1, False)
    else:
        claimed = config.rank(name)
        if not claimed or claimed < 1 or A.shape[0] % claimed:
            raise FormatError(
                f"A {A.shape} does not divide into experts of rank {claimed}, which the configuration says"
            )
        count = A.shape[0] // claimed
        stacked = count > 1
    rank = A.shape[0] // count
    return Experts(module, name, count, stacked, (B.shape[0], A.shape[1]), rank, config.scale(name, rank), A)
