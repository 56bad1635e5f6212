"""Reading of PEFT folders: what is lazy, what is listed, what is refused. No PEFT needed."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch
from adapters import PREFIX, linear, normal, write_adapter, write_checkpoint
from safetensors.torch import load_file

from rankscope.errors import ConfigError, FormatError, NonFiniteError, RankscopeError
from rankscope.formats import store as formats
from rankscope.formats.file_io import TensorFile
from rankscope.updates import LowRank

A, B = f"{PREFIX}block.q.lora_A.weight", f"{PREFIX}block.q.lora_B.weight"


@pytest.fixture
def reads(monkeypatch):
    """Names of all tensors that are read from safetensors files."""
    seen: list[str] = []
    original = TensorFile.read

    def read(self, name):
        seen.append(name)
        return original(self, name)

    monkeypatch.setattr(TensorFile, "read", read)
    return seen


def test_opening_reads_no_tensor_and_one_name_reads_its_pair(tmp_path, reads):
    tensors = {**linear("h.10.q"), **linear("h.2.q", seed=1), f"{PREFIX}head.weight": normal(3, 3)}
    base = {f"{name}.weight": normal(5, 7) for name in ("h.10.q", "h.2.q")}
    origin = write_checkpoint(tmp_path / "base.safetensors", base)
    store = formats.open(write_adapter(tmp_path / "a", tensors), base=origin)
    assert store.names() == list(store) == ["h.2.q", "h.10.q"]
    assert len(store) == 2
    assert "h.2.q" in store
    assert "h.3.q" not in store
    assert store.info("h.2.q").shape == (5, 7)
    assert "h.2.q" in store._repr_html_()
    assert repr(store)
    assert reads == []
    update = store["h.2.q"]
    assert isinstance(update, LowRank)
    assert sorted(reads) == [f"{PREFIX}h.2.q.lora_A.weight", f"{PREFIX}h.2.q.lora_B.weight"]
    torch.testing.assert_close(update.dense(), 4 * tensors[reads[1]] @ tensors[reads[0]])


def test_the_weight_behind_an_update(tmp_path):
    origin = write_checkpoint(tmp_path / "base.safetensors", {"block.q.weight": normal(5, 7).half()})
    folder = write_adapter(tmp_path / "a")
    weight = formats.open(folder, base=origin).weight("block.q")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, normal(5, 7).half().float())
    with pytest.raises(FormatError, match=r"layer block\.q.*--base"):
        formats.open(folder).weight("block.q")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "."])
def test_a_file_of_the_folder_or_the_folder_or_the_run_open_the_same(tmp_path, name):
    folder = write_adapter(tmp_path / "run" / "adapter")
    assert formats.open(folder / name).names() == ["block.q"]
    assert formats.open(tmp_path / "run").names() == ["block.q"]
    assert formats.open(str(folder)).kind == "peft"


def test_bin_weights_give_the_same_update(tmp_path):
    safe, old = write_adapter(tmp_path / "safe"), tmp_path / "old"
    old.mkdir()
    shutil.copy(safe / "adapter_config.json", old)
    tensors = load_file(safe / "adapter_model.safetensors")
    torch.save(tensors, old / "adapter_model.bin")
    expected = formats.open(safe)["block.q"].dense()
    assert torch.equal(formats.open(old)["block.q"].dense(), expected)
    torch.save(tensors, old / "adapter_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(formats.open(old / "adapter_model.bin")["block.q"].dense(), expected)


class Payload:
    """A pickle that would leave a file behind, were it run."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, zipped):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    target = tmp_path / "was-run"
    payload = {A: normal(2, 7), "x": Payload(str(target))}
    torch.save(payload, folder / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError, match=r"adapter_model\.bin.*refused"):
        formats.open(folder)
    assert not target.exists()
    torch.load(folder / "adapter_model.bin", weights_only=False)  # the negative control: it does run if let
    assert target.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04garbage", b"\x80\x02garbage", b"\x80", b"}q\x00."])
