"""The Fastfood product against the matrix that it stands for, built by numpy from the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from makers import generator, normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankscope.train.fastfood import Fastfood, hadamard_transform

# D a multiple of d and not, d padded and not, one block cut short, d above D, a single direction, a single number.
SHAPES = [(96, 16), (100, 7), (37, 16), (5, 16), (64, 1), (1, 1), (200, 33), (16, 16)]


def dense(fastfood: Fastfood) -> np.ndarray:
    """P, each block H·diag(G)·Π·H·diag(B) multiplied out."""
    size, blocks = fastfood.size, fastfood.blocks
    H = scipy.linalg.hadamard(size)
    signs, gains = fastfood.signs.double().numpy(), fastfood.gains.double().numpy()
    rows, own = np.divmod(fastfood.order.view(size, blocks).numpy(), blocks)
    assert (own == np.arange(blocks)).all()  # no block takes another's numbers
    found = [H @ np.diag(gains[:, j]) @ np.eye(size)[rows[:, j]] @ H @ np.diag(signs[:, j]) for j in range(blocks)]
    return np.vstack(found)[: fastfood.rows, : fastfood.columns]


class Work(TorchDispatchMode):
    """Counts the numbers that sums and differences make, and the largest tensor that anything makes."""

    def __init__(self) -> None:
        super().__init__()
        self.summed, self.calls, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        if func in (torch.ops.aten.add.out, torch.ops.aten.sub.out):
            self.summed += sizes[0]
            self.calls += 1
        return out


@pytest.mark.parametrize("size", [1, 2, 4, 32, 256])
@pytest.mark.parametrize("columns", [1, 3])
def test_the_transform_is_that_of_scipy(size: int, columns: int) -> None:
    x = normal(size, columns)
    before = x.clone()
    np.testing.assert_allclose(
        hadamard_transform(x).numpy(), scipy.linalg.hadamard(size) @ x.numpy(), atol=1e-12 * size
    )
    assert torch.equal(x, before)


def test_the_transform_is_its_own_inverse_up_to_size() -> None:
    x = normal(64, 5)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), 64 * x)


@pytest.mark.parametrize("size", [0, 3, 12])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard_transform(torch.zeros(size, 2))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_product_is_that_of_the_matrix(rows: int, columns: int) -> None:
    fastfood = Fastfood(rows, columns, generator()).double()
    P = dense(fastfood)
    z, y = normal(columns, seed=1), normal(rows, seed=2)
    assert P.shape == (rows, columns)
    np.testing.assert_allclose(fastfood(z).numpy(), P @ z.numpy(), atol=1e-13)
    np.testing.assert_allclose(fastfood.transposed_product(y).numpy(), P.T @ y.numpy(), atol=1e-13)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_gradient_is_that_of_the_matrix(rows: int, columns: int) -> None:
    fastfood = Fastfood(rows, columns, generator()).double()
    z = normal(columns, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(fastfood, (z,))
    fastfood(z).square().sum().backward()
    P = dense(fastfood)
    np.testing.assert_allclose(z.grad.numpy(), 2 * P.T @ P @ z.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_direction_keeps_its_length_on_average(rows: int, columns: int) -> None:
    """E‖P·z‖² = ‖z‖² for any z: over 250 draws to within 4 standard errors."""
    z = normal(columns, seed=3, dtype=torch.float32)
    source = generator(4)
    ratios = [float(Fastfood(rows, columns, source)(z).square().sum() / z.square().sum()) for _ in range(250)]
    error = float(np.std(ratios)) / np.sqrt(len(ratios))
    assert abs(np.mean(ratios) - 1) < 4 * error
    assert error < 0.1


def test_directions_are_nearly_orthogonal_and_all_used() -> None:
    fastfood = Fastfood(2**14, 60, generator()).double()
    P = torch.stack([fastfood(e) for e in torch.eye(60, dtype=torch.float64)], dim=1)
    # Each inner product of two columns has standard deviation about 1/√D = 1/128.
    assert float((P.T @ P - torch.eye(60)).abs().max()) < 6 / 128
    assert int(torch.linalg.matrix_rank(P)) == 60


def test_numbers_of_the_product_have_one_variance() -> None:
    """P·z on all rows, those of the last cut block too: mean square ‖z‖²/D."""
    rows, columns = 70, 16
    z = normal(columns, seed=5, dtype=torch.float32)
    source = generator(6)
    squares = torch.stack([Fastfood(rows, columns, source)(z).square() for _ in range(1000)]).mean(dim=0)
    expected = float(z.square().sum()) / rows
    # A square of a number near Gaussian deviates by √2 or, with the spread of G, a little more.
    assert float((squares / expected - 1).abs().max()) < 5 * 2 / np.sqrt(1000)


def test_it_is_drawn_from_its_generator_alone() -> None:
    z = normal(16, dtype=torch.float32)
    first, again, other = (Fastfood(100, 16, generator(seed))(z) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert abs(float(torch.nn.functional.cosine_similarity(first, other, dim=0))) < 0.5


@pytest.mark.parametrize(("rows", "columns"), [(2**12, 2**4), (2**12, 2**8), (2**16, 2**8), (5000, 100)])
def test_a_product_costs_d_log_d_sums(rows: int, columns: int) -> None:
    """Two transforms of the padded rows, log2(size) passes each, a sum or a difference a number and pass."""
    fastfood, z = Fastfood(rows, columns, generator()), torch.zeros(columns)
    stages = int(np.log2(fastfood.size))
    padded = fastfood.size * fastfood.blocks
    assert padded < rows + fastfood.size
    for run in (lambda: fastfood.product(z), lambda: fastfood.transposed_product(torch.zeros(rows))):
        with Work() as work:
            run()
        assert work.calls == 2 * 2 * stages
        assert work.summed == 2 * padded * stages


def test_nothing_is_as_large_as_the_matrix() -> None:
    """4 million rows and 16 384 columns: the matrix would take 256 GiB."""
    rows, columns = 2**22, 2**14
    with Work() as work:
        fastfood = Fastfood(rows, columns, generator())
        z = torch.zeros(columns)
        z[5] = 2.0
        y = fastfood(z.requires_grad_())
        y.square().sum().backward()
    assert work.largest == rows
    assert sum(kept.numel() for kept in fastfood.buffers()) == 3 * rows
    assert float(y.detach().norm()) == pytest.approx(2.0, rel=0.02)
    assert float(z.grad[5]) == pytest.approx(2 * float(y.detach().square().sum()) / 2.0, rel=1e-3)
