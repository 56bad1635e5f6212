"""Names on disk and in memory, layouts and tied weights, against models that transformers has saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from renamed_models import CONFIGS, TEXT, save_model
from torch import Tensor

from rankscope.formats import model_names
from rankscope.formats.checkpoint import Checkpoint, read_model_config
from rankscope.formats.file_io import TensorInfo
from rankscope.formats.model_names import ModelNames, StoredPart, split_unit
from rankscope.formats.model_outline import outline_model
from rankscope.formats.name_rules import PLAIN_TYPES

transformers = pytest.importorskip("transformers", minversion="5")


def _read_part(checkpoint: Checkpoint, part: StoredPart) -> Tensor:
    tensor = checkpoint.read(part.stored)
    tensor = tensor if part.number is None else tensor[part.number]
    tensor = tensor.mT if part.transposed else tensor
    return tensor[part.start : part.stop] if tensor.ndim else tensor


def _find_wrong(model: torch.nn.Module, folder: Path, names: ModelNames) -> list[str]:
    """Names whose tensor, put together from the stored blocks, is not that of the model, and parameters left out."""
    checkpoint, state = Checkpoint(folder), model.state_dict()
    layout = names.lay_out(checkpoint.infos)
    left = dict(state)
    wrong = []
    for name, parts in layout.items():
        stack, number = split_unit(name) or (name, None)
        expected = state.get(stack)
        left.pop(stack, None)
        pieces = [_read_part(checkpoint, part) for part in parts]
        actual = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if expected is None or not torch.equal(actual, expected if number is None else expected[number]):
            wrong.append(name)
    return wrong + [name for name in left if not any(name in group for group in names.tied_weights)]


@pytest.mark.parametrize("name", CONFIGS)
def test_layout_makes_the_parameters_of_the_model_from_the_stored_tensors(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    assert _find_wrong(model, tmp_path, ModelNames(read_model_config(tmp_path))) == []


@pytest.mark.parametrize("name", list(CONFIGS)[:7])
def test_small_table_gives_the_same_names_without_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(name, tmp_path)
    config, infos = read_model_config(tmp_path), Checkpoint(tmp_path).infos
    with_transformers = ModelNames(config)
    expected = with_transformers.lay_out(infos)
    monkeypatch.setattr(model_names, "outline_model", lambda _: None)
    without = ModelNames(config)
    assert without.outline is None
    assert without.lay_out(infos) == expected
    for stack in {unit[0] for unit in map(split_unit, expected) if unit}:
        assert without.stores_inputs_first(stack) == with_transformers.stores_inputs_first(stack)


def test_names_that_are_those_in_memory_already_stay(tmp_path: Path) -> None:
    model = save_model("LlavaForConditionalGeneration", tmp_path)
    infos = {name: TensorInfo.of(tensor) for name, tensor in model.state_dict().items()}
    names = ModelNames(read_model_config(tmp_path))
    assert names.lay_out(infos) == {name: (StoredPart(name),) for name in infos}


def test_experts_stacked_and_single_have_the_same_names(tmp_path: Path) -> None:
    model = save_model("Qwen3MoeForCausalLM", tmp_path)
    stacked = {name: TensorInfo.of(tensor) for name, tensor in model.state_dict().items()}
    names = ModelNames(read_model_config(tmp_path))
    assert names.lay_out(stacked).keys() == names.lay_out(Checkpoint(tmp_path).infos).keys()


def test_incomplete_experts_keep_their_stored_names(tmp_path: Path) -> None:
    save_model("Qwen3MoeForCausalLM", tmp_path)
    infos = dict(Checkpoint(tmp_path).infos)
    del infos["model.layers.0.mlp.experts.2.up_proj.weight"]
    layout = ModelNames(read_model_config(tmp_path)).lay_out(infos)
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in layout
    assert "model.layers.0.mlp.experts.down_proj[3]" in layout
    assert sorted(part.stored for parts in layout.values() for part in parts) == sorted(infos)


@pytest.mark.parametrize(
    ("kind", "config", "tied"),
    [
        ("WhisperForConditionalGeneration", "WhisperConfig", {"proj_out.weight", "model.decoder.embed_tokens.weight"}),
        (
            "BertForMaskedLM", "BertConfig",
            {"cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"},
        ),
        ("T5ForConditionalGeneration", "T5Config", {"shared.weight", "lm_head.weight", "encoder.embed_tokens.weight",
                                                    "decoder.embed_tokens.weight"}),
        ("Qwen2ForCausalLM", "Qwen2Config", {"lm_head.weight", "model.embed_tokens.weight"}),
    ],
)  # fmt: skip
def test_tied_weights_are_those_of_the_model(kind: str, config: str, tied: set[str]) -> None:
    settings = json.loads(getattr(transformers, config)(tie_word_embeddings=True, num_hidden_layers=1).to_json_string())
    assert frozenset(tied) in ModelNames({**settings, "architectures": [kind]}).tied_weights


def test_full_name_has_that_of_the_inner_model() -> None:
    config = {**json.loads(transformers.GPT2Config(n_layer=1).to_json_string()), "architectures": ["GPT2LMHeadModel"]}
    names = ModelNames(config)
    assert names.find_parameter("h.0.attn.c_attn.weight") == "transformer.h.0.attn.c_attn.weight"
    assert names.find_parameter("lm_head.weight") == "lm_head.weight"
    assert names.find_parameter("h.1.attn.c_attn.weight") is None
    assert names.module_paths is not None
    assert "transformer.h.0.attn.c_attn" in names.module_paths


def test_plain_types_are_not_in_the_table_of_transformers() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert {kind for kind in PLAIN_TYPES if get_checkpoint_conversion_mapping(kind) is not None} == set()
    assert set(CONFIG_MAPPING_NAMES) >= PLAIN_TYPES


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9}, {"hidden_size": "x"}, {"num_attention_heads": 0}, {"model_type": "nothing"},
        {"architectures": ["Trainer"]}, {"architectures": ["NoSuchModel"]}, {"model_type": 3},
    ],
)  # fmt: skip
def test_configurations_that_no_model_can_have_give_no_outline(change: Mapping[str, object]) -> None:
    config = {**json.loads(transformers.LlamaConfig(**TEXT).to_json_string()), "architectures": ["LlamaForCausalLM"]}
    assert outline_model(config) is not None
    assert outline_model({**config, **change}) is None
