"""Methods of PEFT whose layers share tensors: VeRA, PVeRA, RandLoRA and VB-LoRA.

Each function takes one module's headers, the shared ones among them, and gives the recipe of its update; formulas are
those of ``get_delta_weight`` in PEFT 0.21.2's tuners.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.abstract_store import UpdateInfo
from rankscope.formats.recipes import (
    UNKNOWN_SHAPE_REASON,
    AdaptedModule,
    Recipe,
    Tensors,
    check_base_shape,
    check_complete,
    check_floating,
    check_indices,
    check_shapes,
    matrix_sides,
    to_float64,
)
from rankscope.updates import LowRank, Update


def vera(module: AdaptedModule) -> Recipe:
    """diag(b)·B·diag(d)·A with B and A random and shared by all layers (Kopiczko et al. 2024)."""
    return _vector_scaled(module, "vera", halves=1)


def pvera(module: AdaptedModule) -> Recipe:
    """VeRA with two halves of A and d, mean and log-variance; at inference the mean acts alone."""
    return _vector_scaled(module, "pvera", halves=2)


def _vector_scaled(module: AdaptedModule, name: str, halves: int) -> Recipe:
    shape = module.base_shape(UNKNOWN_SHAPE_REASON)
    parts = f"{name}_lambda_b", f"{name}_lambda_d", f"{name}_A", f"{name}_B"
    _check_shared(module, parts[2:])
    check_complete(module.headers, parts)
    check_floating(module.headers)
    rank = module.headers[parts[1]].shape[0] // halves if module.headers[parts[1]].shape else 0
    expected = {
        parts[0]: (shape[0],),
        parts[1]: (rank * halves,),
        parts[2]: (rank * halves, None),
        parts[3]: (None, rank),
    }
    check_shapes(module.headers, **expected)
    if module.headers[parts[2]].shape[1] < shape[1] or module.headers[parts[3]].shape[0] < shape[0]:
        raise FormatError(
            f"the shared projections are smaller than the weight {shape}; is this the base that was tuned?"
        )

    def build(tensors: Tensors) -> Update:
        b, d, A, B = (to_float64(tensors[part]) for part in parts)
        return LowRank(b[:, None] * B[: shape[0]], d[:rank, None] * A[:rank, : shape[1]])

    return Recipe(UpdateInfo(shape, rank, 1.0, module.stored_dtype(parts[0]), name), parts, build)


def randlora(module: AdaptedModule) -> Recipe:
    """α/r · Σ_n B_n·Λ_n·A_n·Γ_n over enough random bases for full rank (Albert et al. 2025).

    PEFT pairs the r·n rows and columns in different orders; so does this.
    """
    shape = module.base_shape(UNKNOWN_SHAPE_REASON)
    parts = "randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"
    _check_shared(module, parts[2:])
    check_complete(module.headers, parts)
    check_floating(module.headers)
    rank, bases = matrix_sides(module, "randlora_lambda")
    small, large = min(shape), max(shape)
    check_shapes(
        module.headers, randlora_gamma=(bases, small), randlora_A=(rank, 1, None), randlora_B=(None, None, rank)
    )
    _, _, columns = module.headers["randlora_A"].shape
    rows, stored_bases, _ = module.headers["randlora_B"].shape
    if columns < small or rows < large or stored_bases < bases:
        raise FormatError(
            f"the shared projections are smaller than the weight {shape}; is this the base that was tuned?"
        )
    scale = module.config.require("randlora_alpha") / rank

    def build(tensors: Tensors) -> Update:
        lambdas, gammas, A, B = (to_float64(tensors[part]) for part in parts)
        thin = (A[:, :, :small] * lambdas[:, :, None] * gammas).flatten(0, 1)
        tall = B[:large, :bases].flatten(1)
        update = LowRank(tall, thin, scale)
        return update if shape[1] == small else update.T

    info = UpdateInfo(shape, rank * bases, scale, module.stored_dtype("randlora_lambda"), "randlora")
    return Recipe(info, parts, build)


def vblora(module: AdaptedModule) -> Recipe:
    """B·A of pieces, each a mixture of the top k vectors of a shared bank (Li et al. 2024)."""
    headers, bank = module.headers, "vblora_vector_bank"
    _check_shared(module, (bank,))
    sides = ("vblora_logits_A", "vblora_logits_B")
    stored_top = f"{sides[0]}_topk_indices" in headers
    ends = ("_topk_indices", "_topk_weights") if stored_top else ("",)
    parts = tuple(side + end for side in sides for end in ends)
    check_complete(headers, (*parts, bank))
    shapes = [headers[side + ends[0]].shape for side in sides]
    if len(headers[bank].shape) != 2 or any(len(shape) != 3 for shape in shapes) or shapes[0][0] != shapes[1][1]:
        raise FormatError(f"{sides[0]} {shapes[0]} and {sides[1]} {shapes[1]} do not multiply")
    check_floating({part: headers[part] for part in (*parts, bank) if not part.endswith("_indices")})
    check_indices(headers, *(part for part in parts if part.endswith("_indices")))
    for side, places in zip(sides, shapes, strict=True):
        if stored_top and headers[f"{side}_topk_weights"].shape != (*places[:2], places[2] - 1):
            raise FormatError(f"{side} has {places} places and {headers[f'{side}_topk_weights'].shape} weights")
    length, rank = headers[bank].shape[1], shapes[0][0]
    shape = shapes[1][0] * length, shapes[0][1] * length
    check_base_shape(module, shape)
    topk = None if stored_top else module.config.require("topk")
    if topk is not None and not 1 <= topk <= headers[parts[0]].shape[2]:
        raise FormatError(f"topk is {topk}, of a bank of {headers[parts[0]].shape[2]} vectors")

    def build(tensors: Tensors) -> Update:
        A, B = (_pieces(tensors, side, topk) for side in sides)
        return LowRank(B.transpose(1, 2).reshape(shape[0], rank), A.reshape(rank, shape[1]))

    return Recipe(UpdateInfo(shape, rank, 1.0, module.stored_dtype(parts[-1]), "vblora"), (*parts, bank), build)


def _pieces(tensors: Tensors, side: str, topk: int | None) -> Tensor:
    """Mixed vectors of the bank, (…, length)."""
    bank = to_float64(tensors["vblora_vector_bank"])
    if topk is None:
        places = tensors[f"{side}_topk_indices"].long()
        known = to_float64(tensors[f"{side}_topk_weights"])
        weights = torch.cat((known, 1 - known.sum(dim=-1, keepdim=True)), dim=-1)  # the last one is not saved
    else:
        top, places = to_float64(tensors[side]).topk(topk, dim=-1)
        weights = top.softmax(dim=-1)
    if int(places.max()) >= len(bank) or int(places.min()) < 0:
        raise FormatError(f"{side} asks for vector {int(places.max())} of a bank of {len(bank)}")
    return (weights[..., None] * bank[places]).sum(-2)


def _check_shared(module: AdaptedModule, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in module.headers]
    if missing:
        raise FormatError(
            f"{' and '.join(missing)}, shared by all layers, are not in the file; load the adapter with PEFT and save "
            "it again with save_projection=True"
        )
