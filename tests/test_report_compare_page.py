"""``compare --report`` and ``spectrum --report``: documents against hand-worked numbers, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from adapters import linear, write_adapter
from command_line import run
from makers import frame, normal, planted
from scipy.stats import beta

import rankscope
from rankscope.errors import ConfigError
from rankscope.measures import measures_shown
from rankscope.report import compare_page as comparison
from rankscope.report import spectrum_page as spectrum
from rankscope.report.document import Cell, Document, Section, Table
from rankscope.report.page import render_page
from rankscope.spectra import noise_measures
from rankscope.train.study import versions
from rankscope.updates import Dense, LowRank, Update


def columns(table: Table) -> dict[str, list[Cell]]:
    assert len(set(table.header)) == len(table.header), "two columns have the same title"
    assert all(len(row) == len(table.header) for row in table.rows)
    return {title: [row[i] for row in table.rows] for i, title in enumerate(table.header)}


def part(document: Document, key: str) -> Section:
    (found,) = (section for section in document.sections if section.key == key)
    return found


def tables(document: Document) -> dict[str, Table]:
    return {table.name: table for section in document.sections for table in section.tables}


def factors(left: list[list[float]], right: list[list[float]]) -> LowRank:
    """B from its columns and A from its rows."""
    return LowRank(torch.tensor(left, dtype=torch.float64).T, torch.tensor(right, dtype=torch.float64))


HALF = 3 / math.sqrt(2)
# σ = (3, 1); one direction with σ = 3, at 45° to the first on the left, the same on the right. Shape 4 × 3.
A: dict[str, Update] = {
    "q": factors([[3, 0, 0, 0], [0, 1, 0, 0]], [[1, 0, 0], [0, 1, 0]]),
    "only.a": factors([[1, 0, 0, 0]], [[1, 0, 0]]),
}
B: dict[str, Update] = {
    "q": factors([[HALF, 0, HALF, 0]], [[1, 0, 0]]),
    "z": LowRank(torch.zeros(4, 1), torch.ones(1, 3)),
}


@pytest.fixture(scope="module")
def compared() -> Document:
    result = rankscope.compare(A, {**B, "only.a": factors([[0, 0, 0, 0]], [[1, 0, 0]])})
    return comparison.build_document(result, command="rankscope compare a b")


def test_directions(compared: Document) -> None:
    """φ(1, 1) = cos²45° = ½ of ¼ in four dimensions (sd ¼, p = .18 as in the table of compare); 1 of ⅓ in three."""
    found = columns(tables(compared)["directions"])
    assert found["layer"] == ["q"]
    assert found["out × in"] == ["4 × 3"]
    assert found["k"] == [1]
    assert found["φ left"] == pytest.approx([0.5])
    assert found["chance left"] == pytest.approx([0.25])
    assert found["z left"] == pytest.approx([1.0])
    assert found["p left"] == pytest.approx([1 - 2 / math.pi * (math.pi / 4 + 0.5)])
    assert found["φ right"] == pytest.approx([1.0])
    assert found["chance right"] == pytest.approx([1 / 3])
    assert found["near-equal σ"] == [None]


def test_spans(compared: Document) -> None:
    """The whole spans, 2 × 1: 45° on the left; by chance φ = 2/4, a distance of √(1 − ½). No angle on the right."""
    left, right = (columns(tables(compared)[f"spans-{side}"]) for side in ("left", "right"))
    assert left["i × j"] == ["2 × 1"]
    assert left["φ"] == pytest.approx([0.5])
    assert left["chance"] == pytest.approx([0.5])
    assert left["least angle (°)"] == left["largest angle (°)"] == pytest.approx([45.0])
    assert left["projection"] == pytest.approx([math.sqrt(0.5)])
    assert left["by chance"] == pytest.approx([math.sqrt(0.5)])
    assert left["geodesic"] == pytest.approx([math.pi / 4])
    assert left["Fubini–Study"] == pytest.approx([math.pi / 4])
    assert left["Procrustes"] == pytest.approx([math.sqrt(2 - math.sqrt(2))])
    assert right["largest angle (°)"] == pytest.approx([0.0], abs=1e-6)
    assert right["by chance"] == pytest.approx([math.sqrt(1 / 3)])


def test_angles_are_degrees_from_least_to_largest() -> None:
    """Planes at 30° and 60°: cos² add up to 1, a distance of 1; φ = ½, as by chance in four dimensions."""
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    a = {"q": factors([[2, 0, 0, 0], [0, 1, 0, 0]], [[1, 0, 0], [0, 1, 0]])}
    b = {"q": factors([[2 * c, 0, 2 * s, 0], [0, s, 0, c]], [[1, 0, 0], [0, 1, 0]])}
    found = columns(tables(comparison.build_document(rankscope.compare(a, b)))["spans-left"])
    assert found["least angle (°)"] == pytest.approx([30.0])
    assert found["largest angle (°)"] == pytest.approx([60.0])
    assert found["projection"] == pytest.approx([1.0])
    assert found["by chance"] == pytest.approx([1.0])


def test_sizes(compared: Document) -> None:
    """Norms √10 and 3, inner product 9/√2: cosine 9/(√2·√10·3), ‖a − b‖² = 19 − 18/√2."""
    found = columns(tables(compared)["sizes"])
    assert found["rank of a"] == [2]
    assert found["‖a‖"] == pytest.approx([math.sqrt(10)])
    assert found["‖b‖"] == pytest.approx([3.0])
    assert found["‖a‖/‖b‖"] == pytest.approx([math.sqrt(10) / 3])
    assert found["cosine"] == pytest.approx([3 / math.sqrt(20)])
    assert found["cosine by chance (sd)"] == pytest.approx([1 / math.sqrt(12)])
    assert found["relative difference"] == pytest.approx([math.sqrt((19 - 18 / math.sqrt(2)) / 10)])


def test_the_chance_of_a_cosine() -> None:
    """The standard deviation in the table against updates that are turned at random; 1/√out would be far off."""
    cosines = []
    for seed in range(400):
        a, b = (planted((8, 6), (2.0, 1.0), seed=2000 * n + 2 * seed) for n in (1, 2))
        cosines.append(a.inner(b) / a.norm / b.norm)
    found = columns(tables(comparison.build_document(rankscope.compare({"q": a}, {"q": b})))["sizes"])
    expected = found["cosine by chance (sd)"][0]
    assert isinstance(expected, float)
    measured = math.sqrt(sum(c * c for c in cosines) / len(cosines))
    assert measured == pytest.approx(expected, rel=0.15)
    assert measured != pytest.approx(1 / math.sqrt(8), rel=0.15)


def test_what_was_left_out(compared: Document) -> None:
    assert columns(tables(compared)["unmatched"]) == {"layer": ["z"], "only in": ["b"]}
    assert columns(tables(compared)["skipped"])["tensor"] == ["only.a"]
    assert part(compared, "left-out").lead == "1 layer has no partner, and 1 tensor was skipped."
    same = comparison.build_document(rankscope.compare({"q": A["q"]}, {"q": A["q"]}))
    assert part(same, "left-out").lead == "Every layer of both was compared."
    assert not part(same, "left-out").tables


def test_the_words_have_the_numbers(compared: Document) -> None:
    assert "φ = 0.500 (chance 0.250) in the output space (left)" in compared.lead
    assert "φ = 1.00 (chance 0.333) in the input space (right), median over 1 layer" in compared.lead
    assert "The cosine of the updates, all layers as one vector, is 0.671." in compared.lead
    (picture,) = part(compared, "directions").pictures
    assert "φ(1, 1) is 0.500 in the output space (left), by chance 0.250" in picture.alt
    assert compared.title == "a against b"
    assert compared.facts["compared"] == "updates ΔW"
    assert compared.provenance["command"] == "rankscope compare a b"
    assert compared.provenance["versions"] == versions()


def aligned(n: int, strangers: int) -> tuple[dict[str, Update], dict[str, Update]]:
    """n layers of which all but the last ``strangers`` are the same in both, rank 4 in 64 dimensions."""
    a: dict[str, Update] = {f"layers.{i}.q": planted((64, 64), (4.0, 3.0, 2.0, 1.0), seed=10 * i) for i in range(n)}
    b = dict(a)
    for i in range(n - strangers, n):
        b[f"layers.{i}.q"] = planted((64, 64), (4.0, 3.0, 2.0, 1.0), seed=1000 + 10 * i)
    return a, b


def test_layers_above_chance_are_counted() -> None:
    document = comparison.build_document(rankscope.compare(*aligned(5, strangers=2)))
    lead = part(document, "directions").lead
    assert "in 3 of 5 layers in the output space (left) and in 3 of 5 layers in the input space (right)" in lead


def tilted(p: float) -> tuple[LowRank, LowRank]:
    """Two lines in four dimensions at an angle that random ones fall below with probability p: cos² ~ Beta(½, 3/2)."""
    cosine = math.sqrt(float(beta.isf(p, 0.5, 1.5)))
    turned = [cosine, math.sqrt(1 - cosine**2), 0, 0]
    return factors([[1, 0, 0, 0]], [[1, 0, 0, 0]]), factors([turned], [turned])


def test_layers_are_counted_after_correction() -> None:
    """Five layers with p = .005 each are no news; one with p = .001 among them is: 5 · .001 < .01."""
    ps = {"a": 0.005, "b": 0.005, "c": 0.005, "d": 0.005, "e": 0.001}
    pairs = {name: tilted(p) for name, p in ps.items()}
    result = rankscope.compare({n: a for n, (a, _) in pairs.items()}, {n: b for n, (_, b) in pairs.items()})
    document = comparison.build_document(result)
    assert columns(tables(document)["directions"])["p left"] == pytest.approx(list(ps.values()))
    assert "in 1 of 5 layers in the output space (left)" in part(document, "directions").lead


def test_the_picture_and_the_numbers_behind_it() -> None:
    a, b = aligned(3, strangers=1)
    result = rankscope.compare(a, b)
    (picture,) = part(comparison.build_document(result), "directions").pictures
    found = columns(picture.data)
    cuts = list(zip(found["i of a"], found["j of b"], strict=True))
    assert cuts == [(i, j) for i in (1, 2, 4) for j in (1, 2, 4)]
    assert found["φ left"] == pytest.approx([1.0] * 9), "the median over three layers, two of which are the same"
    assert found["chance left"] == pytest.approx([max(i, j) / 64 for i in (1, 2, 4) for j in (1, 2, 4)])
    last = part(comparison.build_document(result, layer="layers.2.q"), "directions").pictures[0]
    stranger = result["layers.2.q"].left
    assert stranger is not None
    assert columns(last.data)["φ left"][-1] == pytest.approx(stranger.overlap[3, 3])
    assert picture.draw().axes
    with pytest.raises(ConfigError, match="no layer"):
        comparison.build_document(result, layer="nowhere")


@pytest.mark.parametrize(("last", "cuts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])])
def test_cuts(last: int, cuts: list[int]) -> None:
    assert comparison.powers_of_two(last) == cuts


def test_near_equal_values_are_marked() -> None:
    """a's second and third σ are the same, and two directions are compared."""
    U, V = frame(16, 4, seed=1), frame(12, 4, seed=2)
    a = {"q": LowRank(U * torch.tensor([3.0, 1.0, 1.0, 0.5]), V.T)}
    b = {"q": LowRank(U[:, :2] * torch.tensor([3.0, 1.0]), V[:, :2].T)}
    assert columns(tables(comparison.build_document(rankscope.compare(a, b)))["directions"])["near-equal σ"] == ["a"]
    assert columns(tables(comparison.build_document(rankscope.compare(b, a)))["directions"])["near-equal σ"] == ["b"]


