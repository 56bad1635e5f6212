"""``check``: an adapter that PEFT trained, broken in one way at a time; each mistake is named, and no other is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from check_makers import Tensors, break_adapter, rename_keys, set_tensor, train_adapter
from safetensors.torch import load_file, save_file
from surgery_makers import import_peft, llama, logits, quietly, save_model
from torch import Tensor

from rankscope.checks.check import CheckResult, check
from rankscope.errors import FormatError

pytest.importorskip("peft")
FIRST = "layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(llama(), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def healthy(base: Path) -> Path:
    train_adapter(llama(), base.parent / "healthy", base)
    return base.parent / "healthy"


@pytest.fixture(scope="module")
def dora(base: Path) -> Path:
    train_adapter(llama(), base.parent / "dora", base, use_dora=True)
    return base.parent / "dora"


def flagged(result: CheckResult) -> dict[str, str]:
    """What is not in order: check → level."""
    return {finding.check: finding.level for finding in result.findings if finding.level != "ok"}


def put(value: float, end: str) -> Callable[[Tensors], Tensors]:
    """One entry of a tensor, made ``value``."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[3] = value
        return changed

    return set_tensor(end, change)


def drop(end: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if end not in key}


def add_spike(tensors: Tensors) -> Tensors:
    key = f"base_model.model.model.{FIRST}.lora_B.weight"
    changed = tensors[key].clone()
    changed[:, 0] *= 40
    return {**tensors, key: changed}


def pad_rank(tensors: Tensors) -> Tensors:
    """Rank 4 as rank 12, with eight directions of zeros."""
    return {
        key: torch.cat((value, torch.zeros_like(value), torch.zeros_like(value)), dim=0 if "lora_A" in key else 1)
        for key, value in tensors.items()
    }


def shift_range(tensors: Tensors) -> Tensors:
    """The same products, with B out of float16's range."""
    return {key: value * (1e9 if "lora_B" in key else 1e-9) for key, value in tensors.items()}


def split_off_output(tensors: Tensors) -> Tensors:
    return {key: value[:-2] if "lora_B" in key and FIRST in key else value for key, value in tensors.items()}


CONFIG_UNTOUCHED: dict[str, Any] = {}
# name: (change of the tensors, change of the configuration, what is flagged)
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors] | None, dict[str, Any], dict[str, str]]] = {
    "B all zero": (set_tensor("lora_B", torch.zeros_like), {}, {"trained": "error"}),
    "A all zero": (set_tensor("lora_A", torch.zeros_like), {}, {"trained": "error"}),
    "B zero in one layer": (set_tensor(f"{FIRST}.lora_B", torch.zeros_like), {}, {"trained": "warning"}),
    "NaN": (put(math.nan, f"{FIRST}.lora_A"), {}, {"finite": "error"}),
    "infinity": (put(math.inf, f"{FIRST}.lora_B"), {}, {"finite": "error"}),
    "half of a pair": (drop(f"{FIRST}.lora_A"), {}, {"readable": "error", "pairs": "error"}),
    "factors that do not multiply": (
        set_tensor(f"{FIRST}.lora_A", lambda A: A[:3]),
        {},
        {"readable": "error", "shapes": "error", "claimed-rank": "error"},
    ),
    "another size than the base": (split_off_output, {}, {"base-shapes": "error", "size": "unchecked"}),
    "names of another model": (
        rename_keys("model.model.layers", "model.transformer.h"),
        {},
        {"names": "error", "size": "unchecked"},
    ),
    "a layer that the base lacks": (rename_keys("layers.1.", "layers.7."), {}, {"names": "error"}),
    "a wrapper's name twice": (rename_keys("model.model.layers", "model.model.model.layers"), {}, {"names": "error"}),
    "compiled": (rename_keys("model.model.layers", "model._orig_mod.model.layers"), {}, {"names": "error"}),
    "live keys": (rename_keys(".weight", ".default.weight"), {}, {"keys": "warning"}),
    "live keys of a named adapter": (rename_keys(".weight", ".mine.weight"), {}, {"keys": "error"}),
    "keys without PEFT's prefix": (rename_keys("base_model.model.", ""), {}, {"keys": "error"}),
    "another rank in the configuration": (None, {"r": 8}, {"claimed-rank": "error"}),
    "targets that do not reach": (None, {"target_modules": ["q_proj", "v_proj"]}, {"targets": "error"}),
    "targets by a pattern that does not reach": (None, {"target_modules": r".*\.q_proj"}, {"targets": "error"}),
    "a target that is not in the file": (
        drop("v_proj"),
        {},
        {"targets": "warning"},
    ),
    "a huge α": (None, {"lora_alpha": 3000}, {"scale": "warning", "size": "error", "layer-size": "warning"}),
    "a tiny α": (None, {"lora_alpha": 0.01}, {"scale": "warning", "size": "warning"}),
    "α of zero": (None, {"lora_alpha": 0}, {"trained": "error", "scale": "error"}),
    "α below zero": (None, {"lora_alpha": -8}, {"scale": "warning"}),
    "hardly trained": (set_tensor("lora_B", lambda B: B * 1e-3), {}, {"size": "warning"}),
    "far too strong": (
        set_tensor("lora_B", lambda B: B * 200),
        {},
        {"size": "error", "layer-size": "warning"},
    ),
    "strong": (set_tensor("lora_B", lambda B: B * 45), {}, {"size": "warning"}),
    "a spike": (add_spike, {}, {"spike": "warning"}),
    "rank that is not used": (pad_rank, {"r": 12, "lora_alpha": 24}, {"rank-use": "warning"}),
    "out of float16's range": (shift_range, {}, {"fp16": "warning"}),
    "DoRA without magnitudes": (None, {"use_dora": True}, {"dora": "error"}),
    "a head that was not saved": (None, {"modules_to_save": ["lm_head"]}, {"saved-modules": "error"}),
    "a pattern that fits nothing": (None, {"alpha_pattern": {"k_proj": 4}}, {"alpha": "warning"}),
    "an initialisation that moved the base": (
        None,
        {"init_lora_weights": "pissa"},
        {"initialisation": "warning", "size": "unchecked"},
    ),
    "no α": (None, {"lora_alpha": None}, {"readable": "error"}),
    "a pattern that is no expression": (None, {"rank_pattern": {"q_proj(": 4}}, {"readable": "error"}),
    "a rank in words": (None, {"r": "four"}, {"readable": "error"}),
    "a configuration that is a list of patterns": (None, {"alpha_pattern": ["q_proj"]}, {"readable": "error"}),
    "a tensor nobody knows": (
        lambda tensors: {**tensors, f"base_model.model.model.{FIRST}.lora_C.weight": torch.ones(2, 2)},
        {},
        {"unread": "warning"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BROKEN)
def test_each_mistake_is_named(mistake: str, healthy: Path, base: Path, tmp_path: Path) -> None:
    change, config, expected = BROKEN[mistake]
    result = check(break_adapter(healthy, tmp_path / "broken", change, **config), base=base)
    assert flagged(result) == expected
    assert result.has_errors == ("error" in expected.values())
    worst = result.findings[0]
    assert worst.check in expected
    assert worst.advice
    assert worst.says in result.answer
    assert result.next.startswith("rankscope ")


def test_a_base_in_a_layout_that_is_not_read_is_no_base_without_layers(healthy: Path, tmp_path: Path) -> None:
    save_file({"model.layers.0.q.qweight": torch.zeros(4, 8, dtype=torch.int32)}, tmp_path / "gptq.safetensors")
    with pytest.raises(FormatError, match="quantised as GPTQ or AWQ, which is not read"):
        check(healthy, base=tmp_path / "gptq.safetensors")


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (drop("lora_magnitude"), {}),
        (None, {"use_dora": False}),
        (set_tensor("lora_magnitude", torch.zeros_like), {}),
    ],
)
def test_dora_that_is_not_whole(change: Any, config: dict[str, Any], dora: Path, base: Path, tmp_path: Path) -> None:
    result = check(break_adapter(dora, tmp_path / "broken", change, **config), base=base)
    assert result["dora"].level == "error"


