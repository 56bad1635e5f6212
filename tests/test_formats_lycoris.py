"""LyCORIS's factor layouts, against formulas written out entry by entry and against LyCORIS's own layers."""

from __future__ import annotations

import importlib
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapters import normal
from torch import Tensor, nn

from rankscope.errors import FormatError, NonFiniteError
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.lycoris import (
    LEAF_NAMES,
    UNSUPPORTED_LEAVES,
    lycoris_dora_update,
    lycoris_recipe,
)
from rankscope.formats.recipes import Recipe
from rankscope.structured import Hadamard, Kronecker
from rankscope.updates import Dense, LowRank, Update

OUT, IN, R = 6, 4, 2
KERNELS = {"linear": (), "1 × 1": (1, 1), "3": (3,), "3 × 2": (3, 2), "2 × 2 × 3": (2, 2, 3)}


def pair(prefix: tuple[str, str], out: int, into: int, r: int, kernel: tuple[int, ...], seed: int, upright: bool):
    """Factors in the layout without a core; LoCon keeps the kernel's dimensions, the others flatten it."""
    if upright:
        ones = (1,) * len(kernel)
        return {prefix[0]: normal(out, r, *ones, seed=seed), prefix[1]: normal(r, into, *kernel, seed=seed + 1)}
    return {prefix[0]: normal(out, r, seed=seed), prefix[1]: normal(r, into * math.prod(kernel), seed=seed + 1)}


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    return a.double().flatten(1) @ b.double().flatten(1)


def with_core(a: Tensor, core: Tensor, b: Tensor) -> Tensor:
    """W[o, i, …] = Σ_mn core[m, n, …]·a[m, o]·b[n, i], loop by loop."""
    W = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:], dtype=torch.float64)
    for m in range(core.shape[0]):
        for n in range(core.shape[1]):
            outer = torch.outer(a[m].double(), b[n].double())
            W += outer.reshape(*outer.shape, *(1,) * (core.ndim - 2)) * core[m, n].double()
    return W.flatten(1)


def make_recipe(tensors: dict[str, Tensor], alpha: float | None) -> Recipe:
    return lycoris_recipe({name: TensorInfo.of(tensor) for name, tensor in tensors.items()}, alpha)


def build_update(tensors: dict[str, Tensor], alpha: float | None) -> Update:
    return make_recipe(tensors, alpha).build(tensors)


def check(update: Update, truth: Tensor, kind: type[Update], tensors: dict[str, Tensor], alpha: float | None) -> None:
    assert isinstance(update, kind)
    assert update.shape == tuple(truth.shape)
    np.testing.assert_allclose(update.dense().numpy(), truth.numpy(), rtol=0, atol=1e-6 * float(truth.abs().max()))
    info = make_recipe(tensors, alpha).info
    assert (info.shape, info.nominal_rank) == (update.shape, update.nominal_rank)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
@pytest.mark.parametrize(("alpha", "scale"), [(3.0, 1.5), (None, 1.0)])
def test_locon(kernel, alpha, scale):
    tensors = pair(("lora_up.weight", "lora_down.weight"), OUT, IN, R, kernel, 1, upright=True)
    truth = scale * multiplied(*tensors.values())
    check(build_update(tensors, alpha), truth, LowRank, tensors, alpha)


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 2, 3)], ids=str)
def test_locon_with_a_core(kernel):
    ones = (1,) * len(kernel)
    tensors = {
        "lora_up.weight": normal(OUT, R, *ones),
        "lora_down.weight": normal(R, IN, *ones, seed=1),
        "lora_mid.weight": normal(R, R, *kernel, seed=2),
    }
    up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"].flatten(1)
    truth = 1.5 * with_core(up.T, tensors["lora_mid.weight"], down)
    check(build_update(tensors, 3.0), truth, LowRank, tensors, 3.0)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_loha(kernel):
    first = pair(("hada_w1_a", "hada_w1_b"), OUT, IN, R, kernel, 1, upright=False)
    second = pair(("hada_w2_a", "hada_w2_b"), OUT, IN, R, kernel, 3, upright=False)
    truth = 1.5 * multiplied(*first.values()) * multiplied(*second.values())
    tensors = first | second
    check(build_update(tensors, 3.0), truth, Hadamard, tensors, 3.0)
    check(build_update(tensors, None), truth / 1.5, Hadamard, tensors, None)