def test_factors_have_one_side_and_no_cosine() -> None:
    document = comparison.build_document(rankscope.compare(A, {"q": B["q"]}, of="A"))
    assert set(tables(document)) == {"directions", "spans-right", "unmatched"}
    assert "φ left" not in tables(document)["directions"].header
    assert "cosine" not in document.lead
    assert document.facts["compared"] == "factors A"


def test_other_names_and_remarks_are_shown() -> None:
    full = {"base.q": Dense(normal(80, 70))}
    document = comparison.build_document(rankscope.compare({"q": planted((80, 70), (2.0, 1.0))}, full))
    assert columns(tables(document)["directions"])["in b"] == ["base.q"]
    assert any("top 64 directions" in note for note in part(document, "remarks").notes)
    assert "remarks" not in [s.key for s in comparison.build_document(rankscope.compare(A, A)).sections]


def spectra(*sources: Mapping[str, Update]) -> Document:
    return spectrum.build_document([rankscope.spectrum(source) for source in sources], "rankscope spectrum x")


def test_ranks_of_an_adapter() -> None:
    """By hand for (3, 1): stable 10/9, participation 100/82, entropy exp(H(¾, ¼)), k90 1; norm √10."""
    document = spectra({"q": A["q"]})
    found = columns(tables(document)["ranks-1"])
    assert found["r"] == found["numerical"] == [2]
    assert found["stable"] == pytest.approx([10 / 9])
    assert found["participation"] == pytest.approx([100 / 82])
    assert found["entropy"] == pytest.approx([math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))])
    assert found["k90"] == [1]
    assert not [title for title in found if "noise" in title], "a product of thin factors has no noise beside it"
    values = columns(tables(document)["values-1"])
    assert values["norm"] == pytest.approx([math.sqrt(10)])
    assert values["σ₁"] == pytest.approx([3.0])
    assert "stable 1.11, participation 1.22, entropy 1.75, k90 1" in document.sections[0].lead
    assert document.sections[0].lead.startswith("Ranks by measure, median over 1 layer:")


