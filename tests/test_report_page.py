"""The page and the files beside it: read back by a parser, filled with hostile text, looked at in a browser."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from rankscope.errors import ConfigError, FormatError
from rankscope.plots.figure import new_figure
from rankscope.report import cells
from rankscope.report.cells import LONG, allow_breaks, format_significant, is_probability
from rankscope.report.document import Cell, Document, Picture, Section, Table
from rankscope.report.figure_files import write_figures
from rankscope.report.page import MOST_ROWS, render_page, write_page
from rankscope.verdict import Answer, Verdict

HOSTILE = "<script>alert(1)</script>\"' onload='alert(2)'><img src=http://x.invalid/y.png>&lt;</style></script><!--"
EMPTY_TAGS = {"meta", "img", "br", "wbr", "path", "circle", "rect", "input", "link", "base"}


class Reader(HTMLParser):
    """A page as a browser would take it apart: elements with their attributes and all the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        assert not self._open, f"never closed: {[tag for tag, _, _ in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element: tuple[str, dict[str, str | None], list[str]] = (tag, dict(attrs), [])
        self.found.append(element)
        if tag not in EMPTY_TAGS:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, text in self._open:
            text.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes, _ in self.found if found == tag]

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for found, _, text in self.found if found == tag]


def line_figure(lines: int = 2) -> Figure:
    figure = new_figure(4, 2)
    axes = figure.subplots()
    for n in range(lines):
        axes.plot(np.linspace(0, 1, 200), np.sin(np.linspace(0, n + 1, 200)))
    return figure


def heat_map() -> Figure:
    figure = new_figure(4, 2)
    figure.subplots().imshow(np.eye(3))
    return figure


def picture(name: str = "one", draw: Callable[[], Figure] = line_figure, text: str = "what is seen") -> Picture:
    return Picture(name, text, text, draw, table(name, text=text))


def table(name: str = "rows", rows: Sequence[Sequence[Cell]] = (("a", 1, 0.25),), text: str = "what it holds") -> Table:
    return Table(name, text, ("layer", "k90", "φ"), rows)


def verdict(answer: Answer = "yes", text: str = "a claim") -> Verdict:
    return Verdict(line="spectra", claim=text, answer=answer, sentence=f"{text} in numbers", refuted_by=f"not {text}")


def section(key: str = "spectra", **parts: Any) -> Section:
    return Section(key=key, title=f"About {key}", lead="Why.", **parts)


def document(*sections: Section, **parts: Any) -> Document:
    return Document(title="A page", lead="What it is.", sections=sections, **parts)


@pytest.fixture(scope="module")
def hostile() -> Document:
    """Every text that may come from a file is hostile."""
    one = Section(
        key="one",
        title=HOSTILE,
        lead=HOSTILE,
        verdicts=[verdict("no", HOSTILE)],
        pictures=[picture(text=HOSTILE)],
        tables=[Table("t", HOSTILE, (HOSTILE, "n"), [(HOSTILE, 1), ("b", HOSTILE)])],
        notes=[HOSTILE],
        missing=HOSTILE,
    )
    numbers: list[Cell] = [9, 10, 100, None, -3, 0.5, 1e-13, "text", None, 2e9, *range(20, 30)]
    ranks = Table(
        "ranks", "Many.", ("layer", "p", "n"), [(f"layers.{i}.q", 1 / (i + 1), n) for i, n in enumerate(numbers)]
    )
    two = section("two", tables=[ranks])
    made_by = {HOSTILE: HOSTILE, "command": [HOSTILE], "pairs": {HOSTILE: HOSTILE}, "config": {"x": [HOSTILE, HOSTILE]}}
    return Document(title=HOSTILE, lead=HOSTILE, sections=[one, two], facts={HOSTILE: HOSTILE}, provenance=made_by)


@pytest.fixture(scope="module")
def hostile_page(hostile: Document) -> str:
    return render_page(hostile)