def test_loha_with_cores():
    tensors = {}
    for i in (1, 2):
        tensors[f"hada_w{i}_a"] = normal(R, OUT, seed=3 * i)
        tensors[f"hada_w{i}_b"] = normal(R, IN, seed=3 * i + 1)
        tensors[f"hada_t{i}"] = normal(R, R, 3, 2, seed=3 * i + 2)
    one, two = (with_core(tensors[f"hada_w{i}_a"], tensors[f"hada_t{i}"], tensors[f"hada_w{i}_b"]) for i in (1, 2))
    check(build_update(tensors, 5.0), 2.5 * one * two, Hadamard, tensors, 5.0)


LOKR_W1 = {
    "whole": {"lokr_w1": normal(2, 3)},
    "factored": {"lokr_w1_a": normal(2, R, seed=1), "lokr_w1_b": normal(R, 3, seed=2)},
}
LOKR_W2 = {
    "whole": {"lokr_w2": normal(5, 4, seed=3)},
    "whole kernel": {"lokr_w2": normal(5, 4, 3, 2, seed=3)},
    "factored": {"lokr_w2_a": normal(5, R, seed=4), "lokr_w2_b": normal(R, 4, seed=5)},
    "factored, flat kernel": {"lokr_w2_a": normal(5, R, seed=4), "lokr_w2_b": normal(R, 4 * 6, seed=5)},
    "factored, kernel": {"lokr_w2_a": normal(5, R, seed=4), "lokr_w2_b": normal(R, 4, 3, 2, seed=5)},
    "core": {
        "lokr_w2_a": normal(R, 5, seed=4),
        "lokr_w2_b": normal(R, 4, seed=5),
        "lokr_t2": normal(R, R, 3, 2, seed=6),
    },
}


@pytest.mark.parametrize("first", LOKR_W1)
@pytest.mark.parametrize("second", LOKR_W2)
def test_lokr(first, second):
    one, two = LOKR_W1[first], LOKR_W2[second]
    w1 = one["lokr_w1"].double() if first == "whole" else multiplied(*one.values())
    if second.startswith("whole"):
        w2 = two["lokr_w2"].double()
    elif second == "core":
        w2 = with_core(two["lokr_w2_a"], two["lokr_t2"], two["lokr_w2_b"])
    else:
        w2 = multiplied(*two.values())
    scale = 1.0 if first == "whole" and second.startswith("whole") else 3.0 / R
    # Entry by entry, as a convolution: (out₁·out₂, in₁·in₂, kernel).
    truth = torch.einsum("ab,cdk->acbdk", w1, w2.reshape(5, 4, -1)).reshape(10, -1) * scale
    check(build_update(one | two, 3.0), truth, Kronecker, one | two, 3.0)


def test_the_rank_of_a_lokr_with_a_core_is_the_cores():
    """w2_a lies on its side there: its second dimension is outputs, which LyCORIS's own reader takes for the rank."""
    tensors = LOKR_W1["whole"] | LOKR_W2["core"]
    assert make_recipe(tensors, 8.0).info.scale == 8.0 / R


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_differences(dtype):
    diff = normal(5, 4, 3).to(dtype)
    update = build_update({"diff": diff}, None)
    assert isinstance(update, Dense)
    assert torch.equal(update.dense(), diff.float().flatten(1))
    assert (update.rounding > 0) == (dtype == torch.bfloat16)
    assert update.stored == dtype
    assert update.nominal_rank is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_factors_of_any_float_type(dtype):
    tensors = {name: value.to(dtype) for name, value in (LOKR_W1["factored"] | LOKR_W2["factored"]).items()}
    w1, w2 = (multiplied(tensors[f"lokr_w{i}_a"], tensors[f"lokr_w{i}_b"]) for i in (1, 2))
    check(build_update(tensors, 2.0), torch.kron(w1, w2), Kronecker, tensors, 2.0)


