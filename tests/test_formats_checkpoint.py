"""Full checkpoints minus their base, files of updates, and what ``open`` makes of a path."""

from __future__ import annotations

import gc
import json
import os
import re
import weakref
from pathlib import Path

import pytest
import torch
from adapters import linear, normal, write_adapter, write_checkpoint, write_shards
from damage import make_sources

from rankscope import updates
from rankscope.errors import FormatError, NonFiniteError, ShapeError
from rankscope.formats import store as formats
from rankscope.formats.checkpoint import Checkpoint
from rankscope.formats.file_io import TensorFile
from rankscope.linalg import ulp
from rankscope.updates import Dense

BASE = {
    "layers.10.q.weight": normal(5, 7, seed=1),
    "layers.2.q.weight": normal(5, 7, seed=2),
    "conv.weight": normal(6, 4, 3, 3, seed=3),
    "norm.weight": normal(7, seed=4),
}
TUNED = {name: value + 0.5 * normal(*value.shape, seed=9) for name, value in BASE.items()}


@pytest.fixture
def base(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "base" / "model.safetensors", BASE).parent


def test_matrices_and_kernels_are_updates_the_rest_is_listed(tmp_path, base):
    extra = {"head.weight": normal(2, 7), "ids": torch.arange(4).reshape(2, 2), "stack": normal(2, 3, 4)}
    more = {**TUNED, **extra, "q8": normal(3, 3).to(torch.float8_e4m3fn)}
    write_checkpoint(base / "model.safetensors", {**BASE, **extra, "q8": more["q8"], "old.weight": normal(2, 2)})
    del more["head.weight"]
    more["new.weight"] = normal(2, 2)
    store = formats.open(write_checkpoint(tmp_path / "tuned.safetensors", more), base=base)
    assert store.kind == "checkpoint"
    assert store.names() == ["conv", "layers.2.q", "layers.10.q"]
    skipped = {skip.name: skip.reason for skip in store.skipped}
    assert skipped.keys() == {"norm.weight", "ids", "stack", "q8", "new.weight", "old.weight", "head.weight"}
    assert skipped["norm.weight"] == "one-dimensional: no spectrum"
    assert "int64" in skipped["ids"]
    assert "(2, 3, 4)" in skipped["stack"]
    assert "float8" in skipped["q8"]
    assert "not in the base" in skipped["new.weight"]
    assert skipped["old.weight"] == skipped["head.weight"] == "only in the base"
    for name in store:
        update = store[name]
        expected = TUNED[f"{name}.weight"] - BASE[f"{name}.weight"]
        assert isinstance(update, Dense)
        assert torch.equal(update.dense(), expected.flatten(1))
        assert store.info(name).shape == update.shape
        assert torch.equal(store.weight(name), BASE[f"{name}.weight"].flatten(1))


def test_opening_reads_headers_and_one_name_reads_one_pair(tmp_path, base, monkeypatch):
    seen = []
    monkeypatch.setattr(TensorFile, "read", lambda self, name: pytest.fail(f"{name} was mapped"))
    original = TensorFile.read_rows
    monkeypatch.setattr(
        TensorFile, "read_rows", lambda self, name, a, b: seen.append(name) or original(self, name, a, b)
    )
    store = formats.open(write_checkpoint(tmp_path / "tuned.safetensors", TUNED), base=base)
    assert (store.names(), len(store), store.info("conv").dtype) == (sorted(store, key=len), 3, torch.float32)
    assert seen == []
    store["conv"]
    assert seen == ["conv.weight"] * 2


def test_a_zero_update_is_an_update(base):
    store = formats.open(base, base=base)
    assert len(store) == 3
    assert all(store[name].energy == 0 for name in store)


@pytest.mark.parametrize("wrapped", ["tuned", "base"])
def test_a_wrapper_in_front_of_the_names(tmp_path, wrapped):
    ours, theirs = ("bert.", "") if wrapped == "tuned" else ("", "transformer.")
    tuned = write_checkpoint(tmp_path / "t.safetensors", {ours + name: value for name, value in TUNED.items()})
    origin = write_checkpoint(tmp_path / "b.safetensors", {theirs + name: value for name, value in BASE.items()})
    store = formats.open(tuned, base=origin)
    assert store.names() == [f"{ours}{name}" for name in ("conv", "layers.2.q", "layers.10.q")]
    expected = (TUNED["layers.2.q.weight"] - BASE["layers.2.q.weight"]).norm()
    assert store[f"{ours}layers.2.q"].norm == pytest.approx(float(expected))


