"""Quantised weights of a checkpoint: found from headers, dequantised one at a time. ``SCHEMES`` lists what is read.

Every scheme here stores codes and scales, and the weight is scale · (code − zero point). Sources: bitsandbytes'
``functional.dequantize_4bit`` and ``int8_vectorwise_dequant``, transformers' ``finegrained_fp8`` (which multiplies by
``weight_scale_inv``), compressed-tensors' ``quantization/lifecycle/forward.py``, the OCP microscaling formats (MX) 1.0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.file_io import TensorInfo
from rankscope.linalg import ulp

Infos = Mapping[str, TensorInfo]
Config = Mapping[str, Any]
Read = Callable[[str], Tensor]

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
SCALE_SUFFIXES = ("_scale_inv", "_scale")  # behind the name of the weight
SCALE_LEAVES = ("scale_weight", "qscale_weight", "scale")  # in the place of its last part
ACTIVATION_LEAVES = ("input_scale", "scale_input", "activation_scale", "qscale_act", "input_zero_point")
FOUR_BIT_STATES = {"NF4": ".quant_state.bitsandbytes__nf4", "FP4": ".quant_state.bitsandbytes__fp4"}
FOUR_BIT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
SCALE_BLOCK = 128  # of DeepSeek's fp8 weights, where the configuration does not say
MX_BLOCK = 32
FLOAT32_EXPONENT_BIAS = 127
# Layouts that are not read, by a name that each of their layers has.
UNREAD_LAYOUTS = (
    (".qweight", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors' packed weights or NVFP4"),
    (".weight_scale_2", "ModelOpt's NVFP4"),
    ("_blocks", "MXFP4"),
)
QUANTIZATION_CONFIG = "quantization_config"
QUANTIZATION_METADATA = "_quantization_metadata"  # ComfyUI's, in the metadata of a file
SCALED_MARKER = "scaled_fp8"  # ComfyUI's: a tensor that says that there are scales
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class Codes:
    """A weight as codes: ``values`` and ``spacing`` between neighbouring codes, in float32; ``scale`` broadcasts."""

    values: Tensor
    spacing: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """The weight in float32, in its shape."""
        return self.values * self.scale

    def rounding(self) -> float:
        """Root mean square of the error per entry that rounding to these codes can have left.

        The error is uniform within half the distance of neighbouring codes, so its root mean square is step/√12.
        """
        return math.sqrt(float((self.spacing * self.scale).double().square().mean()) / 12)


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight: the scheme's name, its shape, the tensors that belong to it, and the reader of its codes."""

    scheme: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    read: Callable[[Read], Codes]


def find_quantized(infos: Infos, config: Config, read: Read) -> dict[str, QuantizedWeight]:
    """The quantised weights that can be read, by their names.

    Args:
        infos: all tensors as stored.
        config: the model's ``quantization_config``, empty where there is none.
        read: reads a tensor as stored; only bitsandbytes' descriptions of a few bytes are read here.

    Raises:
        FormatError: scales do not fit their weight.
    """
    found = {}
    for name in infos:
        for find in SCHEMES:
            weight = find(name, infos, config, read)
            if weight is not None:
                found[name] = weight
                break
    return found


def find_unread_layout(infos: Infos) -> str | None:
    """The name of a quantised layout that is not read, where the tensors are of one."""
    for suffix, layout in UNREAD_LAYOUTS:
        for name in infos:
            if name.endswith(suffix) and (suffix != "_blocks" or name.removesuffix(suffix) + "_scales" in infos):
                return layout
    return None


def _find_four_bit(name: str, infos: Infos, config: Config, read: Read) -> QuantizedWeight | None:
    """bitsandbytes' NF4 and FP4. The shape of the weight lies in a small tensor of JSON."""
    for scheme, suffix in FOUR_BIT_STATES.items():
        if infos[name].dtype is torch.uint8 and name + suffix in infos and name + ".absmax" in infos:
            parts = tuple(name + part for part in (*FOUR_BIT_PARTS, suffix) if name + part in infos)
            state = _read_four_bit_state(name + suffix, read)
            return QuantizedWeight(scheme, state["shape"], parts, partial(_read_four_bit, name, state))
    return None


def _read_four_bit_state(name: str, read: Read) -> dict[str, Any]:
    """bitsandbytes' description of a weight: the JSON in a tensor of bytes, with shape, blocksize and nested offset.

    Raises:
        FormatError: it is no such JSON.
    """
    try:
        state = json.loads(bytes(read(name).reshape(-1).tolist()))
        if min(*state["shape"], state["blocksize"], state.get("nested_blocksize") or 1) < 1:
            raise ValueError("a size below 1")
        return {**state, "shape": tuple(int(size) for size in state["shape"])}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"{name}: does not describe a weight of four bits ({error}); download it again") from error


def _read_four_bit(name: str, state: Config, read: Read) -> Codes:
    shape, packed, absmax = state["shape"], read(name).reshape(-1), read(name + ".absmax")
    size = math.prod(shape)
    if absmax.dtype is torch.uint8:  # the scales are quantised themselves
        nested, code = read(name + ".nested_absmax").float(), read(name + ".nested_quant_map").float()
        block = int(state["nested_blocksize"])
        _check_sizes(name, (len(code), 256), (len(nested), math.ceil(absmax.numel() / block)))
        outer = nested.repeat_interleave(block)[: absmax.numel()]
        absmax = code[absmax.int()] * outer + float(state.get("nested_offset") or 0)
    quant_map = read(name + ".quant_map").float()
    block = int(state["blocksize"])
    blocks = math.ceil(size / block)
    _check_sizes(name, (len(quant_map), 16), (packed.numel(), math.ceil(size / 2)), (absmax.numel(), blocks))
    index = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[:size].int()  # the high nibble comes first
    scale = absmax.float().repeat_interleave(block)[:size]
    parts = (quant_map[index], _gaps(quant_map)[index], scale)
    return Codes(*(part.reshape(shape) for part in parts))