def test_a_damaged_bin(tmp_path, content):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(FormatError, match=r"adapter_model\.bin"):
        formats.open(folder)


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {"a": {"b": torch.zeros(2)}}])
def test_a_bin_that_is_no_state_dict(tmp_path, content):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(content, folder / "adapter_model.bin")
    with pytest.raises(FormatError, match="flat dictionary"):
        formats.open(folder)


def test_an_unknown_name_is_a_key_error_that_helps(tmp_path):
    store = formats.open(write_adapter(tmp_path / "a"))
    with pytest.raises(KeyError) as caught:
        store["block.k"]
    assert isinstance(caught.value, RankscopeError)
    assert str(caught.value).startswith(str(tmp_path / "a"))
    assert "did you mean 'block.q'?" in str(caught.value)
    with pytest.raises(FormatError, match=r"it holds block\.q"):
        store.info("zzz")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_factors_of_any_float_type(tmp_path, dtype):
    tensors = {key: value.to(dtype) for key, value in linear("block.q").items()}
    store = formats.open(write_adapter(tmp_path / "a", tensors))
    assert store.info("block.q").dtype == dtype
    expected = 4 * tensors[B].double() @ tensors[A].double()
    torch.testing.assert_close(store["block.q"].dense(), expected.float())


def test_the_tensors_are_trusted_over_the_configuration(tmp_path):
    store = formats.open(write_adapter(tmp_path / "a", linear("block.q", r=3), r=16, lora_alpha=6))
    assert store.info("block.q").scale == 2
    assert store.info("block.q").nominal_rank == 3
    (note,) = store.notes
    assert "16, in fact 3" in note


def test_a_configuration_without_r_is_enough(tmp_path):
    store = formats.open(write_adapter(tmp_path / "a", r=..., use_rslora=True))
    assert store.info("block.q").scale == pytest.approx(8 / math.sqrt(2))
    assert store.notes == []


def test_what_is_not_analysed_is_listed(tmp_path):
    others = {
        f"{PREFIX}block.q.lora_B.bias": "lora_bias",
        f"{PREFIX}block.k.bias": "bias",
        f"{PREFIX}score.weight": "modules_to_save",
        f"{PREFIX}emb.token_adapter.trainable_tokens_delta": "token",
        f"{PREFIX}emb.base_layer.weight": "base weight",
        f"{PREFIX}block.q.lora_new_thing": "unknown",
        f"{PREFIX}block.v.lora_magnitude_vector": "without factors",
    }
    tensors = {**linear("block.q"), **{key: normal(3) for key in others}}
    store = formats.open(write_adapter(tmp_path / "a", tensors, use_dora=True))
    found = {skip.name: skip.reason for skip in store.skipped}
    assert found.keys() == {key.removeprefix(PREFIX).removesuffix(".lora_magnitude_vector") for key in others}
    for key, word in others.items():
        assert word in found[key.removeprefix(PREFIX).removesuffix(".lora_magnitude_vector")]
    assert store.names() == ["block.q"]


@pytest.mark.parametrize("gone", ["A", "B", "embedding_A", "embedding_B"])
def test_half_of_a_pair_is_an_error(tmp_path, gone):
    stem = "lora_embedding_" if "embedding" in gone else "lora_"
    tail = "" if "embedding" in gone else ".weight"
    tensors = {f"{PREFIX}x.{stem}{half}{tail}": normal(2, 2, seed=ord(half)) for half in "AB"}
    del tensors[f"{PREFIX}x.lora_{gone}{tail}"]
    with pytest.raises(FormatError, match=rf"layer x: half of the pair is missing.*lora_{gone} is not"):
        formats.open(write_adapter(tmp_path / "a", tensors))


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [
        ((2, 7), (5, 3)),  # do not multiply
        ((7, 2), (2, 5)),  # both transposed, or swapped
        ((2,), (5, 2)),
        ((2, 7), ()),
        ((0, 7), (5, 0)),
        ((2, 0), (5, 2)),
        ((2, 7, 1), (5, 2)),
        ((2, 7, 3), (5, 2, 3)),
        ((4, 7, 3), (5, 2, 1)),  # five outputs in two groups
        ((2, 7, 1, 1, 1, 1), (5, 2, 1, 1, 1, 1)),
    ],
)
def test_factors_that_do_not_fit(tmp_path, shape_a, shape_b):
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors: layer block\.q: A "):
        formats.open(write_adapter(tmp_path / "a", {A: torch.ones(shape_a), B: torch.ones(shape_b)}))