@pytest.mark.parametrize("on_out", [True, False])
def test_the_whole_update_of_a_rescaled_module(on_out):
    tensors = pair(("lora_up.weight", "lora_down.weight"), OUT, IN, R, (3, 2), 1, upright=True)
    update, W = build_update(tensors, 3.0), normal(OUT, IN, 3, 2, seed=8)
    m = normal(OUT, 1, 1, 1, seed=9).abs() if on_out else normal(1, IN, 1, 1, seed=9).abs()
    moved = W.double() + update.dense().double().reshape(W.shape)
    axes = (1, 2, 3) if on_out else (0, 2, 3)
    truth = m.double() * moved / moved.square().sum(dim=axes, keepdim=True).sqrt() - W.double()
    whole = lycoris_dora_update(update, m, W.flatten(1))
    np.testing.assert_allclose(whole.dense().numpy(), truth.flatten(1).numpy(), atol=2e-6)
    with pytest.raises(FormatError, match="fits no side"):
        lycoris_dora_update(update, normal(1, 7, 1, 1), W.flatten(1))
    with pytest.raises(FormatError, match="fits no side"):
        lycoris_dora_update(update, normal(5), W.flatten(1))
    with pytest.raises(NonFiniteError, match="dora_scale"):
        lycoris_dora_update(update, m * math.inf, W.flatten(1))
    with_scale = tensors | {"dora_scale": m, "alpha": torch.tensor(3.0)}
    assert torch.equal(build_update(with_scale, 3.0).dense(), update.dense())


BAD = {
    "half is missing": ({"lora_up.weight": normal(6, 2)}, "half of the factors is missing: lora_down.weight"),
    "half of the second": (LOKR_W1["whole"] | {"lokr_w2_a": normal(5, 2)}, "missing: lokr_w2_b"),
    "a factor is missing": (LOKR_W1["whole"], "missing: lokr_w2_a, lokr_w2_b"),
    "one of LoHa's": ({"hada_w1_a": normal(6, 2), "hada_w1_b": normal(2, 4)}, "missing: hada_w2_a"),
    "do not multiply": ({"lora_up.weight": normal(6, 3), "lora_down.weight": normal(2, 4)}, "do not multiply"),
    "a vector": ({"lora_up.weight": normal(6), "lora_down.weight": normal(2, 4)}, "do not multiply"),
    "no shape": ({"lora_up.weight": normal(), "lora_down.weight": normal()}, "do not multiply"),
    "a kernel in up": ({"lora_up.weight": normal(6, 2, 3, 3), "lora_down.weight": normal(2, 4, 3, 3)}, "multiply"),
    "a core of another r": (
        {"lora_up.weight": normal(6, 2), "lora_down.weight": normal(2, 4), "lora_mid.weight": normal(3, 2, 3, 3)},
        "do not multiply",
    ),
    "both whole and factored": (LOKR_W1["whole"] | LOKR_W1["factored"] | LOKR_W2["whole"], "which are meant"),
    "different shapes": (
        {f"hada_w{i}_{side}": normal(*shape) for i in (1, 2) for side, shape in (("a", (6, 2)), ("b", (2, 3 + i)))},
        r"\(6, 4\) and \(6, 5\)",
    ),
    "empty": ({"lora_up.weight": normal(6, 0), "lora_down.weight": normal(0, 4)}, "empty side"),
    "integers": ({"diff": torch.ones(3, 3, dtype=torch.int8)}, "int8; factors are floating-point"),
    "one-dimensional": ({"diff": normal(5)}, "one-dimensional"),
    "two methods": (LOKR_W1["whole"] | LOKR_W2["whole"] | {"diff": normal(3, 3)}, "of another method"),
    "unknown": ({"lora_left.weight": normal(3, 3)}, "not a tensor that LyCORIS"),
    "nothing": ({"alpha": torch.tensor(1.0)}, "holds no factors"),
    **{name: ({name: normal(3, 3)}, re.escape(reason[:12])) for name, reason in UNSUPPORTED_LEAVES.items()},
}


