"""What holds for the source as a whole: where imports point, what things are called, and what no module does.

A test names every place that breaks its rule. What the places are is found by ``tools/structure.py``.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import rankscope

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import structure

CHECKOUT = Path(rankscope.__file__).parent.parent
SOURCES = structure.read_sources(CHECKOUT)
GRAPH = structure.import_graph(SOURCES)

# What a layer imports comes from its own or a lower one. A package stands for all of its modules.
LAYERS: list[set[str]] = [
    {"errors"},
    {"linalg", "noise", "inference", "measures", "result", "table", "track"},
    {"updates"},
    {"structured"},
    {"spectra"},
    {"subspace", "sketch"},
    {"haar", "verdict"},
    {"formats"},
    {"analysis", "surgery", "lora"},
    {"checks"},
    {"train"},
    {"plots"},
    {"report"},
    {"evidence"},
    {"cli"},
]
ENTRY = {"__init__", "__main__"}  # they re-export and start; what they load lazily is theirs to choose
INDEPENDENT = {"linalg", "noise", "errors", "inference", "measures", "table", "track"}
"""Modules that import no other of the package."""
# The one module below the training that asks transformers, if it is there, for the names of a model.
ASKS_TRANSFORMERS = "formats/model_outline.py"
WITHOUT_HUB = {
    "errors",
    "linalg",
    "measures",
    "noise",
    "inference",
    "result",
    "table",
    "track",
    "updates",
    "structured",
    "spectra",
    "subspace",
    "sketch",
    "haar",
    "formats",
    "analysis",
    "surgery",
    "checks",
}
SEEDING = {"manual_seed", "manual_seed_all", "seed", "seed_all"}
PRINTING = {"print", "breakpoint"}


def test_every_module_has_a_layer() -> None:
    unknown = {source.part for source in SOURCES} - set().union(*LAYERS) - ENTRY
    assert not unknown, f"give these a layer in LAYERS: {sorted(unknown)}"


def test_imports_point_downwards() -> None:
    assert structure.upward_imports(GRAPH, LAYERS) == []


def test_no_circle_of_imports() -> None:
    assert structure.circles(GRAPH) == []


def test_some_modules_are_independent() -> None:
    offenders = [
        f"{source.module} imports {', '.join(sorted(GRAPH[source.module]))}"
        for source in SOURCES
        if source.part in INDEPENDENT and GRAPH[source.module]
    ]
    assert offenders == []


def test_no_module_goes_through_the_public_names() -> None:
    """``from rankscope import Spectrum`` would load a module by the back door of the lazy table."""
    parts = {source.part for source in SOURCES}
    offenders = [
        f"{source.path}: {name}"
        for source in SOURCES
        if source.part not in ENTRY
        for name in structure.imported_names(source)
        if name.startswith("rankscope.") and name.split(".")[1] not in parts
    ]
    assert offenders == []


def test_the_core_needs_no_hub_package() -> None:
    offenders = [
        f"{source.path}: {name}"
        for source in SOURCES
        if source.part in WITHOUT_HUB and not source.path.endswith(ASKS_TRANSFORMERS)
        for name in structure.imported_names(source)
        if name.split(".")[0] in {"peft", "transformers", "datasets"}
    ]
    assert offenders == []


def test_the_module_that_asks_transformers_imports_it_only_within_functions() -> None:
    (source,) = [source for source in SOURCES if source.path.endswith(ASKS_TRANSFORMERS)]
    at_top = [node for node in source.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in at_top}
    assert names
    assert {name.split(".")[0] for name in names} & {"peft", "transformers", "datasets"} == set()
    imported = {name.split(".")[0] for name in structure.imported_names(source)}
    assert imported & {"peft", "transformers", "datasets"} == {"transformers"}


def test_no_module_is_looked_up_by_a_computed_name() -> None:
    assert structure.computed_imports(SOURCES) == []


def test_functions_are_short() -> None:
    """Code lines: a public signature explains its arguments in a docstring, which may be long."""
    assert structure.long_functions(SOURCES, code_alone=True) == []


def test_no_function_is_named_by_a_bare_participle() -> None:
    assert structure.bare_participles(SOURCES) == []


def test_names_of_modules_and_classes_are_unique() -> None:
    assert structure.namesake_modules(SOURCES) + structure.namesake_classes(SOURCES) == []


def test_no_module_takes_a_liberty() -> None:
    offenders = [
        f"{source.path}: {liberty}"
        for source in SOURCES
        for liberty in liberties(source.text, printing=source.part in {"cli", "__main__"})
    ]
    assert offenders == []


def liberties(source: str, printing: bool) -> list[str]:
    """Asserts (``python -O`` drops them), global seeds, prints outside the command line; with their lines."""
    offenders = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            offenders.append(f"assert in line {node.lineno}")
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in PRINTING and not printing:
            offenders.append(f"{node.func.id} in line {node.lineno}")
        if isinstance(node.func, ast.Attribute) and node.func.attr in SEEDING and _is_module(node.func.value):
            offenders.append(f"global seed in line {node.lineno}")
    return offenders


def _is_module(owner: ast.expr) -> bool:
    """torch, torch.cuda, np.random, random: a module, where a generator object would be a name of ours or a call."""
    return ast.unparse(owner) in {"torch", "torch.cuda", "torch.random", "np.random", "numpy.random", "random"}


@pytest.mark.parametrize(
    "source",
    ["assert x", "print(1)", "torch.manual_seed(0)", "np.random.seed(1)", "torch.cuda.manual_seed_all(0)"],
)
def test_liberties_are_noticed(source: str) -> None:
    assert len(liberties(source, printing=False)) == 1
    assert not liberties("torch.Generator().manual_seed(0)\ngenerator.manual_seed(1)", printing=False)


SMALL_PACKAGE = {
    "__init__.py": "",
    "low/__init__.py": "",
    "low/page.py": "from rankscope.high import top\nclass Choice: ...\n",
    "high/__init__.py": "",
    "high/top.py": "def load():\n    from ..low import page\n    return page\nclass Choice: ...\n",
    "high/page.py": (
        "from typing import TYPE_CHECKING\nfrom importlib import import_module\n"
        "if TYPE_CHECKING:\n    from rankscope.high import other\n"
        "def taken_apart(x: Tensor):\n    return import_module(f'rankscope.{x}')\n"
        'def needed_rank(found: Tensor | None):\n    """Of (out, r)."""\n'
        "def seed_dropout(names: dict[str, Tensor]):\n" + "    names\n" * 61
    ),
    "high/other.py": "from rankscope.high import page\n",
}


def test_offenders_are_noticed(tmp_path: Path) -> None:
    for path, text in SMALL_PACKAGE.items():
        (tmp_path / "rankscope" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rankscope" / path).write_text(text)
    sources = structure.read_sources(tmp_path)
    graph = structure.import_graph(sources)
    assert graph["rankscope.high.page"] == set(), "an import for the type checker alone does not run"
    assert structure.circles(graph) == [["rankscope.high.top", "rankscope.low.page"]]
    assert structure.upward_imports(graph, [{"low"}, {"high"}]) == ["rankscope.low.page imports rankscope.high.top"]
    assert structure.computed_imports(sources) == ["high/page.py:6 import_module(f'rankscope.{x}')"]
    assert structure.long_functions(sources) == ["high/page.py:9 seed_dropout 62"]
    assert structure.bare_participles(sources) == ["high/page.py:5 taken_apart"]
    assert structure.namesake_modules(sources) == ["page: high/page.py, low/page.py"]
    assert structure.namesake_classes(sources) == ["Choice: high/top.py, low/page.py"]
    assert structure.shapeless_functions(sources) == ["high/page.py:5 taken_apart"]
    assert structure.count_parameters(sources, "found") == structure.count_word(sources, "found") == 1


@pytest.mark.parametrize("name", ["measured", "_told", "taken_apart"])
def test_bare_participles_are_noticed(name: str) -> None:
    assert structure.is_bare_participle(name)


@pytest.mark.parametrize("name", ["measure", "captured_energy", "needed_rank", "seed", "need", "in_cluster"])
def test_verbs_and_nouns_are_no_participles(name: str) -> None:
    assert not structure.is_bare_participle(name)
