"""What holds for the source as a whole: imports point downwards, and no module takes a liberty."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rankscope

ROOT = Path(rankscope.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What a layer imports comes from its own or a lower one. A package stands for all of its modules.
LAYERS: list[set[str]] = [
    {"errors"},
    {"linalg", "noise", "inference", "result", "table"},
    {"updates"},
    {"structured"},
    {"spectra"},
    {"subspace", "sketch"},
    {"haar", "verdict"},
    {"formats"},
    {"analysis", "surgery", "lora"},
    {"train"},
    {"plots"},
    {"report"},
    {"evidence"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ENTRY = {"__init__", "__main__"}  # they re-export and start; what they load lazily is theirs to choose
FREE_OF_OURS = {"linalg", "noise", "errors", "inference", "table"}
NEVER_HUB = {
    "errors",
    "linalg",
    "noise",
    "inference",
    "result",
    "table",
    "updates",
    "structured",
    "spectra",
    "subspace",
    "sketch",
    "haar",
    "formats",
    "analysis",
    "surgery",
}
SEEDING = {"manual_seed", "manual_seed_all", "seed", "seed_all"}
# A study's own method to ask for its evidence; loaded when called.
UPWARDS = {"train/study.py": {"evidence"}}
PRINTING = {"print", "breakpoint"}


def part(path: Path) -> str:
    """The module or package directly below rankscope that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Absolute names of all that a file imports, wherever in it the import stands."""
    names: list[str] = []
    package = ("rankscope", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def ours(path: Path) -> set[str]:
    """The parts of rankscope that a file imports; ``from rankscope import x`` counts as x."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("rankscope.")}


def test_every_module_has_a_layer() -> None:
    unknown = {part(path) for path in FILES} - set(LEVEL) - ENTRY
    assert not unknown, f"give these a layer in LAYERS: {sorted(unknown)}"


@pytest.mark.parametrize("path", [p for p in FILES if part(p) not in ENTRY], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    here = part(path)
    upwards = UPWARDS.get(str(path.relative_to(ROOT)), set())
    allowed = {here} if here in FREE_OF_OURS else {name for name in LEVEL if LEVEL[name] < LEVEL[here]} | {here}
    # Beside LAYERS, only names the entry module re-exports would be left; no module may go through it.
    found = ours(path) - allowed - upwards
    assert not found, f"{path} imports upwards or sideways: {sorted(found)}"


@pytest.mark.parametrize("path", [p for p in FILES if part(p) in NEVER_HUB], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_needs_no_hub_package(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & {"peft", "transformers", "datasets"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_takes_a_liberty(path: Path) -> None:
    assert liberties(path.read_text(encoding="utf-8"), printing=part(path) in {"cli", "__main__"}) == []


def liberties(source: str, printing: bool) -> list[str]:
    """Asserts (``python -O`` drops them), global seeds, prints outside the command line; with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            found.append(f"assert in line {node.lineno}")
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in PRINTING and not printing:
            found.append(f"{node.func.id} in line {node.lineno}")
        if isinstance(node.func, ast.Attribute) and node.func.attr in SEEDING and _global(node.func.value):
            found.append(f"global seed in line {node.lineno}")
    return found


def _global(owner: ast.expr) -> bool:
    """torch, torch.cuda, np.random, random: a module, where a generator object would be a name of ours or a call."""
    return ast.unparse(owner) in {"torch", "torch.cuda", "torch.random", "np.random", "numpy.random", "random"}


@pytest.mark.parametrize(
    "source",
    ["assert x", "print(1)", "torch.manual_seed(0)", "np.random.seed(1)", "torch.cuda.manual_seed_all(0)"],
)
def test_liberties_are_noticed(source: str) -> None:
    assert len(liberties(source, printing=False)) == 1
    assert not liberties("torch.Generator().manual_seed(0)\ngenerator.manual_seed(1)", printing=False)