def test_a_full_update_has_the_noise_of_its_shape_beside_it() -> None:
    signal = 40 * frame(48, 1, seed=3) @ frame(40, 1, seed=4).T
    document = spectra({"fc": Dense(normal(48, 40) + signal)})
    found = columns(tables(document)["ranks-1"])
    noise = noise_measures((48, 40))
    for title, measure in ((measure.title, measure.name) for measure in measures_shown("medians")):
        assert found[f"{title}, noise"] == [noise[measure]]
        assert found[title] != found[f"{title}, noise"]
    assert "r" not in found
    values = columns(tables(document)["values-1"])
    assert values["σ above it (MP)"] == values["σ above noise (GD)"] == [1], "one planted direction, and noise"
    (edge,), (first,) = values["noise edge (MP)"], values["σ₁"]
    assert isinstance(edge, float)
    assert isinstance(first, float)
    assert math.sqrt(40) < edge < 40 < first
    assert "rounding edge" not in values
    assert f"k90 {found['k90'][0]} (noise {noise['k90']})" in document.sections[0].lead


def test_rounding_has_columns_where_weights_were_stored_in_half() -> None:
    base = normal(64, 64)
    tuned = base + planted((64, 64), (0.5, 0.4)).dense().double()
    full = Dense.difference(tuned.bfloat16(), base.bfloat16())
    found = columns(tables(spectra({"fc": full, "exact": Dense(normal(64, 64))}))["values-1"])
    floor = rankscope.spectrum({"fc": full})["fc"].rounding_floor
    assert floor is not None
    assert found["layer"] == ["exact", "fc"]
    assert found["rounding edge"] == [None, floor.edge]
    assert found["rounding, share of norm"] == [None, floor.share]
    assert found["k90 without rounding"] == [None, floor.measures["k90"]]


