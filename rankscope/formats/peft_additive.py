"""Methods of PEFT whose update is made of what the file holds; some need the base for its shape.

Each function takes one module's headers and gives the recipe of its update; formulas are those of ``get_delta_weight``
in PEFT 0.21.2's tuners.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rankscope.errors import FormatError
from rankscope.formats.abstract_store import UpdateInfo
from rankscope.formats.lycoris import LOKR, build_matrix, loha_rank, loha_recipe, lokr_rank, lokr_recipe, lora_scale
from rankscope.formats.recipes import (
    BASE_WEIGHT,
    UNKNOWN_SHAPE_REASON,
    WRONG_BASE_HINT,
    AdaptedModule,
    Recipe,
    SkippedPartError,
    Tensors,
    check_base_shape,
    check_complete,
    check_floating,
    check_indices,
    check_shapes,
    matrix_sides,
    to_float64,
    upcast_float8,
)
from rankscope.updates import Dense, LowRank, Update


def adalora(module: AdaptedModule) -> Recipe:
    """B·diag(E)·A·α/(init_r + 10⁻⁵) (Zhang et al. 2023): the scale keeps the rank from before the pruning."""
    headers, config = module.headers, module.config
    check_complete(headers, ("lora_A", "lora_B", "lora_E"))
    rank, _ = matrix_sides(module, "lora_E")
    check_shapes(headers, lora_E=(rank, 1), lora_A=(rank, None), lora_B=(None, rank))
    if rank == 0:
        raise SkippedPartError("AdaLoRA pruned it to rank 0: its update is zero")
    check_floating(headers)
    shape = headers["lora_B"].shape[0], headers["lora_A"].shape[1]
    alpha = config.require("lora_alpha")
    scale = (alpha if alpha > 0 else rank) / ((config.init_r or rank) + 1e-5)

    def build(tensors: Tensors) -> Update:
        return LowRank(tensors["lora_B"], to_float64(tensors["lora_A"]) * to_float64(tensors["lora_E"]), scale)

    check_base_shape(module, shape)
    return Recipe(UpdateInfo(shape, rank, scale, module.stored_dtype("lora_A"), "adalora"), tuple(headers), build)


def loha(module: AdaptedModule) -> Recipe:
    """α/r · (w1_a·w1_b) ∘ (w2_a·w2_b); r is that of the tensors."""
    alpha = module.config.alpha_of(module.name)
    recipe = loha_recipe(module.headers, lora_scale(alpha, loha_rank(module.headers)))
    check_base_shape(module, recipe.info.shape)
    return recipe


def lokr(module: AdaptedModule) -> Recipe:
    """α/r · w1 ⊗ w2; r is the configuration's where both are whole (LyCORIS has scale 1 there, PEFT has not)."""
    headers, config = module.headers, module.config
    rank = lokr_rank(headers) or config.rank_of(module.name)
    recipe = lokr_recipe(headers, config.alpha_of(module.name) / rank)
    check_base_shape(module, recipe.info.shape)
    if "lokr_w2" in headers and len(headers["lokr_w2"].shape) == 3:
        return _lokr_of_conv1d(recipe)
    return recipe


def _lokr_of_conv1d(recipe: Recipe) -> Recipe:
    """PEFT's product with a whole kernel (c, d, k) of a Conv1d: not w1 ⊗ w2, since torch.kron aligns last dimensions.

    Its layers compute with the entries in this order, so this is what was trained.
    """

    def build(tensors: Tensors) -> Update:
        w1, w2 = build_matrix(LOKR[0], tensors).working_matrix, to_float64(tensors["lokr_w2"])
        return Dense(torch.kron(w1, w2).reshape(recipe.info.shape) * recipe.info.scale)

    return recipe._replace(info=replace(recipe.info, nominal_rank=None), build=build)


def delora(module: AdaptedModule) -> Recipe:
    """λ/r · B·diag(1/(‖b_i‖‖a_i‖))·A·diag(‖w_j‖) (Bini et al. 2025); the norms of the base's columns are saved."""
    parts = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
    check_complete(module.headers, parts)
    check_floating(module.headers)
    rank, into = matrix_sides(module, "delora_A")
    check_shapes(module.headers, delora_B=(None, rank), delora_lambda=(1,), delora_w_norm=(into,))
    shape = module.headers["delora_B"].shape[0], into
    check_base_shape(module, shape)

    def build(tensors: Tensors) -> Update:
        A, B, strength, norms = (to_float64(tensors[part]) for part in parts)
        lengths = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
        return LowRank(B * (strength / rank / lengths), A * norms)

    return Recipe(UpdateInfo(shape, rank, 1.0, module.stored_dtype("delora_A"), "delora"), parts, build)


