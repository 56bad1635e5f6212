"""Order of names, and partners among them."""

from __future__ import annotations

import random

import pytest

from rankscope.formats.names import module_names, natural_key, pair_names
from rankscope.formats.peft_keys import factor_keys, magnitude_key, parse_key

BERT = ["encoder.layer.0.q.weight", "encoder.layer.0.k.weight", "embeddings.word.weight"]


def test_layer_2_comes_before_layer_10():
    names = ["h.10.q", "h.2.q", "h.2.k", "h.1.v", "a", "h.x"]
    assert sorted(names, key=natural_key) == ["a", "h.1.v", "h.2.k", "h.2.q", "h.10.q", "h.x"]


def test_names_that_begin_with_numbers_compare_with_those_that_do_not():
    assert sorted(["b", "10.a", "2.a", ""], key=natural_key) == ["", "2.a", "10.a", "b"]


def test_numbers_of_any_length_are_ordered():
    names = ["h." + "9" * 6000, "h.1" + "0" * 6000, "h.007", "h.8"]
    assert sorted(names, key=natural_key) == ["h.007", "h.8", *names[:2]]


def test_equal_names_are_partners():
    pairing = pair_names(["b", "a", "x"], ["a", "b", "y"])
    assert pairing.pairs == [("a", "a"), ("b", "b")]
    assert (pairing.only_a, pairing.only_b) == (["x"], ["y"])


@pytest.mark.parametrize("prefix", ["bert.", "transformer.", "base_model.model."])
def test_one_wrapper_is_looked_through_on_either_side(prefix):
    wrapped = [prefix + name for name in BERT]
    down, up = pair_names([*wrapped, "classifier.weight"], BERT), pair_names(BERT, [*wrapped, "classifier.weight"])
    assert sorted(down.pairs) == sorted(zip(wrapped, BERT, strict=True))
    assert down.only_a == ["classifier.weight"]
    assert down.only_b == []
    assert sorted(up.pairs) == sorted(zip(BERT, wrapped, strict=True))
    assert up.only_b == ["classifier.weight"]


def test_equal_names_go_before_the_wrapper():
    pairing = pair_names(["m.a.w", "a.w", "m.b.w"], ["a.w", "b.w"])
    assert pairing.pairs == [("a.w", "a.w"), ("m.b.w", "b.w")]
    assert pairing.only_a == ["m.a.w"]


def test_the_prefix_that_pairs_most_wins_and_a_tie_pairs_nothing():
    most = pair_names(["enc.0.w", "enc.1.w", "dec.0.w"], ["0.w", "1.w"])
    assert most.pairs == [("enc.0.w", "0.w"), ("enc.1.w", "1.w")]
    tie = pair_names(["enc.0.w", "dec.0.w"], ["0.w"])
    assert tie.pairs == []
    assert tie.only_a == ["dec.0.w", "enc.0.w"]


def test_a_prefix_is_whole_components():
    assert pair_names(["embert.q"], ["bert.q"]).pairs == []


def test_nothing_in_common():
    pairing = pair_names(["a", "b"], ["c"])
    assert pairing == ([], ["a", "b"], ["c"])
    assert pair_names([], []) == ([], [], [])


def test_every_name_appears_once_and_the_sides_are_symmetric():
    rng = random.Random(0)
    for _ in range(200):
        a = {".".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(8)}
        b = {".".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(8)}
        found, mirrored = pair_names(a, b), pair_names(b, a)
        assert sorted([one for one, _ in found.pairs] + found.only_a) == sorted(a)
        assert sorted([other for _, other in found.pairs] + found.only_b) == sorted(b)
        assert {(y, x) for x, y in mirrored.pairs} == set(found.pairs)


