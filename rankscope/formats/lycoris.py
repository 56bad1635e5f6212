"""Factor layouts of LyCORIS: LoCon (with Tucker cores), LoHa, LoKr and whole differences.

It makes the update of one module from its tensors, by the last part of their names. Files of kohya's scripts and of
LyCORIS hold such groups, and PEFT's LoHa and LoKr use the same names. Layouts: github.com/KohakuBlueleaf/LyCORIS,
modules/*.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.abstract_store import UpdateInfo
from rankscope.formats.recipes import (
    Headers,
    Recipe,
    Tensors,
    check_complete,
    check_floating,
    element_count,
    upcast_float8,
)
from rankscope.structured import Hadamard, Kronecker
from rankscope.updates import Dense, LowRank, Update, check_finite


class FactorNames(NamedTuple):
    """Names of one matrix's tensors: W whole; or a (out, r) and b (r, in, …); or those around a core (r, r, …).

    With a core (Tucker), ``a`` is (r, out) in LoHa and LoKr and (out, r) in LoCon, which is ``upright``.
    """

    whole: str = ""
    a: str = ""
    b: str = ""
    core: str = ""
    upright: bool = False


LOCON = FactorNames(a="lora_up.weight", b="lora_down.weight", core="lora_mid.weight", upright=True)
LOHA = (
    FactorNames(a="hada_w1_a", b="hada_w1_b", core="hada_t1"),
    FactorNames(a="hada_w2_a", b="hada_w2_b", core="hada_t2"),
)
LOKR = (
    FactorNames("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
    FactorNames("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
FULL = FactorNames("diff")

# Why a tensor makes no update of a matrix, or none by itself.
UNSUPPORTED_LEAVES = {
    "diff_b": "a change of a bias: one-dimensional, no spectrum",
    "w_norm": "a change of a norm's weight: one-dimensional, no spectrum",
    "b_norm": "a change of a norm's bias: one-dimensional, no spectrum",
    "lokr_t1": "a core of LoKr's first factor, which no version of LyCORIS writes; its meaning is not known",
    "a1.weight": "GLoRA: W·A + B, which needs the base weight",
    "a2.weight": "GLoRA: W·A + B, which needs the base weight",
    "b1.weight": "GLoRA: W·A + B, which needs the base weight",
    "b2.weight": "GLoRA: W·A + B, which needs the base weight",
    "bm.weight": "GLoRA: W·A + B, which needs the base weight",
    "oft_blocks": "OFT or BOFT: a rotation of the base weight",
    "oft_diag": "OFT: a rotation of the base weight",
    "rescale": "OFT or BOFT: a factor on the base weight's rows",
    "on_input": "(IA)³: a factor on the base weight",
    "q_layer.weight": "T-LoRA: its update is the change since a start that is not saved",
    "p_layer.weight": "T-LoRA: its update is the change since a start that is not saved",
    "lambda_layer": "T-LoRA: its update is the change since a start that is not saved",
}
ALPHA_LEAF = "alpha"
MAGNITUDE_LEAF = "dora_scale"
LEAF_NAMES: tuple[str, ...] = (
    *(name for leaves in (LOCON, *LOHA, *LOKR, FULL) for name in leaves[:4] if name),
    ALPHA_LEAF,
    MAGNITUDE_LEAF,
    *UNSUPPORTED_LEAVES,
)
"""Every name that ends a key of LyCORIS."""


def lycoris_recipe(headers: Headers, alpha: float | None) -> Recipe:
    """How the update (out, in·kernel) of one module is made, from its headers by leaf name (``LEAF_NAMES``).

    The scale is α/r, with α as stored (rsLoRA is in it already), 1 without α, and 1 for a LoKr of two whole factors and
    for a whole difference. A ``dora_scale`` is not applied: the result is what is added before the rescaling, and
    ``lycoris_dora_update`` goes on from there.

    Raises:
        FormatError: a part is missing, does not fit, or is of a method that has no update without the base.
    """
    present = {name: info for name, info in headers.items() if name not in (ALPHA_LEAF, MAGNITUDE_LEAF)}
    for name in present:
        if name in UNSUPPORTED_LEAVES:
            raise FormatError(f"{name}: {UNSUPPORTED_LEAVES[name]}")
        if name not in LEAF_NAMES:
            raise FormatError(f"{name}: not a tensor that LyCORIS is known to write")
    family = _family(present)
    if family == (FULL,):
        return _full_recipe(present)
    if family == LOHA:
        return loha_recipe(present, lora_scale(alpha, loha_rank(present)))
    if family == LOKR:
        return lokr_recipe(present, lora_scale(alpha, lokr_rank(present)))
    return _locon_recipe(present, lora_scale(alpha, _rank(LOCON, present)))


def _family(present: Headers) -> tuple[FactorNames, ...]:
    """The method that all of these tensors belong to.

    Raises:
        FormatError: they belong to more than one.
    """
    families: tuple[tuple[FactorNames, ...], ...] = ((FULL,), LOHA, LOKR, (LOCON,))
    for family in families:
        names = {name for leaves in family for name in leaves[:4]}
        if names & set(present):
            foreign = [name for name in present if name not in names]
            if foreign:
                raise FormatError(
                    f"{foreign[0]} is of another method than {min(names & set(present))}; which is meant?"
                )
            return family
    raise FormatError("holds no factors")


def lycoris_dora_update(update: Update, magnitude: Tensor, weight: Tensor) -> Dense:
    """The whole update (out, in·kernel) of a module with a ``dora_scale``: m·(W + ΔW)/‖W + ΔW‖ − W.

    W, ``weight``, is (out, in·kernel). The norm is per output where m is (out, 1, …), per input channel where it is
    (1, in, …).

    Raises:
        FormatError: m fits neither.
    """
    out, columns = update.shape
    start = weight.to(update.working_matrix)
    moved = start + update.working_matrix
    m = upcast_float8(magnitude).to(moved)
    check_finite(m, "the dora_scale")
    tiny = torch.finfo(torch.float32).eps  # which LyCORIS adds to the norm
    if m.shape[0] == out and m.numel() == out:
        return Dense(m.reshape(out, 1) / (moved.norm(dim=1, keepdim=True) + tiny) * moved - start)
    if m.ndim < 2 or m.shape[0] != 1 or m.numel() != m.shape[1] or columns % m.shape[1]:
        raise FormatError(
            f"{MAGNITUDE_LEAF} is {tuple(magnitude.shape)}, which fits no side of an update {update.shape}"
        )
    channels = moved.reshape(out, m.shape[1], -1)
    norms = channels.norm(dim=(0, 2), keepdim=True) + tiny
    return Dense((m.reshape(1, -1, 1) / norms * channels).reshape(out, columns) - start)


def loha_recipe(headers: Headers, scale: float) -> Recipe:
    """LoHa: scale · (w1_a·w1_b) ∘ (w2_a·w2_b)."""
    (shape, r1), (other, r2) = (_geometry(leaves, headers) for leaves in LOHA)
    if shape != other:
        raise FormatError(f"the two factors are {shape} and {other}; LoHa multiplies them entry by entry")
    info = UpdateInfo(shape, (r1 or 1) * (r2 or 1), scale, headers[LOHA[0].b].dtype, "loha")

    def build(tensors: Tensors) -> Update:
        first, second = (_low_rank(leaves, tensors) for leaves in LOHA)
        return Hadamard(first * scale, second)

    return Recipe(info, tuple(headers), build)


def lokr_recipe(headers: Headers, scale: float) -> Recipe:
    """LoKr: scale · w1 ⊗ w2; a convolution's kernel belongs to the columns of w2."""
    (shape1, r1), (shape2, r2) = (_geometry(leaves, headers) for leaves in LOKR)
    shape = shape1[0] * shape2[0], shape1[1] * shape2[1]
    rank = min(*shape1, r1 or min(shape1)) * min(*shape2, r2 or min(shape2))
    info = UpdateInfo(shape, rank, scale, next(iter(headers.values())).dtype, "lokr")

    def build(tensors: Tensors) -> Update:
        W1, W2 = (build_matrix(leaves, tensors) for leaves in LOKR)
        return Kronecker(W1, W2, scale)

    return Recipe(info, tuple(headers), build)


