"""Adapter folders that are damaged, odd or not for this model: one clear error each, and the model as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankscope.errors import ConfigError, FormatError, RankscopeError, ShapeError
from rankscope.lora import AdapterSpec, Bank, load

PREFIX = "base_model.model."


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter on layer 0, with trained biases and layer 2 trained whole."""
    model = net()
    spec = AdapterSpec(2, 4.0, ["0"], bias="all", modules_to_save=["2"])
    bank = Bank.attach(model, spec, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in bank.trainable_parameters():
            parameter.add_(0.5)
    bank.save(0, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_the_folder_holds_what_peft_expects(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    shapes = {
        key.removeprefix(PREFIX): tuple(t.shape) for key, t in load_file(folder / "adapter_model.safetensors").items()
    }
    assert shapes == {
        "0.lora_A.weight": (2, 6),
        "0.lora_B.weight": (5, 2),
        "0.base_layer.bias": (5,),
        "1.bias": (5,),
        "2.weight": (3, 5),
        "2.bias": (3,),
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0"], "modules_to_save": ["2"]}
    assert expected.items() <= config.items()
    assert config["inference_mode"] is True
    assert isinstance(config["lora_alpha"], int)


def test_names_with_an_adapter_and_unknown_keys_are_read(folder: Path) -> None:
    model = net()
    load(model, str(folder))
    expected = model(x := torch.randn(4, 6))

    def rename(tensors: dict[str, Tensor]) -> None:
        for half in "AB":
            tensors[f"{PREFIX}0.lora_{half}.mine.weight"] = tensors.pop(f"{PREFIX}0.lora_{half}.weight")
        tensors[f"{PREFIX}2.modules_to_save.default.weight"] = tensors.pop(f"{PREFIX}2.weight")
        tensors[f"{PREFIX}2.original_module.weight"] = torch.zeros(3, 5)

    edit_tensors(folder, rename)
    edit_config(folder, a_key_of_next_year={"x": 1}, modules_to_save=["2", "score"])
    again = net()
    load(again, folder)
    assert torch.equal(again(x), expected)


def test_an_old_bin_file_is_read_and_one_with_code_is_not(folder: Path) -> None:
    model = net()
    load(model, folder)
    expected = model(x := torch.randn(4, 6))
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    again = net()
    load(again, folder)
    assert torch.equal(again(x), expected)
    torch.save({"x": net()}, folder / "adapter_model.bin")
    with pytest.raises(FormatError, match="refused because a pickle can run code"):
        load(net(), folder)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **values)


def tensor(key: str, value: Tensor | None) -> Callable[[Path], None]:
    """Set a tensor, or take it out."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(PREFIX + key, None)
        if value is not None:
            tensors[PREFIX + key] = value

    return lambda folder: edit_tensors(folder, change)


def only_whole(folder: Path) -> None:
    for half in "AB":
        tensor(f"0.lora_{half}.weight", None)(folder)


DAMAGE: dict[str, tuple[Callable[[Path], None], type[RankscopeError], str]] = {
    "no config": (remove("adapter_config.json"), FormatError, "adapter_config.json: no such file"),
    "no weights": (remove("adapter_model.safetensors"), FormatError, "has adapter_config.json but neither"),
    "truncated": (truncate, FormatError, "not a whole safetensors file"),
    "another method": (config(peft_type="LOHA"), FormatError, "peft_type is 'LOHA'"),
    "dora": (config(use_dora=True), FormatError, "adapter_config.json: uses use_dora"),
    "new tokens": (config(trainable_token_indices=[1]), FormatError, "uses trainable_token_indices"),
    "pissa": (config(init_lora_weights="pissa_niter_4"), FormatError, "pissa_niter_4 changes the base weights"),
    "bias": (config(bias="half"), FormatError, "correct the configuration"),
    "modules": (config(modules_to_save="2"), FormatError, "modules_to_save.*correct the configuration"),
    "dropout": (config(lora_dropout=1.5), ConfigError, r"adapter_config.json: dropout .*\[0, 1\)"),
    "half": (tensor("0.lora_A.weight", None), FormatError, "'0' has lora_B without its other half"),
    "twice": (tensor("0.lora_A.x.weight", torch.ones(2, 6)), FormatError, "'0' has lora_A twice"),
    "vector": (tensor("0.lora_A.weight", torch.ones(6)), FormatError, r"lora_A of '0' is \(6,\)"),
    "empty": (tensor("0.lora_A.weight", torch.ones(0, 6)), FormatError, r"lora_A of '0' is \(0, 6\)"),
    "integers": (tensor("0.lora_A.weight", torch.ones(2, 6).int()), FormatError, "no factor of an update"),
    "no factors": (only_whole, FormatError, "holds no LoRA factors"),
    "wrong in": (
        tensor("0.lora_A.weight", torch.ones(2, 7)),
        ShapeError,
        r"'0', A \(2, 7\) and B \(5, 2\), do not fit",
    ),
    "wrong r": (tensor("0.lora_B.weight", torch.ones(5, 3)), ShapeError, r"expected \(\(2, 6\), \(5, 2\)\)"),
    "wrong head": (
        tensor("2.weight", torch.ones(4, 5)),
        ShapeError,
        r"'2.weight' is \(4, 5\) in the file and \(3, 5\)",
    ),
    "stranger": (tensor("7.weight", torch.ones(4, 5)), FormatError, "'7.weight' is neither a factor"),
    "magnitude": (tensor("0.lora_magnitude_vector", torch.ones(5)), FormatError, "lora_magnitude_vector' is neither"),
    "bias of B": (tensor("0.lora_B.bias", torch.ones(5)), FormatError, "lora_B.bias' is neither"),
    "other base": (tensor("0.base_layer.weight", torch.ones(5, 6)), FormatError, "another base weight '0.weight'"),
    "a norm": (tensor("1.lora_A.weight", torch.ones(2, 6)), FormatError, "'1' has lora_A without"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error_and_the_model_stays(folder: Path, damage: str) -> None:
    spoil, error, message = DAMAGE[damage]
    spoil(folder)
    model = net()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message) as caught:
        load(model, folder)
    assert str(caught.value).startswith(str(folder))
    assert str(caught.value).count(str(folder)) == 1
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in net().named_modules()
    }
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_factors_for_a_module_that_cannot_be_adapted(folder: Path) -> None:
    for half, value in (("A", torch.ones(2, 5)), ("B", torch.ones(5, 2))):
        tensor(f"1.lora_{half}.weight", value)(folder)
    with pytest.raises(ConfigError, match="target '1' is a LayerNorm"):
        load(net(), folder)


def test_several_folders_with_biases_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="only be trained with one adapter"):
        load(net(), [folder, folder])
    with pytest.raises(ConfigError, match="at least one adapter"):
        load(net(), [])


def test_ranks_are_those_of_the_tensors(folder: Path) -> None:
    edit_config(folder, r=64, rank_pattern={"0": 32}, alpha_pattern={"0": 3})
    bank = load(net(), folder)
    assert bank.layers["0"].slots[0][:2] == (2, 1.5)


def test_dropout_of_a_loaded_adapter_is_that_of_its_generator(folder: Path) -> None:
    edit_config(folder, lora_dropout=0.5)
    x = torch.randn(4, 6)

    def run(generator: torch.Generator | None) -> Tensor:
        model = net()
        load(model, folder, generator)
        return model.train()(x)

    assert torch.equal(run(None), run(None))
    assert torch.equal(run(None), run(torch.Generator().manual_seed(0)))
    assert not torch.equal(run(None), run(torch.Generator().manual_seed(1)))


def test_saving_where_nothing_can_be_written(folder: Path) -> None:
    bank = load(net(), folder)
    blocked = folder / "adapter_config.json" / "sub"
    with pytest.raises(FormatError, match="cannot be written"):
        bank.save(0, blocked)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_tied_biases_are_saved_once_under_each_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    bank = Bank.attach(model, AdapterSpec(2, 4.0, ["0"], bias="all"), torch.Generator().manual_seed(0))
    assert model[1].bias is model[0].base_layer.bias
    with torch.no_grad():
        model[1].bias.add_(1)
    bank.save(0, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved[f"{PREFIX}1.bias"], saved[f"{PREFIX}0.base_layer.bias"])
    original = bank.detach()
    assert torch.equal(original[0].bias + 1, saved[f"{PREFIX}1.bias"])


def test_a_detached_bank_can_still_be_saved(tmp_path: Path, folder: Path) -> None:
    bank = load(net(), folder)
    bank.detach()
    bank.save(0, tmp_path / "again")
    first, second = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