@pytest.mark.parametrize("name", BAD)
def test_groups_that_are_refused_in_one_sentence(name):
    tensors, message = BAD[name]
    with pytest.raises(FormatError, match=message) as caught:
        build_update(tensors, 1.0)
    assert "\n" not in str(caught.value)


def test_non_finite_factors():
    tensors = pair(("lora_up.weight", "lora_down.weight"), OUT, IN, R, (), 1, upright=True)
    with pytest.raises(NonFiniteError):
        build_update(tensors | {"lora_up.weight": torch.full((OUT, R), math.nan)}, 1.0)
    with pytest.raises(NonFiniteError, match="scale"):
        build_update(tensors, math.inf)


def test_every_leaf_is_known_once():
    assert len(set(LEAF_NAMES)) == len(LEAF_NAMES)
    assert {"alpha", "dora_scale", "hada_t2", "lokr_t2", "diff", "lora_mid.weight"} <= set(LEAF_NAMES)


# LyCORIS itself (PyPI lycoris-lora). What its layers compute is the truth: its get_merged_weight multiplies a LoHa and
# a LoKr by the scale twice (4.1.3).

LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (5, 12)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 7, 7)),
    "1 × 1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 3)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3), (1, 4, 5, 5, 5)),
}
OPTIONS = [
    ("locon.LoConModule", {}),
    ("locon.LoConModule", {"use_tucker": True}),
    ("locon.LoConModule", {"rs_lora": True}),
    ("locon.LoConModule", {"use_scalar": True}),
    ("locon.LoConModule", {"weight_decompose": True}),
    ("locon.LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    ("loha.LohaModule", {}),
    ("loha.LohaModule", {"use_tucker": True}),
    ("loha.LohaModule", {"rs_lora": True}),
    ("loha.LohaModule", {"weight_decompose": True}),
    ("lokr.LokrModule", {"lora_dim": 1}),
    ("lokr.LokrModule", {"lora_dim": 1, "use_tucker": True}),
    ("lokr.LokrModule", {"lora_dim": 1, "factor": 4, "decompose_both": True}),
    ("lokr.LokrModule", {"lora_dim": 1, "unbalanced_factorization": True}),
    ("lokr.LokrModule", {"lora_dim": 8}),
    ("lokr.LokrModule", {"full_matrix": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_against_the_layers_of_lycoris(kind, options, layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever importing a third-party package warns of
        pytest.importorskip("lycoris.modules.locon")
    place, name = kind.split(".")
    make, shape = LAYERS[layer]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = make()
        module = getattr(importlib.import_module(f"lycoris.modules.{place}"), name)(
            "name", original, 1.0, **{"lora_dim": 2, "alpha": 3, **options}
        )
        for path, value in module.named_parameters():
            rescale = 1 + 0.3 * torch.rand_like(value)
            value.data = value.data * rescale if "dora" in path else torch.randn_like(value)
        inputs = torch.randn(shape)
    module.org_forward = original.forward
    with torch.no_grad():
        added = module.eval().forward(inputs) - original(inputs)
        state = {leaf: value.detach() for leaf, value in module.custom_state_dict().items()}
    weight = original.weight.detach()
    update = build_update(state, float(state["alpha"]))
    if "dora_scale" in state:
        update = lycoris_dora_update(update, state["dora_scale"], weight.flatten(1))
    assert set(state) <= set(LEAF_NAMES)
    kernel = update.dense().reshape(weight.shape)
    if layer == "linear":
        ours = F.linear(inputs, kernel)
    else:
        ours = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[inputs.ndim](inputs, kernel, groups=original.groups)
    torch.testing.assert_close(ours, added, rtol=0, atol=1e-5 * float(added.abs().max()))