def loha_rank(headers: Headers) -> int | None:
    """The r of LoHa's first factor, which its scale is divided by; None where that is missing."""
    return _rank(LOHA[0], headers)


def lokr_rank(headers: Headers) -> int | None:
    """The r of LoKr's factors; None where both are whole."""
    ranks = (_rank(leaves, headers) for leaves in LOKR)
    return next((rank for rank in ranks if rank is not None), None)


def _locon_recipe(headers: Headers, scale: float) -> Recipe:
    shape, rank = _geometry(LOCON, headers)
    info = UpdateInfo(shape, rank, scale, headers[LOCON.b].dtype, "lora")
    return Recipe(info, tuple(headers), lambda tensors: _low_rank(LOCON, tensors) * scale)


def _full_recipe(headers: Headers) -> Recipe:
    shape, _ = _geometry(FULL, headers)
    info = UpdateInfo(shape, None, 1.0, headers[FULL.whole].dtype, "full")

    def build(tensors: Tensors) -> Update:
        difference = upcast_float8(tensors[FULL.whole]).flatten(1)
        return Dense.difference(difference, torch.zeros_like(difference))  # keeps the rounding of the stored dtype

    return Recipe(info, (FULL.whole,), build)


def lora_scale(alpha: float | None, rank: int | None) -> float:
    """α/r; 1 where one of the two is not known."""
    return 1.0 if alpha is None or rank is None else alpha / rank


