"""``spectrum``: planted singular values come back, with noise, floor, totals, JSON, and errors that name the layer."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import PREFIX, linear, write_adapter, write_checkpoint
from makers import normal, planted, planted_dense
from peft_models import LINEAR, Saved, import_peft, two
from safetensors.torch import load_file, save_file

from rankscope.analysis.layer_spectra import SpectrumResult, spectrum
from rankscope.analysis.sources import matches_pattern
from rankscope.errors import ConfigError, FormatError, NonFiniteError, RankscopeError
from rankscope.formats.store import open as open_store
from rankscope.spectra import MEASURES, noise_measures
from rankscope.structured import Hadamard, Kronecker
from rankscope.updates import Dense, LowRank

SIGMA = [5.0, 3.0, 1.0, 0.5, 0.1]  # METHODS' unit values: stable 1.4104, participation 1.7584, entropy 3.1277
CONTRACT = {"name", "shape", "nominal_rank", "scale", "energy", "singular_values", "measures", "noise"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Each method's adapter, saved by PEFT when it is first asked for."""

    @cache
    def saved(name: str) -> Saved:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            place, method = tmp_path_factory.mktemp("adapter"), name.split(",")[0]
            return Saved(import_peft(), place, method, two(), target_modules=["q", "k"], **LINEAR[name][0])

    return saved


def planted_layers() -> dict[str, LowRank | Dense]:
    return {
        "layers.10.q": planted((30, 20), SIGMA) * 2.0,
        "layers.2.q": planted((20, 30), SIGMA, seed=4),
        "layers.2.full": planted_dense((24, 16), SIGMA, seed=8),
    }


def test_planted_singular_values_come_back() -> None:
    result = spectrum(planted_layers())
    assert [layer.name for layer in result.layers] == ["layers.2.full", "layers.2.q", "layers.10.q"]
    np.testing.assert_allclose(result["layers.2.q"].singular_values, SIGMA, rtol=1e-12)
    np.testing.assert_allclose(result["layers.10.q"].singular_values, np.multiply(2, SIGMA), rtol=1e-12)
    np.testing.assert_allclose(result["layers.2.full"].singular_values[:5], SIGMA, rtol=1e-6)  # float32
    layer = result["layers.10.q"]
    assert (layer.shape, layer.nominal_rank, layer.scale, layer.full) == ((30, 20), 5, 2.0, False)
    assert layer.norm == pytest.approx(2 * np.linalg.norm(SIGMA))
    assert layer.measures["stable_rank"] == pytest.approx(1.4104, abs=1e-4)
    assert layer.measures["participation_ratio"] == pytest.approx(1.7584, abs=1e-4)
    assert layer.measures["entropy_rank"] == pytest.approx(3.1277, abs=1e-4)


def test_noise_stands_beside_full_updates_only() -> None:
    shape = (60, 40)
    noisy = Dense(planted((60, 40), [3.0, 2.0]).dense() + 0.01 * normal(*shape, seed=3))
    result = spectrum({"full": noisy, "lora": planted(shape, SIGMA)})
    assert result["lora"].noise is None
    noise = result["full"].noise
    assert noise is not None
    assert {name: noise[name] for name in MEASURES} == noise_measures(shape)
    assert noise["mp_count"] == noise["gd_count"] == 2  # the planted two, and no noise
    # Entries of standard deviation .01 have their largest σ near .01·(√60 + √40) = .141.
    assert noise["mp_edge"] == pytest.approx(0.01 * (60**0.5 + 40**0.5), rel=0.1)
    assert result["full"].rounding_floor is None


def test_half_precision_storage_has_a_floor() -> None:
    base = normal(48, 32, seed=1, dtype=torch.bfloat16)
    tuned = (base.float() + planted((48, 32), [1.0, 0.8]).dense()).to(torch.bfloat16)
    found = spectrum({"w": Dense.difference(tuned, base)})["w"]
    assert found.dtype == "bfloat16"
    assert found.rounding_floor is not None
    assert found.rounding_floor.above == 2  # the planted two; the rest is rounding
    assert found.measures["numerical_rank"] == 2
    assert found.singular_values[2] < found.rounding_floor.edge < 0.8


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_scale_and_dtype_are_those_of_the_file(
    tmp_path: Path, adapters: Callable[[str], Saved], name: str, dtype: torch.dtype
) -> None:
    """Whatever a method makes of its tensors: a matrix in float32, factors in float64, several scales."""
    saved = adapters(name)
    stored = load_file(saved.folder / "adapter_model.safetensors")
    shutil.copytree(saved.folder, tmp_path / "a")
    halved = {key: value.to(dtype) if value.is_floating_point() else value for key, value in stored.items()}
    save_file(halved, tmp_path / "a" / "adapter_model.safetensors")
    store = open_store(tmp_path / "a", saved.base_file)
    found = spectrum(store)
    for layer in found.layers:
        info = store.info(layer.name)
        assert layer.dtype == str(info.dtype).removeprefix("torch.")
        assert layer.dtype == str(dtype).removeprefix("torch.")
        assert layer.scale == info.scale


