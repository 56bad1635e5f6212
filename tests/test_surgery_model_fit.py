"""What has no place in the model it is written for is told or refused: names in memory, tied weights, DoRA, parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import linear, normal, write_adapter, write_checkpoint
from safetensors.torch import load_file, save_file
from surgery_makers import import_peft, llama, save_model, save_peft

from rankscope.errors import FormatError
from rankscope.surgery.extract import extract
from rankscope.surgery.merge import merge
from rankscope.surgery.model_fit import describe_misfits
from rankscope.surgery.truncate import Rank

transformers = pytest.importorskip("transformers")
BERT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 90,
    "max_position_embeddings": 32,
}  # fmt: skip
TUNED_SIZE = 0.05


def save_pair(folder: Path, model: Any) -> tuple[Path, Path]:
    """A model and one whose every weight moved, both as transformers saves them."""
    base = save_model(model, folder / "base")
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += TUNED_SIZE * torch.randn(parameter.shape, generator=source)
    return base, save_model(model, folder / "tuned")


def test_a_head_that_the_adapter_leaves_untied_is_told(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, transformers.BertForMaskedLM(transformers.BertConfig(**BERT)))
    notes = extract(tuned, Rank(4), tmp_path / "out", base).notes
    told = [note for note in notes if "tied" in note]
    assert len(told) == 1
    assert "word_embeddings.weight and cls.predictions.decoder.weight are tied" in told[0]


def test_a_head_that_goes_with_its_embedding_is_no_reason_for_a_note(tmp_path: Path) -> None:
    base, tuned = save_pair(tmp_path, llama(tie=True))
    assert not any("tied" in note or "exist" in note for note in extract(tuned, Rank(4), tmp_path / "out", base).notes)


def test_names_that_the_model_in_memory_does_not_have_are_told(tmp_path: Path) -> None:
    """ViT's names on disk are older than those in memory: PEFT finds none of them."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.ViTConfig(**vision, image_size=16, patch_size=8, num_labels=3)
    base, tuned = save_pair(tmp_path, transformers.ViTForImageClassification(config))
    notes = extract(tuned, Rank(4), tmp_path / "out", base).notes
    in_memory = dict(transformers.ViTForImageClassification(config).named_modules())
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    adapted = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in factors if ".lora_" in key}
    modules = adapted | set(written["modules_to_save"] or ())
    absent = modules - in_memory.keys()
    assert absent
    assert any(note.startswith(f"{len(absent)} of {len(modules)} modules") for note in notes)
    settings = json.loads((base / "config.json").read_text())
    assert describe_misfits(settings, list(modules - absent)) == []


def test_a_layer_that_the_base_lacks_is_told(tmp_path: Path) -> None:
    base = save_model(llama(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    more = {key.replace("layers.1.", "layers.2."): value for key, value in tensors.items() if "layers.1." in key}
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    save_file({key: value + 0.1 for key, value in {**tensors, **more}.items()}, tuned / "model.safetensors")
    settings = json.loads((base / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    notes = extract(tuned, Rank(2), tmp_path / "out", base).notes
    assert any("model.layers.2." in note and "do not exist in the LlamaForCausalLM" in note for note in notes)


def test_a_configuration_that_names_no_class_says_nothing() -> None:
    assert describe_misfits({}, ["a"]) == describe_misfits({"model_type": "llama"}, ["a"]) == []


def test_a_head_under_another_name_is_not_written_as_lm_head(tmp_path: Path) -> None:
    """Whisper's output layer is proj_out: with lm_head written and untied it would be random on loading."""
    import_peft()
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             {"layers": 1, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip
    config = transformers.WhisperConfig(
        vocab_size=120, d_model=32, **sizes, num_mel_bins=8, max_source_positions=20, max_target_positions=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=[],
        begin_suppress_tokens=[2],
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    base = save_model(model, tmp_path / "base")
    adapter = write_adapter(
        tmp_path / "adapter",
        {
            "base_model.model.model.decoder.embed_tokens.lora_embedding_A": normal(2, 120),
            "base_model.model.model.decoder.embed_tokens.lora_embedding_B": normal(32, 2),
        },
        target_modules=["embed_tokens"],
    )
    with pytest.raises(FormatError, match=r"its model has no lm_head\.weight"):
        merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_order_of_several_dora_is_told(tmp_path: Path) -> None:
    import_peft()
    base = save_model(llama(), tmp_path / "base")
    names = ["one", "two"]
    doras = [save_peft(llama(), tmp_path / name, i, use_dora=True, target_modules=["q_proj"])
             for i, name in enumerate(names)]  # fmt: skip
    assert any("2 of 2 adapters are DoRA" in note for note in merge(base, doras, tmp_path / "both").notes)
    assert not any("DoRA:" in note for note in merge(base, doras[:1], tmp_path / "alone").notes)


def parts_of(folder: Path, paths: list[str]) -> Path:
    """A checkpoint with the list of parts that sentence-transformers keeps."""
    write_checkpoint(folder / "model.safetensors", {"h.0.q.weight": normal(5, 7)})
    parts = [{"idx": 0, "path": "", "type": "Transformer"}]
    parts += [{"idx": i, "path": path, "type": "Part"} for i, path in enumerate(paths, 1)]
    (folder / "modules.json").write_text(json.dumps(parts))
    return folder


def test_the_parts_beside_a_model_go_along(tmp_path: Path) -> None:
    base = parts_of(tmp_path / "base", ["1_Pooling", "2_Dense"])
    for name in ("1_Pooling", "2_Dense", "other"):
        (base / name).mkdir()
        (base / name / "config.json").write_text('{"mode": "mean"}')
    save_file({"weight": normal(2, 2)}, base / "2_Dense" / "model.safetensors")
    merge(base, [write_adapter(tmp_path / "adapter", linear("h.0.q"))], tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == '{"mode": "mean"}'
    assert load_file(tmp_path / "out" / "2_Dense" / "model.safetensors").keys() == {"weight"}
    assert not (tmp_path / "out" / "other").exists()


@pytest.mark.parametrize("path", ["1_Pooling", "../outside"])
def test_a_part_that_is_not_there_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "outside").mkdir()
    base = parts_of(tmp_path / "base", [path])
    with pytest.raises(FormatError, match="names the part"):
        merge(base, [write_adapter(tmp_path / "adapter", linear("h.0.q"))], tmp_path / "out")
    assert not (tmp_path / "out").exists()
