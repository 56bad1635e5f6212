"""The contract that every kind of update keeps, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from makers import MAKERS, concrete_kinds, float64, normal

from rankscope import updates
from rankscope.errors import NonFiniteError, RankscopeError, ShapeError
from rankscope.linalg import ulp
from rankscope.structured import Hadamard, Kronecker
from rankscope.updates import Dense, LowRank, Update

SHAPES = [(12, 7), (7, 12), (9, 9), (1, 6), (6, 1)]


@pytest.fixture(params=[(name, shape) for name in MAKERS for shape in SHAPES], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Update, np.ndarray, float]:
    name, shape = request.param
    update = MAKERS[name].make(*shape, 3)
    M = float64(update)
    assert update.shape == M.shape == shape
    return update, M, MAKERS[name].exact * np.linalg.norm(M, 2)


def test_every_kind_of_update_has_a_maker() -> None:
    assert {maker.kind.__name__ for maker in MAKERS.values()} == concrete_kinds()


def test_dense_is_the_matrix_in_float32(case: tuple[Update, np.ndarray, float]) -> None:
    update, M, _ = case
    assert update.dense().dtype == torch.float32
    assert np.allclose(update.dense().numpy(), M, rtol=1e-6, atol=1e-6 * np.abs(M).max())


def test_svd(case: tuple[Update, np.ndarray, float]) -> None:
    update, M, atol = case
    U, s, Vt = (x.double().numpy() for x in update.svd())
    k = len(s)
    assert np.allclose((U * s) @ Vt, M, atol=10 * atol, rtol=0)
    assert np.allclose(U.T @ U, np.eye(k), atol=2e-6)
    assert np.allclose(Vt @ Vt.T, np.eye(k), atol=2e-6)
    assert np.allclose(s, np.linalg.svd(M, compute_uv=False)[:k], atol=atol, rtol=0)
    assert np.allclose(update.singular_values().double().numpy(), s, atol=atol, rtol=0)


def test_energy_and_norm(case: tuple[Update, np.ndarray, float]) -> None:
    update, M, _ = case
    # float64 sums: Dense's entries are read as they are, exact in float32.
    assert update.energy == pytest.approx((M**2).sum(), rel=1e-12)
    assert update.norm == pytest.approx(np.linalg.norm(M), rel=1e-12)


def test_products_in_the_working_precision(case: tuple[Update, np.ndarray, float]) -> None:
    update, M, _ = case
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = normal(M.shape[1], 2, seed=9, dtype=dtype)
        product = update @ x
        assert product.dtype == torch.float64
        assert np.allclose(product.numpy(), M @ x.double().numpy(), rtol=1e-12, atol=1e-12)


def test_transpose_negate_scale_move(case: tuple[Update, np.ndarray, float]) -> None:
    update, M, _ = case
    for made, expected in ((update.T, M.T), (-update, -M), (update * 2.5, 2.5 * M), (update.to("cpu"), M)):
        assert type(made) is type(update)
        assert made.shape == expected.shape
        assert np.allclose(made.dense().numpy(), expected, rtol=1e-6, atol=1e-6 * np.abs(M).max())
        assert made.device == torch.device("cpu")


@pytest.mark.parametrize("other", MAKERS)
def test_inner_of_every_two_kinds(case: tuple[Update, np.ndarray, float], other: str) -> None:
    update, M, _ = case
    partner = MAKERS[other].make(*M.shape, 20)
    expected = float((M * float64(partner)).sum())
    atol = 1e-12 * np.linalg.norm(M) * np.linalg.norm(float64(partner))
    assert update.inner(partner) == pytest.approx(expected, abs=atol)
    assert partner.inner(update) == pytest.approx(expected, abs=atol)


def test_the_sum_of_two_products() -> None:
    a, b = (MAKERS["low rank"].make(12, 7, seed) for seed in (1, 5))
    assert isinstance(a, LowRank)
    assert isinstance(b, LowRank)
    assert (a + b).nominal_rank == 6
    assert np.allclose((a + b).dense().numpy(), float64(a) + float64(b), atol=1e-5)


# Structured products


def thin(out: int, into: int, r: int, seed: int = 0, scale: float = 1.0) -> LowRank:
    return LowRank(normal(out, r, seed=seed), normal(r, into, seed=seed + 1), scale)


def test_a_kronecker_product_is_never_formed() -> None:
    """40 000 × 90 000 entries from factors of 200 × 300: everything but dense() works on those."""
    update = Kronecker(thin(200, 300, 2), thin(200, 300, 3, seed=2), -0.5)
    s1, s2 = (np.linalg.svd(float64(factor), compute_uv=False) for factor in (update.W1, update.W2))
    expected = np.sort(0.5 * np.outer(s1[:2], s2[:3]).ravel())[::-1]
    assert np.allclose(update.singular_values().numpy(), expected, rtol=1e-12)
    U, s, Vt = update.svd()
    assert (U.shape, Vt.shape) == ((40_000, 6), (6, 90_000))
    assert np.allclose((update @ Vt.T).numpy(), (U * s).numpy(), atol=1e-8 * expected[0])
    assert update.energy == pytest.approx((expected**2).sum(), rel=1e-12)
    assert update.product is not None
    assert update.product.nominal_rank == update.nominal_rank == 6
    assert update.inner(update) == pytest.approx(update.energy, rel=1e-12)
    assert update.inner(update.product) == pytest.approx(update.energy, rel=1e-10)


def test_a_hadamard_product_works_on_its_exact_factors() -> None:
    """60 000 × 50 000 entries: the Khatri–Rao factors have rank r₁·r₂ = 6."""
    update = Hadamard(thin(60_000, 50_000, 2), thin(60_000, 50_000, 3, seed=2, scale=0.1))
    assert update.nominal_rank == 6
    assert len(update.singular_values()) == 6
    rows, columns = [0, 7, 59_999], [3, 49_999]
    parts = [f.scale * f.B[rows] @ f.A[:, columns] for f in (update.first, update.second)]
    units = torch.zeros(50_000, 2, dtype=torch.float64)
    units[columns, [0, 1]] = 1.0
    found = update @ units
    assert np.allclose(found[rows].numpy(), (parts[0] * parts[1]).numpy(), rtol=1e-10)


@pytest.mark.parametrize(("r1", "r2", "formed"), [(2, 3, False), (3, 3, True), (1, 8, True)])
def test_a_hadamard_product_forms_its_matrix_only_where_factors_would_be_larger(
    r1: int, r2: int, formed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Hadamard(thin(9, 8, r1), thin(9, 8, r2, seed=5))
    M = float64(update)
    seen = []
    original = Hadamard.working_matrix.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Hadamard, "working_matrix", property(lambda self: seen.append(1) or original(self)))
    assert (update.product is None) == formed
    assert np.allclose(update.singular_values().numpy()[:3], np.linalg.svd(M, compute_uv=False)[:3], rtol=1e-5)
    assert update.energy == pytest.approx((M**2).sum(), rel=1e-12)
    assert np.allclose((update @ normal(8, 2)).numpy(), M @ normal(8, 2).numpy())
    assert bool(seen) == formed


@pytest.mark.parametrize(
    ("W1", "W2", "rank"),
    [
        (Dense(normal(2, 3)), Dense(normal(5, 4, seed=1)), 2 * 4),
        (Dense(normal(2, 3)), Dense(normal(4, 5, seed=1)), 2 * 4),
        (thin(4, 4, 1), Dense(normal(5, 3, seed=1)), 1 * 3),
        (Dense(normal(5, 3, seed=1)), thin(4, 4, 1), 3 * 1),
        (thin(4, 4, 2), thin(5, 5, 3), 6),
        (thin(2, 3, 40), thin(5, 4, 2), 2 * 2),
    ],
)
def test_the_nominal_rank_of_a_kronecker_product_is_what_it_can_have(W1: Update, W2: Update, rank: int) -> None:
    update = Kronecker(W1, W2)  # type: ignore[arg-type]
    assert update.nominal_rank == rank == np.linalg.matrix_rank(float64(update), tol=1e-5)
    assert len(update.singular_values()) == rank
    assert (update.product is None) == (rank >= min(update.shape))
    if update.product is not None:
        assert update.product.nominal_rank == rank
        assert np.allclose(float64(update.product), float64(update), atol=1e-6)


def test_inner_products_of_kronecker_products_cut_elsewhere() -> None:
    """(2 × 3) ⊗ (3 × 2) against (3 × 2) ⊗ (2 × 3): the same shape, other factors."""
    a = Kronecker(Dense(normal(2, 3)), Dense(normal(3, 2, seed=1)))
    b = Kronecker(Dense(normal(3, 2, seed=2)), Dense(normal(2, 3, seed=3)), 0.7)
    assert a.inner(b) == pytest.approx(float((float64(a) * float64(b)).sum()), rel=1e-12)


@pytest.mark.parametrize("other", [Dense(normal(12, 12)), Kronecker(Dense(normal(3, 4)), Dense(normal(4, 3)))], ids=str)
def test_an_inner_product_with_thin_factors_forms_no_matrix(other: Update, monkeypatch: pytest.MonkeyPatch) -> None:
    a = thin(12, 12, 2, seed=5)
    expected = float((float64(a) * float64(other)).sum())
    for kind in (LowRank, Kronecker):
        monkeypatch.setattr(kind, "working_matrix", property(lambda self: pytest.fail("a matrix was formed")))
    assert a.inner(other) == pytest.approx(expected, rel=1e-12)
    assert other.inner(a) == pytest.approx(expected, rel=1e-12)


def test_structured_updates_that_are_refused() -> None:
    with pytest.raises(ShapeError, match="entry by entry"):
        Hadamard(thin(4, 5, 2), thin(5, 4, 2))
    with pytest.raises(NonFiniteError, match="scale"):
        Kronecker(thin(4, 5, 2), thin(5, 4, 2), float("nan"))
    huge = thin(4, 5, 2, scale=1e100)
    with pytest.raises(NonFiniteError, match="too large to square"):
        Hadamard(huge, huge)
    with pytest.raises(NonFiniteError, match="too large to square"):
        Kronecker(huge, huge)
    with pytest.raises(NonFiniteError, match="too large to square"):
        Kronecker(Dense(torch.full((2, 2), 1e30)), thin(4, 5, 2), 1e120)


def test_scaling_a_stored_difference_scales_its_rounding() -> None:
    update = MAKERS["dense, stored in bfloat16"].make(8, 8, 0)
    assert isinstance(update, Dense)
    assert update.rounding > 0
    assert (update * -3.0).rounding == pytest.approx(3 * update.rounding)
    assert (update.T.rounding, update.T.stored) == (update.rounding, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_factors_and_matrices_of_any_stored_dtype(dtype: torch.dtype) -> None:
    B, A = normal(6, 2).to(dtype), normal(2, 5, seed=1).to(dtype)
    assert np.allclose(LowRank(B, A).dense().numpy(), B.double().numpy() @ A.double().numpy(), rtol=1e-6)
    assert np.array_equal(Dense(B).matrix.numpy(), B.float().numpy())


def test_views_need_not_be_contiguous() -> None:
    B, A = normal(4, 24)[:, ::2].T[:, :3], normal(10, 6).T[::2]
    update = LowRank(B, A, 2.0)
    assert not B.is_contiguous()
    s = np.linalg.svd(2 * B.numpy() @ A.numpy(), compute_uv=False)[:3]
    assert np.allclose(update.singular_values().numpy(), s, rtol=1e-12)
    assert np.allclose(Dense(normal(8, 10).T).singular_values().numpy(), np.linalg.svd(normal(8, 10).numpy())[1], 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_non_finite_weights_are_refused_with_a_count(bad: float, dtype: torch.dtype) -> None:
    spoiled = torch.ones(3, 4, dtype=dtype)
    spoiled[1, 2] = bad
    with pytest.raises(NonFiniteError, match="1 values"):
        Dense(spoiled)
    with pytest.raises(NonFiniteError, match=r"A \(3, 4\) holds 1"):
        LowRank(torch.ones(5, 3), spoiled)
    with pytest.raises(NonFiniteError, match=r"B \(3, 4\) holds 1"):
        LowRank(spoiled, torch.ones(4, 2))
    with pytest.raises(NonFiniteError, match="scale"):
        LowRank(torch.ones(3, 1), torch.ones(1, 3), bad)


def test_overflow_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="too large"):
        LowRank(torch.ones(3, 1), torch.ones(1, 3), 1e200)
    with pytest.raises(NonFiniteError, match="float32"):
        Dense(torch.full((2, 2), 1e60, dtype=torch.float64))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowRank(torch.ones(3, 2), torch.ones(3, 4)),
        lambda: LowRank(torch.ones(3), torch.ones(3, 4)),
        lambda: LowRank(torch.ones(3, 0), torch.ones(0, 4)),
        lambda: LowRank(torch.ones(0, 2), torch.ones(2, 4)),
        lambda: Dense(torch.ones(0, 4)),
        lambda: Dense(torch.ones(2, 3, 4)),
        lambda: Dense.difference(torch.ones(2, 3), torch.ones(3, 2)),
        lambda: Dense(torch.ones(2, 3)).inner(Dense(torch.ones(3, 2))),
        lambda: LowRank(torch.ones(2, 1), torch.ones(1, 3)).inner(Dense(torch.ones(3, 2))),
        lambda: LowRank(torch.ones(2, 1), torch.ones(1, 3)) + LowRank(torch.ones(3, 1), torch.ones(1, 2)),
    ],
)
def test_shapes_that_do_not_fit(make: object) -> None:
    with pytest.raises(ShapeError) as caught:
        make()  # type: ignore[operator]
    assert isinstance(caught.value, RankscopeError)


def test_difference_subtracts_after_the_cast() -> None:
    base, tuned = torch.tensor([[1.0078125, 1.0]]).bfloat16(), torch.tensor([[256.0, 1.0078125]]).bfloat16()
    # The first is no number of bfloat16: subtracted before the cast it would be 255.
    assert Dense.difference(tuned, base).matrix.tolist() == [[254.9921875, 0.0078125]]
    base = torch.tensor([[256.0, 1.0]]).bfloat16()
    # A coarse base under a fine tuned weight: subtracting in bfloat16 would lose the change altogether.
    fine = Dense.difference(torch.tensor([[256.01, 1.0]]), base)
    assert fine.matrix[0, 0] == pytest.approx(0.01, rel=2e-3)
    assert fine.rounding == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_rounding_of_real_storage(dtype: torch.dtype) -> None:
    """The estimate against the error measured where the unrounded weight is known."""
    base = normal(300, 200, dtype=torch.float64) * 0.02
    tuned = base + normal(300, 200, seed=1) * 0.002
    stored = Dense.difference(tuned.to(dtype), base.to(dtype))
    measured = float((tuned - tuned.to(dtype).double()).square().mean().sqrt())
    # Rounding errors are uniform within a unit in the last place but for the largest numbers: 1 % at this size.
    assert stored.rounding == pytest.approx(measured, rel=0.02)


def test_float32_storage_leaves_no_floor() -> None:
    assert Dense.difference(normal(4, 4).float(), normal(4, 4, seed=1).bfloat16()).rounding == 0


def test_zero_weights_have_no_coarse_rounding() -> None:
    """A pruned weight is exact: only the smallest subnormal is in doubt."""
    update = Dense.difference(torch.zeros(4, 4).bfloat16(), torch.zeros(4, 4).bfloat16())
    assert update.rounding < 1e-40
    assert float(ulp(torch.zeros(1).half(), torch.float16)) == 2.0**-24


@pytest.mark.parametrize("delta", [1e-9, 1e-10, 1e-11])
def test_energy_of_factors_that_cancel(delta: float) -> None:
    """b·aᵀ − b·(a + δ)ᵀ = −b·δᵀ: of the size of δ, though both terms are of size 1."""
    b, a, d = (torch.linspace(x, 1, 40, dtype=torch.float64) for x in (0.5, 0.2, -1.0))
    update = LowRank(torch.stack((b, -b), dim=1), torch.stack((a, a + delta * d)))
    expected = delta * float(b.norm() * d.norm())
    # what is left of δ after a + δ has been rounded
    assert update.norm == pytest.approx(expected, rel=1e-15 / delta)


def test_what_was_found_once_is_not_found_again_unless_a_factor_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    triangle = updates.triangular_factor
    monkeypatch.setattr(updates, "triangular_factor", lambda *given: found.append(1) or triangle(*given))
    update = LowRank(normal(40, 5), normal(5, 30, seed=1), 2.0)
    first, terms = update.singular_values(), update.terms
    assert len(found) == 2
    assert terms.numpy() == pytest.approx(2 * np.linalg.norm(update.B, axis=0) * np.linalg.norm(update.A, axis=1))
    update.B.mul_(3.0)  # as an optimizer does
    assert torch.allclose(update.singular_values(), 3 * first)
    assert len(found) == 4
    update.svd()
    update.A.mul_(2.0)
    assert torch.allclose(update.singular_values(), 6 * first)


def test_squares_found_together_serve_each_its_own() -> None:
    made = [LowRank(normal(50, 20, seed=s), normal(20, 40, seed=s + 9), 0.5) for s in range(3)]
    made.append(LowRank(normal(60, 20), normal(20, 40, seed=5)))
    expected = [update.singular_values() for update in made]
    again = [update * 1.0 for update in made]
    updates.cache_gram_matrices([*again, Dense(normal(4, 3))])
    for update, values in zip(again, expected, strict=True):
        left, right = update._recall("squares") or (None, None)
        assert left is not None
        assert right is not None
        assert torch.allclose(left, update.B.T @ update.B)
        assert torch.allclose(right, update.A @ update.A.T)
        assert torch.allclose(update.singular_values(), values, rtol=1e-12)
        assert torch.allclose(update.svd().s, values, rtol=1e-12)
    again[0].B.mul_(2.0)
    assert again[0]._recall("squares") is None