def test_scales_of_methods_are_told(adapters: Callable[[str], Saved]) -> None:
    for name, scale in {"LOHA": 2.5, "LOKR": 5.0, "GRALORA": 1.5}.items():
        assert {layer.scale for layer in spectrum(adapters(name).folder).layers} == {scale}


def test_plain_updates_tell_their_own_scale_and_dtype() -> None:
    one, two = LowRank(normal(6, 2), normal(2, 5), 3.0), LowRank(normal(6, 2), normal(2, 5), 0.5)
    half = LowRank(normal(6, 2).bfloat16(), normal(2, 5).bfloat16(), 7.0)
    found = spectrum({"a": Hadamard(one, two), "b": Kronecker(one, two, 4.0), "c": half, "d": Dense(normal(6, 5))})
    assert [layer.scale for layer in found.layers] == [1.5, 4.0, 7.0, 1.0]
    assert [layer.dtype for layer in found.layers][2:] == ["bfloat16", "float32"]


def test_totals_leave_out_what_has_not_changed() -> None:
    layers = {
        "a": planted((30, 20), [2.0]),
        "b": planted((30, 20), [1.0, 1.0]),
        "zero": LowRank(torch.zeros(30, 4), torch.ones(4, 20)),
    }
    result = spectrum(layers)
    total = result.total
    assert (total.layers, total.zero) == (3, 1)
    assert total.energy == pytest.approx(6.0)
    assert total.norm == pytest.approx(math.sqrt(6.0))
    assert total.median["stable_rank"] == pytest.approx(1.5)
    assert total.weighted_mean["stable_rank"] == pytest.approx((4 * 1 + 2 * 2) / 6)
    assert any("1 of 3 layers have not changed" in note and "zero" in note for note in result.notes)
    assert result["zero"].measures["entropy_rank"] == 0


def test_all_zero_is_an_answer() -> None:
    result = spectrum({"zero": LowRank(torch.zeros(6, 2), torch.ones(2, 5))})
    assert result.total.energy == 0
    assert set(result.total.median.values()) == set(result.total.weighted_mean.values()) == {0.0}
    json.dumps(result.to_json(), allow_nan=False)


def test_top_shortens_the_list_and_nothing_else() -> None:
    whole, cut = spectrum(planted_layers()), spectrum(planted_layers(), top=2)
    for a, b in zip(whole.layers, cut.layers, strict=True):
        assert b.singular_values == a.singular_values[:2]
        assert (b.count, b.measures, b.noise) == (a.count, a.measures, a.noise)
    assert cut["layers.2.q"].count == 5
    with pytest.raises(ConfigError, match="top = 0"):
        spectrum(planted_layers(), top=0)


def test_json_round_trip_and_contract() -> None:
    layers = planted_layers()
    layers["half"] = Dense.difference(normal(8, 6).to(torch.float16), normal(8, 6, seed=1).to(torch.float16))
    result = spectrum(layers)
    text = json.dumps(result.to_json(), allow_nan=False)
    value = json.loads(text)
    assert value["schema"] == "rankscope.spectrum/1"
    assert value["kind"] == "mapping"
    for layer in value["layers"]:
        assert layer.keys() >= CONTRACT
        assert layer["measures"].keys() == MEASURES.keys()
    assert value["layers"][0]["noise"].keys() >= {*MEASURES, "mp_count", "gd_count"}
    assert SpectrumResult.from_json(value) == result
    assert SpectrumResult.from_json(value).to_json() == value


@pytest.mark.parametrize(
    "value", [{}, {"schema": "rankscope.spectrum/99"}, {"schema": "rankscope.spectrum/1", "layers": 3}, []]
)
def test_other_json_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="schema"):
        SpectrumResult.from_json(value)


def test_same_from_path_store_and_mapping(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", linear("block.q", seed=1))
    store = open_store(folder)
    from_path, from_store = spectrum(folder), spectrum(store)
    assert from_path.layers == from_store.layers
    assert from_path.layers == spectrum({name: store[name] for name in store}).layers
    assert from_path.path == from_store.path == str(folder)
    assert from_path.kind == "peft"


def test_a_file_against_numpy(tmp_path: Path) -> None:
    tensors = linear("block.q", out=12, n=9, r=3, seed=5)
    tensors = {key: value.to(torch.bfloat16) for key, value in tensors.items()}
    folder = write_adapter(tmp_path, tensors, r=3, lora_alpha=7)
    B, A = (tensors[f"{PREFIX}block.q.lora_{x}.weight"].double().numpy() for x in "BA")
    expected = np.linalg.svd(7 / 3 * B @ A, compute_uv=False)[:3]
    np.testing.assert_allclose(spectrum(folder)["block.q"].singular_values, expected, rtol=1e-12)


def test_checkpoint_minus_base_lists_what_it_skips(tmp_path: Path) -> None:
    base = {"fc.weight": normal(8, 6).float(), "norm.weight": normal(6).float()}
    tuned = {"fc.weight": base["fc.weight"] + planted((8, 6), [2.0]).dense(), "norm.weight": base["norm.weight"]}
    origin, path = write_checkpoint(tmp_path / "base.safetensors", base), tmp_path / "tuned.safetensors"
    write_checkpoint(path, tuned)
    result = spectrum(path, base=origin)
    assert result["fc"].measures["stable_rank"] == pytest.approx(1.0, rel=1e-5)
    assert [one.name for one in result.skipped] == ["norm.weight"]
    assert "one-dimensional" in result.skipped[0].reason


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("q_proj", ["layers.1.q_proj", "layers.10.q_proj"]),
        ("layers.1", ["layers.1.q_proj", "layers.1.v_proj"]),
        ("*v_proj", ["layers.1.v_proj"]),
        ("layers.1?.*", ["layers.10.q_proj"]),
        ("proj", []),
        ("layers.1.q_proj", ["layers.1.q_proj"]),
    ],
)
def test_patterns(pattern: str, kept: list[str]) -> None:
    names = ["layers.1.q_proj", "layers.1.v_proj", "layers.10.q_proj"]
    assert [name for name in names if matches_pattern(name, pattern)] == kept