def test_half_precision_is_cast_before_the_subtraction(tmp_path):
    """The difference of two bfloat16 weights is exact in float32 and would be rounded again in bfloat16."""
    start = normal(16, 16).bfloat16()
    end = (start.float() * (1 + 0.01 * normal(16, 16, seed=1))).bfloat16()
    tuned = write_checkpoint(tmp_path / "t.safetensors", {"q.weight": end})
    origin = write_checkpoint(tmp_path / "b.safetensors", {"q.weight": start.float()})
    update = formats.open(tuned, base=origin)["q"]
    assert torch.equal(update.dense(), end.float() - start.float())
    assert update.stored == torch.bfloat16
    assert update.rounding > 0


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight", "wte.weight"])
@pytest.mark.parametrize("rows", [(12, 9), (9, 12)])
def test_vocabularies_of_different_size_compare_the_common_rows(tmp_path, name, rows):
    whole = normal(12, 4)
    tuned = write_checkpoint(tmp_path / "t.safetensors", {name: whole[: rows[0]] + 1})
    origin = write_checkpoint(tmp_path / "b.safetensors", {name: whole[: rows[1]]})
    store = formats.open(tuned, base=origin)
    module = name.removesuffix(".weight")
    assert store.info(module).shape == store[module].shape == store.weight(module).shape == (9, 4)
    torch.testing.assert_close(store[module].dense(), torch.ones(9, 4))
    assert f"{rows[0]} rows, {rows[1]} in the base; the first 9" in store.notes[0]


def test_other_shape_mismatches_are_listed_with_both_shapes(tmp_path):
    tuned = {"q.weight": normal(5, 7), "k.weight": normal(5, 7), "embed.weight": normal(9, 4)}
    origin = {"q.weight": normal(6, 7), "k.weight": normal(5, 7), "embed.weight": normal(9, 5)}
    store = formats.open(
        write_checkpoint(tmp_path / "t.safetensors", tuned), base=write_checkpoint(tmp_path / "b.safetensors", origin)
    )
    assert store.names() == ["k"]
    reasons = {skip.name: skip.reason for skip in store.skipped}
    assert reasons["q.weight"] == "its shape is (5, 7), that in the base (6, 7)"
    assert "(9, 4)" in reasons["embed.weight"]


def test_nothing_in_common_names_both_sides(tmp_path):
    tuned = write_checkpoint(tmp_path / "t.safetensors", {"a.weight": normal(2, 2)})
    origin = write_checkpoint(tmp_path / "b.safetensors", {"b.weight": normal(2, 2)})
    with pytest.raises(FormatError, match=r"shares no weight with the base .*a\.weight.*b\.weight"):
        formats.open(tuned, base=origin)
    vector = write_checkpoint(tmp_path / "v.safetensors", {"a.weight": normal(2)})
    with pytest.raises(FormatError, match=r"shares no matrix.*one-dimensional"):
        formats.open(vector, base=vector)


def test_non_finite_weights_name_file_and_layer(tmp_path, base):
    bad = {**TUNED, "layers.2.q.weight": torch.full((5, 7), float("nan"))}
    store = formats.open(write_checkpoint(tmp_path / "t.safetensors", bad), base=base)
    assert store["layers.10.q"].shape == (5, 7)
    with pytest.raises(NonFiniteError, match=r"t\.safetensors: layer layers\.2\.q: .*35 values"):
        store["layers.2.q"]


# --- GPT-2 stores its projections (in, out) ---


def gpt2(prefix: str = "", scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}h.0.attn.c_attn.weight": normal(4, 12, seed=1) * scale,
        f"{prefix}h.0.attn.c_proj.weight": normal(4, 4, seed=2) * scale,
        f"{prefix}h.0.mlp.c_fc.weight": normal(4, 16, seed=3) * scale,
        f"{prefix}h.0.mlp.c_proj.weight": normal(16, 4, seed=4) * scale,
        f"{prefix}wte.weight": normal(9, 4, seed=5) * scale,
    }


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {}, None])
def test_gpt2_projections_are_turned_to_out_in(tmp_path, config):
    """The widening c_attn shows it even without config.json; the embedding stays as it is."""
    tuned = write_checkpoint(tmp_path / "t" / "model.safetensors", gpt2("transformer.", 1.5), config)
    origin = write_checkpoint(tmp_path / "b" / "model.safetensors", gpt2(), config)
    store = formats.open(tuned.parent, base=origin.parent)
    for name in store:
        stored = gpt2("transformer.", 0.5)[f"{name}.weight"]
        turned = stored if name.endswith("wte") else stored.T
        torch.testing.assert_close(store[name].dense(), turned)
        assert store.info(name).shape == turned.shape
        torch.testing.assert_close(store.weight(name), 2 * turned)


