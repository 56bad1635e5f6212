"""One PEFT adapter under every name that PEFT gives its keys: analysis, bank and surgery read the same from it."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft_models import import_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankscope.errors import FormatError
from rankscope.formats import store as formats
from rankscope.formats.peft_folder import PeftFolder
from rankscope.lora import load
from rankscope.lora.stored_adapter import read_adapter
from rankscope.surgery.adapter import Adapter

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def peft() -> ModuleType:
    return import_peft()


class Model(nn.Module):
    """A layer of each kind that an adapter has tensors for."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6)
        self.q = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.score = nn.Linear(6, 4)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.norm(self.q(self.emb(tokens))).mean(1)
        return self.score(x) + self.head(x)


SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["q"]},
    "embedding": {"target_modules": ["q", "emb"]},
    "whole modules": {"target_modules": ["q"], "modules_to_save": ["score", "head"]},
    "biases": {"target_modules": ["q", "emb"], "bias": "all"},
    "biases and whole modules": {"target_modules": ["q"], "bias": "all", "modules_to_save": ["score", "head"]},
    "DoRA": {"target_modules": ["q", "emb"], "use_dora": True},
    "bias of B": {"target_modules": ["q"], "lora_bias": True},
    "token rows": {"target_modules": ["q"], "trainable_token_indices": {"emb": [1, 3]}},
}
NOT_IN_A_BANK = {"DoRA", "bias of B", "token rows"}
NAMES = {
    "live": lambda key, trained: True,
    "live, what is trained": lambda key, trained: key in trained,
    "live, the adapter alone": lambda key, trained: "lora_" in key or "mine" in key,
}