def test_several_updates_side_by_side() -> None:
    mixed: dict[str, Update] = {"q": A["q"], "k": planted((4, 3), (1.0,))}
    document = spectra({"q": A["q"]}, mixed, {"q": Dense(normal(4, 3))}, {"q": B["q"]})
    found = columns(tables(document)["overview"])
    assert found["layers"] == [1, 2, 1, 1]
    assert found["r"] == [2, None, None, 1], "nominal ranks that differ are not one"
    assert found["stable"][:2] == pytest.approx([10 / 9, (10 / 9 + 1) / 2])
    assert found["stable, noise"][:2] == [None, None]
    assert found["stable, noise"][2] == noise_measures((4, 3))["stable_rank"]
    assert [section.key for section in document.sections] == [
        "overview",
        "update-1",
        "update-2",
        "update-3",
        "update-4",
    ]
    assert [len(section.pictures) for section in document.sections] == [2, 0, 0, 0, 0]
    names = [table.name for section in document.sections for table in section.tables]
    assert len(names) == len(set(names))
    assert document.facts == {"updates": "4", "layers": "5"}
    assert render_page(document).count("<img ") == 2


def test_the_values_behind_the_picture() -> None:
    document = spectra({"q": planted((16, 12), (6.0, 5.0, 4.0, 3.0, 2.0, 1.0)), "k": planted((16, 12), (7.0, 1.0))})
    (picture,) = document.sections[0].pictures
    found = columns(picture.data)
    assert list(found) == ["layer", "σ1", "σ2", "σ4", "σ6"]
    assert found["layer"] == ["k", "q"]
    assert found["σ1"] == pytest.approx([7.0, 6.0])
    assert found["σ4"][1] == pytest.approx(3.0)
    assert found["σ4"][0] is None
    assert "σ₁ from 6 to 7" in picture.alt
    assert picture.draw().axes