def test_a_healthy_adapter_is_in_order(healthy: Path, base: Path) -> None:
    assert flagged(check(healthy, base=base)) == {}


SILENT = (
    "names of another model",
    "a wrapper's name twice",
    "compiled",
    "live keys of a named adapter",
    "keys without PEFT's prefix",
)


@pytest.mark.parametrize("mistake", SILENT)
def test_peft_ignores_these_without_an_error(mistake: str, healthy: Path, base: Path, tmp_path: Path) -> None:
    """What makes the finding an error: PEFT loads the adapter, and the model answers as the base does."""
    change, config, _ = BROKEN[mistake]
    broken = break_adapter(healthy, tmp_path / "broken", change, **config)
    plain = logits(llama())
    assert not torch.equal(loaded_logits(healthy), plain)
    assert torch.equal(loaded_logits(broken), plain)


@pytest.mark.parametrize("mistake", ["targets that do not reach", "a layer that the base lacks"])
def test_peft_ignores_parts_of_these(mistake: str, healthy: Path, tmp_path: Path) -> None:
    """The same answers as of an adapter without these layers."""
    change, config, _ = BROKEN[mistake]
    broken = break_adapter(healthy, tmp_path / "broken", change, **config)
    gone = ("up_proj", "down_proj") if config else ("layers.1.",)
    rest = break_adapter(
        healthy, tmp_path / "rest", lambda tensors: {k: v for k, v in tensors.items() if not any(g in k for g in gone)}
    )
    assert torch.equal(loaded_logits(broken), loaded_logits(rest))


def loaded_logits(folder: Path) -> Tensor:
    peft = import_peft()
    with warnings.catch_warnings(), quietly():
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(llama(), folder).eval())


def test_peft_refuses_another_rank(healthy: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded_logits(break_adapter(healthy, tmp_path / "broken", r=8))


def test_names_are_checked_without_a_base_where_they_can_be(healthy: Path, tmp_path: Path) -> None:
    unnamed = break_adapter(healthy, tmp_path / "unnamed", base_model_name_or_path=None)
    result = check(unnamed)
    assert flagged(result) == {"names": "unchecked", "size": "unchecked"}
    assert result.next.endswith("--base BASE")
    wrapped = break_adapter(unnamed, tmp_path / "wrapped", rename_keys("model.model.layers", "model._orig_mod.layers"))
    assert check(wrapped)["names"].level == "error"


def test_float16_that_cannot_hold_it_is_an_error(healthy: Path, tmp_path: Path, base: Path) -> None:
    """Where the adapter or the base is stored in float16, the overflow is not only ahead."""
    half = break_adapter(
        healthy,
        tmp_path / "half",
        lambda tensors: {key: (value * 3e4 if "lora_B" in key else value).half() for key, value in tensors.items()},
    )
    assert max(float(value.abs().max()) for value in load_file(half / "adapter_model.safetensors").values()) < 65504
    result = check(half, base=base)
    small = break_adapter(healthy, tmp_path / "small", set_tensor("lora_B", lambda B: B * 1e-6))
    assert check(small, base=base)["fp16"].level == "warning"
    assert result["size"].level == "error"
    overflowing = break_adapter(half, tmp_path / "overflowing", lora_alpha=8e4)
    assert check(overflowing, base=base)["fp16"].level == "error"