def test_linear_layers_of_the_same_names_stay(tmp_path):
    """nanoGPT calls ordinary layers c_attn and c_proj: (out, in) already."""
    weights = {name: value if "wte" in name else value.T.contiguous() for name, value in gpt2().items()}
    path = write_checkpoint(tmp_path / "model.safetensors", weights, {"model_type": "gpt2"})
    checkpoint = Checkpoint(path)
    assert checkpoint.conv1d is False
    for name, value in weights.items():
        assert torch.equal(checkpoint.matrix(name), value)


@pytest.mark.parametrize(("kind", "turned"), [("gpt2", True), ("imagegpt", True), ("llama", False)])
def test_without_a_widening_weight_the_model_type_decides(tmp_path, kind, turned):
    weight = {"h.0.attn.c_proj.weight": normal(4, 4)}
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "model.safetensors", weight, {"model_type": kind}))
    found = checkpoint.matrix("h.0.attn.c_proj.weight")
    assert torch.equal(found, normal(4, 4).T if turned else normal(4, 4))


def test_one_side_tells_the_other_how_it_is_stored(tmp_path):
    """A file with only the square projection shows nothing itself; its base does."""
    part = {"h.0.attn.c_proj.weight": normal(4, 4, seed=7)}
    tuned = write_checkpoint(tmp_path / "part.safetensors", part)
    store = formats.open(tuned, base=write_checkpoint(tmp_path / "b.safetensors", gpt2()))
    expected = normal(4, 4, seed=7) - gpt2()["h.0.attn.c_proj.weight"]
    assert torch.equal(store["h.0.attn.c_proj"].dense(), expected.T)


def test_adapter_on_gpt2_finds_its_base(tmp_path):
    name = "transformer.h.0.mlp.c_fc"
    folder = write_adapter(tmp_path / "a", linear(name, out=16, n=4), fan_in_fan_out=True)
    store = formats.open(folder, base=write_checkpoint(tmp_path / "b.safetensors", gpt2()))
    assert torch.equal(store.weight(name), gpt2()["h.0.mlp.c_fc.weight"].T)


# --- shards ---


def test_shards_equal_one_file(tmp_path, base):
    names = sorted(TUNED)
    shards = {
        "model-00001-of-00002.safetensors": {name: TUNED[name] for name in names[:2]},
        "model-00002-of-00002.safetensors": {name: TUNED[name] for name in names[2:]},
    }
    folder = write_shards(tmp_path / "sharded", shards)
    single = formats.open(write_checkpoint(tmp_path / "t.safetensors", TUNED), base=base)
    for path in (folder, folder / "model.safetensors.index.json"):
        store = formats.open(path, base=base)
        assert store.names() == single.names()
        assert all(torch.equal(store[name].dense(), single[name].dense()) for name in store)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "sub/../../secret.safetensors", "{absolute}", "link", ""])
def test_a_shard_outside_the_folder_is_refused(tmp_path, base, shard):
    secret = write_checkpoint(tmp_path / "secret.safetensors", {"x.weight": normal(2, 2)})
    folder = write_shards(tmp_path / "m", {"a.safetensors": TUNED}, **{"x.weight": shard.format(absolute=secret)})
    (folder / "link").symlink_to(secret)
    with pytest.raises(FormatError, match=r"index\.json: names the shard .* outside its folder; refused"):
        formats.open(folder, base=base)


def test_an_absolute_shard_inside_the_folder_is_refused_too(tmp_path, base):
    folder = write_shards(tmp_path / "m", {"a.safetensors": TUNED})
    inside = str(folder / "a.safetensors")
    write_shards(folder, {"a.safetensors": TUNED}, **{"conv.weight": inside})
    with pytest.raises(FormatError, match="refused"):
        formats.open(folder, base=base)


