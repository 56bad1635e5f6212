"""``check`` raises no false alarm: adapters that were really trained, in every variant and format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from check_makers import break_adapter, train_adapter
from peft_models import LINEAR, NEEDS_BASE, Saved, import_peft, two
from safetensors.torch import load_file, save_file
from surgery_makers import gpt2, llama, save_model

import rankscope
from rankscope.checks.check import check

pytest.importorskip("peft")

TRAINED: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "higher rate": {"lr": 1e-2},
    "lower rate": {"lr": 1e-4},
    "rank 1": {"r": 1},
    "rank 16": {"r": 16, "lora_alpha": 16},
    "rsLoRA": {"use_rslora": True, "r": 8},
    "DoRA": {"use_dora": True},
    "rsLoRA and DoRA": {"use_rslora": True, "use_dora": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "DoRA in float16": {"use_dora": True, "dtype": torch.float16},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}},
    "all linear layers": {"target_modules": "all-linear"},
    "a pattern of targets": {"target_modules": r".*\.layers\.\d\.self_attn\.[qkv]_proj"},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "the output layer whole": {"modules_to_save": ["lm_head"]},
    "biases": {"bias": "lora_only"},
    "one layer of two": {"layers_to_transform": [1]},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(llama(), tmp_path_factory.mktemp("base") / "base")


def alarms(path: Path, **options: Any) -> list[str]:
    """What is not in order."""
    result = check(path, **options)
    return [f"{finding.check} {finding.level}: {finding.says}" for finding in result.findings if finding.level != "ok"]


@pytest.mark.parametrize("name", TRAINED)
def test_trained_adapters_are_in_order(name: str, base: Path, tmp_path: Path) -> None:
    train_adapter(llama(), tmp_path / "adapter", base, **TRAINED[name])
    assert alarms(tmp_path / "adapter", base=base) == []
    assert alarms(tmp_path / "adapter") == [], "the base is found where the configuration says"


def test_the_numbers_are_those_of_peft(base: Path, tmp_path: Path) -> None:
    """‖ΔW‖/‖W‖ against PEFT's own merged weights."""
    adapted = train_adapter(llama(), tmp_path / "adapter", base)
    tuned, start = adapted.merge_and_unload().state_dict(), llama().state_dict()
    names = [name for name in start if any(target in name for target in ("q_proj.w", "v_proj.w", "up_proj.w", "down_"))]
    change = torch.cat([(tuned[name] - start[name]).flatten() for name in names]).double().norm()
    weight = torch.cat([start[name].flatten() for name in names]).double().norm()
    size = check(tmp_path / "adapter", base=base)["size"].value
    assert size == pytest.approx(float(change / weight), rel=1e-4)


