"""What someone's own training moves, read as updates: adapted layers as factors, other weights as differences."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankscope.errors import ShapeError
from rankscope.formats.checkpoint import non_matrix_reason
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.peft_keys import strip_peft_prefix
from rankscope.lora.layer import AdapterLayer
from rankscope.lora.pissa import difference_factors
from rankscope.measures import measures_shown
from rankscope.spectra import Spectrum
from rankscope.subspace import Subspace, orthonormalize, overlap
from rankscope.updates import Dense, LowRank, Update

# Put between the parts of a path by torch.compile, DDP and FSDP; in front by DDP.
TRAINING_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\."
)
MODULES_TO_SAVE = re.compile(r"\.modules_to_save\.[^.]+(?=\.|$)")
# Of PEFT's variants of LoRA, those whose layers add scale·B·A: DoRA before it renormalises, aLoRA for some tokens.
PLAIN_LORA_VARIANTS = ("Dora", "_Dora", "ALora")


class TrackedWeight(ABC):
    """One weight that training moves; ``remember`` or ``recall`` tell it where training started.

    Attributes:
        name: path of its module within the model, as ``rankscope.open`` names it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def remember(self) -> dict[str, Tensor]:
        """Take what is there now as the start, kept on the CPU; the tensors by the names that ``recall`` reads."""

    @abstractmethod
    def recall(self, stored: Mapping[str, Tensor]) -> bool:
        """Take the start from tensors that ``remember`` gave in an earlier process; whether they were there and fit."""

    @abstractmethod
    def update(self) -> Update | None:
        """The change since the start, where the weight is; None where the start is needed and not known."""

    @abstractmethod
    def reference(self, k: int) -> Subspace | None:
        """Right directions to compare the update with; None where there are none."""


class TrackedAdapter(TrackedWeight):
    """Low-rank factors; ``read`` gives scale · B · A as it stands.

    An adapter that starts at zero has moved by all of scale · B · A; one that does not (PiSSA, or one that is trained
    further) by scale · (B A − B0 A0). Without a start the first is assumed. The reference is the row space of A0.
    """

    def __init__(self, name: str, read: Callable[[], LowRank]) -> None:
        super().__init__(name)
        self.read = read
        self.A0: Tensor | None = None
        self.B0: Tensor | None = None

    def remember(self) -> dict[str, Tensor]:
        now = self.read()
        A0, B0 = copy_to_cpu(now.A), copy_to_cpu(now.B)
        self.A0, self.B0 = A0, B0 if A0.any() and B0.any() else None
        return {f"{self.name}.A": A0} | ({} if self.B0 is None else {f"{self.name}.B": self.B0})

    def recall(self, stored: Mapping[str, Tensor]) -> bool:
        now, A0, B0 = self.read(), stored.get(f"{self.name}.A"), stored.get(f"{self.name}.B")
        if A0 is None or A0.shape != now.A.shape or (B0 is not None and B0.shape != now.B.shape):
            return False
        self.A0, self.B0 = A0, B0
        return True

    def update(self) -> LowRank:
        now = self.read()
        if self.A0 is None or self.B0 is None:
            return now
        A, B = (factor.to(now.right.dtype) for factor in (now.A, now.B))
        A0, B0 = (factor.to(now.device, now.right.dtype) for factor in (self.A0, self.B0))
        A, B = difference_factors(A, B, A0, B0)
        return LowRank(B, A, now.scale)

    def reference(self, k: int) -> Subspace | None:
        if self.A0 is None or not self.A0.any():
            return None
        A0 = self.A0.to(self.read().device)
        return Subspace.of(LowRank(torch.eye(len(A0), dtype=A0.dtype, device=A0.device), A0), "right")