def test_links_of_the_hubs_cache_are_followed(tmp_path, base):
    """models--x/snapshots/<revision>/ holds links into models--x/blobs/."""
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "rev"
    write_shards(blobs, {"a.safetensors": TUNED})
    snapshot.mkdir(parents=True)
    for name in ("a.safetensors", "model.safetensors.index.json"):
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, snapshot))
    assert len(formats.open(snapshot, base=base)) == 3
    (snapshot / "model.safetensors.index.json").unlink()  # an index may use the links, not go there by itself
    write_shards(snapshot, {}, **dict.fromkeys(TUNED, "../../blobs/a.safetensors"))
    with pytest.raises(FormatError, match="refused"):
        formats.open(snapshot, base=base)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": ["a"]}, "no weight_map"),
        ({"weight_map": {"a": 3}}, "no weight_map"),
        ({"weight_map": {}}, "holds no tensors"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: no such file"),
        ({"weight_map": {"a": "x.safetensors"}}, "says that a is in x.safetensors"),
        ({"weight_map": {"a": "."}}, "cannot be read"),
        ({"weight_map": {"a": "\0"}}, "refused"),
        ({"weight_map": {"a": "n" * 5000}}, "no such file"),
    ],
)
def test_an_index_that_lies(tmp_path, base, index, message):
    folder = tmp_path / "m"
    write_checkpoint(folder / "x.safetensors", {"b": normal(2, 2)})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=re.escape(message)):
        formats.open(folder, base=base)


def test_pytorch_bin_checkpoints(tmp_path, base):
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(TUNED, folder / "pytorch_model.bin")
    store = formats.open(folder, base=base)
    assert torch.equal(store["conv"].dense(), (TUNED["conv.weight"] - BASE["conv.weight"]).flatten(1))


# --- files of updates ---


def test_updates_come_back_as_they_were_written(tmp_path):
    updates = {"h.10.q": normal(5, 7), "h.2.q": normal(5, 7, seed=1).T}
    formats.write_updates(tmp_path / "run" / "update.safetensors", updates, {"seed": "3"})
    for path in (tmp_path / "run", tmp_path / "run" / "update.safetensors"):
        store = formats.open(path)
        assert store.kind == "update"
        assert store.names() == ["h.2.q", "h.10.q"]
        assert all(torch.equal(store[name].dense(), updates[name]) for name in store)
        assert all(store[name].rounding == 0 for name in store)
    assert TensorFile(tmp_path / "run" / "update.safetensors").metadata["seed"] == "3"


def test_updates_know_their_base_where_it_is_given(tmp_path, base):
    formats.write_updates(tmp_path / "update.safetensors", {"layers.2.q": normal(5, 7)})
    store = formats.open(tmp_path / "update.safetensors", base=base)
    assert torch.equal(store.weight("layers.2.q"), BASE["layers.2.q.weight"])
    with pytest.raises(FormatError, match="base"):
        formats.open(tmp_path / "update.safetensors").weight("layers.2.q")


def test_changes_that_are_no_matrix_are_written_and_listed(tmp_path):
    updates = {"q": normal(2, 2), "q.bias": normal(2), "conv": normal(2, 2, 3, 3)}
    formats.write_updates(tmp_path / "update.safetensors", updates)
    store = formats.open(tmp_path)
    assert store.names() == ["q"]
    assert {skip.name: skip.reason for skip in store.skipped} == {
        "q.bias": "one-dimensional: no spectrum",
        "conv": "4-dimensional",
    }


def test_updates_of_integers_are_refused(tmp_path):
    with pytest.raises(ShapeError, match="q: an update holds floating-point numbers"):
        formats.write_updates(tmp_path / "update.safetensors", {"q": torch.ones(2, 2, dtype=torch.int64)})
    assert list(tmp_path.iterdir()) == []


def test_updates_without_the_tag_or_without_a_matrix(tmp_path):
    path = write_checkpoint(tmp_path / "update.safetensors", {"q": normal(2, 2)})
    with pytest.raises(FormatError, match="not a file of updates"):
        formats.open(tmp_path)
    formats.write_updates(path, {})
    with pytest.raises(FormatError, match="holds no update"):
        formats.open(tmp_path)


# --- what open makes of a path ---


def test_full_weights_need_a_base(base):
    with pytest.raises(FormatError, match=r"full weights; say with --base"):
        formats.open(base)


def test_the_base_may_be_missing_or_empty(tmp_path, base):
    with pytest.raises(FormatError, match="nowhere: no such file or folder"):
        formats.open(base, base=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"looked for model\.safetensors"):
        formats.open(base, base=tmp_path / "empty")