def test_layers_are_selected_in_order() -> None:
    assert [x.name for x in spectrum(planted_layers(), layers=["full", "layers.10"]).layers] == [
        "layers.2.full",
        "layers.10.q",
    ]
    with pytest.raises(RankscopeError, match=r"no layer fits 'nothing'; it has layers\.2\.full"):
        spectrum(planted_layers(), layers="nothing")


def test_a_bad_layer_is_named(tmp_path: Path) -> None:
    tensors = {**linear("block.good"), **linear("block.bad", seed=1)}
    tensors[f"{PREFIX}block.bad.lora_A.weight"][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"block\.bad.*NaN"):
        spectrum(write_adapter(tmp_path, tensors))


def test_bad_sources_and_devices(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        spectrum(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="expected a path"):
        spectrum(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cuda:77"):
        spectrum(planted_layers(), device="cuda:77")


def test_progress_sees_every_layer() -> None:
    seen: list[list[str]] = []

    def track(names: list[str]) -> list[str]:
        seen.append(names)
        return names

    spectrum(planted_layers(), track=track)
    assert seen == [["layers.2.full", "layers.2.q", "layers.10.q"]]


def test_reprs_name_their_measures() -> None:
    result = spectrum({"<q>": planted((30, 20), SIGMA), "full": planted_dense((24, 16), SIGMA)})
    assert "2 layers" in repr(result)
    assert "stable_rank 1.41" in repr(result)
    page = result._repr_html_()
    assert "&lt;q&gt;" in page
    assert "<q>" not in page
    assert "<th>noise k90</th>" in page


def test_titles_tell_runs_apart() -> None:
    def title(path: str) -> str:
        return SpectrumResult.from_json({**spectrum({"a": planted((4, 3), [1.0])}).to_json(), "path": path}).title

    assert title("study/runs/lora-r8-s0/adapter") == "lora-r8-s0"
    assert title("study/runs/full-s0/update.safetensors") == "full-s0"
    assert title("some/adapters/mine") == "mine"


def decaying(shape: tuple[int, int], power: float, seed: int = 0) -> Dense:
    return planted_dense(shape, [(i + 1.0) ** -power for i in range(min(shape))], seed=seed)


def test_a_sketch_gives_bounds_and_says_so() -> None:
    layers = {
        "a": decaying((660, 650), 1.2),
        "b": decaying((640, 700), 0.3, seed=4),
        "small": decaying((40, 30), 1.0),
        "thin": planted((660, 650), SIGMA, seed=8),
    }
    whole, rough = spectrum(layers), spectrum(layers, sketch=8)
    for name in ("small", "thin"):  # cheaper whole
        assert rough[name] == whole[name]
    for name in ("a", "b"):
        layer, exact = rough[name], whole[name]
        assert (layer.count, len(layer.singular_values), layer.energy) == (8, 8, exact.energy)
        assert np.allclose(layer.singular_values, exact.singular_values[:8], rtol=1e-6)
        assert layer.residuals is not None
        assert max(layer.residuals) < 1e-3 * layer.singular_values[0]
        assert layer.bounds is not None
        for measure, value in exact.measures.items():
            low, high = layer.interval(measure)
            assert low * (1 - 1e-5) <= value <= high * (1 + 1e-5)
            assert exact.interval(measure) == (value, value)
        assert layer.measures.keys() < exact.measures.keys()
        assert layer.measures["stable_rank"] == pytest.approx(exact.measures["stable_rank"], rel=5e-4)
    assert rough.total.energy == whole.total.energy
    assert rough.total.bounds is not None
    for measure, (low, high) in rough.total.bounds.items():
        assert low * (1 - 1e-5) <= whole.total.median[measure] <= high * (1 + 1e-5)
    assert rough.total.median.keys() < whole.total.median.keys()
    assert whole.total.bounds is None
    assert [note for note in rough.notes if note.startswith("2 of 4 layers were sketched")]
    assert SpectrumResult.from_json(json.loads(json.dumps(rough.to_json(), allow_nan=False))) == rough
    assert "–" in rough._repr_html_()
    with pytest.raises(ConfigError, match="sketch = 0"):
        spectrum(layers, sketch=0)