class Written:
    """One adapter in four folders: as PEFT saves it under "default" and under "mine", and its live state dict."""

    def __init__(self, peft: ModuleType, folder: Path, settings: dict[str, Any]) -> None:
        torch.manual_seed(0)
        base = Model()
        save_file(base.state_dict(), folder / "model.safetensors")
        self.base = folder / "model.safetensors"
        self.model = base
        saved: dict[str, Any] = {}
        for name in ("default", "mine"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                saved[name] = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **settings), name)
            torch.manual_seed(1)
            for parameter in saved[name].parameters():
                if parameter.requires_grad:
                    parameter.data = torch.randn_like(parameter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, adapted in saved.items():
                adapted.save_pretrained(folder / "saved")
                self.config = folder / "saved" / ("mine" if name == "mine" else "") / "adapter_config.json"
        self.plain = folder / "saved"
        state = {key: tensor.contiguous() for key, tensor in saved["mine"].state_dict().items()}
        trained = {key for key, parameter in saved["mine"].named_parameters() if parameter.requires_grad}
        self.folders = {"saved as mine": folder / "saved" / "mine"}
        for label, chosen in NAMES.items():
            place = self.folders[label] = folder / label
            place.mkdir()
            save_file({key: tensor for key, tensor in state.items() if chosen(key, trained)}, place / WEIGHTS)
            (place / "adapter_config.json").write_text(self.config.read_text())


def analysed(folder: Path, base: Path) -> dict[str, Tensor]:
    """Every update by its name, a product also as its two factors."""
    store = formats.open(folder, base)
    return {name: store[name].dense() for name in store}


def operated(folder: Path) -> dict[str, Tensor]:
    """What surgery carries to a new folder, by PEFT's key, and the update of each layer."""
    adapter = Adapter.open(folder)
    tensors = {**adapter.unchanged_tensors(), **adapter.biases()}
    updates = {name: adapter.update(name).dense() for name in adapter.names()}
    return {key: tensor.read() for key, tensor in tensors.items()} | updates


def banked(folder: Path) -> dict[str, Tensor]:
    stored = read_adapter(folder)
    halves = {f"{name}:{half}": pair[i] for name, pair in stored.factors.items() for i, half in enumerate("AB")}
    return halves | stored.whole


def is_base_bias(key: str, settings: str) -> bool:
    own = ("lora_", *SETTINGS[settings].get("modules_to_save", ()))
    return key.endswith(".bias") and not any(part in key for part in own)


def check_same(now: dict[str, Tensor], plain: dict[str, Tensor], allowed: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """The same names, shapes, dtypes and values; ``allowed``: names that may be there besides."""
    assert plain.keys() <= now.keys()
    assert now.keys() - plain.keys() <= allowed
    for name, tensor in plain.items():
        assert now[name].dtype == tensor.dtype
        assert torch.equal(now[name], tensor), name


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_readers_agree_whatever_the_keys_are_called(peft: ModuleType, tmp_path: Path, settings: str) -> None:
    written = Written(peft, tmp_path, SETTINGS[settings])
    frozen = written.model.state_dict()
    names = {*frozen, *(name.removesuffix(".weight") for name in frozen)}
    buffers = {name for name, _ in written.model.named_buffers()}
    keys = {PREFIX + name for name in frozen} | {PREFIX + name.replace("q.", "q.base_layer.") for name in frozen}
    keys |= {f"{PREFIX}emb.base_layer.weight", f"{PREFIX}emb.token_adapter.base_layer.weight"}
    plain = analysed(written.plain, written.base), operated(written.plain)
    for label, folder in written.folders.items():
        # A state dict that is not filtered has the frozen weights too, under their own names; one of parameters
        # alone lacks the buffers of a module that was trained whole.
        besides = label == "live"
        lacking = buffers if label == "live, what is trained" else set()
        check_same(analysed(folder, written.base), plain[0], names if besides else set())
        carried = {key: tensor for key, tensor in plain[1].items() if key.removeprefix(PREFIX) not in lacking}
        if label == "live, the adapter alone":  # biases of the base model have no adapter's name in their keys
            carried = {key: value for key, value in carried.items() if not is_base_bias(key, settings)}
        check_same(operated(folder), carried, keys if besides else set())
        if settings not in NOT_IN_A_BANK:
            stored = {key: tensor for key, tensor in banked(written.plain).items() if key not in lacking}
            if label == "live, the adapter alone":
                stored = {key: value for key, value in stored.items() if not is_base_bias(key, settings)}
            check_same(banked(folder), stored, {*frozen} if besides else set())


@pytest.mark.parametrize("label", ["saved as mine", "live", "live, what is trained"])
@pytest.mark.parametrize("settings", sorted(SETTINGS.keys() - NOT_IN_A_BANK))
def test_a_bank_computes_the_same_from_each(peft: ModuleType, tmp_path: Path, settings: str, label: str) -> None:
    written = Written(peft, tmp_path, SETTINGS[settings])
    tokens = torch.arange(8).reshape(2, 4)
    first, second = copy.deepcopy(written.model).eval(), copy.deepcopy(written.model).eval()
    load(first, written.plain)
    load(second, written.folders[label])
    assert torch.equal(first(tokens), second(tokens))
    assert not torch.allclose(first(tokens), written.model.eval()(tokens), atol=1e-2)


def test_names_are_those_of_the_base(peft: ModuleType, tmp_path: Path) -> None:
    """The example in three readers: ``score.modules_to_save.mine.weight`` is ``score.weight``."""
    written = Written(peft, tmp_path, SETTINGS["whole modules"])
    live = written.folders["live, what is trained"]
    assert f"{PREFIX}score.modules_to_save.mine.weight" in load_file(live / WEIGHTS)
    assert {"score", "head.0"} <= set(analysed(live, written.base))
    assert {"score.weight", "head.0.weight"} <= banked(live).keys()
    assert {f"{PREFIX}score.weight", f"{PREFIX}head.0.weight"} <= operated(live).keys()
    assert {"score.weight", "head.0.weight"} <= PeftFolder.open(live).whole.keys()


@pytest.mark.parametrize("read", [formats.open, read_adapter, Adapter.open])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("score.modules_to_save.other.weight", torch.zeros(4, 6)),
        ("score.weight", torch.zeros(4, 6)),
        ("q.lora_A.other.weight", torch.zeros(2, 6)),
        ("score.modules_to_save.other.bias", torch.zeros(4)),
    ],
)
def test_two_values_of_one_tensor_are_refused(
    peft: ModuleType, tmp_path: Path, read: Any, key: str, value: Tensor
) -> None:
    written = Written(peft, tmp_path, SETTINGS["whole modules"])
    folder = written.folders["live, what is trained"]
    read(folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, PREFIX + key: value}, folder / WEIGHTS)
    with pytest.raises(FormatError, match="save one adapter only") as caught:
        read(folder)
    assert str(caught.value).startswith(str(folder))
    # Negative control: the same value twice is what PEFT saves with bias="all".
    if "lora_" not in key:
        same = f"{PREFIX}score.modules_to_save.mine.{key.rpartition('.')[2]}"
        save_file({**tensors, PREFIX + key: tensors[same].clone()}, folder / WEIGHTS)
        read(folder)


def test_a_wrong_prefix_is_told_by_its_config(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))
    for read in (formats.open, read_adapter, Adapter.open):
        with pytest.raises(FormatError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
            read(tmp_path)


def test_one_module_says_what_a_configuration_holds() -> None:
    package = Path(formats.__file__).parent.parent
    writers = [path.name for path in package.rglob("*.py") if '"peft_type": "' in path.read_text(encoding="utf-8")]
    assert writers == ["peft_write.py"]
