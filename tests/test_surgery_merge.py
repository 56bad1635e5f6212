"""``merge`` and ``unmerge`` on files: shards, dtypes, layouts, what is replaced, what is refused. No PEFT needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import PREFIX, linear, normal, write_adapter, write_checkpoint, write_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankscope.errors import ConfigError, FormatError, NonFiniteError, RankscopeError
from rankscope.formats.checkpoint import Checkpoint
from rankscope.surgery.algebra import average, subtract
from rankscope.surgery.extract import extract
from rankscope.surgery.merge import merge, unmerge
from rankscope.surgery.surgery_result import SurgeryResult
from rankscope.surgery.truncate import Rank

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def product(tensors: dict[str, Tensor], module: str, scale: float = 4.0) -> Tensor:
    A, B = (tensors[f"{PREFIX}{module}.lora_{half}.weight"].double() for half in "AB")
    return scale * (B @ A)


def read(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name).clone() for name in checkpoint.infos}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", {**linear("h.0.q"), **linear("h.1.q", seed=1)})


def base_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = {f"h.{i}.{name}.weight": normal(5, 7, seed=10 * i + len(name)) for i in range(2) for name in ("q", "kk")}
    return {name: value.to(dtype) for name, value in {**tensors, "norm.weight": normal(7, seed=77)}.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_weight_is_rounded_once(tmp_path: Path, adapter: Path, dtype: torch.dtype) -> None:
    tensors = base_tensors(dtype)
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", tensors).parent
    result = merge(base, [adapter], tmp_path / "out")
    found, factors = read(tmp_path / "out"), load_file(adapter / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    for module in ("h.0.q", "h.1.q"):
        exact = tensors[f"{module}.weight"].double() + product(factors, module)
        assert torch.equal(found[f"{module}.weight"], exact.to(dtype))
        layer = result[module]
        assert layer.error == pytest.approx(float((exact.to(dtype).double() - exact).norm()), rel=1e-9)
        assert layer.norm == pytest.approx(float(product(factors, module).norm()))
        assert (layer.rank_before, layer.rank_after, layer.parameters_after) == (2, None, 35)
    for name in tensors.keys() - {"h.0.q.weight", "h.1.q.weight"}:
        assert torch.equal(found[name], tensors[name])
    assert SurgeryResult.from_json(json.loads((tmp_path / "out" / "rankscope.json").read_text())) == result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_is_not_rounded_before_the_sum(tmp_path: Path, dtype: torch.dtype) -> None:
    """Negative control: rounding ΔW to half precision first, as a merge in half precision does, ends elsewhere."""
    base = write_checkpoint(tmp_path / "base.safetensors", {"q.weight": normal(60, 50).to(dtype)})
    adapter = write_adapter(tmp_path / "a", linear("q", out=60, n=50, r=4), lora_alpha=1)
    merge(base, [adapter], tmp_path / "out")
    delta = product(load_file(adapter / "adapter_model.safetensors"), "q", 0.25)
    twice = (normal(60, 50).to(dtype) + delta.to(dtype)).to(dtype)
    assert (read(tmp_path / "out")["q.weight"] != twice).float().mean() > 0.02


def test_a_large_weight_is_added_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path) -> None:
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", base_tensors(torch.bfloat16)).parent
    whole = merge(base, [adapter], tmp_path / "whole")
    monkeypatch.setattr("rankscope.surgery.addition.CHUNK", 10)
    parts = merge(base, [adapter], tmp_path / "parts")
    found = read(tmp_path / "parts")
    assert all(torch.equal(tensor, found[name]) for name, tensor in read(tmp_path / "whole").items())
    assert parts.total.error == pytest.approx(whole.total.error, rel=1e-12)


def test_shards_and_index_are_kept(tmp_path: Path, adapter: Path) -> None:
    tensors = base_tensors()
    names = sorted(tensors)
    shards = {"part-1.safetensors": names[:2], "part-2.safetensors": names[2:]}
    base = write_shards(tmp_path / "base", {shard: {n: tensors[n] for n in held} for shard, held in shards.items()})
    merge(base, [adapter], tmp_path / "out", command="typed")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, held in shards.items() for name in held}
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors.values())
    for shard, held in shards.items():
        assert sorted(load_file(tmp_path / "out" / shard)) == held
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt", "rankscope": "merge", "rankscope_command": "typed"}
    factors = load_file(adapter / "adapter_model.safetensors")
    exact = tensors["h.1.q.weight"].double() + product(factors, "h.1.q")
    assert torch.equal(read(tmp_path / "out")["h.1.q.weight"], exact.float())


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_become_safetensors(tmp_path: Path, adapter: Path, sharded: bool) -> None:
    base, tensors = tmp_path / "base", base_tensors()
    base.mkdir()
    if sharded:
        where = {}
        for i, name in enumerate(tensors):
            where[name] = f"pytorch_model-{i + 1:05}-of-00005.bin"
            torch.save({name: tensors[name]}, base / where[name])
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        torch.save(tensors, base / "pytorch_model.bin")
    merge(base, [adapter], tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert not any(name.endswith(".bin") for name in written)
    assert ("model-00003-of-00005.safetensors" if sharded else "model.safetensors") in written
    assert ("model.safetensors.index.json" in written) == sharded
    assert read(tmp_path / "out").keys() == tensors.keys()


@pytest.mark.parametrize(
    "shards", [("model-1.safetensors", "pytorch_model-1.bin"), ("pytorch_model-1.bin", "model-1.pt"), ("x.bin", "x.pt")]
)
def test_shards_that_would_overwrite_each_other_are_refused(tmp_path: Path, adapter: Path, shards: Any) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tensors = base_tensors()
    parts = [{name: tensors[name] for name in tensors if (".q." in name) == here} for here in (True, False)]
    for shard, part in zip(shards, parts, strict=True):
        (save_file if shard.endswith("safetensors") else torch.save)(part, base / shard)
    where = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    name = shards[0].replace("pytorch_", "").partition(".")[0]
    with pytest.raises(FormatError, match=rf"index\.json: two of its shards would both be written as {name}\.safetens"):
        merge(base / "pytorch_model.bin.index.json", [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_beside_the_weights_are_copied(tmp_path: Path, adapter: Path) -> None:
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", base_tensors(), {"model_type": "x"}).parent
    copied = ["config.json", "generation_config.json", "tokenizer.json", "merges.txt", "modeling_x.py", "LICENSE"]
    for name in (*copied[1:], "README.md", "optimizer.pt", ".hidden"):
        (base / name).write_text(name)
    (base / "other").mkdir()
    (adapter / "tokenizer.json").write_text("of the adapter")
    merge(base, [adapter], tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {*copied, "model.safetensors", "rankscope.json"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "of the adapter"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "x"}
    merge(base / "model.safetensors", [adapter], tmp_path / "file")
    assert {path.name for path in (tmp_path / "file").iterdir()} == {"model.safetensors", "rankscope.json"}


@pytest.mark.parametrize("shape", [(9, 4), (4, 4)])
@pytest.mark.parametrize("known", ["by shape of another", "by model type", "by fan_in_fan_out"])
def test_conv1d_weights_are_stored_transposed(tmp_path: Path, shape: tuple[int, int], known: str) -> None:
    out, into = shape
    tensors = {"h.0.attn.c_proj.weight": normal(into, out)}
    if known == "by shape of another":
        tensors["h.0.mlp.c_fc.weight"] = normal(4, 16)
    config = {"model_type": "gpt2"} if known == "by model type" else {}
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", tensors, config).parent
    adapter = write_adapter(
        tmp_path / "a", linear("h.0.attn.c_proj", out=out, n=into), fan_in_fan_out=known == "by fan_in_fan_out"
    )
    merge(base, [adapter], tmp_path / "out")
    delta = product(load_file(adapter / "adapter_model.safetensors"), "h.0.attn.c_proj")
    exact = tensors["h.0.attn.c_proj.weight"].double() + delta.T
    assert torch.equal(read(tmp_path / "out")["h.0.attn.c_proj.weight"], exact.float())


def test_names_behind_a_wrapper_are_found(tmp_path: Path) -> None:
    """The adapter says model.h.q, the checkpoint h.q, and the other way round."""
    for ours, theirs in (("model.h.q", "h.q"), ("h.q", "model.h.q")):
        base = write_checkpoint(tmp_path / ours / "base.safetensors", {f"{theirs}.weight": normal(5, 7)})
        wrapper = ours.removesuffix("h.q")
        new = {f"{PREFIX}{wrapper}pooler.weight": normal(3, 3)}
        adapter = write_adapter(tmp_path / ours / "a", {**linear(ours), **new}, modules_to_save=["pooler"])
        merge(base, [adapter], tmp_path / ours / "out")
        assert f"{theirs.removesuffix('h.q')}pooler.weight" in read(tmp_path / ours / "out")
        exact = normal(5, 7).double() + product(load_file(adapter / "adapter_model.safetensors"), ours)
        assert torch.equal(read(tmp_path / ours / "out")[f"{theirs}.weight"], exact.float())


def test_convolutions_and_embeddings(tmp_path: Path) -> None:
    factors = {
        f"{PREFIX}emb.lora_embedding_A": normal(2, 11, seed=1),
        f"{PREFIX}emb.lora_embedding_B": normal(6, 2, seed=2),
        f"{PREFIX}conv.lora_A.weight": normal(2, 4, 3, 3, seed=3),
        f"{PREFIX}conv.lora_B.weight": normal(5, 2, 1, 1, seed=4),
    }
    tensors = {"emb.weight": normal(11, 6, seed=5), "conv.weight": normal(5, 4, 3, 3, seed=6)}
    base = write_checkpoint(tmp_path / "base.safetensors", tensors)
    merge(base, [write_adapter(tmp_path / "a", factors)], tmp_path / "out")
    found = read(tmp_path / "out")
    emb = 4 * (normal(6, 2, seed=2).double() @ normal(2, 11, seed=1).double()).T
    conv = 4 * (normal(5, 2, seed=4).double() @ normal(2, 36, seed=3).double()).reshape(5, 4, 3, 3)
    torch.testing.assert_close(found["emb.weight"], (tensors["emb.weight"].double() + emb).float())
    torch.testing.assert_close(found["conv.weight"], (tensors["conv.weight"].double() + conv).float())


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    tensors = base_tensors(torch.bfloat16)
    base = write_checkpoint(tmp_path / "base.safetensors", tensors)
    one = write_adapter(tmp_path / "1", linear("h.0.q", r=2))
    two = write_adapter(tmp_path / "2", {**linear("h.0.q", r=3, seed=4), **linear("h.1.kk", r=3, seed=5)}, lora_alpha=3)
    result = merge(base, [one, two], tmp_path / "out", [0.5, -2])
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    exact = tensors["h.0.q.weight"].double() + 0.5 * product(first, "h.0.q") - 2 * product(second, "h.0.q", 1.0)
    found = read(tmp_path / "out")
    assert torch.equal(found["h.0.q.weight"], exact.bfloat16())
    exact = tensors["h.1.kk.weight"].double() - 2 * product(second, "h.1.kk", 1.0)
    assert torch.equal(found["h.1.kk.weight"], exact.bfloat16())
    assert result["h.0.q"].rank_before == 5
    assert result.weights == (0.5, -2.0)


def dora(folder: Path, seed: int = 0) -> Path:
    m = normal(5, seed=seed + 50).abs()
    tensors = {**linear("h.0.q", seed=seed), f"{PREFIX}h.0.q.lora_magnitude_vector": m}
    return write_adapter(folder, tensors, use_dora=True)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_dora_adds_its_whole_update(tmp_path: Path, weight: float) -> None:
    tensors = base_tensors()
    base = write_checkpoint(tmp_path / "base.safetensors", tensors)
    merge(base, [dora(tmp_path / "a")], tmp_path / "out", [weight])
    W = tensors["h.0.q.weight"].double()
    V = W + product(load_file(tmp_path / "a" / "adapter_model.safetensors"), "h.0.q")
    whole = normal(5, seed=50).abs().double()[:, None] * V / V.norm(dim=1, keepdim=True)
    expected = W + weight * (whole - W)
    torch.testing.assert_close(read(tmp_path / "out")["h.0.q.weight"], expected.float(), rtol=1e-5, atol=1e-6)


def test_what_was_trained_whole_takes_the_place_of_the_base(tmp_path: Path) -> None:
    tensors = {**base_tensors(torch.bfloat16), "h.0.q.bias": normal(5, seed=3).bfloat16()}
    base = write_checkpoint(tmp_path / "base.safetensors", tensors)
    whole = {
        f"{PREFIX}h.0.q.base_layer.bias": normal(5, seed=30),
        f"{PREFIX}norm.weight": normal(7, seed=31),
        f"{PREFIX}score.weight": normal(2, 7, seed=32),
    }
    adapter = write_adapter(tmp_path / "a", {**linear("h.0.q"), **whole}, bias="all", modules_to_save=["norm", "score"])
    result = merge(base, [adapter], tmp_path / "out")
    found = read(tmp_path / "out")
    assert torch.equal(found["h.0.q.bias"], normal(5, seed=30).bfloat16())
    assert torch.equal(found["norm.weight"], normal(7, seed=31).bfloat16())
    assert torch.equal(found["score.weight"], normal(2, 7, seed=32))  # new to the checkpoint: as it was saved
    assert set(result.carried) == set(whole)


def test_a_head_under_a_live_name_is_found(tmp_path: Path) -> None:
    base = write_checkpoint(
        tmp_path / "base" / "model.safetensors", {"h.q.weight": normal(6, 5), "score.weight": normal(3, 6)}
    )
    head = normal(3, 6) + 1
    live = {f"{PREFIX}score.modules_to_save.default.weight": head}
    adapter = write_adapter(tmp_path / "a", {**linear("h.q", 6, 5), **live}, modules_to_save=["score"])
    merge(base.parent, [adapter], tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["score.weight"], head)


@pytest.mark.parametrize("metadata", [None, [], "x", 3])
def test_an_index_with_odd_metadata(tmp_path: Path, metadata: Any) -> None:
    base = write_shards(tmp_path / "base", {"part-1.safetensors": {"h.q.weight": normal(6, 5)}})
    path = base / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": metadata}))
    merge(base, [write_adapter(tmp_path / "a", linear("h.q", 6, 5))], tmp_path / "out")
    assert json.loads((tmp_path / "out" / path.name).read_text())["metadata"] == {"total_size": 120}


def test_weights_of_what_was_trained_whole(tmp_path: Path) -> None:
    tensors = {"q.weight": normal(5, 7), "norm.weight": torch.full((3,), 2.0)}
    base = write_checkpoint(tmp_path / "base.safetensors", tensors)
    one, two = (
        write_adapter(
            tmp_path / str(value),
            {**linear("q"), f"{PREFIX}norm.weight": torch.full((3,), value)},
            modules_to_save=["norm"],
        )
        for value in (3.0, 8.0)
    )
    merge(base, [one, two], tmp_path / "out", [2, 0.5])
    assert torch.equal(read(tmp_path / "out")["norm.weight"], torch.full((3,), 2 + 2 * 1 + 0.5 * 6.0))


def test_the_bias_of_b_is_added_with_its_scale(tmp_path: Path) -> None:
    tensors = {"q.weight": normal(5, 7), "q.bias": normal(5, seed=1)}
    base = write_checkpoint(tmp_path / "base.safetensors", tensors)
    adapter = write_adapter(
        tmp_path / "a", {**linear("q"), f"{PREFIX}q.lora_B.bias": normal(5, seed=2)}, lora_bias=True
    )
    merge(base, [adapter], tmp_path / "out", [0.5])
    torch.testing.assert_close(read(tmp_path / "out")["q.bias"], normal(5, seed=1) + 2 * normal(5, seed=2))
    bare = write_checkpoint(tmp_path / "bare.safetensors", {"q.weight": normal(5, 7)})
    with pytest.raises(FormatError, match="has no bias for q"):
        merge(bare, [adapter], tmp_path / "again")


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (6,)])
def test_a_bias_in_the_base_that_does_not_fit_that_of_b(tmp_path: Path, shape: tuple[int, ...]) -> None:
    base = write_checkpoint(tmp_path / "base.safetensors", {"q.weight": normal(5, 7), "q.bias": normal(*shape)})
    adapter = write_adapter(tmp_path / "a", {**linear("q"), f"{PREFIX}q.lora_B.bias": normal(5)}, lora_bias=True)
    with pytest.raises(FormatError, match=r"q\.bias is .*, where the adapter changes \(5,\) floating"):
        merge(base, [adapter], tmp_path / "out")


def test_a_bias_that_overflows(tmp_path: Path) -> None:
    tensors = {"q.weight": normal(5, 7).half(), "q.bias": torch.full((5,), 6e4, dtype=torch.float16)}
    base = write_checkpoint(tmp_path / "base.safetensors", tensors)
    bias = {f"{PREFIX}q.lora_B.bias": torch.full((5,), 1e4)}
    adapter = write_adapter(tmp_path / "a", {**linear("q"), **bias}, lora_bias=True)
    with pytest.raises(NonFiniteError, match=r"q\.bias: the sum in float16"):
        merge(base, [adapter], tmp_path / "out")


WHOLE_SHAPES = [((), (5, 7)), ((7,), (5, 7)), ((5, 7, 1), (5, 7)), ((5, 7), ()), ((5, 7), (7,)), ((), (7,)), ((7,), ())]


@pytest.mark.parametrize(("ours", "theirs"), WHOLE_SHAPES)
@pytest.mark.parametrize("name", ["embed_tokens.weight", "score.weight"])
def test_a_whole_tensor_of_another_dimension_is_refused(tmp_path: Path, name: str, ours: Any, theirs: Any) -> None:
    base = write_checkpoint(tmp_path / "base.safetensors", {"q.weight": normal(5, 7), name: normal(*theirs)})
    whole = {**linear("q"), f"{PREFIX}{name}": normal(*ours)}
    adapter = write_adapter(tmp_path / "a", whole, modules_to_save=[name.partition(".")[0]])
    with pytest.raises(FormatError, match=rf"{name} is .*, which cannot replace"):
        merge(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize("shape", [(), (6,)])
def test_a_head_saved_whole_that_is_no_matrix(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The output layer is not in the base, so no shape there speaks against it."""
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", EMBEDDING, TIED).parent
    beside = {**linear("model.q"), f"{PREFIX}lm_head.base_layer.weight": normal(*shape)}
    factors = {**beside, **linear("lm_head", out=11, n=6)}
    for number, tensors in enumerate((beside, factors)):
        adapter = write_adapter(tmp_path / str(number), tensors)
        with pytest.raises(RankscopeError, match="lm_head"):
            merge(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize("odd", [["gpt2"], {"gpt2": 1}, 3, None])
def test_a_model_type_that_is_no_name(tmp_path: Path, odd: Any) -> None:
    base = write_checkpoint(
        tmp_path / "base" / "model.safetensors", {"h.c_proj.weight": normal(5, 7)}, {"model_type": odd}
    )
    merge(base.parent, [write_adapter(tmp_path / "a", linear("h.c_proj"))], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_dtype_that_cannot_be_written(tmp_path: Path) -> None:
    base = tmp_path / "base.bin"
    torch.save({"q.weight": normal(5, 7), "odd": torch.zeros(2, dtype=torch.complex128)}, base)
    with pytest.raises(
        FormatError, match=r"base\.safetensors: odd is torch\.complex128, which safetensors cannot hold"
    ):
        merge(base, [write_adapter(tmp_path / "a", linear("q"))], tmp_path / "out")


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    base = tmp_path / "base.bin"
    torch.save({"q.weight": normal(5, 7), "\udc80": normal(2)}, base)
    with pytest.raises(FormatError, match=r"base\.safetensors: a name in it is no Unicode text"):
        merge(base, [write_adapter(tmp_path / "a", linear("q"))], tmp_path / "out")


def test_complex_numbers_are_not_taken_for_real_ones(tmp_path: Path) -> None:
    turn, real = torch.complex(normal(3), normal(3, seed=1)), normal(3)
    bases = [
        write_checkpoint(tmp_path / f"{i}.safetensors", {"q.weight": normal(5, 7), "rope.weight": tensor})
        for i, tensor in enumerate((turn, real))
    ]
    adapters = [
        write_adapter(tmp_path / str(i), {**linear("q"), f"{PREFIX}rope.weight": tensor}, modules_to_save=["rope"])
        for i, tensor in enumerate((2 * turn, 2 * real))
    ]
    for base, adapter in ((bases[0], adapters[1]), (bases[1], adapters[0])):
        with pytest.raises(FormatError, match=r"rope\.weight is .*complex64.*is this the base"):
            merge(base, [adapter], tmp_path / "out")
    with pytest.raises(FormatError, match=r"rope\.weight: holds complex numbers, which cannot be added"):
        merge(bases[0], [adapters[0]], tmp_path / "out", [0.5])
    with pytest.raises(FormatError, match=r"rope\.weight: holds complex numbers, which cannot be added"):
        average(adapters, tmp_path / "out")
    with pytest.raises(FormatError, match=r"rope\.weight was trained whole"):
        subtract(*adapters, tmp_path / "out")
    merge(bases[0], [adapters[0]], tmp_path / "out")
    assert torch.equal(read(tmp_path / "out" / "0.safetensors")["rope.weight"], 2 * turn)
    assert extract(bases[1], Rank(1), tmp_path / "x", _shifted(bases[0])).carried == (f"{PREFIX}rope.weight",)


def _shifted(path: Path) -> Path:
    tensors = {name: value + 1 if value.ndim == 2 else value for name, value in load_file(path).items()}
    return write_checkpoint(path.with_name("shifted.safetensors"), tensors)


TIED = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 11}
EMBEDDING = {"model.embed_tokens.weight": normal(11, 6), "model.q.weight": normal(5, 7)}


def of_embedding(folder: Path, **config: Any) -> Path:
    name = f"{PREFIX}model.embed_tokens.lora_embedding_"
    return write_adapter(folder, {f"{name}A": normal(2, 11, seed=1), f"{name}B": normal(6, 2, seed=2)}, **config)


def of_head(folder: Path) -> Path:
    return write_adapter(folder, linear("lm_head", out=11, n=6))


def tied_config(folder: Path) -> bool:
    found: bool = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return found


def test_an_output_layer_that_was_its_embedding_gets_its_own_weight(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", EMBEDDING, TIED).parent
    E = EMBEDDING["model.embed_tokens.weight"]
    merge(base, [of_embedding(tmp_path / "e")], tmp_path / "1")
    found = read(tmp_path / "1")
    assert torch.equal(found["lm_head.weight"], E)
    assert not torch.equal(found["model.embed_tokens.weight"], E)
    merge(base, [of_head(tmp_path / "h")], tmp_path / "2")
    head = E.double() + product(load_file(tmp_path / "h" / "adapter_model.safetensors"), "lm_head")
    assert torch.equal(read(tmp_path / "2")["lm_head.weight"], head.float())
    assert torch.equal(read(tmp_path / "2")["model.embed_tokens.weight"], E)
    merge(base, [tmp_path / "e", tmp_path / "h"], tmp_path / "3")
    both = read(tmp_path / "3")
    assert torch.equal(both["lm_head.weight"], head.float())
    assert torch.equal(both["model.embed_tokens.weight"], found["model.embed_tokens.weight"])
    assert not any(tied_config(tmp_path / name) for name in "123")


def test_tied_layers_stay_tied_where_they_change_alike_or_not_at_all(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", EMBEDDING, TIED).parent
    merge(base, [of_embedding(tmp_path / "e", ensure_weight_tying=True)], tmp_path / "1")
    merge(base, [write_adapter(tmp_path / "q", linear("model.q"))], tmp_path / "2")
    for name in "12":
        assert tied_config(tmp_path / name)
        assert "lm_head.weight" not in read(tmp_path / name)


def test_a_tie_that_only_the_class_implies(tmp_path: Path) -> None:
    tensors = {"wte.weight": normal(11, 6), "h.0.attn.c_attn.weight": normal(6, 18)}
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", tensors, {"architectures": ["GPT2LMHeadModel"]})
    adapter = write_adapter(
        tmp_path / "a", {**linear("transformer.h.0.attn.c_attn", out=18, n=6), **linear("lm_head", out=11, n=6)}
    )
    merge(base.parent, [adapter], tmp_path / "out")
    assert read(tmp_path / "out").keys() == {*tensors, "lm_head.weight"}
    assert tied_config(tmp_path / "out") is False


def test_a_vocabulary_that_grew(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", EMBEDDING, TIED).parent
    grown = {
        f"{PREFIX}{name}.weight": normal(13, 6, seed=i) for i, name in enumerate(("model.embed_tokens", "lm_head"))
    }
    adapter = write_adapter(tmp_path / "a", {**linear("model.q"), **grown}, modules_to_save=["embed_tokens", "lm_head"])
    result = merge(base, [adapter], tmp_path / "out")
    found = read(tmp_path / "out")
    assert found["model.embed_tokens.weight"].shape == found["lm_head.weight"].shape == (13, 6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (13, False)
    assert any("13 rows, 11 in the base" in note for note in result.notes)
    with pytest.raises(FormatError, match="only one adapter can give it"):
        merge(base, [adapter], tmp_path / "half", [0.5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerging_gives_back_what_rounding_left(tmp_path: Path, dtype: torch.dtype) -> None:
    """Entries whose sum is not coarser spaced than the original come back to the bit; the rest as far as expected."""
    W = (0.05 * normal(300, 200, seed=8)).to(dtype)
    base = write_checkpoint(tmp_path / "base.safetensors", {"q.weight": W, "norm.weight": normal(4)})
    adapter = write_adapter(tmp_path / "a", linear("q", out=300, n=200, r=4), lora_alpha=0.05)
    merge(base, [adapter], tmp_path / "merged")
    result = unmerge(tmp_path / "merged", [adapter], tmp_path / "back")
    back, merged = (read(tmp_path / name)["q.weight"].double() for name in ("back", "merged"))
    assert torch.equal(read(tmp_path / "back")["norm.weight"], normal(4))
    truth = float((back - W.double()).norm())
    assert truth > 0
    assert result["q"].from_original == pytest.approx(truth, rel=0.05)
    assert result.total.from_original == result["q"].from_original
    finer = merged.abs() <= W.double().abs()
    assert torch.equal(back[finer], W.double()[finer])
    assert 0.2 < finer.double().mean() < 0.8


def test_unmerging_several_with_weights(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base.safetensors", base_tensors())
    adapters = [write_adapter(tmp_path / str(i), linear("h.0.q", seed=i)) for i in range(2)]
    merge(base, adapters, tmp_path / "merged", [1.5, -0.5])
    unmerge(tmp_path / "merged", adapters, tmp_path / "back", [1.5, -0.5])
    torch.testing.assert_close(
        read(tmp_path / "back")["h.0.q.weight"], base_tensors()["h.0.q.weight"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({f"{PREFIX}h.0.q.lora_magnitude_vector": normal(5)}, {"use_dora": True}, "DoRA rescaled"),
        ({f"{PREFIX}norm.weight": normal(7)}, {"modules_to_save": ["norm"]}, "norm.weight replaced"),
    ],
)
def test_what_cannot_be_unmerged(tmp_path: Path, tensors: Any, config: Any, message: str) -> None:
    base = write_checkpoint(tmp_path / "base.safetensors", base_tensors())
    adapter = write_adapter(tmp_path / "a", {**linear("h.0.q"), **tensors}, **config)
    with pytest.raises(FormatError, match=message):
        unmerge(base, [adapter], tmp_path / "out")


def test_a_tied_head_cannot_be_unmerged_from_its_embedding(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base" / "model.safetensors", EMBEDDING, TIED).parent
    with pytest.raises(FormatError, match=r"has no lm_head\.weight"):
        unmerge(base, [of_head(tmp_path / "h")], tmp_path / "out")


def plain(folder: Path) -> Path:
    return write_adapter(folder, linear("h.0.q"))


WRONG: dict[str, tuple[dict[str, Tensor] | None, Any, str]] = {
    "other names": ({"x.weight": normal(5, 7)}, plain, "has no weight for 1 of its 1 layers"),
    "other shape": ({"h.0.q.weight": normal(5, 6)}, plain, "is 5 × 6, but the update of h.0.q is 5 × 7"),
    "packed": ({"h.0.q.weight": torch.ones(5, 7).to(torch.uint8)}, plain, "dequantize it first"),
    "nothing there": (None, plain, "no such file or folder"),
    "a vector": ({"h.0.q.weight": normal(35)}, plain, "one-dimensional"),
    "groups": (
        {"h.0.q.weight": normal(6, 2, 3, 3)},
        lambda f: write_adapter(
            f,
            {f"{PREFIX}h.0.q.lora_A.weight": normal(2, 4, 3, 3), f"{PREFIX}h.0.q.lora_B.weight": normal(6, 1, 1, 1)},
        ),
        "a convolution with groups",
    ),
    "token rows": (
        {"h.0.q.weight": normal(5, 7)},
        lambda f: write_adapter(f, linear("h.0.q"), trainable_token_indices=[1]),
        "trainable_token_indices is set",
    ),
    "after a token": (
        {"h.0.q.weight": normal(5, 7)},
        lambda f: write_adapter(f, linear("h.0.q"), alora_invocation_tokens=[1]),
        "alora_invocation_tokens is set",
    ),
    "a stranger": (
        {"h.0.q.weight": normal(5, 7)},
        lambda f: write_adapter(f, {**linear("h.0.q"), f"{PREFIX}y.weight": normal(3)}),
        r"has no y\.weight, which the adapter replaces",
    ),
    "dora of another base": ({"x.weight": normal(5, 7)}, dora, "h.0.q"),
    "no adapter": ({"h.0.q.weight": normal(5, 7)}, lambda f: f, "no such file or folder"),
    "two heads": (
        {"h.0.q.weight": normal(5, 7), "a.wte.weight": normal(11, 6), "b.wte.weight": normal(11, 6)},
        lambda f: write_adapter(f, {**linear("h.0.q"), **linear("lm_head", out=11, n=6)}),
        "2 embeddings of its shape 11 × 6",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_base_or_an_adapter_that_does_not_fit(tmp_path: Path, name: str) -> None:
    tensors, make, message = WRONG[name]
    base = tmp_path / "base.safetensors"
    if tensors is not None:
        write_checkpoint(base, tensors)
    adapter = make(tmp_path / "adapter")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RankscopeError, match=message) as caught:
        merge(base, [adapter], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_numbers_that_overflow_or_are_none(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", linear("q"), lora_alpha=2e5)
    half = write_checkpoint(tmp_path / "half.safetensors", {"q.weight": normal(5, 7).half()})
    with pytest.raises(NonFiniteError, match=r"q\.weight: the sum in float16"):
        merge(half, [adapter], tmp_path / "out")
    weight = normal(5, 7)
    weight[0, 0] = torch.nan
    bad = write_checkpoint(tmp_path / "bad.safetensors", {"q.weight": weight})
    with pytest.raises(NonFiniteError, match="1 values that are NaN"):
        merge(bad, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_and_adapters_that_make_no_sense(tmp_path: Path, adapter: Path) -> None:
    base = write_checkpoint(tmp_path / "base.safetensors", base_tensors())
    with pytest.raises(ConfigError, match="2 weights for 1 adapter"):
        merge(base, [adapter], tmp_path / "out", [1, 2])
    with pytest.raises(ConfigError, match="at least one adapter"):
        merge(base, [], tmp_path / "out")


def test_a_shard_that_is_damaged_leaves_nothing(tmp_path: Path, adapter: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file(base_tensors(), base / "model.safetensors")
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        merge(base, [adapter], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
