"""Figures: they show the numbers they are given, mark what must be marked, and are written whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from makers import normal, planted
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rankscope import plots
from rankscope.analysis.comparison import CompareResult, compare
from rankscope.analysis.layer_spectra import SpectrumResult, spectrum
from rankscope.analysis.matrix import compare_all
from rankscope.errors import ConfigError, FormatError
from rankscope.plots import PerformancePoint
from rankscope.plots.overlap_figure import _ticks
from rankscope.plots.spectrum_figure import layer_kind
from rankscope.updates import Dense, LowRank

MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


def drawn(figure: Figure) -> list[Axes]:
    figure.canvas.draw()
    return [axes for axes in figure.axes if axes.get_visible()]


def texts(figure: Figure) -> str:
    """All that a figure says: titles, labels, legends, notes."""
    figure.canvas.draw()
    found = []
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), *(t.get_text() for t in axes.texts)]
        if (legend := axes.get_legend()) is not None:
            found += [legend.get_title().get_text(), *(t.get_text() for t in legend.get_texts())]
    found += [t.get_text() for legend in figure.legends for t in (legend.get_title(), *legend.get_texts())]
    return "\n".join([*found, *(t.get_text() for t in figure.texts), figure.get_suptitle()])


def adapter(layers: int = 2, r: int = 4) -> dict[str, LowRank]:
    sigma = np.geomspace(4, 0.5, r)
    return {
        f"layers.{n}.attn.{kind}": planted((20, 16), sigma * (n + 1), seed=10 * n + k)
        for n in range(layers)
        for k, kind in enumerate(("q_proj", "v_proj"))
    }


def full() -> Dense:
    return Dense(planted((48, 40), [3.0, 2.0]).dense() + 0.01 * normal(48, 40))


def curves(axes: Axes) -> list[np.ndarray]:
    """y of the lines over data; marks and edges are drawn in other coordinates."""
    found = [line for line in axes.lines if line.get_transform() == axes.transData and len(line.get_xdata()) > 2]
    return [np.asarray(line.get_ydata()) for line in found]


def test_spectra_draw_every_layer_on_a_log_axis() -> None:
    figure = plots.plot_spectra([spectrum(adapter())])
    (axes,) = drawn(figure)
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    expected = [np.geomspace(4, 0.5, 4) * (n + 1) for n in (0, 0, 1, 1)]
    np.testing.assert_allclose(sorted(map(tuple, curves(axes))), sorted(map(tuple, expected)), rtol=1e-12)
    said = texts(figure)
    for part in ("q_proj", "v_proj", "stable", "entropy", "k90", "4 layers"):
        assert part in said
    assert "noise" not in said


def test_layers_of_one_kind_share_a_colour() -> None:
    (axes,) = drawn(plots.plot_spectra([spectrum(adapter(layers=3))]))
    lines = [line for line in axes.lines if len(line.get_xdata()) == 4]
    assert len({line.get_color() for line in lines}) == 2
    assert len({line.get_alpha() for line in lines}) == 3


def test_effective_ranks_are_marked_where_they_are() -> None:
    result = spectrum(adapter())
    (axes,) = drawn(plots.plot_spectra([result]))
    marked = {float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
    assert marked == {result.total.median[name] for name in ("stable_rank", "entropy_rank", "k90")}


def test_full_updates_show_the_noise_edge() -> None:
    result = spectrum({"layers.0.fc": full()})
    figure = plots.plot_spectra([result])
    (axes,) = drawn(figure)
    noise = result.layers[0].noise
    assert noise is not None
    levels = [line.get_ydata()[0] for line in axes.lines if line.get_label().startswith("noise edge")]
    assert levels == [noise["mp_edge"]]
    assert f"(noise {noise['k90']:.3g})" in texts(figure)
    assert axes.get_xscale() == "log"  # 40 singular values


def test_half_precision_shows_the_rounding_edge() -> None:
    base = normal(48, 40, dtype=torch.bfloat16)
    tuned = (base.float() + planted((48, 40), [1.0]).dense()).to(torch.bfloat16)
    result = spectrum({"fc": Dense.difference(tuned, base)})
    (axes,) = drawn(plots.plot_spectra([result]))
    floor = result.layers[0].rounding_floor
    assert floor is not None
    levels = [line.get_ydata()[0] for line in axes.lines if line.get_label().startswith("rounding edge")]
    assert levels == [floor.edge]


def test_unchanged_layers_are_said() -> None:
    zero = LowRank(torch.zeros(20, 4), torch.ones(4, 16))
    assert "3 layers, 1 unchanged" in texts(plots.plot_spectra([spectrum({**adapter(1), "o_proj": zero})]))
    assert "no layer has changed" in texts(plots.plot_spectra([spectrum({"o_proj": zero})]))


def test_panels_share_axes_and_leave_no_empty_one() -> None:
    figure = plots.plot_spectra([spectrum(adapter(r=r)) for r in (1, 2, 3, 4, 8)])
    panels = drawn(figure)
    assert len(panels) == 5
    assert len({axes.get_ylim() for axes in panels}) == len({axes.get_xlim() for axes in panels}) == 1


def test_many_kinds_do_not_flood_the_legend() -> None:
    many = {f"layers.0.{chr(97 + k) * 3}": planted((20, 16), [2.0, 1.0, 0.5], seed=k) for k in range(12)}
    figure = plots.plot_spectra([spectrum(many)])
    entries = figure.legends[0].get_texts()
    assert len(entries) == 8
    assert entries[-1].get_text() == "other"


@pytest.mark.parametrize(("name", "kind"), [("h.0.q_proj", "q_proj"), ("block.q.0", "q"), ("3", "3")])
def test_kind(name: str, kind: str) -> None:
    assert layer_kind(name) == kind


def pair() -> CompareResult:
    sigma = [4.0, 3.99, 2.0, 1.0]
    a = {f"l.{n}": planted((30, 20), sigma, seed=2 * n) for n in range(3)}
    b = {f"l.{n}": planted((30, 20), [3.0, 2.0, 1.0], seed=40 + 2 * n) for n in range(3)}
    return compare(a, b)


def images(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for axes in drawn(figure) for image in axes.images]


def test_overlap_stands_beside_chance_on_the_same_colours() -> None:
    result = pair()
    figure = plots.plot_overlap(result)
    left, left_chance, right, right_chance = images(figure)
    sides = [(layer.left, layer.right) for layer in result.layers]
    np.testing.assert_array_equal(left, np.median([side.overlap for side, _ in sides], axis=0))
    np.testing.assert_array_equal(right, np.median([side.overlap for _, side in sides], axis=0))
    i, j = np.mgrid[1:5, 1:4]
    np.testing.assert_allclose(left_chance, np.maximum(i, j) / 30)
    np.testing.assert_allclose(right_chance, np.maximum(i, j) / 20)
    assert {image.get_clim() for axes in figure.axes for image in axes.images} == {(0.0, 1.0)}
    said = texts(figure)
    for part in ("top i directions of a", "top j directions of b", "overlap φ", "median over 3 layers", "updates ΔW"):
        assert part in said


def test_cuts_inside_a_cluster_are_hatched() -> None:
    figure = plots.plot_overlap(pair())
    spans = [patch for axes in figure.axes for patch in axes.patches if patch.get_hatch()]
    assert len(spans) == 2  # the cut after the first of a, on the left and on the right: a row of cells
    assert {(span.get_y(), span.get_height()) for span in spans} == {(0.5, 1.0)}
    turned = plots.plot_overlap(compare({"w": planted((30, 20), [3.0])}, {"w": planted((30, 20), [2.0, 1.0, 0.999])}))
    columns = [patch for axes in turned.axes for patch in axes.patches if patch.get_hatch()]
    assert {(span.get_x(), span.get_width()) for span in columns} == {(1.5, 1.0)}
    assert "arbitrary" in texts(figure)
    plain = {"w": planted((30, 20), [3.0, 2.0])}
    assert "arbitrary" not in texts(plots.plot_overlap(compare(plain, plain)))


def test_one_layer_and_one_side() -> None:
    result = pair()
    figure = plots.plot_overlap(result, layer="l.1")
    assert result["l.1"].left is not None
    np.testing.assert_array_equal(images(figure)[0], result["l.1"].left.overlap)
    assert "l.1" in figure.get_suptitle()
    with pytest.raises(ConfigError, match=r"no layer 'l\.9'"):
        plots.plot_overlap(result, layer="l.9")
    a = {"w": planted((30, 20), [3.0, 2.0])}
    one = plots.plot_overlap(compare(a, a, of="A"))
    assert len(images(one)) == 2
    assert "factors A" in texts(one)
    assert "input space" in texts(one)


def test_the_most_common_size_is_shown_and_said() -> None:
    a = {name: planted((30, 20), [3.0, 2.0, 1.0][:r], seed=r) for name, r in (("p", 3), ("q", 3), ("o", 2))}
    figure = plots.plot_overlap(compare(a, a))
    assert images(figure)[0].shape == (3, 3)
    assert "median over 2 layers (1 with another number of directions left out)" in figure.get_suptitle()


@pytest.mark.parametrize("n", [1, 2, 8, 9, 16, 64, 65, 300, 5000])
def test_ticks_are_few_and_inside(n: int) -> None:
    ticks = _ticks(n)
    assert ticks[0] == 1
    assert ticks == sorted(set(ticks))
    assert ticks[-1] <= n
    assert len(ticks) <= 9


def points(seeds: int = 2, series: str = "LoRA", edge: int | None = None) -> list[PerformancePoint]:
    """Three ranks and full fine-tuning; ``edge`` is the rank whose rate lies at the end of the grid."""
    lora = [
        PerformancePoint(f"r = {r}", "lora", r, min(r, 3) + 0.1 * s, 0.8 + 0.02 * i + 0.01 * s, s, series, r == edge)
        for i, r in enumerate((1, 4, 16))
        for s in range(seeds)
    ]
    return lora + [PerformancePoint("full", "full", None, 90.0, 0.9 + 0.01 * s, s) for s in range(seeds)]


def marked(axes: Axes, marker: str, fill: str | None = None) -> set[tuple[float, ...]]:
    """Where this marker stands; with ``fill``, only those filled so."""
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return {tuple(xy) for line in lines if fill in (None, line.get_markerfacecolor()) for xy in line.get_xydata()}


def joined(axes: Axes, points: int) -> list[np.ndarray]:
    """The lines through so many points, without markers of their own."""
    lines = [line for line in axes.lines if line.get_marker() == "None" and line.get_transform() == axes.transData]
    return [line.get_xydata() for line in lines if len(line.get_xdata()) == points]


def test_performance_against_both_ranks() -> None:
    figure = plots.plot_performance(points(), metric="accuracy", measure="entropy_rank", baseline=0.6)
    left, right = drawn(figure)
    assert left.get_xscale() == "log"
    assert left.get_xlabel() == "nominal rank r"
    assert right.get_xlabel() == "effective rank of the update: entropy rank"
    assert "higher is better" in left.get_ylabel()
    lora = [p for p in points() if p.method == "lora"]
    assert marked(left, "o") == {(p.nominal_rank, p.score) for p in lora}
    (means,) = joined(left, 3)
    np.testing.assert_allclose(means, [(1, 0.805), (4, 0.825), (16, 0.845)])
    assert marked(right, "o") >= {(p.effective_rank, p.score) for p in lora}
    (means,) = joined(right, 3)
    np.testing.assert_allclose(means, [(1.05, 0.805), (3.05, 0.825), (3.05, 0.845)])
    assert marked(right, "D") == {(90, 0.9), (90, 0.91)}
    assert {text.get_text() for text in right.texts} == {"1", "4", "16"}
    for axes in (left, right):
        levels = [line.get_ydata()[0] for line in axes.lines if line.get_label() == "untouched base"]
        assert levels == [0.6]
    said = texts(figure)
    for part in ("LoRA, a run", "LoRA, mean of the rank inside", "full fine-tuning", "untouched base"):
        assert part in said
    assert "end of the grid" not in said


def test_each_series_has_its_own_colour_and_marker() -> None:
    shifted = [replace(p, series="PiSSA", method="pissa", score=p.score - 0.1) for p in points() if p.nominal_rank]
    third = [replace(p, series="LoRA on q,v", score=p.score - 0.2) for p in points() if p.nominal_rank]
    figure = plots.plot_performance(points() + shifted + third, metric="accuracy", measure="entropy_rank")
    left, right = drawn(figure)
    assert marked(left, "o") == {(p.nominal_rank, p.score) for p in points() if p.nominal_rank}
    assert marked(left, "s") == {(p.nominal_rank, p.score) for p in shifted}
    assert marked(right, "s") == {(p.effective_rank, p.score) for p in shifted}
    assert marked(left, "^") == {(p.nominal_rank, p.score) for p in third}
    starts = sorted(float(line[0, 1]) for line in joined(left, 3))
    np.testing.assert_allclose(starts, [0.605, 0.705, 0.805])
    colours = {line.get_marker(): line.get_color() for line in left.lines if line.get_marker() != "None"}
    assert len(set(colours.values())) == 3
    assert {line.get_color() for line in right.lines if line.get_marker() == "D"}.isdisjoint(colours.values())
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == ["full fine-tuning, mean", "LoRA", "PiSSA", "LoRA on q,v", "full fine-tuning, a run"]
    assert sorted(text.get_text() for text in right.texts) == ["1", "1", "1", "16", "16", "16"]


def test_a_best_rate_at_the_end_of_the_grid_is_hollow() -> None:
    figure = plots.plot_performance(points(edge=16), metric="accuracy", measure="entropy_rank")
    left, right = drawn(figure)
    hollow = {(p.nominal_rank, p.score) for p in points() if p.nominal_rank == 16}
    assert marked(left, "o", "white") == hollow
    assert len(marked(left, "o")) == 6
    assert {text.get_text() for text in right.texts} == {"1", "4", "16!"}
    assert "best rate at the end of the grid (!)" in texts(figure)
    full = [replace(p, edge=p.method == "full") for p in points()]
    right = drawn(plots.plot_performance(full, metric="accuracy", measure="entropy_rank"))[1]
    assert marked(right, "D", "white") == {(90, 0.9), (90, 0.91)}


def test_methods_without_a_rank_are_lines_with_their_names() -> None:
    others = [PerformancePoint("bias", "bias", None, None, 0.70 + 0.02 * s, s, "biases only", True) for s in (0, 1)]
    others += [PerformancePoint("head", "head", None, None, 0.65, 0, "head only")]
    figure = plots.plot_performance(points() + others, metric="accuracy", measure="entropy_rank")
    left, right = drawn(figure)
    named = {text.get_text(): text.get_position()[1] for text in left.texts}
    assert named == {"biases only !": pytest.approx(0.71), "head only": 0.65}
    levels = sorted(line.get_ydata()[0] for line in left.lines if line.get_linestyle() == "-.")
    assert levels == pytest.approx([0.65, 0.71])
    assert not [line for line in right.lines if line.get_linestyle() == "-."]
    alone = plots.plot_performance(others, metric="accuracy", measure="entropy_rank")
    assert "head only" in texts(alone)


@pytest.mark.parametrize("names", [["LoRA"], ["LoRA", "PiSSA"], [f"LoRA on {'q_proj,' * i}v_proj" for i in range(7)]])
def test_the_legend_stays_inside(names: list[str]) -> None:
    some = [p for name in names for p in points(1, name, edge=16)]
    figure = plots.plot_performance(some, metric="accuracy", measure="entropy_rank", baseline=0.5)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 < min(axes.get_window_extent().y0 for axes in figure.axes)


def test_performance_with_parts_missing() -> None:
    lora = [point for point in points(1) if point.method == "lora"]
    figure = plots.plot_performance(lora, metric="loss", measure="k90", higher_is_better=False)
    said = texts(figure)
    assert "lower is better" in said
    assert "full" not in said
    assert "base" not in said
    alone = [point for point in points(1) if point.method == "full"]
    assert "no LoRA run" in texts(plots.plot_performance(alone, metric="loss", measure="k90"))
    with pytest.raises(ConfigError, match="nothing to plot"):
        plots.plot_performance([], metric="loss", measure="k90")
    with pytest.raises(ConfigError, match="nothing to plot"):
        plots.plot_spectra([])


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "PNG"])
def test_saved_whole_and_reproducibly(suffix: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        assert plots.save(plots.plot_spectra([spectrum(adapter(1))]), path) == path
    first, second = (path.read_bytes() for path in paths)
    assert first.startswith(MAGIC[suffix.lower()])
    assert first == second
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("name", ["plot.jpg", "plot", "plot.png.txt", ".png"])
def test_other_suffixes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf"):
        plots.save(Figure(), tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_unwritable_place_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="cannot be written"):
        plots.save(Figure(), tmp_path / "file" / "plot.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FormatError, match="is a folder"):
        plots.save(Figure(), tmp_path / "folder.png")


def test_no_global_state() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure = plots.plot_overlap(pair())
    figure.canvas.draw()
    assert dict(matplotlib.rcParams) == before


def test_dollar_signs_in_names_are_no_mathematics() -> None:
    """What stands between them need not be mathematics, and matplotlib would stop at that."""
    odd = replace_path(spectrum({"l.$q_{$": planted((20, 16), [2.0, 1.0], seed=1)}), "runs/a$x_{$")
    assert r"a\$x_{\$" in texts(plots.plot_spectra([odd]))
    a = {"l.$q_{$": planted((20, 16), [2.0, 1.0], seed=1)}
    plots.plot_overlap(compare(a, a), "l.$q_{$").canvas.draw()


def replace_path(result: SpectrumResult, path: str) -> SpectrumResult:
    return msgspec.structs.replace(result, path=path)


def test_the_levels_of_a_spectrum_are_the_medians_of_its_layers() -> None:
    result = spectrum({f"layers.{i}.fc": Dense(normal(30, 20, seed=i)) for i in range(3)})
    (axes,) = plots.plot_spectra([result]).axes
    edges = [layer.noise["mp_edge"] for layer in result.layers if layer.noise]
    (line,) = (line for line in axes.lines if str(line.get_label()).startswith("noise edge (MP)"))
    assert line.get_ydata()[0] == pytest.approx(np.median(edges))  # type: ignore[index]
    assert line.get_label() == f"noise edge (MP) {np.median(edges):.2g}"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("index", "singular value σ")
    curves = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 20]  # type: ignore[arg-type]
    assert [list(curve) for curve in curves] == [list(layer.singular_values) for layer in result.layers]  # type: ignore[arg-type]


def test_the_heat_maps_of_an_overlap_are_its_grids_and_chance() -> None:
    result = compare({"q": planted((9, 8), (3.0, 2.0), 1)}, {"q": planted((9, 8), (3.0, 2.0, 1.0), 2)})
    figure = plots.plot_overlap(result)
    maps = [axes for axes in figure.axes if axes.get_xlabel()]
    assert len(maps) == 4
    for row, (name, side) in enumerate(result["q"].sides.items()):
        drawn, chance = (np.asarray(axes.images[0].get_array()) for axes in maps[2 * row : 2 * row + 2])
        np.testing.assert_array_equal(drawn, side.overlap)
        np.testing.assert_array_equal(chance, side.expected)
        assert name in maps[2 * row].get_title()
        assert f"d = {side.d}" in maps[2 * row + 1].get_title()
    assert {axes.get_ylabel() for axes in figure.axes} == {"top i directions of a", "overlap φ"}


def test_the_matrix_shows_its_values_and_the_chance_level() -> None:
    result = compare_all([{"q": planted((9, 8), (3.0, 2.0), seed)} for seed in range(3)])
    tree, overlaps, cosines, *bars = plots.plot_matrix(result).axes
    order = result.order
    assert result.left is not None
    assert result.right is not None
    assert result.cosine is not None
    drawn = np.asarray(overlaps.images[0].get_array())
    for i, j in ((1, 0), (2, 0), (2, 1)):
        assert drawn[i, j] == result.left.overlap[order[i], order[j]]
        assert drawn[j, i] == result.right.overlap[order[j], order[i]]
    np.testing.assert_array_equal(np.asarray(cosines.images[0].get_array()), result.cosine[np.ix_(order, order)])
    assert overlaps.texts[1].get_text() == f"{drawn[0, 1]:.2f}".replace("0.", ".", 1)
    (level,) = tree.lines
    assert level.get_xdata()[0] == np.median(result.chance_distance[np.triu_indices(3, 1)])  # type: ignore[index]
    assert [label.get_text() for label in overlaps.get_xticklabels()] == [str(i + 1) for i in order]
    assert [bar.get_xlabel() for bar in bars] == ["overlap φ, median over layers", "cosine, all layers as one vector"]
    legend = tree.get_legend()
    assert legend is not None
    assert "chance" in [text.get_text() for text in legend.get_texts()]