def test_layers_that_have_not_changed_and_tensors_that_were_skipped(tmp_path: Path) -> None:
    zero = {"q": A["q"], "z": LowRank(torch.zeros(4, 1), torch.ones(1, 3))}
    document = spectra(zero)
    assert "median over 1 layer; 1 more have not changed at all" in document.sections[0].lead
    assert any("have not changed" in note for note in document.sections[0].notes)
    nothing = spectra({"z": LowRank(torch.zeros(4, 1), torch.ones(1, 3))})
    assert "no layer has changed" in nothing.sections[0].pictures[0].alt


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "one", {**linear("block.q"), **linear("block.<b>v</b>", seed=1)})


@pytest.mark.parametrize(("command", "form"), [("spectrum", []), ("spectrum", ["--csv"]), ("compare", ["--json"])])
def test_the_option(
    command: str, form: list[str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "page.html"
    arguments = [command, adapter, *([adapter] if command == "compare" else []), *form]
    code, out, err = run(capsys, *arguments, "--report", target)
    assert code == 0
    assert f"wrote {target}" in err
    assert out == run(capsys, *arguments)[1]
    text = target.read_text(encoding="utf-8")
    assert "block.&lt;b&gt;v&lt;/b&gt;" in text.replace("<wbr>", "")
    assert "<b>v" not in text


def test_quiet(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "spectrum", adapter, "--report", tmp_path / "page.html", "--quiet")[2] == ""
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize("command", ["spectrum", "compare"])
@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("page.pdf", 2, "written as .html"),
        ("page", 2, "written as .html"),
        ("folder.html", 2, "is a folder"),
        ("file/page.html", 1, "cannot be written"),
    ],
)
def test_what_it_refuses(
    command: str, name: str, code: int, message: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("x")
    ended, out, err = run(capsys, command, adapter, adapter, "--report", tmp_path / name)
    assert (ended, out) == (code, "")
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_layer_of_a_page(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "page.html"
    assert run(capsys, "compare", adapter, adapter, "--report", target, "--layer", "block.q")[0] == 0
    assert "colours; block.q." in target.read_text(encoding="utf-8")
    code, out, err = run(capsys, "compare", adapter, adapter, "--report", target, "--layer", "block.x")
    assert (code, out, "no layer 'block.x'" in err) == (1, "", True)
