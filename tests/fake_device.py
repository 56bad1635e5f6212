"""An accelerator that is not there: device "fake", torch's private-use backend, with real numbers computed on the CPU.

A tensor on it wraps a CPU tensor and passes every operation on. What a GPU would refuse is refused (see ``check``): CPU
and device tensors in one operation, a CPU generator filling a device tensor, ``.numpy()``. A hard-coded "cuda" fails
by itself where torch has no CUDA. Where a GPU would make the host wait, it is noted (see ``waits``).

Not covered: autocast to half precision, generators and streams of the device, pinned memory, foreach and fused
optimizers (torch keeps them from wrapped tensors), waits inside a kernel (an SVD's check for errors), memory, speed.
``tensor.data = other`` is not followed; ``Module.to`` is, under ``accelerated``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Generator, Tag, Tensor
from torch.utils import backend_registration as backend
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

if torch.cuda.is_available() or not hasattr(backend, "_setup_privateuseone_for_python_backend"):
    pytest.skip("needs a torch without CUDA, where devices can be written in Python", allow_module_level=True)

aten = torch.ops.aten
DEVICE = torch.device("cpu")  # replaced below, once torch knows the name
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
COPYING = (aten.copy_.default, aten._to_copy.default)
_listeners: list[list[str]] = []


class Module(backend._DummyBackendModule):
    """What is found as ``torch.fake``. It says that it is not available, so that nothing chooses it by itself."""

    def is_available(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Hooks(backend._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


class DeviceTensor(Tensor):
    """A tensor on the device; ``inner`` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> DeviceTensor:
        layout = {"strides": real.stride(), "storage_offset": real.storage_offset(), "dtype": real.dtype}
        made = Tensor._make_wrapper_subclass(cls, real.shape, device=DEVICE, **layout)
        made.inner = real
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, *args, **(kwargs or {}))

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        note("save")
        return self.inner.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"on the fake device: {self.inner!r}"


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute an operation on the CPU; what comes out is on the device, unless it was asked for elsewhere."""
    check(op, args, kwargs)
    note_wait(op, args, kwargs)
    wrappers: dict[int, DeviceTensor] = {}

    def unwrap(value: Any) -> Any:
        if isinstance(value, DeviceTensor):
            wrappers[id(value.inner)] = value
            return value.inner
        return torch.device("cpu") if is_fake(value) else value

    def wrap(value: Tensor) -> Tensor:
        made = wrappers.get(id(value))
        if made is not None and made.shape != value.shape:
            raise NotImplementedError(f"{op} changes the shape of a tensor in place; give it a kernel of its own")
        return DeviceTensor(value) if made is None else made

    result = op(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if op is aten.copy_.default:
        return args[0]
    target = kwargs.get("device")
    return tree_map_only(Tensor, wrap, result) if target is None or is_fake(target) else result


def is_fake(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == DEVICE.type


def check(op: Any, args: Any, kwargs: Any) -> None:
    """Refuse what CUDA refuses. CPU scalars may go along, CPU tensors may be copied, or index a device tensor."""
    leaves = tree_leaves((args, kwargs))
    if any(isinstance(leaf, Generator) for leaf in leaves):
        raise RuntimeError(f"{op}: expected a generator of the device, found one of the CPU")
    on_device = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
    on_host = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor)]
    indexed = op in INDEXING and isinstance(args[0], DeviceTensor)
    if not on_device or op in COPYING or indexed:
        return
    written = [arg for spec, arg in zip(op._schema.arguments, args, strict=False) if spec.is_write]
    if any(tensor.ndim > 0 or any(tensor is arg for arg in written) for tensor in on_host):
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, found fake and cpu")


def note_wait(op: Any, args: Any, kwargs: Any) -> None:
    """Note where CUDA lets the host wait: it needs a value of the device, or copies without saying ``non_blocking``."""
    to_host = isinstance(args[0], DeviceTensor) if args else False
    if op is aten._to_copy.default:
        target = kwargs.get("device") or args[0].device
        crossing = is_fake(target) != to_host
        blocking = not kwargs.get("non_blocking")
    elif op is aten.copy_.default:
        crossing, to_host = isinstance(args[1], DeviceTensor) != to_host, not to_host
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    elif op in INDEXING:
        indices = [index for index in args[1] if index is not None]
        crossing = any(index.dtype == torch.bool or not isinstance(index, DeviceTensor) for index in indices)
        blocking = True
    else:
        crossing = Tag.data_dependent_output in op.tags or Tag.dynamic_output_shape in op.tags
        blocking = True
    # A copy to memory that is not pinned waits, whatever it says.
    if crossing and (blocking or to_host):
        note(str(op))


def note(what: str) -> None:
    for listener in _listeners:
        listener.append(what)


@contextmanager
def waits() -> Iterator[list[str]]:
    """The operations, by name, for which the host has waited for the device inside the block."""
    noted: list[str] = []
    _listeners.append(noted)
    try:
        yield noted
    finally:
        _listeners.pop()


@contextmanager
def accelerated() -> Iterator[None]:
    """Inside, ``torch.load`` puts tensors on the device where asked to, and parameters stay the same objects when their
    module moves: both as with CUDA."""
    load, swap = torch.load, torch.__future__.get_swap_module_params_on_conversion()

    def load_to(file: Any, map_location: Any = None, **settings: Any) -> Any:
        target = map_location or "cpu"
        return tree_map_only(Tensor, lambda tensor: tensor.to(target), load(file, map_location="cpu", **settings))

    torch.load = load_to
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.load = load
        torch.__future__.set_swap_module_params_on_conversion(swap)


# At import: the engine of autograd counts devices once, at the first backward pass of the process.
backend._setup_privateuseone_for_python_backend("fake", Module(), Hooks())
DEVICE = torch.device("fake:0")
_kernels = torch.library.Library("aten", "IMPL")
_OPS = (aten.empty.memory_format, aten.empty_strided.default, aten.copy_.default)
# These would make an empty tensor and resize it.
_OPS += (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default, aten.eye.m)
for _op in _OPS:
    _kernels.impl(_op.name().removeprefix("aten::"), partial(run, _op), "PrivateUse1")
