"""Methods of PEFT that act through the base weight W: their update W' − W cannot be computed without the base.

Formulas are those of the merges in PEFT 0.21.2's tuners; W is (out, in), a convolution's kernel flattened.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from rankscope.errors import FormatError
from rankscope.formats.abstract_store import UpdateInfo
from rankscope.formats.recipes import (
    BASE_WEIGHT,
    AdaptedModule,
    Recipe,
    SkippedPartError,
    Tensors,
    check_complete,
    check_floating,
    check_shapes,
    matrix_sides,
    to_float64,
)
from rankscope.updates import Dense, LowRank, Update

NEEDS_BASE_REASON = "it acts through the base weight"
MAX_NEUMANN_TERMS = 1000


def hira(module: AdaptedModule) -> Recipe:
    """W ∘ (B·A) (Huang et al. 2025), transposed for an embedding. Full rank."""
    shape = module.base_shape(NEEDS_BASE_REASON)
    stem = "hira_embedding_" if "hira_embedding_A" in module.headers else "hira_"
    parts = f"{stem}A", f"{stem}B"
    check_complete(module.headers, parts)
    check_floating(module.headers)
    if any(len(module.headers[part].shape) > 2 for part in parts):
        raise SkippedPartError("HiRA of a convolution is not read")
    (rank, _), embedding = matrix_sides(module, parts[0]), stem != "hira_"
    out, into = reversed(shape) if embedding else shape
    check_shapes(module.headers, **{parts[0]: (rank, into), parts[1]: (out, rank)})

    def build(tensors: Tensors) -> Update:
        A, B, W = to_float64(tensors[parts[0]]), to_float64(tensors[parts[1]]), to_float64(tensors[BASE_WEIGHT])
        product = B @ A
        return Dense(W * (product.T if embedding else product))

    return Recipe(UpdateInfo(shape, None, 1.0, module.stored_dtype(parts[0]), "hira"), (*parts, BASE_WEIGHT), build)


def ia3(module: AdaptedModule) -> Recipe:
    """Rows, or columns of a feed-forward layer, times l: diag(l − 1)·W (Liu et al. 2022). Biases scale along."""
    shape = module.base_shape(NEEDS_BASE_REASON)
    check_complete(module.headers, ("ia3_l",))
    check_floating(module.headers)
    stored = module.headers["ia3_l"].shape
    if len(stored) > 2 and (stored[1] != shape[0] or _is_feedforward(module)):
        raise SkippedPartError("(IA)³ on the inputs of a convolution is not read")
    vector = (shape[0], 1) if len(stored) > 2 else stored
    if vector not in ((shape[0], 1), (1, shape[1])):
        raise FormatError(
            f"ia3_l is {stored}, which fits no side of the weight {shape}; is this the base that was tuned?"
        )

    def build(tensors: Tensors) -> Update:
        return Dense(to_float64(tensors[BASE_WEIGHT]) * (to_float64(tensors["ia3_l"]).reshape(vector) - 1))

    return Recipe(UpdateInfo(shape, None, 1.0, module.stored_dtype("ia3_l"), "ia3"), ("ia3_l", BASE_WEIGHT), build)


def _is_feedforward(module: AdaptedModule) -> bool:
    names = module.config.feedforward_modules or ()
    if isinstance(names, str):
        return re.fullmatch(names, module.name) is not None
    return any(module.name.endswith(name) for name in names)


def hra(module: AdaptedModule) -> Recipe:
    """W·H − W, H a product of r reflections I − 2uuᵀ (Yuan et al. 2024): rank r, since H − I = Σ_k −2·h_k·u_kᵀ."""
    shape = module.base_shape(NEEDS_BASE_REASON)
    check_complete(module.headers, ("hra_u",))
    check_floating(module.headers)
    check_shapes(module.headers, hra_u=(shape[1], None))
    rank = module.headers["hra_u"].shape[1]

    def build(tensors: Tensors) -> Update:
        u, W = to_float64(tensors["hra_u"]), to_float64(tensors[BASE_WEIGHT])
        if module.config.apply_gs:
            h = u = torch.linalg.qr(u)[0]  # H = I − 2QQᵀ: orthogonalised, the reflections do not touch each other
        else:
            u = u / u.norm(dim=0)
            h = _reflection_columns(u)
        return LowRank(-2 * (W @ h), u.T)

    return Recipe(UpdateInfo(shape, rank, 1.0, module.stored_dtype("hra_u"), "hra"), ("hra_u", BASE_WEIGHT), build)


def _reflection_columns(u: Tensor) -> Tensor:
    """h_k = (I − 2u₁u₁ᵀ)…(I − 2u_{k−1}u_{k−1}ᵀ)·u_k, columns."""
    columns: list[Tensor] = []
    for k in range(u.shape[1]):
        column = u[:, k]
        if columns:
            column = column - 2 * torch.stack(columns, dim=1) @ (u[:, :k].T @ u[:, k])
        columns.append(column)
    return torch.stack(columns, dim=1)


def deft(module: AdaptedModule) -> Recipe:
    """Q·(s·R − Pᵀ·W): one part of W's output space is removed, and another added; rank r."""
    shape, config = module.base_shape(NEEDS_BASE_REASON), module.config
    parts = ("deft_P",) if config.para else ("deft_P", "deft_R")
    check_complete(module.headers, parts)
    check_floating(module.headers)
    check_shapes(module.headers, deft_P=(shape[0], None))
    rank = module.headers["deft_P"].shape[1]
    if not config.para:
        check_shapes(module.headers, deft_R=(rank, shape[1]))
    method = config.require("decomposition_method")
    if method not in ("relu", "qr"):
        raise SkippedPartError(f"DEFT with the decomposition_method {method!r} is not known")
    scale = config.alpha / rank if config.alpha else 1.0

    def build(tensors: Tensors) -> Update:
        P, W = to_float64(tensors["deft_P"]), to_float64(tensors[BASE_WEIGHT])
        left, right = (P, P.relu()) if method == "relu" else (torch.linalg.qr(P)[0],) * 2
        removed = right.T @ W
        return LowRank(left, -removed if config.para else to_float64(tensors["deft_R"]) * scale - removed)

    return Recipe(UpdateInfo(shape, rank, 1.0, module.stored_dtype("deft_P"), "deft"), (*parts, BASE_WEIGHT), build)