def test_factors_of_integers(tmp_path):
    with pytest.raises(FormatError, match="floating-point"):
        formats.open(write_adapter(tmp_path / "a", {A: torch.ones(2, 7, dtype=torch.int32), B: normal(5, 2)}))


@pytest.mark.parametrize("key", [A, B])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_factors_name_file_and_layer(tmp_path, key, value):
    tensors = linear("block.q")
    tensors[key][0, 0] = value
    store = formats.open(write_adapter(tmp_path / "a", tensors))
    with pytest.raises(NonFiniteError, match=r"a: layer block\.q: .*1 values"):
        store["block.q"]


def test_two_adapters_in_one_file(tmp_path):
    tensors = {key.replace(".weight", ".one.weight"): value for key, value in linear("block.q").items()}
    other = {key.replace(".weight", ".two.weight"): value for key, value in linear("block.k").items()}
    with pytest.raises(FormatError, match="'one', 'two'"):
        formats.open(write_adapter(tmp_path / "a", {**tensors, **other}))
    with pytest.raises(FormatError, match="twice"):
        formats.open(write_adapter(tmp_path / "b", {**tensors, **linear("block.q")}))


def test_both_kinds_of_factors_for_one_module(tmp_path):
    both = {**linear("e"), f"{PREFIX}e.lora_embedding_A": normal(2, 7), f"{PREFIX}e.lora_embedding_B": normal(5, 2)}
    with pytest.raises(FormatError, match="which are meant"):
        formats.open(write_adapter(tmp_path / "a", both))


@pytest.mark.parametrize("tensors", [{}, {f"{PREFIX}score.weight": torch.ones(2, 2)}])
def test_no_layer_at_all(tmp_path, tensors):
    with pytest.raises(FormatError, match="no LoRA layer"):
        formats.open(write_adapter(tmp_path / "a", tensors))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": ...}, "has no lora_alpha"),
        ({"lora_alpha": None}, "has no lora_alpha"),
        ({"lora_alpha": "16"}, "Expected `float`, got `str` - at `$.lora_alpha`"),
        ({"lora_alpha": math.nan}, "is nan"),
        ({"lora_alpha": 10**400}, "adapter_config.json"),
        ({"alpha_pattern": {"q": math.inf}}, "is inf"),
        ({"alpha_pattern": ["q"]}, "alpha_pattern"),
        ({"rank_pattern": {"q": "8"}}, "rank_pattern"),
        ({"rank_pattern": {"(": 8}}, "not a valid pattern"),
        ({"r": "8"}, "Expected `int | null`, got `str` - at `$.r`"),
        ({"peft_type": "NEWLORA"}, "peft_type NEWLORA is not read: no method of that name is known"),
        ({"peft_type": "PREFIX_TUNING"}, "changes no weight"),
        ({"peft_type": ["LORA"]}, "no method of that name"),
        ({"peft_type": ...}, "has no peft_type"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
    ],
)
def test_configurations_that_are_refused(tmp_path, config, message):
    with pytest.raises(FormatError) as caught:
        formats.open(write_adapter(tmp_path / "a", **config))
    assert str(caught.value).startswith(str(tmp_path / "a" / "adapter_config.json"))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", "[" * 100_000, '{"a":' * 100_000, "\udcff"])
def test_configurations_that_are_no_json_object(tmp_path, text):
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match=r"adapter_config\.json"):
        formats.open(folder)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "OLoRA"])
def test_inits_that_move_the_base(tmp_path, init):
    (note,) = formats.open(write_adapter(tmp_path / "a", init_lora_weights=init)).notes
    assert init in note


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_do_not(tmp_path, init):
    assert formats.open(write_adapter(tmp_path / "a", init_lora_weights=init)).notes == []