def gralora(module: AdaptedModule) -> Recipe:
    """k × k blocks of rank r/k each (Jung et al. 2025), so k·r in all; with hybrid_r, a plain part of that rank too.

    Block (j, n) maps inputs n to outputs j: A[n][:, j-th r/k columns] · B[j][n-th r/k rows].
    """
    headers = module.headers
    parts = ["gralora_A", "gralora_B"]
    check_complete(headers, parts)
    hybrid = 0
    if "gralora_A_general" in headers or "gralora_B_general" in headers:
        check_complete(headers, ("gralora_A_general", "gralora_B_general"))
        parts += ["gralora_A_general", "gralora_B_general"]
        hybrid, _ = matrix_sides(module, "gralora_A_general")
    check_floating(headers)
    if len(headers["gralora_A"].shape) != 3:
        raise FormatError(f"gralora_A is {headers['gralora_A'].shape}; expected (k, in/k, r)")
    k, into, rank = headers["gralora_A"].shape
    check_shapes(headers, gralora_B=(k, rank, None))
    shape = headers["gralora_B"].shape[2] * k, into * k
    if hybrid:
        check_shapes(headers, gralora_A_general=(hybrid, shape[1]), gralora_B_general=(shape[0], hybrid))
    if rank % k:
        raise FormatError(f"gralora_A has rank {rank}, which its {k} blocks do not divide")
    check_base_shape(module, shape)
    scale = module.config.require("alpha") / (rank + hybrid)

    def build(tensors: Tensors) -> Update:
        A, B = to_float64(tensors["gralora_A"]), to_float64(tensors["gralora_B"])
        right = A.new_zeros(k, k, rank // k, k, into)  # output block, input block, its rank, inputs
        right.diagonal(dim1=1, dim2=3).copy_(A.reshape(k, into, k, rank // k).permute(2, 3, 1, 0))
        left = B.new_zeros(k, B.shape[2], k, rank)
        left.diagonal(dim1=0, dim2=2).copy_(B.permute(2, 1, 0))
        left, right = left.reshape(shape[0], k * rank), right.reshape(k * rank, shape[1])
        if hybrid:
            left = torch.cat((left, to_float64(tensors["gralora_B_general"])), dim=1)
            right = torch.cat((right, to_float64(tensors["gralora_A_general"])))
        return LowRank(left, right, scale)

    info = UpdateInfo(shape, k * rank + hybrid, scale, module.stored_dtype("gralora_A"), "gralora")
    return Recipe(info, tuple(parts), build)


def c3a(module: AdaptedModule) -> Recipe:
    """Circulant blocks (Chen et al. 2025): entry (j, t) of a block is w[(t − j) mod b]/in. Full rank."""
    check_complete(module.headers, ("c3a_kernel",))
    check_floating(module.headers)
    if len(module.headers["c3a_kernel"].shape) != 3:
        raise FormatError(f"c3a_kernel is {module.headers['c3a_kernel'].shape}; expected (out/b, in/b, b)")
    m, n, b = module.headers["c3a_kernel"].shape
    shape = m * b, n * b
    check_base_shape(module, shape)

    def build(tensors: Tensors) -> Update:
        j, t = torch.arange(b)[:, None], torch.arange(b)
        blocks = tensors["c3a_kernel"][:, :, (t - j) % b]  # (m, n, j, t)
        return Dense(to_float64(blocks).transpose(1, 2).reshape(shape) / shape[1])

    return Recipe(UpdateInfo(shape, None, 1.0, module.stored_dtype("c3a_kernel"), "c3a"), ("c3a_kernel",), build)


def miss(module: AdaptedModule) -> Recipe:
    """One block (r, out) added to every r columns (Kang & Yin 2024): rank r. "mini" repeats a narrower block."""
    if module.config.init_weights == "bat":
        return _bat(module)
    shape = module.base_shape(UNKNOWN_SHAPE_REASON)
    check_complete(module.headers, ("miss_block",))
    check_floating(module.headers)
    rank, width = matrix_sides(module, "miss_block")
    if width != shape[0] and (module.config.init_weights != "mini" or shape[0] % width):
        raise FormatError(f"miss_block is ({rank}, {width}), the weight {shape}; {WRONG_BASE_HINT}")

    def build(tensors: Tensors) -> Update:
        block = upcast_float8(tensors["miss_block"]).repeat(1, shape[0] // width)
        places = torch.arange(shape[1]) % rank
        return LowRank(block.T, (places == torch.arange(rank)[:, None]).to(block.dtype))

    return Recipe(UpdateInfo(shape, rank, 1.0, module.stored_dtype("miss_block"), "miss"), ("miss_block",), build)


def _bat(module: AdaptedModule) -> Recipe:
    """MiSS with init_weights "bat": W·M + M in blocks r × r, M (out/r, r, r), which needs the base weight itself."""
    out, into = module.base_shape("MiSS with init_weights bat acts through the base weight")
    check_complete(module.headers, ("miss_block",))
    check_floating(module.headers)
    rank = module.headers["miss_block"].shape[-1] if module.headers["miss_block"].shape else 0
    if not rank or out % rank or into % rank:
        raise FormatError(
            f"blocks of {rank} do not divide the weight ({out}, {into}); is this the base that was tuned?"
        )
    check_shapes(module.headers, miss_block=(out // rank, rank, rank))

    def build(tensors: Tensors) -> Update:
        M, W = to_float64(tensors["miss_block"]), to_float64(tensors[BASE_WEIGHT])
        blocks = W.reshape(out // rank, rank, into // rank, rank).permute(2, 0, 1, 3)  # in/r, out/r, r, r
        return Dense((blocks @ M + M).permute(1, 2, 0, 3).reshape(out, into))

    return Recipe(
        UpdateInfo((out, into), None, 1.0, module.stored_dtype("miss_block"), "miss"),
        ("miss_block", BASE_WEIGHT),
        build,
    )


def fourierft(module: AdaptedModule) -> Recipe:
    """Real part of the inverse FFT of a few entries at places drawn with a seed (Gao et al. 2024)."""
    shape, config = module.base_shape(UNKNOWN_SHAPE_REASON), module.config
    check_complete(module.headers, ("fourierft_spectrum",))
    check_floating(module.headers)
    check_shapes(module.headers, fourierft_spectrum=(None,))
    scale, seed = config.require("scaling"), config.require("random_loc_seed")
    if not -(2**63) <= seed < 2**63:
        raise FormatError(f"random_loc_seed is {seed}, which no generator takes")
    (count,) = module.headers["fourierft_spectrum"].shape
    if count > shape[0] * shape[1]:
        raise FormatError(f"fourierft_spectrum has {count} entries, the weight {shape} only {shape[0] * shape[1]}")

    def build(tensors: Tensors) -> Update:
        places = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:count]
        spectrum = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
        spectrum[places] = to_float64(tensors["fourierft_spectrum"])
        return Dense(torch.fft.ifft2(spectrum.reshape(shape)).real * scale)

    info = UpdateInfo(shape, None, scale, module.stored_dtype("fourierft_spectrum"), "fourierft")
    return Recipe(info, ("fourierft_spectrum",), build)


def shira(module: AdaptedModule) -> Recipe:
    """Single entries, with their places saved (Bhardwaj et al. 2024)."""
    shape = module.base_shape(UNKNOWN_SHAPE_REASON)
    parts = "shira_weight", "shira_indices"
    check_complete(module.headers, parts)
    check_floating({"shira_weight": module.headers["shira_weight"]})
    check_indices(module.headers, "shira_indices")
    check_shapes(module.headers, shira_weight=(None,))
    check_shapes(module.headers, shira_indices=(2, module.headers["shira_weight"].shape[0]))

    def build(tensors: Tensors) -> Update:
        rows, columns = tensors["shira_indices"].long()
        if (
            min(int(rows.min()), int(columns.min())) < 0
            or int(rows.max()) >= shape[0]
            or int(columns.max()) >= shape[1]
        ):
            raise FormatError(f"shira_indices point outside of the weight {shape}; {WRONG_BASE_HINT}")
        entries = to_float64(tensors["shira_weight"])
        return Dense(torch.zeros(shape, dtype=torch.float64).index_put((rows, columns), entries, accumulate=True))

    return Recipe(UpdateInfo(shape, None, 1.0, module.stored_dtype("shira_weight"), "shira"), parts, build)