class TrackedFullWeight(TrackedWeight):
    """A weight trained as it is; ``turned`` where it is stored (in, out). The reference is its own top k at the start.

    The start is a copy of the weight on the CPU, in its own dtype.
    """

    def __init__(self, name: str, weight: nn.Parameter, turned: bool) -> None:
        super().__init__(name)
        self.weight = weight
        self.turned = turned
        self.start: Tensor | None = None
        self.own: tuple[Subspace | None] | None = None

    def matrix(self, weight: Tensor) -> Tensor:
        """(out, in) in float32, where the weight is."""
        flat = weight.detach().to(self.weight.device).float().flatten(1)
        return flat.T if self.turned else flat

    def remember(self) -> dict[str, Tensor]:
        self.start, self.own = copy_to_cpu(self.weight), None
        return {f"{self.name}.weight": self.start}

    def recall(self, stored: Mapping[str, Tensor]) -> bool:
        start = stored.get(f"{self.name}.weight")
        if start is None or start.shape != self.weight.shape:
            return False
        self.start, self.own = start, None
        return True

    def update(self) -> Dense | None:
        # Not Dense.difference: what training in half precision rounds away is a part of how the weight moved.
        return None if self.start is None else Dense(self.matrix(self.weight) - self.matrix(self.start))

    def reference(self, k: int) -> Subspace | None:
        if self.own is None and self.start is not None:
            try:
                self.own = (Subspace.of(Dense(self.matrix(self.start)), "right", k),)
            except ShapeError:  # a head that starts at zero
                self.own = (None,)
        return self.own[0] if self.own else None


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """A contiguous copy in memory of its own on the CPU, in the same shape (any)."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def measure_update(layer: TrackedWeight, k: int) -> dict[str, float]:
    """Ranks of an update and the overlap of its top k right directions with the layer's reference.

    Returns:
        ``stable``, ``entropy``, ``k90``; where there is a reference also ``overlap_init``, φ in [0, 1], and
        ``overlap_init_chance``, its mean for random directions, max(i, j)/d. Empty for an update that is zero.

    Raises:
        NonFiniteError: the weights hold NaN or infinity.
    """
    update = layer.update()
    if update is None:
        return {}
    svd = update.svd()
    spectrum = Spectrum.from_values(update, svd.s)
    if not spectrum.nonzero:
        return {}
    values = {measure.title: float(measure(spectrum)) for measure in measures_shown("callback")}
    reference = layer.reference(k)
    if reference is not None:
        top = Subspace(orthonormalize(svd.Vt[: min(k, spectrum.nonzero)].T), "right")
        values["overlap_init"] = float(overlap(top, reference)[-1, -1])
        values["overlap_init_chance"] = max(top.k, reference.k) / top.dim
    return values


# Finding them


class TrackedWeights(NamedTuple):
    """What can be read in a model, and what is trained there but cannot: (name, reason)."""

    layers: list[TrackedWeight]
    left_out: list[tuple[str, str]]


def find_tracked_weights(model: nn.Module) -> TrackedWeights:
    """All that is trained in a model: adapters of PEFT and of ``rankscope.Bank``, and any other trained parameter."""
    tracked, claimed = TrackedWeights([], []), set[int]()
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return TrackedWeights([], [("the model", "sharded by FSDP: no process holds a whole matrix")])
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            claimed |= {id(module.A), id(module.B)}
            tracked.layers.extend(_bank_layers(strip_wrappers(path), module) if module.A.requires_grad else ())
        elif hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer"):
            parameters = _peft_parameters(module)
            claimed |= {id(parameter) for parameter in parameters}
            _add_peft(tracked, strip_wrappers(path), module, parameters)
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in claimed:
                claimed.add(id(parameter))
                _add_whole(tracked, strip_wrappers(path if key == "weight" else f"{path}.{key}"), module, parameter)
    return tracked


def strip_wrappers(path: str) -> str:
    """The path within the model: without what PEFT, torch.compile, DDP and FSDP put in front and between."""
    return MODULES_TO_SAVE.sub("", strip_peft_prefix(TRAINING_WRAPPERS.sub("", path)))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds only a piece of a tensor (any shape): a DTensor, or emptied by DeepSpeed's ZeRO 3."""
    return hasattr(tensor, "device_mesh") or (hasattr(tensor, "ds_id") and tensor.numel() == 0) or tensor.is_meta


def _bank_layers(path: str, layer: AdapterLayer) -> Iterator[TrackedAdapter]:
    chosen = layer.route.selection
    for i in [chosen] if isinstance(chosen, int) else range(len(layer.slots)):
        if layer.slots[i].rank:
            name = path if isinstance(chosen, int) or len(layer.slots) == 1 else f"{path}.{i}"
            yield TrackedAdapter(name, partial(_slot_product, layer, i))