def test_a_base_that_does_not_fit(tmp_path):
    folder = write_adapter(tmp_path / "a")
    other = write_checkpoint(tmp_path / "other.safetensors", {"elsewhere.weight": normal(5, 7)})
    with pytest.raises(FormatError, match=r"other\.safetensors: has no weight for any of the layers block\.q"):
        formats.open(folder, base=other)
    small = write_checkpoint(tmp_path / "small.safetensors", {"block.q.weight": normal(5, 6)})
    with pytest.raises(FormatError, match=r"block\.q\.weight is 5 × 6, but the update of block\.q is 5 × 7"):
        formats.open(folder, base=small)
    packed = write_checkpoint(tmp_path / "packed.safetensors", {"block.q.weight": torch.ones(5, 7).to(torch.uint8)})
    with pytest.raises(FormatError, match="uint8"):
        formats.open(folder, base=packed)


def test_dora_errors(tmp_path):
    magnitude = {f"{PREFIX}block.q.lora_magnitude_vector": torch.ones(7)}
    with pytest.raises(FormatError, match=r"layer block\.q: its magnitude is \(7,\).*needs 5"):
        formats.open(write_adapter(tmp_path / "a", {**linear("block.q"), **magnitude}))
    bad = {f"{PREFIX}block.q.lora_magnitude_vector": torch.full((5,), math.nan)}
    folder = write_adapter(tmp_path / "b", {**linear("block.q"), **bad}, use_dora=True)
    origin = write_checkpoint(tmp_path / "base.safetensors", {"model.block.q.weight": normal(5, 7)})
    store = formats.open(folder, base=origin)
    assert store["block.q"].shape == (5, 7)
    with pytest.raises(NonFiniteError, match=r"layer block\.q:whole: the magnitude"):
        store["block.q:whole"]


def test_dora_layer_that_the_base_lacks_is_listed(tmp_path):
    tensors = {**linear("q"), **linear("k", seed=3)}
    tensors.update({f"{PREFIX}{name}.lora_magnitude_vector": torch.ones(5) for name in "qk"})
    origin = write_checkpoint(tmp_path / "base.safetensors", {"q.weight": normal(5, 7)})
    store = formats.open(write_adapter(tmp_path / "a", tensors, use_dora=True), base=origin)
    assert store.names() == ["k", "q", "q:whole"]
    assert [skip.name for skip in store.skipped] == ["k:whole"]


def test_a_base_with_a_wrapper_in_front(tmp_path):
    origin = write_checkpoint(tmp_path / "base.safetensors", {"model.block.q.weight": normal(5, 7)})
    assert torch.equal(formats.open(write_adapter(tmp_path / "a"), base=origin).weight("block.q"), normal(5, 7))


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta:x"])
def test_a_device_that_does_not_exist(tmp_path, device):
    with pytest.raises(ConfigError, match="cannot be used"):
        formats.open(write_adapter(tmp_path / "a"), device=device)


def test_names_are_escaped_in_the_notebook_view(tmp_path):
    folder = write_adapter(tmp_path / "a", {**linear("<script>"), f"{PREFIX}<b>.bias": normal(2)})
    view = formats.open(folder)._repr_html_()
    assert "<script>" not in view
    assert "<b>.bias" not in view
    assert "&lt;script&gt;" in view


def test_many_layers_are_cut_in_the_notebook_view(tmp_path):
    tensors = {key: value for i in range(50) for key, value in linear(f"h.{i}", 2, 2, 1, seed=i).items()}
    view = formats.open(write_adapter(tmp_path / "a", tensors))._repr_html_()
    assert view.count("<tr>") == 41
    assert "10 more" in view


def test_no_key_of_the_configuration_is_lost_on_us(tmp_path):
    """Unknown keys, as each release of PEFT adds, do not disturb."""
    folder = write_adapter(tmp_path / "a", **{f"future_{i}": {"deep": [i]} for i in range(20)})
    assert "future_3" in json.loads((folder / "adapter_config.json").read_text())
    assert formats.open(folder).names() == ["block.q"]