def test_hostile_text_stays_text(hostile_page: str) -> None:
    read = Reader(hostile_page)
    assert read.texts("script") == [files("rankscope.report").joinpath("page.js").read_text(encoding="utf-8")]
    assert len(read.attributes("style")) == 1
    assert {a["src"][:11] for a in read.attributes("img") if a["src"]} == {"data:image/"}
    assert not [name for _, attributes, _ in read.found for name in attributes if name.startswith("on")]
    written = {"code": shlex.quote(HOSTILE), "pre": json.dumps(HOSTILE)}
    for tag in ("title", "h1", "h2", "dt", "dd", "th", "td", "caption", "figcaption", "li", "b", "p", "code", "pre"):
        assert any(written.get(tag, HOSTILE) in text for text in read.texts(tag)), tag
    assert read.attributes("img")[0]["alt"] == HOSTILE
    assert HOSTILE not in hostile_page


def test_the_reader_would_notice() -> None:
    """The negative control of the test above: without escaping the parser sees elements that are not ours."""
    read = Reader(f"<p>{HOSTILE.split('</style>')[0]}</p>")
    assert read.texts("script") == ["alert(1)"]
    assert read.attributes("img")[0]["src"] == "http://x.invalid/y.png"


def test_nothing_is_loaded_from_anywhere(hostile_page: str) -> None:
    read = Reader(hostile_page)
    for _, attributes, _ in read.found:
        for name in ("src", "href", "action", "data", "srcset", "poster", "background"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    style = read.texts("style")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert not read.attributes("link")


def test_the_policy_lets_the_own_script_run_and_no_other(hostile_page: str) -> None:
    read = Reader(hostile_page)
    (policy,) = [a["content"] for a in read.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digest = base64.b64encode(hashlib.sha256(read.texts("script")[0].encode()).digest()).decode()
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert set(rules) == {"default-src", "img-src", "style-src", "script-src", "base-uri", "form-action"}


def test_control_characters_and_halves_of_pairs_are_shown_as_such() -> None:
    rows = [("a\x1b[2J\u202eb\ud800c\x00", 1), ("line\nbreak", 2)]
    many = Table("t", "Cap\x07tion\u2066.", ("layer", "n"), rows)
    text = render_page(document(section(tables=[many], notes=["no\x00te é 漢 \xa0 🙂"])))
    text.encode("utf-8")
    assert "Cap\ufffdtion\ufffd." in Reader(text).texts("caption")[0]
    assert "no\ufffdte é 漢 \xa0 🙂" in Reader(text).texts("li")
    assert "a\ufffd[2J\ufffdb\ufffdc\ufffd" in Reader(text).texts("th")
    assert "line\nbreak" in Reader(text).texts("th")


def test_structure() -> None:
    shown = document(
        section("one", verdicts=[verdict()], pictures=[picture()], tables=[table(), table("more")]),
        section("two", missing="nothing; train something"),
        facts={"task": "docs"},
        provenance={"command": ["rankscope", "report", "a b"], "versions": {"torch": "2"}},
    )
    read = Reader(render_page(shown))
    assert read.attributes("html") == [{"lang": "en"}]
    headings = [(tag, "".join(text)) for tag, _, text in read.found if re.fullmatch("h[1-6]", tag)]
    assert headings == [
        ("h1", "A page"),
        ("h2", "Summary"),
        ("h2", "About one"),
        ("h2", "About two"),
        ("h2", "Provenance"),
    ]
    assert len(read.texts("caption")) == len(read.texts("table")) == 3
    assert {a.get("scope") for a in read.attributes("th")} == {"col", "row"}
    assert all(a["alt"] for a in read.attributes("img"))
    ids = Counter(attributes["id"] for _, attributes, _ in read.found if "id" in attributes)
    assert max(ids.values()) == 1
    assert {a["href"] for a in read.attributes("a")} <= {f"#{key}" for key in ids}
    nav = [a["href"] for a in read.attributes("a")][1:5]
    assert nav == ["#page-summary", "#one", "#two", "#page-provenance"]
    assert "rankscope report 'a b'" in read.texts("code")


def test_the_summary_has_every_verdict_and_what_is_missing() -> None:
    shown = document(
        section("one", verdicts=[verdict("yes", "first"), verdict("undecided", "second")]),
        section("two", verdicts=[verdict("no", "third")]),
        section("three", missing="no runs; train some"),
    )
    read = Reader(render_page(shown))
    assert "3 claims tested: 1 yes, 1 no, 1 undecided; 1 section has no data." in read.texts("p")
    rows = [" ".join(text.split()) for text in read.texts("li") if "in numbers" in text or "train some" in text]
    assert rows == [
        "yes first first in numbers",
        "undecided second second in numbers",
        "no third third in numbers",
        "no data About three no runs; train some",
    ]
    summary = [a["href"] for a in read.attributes("a") if a["href"] in ("#one", "#two", "#three")]
    assert summary[3:] == ["#one", "#one", "#two", "#three"]
    assert sum("Would have been refuted by: not " in " ".join(text.split()) for text in read.texts("p")) == 3
    assert "Nothing to show. no runs; train some" in [" ".join(text.split()) for text in read.texts("p")]


def test_a_page_without_claims_has_no_summary() -> None:
    text = render_page(document(section(tables=[table()])))
    assert "page-summary" not in Reader(text).texts("nav")[0]
    assert "Summary" not in Reader(text).texts("h2")
    assert Document(title="x", lead="", sections=[]).provenance == {}
    assert Reader(render_page(document())).texts("h2") == []


@pytest.mark.parametrize(
    ("value", "digits", "padded", "shown"),
    [
        (0.0, 4, False, "0"),
        (-0.0, 4, False, "0"),
        (12, 2, True, "12"),
        (-1234567, 2, True, "−1234567"),
        (0.25, 4, True, "0.2500"),
        (0.25, 4, False, "0.25"),
        (9.9996, 4, True, "10.00"),
        (12345.6, 3, True, "12346"),
        (0.000123456, 3, True, "0.000123"),
        (0.0000123456, 3, True, "1.23×10⁻⁵"),
        (-2.0e9, 3, False, "−2×10⁹"),
        (1e-12, 2, True, "1.0×10⁻¹²"),
    ],
)
def test_significant_digits(value: float, digits: int, padded: bool, shown: str) -> None:
    assert format_significant(value, digits, padded) == shown


@pytest.mark.parametrize(
    ("p", "shown"), [(0.0, "<1e-12"), (9e-13, "<1e-12"), (1e-12, "1×10⁻¹²"), (3.21e-5, "3.2×10⁻⁵"), (0.25, "0.25")]
)
def test_probabilities(p: float, shown: str) -> None:
    assert cells.format_probability(p) == shown


@pytest.mark.parametrize("title", ["p", "p left", "corrected p", "test (p)", "z, p"])
def test_titles_of_probabilities(title: str) -> None:
    assert is_probability(title)


@pytest.mark.parametrize("title", ["rank", "top", "p90", "q_proj", "gap", "Δp"])
def test_titles_of_no_probabilities(title: str) -> None:
    assert not is_probability(title)


def shown_cells(values: Sequence[Cell], title: str = "x", digits: int = 4) -> list[str]:
    """A column as a page shows it."""
    rows = [("name", value) for value in values]
    text = render_page(document(section(tables=[Table("t", "Caption.", ("layer", title), rows, digits=digits)])))
    return Reader(text).texts("td")


def test_cells() -> None:
    assert shown_cells([0.5, 1 / 12, None, 3]) == ["0.5000", "0.08333", "–", "3"]
    assert shown_cells([0.01, 0.003]) == ["0.01", "0.003"], "rates are exact: no zeros are added"
    assert shown_cells([0.125, 0.5]) == ["0.125", "0.5"]
    assert shown_cells([0.5, 1e-13], "p") == ["0.5", "<1e-12"]
    assert shown_cells([1.5, 1e-13], "p") != ["1.5", "<1e-12"], "no probabilities, whatever the title"
    assert shown_cells(["text", 2, None, True]) == ["text", "2", "–", "yes"]
    assert shown_cells([math.nan, math.inf]) == ["nan", "inf"]
    assert shown_cells([1.23456, 6.5], digits=2) == ["1.2", "6.5"]


def test_cells_carry_what_they_are_sorted_by() -> None:
    values = [1 / 3, None, 2, 1e-300, "text"]
    rows = [("name", value) for value in values]
    read = Reader(render_page(document(section(tables=[Table("t", "Caption.", ("layer", "x"), rows)]))))
    found = read.attributes("td")
    assert [float(a["data-v"] or "") if "data-v" in a else None for a in found] == [1 / 3, None, 2, 1e-300, None]
    assert ["data-none" in a for a in found] == [False, True, False, False, False]


def test_numbers_of_numpy_are_numbers() -> None:
    rows = [(np.int64(7), np.float32(0.5), np.float64(0.25))]
    read = Reader(render_page(document(section(tables=[Table("t", "Caption.", ("a", "b", "c"), rows)]))))  # type: ignore[arg-type]
    assert read.texts("td") == ["7", "0.5", "0.25"]
    assert [a["class"] for a in read.attributes("td")] == ["n"] * 3


def test_numbers_stand_right_and_names_head_their_rows() -> None:
    rows: list[tuple[Cell, ...]] = [("a", 1, "x"), ("b", None, "y")]
    read = Reader(render_page(document(section(tables=[Table("t", "Caption.", ("layer", "n", "kind"), rows)]))))
    assert [a["class"] for a in read.attributes("td")] == ["n", "s", "n", "s"]
    assert [a["scope"] for a in read.attributes("th")] == ["col", "col", "col", "row", "row"]
    numbers = Reader(render_page(document(section(tables=[Table("t", "Caption.", ("i", "n"), [(1, 2), (2, 3)])]))))
    assert [a["scope"] for a in numbers.attributes("th")] == ["col", "col"]


@pytest.mark.parametrize(
    "text", ["", "q", "model.layers.0.self_attn.q_proj", "x" * 90, "two words/and_a_long.path.here"]
)
def test_soft_breaks_change_no_letter(text: str) -> None:
    broken = allow_breaks(text)
    assert broken.replace("<wbr>", "").unescape() == text
    assert all(len(part) <= 17 for part in re.split(r"<wbr>|\s", broken))
    assert "q_<wbr>proj" in allow_breaks("model.layers.0.self_attn.q_proj")
    assert "<wbr>" not in allow_breaks("0.5 of 1.25, r = 8"), "numbers are not broken after their points"


def test_long_tables_scroll_and_the_script_agrees_what_is_long() -> None:
    def boxes(n: int) -> list[str | None]:
        rows = [(f"layers.{i}", i) for i in range(n)]
        read = Reader(render_page(document(section(tables=[Table("t", "Caption.", ("layer", "n"), rows)]))))
        assert len(read.texts("tr")) == n + 1
        return [a["class"] for a in read.attributes("div") if (a.get("class") or "").startswith("scroll")]

    assert boxes(LONG - 1) == ["scroll"]
    assert boxes(LONG) == ["scroll long"]
    script = files("rankscope.report").joinpath("page.js").read_text(encoding="utf-8")
    assert f"const shortest = {LONG};" in script


def test_of_the_numbers_behind_a_picture_the_first_are_shown() -> None:
    n = MOST_ROWS + 1
    many = Table("many", "Caption.", ("i", "n"), [(i, i) for i in range(n)])
    read = Reader(
        render_page(document(section(pictures=[Picture("many", "c", "a", line_figure, many)], tables=[many])))
    )
    behind, whole = read.texts("tbody")
    assert behind.split()[-1] == 2 * str(MOST_ROWS - 1)
    assert whole.split()[-1] == 2 * str(MOST_ROWS)
    assert f"The first {MOST_ROWS} of {n} rows; many.csv has all." in read.texts("caption")[0]
    assert "many.csv" not in read.texts("caption")[1]


def test_lines_are_svg_and_heat_maps_and_very_many_lines_png(monkeypatch: pytest.MonkeyPatch) -> None:
    few = render_page(document(section(pictures=[picture("a"), picture("b", heat_map)])))
    monkeypatch.setattr("rankscope.report.page.FEW_SVG_BYTES", 0)
    many = render_page(document(section(pictures=[picture("a"), picture("c", lambda: line_figure(200))])))
    kinds = []
    for attributes in Reader(few).attributes("img") + Reader(many).attributes("img"):
        kind, data = (attributes["src"] or "").removeprefix("data:image/").split(";base64,")
        content = base64.b64decode(data)
        assert content.startswith(b"<?xml" if kind == "svg+xml" else b"\x89PNG")
        kinds.append(kind)
        assert int(attributes["width"] or 0) == 2 * int(attributes["height"] or 0)
    assert kinds == ["svg+xml", "png", "svg+xml", "png"]


def test_long_mappings_are_json_and_short_ones_pairs() -> None:
    config = {"ranks": [1, 2], "name": "x", "none": None}
    made_by = {"config": config, "versions": {"torch": "2.13", "none": None}, "many": {f"k{i}": i for i in range(20)}}
    read = Reader(render_page(document(provenance=made_by)))
    shown = [json.loads(text) for text in read.texts("pre")]
    assert shown == [config, made_by["many"]]
    assert "torch" in read.texts("dt")


def test_writing(tmp_path: Path) -> None:
    shown = document(section(pictures=[picture()], tables=[table()]))
    first = write_page(shown, tmp_path / "new" / "page.html")
    second = write_page(shown, str(tmp_path / "again.html"))
    assert first.read_bytes() == second.read_bytes() == render_page(shown).encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    with pytest.raises(FormatError, match="is a folder"):
        write_page(shown, tmp_path)
    with pytest.raises(FormatError, match="cannot be written"):
        write_page(shown, first / "page.html")


def test_mistakes_are_said() -> None:
    with pytest.raises(ConfigError, match="'spectra'"):
        render_page(document(section(), section()))
    with pytest.raises(ConfigError, match="page-main"):
        render_page(document(section("page-main")))
    with pytest.raises(ConfigError, match="'rows'"):
        render_page(document(section(tables=[table(rows=[("a", 1)])])))


def test_figures(tmp_path: Path) -> None:
    values: list[tuple[Cell, ...]] = [('a,"b"\n', 1, 1 / 3), ("\ud800", None, np.float64(1e-300))]  # type: ignore[list-item]
    shown = document(
        section(pictures=[picture("one")], tables=[table("rows", values)]), section("b", tables=[table("z")])
    )
    written = write_figures(shown, tmp_path / "figures")
    assert [path.name for path in written] == ["one.png", "one.svg", "one.csv", "rows.csv", "z.csv"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {path.name for path in written}
    assert written[0].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in written[1].read_bytes()
    with (tmp_path / "figures" / "rows.csv").open(encoding="utf-8", newline="") as stream:
        header, first, second = list(csv.reader(stream))
    assert header == ["layer", "k90", "φ"]
    assert first[:2] == ['a,"b"\n', "1"]
    assert float(first[2]) == 1 / 3
    assert second[1] == ""
    assert float(second[2]) == 1e-300


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "a b"])
def test_names_that_are_no_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be saved"):
        write_figures(document(section(tables=[table(name)])), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_two_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two figures or tables"):
        write_figures(document(section(pictures=[picture("x")], tables=[table("x")])), tmp_path)


CHECK = Path(__file__).parent.parent / "tools" / "browser_check.py"


def looked_at(path: Path, shots: Path) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, CHECK, path, "-o", shots], capture_output=True, text=True, check=False, timeout=300
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium")
def test_in_a_browser(hostile: Document, tmp_path: Path) -> None:
    good = write_page(hostile, tmp_path / "good.html")
    code, said = looked_at(good, tmp_path / "shots")
    assert code == 0, said
    assert (tmp_path / "shots" / "printed.pdf").read_bytes().startswith(b"%PDF")
    assert len(list((tmp_path / "shots").glob("360-dark-*.png"))) >= 1
    text = good.read_text(encoding="utf-8")
    broken = text.replace(
        "</main>", '<p style="width: 2000px; color: #999">x<img alt="x" src="http://127.0.0.1:9/">', 1
    )
    (tmp_path / "bad.html").write_text(re.sub("<script>.*</script>", "", broken, flags=re.DOTALL), encoding="utf-8")
    code, said = looked_at(tmp_path / "bad.html", tmp_path / "bad")
    assert code == 1, said
    for complaint in ("127.0.0.1:9", "wider than the screen", "has a contrast of 2.8", "has 0 headers to press"):
        assert complaint in said
