"""Adapters of PEFT's methods that are damaged or lie: one clear error of ours each, never another exception."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from adapters import PREFIX, normal, write_checkpoint
from damage import ODD, spoiled
from peft_models import LINEAR, Saved, import_peft, two
from safetensors.torch import load_file, save_file

from rankscope.errors import RankscopeError
from rankscope.formats import store as formats
from rankscope.formats.peft_config import MethodConfig

VARIANTS = ("GLORA, ", "OFT, ", "DEFT, ", "HRA, ", "MISS, mini", "LOKR, both whole")
HOSTILE = {name: values for name, values in LINEAR.items() if not name.startswith(VARIANTS)}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Saved]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        peft, found = import_peft(), {}
        for name in HOSTILE:
            place, method = tmp_path_factory.mktemp("adapter"), name.split(",")[0]
            found[name] = Saved(peft, place, method, two(), target_modules=["q", "k"], **HOSTILE[name][0])
        yield found


def outcome(folder: Path, base: Path) -> str:
    """ "read", or the one sentence of ours that refuses it; nothing else may be raised."""
    try:
        store = formats.open(folder, base=base)
        store._repr_html_()
        for name in store:
            update, info = store[name], store.info(name)
            if (update.shape, update.nominal_rank) != (info.shape, info.nominal_rank):
                return "read, but not as told"
    except RankscopeError as error:
        return str(error)
    return "read"


def is_fine(found: str, folder: Path, base: Path) -> bool:
    """Read, or a sentence that says where."""
    return found == "read" or ("\n" not in found and (str(folder) in found or str(base) in found))


@pytest.mark.parametrize("name", HOSTILE)
def test_spoiled_tensors_are_refused_in_one_sentence(adapters, tmp_path, name):
    """All that is no longer a tensor of the right kind; a missing one where the layer has others."""
    saved = adapters[name]
    tensors = load_file(saved.folder / "adapter_model.safetensors")
    mine = [key for key in tensors if ".q." in key or not key.startswith(PREFIX)]
    unused = ("randlora_A", "randlora_B", "glora_C", "glora_D", "glora_E")  # copies, and what changes the bias
    folder = tmp_path / "case"
    for key in mine:
        for way, changed_one in spoiled(tensors[key]).items():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(saved.folder, folder)
            changed = {other: value for other, value in tensors.items() if other != key}
            if changed_one is not None:
                changed[key] = changed_one.contiguous()
            save_file(changed, folder / "adapter_model.safetensors")
            found = outcome(folder, saved.base_file)
            assert is_fine(found, folder, saved.base_file), (key, way, found)
            harmless = (way == "missing" and len(mine) == 1) or any(part in key for part in unused)
            harmless |= way == "another dimension" and name.startswith(("LOKR", "HIRA", "IA3"))  # a convolution's
            if not harmless and not (way == "integers" and "indices" in key) and way != "longer":
                assert found != "read", (key, way)


@pytest.mark.parametrize("name", HOSTILE)
def test_configurations_with_odd_values(adapters, tmp_path, name):
    saved = adapters[name]
    folder = tmp_path / "case"
    shutil.copytree(saved.folder, folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    known = {field.encode_name for field in msgspec.structs.fields(MethodConfig)}
    for key in sorted(known & set(config)):
        for value in ODD:
            path.write_text(json.dumps({**config, key: value}))
            found = outcome(folder, saved.base_file)
            assert is_fine(found, folder, saved.base_file), (key, value, found)
    path.write_text(json.dumps({**config, "not_invented_yet": {"deep": [1]}}))
    assert outcome(folder, saved.base_file) == "read"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_base_that_does_not_fit(adapters, tmp_path, name):
    saved = adapters[name]
    bases = {
        "elsewhere": {"elsewhere.weight": normal(8, 12)},
        "narrow": {f"block.{module}.weight": normal(5, 3) for module in "qk"},
        "flat": {f"block.{module}.weight": normal(5) for module in "qk"},
        "integers": {f"block.{module}.weight": torch.ones(8, 8, dtype=torch.int8) for module in "qk"},
    }
    shapeless = name.split(",")[0] in ("FOURIERFT", "MISS", "VERA", "PVERA")  # nothing in the file contradicts them
    for kind, tensors in bases.items():
        base = write_checkpoint(tmp_path / f"{kind}.safetensors", tensors)
        found = outcome(saved.folder, base)
        assert is_fine(found, saved.folder, base), (kind, found)
        assert found != "read" or shapeless, kind


def test_shared_blocks_of_oft_are_one_or_one_a_place(adapters: dict[str, Saved], tmp_path: Path) -> None:
    saved = adapters["OFT"]
    folder = tmp_path / "case"
    shutil.copytree(saved.folder, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_share": True}))
    tensors = load_file(saved.folder / "adapter_model.safetensors")
    key = next(key for key in tensors if ".q.oft_R" in key)
    for count, found in {1: "read", 2: "oft_R is (2, 6), which does not fit the weight (8, 12)", 3: "read"}.items():
        (folder / "adapter_model.safetensors").unlink()
        save_file({**tensors, key: tensors[key][:count].clone()}, folder / "adapter_model.safetensors")
        assert found in outcome(folder, saved.base_file)
