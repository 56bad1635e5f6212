"""``rankscope compare`` of several sources: tables, JSON, CSV, plot and page, ``--initial``, and every refusal."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import PREFIX, linear, write_adapter
from command_line import run
from makers import frame, normal

from rankscope.analysis.comparison import compare
from rankscope.analysis.layer_spectra import spectrum
from rankscope.analysis.matrix import MatrixResult, compare_all
from rankscope.formats.store import open as open_store
from rankscope.plots import plot_matrix, save
from rankscope.updates import LowRank


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """One, three and five share their spans in two layers, two and four theirs, and one has a layer more."""
    paths = []
    for i, name in enumerate(("one", "two", "three", "four", "five")):
        tensors = {}
        for layer in range(2):
            U, V = frame(60, 3, 100 * (i % 2) + layer), frame(50, 3, 100 * (i % 2) + 50 + layer)
            tensors[f"{PREFIX}x.{layer}.lora_B.weight"] = (U @ normal(3, 3, seed=7 * i + layer)).float().contiguous()
            tensors[f"{PREFIX}x.{layer}.lora_A.weight"] = V.T.float().contiguous()
        paths.append(write_adapter(tmp_path / name, tensors | (linear("x.own") if i == 0 else {}), r=3, lora_alpha=3))
    return paths


def test_table(capsys: pytest.CaptureFixture[str], adapters: list[Path]) -> None:
    code, out, err = run(capsys, "compare", *adapters)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "φ, median over 2 layers that all share (updates ΔW): left below the diagonal, right above"
    groups = [line.split()[0] for line in lines[2:7]]
    assert {*groups[:2]} == {"two", "four"} or {*groups[3:]} == {"two", "four"}
    row = next(line.split() for line in lines if line.startswith("one"))
    assert sorted(row[2:]) == sorted(["1.00", "1.00", "1.00", *[cell for cell in row if cell.startswith("(")]])
    assert len([cell for cell in row if cell.startswith("(0.")]) == 2
    assert "in brackets: not beyond chance, which is 0.05 to 0.06" in out
    assert out.splitlines()[-1].split() == ["1", "3", "5", "|", "2", "4", out.split()[-2], "no"]
    assert "note: 1 layer of one that not all have: x.own" in err
    assert "-0.00" not in out


def test_json_and_csv(capsys: pytest.CaptureFixture[str], adapters: list[Path]) -> None:
    _, out, _ = run(capsys, "compare", *adapters, "--json")
    result = MatrixResult.from_json(json.loads(out))
    assert result.to_json() == compare_all(adapters).to_json()
    _, out, _ = run(capsys, "compare", *adapters, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 10
    pair = compare(adapters[0], adapters[3])
    row = next(row for row in rows if (row["a"], row["b"]) == ("one", "four"))
    assert pair.summary.left is not None
    assert float(row["left_overlap"]) == pytest.approx(pair.summary.left.overlap, abs=1e-10)
    assert float(row["cosine"]) == pytest.approx(pair.summary.cosine, abs=1e-10)
    assert float(row["relative_difference"]) == pytest.approx(pair.summary.relative_difference, abs=1e-10)
    _, out, _ = run(capsys, "compare", *adapters, "--csv", "--of", "A")
    row = next(csv.DictReader(io.StringIO(out)))
    assert (row["left_overlap"], row["cosine"]) == ("", "")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_and_page(capsys: pytest.CaptureFixture[str], adapters: list[Path], tmp_path: Path, suffix: str) -> None:
    plot, page = tmp_path / f"m.{suffix}", tmp_path / "m.html"
    code, _, err = run(capsys, "compare", *adapters, "--plot", plot, "--report", page)
    assert code == 0
    assert plot.stat().st_size > 1000
    assert f"wrote {plot}" in err
    text = page.read_text()
    assert "5 sources, each with each" in text
    assert "4 of 10 pairs overlap beyond chance" in text
    assert "two, four" in text


def test_the_plot_says_what_the_numbers_say() -> None:
    sources = []
    for i in range(40):
        U, V = frame(60, 2, i % 4), frame(50, 2, 9 + i % 4)
        sources.append({"w": LowRank(U @ normal(2, 2, seed=i), V.T), "v": LowRank(V @ normal(2, 2, seed=i), U.T)})
    result = compare_all(sources)
    figure = plot_matrix(result)
    tree, overlaps, cosines = figure.axes[:3]
    drawn = np.asarray(overlaps.images[0].get_array())
    picked = np.ix_(result.order, result.order)
    assert result.left is not None
    assert result.right is not None
    assert result.cosine is not None
    np.testing.assert_array_equal(np.tril(drawn), np.tril(result.left.overlap[picked]))
    np.testing.assert_array_equal(np.triu(drawn, 1), np.triu(result.right.overlap[picked], 1))
    np.testing.assert_array_equal(np.asarray(cosines.images[0].get_array()), result.cosine[picked])
    dashed = [line for line in tree.lines if line.get_linestyle() == "--"]
    assert dashed[0].get_xdata()[0] == pytest.approx(1 - (2 / 60 + 2 / 50) / 2)
    labels = [label.get_text() for label in overlaps.get_yticklabels()]
    assert labels == [f"source {i + 1}  {i + 1}" for i in result.order]
    colours = {tuple(colour) for colour in tree.collections[0].get_colors()}  # four groups, and grey between them
    assert len(colours) == 5
    figure.draw_without_rendering()
    tops = [label.get_window_extent().y0 for label in overlaps.get_yticklabels()]
    heights = [label.get_window_extent().height for label in overlaps.get_yticklabels()]
    assert np.min(-np.diff(tops)) >= 0.9 * np.max(heights)  # no label lies on the next


def test_names_with_dollars_are_drawn_as_text(tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / name, linear("x", seed=i)) for i, name in enumerate(("a$x", "b$_", "c"))]
    save(plot_matrix(compare_all(paths)), tmp_path / "m.png")


def test_usage(capsys: pytest.CaptureFixture[str], adapters: list[Path], tmp_path: Path) -> None:
    assert run(capsys, "compare")[0] == 2
    code, _, err = run(capsys, "compare", adapters[0])
    assert (code, "Missing argument 'B'" in err) == (2, True)
    code, _, err = run(capsys, "compare", *adapters, "--layer", "x.0", "--plot", tmp_path / "m.png")
    assert (code, "--layer says which layer of two" in err) == (2, True)
    code, _, err = run(capsys, "compare", *adapters[:2], *["--initial", "x"] * 3)
    assert (code, "3 times --initial, and 2 sources" in err) == (2, True)
    code, out, err = run(capsys, "compare", *adapters, tmp_path / "none")
    assert (code, out) == (1, "")
    assert "no such file or folder" in err
    assert "Traceback" not in err


@pytest.fixture
def pissa(tmp_path: Path) -> tuple[Path, Path]:
    """A trained adapter whose initialisation moved the base, and that initialisation, not beside it."""
    trained = write_adapter(tmp_path / "pissa", linear("x", out=20, n=16, seed=6), r=2, init_lora_weights="pissa")
    return trained, write_adapter(tmp_path / "start", linear("x", out=20, n=16, seed=5), r=2, init_lora_weights="pissa")


def test_initial_of_spectrum_and_compare(
    capsys: pytest.CaptureFixture[str], pissa: tuple[Path, Path], tmp_path: Path
) -> None:
    trained, start = pissa
    plain = write_adapter(tmp_path / "plain", linear("x", out=20, n=16, seed=1), r=2)
    _, out, _ = run(capsys, "spectrum", trained, "--initial", start, "--json")
    assert json.loads(out)["layers"][0]["nominal_rank"] == 4
    assert json.loads(out) == spectrum(trained, initial=start).to_json()
    _, out, _ = run(capsys, "spectrum", trained, plain, "--initial", start, "--json")
    assert [one["layers"][0]["nominal_rank"] for one in json.loads(out)["results"]] == [4, 2]
    _, out, _ = run(capsys, "compare", trained, plain, "--initial", start, "--json")
    assert json.loads(out)["layers"][0]["nominal_rank_a"] == 4
    code, _, err = run(capsys, "spectrum", plain, "--initial", start, "--initial", start)
    assert (code, "2 times --initial, and 1 source" in err) == (2, True)


def test_initial_of_resize(capsys: pytest.CaptureFixture[str], pissa: tuple[Path, Path], tmp_path: Path) -> None:
    """What is written is the learned update, for the unmodified base: at full rank to the precision of float32."""
    trained, start = pissa
    code, _, err = run(capsys, "resize", trained, "--rank", 4, "-o", tmp_path / "out")
    assert (code, "--initial" in err) == (1, True)
    assert not (tmp_path / "out").exists()
    code, _, _ = run(capsys, "resize", trained, "--rank", 4, "--initial", start, "-o", tmp_path / "out")
    assert code == 0
    written, exact = open_store(tmp_path / "out")["x"].dense(), open_store(trained, initial=start)["x"].dense()
    torch.testing.assert_close(written, exact, rtol=1e-5, atol=1e-5)
