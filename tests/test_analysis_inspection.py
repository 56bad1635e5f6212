"""``inspect``: what it says of every kind of source, from headers alone."""

from __future__ import annotations

import json

import pytest
import torch
from adapters import linear, normal, write_adapter, write_checkpoint, write_shards
from safetensors.torch import save_file

from rankscope import cli
from rankscope.analysis.inspection import Inspection, inspect
from rankscope.errors import FormatError
from rankscope.formats.file_io import TensorFile

Q = "lora_unet_down_blocks_{}_attn1_to_out_0"


def kohya(path):
    tensors = {}
    for i in range(3):
        name, r = Q.format(i), 4 if i == 2 else 2
        tensors[f"{name}.lora_up.weight"] = normal(6, r).half()
        tensors[f"{name}.lora_down.weight"] = normal(r, 4).half()
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
        tensors[f"{name}.diff_b"] = normal(6)
    save_file(
        tensors, path, {"ss_network_module": "networks.lora", "ss_sd_model_name": "v1-5.ckpt", "ss_network_dim": "2"}
    )
    return path


def test_kohya(tmp_path):
    found = inspect(kohya(tmp_path / "k.safetensors"))
    assert (found.format, found.base, found.training) == ("kohya or LyCORIS file", "v1-5.ckpt", "networks.lora")
    rows = [(t.name, t.layers, t.shape, t.nominal_rank, t.alpha, t.scale, t.dtype, t.method) for t in found.targets]
    name = "lora_unet_down_blocks"
    assert name not in rows[0][0]
    assert rows == [("attn1_to_out", 2, (6, 4), 2, 1.0, 0.5, "float16", "lora"),
                    ("attn1_to_out", 1, (6, 4), 4, 1.0, 0.25, "float16", "lora")]  # fmt: skip
    assert found.parameters == 2 * 20 + 40 + 3 + 18
    assert found.dtypes == {"float16": 80, "float32": 21}
    assert found.size == (tmp_path / "k.safetensors").stat().st_size
    assert len(found.skipped) == 3
    assert any("another rank" in note for note in found.notes)
    assert Inspection.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_it_reads_no_factor(tmp_path, monkeypatch):
    path, adapter = kohya(tmp_path / "k.safetensors"), write_adapter(tmp_path / "a")
    read = []
    original = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, name: read.append(name) or original(self, name))
    inspect(path)
    inspect(adapter)
    assert {name.rpartition(".")[2] for name in read} == {"alpha"}


def test_peft_with_dora_patterns_and_a_base_that_is_named(tmp_path):
    tensors = {**linear("h.0.q"), **linear("h.1.q"), "base_model.model.score.weight": normal(2, 3)}
    tensors["base_model.model.h.1.q.lora_magnitude_vector"] = torch.ones(5)
    options = {"alpha_pattern": {"h.1.q": 3}, "use_dora": True, "base_model_name_or_path": "org/name"}
    found = inspect(write_adapter(tmp_path / "a", tensors, **options))
    assert (found.format, found.base, found.methods) == ("PEFT adapter", "org/name", ("lora", "dora-product"))
    assert [(t.name, t.alpha, t.scale) for t in found.targets] == [("q", 8.0, 4.0), ("q", 3.0, 1.5)]
    assert {one.name for one in found.skipped} == {"h.1.q:whole", "score.weight"}


def test_loralib_without_its_alpha(tmp_path):
    save_file({"q.lora_A": normal(2, 4), "q.lora_B": normal(6, 2)}, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x.safetensors")
    assert (found.targets[0].alpha, found.targets[0].scale, found.targets[0].nominal_rank) == (None, None, 2)
    assert "--alpha" in found.notes[0]
    assert inspect(tmp_path / "x.safetensors", alpha=6).targets[0].scale == 3.0


def test_full_weights_with_and_without_their_base(tmp_path):
    weights = {"a.weight": normal(3, 4).bfloat16(), "norm.weight": normal(4)}
    model = write_checkpoint(tmp_path / "m" / "model.safetensors", weights, {"model_type": "llama"}).parent
    alone = inspect(model)
    assert (alone.layers, alone.tensors, alone.parameters) == (0, 2, 16)
    assert "llama" in alone.says
    assert "--base" in alone.says
    assert alone.dtypes == {"bfloat16": 12, "float32": 4}
    shards = {"one.safetensors": {"a.weight": weights["a.weight"]}, "two.safetensors": {"norm.weight": normal(4)}}
    both = inspect(write_shards(tmp_path / "s", shards), base=model)
    assert (both.layers, both.tensors, both.parameters, both.methods) == (1, 2, 16, ("full",))
    assert both.size == sum(path.stat().st_size for path in (tmp_path / "s").glob("*.safetensors"))


def test_a_study_and_a_run_in_one_sentence(tmp_path):
    run = tmp_path / "study" / "runs" / "lora-r2"
    write_adapter(run / "adapter")
    (run / "run.json").write_text(json.dumps({"run": {"method": "lora", "rank": 2, "seed": 0}, "status": "done"}))
    (tmp_path / "study" / "runs" / "begun").mkdir()
    (tmp_path / "study" / "study.json").write_text("{}")
    assert inspect(tmp_path / "study").says.startswith("a study of 2 runs that have begun, 1 of them ended")
    found = inspect(run)
    assert found.says == "a run of a study: method lora, rank 2, seed 0; status done"
    assert found.layers == 1


def test_nothing_there(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        inspect(tmp_path / "nowhere")


PAGE = """\
path        {path}
is          kohya or LyCORIS file: 3 updates, lora
base        v1-5.ckpt
made by     networks.lora
numbers     101 in 12 tensors: 80 float16, 21 float32; {size} bytes
skipped     3 (lora_unet_down_blocks_0_attn1_to_out_0.diff_b, …): a change of a bias: one-dimensional, no spectrum
note        the metadata gives another rank than the tensors in 1 of 3 layers (first \
lora_unet_down_blocks_2_attn1_to_out_0: 2, in fact 4); the tensors are trusted, also for the scale

target        layers  out × in  r  α  scale   stored  method
attn1_to_out       2     6 × 4  2  1    0.5  float16    lora
attn1_to_out       1     6 × 4  4  1   0.25  float16    lora
"""


def test_the_command(tmp_path, capsys):
    path = kohya(tmp_path / "k.safetensors")
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(path)])
    assert ended.value.code == 0
    assert capsys.readouterr().out == PAGE.format(path=path, size=path.stat().st_size)
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(path), "--json"])
    assert json.loads(capsys.readouterr().out) == inspect(path).to_json()
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(tmp_path / "nowhere")])
    assert ended.value.code == 1


@pytest.mark.parametrize("key", ["model_type", "_name_or_path"])
def test_text_that_is_no_utf8_is_told_all_the_same(tmp_path, key):
    write_checkpoint(tmp_path / "model.safetensors", {"q.weight": torch.ones(2, 2)}, {key: "a\ud800"})
    assert "a\\\\ud800" in json.dumps(inspect(tmp_path).to_json())