def _slot_product(layer: AdapterLayer, i: int) -> LowRank:
    return layer.to_matrix(*layer.factors(i), layer.slots[i].scale)


def _peft_parameters(module: Any) -> list[nn.Parameter]:
    """The parameters that a PEFT layer adds to its base layer."""
    holders = [getattr(module, name, None) for name in module.adapter_layer_names]
    single = [holder for holder in holders if isinstance(holder, nn.Parameter)]
    return single + [p for holder in holders if isinstance(holder, nn.Module) for p in holder.parameters()]


def _add_peft(tracked: TrackedWeights, path: str, module: Any, parameters: Sequence[nn.Parameter]) -> None:
    if not any(parameter.requires_grad for parameter in parameters):
        return
    reason = _unsupported_reason(module)
    if any(is_sharded(parameter) for parameter in parameters):
        reason = "sharded: no process holds the whole factors"
    if reason:
        tracked.left_out.append((path, reason))
    elif adapters := [name for name in module.active_adapters if _trains(module, name)]:
        tracked.layers.append(TrackedAdapter(path, partial(_sum_of_products, module, adapters)))


def _unsupported_reason(module: Any) -> str | None:
    """Why the update of a layer of PEFT's is not scale · B · A of the factors it holds, or None."""
    factors = getattr(module, "lora_A", None), getattr(module, "lora_embedding_A", None)
    plain = isinstance(factors[0], nn.ModuleDict) and isinstance(factors[1], nn.ParameterDict)
    if not plain or hasattr(module, "parameter_name"):
        return f"{type(module).__name__} of {type(module).__module__}, which is no plain LoRA layer"
    variants = getattr(module, "lora_variant", {})
    odd = [type(variants[name]).__name__ for name in module.active_adapters if name in variants]
    odd = [name for name in odd if not name.startswith(PLAIN_LORA_VARIANTS)]
    return f"{odd[0]}, which adds something else than scale·B·A" if odd else None


def _factors(module: Any, adapter: str) -> tuple[Tensor, Tensor, bool] | None:
    """(A, B, whether of an embedding) in the shapes that PEFT holds; None where the adapter does not go here."""
    if adapter in module.lora_A:
        return module.lora_A[adapter].weight, module.lora_B[adapter].weight, False
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter], True
    return None


def _trains(module: Any, adapter: str) -> bool:
    factors = _factors(module, adapter)
    return factors is not None and (factors[0].requires_grad or factors[1].requires_grad)


def _sum_of_products(module: Any, adapters: Sequence[str]) -> LowRank:
    return reduce(LowRank.__add__, (_product(module, adapter) for adapter in adapters))


def _product(module: Any, adapter: str) -> LowRank:
    """The update (out, in), or (vocabulary, dim), that an adapter makes of a PEFT layer, kept as factors."""
    A, B, embedding = _factors(module, adapter) or (None, None, False)
    if A is None or B is None:
        raise ShapeError(f"the adapter {adapter!r} has gone")
    A, B, scale = A.detach(), B.detach(), float(module.scaling[adapter])
    if embedding:
        return LowRank(A.T, B.T, scale)
    if A.ndim > 2:  # in a grouped convolution, the outputs of a group see the rows of A of that group
        B = torch.block_diag(*B.flatten(1).chunk(A.shape[0] // B.shape[1]))  # type: ignore[no-untyped-call]
    return LowRank(B, A.flatten(1), scale)


def _add_whole(tracked: TrackedWeights, name: str, module: nn.Module, parameter: nn.Parameter) -> None:
    kernel = isinstance(module, nn.modules.conv._ConvNd)
    reason = non_matrix_reason(TensorInfo(tuple(parameter.shape), parameter.dtype), stacks=kernel)
    if is_sharded(parameter):
        reason = "sharded: no process holds the whole weight"
    if reason:
        tracked.left_out.append((name, reason))
    else:
        tracked.layers.append(TrackedFullWeight(name, parameter, turned=type(module).__name__ == "Conv1D"))
