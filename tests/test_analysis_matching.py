"""Layers paired across names, formats and fused projections: the same matrices are found equal."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from adapters import PREFIX, write_adapter, write_checkpoint
from makers import float64, normal, planted, planted_dense
from safetensors.torch import save_file

from rankscope import cli
from rankscope.analysis.comparison import compare
from rankscope.analysis.matching import match_layers
from rankscope.analysis.sources import Source
from rankscope.errors import ConfigError, RankscopeError
from rankscope.structured import Kronecker
from rankscope.updates import Dense, LowRank

ROWS = (6, 2, 2)  # of q, k and v: grouped queries


def fused_and_split(dense: bool = False):
    """One update of 10 × 5, and the updates of its blocks of rows."""
    whole = planted((sum(ROWS), 5), [3, 1]) * 2.0
    cuts = np.cumsum((0, *ROWS))
    parts = [LowRank(whole.B[i:j], whole.A, 2.0) for i, j in itertools.pairwise(cuts)]
    return (Dense(whole.dense(), torch.bfloat16, 1e-6) if dense else whole), parts


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("fused", "split"),
    [
        ("h.0.attn.qkv_proj", "h.0.attn.{}_proj"),
        ("h.0.attn.c_attn", "h.0.attn.{}_proj"),
        ("h.0.attn.in_proj_weight", "h.0.attn.{}"),
        ("h.0.attn.qkv", "wrapper.h.0.attn.to_{}"),
        ("lora_unet_h_0_attn_qkv", "h.0.attn.to_{}"),
        ("qkv_proj", "{}_proj"),
    ],
)
def test_a_fused_projection_is_its_blocks(fused, split, dense):
    whole, parts = fused_and_split(dense)
    names = [split.format(part) for part in "qkv"]
    a, b = {fused: whole, "only": whole}, dict(zip(names, parts, strict=True))
    for left, right in ((a, b), (b, a)):
        result = compare(left, right)
        assert len(result.layers) == 3
        assert sorted(layer.shape[0] for layer in result.layers) == sorted(ROWS)
        for layer in result.layers:
            assert layer.cosine == pytest.approx(1, abs=1e-6)
            assert layer.relative_difference == pytest.approx(0, abs=1e-3)
        assert set(result.unmatched.a) | set(result.unmatched.b) == {"only"}
        pairs = {tuple(sorted((layer.name, layer.name_b))) for layer in result.layers}
        assert pairs == {tuple(sorted((f"{fused}:{p}", n))) for p, n in zip("qkv", names, strict=True)}


def test_the_order_is_q_k_v_and_rows_are_exact():
    whole, parts = fused_and_split(dense=True)
    matched = match_layers(Source.of({"m.qkv": whole}), Source.of(dict(zip(["m.q", "m.k", "m.v"], parts, strict=True))))
    for part, update in zip("qkv", parts, strict=True):
        block = matched.a.read(f"m.qkv:{part}")
        np.testing.assert_allclose(block.dense().numpy(), float64(update), atol=1e-6)
        assert (block.stored, block.rounding) == (torch.bfloat16, 1e-6)  # how coarsely it was stored goes along
    one, other = planted_dense((2, 2), [2, 1], 1), planted_dense((5, 3), [2, 1], 2)
    kron = Kronecker(one, other)
    parts = [Dense(kron.dense()[i:j]) for i, j in ((0, 4), (4, 7), (7, 10))]
    result = compare({"m.qkv": kron}, dict(zip(["m.q", "m.k", "m.v"], parts, strict=True)))
    assert all(layer.cosine == pytest.approx(1, abs=1e-6) for layer in result.layers)


def test_interleaved_rows_are_refused_with_the_reason():
    whole, parts = fused_and_split()
    names = [f"h.0.attn.{part}_proj" for part in "qkv"]
    rest = {"x": whole}
    result = compare({"h.0.attn.query_key_value": whole, **rest}, dict(zip(names, parts, strict=True)) | rest)
    assert [layer.name for layer in result.layers] == ["x"]
    assert [(one.name, "head by head" in one.reason) for one in result.skipped] == [("h.0.attn.query_key_value", True)]
    assert result.unmatched.b == tuple(sorted(names))
    with pytest.raises(RankscopeError, match="head by head"):
        compare({"h.0.attn.query_key_value": whole}, dict(zip(names, parts, strict=True)))


def test_shapes_that_do_not_add_up_are_refused_with_the_reason():
    whole, parts = fused_and_split()
    parts[1] = planted((3, 5), [1])
    b = dict(zip([f"h.{part}_proj" for part in "qkv"], parts, strict=True)) | {"x": whole}
    result = compare({"h.qkv_proj": whole, "x": whole}, b)
    assert [layer.name for layer in result.layers] == ["x"]
    assert "no blocks of rows" in result.skipped[0].reason
    incomplete = {name: update for name, update in b.items() if name != "h.k_proj"}
    assert [layer.name for layer in compare({"h.qkv_proj": whole, "x": whole}, incomplete).layers] == ["x"]


def test_loralibs_blocks_meet_a_fused_projection_and_a_split_one(tmp_path):
    A, B = normal(6, 5, dtype=torch.float32), normal(9, 2, seed=1, dtype=torch.float32)
    save_file({"h.c_attn.lora_A": A, "h.c_attn.lora_B": B}, tmp_path / "l.safetensors")
    blocks = [LowRank(B[3 * i : 3 * i + 3], A[2 * i : 2 * i + 2], 2.0) for i in range(3)]
    whole = Dense(torch.cat([block.dense() for block in blocks]))
    split = {f"h.{part}_proj": block for part, block in zip("qkv", blocks, strict=True)}
    for other in ({"h.c_attn": whole}, split):
        result = compare(tmp_path / "l.safetensors", other, alpha=4)
        assert len(result.layers) == 3
        assert all(layer.relative_difference < 1e-3 for layer in result.layers)


def test_peft_against_kohya_and_diffusers_and_full_weights(tmp_path):
    A, B, W = (normal(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(2, 5), (6, 2), (6, 5)]))
    peft = write_adapter(
        tmp_path / "peft",
        {f"{PREFIX}mid.attn.to_q.lora_A.weight": A, f"{PREFIX}mid.attn.to_q.lora_B.weight": B},
        lora_alpha=6,
    )
    raw = "lora_unet_mid_attn_to_q"
    kohya = {f"{raw}.lora_down.weight": A, f"{raw}.lora_up.weight": B, f"{raw}.alpha": torch.tensor(6.0)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file(
        {"unet.mid.attn.to_q.lora_A.weight": A, "unet.mid.attn.to_q.lora_B.weight": 3 * B}, tmp_path / "d.safetensors"
    )
    base = write_checkpoint(tmp_path / "base.safetensors", {"mid.attn.to_q.weight": W})
    tuned = write_checkpoint(tmp_path / "tuned.safetensors", {"mid.attn.to_q.weight": W + 3 * (B @ A)})
    for other in ("kohya.safetensors", "d.safetensors", tuned.name):
        layer = compare(peft, tmp_path / other, base=base).layers[0]
        assert layer.relative_difference == pytest.approx(0, abs=1e-3), other
        assert layer.norm_a == pytest.approx(layer.norm_b, rel=1e-5)
    assert compare(tmp_path / "kohya.safetensors", tmp_path / "d.safetensors").layers[0].relative_difference < 1e-6


def test_renaming(tmp_path):
    update, other = planted((6, 5), [2, 1]), planted((6, 5), [3])
    a, b = {"base.h.0.q": update, "base.h.1.q": other}, {"model.h.0.q_proj": update, "model.h.1.q_proj": other}
    with pytest.raises(RankscopeError, match=r"base\.h\.0\.q, base\.h\.1\.q.*model\.h\.0\.q_proj.*--rename"):
        compare(a, b)
    result = compare(a, b, rename=[("base.", "model."), (".q", ".q_proj")])
    assert [layer.cosine for layer in result.layers] == pytest.approx([1, 1])
    assert compare({"h.q": update}, {"m.h.q": update}, rename=[("", "m.")]).layers[0].name == "m.h.q"
    with pytest.raises(ConfigError, match="no name has 'nope'"):
        compare(a, b, rename=[("nope", "x")])
    with pytest.raises(ConfigError, match="makes two layers one"):
        compare({"a.q": update, "b.q": update}, b, rename=[("a.", ""), ("b.", "")])


def test_renaming_on_the_command_line(tmp_path, capsys):
    one = write_adapter(tmp_path / "1")
    factors = {f"{PREFIX}other.w.lora_{half}.weight": normal(*shape, dtype=torch.float32)
               for half, shape in (("A", (2, 7)), ("B", (5, 2)))}  # fmt: skip
    two = write_adapter(tmp_path / "2", factors)

    def run(*arguments: object) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", *map(str, arguments)])
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err

    code, said = run(one, two)
    assert code == 1
    assert "block.q" in said
    assert "other.w" in said
    code, said = run(one, two, "--rename", "block.q=other.w")
    assert code == 0
    assert said.startswith("layer")
    for bad in ("block", "=", "a=a"):
        assert run(one, two, "--rename", bad)[0] == 2


def test_a_renamed_source_reads_what_it_read():
    update = planted((4, 3), [1])
    matched = match_layers(Source.of({"a": update}), Source.of({"b": replace(update)}), [("a", "b")])
    assert matched.a.read("b") is update or torch.equal(matched.a.read("b").B, update.B)
    assert len(matched.a.updates) == 1
