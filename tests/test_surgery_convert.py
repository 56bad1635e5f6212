"""``convert``: the same updates in every format, names and scales kept, PEFT's own logits from what was written."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from adapters import PREFIX, linear, normal, write_adapter, write_checkpoint
from makers import float64
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from surgery_makers import import_peft, llama, logits, quietly, save_peft, with_peft, with_updates
from torch import Tensor, nn

from rankscope import cli
from rankscope.errors import ConfigError, FormatError
from rankscope.formats import store as formats
from rankscope.surgery.convert import convert
from rankscope.surgery.resize import resize
from rankscope.surgery.truncate import Rank


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def updates(path, **options) -> dict[str, Tensor]:
    store = formats.open(path, **options)
    return {name: store[name].dense() for name in store}


def mixed(folder, dtype=torch.float32, **config):
    """Layers of two ranks and two scales, names with underscores and dots, a head beside."""
    tensors = {**linear("down_blocks.0.attn_1.to_q", r=2), **linear("mid_block.to_out.0", r=3, seed=1)}
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    tensors[f"{PREFIX}score.weight"] = normal(2, 3)
    return write_adapter(folder, tensors, alpha_pattern={"to_out.0": 7}, **config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", [("kohya",), ("diffusers",), ("kohya", "diffusers"), ("diffusers", "kohya")], ids=str)
def test_there_and_back(tmp_path, path, dtype):
    place = mixed(tmp_path / "peft", dtype)
    before = updates(place)
    steps = [*path, "peft"]
    for i, to in enumerate(steps):
        place, source = tmp_path / f"{i}-{to}", place
        result = convert(source, to, place)
        assert formats.open(place).kind == to
        assert result.total.relative_error < 1e-7
    after = updates(place)
    assert set(after) == {"down_blocks.0.attn_1.to_q", "mid_block.to_out.0"}
    for name, update in after.items():
        torch.testing.assert_close(update, before[name], rtol=0, atol=1e-6 * float(before[name].abs().max()))
    assert [one.name for one in convert(tmp_path / "peft", "kohya", tmp_path / "x").skipped] == ["score.weight"]


def test_kohya_keeps_every_bit(tmp_path):
    tensors = load_file(mixed(tmp_path / "peft", torch.bfloat16) / "adapter_model.safetensors")
    convert(tmp_path / "peft", "kohya", tmp_path / "k.safetensors")
    found = load_file(tmp_path / "k.safetensors")
    raw = "lora_unet_mid_block_to_out_0"
    assert torch.equal(found[f"{raw}.lora_down.weight"], tensors[f"{PREFIX}mid_block.to_out.0.lora_A.weight"])
    assert torch.equal(found[f"{raw}.lora_up.weight"], tensors[f"{PREFIX}mid_block.to_out.0.lora_B.weight"])
    assert (float(found[f"{raw}.alpha"]), found[f"{raw}.alpha"].shape) == (7.0, ())
    assert set(found) == {f"{name}.{leaf}" for name in (raw, "lora_unet_down_blocks_0_attn_1_to_q")
                          for leaf in ("lora_down.weight", "lora_up.weight", "alpha")}  # fmt: skip
    told = metadata(tmp_path / "k.safetensors")
    assert (told["ss_network_module"], told["ss_network_dim"]) == ("networks.lora", "2")
    convert(tmp_path / "k.safetensors", "peft", tmp_path / "back")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    for key, tensor in back.items():
        assert torch.equal(tensor, tensors[key])
        assert tensor.dtype == tensors[key].dtype


def test_diffusers_has_alpha_equal_to_r_with_and_without_its_metadata(tmp_path):
    convert(mixed(tmp_path / "peft"), "diffusers", tmp_path / "d.safetensors")
    tensors, told = load_file(tmp_path / "d.safetensors"), metadata(tmp_path / "d.safetensors")
    config = json.loads(told["lora_adapter_metadata"])
    assert config["unet.r"] == config["unet.lora_alpha"] == 2
    assert config["unet.rank_pattern"] == config["unet.alpha_pattern"] == {r"^mid_block\.to_out\.0": 3}
    save_file(tensors, tmp_path / "bare.safetensors")
    with_it, without, before = (updates(tmp_path / name) for name in ("d.safetensors", "bare.safetensors", "peft"))
    for name in before:
        assert torch.equal(with_it[f"unet.{name}"], without[f"unet.{name}"])
        torch.testing.assert_close(without[f"unet.{name}"], before[name])


def test_a_scale_that_bfloat16_cannot_take_up_makes_float32(tmp_path):
    for alpha, dtype in ((8, torch.bfloat16), (3, torch.float32)):  # scales 4 and 1.5
        folder = write_adapter(
            tmp_path / str(alpha), {k: v.bfloat16() for k, v in linear("q").items()}, lora_alpha=alpha
        )
        convert(folder, "diffusers", tmp_path / f"{alpha}.safetensors")
        found = load_file(tmp_path / f"{alpha}.safetensors")
        assert found["transformer.q.lora_B.weight"].dtype == dtype
        assert found["transformer.q.lora_A.weight"].dtype == torch.bfloat16
        torch.testing.assert_close(updates(tmp_path / f"{alpha}.safetensors")["transformer.q"], updates(folder)["q"])


@pytest.mark.parametrize("dora", [False, True])
def test_peft_gives_the_same_logits_from_what_came_back(tmp_path, dora):
    model = llama()
    source = save_peft(model, tmp_path / "peft", use_dora=dora, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3})
    expected = with_peft(model, source)
    assert (expected - logits(model)).abs().max() > 0.1
    for to in ("kohya", "diffusers"):
        convert(source, to, tmp_path / to)
        convert(tmp_path / to, "peft", tmp_path / f"{to}-back")
        torch.testing.assert_close(with_peft(model, tmp_path / f"{to}-back"), expected, rtol=0, atol=2e-5)
    if dora:
        m = load_file(tmp_path / "kohya" / "kohya.safetensors")
        assert {value.shape[1:] for key, value in m.items() if key.endswith("dora_scale")} == {(1,)}


def test_a_kohya_file_of_others_with_the_models_names(tmp_path):
    """Names from the checkpoint; logits of PEFT against the updates added by hand."""
    model = llama()
    names = [f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qv"]
    tensors = {}
    for i, name in enumerate(names):
        raw = f"lora_te_{name.replace('.', '_')}"
        tensors[f"{raw}.lora_up.weight"] = normal(16, 2, seed=i)
        tensors[f"{raw}.lora_down.weight"] = normal(2, 16, seed=i + 9)
        tensors[f"{raw}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "k.safetensors")
    base = write_checkpoint(tmp_path / "m" / "model.safetensors", dict(model.state_dict()))
    (tmp_path / "names.txt").write_text("\n".join(names))
    with pytest.raises(FormatError, match=r"underscores.*--base.*--names"):
        convert(tmp_path / "k.safetensors", "peft", tmp_path / "no")
    truth = {name: 0.5 * tensors[f"lora_te_{name.replace('.', '_')}.lora_up.weight"]
             @ tensors[f"lora_te_{name.replace('.', '_')}.lora_down.weight"] for name in names}  # fmt: skip
    for i, options in enumerate(({"base": base}, {"names": tmp_path / "names.txt"})):
        convert(tmp_path / "k.safetensors", "peft", tmp_path / f"{i}", **options)
        torch.testing.assert_close(with_peft(model, tmp_path / f"{i}"), with_updates(model, truth), rtol=0, atol=1e-4)
    (tmp_path / "fewer.txt").write_text(names[0] + "\n")
    result = convert(tmp_path / "k.safetensors", "peft", tmp_path / "fewer", names=tmp_path / "fewer.txt")
    assert len(result.skipped) == 3
    (tmp_path / "none.txt").write_text("other.path\n")
    with pytest.raises(FormatError, match=r"other\.path, fit none"):
        convert(tmp_path / "k.safetensors", "peft", tmp_path / "none", names=tmp_path / "none.txt")


def test_a_pipelines_folder_names_the_layers_of_all_its_parts(tmp_path):
    for part, module in (("unet", "down_blocks.0.attn_1.to_q"), ("text_encoder", "text_model.fc_1"), ("vae", "x.y")):
        write_checkpoint(tmp_path / "pipe" / part / "model.safetensors", {f"{module}.weight": normal(6, 4)})
    tensors = {}
    for raw in ("lora_unet_down_blocks_0_attn_1_to_q", "lora_te_text_model_fc_1"):
        tensors |= {f"{raw}.lora_up.weight": normal(6, 2), f"{raw}.lora_down.weight": normal(2, 4)}
    save_file(tensors, tmp_path / "k.safetensors")
    convert(tmp_path / "k.safetensors", "diffusers", tmp_path / "d.safetensors", base=tmp_path / "pipe")
    assert set(updates(tmp_path / "d.safetensors")) == {
        "unet.down_blocks.0.attn_1.to_q",
        "text_encoder.text_model.fc_1",
    }
    convert(tmp_path / "k.safetensors", "peft", tmp_path / "p", base=tmp_path / "pipe", component="text_encoder")
    assert set(updates(tmp_path / "p")) == {"text_model.fc_1"}
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "pipe" / "text_encoder")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.point = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.point(self.conv(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_there_and_back_by_pefts_forward(tmp_path, dora):
    peft = import_peft()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Net(), torch.randn(2, 3, 6, 6)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        with quietly():
            config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["conv", "point", "fc"], use_dora=dora)
            adapted = peft.get_peft_model(model, config)
            for name, parameter in adapted.named_parameters():
                if ".lora_B" in name:
                    parameter.data = torch.randn_like(parameter)
            adapted.save_pretrained(tmp_path / "peft")
            expected = adapted.eval()(x)
    convert(tmp_path / "peft", "kohya", tmp_path / "k.safetensors")
    found = load_file(tmp_path / "k.safetensors")
    assert found["lora_unet_conv.lora_down.weight"].shape == (2, 3, 3, 3)
    assert found["lora_unet_conv.lora_up.weight"].shape == (6, 2, 1, 1)
    convert(tmp_path / "peft", "diffusers", tmp_path / "d.safetensors")
    base = write_checkpoint(tmp_path / "base.safetensors", state)
    for name in ("k", "d"):
        convert(tmp_path / f"{name}.safetensors", "peft", tmp_path / f"{name}-back")
        fresh = Net()
        fresh.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = peft.PeftModel.from_pretrained(fresh, tmp_path / f"{name}-back").eval()(x)
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)
        if dora:
            whole, truth = (formats.open(tmp_path / n, base=base) for n in (f"{name}.safetensors", "peft"))
            first = next(one for one in whole if one.endswith("conv:whole"))
            torch.testing.assert_close(whole[first].dense(), truth["conv:whole"].dense(), rtol=0, atol=1e-5)


def test_a_pipeline_has_parts(tmp_path):
    tensors = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for half, shape in (("A", (2, 4)), ("B", (6, 2))):
            tensors[f"{part}.a.q.lora_{half}.weight"] = normal(*shape, seed=len(tensors))
    save_file(tensors, tmp_path / "d.safetensors")
    with pytest.raises(ConfigError, match=r"text_encoder, text_encoder_2, unet.*--component"):
        convert(tmp_path / "d.safetensors", "peft", tmp_path / "p")
    with pytest.raises(ConfigError, match="no layer in 'prior'"):
        convert(tmp_path / "d.safetensors", "peft", tmp_path / "p", component="prior")
    result = convert(tmp_path / "d.safetensors", "peft", tmp_path / "p", component="text_encoder_2")
    assert len(result.skipped) == 2
    torch.testing.assert_close(
        updates(tmp_path / "p")["a.q"], updates(tmp_path / "d.safetensors")["text_encoder_2.a.q"]
    )
    convert(tmp_path / "d.safetensors", "kohya", tmp_path / "k.safetensors")
    assert set(updates(tmp_path / "k.safetensors")) == {"lora_unet_a_q", "lora_te1_a_q", "lora_te2_a_q"}
    convert(tmp_path / "k.safetensors", "diffusers", tmp_path / "again.safetensors")
    again = updates(tmp_path / "again.safetensors")
    assert {name: value.tolist() for name, value in again.items()} == {
        name: value.tolist() for name, value in updates(tmp_path / "d.safetensors").items()
    }
    one = write_adapter(tmp_path / "one", linear("a.q"))
    result = convert(one, "diffusers", tmp_path / "te.safetensors", component="text_encoder")
    assert set(updates(tmp_path / "te.safetensors")) == {"text_encoder.a.q"}


def test_gpt2s_own_front_is_no_component(tmp_path):
    source = write_adapter(tmp_path / "p", linear("transformer.h.0.c_fc"))
    convert(source, "kohya", tmp_path / "k")
    convert(tmp_path / "k", "peft", tmp_path / "back")
    assert set(updates(tmp_path / "back")) == {"transformer.h.0.c_fc"}


def test_loralib_with_a_fused_layer_and_an_embedding(tmp_path):
    A, B = normal(6, 4), normal(9, 2, seed=1)
    tensors = {"h.c_attn.lora_A": A, "h.c_attn.lora_B": B, "wte.lora_A": normal(2, 30), "wte.lora_B": normal(4, 2)}
    save_file(tensors, tmp_path / "l.safetensors")
    before = updates(tmp_path / "l.safetensors", alpha=3)
    convert(tmp_path / "l.safetensors", "peft", tmp_path / "p", alpha=3)
    after = updates(tmp_path / "p")
    assert set(after) == {"h.c_attn", "wte"}
    torch.testing.assert_close(after["h.c_attn"], torch.cat([before[f"h.c_attn:{part}"] for part in "qkv"]))
    torch.testing.assert_close(after["wte"], before["wte"])
    result = convert(tmp_path / "l.safetensors", "kohya", tmp_path / "k", alpha=3)
    assert [(one.name, "embedding" in one.reason) for one in result.skipped] == [("wte", True)]


def test_lycoris_goes_where_it_has_thin_factors(tmp_path):
    thin = {f"lora_unet_a.hada_w{i}_{side}": normal(*shape, seed=i) for i in (1, 2) for side, shape in
            (("a", (8, 2)), ("b", (2, 9)))}  # fmt: skip
    rest = {"lora_unet_b.diff": normal(5, 4), "lora_unet_c.w_norm": normal(4)}
    save_file({**thin, **rest}, tmp_path / "l.safetensors")
    (tmp_path / "names.txt").write_text("x.a\na\nb\nc\n")
    result = convert(tmp_path / "l.safetensors", "peft", tmp_path / "p", names=tmp_path / "names.txt")
    assert {one.name: one.reason[:5] for one in result.skipped} == {
        "lora_unet_c.w_norm": "a cha",
        "lora_unet_b": "Dense",
    }
    assert result.layers[0].rank_after == 4
    torch.testing.assert_close(updates(tmp_path / "p")["a"], updates(tmp_path / "l.safetensors")["lora_unet_a"])
    save_file(rest, tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="no layer that can be converted; lora_unet_c"):
        convert(tmp_path / "none.safetensors", "peft", tmp_path / "q", names=tmp_path / "names.txt")


def test_dora_in_some_layers_only_is_refused_for_peft(tmp_path):
    tensors = {}
    for name in ("a", "b"):
        tensors |= {f"unet.{name}.lora_A.weight": normal(2, 4), f"unet.{name}.lora_B.weight": normal(6, 2)}
    tensors["unet.a.lora_magnitude_vector"] = torch.ones(6)
    save_file(tensors, tmp_path / "d.safetensors")
    with pytest.raises(FormatError, match="in all or in none"):
        convert(tmp_path / "d.safetensors", "peft", tmp_path / "p")
    assert not (tmp_path / "p").exists()
    convert(tmp_path / "d.safetensors", "kohya", tmp_path / "k.safetensors")
    assert formats.open(tmp_path / "k.safetensors").info("lora_unet_a").method == "dora-product"


def test_magnitudes_of_inputs_are_listed(tmp_path):
    tensors = {"lora_unet_a.lora_up.weight": normal(6, 2), "lora_unet_a.lora_down.weight": normal(2, 4)}
    tensors |= {key.replace("_a.", "_b."): value.clone() for key, value in tensors.items()}
    save_file({**tensors, "lora_unet_a.dora_scale": torch.ones(1, 4)}, tmp_path / "k.safetensors")
    (tmp_path / "names.txt").write_text("a\nb\n")
    result = convert(tmp_path / "k.safetensors", "peft", tmp_path / "p", names=tmp_path / "names.txt")
    assert [(one.name, "inputs" in one.reason) for one in result.skipped] == [("lora_unet_a", True)]


def test_refusals(tmp_path):
    peft = mixed(tmp_path / "peft")
    with pytest.raises(ConfigError, match="in the format peft already"):
        convert(peft, "peft", tmp_path / "x")
    with pytest.raises(ConfigError, match="the format peft is a folder"):
        convert(peft, "peft", tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="convert to one of"):
        convert(peft, "onnx", tmp_path / "x")
    convert(peft, "kohya", tmp_path / "k.safetensors")
    with pytest.raises(ConfigError, match="exists already"):
        convert(peft, "kohya", tmp_path / "k.safetensors")
    clash = write_adapter(tmp_path / "clash", {**linear("a.b_c"), **linear("a_b.c", seed=1)})
    with pytest.raises(FormatError, match="both be called lora_unet_a_b_c"):
        convert(clash, "kohya", tmp_path / "y")
    with pytest.raises(FormatError, match=r"is a kohya file; convert it first: rankscope convert .* --to peft"):
        resize(tmp_path / "k.safetensors", Rank(1), tmp_path / "z")
    save_file({"q.lora_A": normal(2, 4), "q.lora_B": normal(6, 2)}, tmp_path / "l.safetensors")
    with pytest.raises(FormatError, match=r"no α of its own; convert it first: .* --to peft -o NEW --alpha"):
        resize(tmp_path / "l.safetensors", Rank(1), tmp_path / "z")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clash", "k.safetensors", "l.safetensors", "peft"]


def test_the_command(tmp_path, capsys):
    source = mixed(tmp_path / "peft")

    def run(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["convert", *map(str, arguments)])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    code, out, err = run(source, "--to", "kohya", "-o", tmp_path / "k")
    assert code == 0
    assert "down_blocks.0.attn_1.to_q" in out
    assert "skipped 1 tensor (score.weight" in err
    assert "--component" in err
    assert json.loads((tmp_path / "k" / "rankscope.json").read_text())["schema"] == "rankscope.convert/1"
    code, out, _ = run(tmp_path / "k", "--to", "peft", "-o", tmp_path / "p", "--json", "--quiet")
    assert (code, json.loads(out)["choice"]) == (0, "kohya → peft")
    assert run(source, "--to", "nonsense", "-o", tmp_path / "n")[0] == 2
    assert float64(formats.open(tmp_path / "p")["mid_block.to_out.0"]).shape == (5, 7)


@pytest.mark.parametrize("shape", [(), (1, 4), (5, 1), (6, 2)], ids=str)
def test_a_dora_scale_that_is_not_one_of_outputs_is_not_converted(tmp_path, shape):
    names = {"up.weight": normal(6, 2), "down.weight": normal(2, 4)}
    tensors = {f"lora_unet_h_q.lora_{name}": value for name, value in names.items()}
    save_file({**tensors, "lora_unet_h_q.dora_scale": torch.ones(shape)}, tmp_path / "k.safetensors")
    with pytest.raises(FormatError, match="dora_scale"):
        convert(
            tmp_path / "k.safetensors",
            "diffusers",
            tmp_path / "out",
            base=write_checkpoint(tmp_path / "base.safetensors", {"h.q.weight": normal(6, 4)}),
        )
    assert not (tmp_path / "out").exists()