def _gaps(code: Tensor) -> Tensor:
    """The width of the interval that is rounded to each entry of a code (n,)."""
    ordered, order = torch.unique(code, return_inverse=True)
    half = ordered.diff() / 2
    zero = half.new_zeros(1)
    return (torch.cat((zero, half)) + torch.cat((half, zero)))[order]


def _find_int8_rows(name: str, infos: Infos, config: Config, read: Read) -> QuantizedWeight | None:
    """bitsandbytes' int8: one scale a row, W·SCB/127."""
    info, stem = infos[name], name.rpartition(".")[0]
    scale, layout = f"{stem}.SCB", f"{stem}.weight_format"
    if info.dtype is not torch.int8 or scale not in infos or layout not in infos or len(info.shape) != 2:
        return None
    _check_sizes(name, (math.prod(infos[scale].shape), info.shape[0]))

    def read_codes(read: Read) -> Codes:
        if int(read(layout).reshape(-1)[0]) != 0:
            raise FormatError(f"{name}: its int8 rows are permuted for one kind of GPU (weight_format is not 0)")
        return Codes(read(name).float(), torch.ones(()), read(scale).float().reshape(-1, 1) / 127)

    return QuantizedWeight("bitsandbytes int8", info.shape, (scale, layout), read_codes)


def _find_scaled(name: str, infos: Infos, config: Config, read: Read) -> QuantizedWeight | None:
    """fp8 and int8 with scales: DeepSeek's, transformers', compressed-tensors', ComfyUI's, MXFP8."""
    info, stem = infos[name], name.rpartition(".")[0]
    if info.dtype not in FLOAT8 and info.dtype is not torch.int8:
        return None
    names = [name + suffix for suffix in SCALE_SUFFIXES] + [f"{stem}.{leaf}" for leaf in SCALE_LEAVES]
    scale = next((scale for scale in names if scale in infos and scale != name), None)
    if scale is None or f"{name}_scale_2" in infos:
        return None
    zero = f"{name}_zero_point" if f"{name}_zero_point" in infos else None
    grids = [infos[part].shape for part in (scale, zero) if part is not None]
    exponents = infos[scale].dtype is torch.uint8
    blocks = _config_blocks(config, exponents)
    for grid in grids:
        _expand(torch.empty(grid, device="meta"), info.shape, blocks, name)  # so that an error is told before reading

    def read_codes(read: Read) -> Codes:
        stored = read(name)
        values, factor = stored.float(), read(scale)
        factor = torch.exp2(factor.float() - FLOAT32_EXPONENT_BIAS) if exponents else factor.float()
        spacing = ulp(values, stored.dtype) if stored.dtype in FLOAT8 else torch.ones(())
        if zero is not None:
            values = values - _expand(read(zero).float(), info.shape, blocks, name)
        return Codes(values, spacing, _expand(factor, info.shape, blocks, name))

    kind = "int8" if info.dtype is torch.int8 else "MXFP8" if exponents else "fp8"
    companions = (f"{stem}.{leaf}" for leaf in ACTIVATION_LEAVES)
    parts = (scale, *([zero] if zero else []), *(part for part in companions if part in infos))
    return QuantizedWeight(kind, info.shape, parts, read_codes)


def _config_blocks(config: Config, exponents: bool) -> tuple[int, ...]:
    """Rows and columns that share a scale, as the configuration or the format says; () where neither does."""
    blocks = config.get("weight_block_size")
    if isinstance(blocks, list) and all(isinstance(size, int) and size > 0 for size in blocks):
        return tuple(blocks)
    return (1, MX_BLOCK) if exponents else ()


def _expand(scale: Tensor, shape: tuple[int, ...], blocks: tuple[int, ...], name: str) -> Tensor:
    """Scales of a grid of blocks, (⌈rows/b⌉, …), made to broadcast against a weight of ``shape``."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim < len(shape):
        scale = scale.reshape(*scale.shape, *([1] * (len(shape) - scale.ndim)))
    if scale.ndim != len(shape):
        raise FormatError(f"{name} is {shape}, its scales {tuple(scale.shape)}; they do not fit")
    told = (0,) * (len(shape) - len(blocks)) + blocks
    for axis, (size, count, block) in enumerate(zip(shape, scale.shape, told, strict=False)):
        if count in (1, size):
            continue
        step = next((b for b in (block, SCALE_BLOCK, size // max(count, 1)) if b and math.ceil(size / b) == count), 0)
        if not step or (step not in (block, SCALE_BLOCK) and size % count):
            raise FormatError(f"{name} is {shape}, its scales {tuple(scale.shape)}; the size of a block is not known")
        scale = scale.repeat_interleave(step, dim=axis).narrow(axis, 0, size)
    return scale


def _check_sizes(name: str, *pairs: tuple[int, int]) -> None:
    """Raise FormatError where a part of a quantised weight has not the size that the others call for."""
    for size, expected in pairs:
        if size != expected:
            raise FormatError(f"{name}: a part of its quantisation has {size} entries, {expected} are expected")


SCHEMES = (_find_four_bit, _find_int8_rows, _find_scaled)
"""Each says from the headers whether a tensor is a weight of its scheme."""
