"""Latency on a clock that the passes themselves move on: medians, turns and the state left behind are exact."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankscope import AdapterSpec, Bank
from rankscope.errors import ConfigError, NonFiniteError
from rankscope.lora.layer import AdapterLayer
from rankscope.train.latency import Latency, measure_latency


def model_and_bank(n: int = 1, **settings: Any) -> tuple[nn.Module, Bank]:
    """Two linear layers, the first and an inner one adapted, with factors that are not zero."""
    source = torch.Generator().manual_seed(0)
    inner = nn.Sequential(OrderedDict(drop=nn.Dropout(0.5), second=nn.Linear(5, 6)))
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 5), inner=inner, head=nn.Linear(6, 2)))
    specs = [AdapterSpec(rank=2, alpha=4, targets=["first", "second"], **settings) for _ in range(n)]
    bank = Bank.attach(model, specs, [torch.Generator().manual_seed(i) for i in range(n)])
    with torch.no_grad():
        for layer in bank.layers.values():
            layer.B.normal_(generator=source)
    return model, bank


class Passes:
    """``run`` and ``clock`` of a machine that gets slower: the n-th pass of a variant and size takes cost · n²."""

    COST = {"base": 1.0, "merged": 16.0, "unmerged": 256.0}  # noqa: RUF012

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.now = 0.0
        self.events: list[tuple[str, int]] = []
        self.outputs: dict[tuple[str, int], Tensor] = {}
        self.passed: Counter[tuple[str, int]] = Counter()

    def variant(self, model: Any) -> str:
        if self.bank.route.merged is not None:
            return "merged"
        return "unmerged" if any(isinstance(module, AdapterLayer) for module in model.modules()) else "base"

    def run(self, model: nn.Module, size: int) -> None:
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        key = self.variant(model), size
        self.passed[key] += 1
        self.now += self.COST[key[0]] * size * self.passed[key] ** 2
        self.events.append(key)
        self.outputs[key] = model(torch.randn(size, 4, generator=torch.Generator().manual_seed(size)))

    def clock(self) -> float:
        return self.now


def test_medians_turns_and_noise() -> None:
    model, bank = model_and_bank()
    passes = Passes(bank)
    found = measure_latency(model, bank, passes.run, sizes=(1, 3), repeats=5, clock=passes.clock)
    turn = [(name, size) for name in ("base", "merged", "unmerged") for size in (1, 3, 1, 3)]
    assert passes.events == turn * 5
    # In each turn the second pass counts: passes 2, 4, 6, 8 and 10 of each take 4, 16, 36, 64 and 100 of its cost.
    assert found == [
        Latency(size=size, base=36.0 * size, merged=576.0 * size, unmerged=9216.0 * size, noise=48.0 * size)
        for size in (1, 3)
    ]


def test_what_is_timed() -> None:
    """Nothing but the pass: merging and changing places takes time that does not count."""
    model, bank = model_and_bank()
    passes = Passes(bank)
    merge = bank.merge

    def slow_merge(i: int = 0) -> None:
        passes.now += 1e6
        merge(i)

    bank.merge = slow_merge  # type: ignore[method-assign]
    (found,) = measure_latency(model, bank, passes.run, sizes=(1,), repeats=1, clock=passes.clock)
    assert (found.base, found.merged, found.unmerged, found.noise) == (4.0, 64.0, 1024.0, 0.0)


def test_the_variants_compute_what_they_are_called() -> None:
    model, bank = model_and_bank()
    own = {path: layer.base_layer for path, layer in bank.layers.items()}
    bare = nn.Sequential(own["first"], own["inner.second"], model[2])  # type: ignore[index]
    passes = Passes(bank)
    measure_latency(model, bank, passes.run, sizes=(3,), repeats=1, clock=passes.clock)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(passes.outputs["base", 3], bare(x))
    torch.testing.assert_close(passes.outputs["merged", 3], passes.outputs["unmerged", 3])
    assert not torch.allclose(passes.outputs["base", 3], passes.outputs["merged", 3], atol=0.1)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def check_as_before(model: nn.Module) -> Callable[[], None]:
    """What holds of a model now, as a check for later."""
    modules = list(model.named_modules())
    flags = [module.training for _, module in modules]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    kept = weights(model)

    def check() -> None:
        assert list(model.named_modules()) == modules
        assert [module.training for _, module in modules] == flags
        assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == parameters
        now = weights(model)
        assert list(now) == list(kept)
        assert all(torch.equal(now[name], kept[name]) for name in kept)

    return check


def test_everything_is_as_before() -> None:
    model, bank = model_and_bank(2, modules_to_save=["head"])
    model.train()
    model[1].eval()  # type: ignore[index]
    bank.select([1, 0, -1])
    check = check_as_before(model)
    passes = Passes(bank)
    found = measure_latency(model, bank, passes.run, sizes=(1,), repeats=2, clock=passes.clock)
    assert len(found) == 1
    check()
    assert (bank.attached, bank.route.merged, bank.selection) == (True, None, (1, 0, -1))
    bank.select(None)
    measure_latency(model, bank, passes.run, sizes=(1,), repeats=1)
    assert bank.selection is None


@pytest.mark.parametrize("how", ["selected", "merged"])
def test_the_adapter_in_use_is_measured(how: str) -> None:
    model, bank = model_and_bank(2)
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(1))
    model.eval()
    bank.select(1)
    expected = model(x)
    if how == "merged":
        bank.select(0)
        bank.merge(1)
    check = check_as_before(model)
    passes = Passes(bank)
    measure_latency(model, bank, passes.run, sizes=(1,), repeats=1, clock=passes.clock)
    for name in ("merged", "unmerged"):
        torch.testing.assert_close(passes.outputs[name, 1], expected)
    assert bank.route.merged == (1 if how == "merged" else None)
    assert bank.selection == (0 if how == "merged" else 1)
    if how == "selected":  # a merged weight is made anew, equal in its bits but another object
        check()


@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_pass_that_fails_leaves_everything_as_before(at: int) -> None:
    model, bank = model_and_bank()
    model.train()
    check, passes = check_as_before(model), Passes(bank)

    def failing(model: nn.Module, size: int) -> None:
        if len(passes.events) == at:
            raise RuntimeError("out of memory")
        passes.run(model, size)

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_latency(model, bank, failing, sizes=(1,), repeats=2, clock=passes.clock)
    check()
    assert (bank.attached, bank.route.merged, bank.selection) == (True, None, 0)


def test_a_head_and_a_wrapped_model() -> None:
    model, bank = model_and_bank(modules_to_save=["head"])
    around = nn.Sequential(model)
    own = bank.heads["head"].base
    seen = []

    def run(model: nn.Module, size: int) -> None:
        seen.append(model[0][2] is own)  # type: ignore[index]
        model(torch.ones(size, 4))

    (found,) = measure_latency(around, bank, run, sizes=(2,), repeats=2)
    assert seen == [True, True, False, False, False, False] * 2
    assert min(found.base, found.merged, found.unmerged) > 0


def test_what_cannot_be_measured() -> None:
    model, bank = model_and_bank()
    for settings in ({"sizes": ()}, {"sizes": (0,)}, {"repeats": 0}):
        with pytest.raises(ConfigError, match="sizes and repeats from 1"):
            measure_latency(model, bank, lambda *_: None, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not attached to this model"):
        measure_latency(nn.Linear(4, 5), bank, lambda *_: None)
    with torch.no_grad():
        bank.layers["first"].B[0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        measure_latency(model, bank, lambda model, size: model(torch.ones(size, 4)), sizes=(1,), repeats=1)
    assert bank.route.merged is None
    assert all(isinstance(layer, AdapterLayer) for layer in (model[0], model[1][1]))  # type: ignore[index]
    bank.detach()
    with pytest.raises(ConfigError, match="not attached"):
        measure_latency(model, bank, lambda *_: None)


def test_waiting_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankscope.train import latency

    waited: list[torch.device | None] = []
    model, bank = model_and_bank()
    monkeypatch.setattr(latency, "device_of", lambda item: torch.device("cuda", 1))
    order: list[str] = []
    waited_at: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: (waited.append(device), waited_at.append(len(order))))
    measure_latency(model, bank, lambda *_: order.append("pass"), sizes=(1,), repeats=1)
    assert waited == [torch.device("cuda", 1)] * 6
    assert waited_at == [1, 2, 3, 4, 5, 6]  # after the warm-up and after the pass of each variant