def test_paths_that_hold_nothing_known(tmp_path):
    with pytest.raises(FormatError, match="gone: no such file or folder"):
        formats.open(tmp_path / "gone")
    with pytest.raises(FormatError, match=r"is empty; looked for adapter_config\.json"):
        formats.open(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FormatError, match=r"nothing that is known; looked for adapter_config\.json"):
        formats.open(tmp_path)
    with pytest.raises(FormatError, match="not a kind of file"):
        formats.open(tmp_path / "notes.txt")
    with pytest.raises(FormatError, match="cannot be read"):
        formats.open(tmp_path / ("n" * 5000))
    with pytest.raises(FormatError, match="no such file"):
        formats.open("a\0b")


def test_an_adapter_that_lost_its_configuration(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"no adapter_config\.json, which holds its scale"):
        formats.open(folder)
    (folder / "adapter_model.safetensors").rename(folder / "lora.safetensors")
    with pytest.raises(FormatError, match="factors of an adapter, but not its scale"):
        formats.open(folder / "lora.safetensors")


def test_an_adapter_that_lost_its_weights(tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        formats.open(folder)


def test_a_study_points_to_a_run_that_has_an_update(tmp_path):
    (tmp_path / "runs" / "base-s0").mkdir(parents=True)
    write_adapter(tmp_path / "runs" / "lora-r4" / "adapter")
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(FormatError, match=r"is a study.*lora-r4"):
        formats.open(tmp_path)


def test_several_weight_files_without_an_index(tmp_path, base):
    for name in ("a", "b"):
        write_checkpoint(tmp_path / "m" / f"{name}.safetensors", TUNED)
    with pytest.raises(FormatError, match=r"2 weight files and no index \(a\.safetensors, b\.safetensors"):
        formats.open(tmp_path / "m", base=base)
    (tmp_path / "m" / "b.safetensors").unlink()
    assert len(formats.open(tmp_path / "m", base=base)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("entries", [1, 25, 10**6])
def test_blocks_of_rows_make_the_same_update(tmp_path, monkeypatch, dtype, entries):
    """Of ordinary weights, convolutions, Conv1D (stored in × out), and a vocabulary that grew."""
    shapes = {
        "fc.weight": (13, 9),
        "conv.weight": (5, 3, 2, 2),
        "h.0.attn.c_attn.weight": (8, 24),
        "wte.weight": (11, 8),
    }
    base = {name: normal(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(shapes.items())}
    tuned = {name: (w.double() + 1e-2 * normal(*w.shape, seed=9)).to(dtype) for name, w in base.items()}
    tuned["wte.weight"] = torch.cat((tuned["wte.weight"], tuned["wte.weight"][:2]))
    monkeypatch.setattr(updates, "BLOCK", entries)
    origin = write_checkpoint(tmp_path / "base.safetensors", base)
    store = formats.open(write_checkpoint(tmp_path / "tuned.safetensors", tuned), base=origin)
    assert len(store) == 4
    for name in store:
        a, b = tuned[f"{name}.weight"].flatten(1).float(), base[f"{name}.weight"].flatten(1).float()
        expected = a[: len(b)] - b
        assert torch.equal(store[name].dense(), expected.T if "c_attn" in name else expected)
        assert store[name].stored == dtype
        steps = ulp(tuned[f"{name}.weight"].flatten(1)[: len(b)], dtype).double() if dtype == torch.bfloat16 else 0 * b
        assert store[name].rounding == pytest.approx(float(steps.double().square().mean() / 12) ** 0.5, rel=1e-12)


def test_a_file_that_changes_after_it_was_opened(tmp_path, base):
    path = write_checkpoint(tmp_path / "tuned.safetensors", TUNED)
    store = formats.open(path, base=base)
    store["conv"]
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(FormatError, match="ends within a tensor"):
        [store[name] for name in store]
    again = formats.open(write_checkpoint(tmp_path / "other.safetensors", TUNED), base=base)
    write_checkpoint(tmp_path / "other.safetensors", {"norm.weight": TUNED["norm.weight"]})
    with pytest.raises(FormatError, match="has changed since it was opened"):
        again["conv"]


KINDS = ("a", "b", "dora", "pissa", "old", "kohya", "lycoris", "diffusers", "loralib", "tuned", "updates")


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_goes_with_its_last_use(kind: str, tmp_path: Path) -> None:
    """It would keep its file mapped: nothing of it may wait for Python to look for cycles."""
    make_sources(tmp_path)
    path = tmp_path / kind
    path = path / "lora.safetensors" if (path / "lora.safetensors").exists() else path
    gc.collect()
    gc.disable()
    try:
        store = formats.open(path, tmp_path / "base", alpha=2)
        assert [store[name] for name in store.names()]
        gone = weakref.ref(store)
        del store
        assert gone() is None
    finally:
        gc.enable()
