"""Look at a page as its readers will: in a browser, narrow and wide, light and dark, without its script, on paper.

    python tools/browser_check.py report.html            says what holds; exits 1 where something does not
    python tools/browser_check.py report.html -o shots   screenshots and the printed page go to that folder

Needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver), and no Python package.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from webdriver import Browser, browser

WIDTHS = (360, 1400)
SCHEMES = ("light", "dark")
SLICE = 1600  # pixels of height in one screenshot
PAPER = 688  # width in pixels of A4 between the margins of the page's style
CONTRAST = 4.5

STRUCTURE = """
const problems = [];
const all = (selector) => [...document.querySelectorAll(selector)];
if (!document.documentElement.lang) problems.push("no language");
if (!document.title.trim()) problems.push("no title");
if (all("h1").length !== 1) problems.push(`${all("h1").length} headings of the first level`);
let last = 0;
for (const heading of all("h1, h2, h3, h4, h5, h6")) {
  const level = Number(heading.tagName[1]);
  if (level > last + 1) problems.push(`a level is skipped before the heading ${heading.textContent}`);
  last = level;
}
for (const image of all("img")) {
  if (!image.alt) problems.push("a picture without a text alternative");
  if (!image.naturalWidth) problems.push("a picture that cannot be shown");
}
for (const table of all("table")) {
  if (!table.caption) problems.push("a table without a caption");
  if (table.querySelector("th:not([scope])")) problems.push("a table header without a scope");
}
const ids = all("[id]").map((element) => element.id);
for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) problems.push(`two elements have the id ${id}`);
for (const link of all("a[href^='#']")) {
  if (!document.getElementById(link.hash.slice(1))) problems.push(`a link to nowhere: ${link.hash}`);
}
if (!document.querySelector("main")) problems.push("no main part");
return problems;
"""
OVERFLOW = """
const width = document.documentElement.clientWidth;
if (document.scrollingElement.scrollWidth <= width) return [];
const wide = [...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > width + 1);
const shown = wide.slice(0, 3).map((e) => e.outerHTML.slice(0, 80)).join(" | ");
return [`${document.scrollingElement.scrollWidth} of ${width} pixels: ${shown}`];
"""
FAINT = """
const channels = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
const opaque = (colour) => { const c = channels(colour); return c.length === 3 || c[3] > 0; };
function luminance(colour) {
  const [r, g, b] = channels(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (opaque(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
}
const found = new Map();
for (const element of document.querySelectorAll("body *")) {
  const words = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!words || !element.checkVisibility() || element.tagName === "SCRIPT") continue;
  const [a, b] = [luminance(getComputedStyle(element).color), luminance(behind(element))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < arguments[0]) found.set(`${element.tagName}.${element.className}`, contrast.toFixed(2));
}
return [...found].map(([element, contrast]) => `${element} has a contrast of ${contrast}`);
"""
TABLES = """
return [...document.querySelectorAll("table")].map((table) => ({
  rows: table.tBodies[0].rows.length,
  titles: [...table.tHead.rows[0].cells].map((cell) => cell.textContent),
  sortable: table.querySelectorAll("thead th button").length,
  filter: table.querySelectorAll("input[type=search]").length,
  shown: table.checkVisibility({contentVisibilityAuto: true}),
}));
"""
COLUMN = """
const table = document.querySelectorAll("table")[arguments[0]];
const header = table.tHead.rows[0].cells[arguments[1]];
if (arguments[2] === "press") header.firstElementChild.click();
const cells = [...table.tBodies[0].rows].map((row) => {
  const cell = row.cells[arguments[1]];
  const number = cell.dataset.v;
  return [cell.textContent, number === undefined ? null : Number(number), "none" in cell.dataset];
});
if (arguments[2] === "focus") header.firstElementChild.focus();
return [header.ariaSort, cells];
"""
TYPE = """
const input = document.querySelectorAll("table")[arguments[0]].querySelector("input[type=search]");
input.value = arguments[1];
input.dispatchEvent(new Event("input", {bubbles: true}));
const rows = [...document.querySelectorAll("table")[arguments[0]].tBodies[0].rows];
return rows.filter((row) => row.checkVisibility()).map((row) => row.textContent);
"""
OPEN = "document.querySelectorAll('details').forEach((details) => (details.open = true))"
TEXT = "return document.querySelector('main').textContent.replace(/\\s+/g, ' ')"
DARKNESS = """
const c = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number);
return (c[0] + c[1] + c[2]) / 3;
"""
HIDDEN_ON_PAPER = """
const problems = [];
for (const table of document.querySelectorAll("table")) {
  if (table.closest("details:not([open])")) continue;
  const box = table.getBoundingClientRect();
  if (!box.height) problems.push(`${table.id} is not printed`);
  const outer = table.parentElement;
  if (outer.scrollHeight > outer.clientHeight + 1 && getComputedStyle(outer).overflowY !== "visible")
    problems.push(`${table.id} is cut off`);
}
for (const element of document.querySelectorAll("body *")) {
  if (!element.checkVisibility()) continue;
  const position = getComputedStyle(element).position;
  if (["sticky", "fixed"].includes(position)) problems.push(`${element.tagName} is ${position}`);
}
return [...new Set(problems)];
"""


Found = list[str]
"""What is wrong; nothing, where all is well."""


def view(page: Browser, width: int, scheme: str = "light", media: str = "") -> None:
    page.tell("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.tell("Emulation.setEmulatedMedia", media=media, features=[feature])


def check_quiet(page: Browser) -> Found:
    """Nothing was complained of and nothing was asked of the network since the last look."""
    found = [f"{entry['level']}: {entry['message']}" for entry in page.log("browser")]
    for entry in page.log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith(("data:", "file:", "about:", "chrome:", "blob:")):
                found.append(f"asked the network for {url[:200]}")
            elif url.startswith("file:") and message["params"].get("type") != "Document":
                found.append(f"loaded another file, {url[:200]}")
    return found


def check_structure(page: Browser) -> Found:
    return list(page.run(STRUCTURE))


def check_tables(page: Browser) -> Found:
    page.run(OPEN)
    found = []
    for number, table in enumerate(page.run(TABLES)):
        if table["rows"] > 1 and table["sortable"] != len(table["titles"]):
            found.append(f"table {number + 1} has {table['sortable']} headers to press")
        elif table["rows"] > 1:
            for column in range(len(table["titles"])):
                found += [f"table {number + 1}, {table['titles'][column]}: {x}" for x in _sorting(page, number, column)]
    return found


def _sorting(page: Browser, table: int, column: int) -> Found:
    """Press a header three times: up, down, as it was; the last time by the keyboard."""
    _, before = page.run(COLUMN, table, column, "look")
    found = []
    for way, turned in (("ascending", False), ("descending", True)):
        said, after = page.run(COLUMN, table, column, "press")
        if said != way:
            found.append(f"does not say that it is {way}")
        if sorted(map(str, after)) != sorted(map(str, before)):
            found.append("loses rows when it is sorted")
        if not _in_order(after, turned):
            found.append(f"is not {way}")
    page.run(COLUMN, table, column, "focus")
    page.press("\ue007")
    if page.run(COLUMN, table, column, "look")[1] != before:
        found.append("is not put back by the third press, of the Enter key")
    return found


def _in_order(cells: Sequence[tuple[str, float | None, bool]], turned: bool) -> bool:
    """Numbers before words, what is empty last; words by their numbers as numbers."""
    kinds = [2 if empty else 0 if value is not None else 1 for _, value, empty in cells]
    values = [value for _, value, _ in cells if value is not None]
    words = [_natural(text) for text, value, empty in cells if value is None and not empty]
    if kinds != sorted(kinds) or values != sorted(values, reverse=turned):
        return False
    plain = all(
        re.fullmatch(r"[a-z0-9.]*", text.lower()) for text, value, empty in cells if value is None and not empty
    )
    return not plain or words == sorted(words, reverse=turned)


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(digits or -1), word) for digits, word in re.findall(r"(\d+)|(\D+)", text.lower())]


def check_filters(page: Browser) -> Found:
    found = []
    for number, table in enumerate(page.run(TABLES)):
        if not table["filter"]:
            continue
        texts = page.run(TYPE, number, "")
        words = [word for text in texts for word in text.split()]
        word = min(words, key=lambda w: sum(w in t for t in texts), default="")
        expected = [text for text in texts if word.lower() in text.lower()]
        if not word or len(texts) != table["rows"] or page.run(TYPE, number, word.upper()) != expected:
            found.append(f"table {number + 1} is not filtered by {word!r}")
        if page.run(TYPE, number, "no row says this") or len(page.run(TYPE, number, "")) != table["rows"]:
            found.append(f"table {number + 1} shows the wrong rows for a word that is nowhere, or for none")
    long = [n + 1 for n, table in enumerate(page.run(TABLES)) if table["rows"] > 40 and not table["filter"]]
    return found + [f"table {number} is long and has no filter" for number in long]


def check_views(page: Browser) -> Found:
    found, brightness = [], {}
    for width in WIDTHS:
        for scheme in SCHEMES:
            view(page, width, scheme)
            found += [f"{width} {scheme}: wider than the screen, {x}" for x in page.run(OVERFLOW)]
            found += [f"{width} {scheme}: {x}" for x in page.run(FAINT, CONTRAST)]
            brightness[scheme] = page.run(DARKNESS)
    if not brightness["dark"] < 64 < 192 < brightness["light"]:
        found.append(f"the background does not follow the colour scheme ({brightness})")
    return found


def check_without_script(page: Browser, path: Path) -> Found:
    """The text is the same, whole, where scripts do not run."""
    page.open(path)
    page.run("document.querySelectorAll('.tools').forEach((tools) => tools.remove())")
    with_script = page.run(TEXT)
    page.tell("Emulation.setScriptExecutionDisabled", value=True)
    page.open(path)
    value = page.tell("Runtime.evaluate", expression=f"(() => {{ {TEXT} }})()", returnByValue=True)["result"]["value"]
    buttons = page.tell("Runtime.evaluate", expression="document.querySelectorAll('button, input').length")
    page.tell("Emulation.setScriptExecutionDisabled", value=False)
    page.open(path)
    found = [] if value == with_script else ["the text differs without the script"]
    return found + (["there are controls that do nothing"] if buttons["result"]["value"] else [])


def check_paper(page: Browser, shots: Path) -> Found:
    view(page, PAPER, "dark", media="print")
    found = [f"printed: {x}" for x in [*page.run(HIDDEN_ON_PAPER), *page.run(OVERFLOW), *page.run(FAINT, CONTRAST)]]
    if page.run(DARKNESS) < 250:
        found.append("the paper would be dark")
    view(page, WIDTHS[-1])
    printed = page.tell("Page.printToPDF", printBackground=False, preferCSSPageSize=True)["data"]
    pdf = base64.b64decode(printed)
    (shots / "printed.pdf").write_bytes(pdf)
    pages = len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf))
    print(f"     {pages} pages, {len(pdf) // 1024} KiB")
    return found if pages and pdf.startswith(b"%PDF") else [*found, "nothing is printed"]


def take_shots(page: Browser, shots: Path) -> Found:
    for width in WIDTHS:
        for scheme in SCHEMES:
            view(page, width, scheme)
            height = page.run("return document.scrollingElement.scrollHeight")
            for number, top in enumerate(range(0, height, SLICE)):
                clip = {"x": 0, "y": top, "width": width, "height": min(SLICE, height - top), "scale": 1}
                data = page.tell("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
                (shots / f"{width}-{scheme}-{number + 1}.png").write_bytes(base64.b64decode(data))
    return []


def check(path: Path, shots: Path) -> bool:
    """Make every check, say what each found; whether all is well."""
    well = True
    with browser() as page:
        page.log("browser"), page.log("performance")
        page.open(path)
        steps: dict[str, Callable[[], Found]] = {
            "loads without a complaint and without the network": lambda: check_quiet(page),
            "is built to be read by machines too": lambda: check_structure(page),
            "fits and can be read at 360 and 1400 pixels, light and dark": lambda: check_views(page),
            "screenshots": lambda: take_shots(page, shots),
            "tables are sorted": lambda: check_tables(page),
            "tables are filtered": lambda: check_filters(page),
            "all is there without the script": lambda: check_without_script(page, path),
            "all is there on paper": lambda: check_paper(page, shots),
            "is still quiet": lambda: check_quiet(page),
        }
        for name, step in steps.items():
            try:
                found = step()
            except RuntimeError as error:  # the browser's own words: an alert that is open, a script that fails
                found = [str(error)]
            print("\n".join([f"{'FAIL' if found else 'ok  '} {name}", *(f"     {one}" for one in found)]))
            well = well and not found
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a page in a headless browser.")
    parser.add_argument("page", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="folder of screenshots and the printed page [PAGE-shots]")
    arguments = parser.parse_args()
    if not arguments.page.is_file():
        parser.error(f"{arguments.page}: no such file")
    shots = arguments.output or arguments.page.with_name(f"{arguments.page.stem}-shots")
    shots.mkdir(parents=True, exist_ok=True)
    try:
        return 0 if check(arguments.page, shots) else 1
    except (FileNotFoundError, RuntimeError) as error:  # no browser, or one that does not start
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