def _rank(leaves: FactorNames, headers: Headers) -> int | None:
    """r, the first side of b in every layout; None for a whole matrix."""
    info = headers.get(leaves.b)
    return info.shape[0] if info is not None and info.shape and info.shape[0] else None


def _geometry(leaves: FactorNames, headers: Headers) -> tuple[tuple[int, int], int | None]:
    """(out, in·kernel) and r of one matrix; r is None where it is whole.

    Raises:
        FormatError: parts that are missing, too many, or do not multiply.
    """
    present = {name: headers[name] for name in leaves[:4] if name in headers}
    check_floating(present)
    shapes = ", ".join(f"{name} {info.shape}" for name, info in present.items())
    if leaves.whole in present:
        if len(present) > 1:
            raise FormatError(f"{shapes}: a whole matrix and factors of it; which are meant?")
        shape = present[leaves.whole].shape
        if len(shape) < 2:
            raise FormatError(f"{shapes}: one-dimensional, no spectrum")
        return (shape[0], element_count(shape[1:])), None
    check_complete(present, (leaves.a, leaves.b))
    a, b = present[leaves.a].shape, present[leaves.b].shape
    core = present[leaves.core].shape if leaves.core in present else None
    if core is not None and not leaves.upright:
        a = a[1::-1] + a[2:]
    fits = len(a) >= 2 and len(b) >= 2 and a[1] == b[0] and element_count(a[2:]) == 1
    if core is not None:
        fits = fits and len(core) >= 3 and core[:2] == (a[1], b[0]) and element_count(b[2:]) == 1
    if not fits:
        between = "" if core is None else f", with {leaves.core} (r, r, …) between"
        first = "(out, r)" if core is None or leaves.upright else "(r, out)"
        raise FormatError(f"{shapes} do not multiply; expected {leaves.a} {first} and {leaves.b} (r, in){between}")
    return (a[0], b[1] * element_count(core[2:] if core is not None else b[2:])), b[0]


def build_matrix(leaves: FactorNames, tensors: Tensors) -> LowRank | Dense:
    """One matrix (out, in·kernel), whole or as factors, from tensors in the shapes of ``FactorNames``."""
    return (
        Dense(upcast_float8(tensors[leaves.whole]).flatten(1))
        if leaves.whole in tensors
        else _low_rank(leaves, tensors)
    )


def _low_rank(leaves: FactorNames, tensors: Tensors) -> LowRank:
    """a·b, or a·(core ×₂ b): the columns run over the kernel fastest, as in a flattened convolution."""
    a, b = upcast_float8(tensors[leaves.a]).flatten(1), upcast_float8(tensors[leaves.b]).flatten(1)
    if leaves.core not in tensors:
        return LowRank(a, b)
    core = upcast_float8(tensors[leaves.core]).double().flatten(2)
    right = torch.einsum("ijk,jn->ink", core, b.double()).flatten(1)
    return LowRank(a if leaves.upright else a.T, right)
