"""``check MERGED --adapter``: how many times a checkpoint that PEFT merged contains an adapter, and how precisely."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from check_makers import break_adapter, rename_keys, set_tensor, train_adapter
from command_line import run
from safetensors.torch import load_file, save_file
from surgery_makers import gpt2, import_peft, llama, quietly, save_model
from torch import Tensor

import rankscope
from rankscope.checks.check import CheckResult, check
from rankscope.errors import ConfigError, FormatError

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter trained on it."""
    folder = tmp_path_factory.mktemp("merge")
    train_adapter(llama(), folder / "adapter", save_model(llama(), folder / "base"))
    return folder


def merge_with_peft(model: Any, adapter: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    with quietly():
        adapted = import_peft().PeftModel.from_pretrained(copy.deepcopy(model).to(dtype), adapter)
        return save_model(adapted.merge_and_unload(), out)


def change_merged(source: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    save_file({key: change(key, value).contiguous() for key, value in tensors.items()}, out / "model.safetensors")
    return out


def flagged(result: CheckResult) -> dict[str, str]:
    return {finding.check: finding.level for finding in result.findings if finding.level != "ok"}


MERGED: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "bfloat16 factors": {"dtype": torch.bfloat16},
    "the output layer whole": {"modules_to_save": ["lm_head"]},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_peft_merged_is_found(name: str, dtype: torch.dtype, home: Path, tmp_path: Path) -> None:
    """With a base of the same dtype, as people have it."""
    base = save_model(llama().to(dtype), tmp_path / "base")
    train_adapter(llama(), tmp_path / "adapter", base, **MERGED[name])
    merged = merge_with_peft(llama(), tmp_path / "adapter", tmp_path / "merged", dtype)
    result = check(merged, base=base, adapter=tmp_path / "adapter")
    assert flagged(result) == {}
    assert result["merge-scale"].value == pytest.approx(1, abs=0.02)
    assert f"contains {tmp_path / 'adapter'}" in result.answer


def test_the_numbers_are_those_of_numpy(home: Path, tmp_path: Path) -> None:
    """Scale, residual and rounding of a merge into bfloat16, from the dense matrices in float64."""
    merged = merge_with_peft(llama(), home / "adapter", tmp_path / "merged", torch.bfloat16)
    result = check(merged, base=home / "base", adapter=home / "adapter")
    W, M, F = (
        load_file(path) for path in (home / "base/model.safetensors", merged / "model.safetensors",
                                     home / "adapter/adapter_model.safetensors")
    )  # fmt: skip
    inner = squares = residual = rounding = 0.0
    for key in [key for key in F if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        U = 2.0 * F[key.replace("lora_A", "lora_B")].double().numpy() @ F[key].double().numpy()
        w, m = W[name].double().numpy(), M[name].double().numpy()
        stored = torch.from_numpy(w + U).bfloat16().double().numpy()
        inner += float(((m - w) * U).sum())
        squares += float((U**2).sum())
        residual += float(((m - w - U) ** 2).sum())
        rounding += float(((stored - w - U) ** 2).sum())
    assert result["merge-scale"].value == pytest.approx(inner / squares, rel=1e-6)
    assert result["merge-residual"].limit == pytest.approx(np.sqrt(rounding / squares), rel=1e-6)
    assert abs(inner / squares - 1) < 0.01, "so the residual is that of the whole adapter"
    assert result["merge-residual"].value == pytest.approx(np.sqrt(residual / squares), rel=1e-6)


def test_a_base_without_the_adapter(home: Path) -> None:
    result = check(home / "base", base=home / "base", adapter=home / "adapter")
    assert flagged(result)["merge-scale"] == "error"
    assert "does not contain" in result.answer
    assert result.next.startswith("rankscope merge ")


def test_another_adapter(home: Path, tmp_path: Path) -> None:
    train_adapter(llama(), tmp_path / "other", home / "base", init_lora_weights="gaussian")
    merged = merge_with_peft(llama(), tmp_path / "other", tmp_path / "merged")
    result = check(merged, base=home / "base", adapter=home / "adapter")
    assert result["merge-scale"].level == "error"
    assert "does not contain" in result.answer


def test_a_change_that_hides_the_adapter(home: Path, tmp_path: Path) -> None:
    """The checkpoint was trained on, far from its base: the adapter cannot be seen in it, and that is said."""
    far = change_merged(
        home / "base",
        tmp_path / "far",
        lambda _, value: value + torch.randn(value.shape, generator=torch.Generator().manual_seed(2)),
    )
    result = check(far, base=home / "base", adapter=home / "adapter")
    assert result["merge-scale"].level == "unchecked"
    assert "cannot be said" in result.answer


@pytest.mark.parametrize(("factor", "level"), [(0.5, "warning"), (2.0, "warning"), (-1.0, "warning"), (0.0, "error")])
def test_the_scale_is_found(factor: float, level: str, home: Path, tmp_path: Path) -> None:
    scaled = break_adapter(home / "adapter", tmp_path / "scaled", set_tensor("lora_B", lambda B: B * factor))
    merged = merge_with_peft(llama(), scaled, tmp_path / "merged")
    result = check(merged, base=home / "base", adapter=home / "adapter")
    assert result["merge-scale"].value == pytest.approx(factor, abs=1e-5)
    assert flagged(result) == {"merge-scale": level}


def test_a_partial_merge_names_the_layers(home: Path, tmp_path: Path) -> None:
    """One layer lost its update."""
    merged = merge_with_peft(llama(), home / "adapter", tmp_path / "merged")
    start = load_file(home / "base" / "model.safetensors")
    part = change_merged(
        merged, tmp_path / "part", lambda key, value: start[key] if "layers.1.self_attn.q_proj" in key else value
    )
    result = check(part, base=home / "base", adapter=home / "adapter")
    assert flagged(result)["merge-scale"] == "error"
    assert result["merge-scale"].layers == ("model.layers.1.self_attn.q_proj",)
    assert "1 of 8 layers lack the adapter" in result.answer


def test_what_else_changed_is_said(home: Path, tmp_path: Path) -> None:
    merged = merge_with_peft(llama(), home / "adapter", tmp_path / "merged")
    noisy = change_merged(
        merged,
        tmp_path / "noisy",
        lambda key, value: (
            value + 0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
            if "q_proj.weight" in key
            else value
        ),
    )
    result = check(noisy, base=home / "base", adapter=home / "adapter")
    assert flagged(result) == {"merge-residual": "warning"}
    assert "and more" in result.answer
    assert len(result["merge-residual"].layers) == 2
    other = change_merged(merged, tmp_path / "other", lambda key, value: value + 1 if "norm" in key else value)
    result = check(other, base=home / "base", adapter=home / "adapter")
    assert flagged(result) == {"merge-others": "warning"}
    assert "model.norm.weight" in result["merge-others"].layers


def test_an_update_below_the_rounding_is_lost(home: Path, tmp_path: Path) -> None:
    """A base in bfloat16 swallows an update of a ten-thousandth of it, which no merge into it can keep."""
    weak = break_adapter(home / "adapter", tmp_path / "weak", set_tensor("lora_B", lambda B: B * 1e-2))
    base = save_model(llama().bfloat16(), tmp_path / "base")
    merged = merge_with_peft(llama(), weak, tmp_path / "merged", torch.bfloat16)
    result = check(merged, base=base, adapter=weak)
    assert result["merge-rounding"].level == "warning"
    assert result["merge-rounding"].value is not None
    assert result["merge-rounding"].value > 0.5


def test_conv1d_and_shards(tmp_path: Path) -> None:
    model = gpt2()
    base = save_model(model, tmp_path / "base", max_shard_size="8KB")
    train_adapter(model, tmp_path / "adapter", base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    merged = merge_with_peft(model, tmp_path / "adapter", tmp_path / "merged")
    assert flagged(check(merged, base=base, adapter=tmp_path / "adapter")) == {}


def test_what_rankscope_merges_is_found(home: Path, tmp_path: Path) -> None:
    rankscope.merge(home / "base", [home / "adapter"], tmp_path / "merged", weights=[0.25])
    result = check(tmp_path / "merged", base=home / "base", adapter=home / "adapter")
    assert result["merge-scale"].value == pytest.approx(0.25, abs=1e-4)


def test_layers_that_the_checkpoint_lacks(home: Path, tmp_path: Path) -> None:
    extra = break_adapter(home / "adapter", tmp_path / "extra", rename_keys("layers.1.", "layers.7."))
    merged = merge_with_peft(llama(), home / "adapter", tmp_path / "merged")
    result = check(merged, base=home / "base", adapter=extra)
    assert result["merge-names"].level == "error"
    assert len(result["merge-names"].layers) == 4
    stranger = break_adapter(home / "adapter", tmp_path / "stranger", rename_keys("model.layers", "transformer.h"))
    result = check(merged, base=home / "base", adapter=stranger)
    assert flagged(result)["merge-names"] == "error"
    assert "cannot be said" in result.answer


def test_the_command(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = merge_with_peft(llama(), home / "adapter", tmp_path / "merged")
    arguments = ("check", merged, "--base", home / "base", "--adapter", home / "adapter")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert " ".join(out.split()).startswith(f"{merged} contains {home / 'adapter'}: 1.000 times, to ")
    result = json.loads(run(capsys, *arguments, "--json")[1])
    assert result["adapter"] == str(home / "adapter")
    assert run(capsys, "check", home / "base", *arguments[2:])[0] == 3


def test_faults(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="full weights, no adapter"):
        check(home / "base", base=home / "base", adapter=home / "base")
    with pytest.raises(FormatError, match="no such file"):
        check(tmp_path / "nothing", base=home / "base", adapter=home / "adapter")
    with pytest.raises(FormatError, match="no such file"):
        check(home / "base", base=home / "base", adapter=tmp_path / "nothing")
