"""Quantised checkpoints: bytes written by hand with known values, and the libraries' own dequantisers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from adapters import linear, write_adapter
from makers import normal
from safetensors.torch import load_file, save_file
from surgery_makers import import_peft, llama, save_model, save_peft
from torch import Tensor

import rankscope
from rankscope.errors import FormatError
from rankscope.formats.checkpoint import BaseWeights, Checkpoint
from rankscope.formats.quantized import Codes
from rankscope.surgery.truncate import Rank

FP8 = torch.float8_e4m3fn
NAME = "layer.weight"


def read(path: Path, tensors: dict[str, Tensor], config: dict[str, object] | None = None) -> Checkpoint:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    return Checkpoint(path)


def bnb_state(shape: tuple[int, int], block: int = 64, **more: object) -> Tensor:
    text = json.dumps({"blocksize": block, "shape": shape, "dtype": "float32", **more})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale", "scale_weight", "scale", "qscale_weight"])
def test_fp8_is_multiplied_by_its_scale_under_every_name_of_it(tmp_path: Path, leaf: str) -> None:
    codes = torch.tensor([[1.0, -2.0], [0.5, 448.0]]).to(FP8)
    checkpoint = read(tmp_path / "base", {NAME: codes, f"layer.{leaf}": torch.tensor(0.25)})
    assert checkpoint.read(NAME).tolist() == [[0.25, -0.5], [0.125, 112.0]]
    assert list(checkpoint.infos) == [NAME]


@pytest.mark.parametrize("config", [None, {"weight_block_size": [128, 128]}])
def test_fp8_blocks_are_of_128_whatever_the_edge(tmp_path: Path, config: dict[str, object] | None) -> None:
    scale = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    checkpoint = read(tmp_path / "base", {NAME: torch.ones(192, 300).to(FP8), f"{NAME}_scale_inv": scale}, config)
    whole = checkpoint.read(NAME)
    assert torch.equal(whole, torch.kron(scale, torch.ones(128, 128))[:192, :300])


def test_blocks_of_the_configuration_and_experts_in_three_dimensions(tmp_path: Path) -> None:
    scale = 2.0 ** torch.arange(2 * 2 * 3).reshape(2, 2, 3)
    tensors = {"experts.gate_up_proj": torch.ones(2, 60, 96).to(FP8), "experts.gate_up_proj_scale_inv": scale}
    whole = read(tmp_path / "base", tensors, {"weight_block_size": [32, 32]}).read("experts.gate_up_proj")
    assert torch.equal(whole, torch.stack([torch.kron(part, torch.ones(32, 32))[:60, :96] for part in scale]))


def test_exponents_as_scales(tmp_path: Path) -> None:
    codes = torch.ones(2, 64).to(FP8)
    bytes_ = torch.tensor([[127, 128], [120, 130]], dtype=torch.uint8)
    expected = torch.tensor([[1.0, 2.0], [2.0**-7, 8.0]]).repeat_interleave(32, dim=1)
    assert torch.equal(read(tmp_path / "mx", {NAME: codes, f"{NAME}_scale": bytes_}).read(NAME), expected)
    e8m0 = bytes_[:1, :1].view(torch.float8_e8m0fnu)
    assert torch.equal(read(tmp_path / "e8m0", {NAME: codes, f"{NAME}_scale_inv": e8m0}).read(NAME), torch.ones(2, 64))


def test_compressed_tensors_int8_with_groups_and_zero_points(tmp_path: Path) -> None:
    tensors = {
        NAME: torch.tensor([[1, 2, 3, 4], [-1, -2, -3, -128]], dtype=torch.int8),
        f"{NAME}_scale": torch.tensor([[1.0, 10.0], [0.5, 2.0]]),
        f"{NAME}_zero_point": torch.tensor([[1, 0], [0, 2]], dtype=torch.int8),
    }
    whole = read(tmp_path / "base", tensors).read(NAME)
    assert whole.tolist() == [[0.0, 1.0, 30.0, 40.0], [-0.5, -1.0, -10.0, -260.0]]


def test_four_bits_by_hand_the_high_nibble_first(tmp_path: Path) -> None:
    tensors = {
        NAME: torch.tensor([[0x1F], [0xA0], [0x23], [0x45]], dtype=torch.uint8),
        f"{NAME}.absmax": torch.tensor([1.0, 100.0]),
        f"{NAME}.quant_map": torch.arange(16.0),
        f"{NAME}.quant_state.bitsandbytes__fp4": bnb_state((2, 4), 4),
    }
    checkpoint = read(tmp_path / "base", tensors)
    assert checkpoint.read(NAME).tolist() == [[1.0, 15.0, 10.0, 0.0], [200.0, 300.0, 400.0, 500.0]]
    assert checkpoint.matrix_shape(NAME) == (2, 4)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_four_bits_equal_bitsandbytes(tmp_path: Path, scheme: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = normal(96, 192, seed=5).float()
    packed, state = functional.quantize_4bit(weight, quant_type=scheme, compress_statistics=nested)
    tensors = {NAME: packed} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    ours = read(tmp_path / "base", tensors).read(NAME)
    assert torch.allclose(ours, functional.dequantize_4bit(packed, state), rtol=1e-6, atol=0)


def test_int8_rows_equal_bitsandbytes(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, scale, _ = functional.int8_vectorwise_quant(normal(24, 40, seed=6).half())
    tensors = {NAME: codes, "layer.SCB": scale, "layer.weight_format": torch.tensor(0, dtype=torch.uint8)}
    ours = read(tmp_path / "base", tensors).read(NAME)
    assert torch.allclose(ours, functional.int8_vectorwise_dequant(codes, scale).float(), rtol=1e-6, atol=0)


def test_a_scale_in_another_shard_is_found(tmp_path: Path) -> None:
    parts = {"a.safetensors": {NAME: torch.ones(2, 2).to(FP8)}, "b.safetensors": {f"{NAME}_scale": torch.tensor(3.0)}}
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name)
    index = {"weight_map": {key: name for name, tensors in parts.items() for key in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint(tmp_path).read(NAME).tolist() == [[3.0, 3.0], [3.0, 3.0]]


def fp8_of(weight: Tensor, scale: float) -> dict[str, Tensor]:
    return {NAME: (weight / scale).to(FP8), f"{NAME}_scale": torch.tensor(scale)}


def test_the_rounding_floor_is_what_quantising_left(tmp_path: Path) -> None:
    weight = normal(200, 300, seed=1).float()
    fp8 = read(tmp_path / "fp8", fp8_of(weight, 0.01))
    error = math.sqrt(float((fp8.read(NAME) - weight).square().mean()))
    # The spacing below a power of two is half of that above, which ulp does not count: the estimate is 3 % high.
    assert fp8.rounding(NAME) == pytest.approx(error, rel=0.05)


def test_the_difference_of_unlike_formats_has_the_floor_and_says_the_format(tmp_path: Path) -> None:
    weight = normal(200, 160, seed=1).float()
    planted = 4 * torch.outer(normal(200, 1, seed=2).flatten(), normal(160, 1, seed=3).flatten()).float()
    base = read(tmp_path / "base", fp8_of(weight, 0.01))
    tuned = tmp_path / "tuned.safetensors"
    save_file({NAME: weight + planted}, tuned)
    result = rankscope.spectrum(tuned, base=base.path)
    layer = result.layers[0]
    assert layer.rounding_floor is not None
    assert layer.rounding_floor.above == 1
    assert sum("dequantised from fp8" in note.replace("weights are ", "") for note in result.notes) == 1


def quantise(model: Path, folder: Path, config: bool = True) -> dict[str, Tensor]:
    """Write a copy of a model whose q_proj are fp8 with a scale, and give the plain tensors it stands for."""
    tensors = load_file(model / "model.safetensors")
    plain, stored = dict(tensors), dict(tensors)
    for name in [name for name in tensors if "q_proj.weight" in name]:
        stored[name] = (tensors[name] / 0.02).to(FP8)
        stored[f"{name}_scale_inv"] = torch.full((1, 1), 0.02)
        plain[name] = stored[name].float() * 0.02
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    settings = json.loads((model / "config.json").read_text())
    extra = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}} if config else {}
    (folder / "config.json").write_text(json.dumps(settings | extra))
    return plain


def test_merge_into_fp8_writes_bfloat16_and_a_plain_configuration(tmp_path: Path) -> None:
    import_peft()
    model = save_model(llama(), tmp_path / "model")
    plain = quantise(model, tmp_path / "fp8")
    adapter = save_peft(llama(), tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj"])
    result = rankscope.merge(tmp_path / "fp8", [adapter], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    assert merged.keys() == plain.keys()
    for name, weight in plain.items():
        key = "base_model.model." + name.removesuffix(".weight")
        if "q_proj.weight" in name:
            change = 2.0 * factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
            weight = (weight.double() + change).to(torch.bfloat16)
        assert torch.equal(merged[name], weight), name
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert any("dequantised from fp8" in note for note in result.notes)


def test_merge_into_codes_that_the_configuration_does_not_name_is_refused(tmp_path: Path) -> None:
    model = save_model(llama(), tmp_path / "model")
    quantise(model, tmp_path / "fp8", config=False)
    adapter = save_peft(llama(), tmp_path / "adapter", r=4, target_modules=["q_proj"])
    with pytest.raises(FormatError, match="dequantize"):
        rankscope.merge(tmp_path / "fp8", [adapter], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_marker_of_scaled_weights_goes_with_the_scales(tmp_path: Path) -> None:
    """ComfyUI's loader takes a file with the marker for scaled fp8."""
    weight = normal(5, 7, seed=1).float()
    stored = {"layer.weight": (weight / 0.5).to(FP8), "layer.scale_weight": torch.tensor(0.5)}
    base = tmp_path / "base.safetensors"
    save_file({**stored, "scaled_fp8": torch.zeros(2).to(FP8)}, base)
    adapter = write_adapter(tmp_path / "adapter", linear("layer"))
    rankscope.merge(base, [adapter], tmp_path / "merged")
    merged = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    assert merged.keys() == {"layer.weight"}
    assert merged["layer.weight"].dtype is torch.bfloat16