def test_module_names_drop_weight_unless_it_would_collide():
    assert module_names(["a.weight", "pos", "b", "b.weight"]) == {
        "a.weight": "a",
        "pos": "pos",
        "b": "b",
        "b.weight": "b.weight",
    }


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv"])
def test_keys_that_are_written_are_the_keys_that_are_read(kind):
    keys = factor_keys("model.layers.0.q", kind)
    a, b = parse_key(keys.A), parse_key(keys.B)
    assert a is not None
    assert b is not None
    assert a.module == b.module == "model.layers.0.q"
    assert (a.part[-1], b.part[-1]) == ("A", "B")
    assert ("embedding" in a.part) == (kind == "embedding")
    assert a.leaf == ("" if kind == "embedding" else "weight")
    magnitude = parse_key(magnitude_key("model.layers.0.q"))
    assert magnitude is not None
    assert magnitude.part == "lora_magnitude_vector"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("base_model.model.a.lora_A.default.weight", ("a", "lora_A", "default", "weight")),
        ("a.b.lora_B.my.name.weight", ("a.b", "lora_B", "my.name", "weight")),
        ("a.lora_embedding_A.default", ("a", "lora_embedding_A", "default", "")),
        ("a.lora_B.bias", ("a", "lora_B", "", "bias")),
        ("a.lora_magnitude_vector.default.weight", ("a", "lora_magnitude_vector", "default", "weight")),
        ("a.lora_A", ("a", "lora_A", "", "")),
        ("a.weight", None),
        ("a.lora_C.weight", None),
    ],
)
def test_keys_are_taken_apart(key, expected):
    assert parse_key(key) == expected


MODEL = ["down_blocks.0.attn.to_q", "down_blocks.0.attn.to_k", "mid_block.attn.to_q"]


@pytest.mark.parametrize("front", ["lora_unet_", "lora_transformer_", "lycoris_", ""])
def test_names_with_underscores_meet_dotted_ones(front):
    raw = [front + name.replace(".", "_") for name in MODEL]
    assert sorted(pair_names(raw, MODEL).pairs) == sorted(zip(raw, MODEL, strict=True))
    weights = [f"{name}.weight" for name in MODEL]
    assert sorted(pair_names(weights, [f"{name}.weight" for name in raw]).pairs) == sorted(
        zip(weights, [f"{name}.weight" for name in raw], strict=True)
    )
    assert pair_names([f"{name}.bias" for name in raw], weights).pairs == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lora_unet_a_to_q", "unet.a.to_q"),
        ("lora_unet_a_to_q", "transformer.a.to_q"),
        ("lora_te_text_model_layers_0_fc1", "text_encoder.text_model.layers.0.fc1"),
        ("lora_te1_x_fc1", "text_encoder.x.fc1"),
        ("lora_te2_x_fc1", "text_encoder_2.x.fc1"),
        ("lora_unet_transformer_h_0_c_attn", "transformer.h.0.c_attn"),
        ("diffusion_model.a.b", "transformer.a.b"),
        ("base_model.model.a.b", "unet.a.b"),
    ],
)
def test_fronts_of_several_tools(one, other):
    for a, b in ((one, other), (other, one)):
        assert pair_names([a, "x.y.z"], [b, "u.v.w"]).pairs == [(a, b)]


def test_parts_of_a_pipeline_are_not_confused():
    pairing = pair_names(["lora_te1_x_fc1", "lora_te2_x_fc1"], ["text_encoder.x.fc1", "text_encoder_2.x.fc1"])
    assert pairing.pairs == [("lora_te1_x_fc1", "text_encoder.x.fc1"), ("lora_te2_x_fc1", "text_encoder_2.x.fc1")]
    assert pair_names(["lora_te1_x_fc1", "lora_te2_x_fc1"], ["x.fc1"]).pairs == []  # which of the two?
    assert pair_names(["lora_unet_x_fc1"], ["text_encoder.x.fc1"]).pairs == []


def test_what_is_ambiguous_stays_alone():
    assert pair_names(["lora_unet_a_b_c"], ["a.b_c", "a_b.c"]).pairs == []
    assert pair_names(["a.b_c"], ["a_b.c"]).pairs == []  # two dotted paths are two paths