def test_a_conv1d_model_and_a_sharded_base(tmp_path: Path) -> None:
    model = gpt2()
    shards = save_model(model, tmp_path / "shards", max_shard_size="8KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    train_adapter(model, tmp_path / "adapter", shards, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    assert alarms(tmp_path / "adapter", base=shards) == []


def test_a_base_without_the_prefix_of_its_head(tmp_path: Path) -> None:
    """GPT-2 on the hub has ``h.0…`` where the model in memory has ``transformer.h.0…``."""
    model = gpt2()
    whole = save_model(model, tmp_path / "whole")
    body = tmp_path / "body"
    body.mkdir()
    tensors = load_file(whole / "model.safetensors")
    save_file({key.removeprefix("transformer."): value for key, value in tensors.items()}, body / "model.safetensors")
    (body / "config.json").write_text((whole / "config.json").read_text())
    train_adapter(model, tmp_path / "adapter", body, target_modules=["c_attn"], fan_in_fan_out=True)
    result = check(tmp_path / "adapter", base=body)
    assert [finding.check for finding in result.findings if finding.level != "ok"] == []
    assert "'transformer.'" in result["names"].says


@pytest.mark.parametrize("method", LINEAR)
def test_other_methods_of_peft(method: str, tmp_path: Path) -> None:
    """They are opened and measured; random factors of this size are no healthy adapter, so sizes are left out."""
    settings, _, needs_base = LINEAR[method]
    saved = Saved(import_peft(), tmp_path, method.partition(",")[0], two(), target_modules=["q", "k"], **settings)
    result = check(saved.folder, base=saved.base_file if needs_base is NEEDS_BASE else None)
    assert [f.check for f in result.findings if f.level == "error" and f.check != "size"] == []
    if needs_base is NEEDS_BASE:
        alone = check(saved.folder)
        assert [f.check for f in alone.findings if f.level == "error"] == [], "that the base is not known is no error"


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "kohya": lambda adapter, out: rankscope.convert(adapter, "kohya", out / "lora.safetensors"),
    "diffusers": lambda adapter, out: rankscope.convert(adapter, "diffusers", out / "lora.safetensors"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_other_formats(kind: str, base: Path, tmp_path: Path) -> None:
    train_adapter(llama(), tmp_path / "adapter", base)
    (tmp_path / "out").mkdir()
    WRITERS[kind](tmp_path / "adapter", tmp_path / "out")
    file = tmp_path / "out" / "lora.safetensors"
    assert alarms(file, base=base) == []
    tensors = load_file(file)
    half = next(key for key in tensors if "lora_down" in key or "lora_A" in key or "lora.down" in key)
    save_file({key: value for key, value in tensors.items() if key != half}, tmp_path / "half.safetensors")
    assert check(tmp_path / "half.safetensors", base=base)["pairs"].level == "error"
    if kind == "kohya":
        save_file({k: v for k, v in tensors.items() if not k.endswith("alpha")}, tmp_path / "bare.safetensors")
        assert [alarm.split()[0] for alarm in alarms(tmp_path / "bare.safetensors", base=base)] == ["alpha"]


def test_loralib_without_its_alpha(tmp_path: Path) -> None:
    file = tmp_path / "lora.pt"
    torch.save({"block.q.lora_A": torch.ones(2, 7), "block.q.lora_B": torch.ones(5, 2)}, file)
    result = check(file)
    assert result["alpha"].level == "warning"
    assert "alpha" not in [finding.check for finding in check(file, alpha=4).findings]


VLLM: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "plain": ({}, {}),
    "rank 24": ({"r": 24, "lora_alpha": 24}, {"vllm-rank": "warning"}),
    "DoRA": ({"use_dora": True}, {"vllm-parts": "error"}),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, {"vllm-parts": "error"}),
    "biases": ({"bias": "all"}, {"vllm-parts": "error"}),
    "patterns": ({"alpha_pattern": {"q_proj": 3}}, {"vllm-scale": "error"}),
    "an embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {"vllm-targets": "warning"}),
    "the output layer": ({"target_modules": ["lm_head", "q_proj"]}, {"vllm-targets": "warning"}),
}


@pytest.mark.parametrize("name", VLLM)
def test_what_vllm_takes(name: str, base: Path, tmp_path: Path) -> None:
    config, expected = VLLM[name]
    train_adapter(llama(), tmp_path / "adapter", base, **config)
    result = check(tmp_path / "adapter", base=base, server="vllm")
    assert {f.check: f.level for f in result.findings if f.level != "ok" and f.check != "rank-use"} == expected
    if name == "rank 24":
        assert "--max-lora-rank 32" in result["vllm-rank"].advice


def test_vllm_takes_no_other_layout_and_no_larger_rank(base: Path, tmp_path: Path) -> None:
    train_adapter(llama(), tmp_path / "adapter", base)
    rankscope.convert(tmp_path / "adapter", "kohya", tmp_path / "lora.safetensors")
    assert check(tmp_path / "lora.safetensors", server="vllm")["vllm-layout"].level == "error"

    def widen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: torch.cat([value] * 150, dim=0 if "lora_A" in key else 1) for key, value in tensors.items()}

    wide = break_adapter(tmp_path / "adapter", tmp_path / "wide", widen, r=600)
    assert check(wide, server="vllm")["vllm-rank"].level == "error"
    assert json.loads((wide / "adapter_config.json").read_text())["r"] == 600