def test_extract_over_a_quantised_base(tmp_path: Path) -> None:
    weight, base = normal(24, 16, seed=1).float(), tmp_path / "base"
    dequantised = read(base, fp8_of(weight, 0.01)).read(NAME)
    change = torch.outer(normal(24, 1, seed=2).flatten(), normal(16, 1, seed=3).flatten()).float()
    save_file({NAME: dequantised + change}, tmp_path / "tuned.safetensors")
    rankscope.extract(tmp_path / "tuned.safetensors", Rank(1), tmp_path / "out", base)
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    B, A = (factors[f"base_model.model.layer.lora_{side}.weight"] for side in "BA")
    assert torch.allclose(B @ A, change, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("layer.qweight", "GPTQ"),
        ("layer.weight_packed", "NVFP4"),
        ("layer.weight_scale_2", "ModelOpt"),
        ("gate_up_proj_blocks", "MXFP4"),
    ],
)
def test_layouts_that_are_not_read_are_refused_by_name(tmp_path: Path, name: str, layout: str) -> None:
    tensors = {name: torch.ones(2, 2, dtype=torch.int32), "gate_up_proj_scales": torch.ones(2, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(FormatError, match=f"{layout}.*dequantize it first"):
        BaseWeights(tmp_path / "base.safetensors", {"layer": (2, 2)})


@pytest.mark.parametrize("grid", [(3, 1), (2, 7), (1, 1, 2, 2), (0, 1)])
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, grid: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="scales"):
        read(tmp_path / "base", {NAME: torch.ones(4, 4).to(FP8), f"{NAME}_scale": torch.ones(grid)})


def test_a_weight_is_dequantised_only_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    true = Codes.dequantize
    monkeypatch.setattr(Codes, "dequantize", lambda codes: calls.append(tuple(codes.values.shape)) or true(codes))
    tensors = {f"{i}.weight": torch.ones(i + 2, 4).to(FP8) for i in range(3)}
    tensors |= {f"{i}.weight_scale": torch.tensor(1.0) for i in range(3)}
    base = read(tmp_path / "base", tensors).path
    weights = BaseWeights(base, {str(i): (i + 2, 4) for i in range(3)})
    assert calls == []
    assert weights.matrix("1") is not None
    assert calls == [(3, 4)]