def glora(module: AdaptedModule) -> Recipe:
    """W ∘ A + B (Chavan et al. 2023), each a product, a column, a number or absent; C, D and E change the bias."""
    shape = module.base_shape(NEEDS_BASE_REASON)
    parts = tuple(part for part in module.headers if part.startswith(("glora_A.", "glora_B.")))
    check_floating({part: module.headers[part] for part in parts})
    for stem in ("glora_A", "glora_B"):
        down, up, single = f"{stem}.Xd", f"{stem}.Xu", f"{stem}.X"
        if down in parts or up in parts:
            check_complete(module.headers, (down, up))
            check_shapes(module.headers, **{down: (shape[0], None)})
            check_shapes(module.headers, **{up: (module.headers[down].shape[1], shape[1])})
        elif single in parts and module.headers[single].shape not in ((shape[0], 1), (1,)):
            raise FormatError(f"{single} is {module.headers[single].shape}, which does not fit the weight {shape}")
    if not parts:
        raise SkippedPartError("GLoRA of the bias alone")

    def build(tensors: Tensors) -> Update:
        A, B = (_glora_matrix(tensors, f"glora_{name}", shape) for name in "AB")
        return Dense(to_float64(tensors[BASE_WEIGHT]) * A + B)

    return Recipe(UpdateInfo(shape, None, 1.0, module.stored_dtype(parts[0]), "glora"), (*parts, BASE_WEIGHT), build)


def oft(module: AdaptedModule) -> Recipe:
    """W·Rᵀ − W, R block-diagonal: the Cayley transform of a skew matrix, or its Neumann series (Qiu et al. 2023)."""
    shape, config = module.base_shape(NEEDS_BASE_REASON), module.config
    check_complete(module.headers, ("oft_R",))
    check_floating(module.headers)
    check_shapes(module.headers, oft_R=(None, None))
    if config.coft:
        raise SkippedPartError("OFT with coft projects its blocks again when it is merged; not read")
    count, entries = module.headers["oft_R"].shape
    side = round((1 + (1 + 8 * entries) ** 0.5) / 2)
    blocks = shape[1] // side if config.block_share else count
    shared_by_all = bool(config.block_share) and count == 1
    if side * (side - 1) // 2 != entries or blocks * side != shape[1] or not (blocks == count or shared_by_all):
        raise FormatError(f"oft_R is {(count, entries)}, which does not fit the weight {shape}")
    terms = config.require("num_cayley_neumann_terms") if config.use_cayley_neumann else None
    if terms is not None and not 1 <= terms <= MAX_NEUMANN_TERMS:
        raise FormatError(f"num_cayley_neumann_terms is {terms}; a series has 1 to {MAX_NEUMANN_TERMS}")

    def build(tensors: Tensors) -> Update:
        R = _cayley(to_float64(tensors["oft_R"]), side, terms).expand(blocks, side, side)
        W = to_float64(tensors[BASE_WEIGHT])
        rotated = torch.einsum("onk,njk->onj", W.reshape(shape[0], blocks, side), R).reshape(shape)
        return Dense(rotated - W)

    return Recipe(UpdateInfo(shape, None, 1.0, module.stored_dtype("oft_R"), "oft"), ("oft_R", BASE_WEIGHT), build)


def _cayley(entries: Tensor, side: int, terms: int | None) -> Tensor:
    """(I − Q)(I + Q)⁻¹ of skew Q from the entries above the diagonal; with ``terms``, I + 2Q + … + 2Q^(n−2) + Q^(n−1).

    PEFT takes three terms for four, and does not halve the last of two.
    """
    rows, columns = torch.triu_indices(side, side, 1)
    Q = entries.new_zeros(len(entries), side, side)
    Q[:, rows, columns] = entries
    Q = Q - Q.transpose(1, 2)
    identity = torch.eye(side, dtype=Q.dtype)
    if terms is None:
        rotation: Tensor = torch.linalg.solve(identity + Q, identity - Q, left=False)
        return rotation
    R, power = identity.expand_as(Q), identity.expand_as(Q)
    last = terms - 1 if terms < 3 else max(terms - 1, 3)
    for n in range(1, last + 1):
        power = power @ Q
        R = R + power * (1.0 if n == last > 1 else 2.0)
    return R


def _glora_matrix(tensors: Tensors, name: str, shape: tuple[int, int]) -> Tensor:
    """One of GLoRA's matrices, or what broadcasts to it."""
    if f"{name}.Xd" in tensors:
        return to_float64(tensors[f"{name}.Xd"]) @ to_float64(tensors[f"{name}.Xu"])
    if f"{name}.X" in tensors:
        return to_float64(tensors[f"{name}.X"])
    return torch.zeros(shape, dtype=torch.float64)
