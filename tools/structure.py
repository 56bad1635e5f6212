"""Print the figures of the package's layout: sizes, imports, names, and what a docstring leaves out.

    python tools/structure.py            of this checkout
    python tools/structure.py FOLDER     of another one

Each figure comes with the places that it counts. ``tests/test_architecture.py`` holds several of them at zero.

Imports are those that name a module of the package, at the top of a module or inside a function. Left out are imports
under ``TYPE_CHECKING``, which never run; the table in ``rankscope/__init__.py``, which loads a public name when it is
first used; and that importing ``a.b`` runs the ``__init__`` of ``a`` too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "rankscope"
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
LAZY_TABLES = {"__init__.py", "cli/__init__.py", "train/methods.py"}
"""Files that load a module whose name a table has in full: public names, commands, trainers; each when first used."""
ROOM_MODULES = {"measure", "figure", "section"}
"""Modules of one name in every folder of a line of evidence."""
IRREGULAR_PARTICIPLES = frozenset(
    re.findall(
        r"\w+",
        """begun bound built chosen come done drawn found given gone got had heard held hidden kept known laid lost made
        met paid said seen sent shown shut sold sorted spent stood sworn taken told torn won worn written""",
    )
)
NOT_PARTICIPLES = {"bed", "embed", "exceed", "feed", "need", "proceed", "red", "seed", "shed", "speed"}
PARTICLES = frozenset(
    re.findall(
        r"\w+", "apart as away back beside by down for from in of off on out over to together under up whole with"
    )
)
EXEMPT_PARTICIPLES = {"Interval.known", "Study.done", "SideComparison.expected"}
"""Names that users' scripts call, or that results have in JSON."""
_SIDE = r"[^\s(),]{1,9}(?: [·+−-] [^\s(),]{1,9})*"
SHAPE = re.compile(rf"\((?:{_SIDE}, ?)+(?:{_SIDE})?\)|\b(?:any|same|one) shapes?\b|\bscalar\b")
"""(out, r), (k,), (…, d, r), (o₁·o₂, i₁·i₂); or the words where every shape will do."""


@dataclass(frozen=True)
class Source:
    """One file of the package: its path in it, its dotted name, its text and its syntax tree."""

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def part(self) -> str:
        """The module or package directly below rankscope that the file belongs to."""
        return self.path.split("/")[0].removesuffix(".py")


@dataclass(frozen=True)
class Function:
    """A function or method: its name after those that it stands in (``Class.method``), its node, and whether it stands
    inside another function."""

    source: Source
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    nested: bool

    def __str__(self) -> str:
        return f"{self.source.path}:{self.node.lineno} {self.name}"

    @property
    def lines(self) -> int:
        """Lines from ``def`` to the end."""
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    @property
    def code_lines(self) -> int:
        """Lines without those of the docstring."""
        first = self.node.body[0]
        documented = ast.get_docstring(self.node, clean=False) is not None
        return self.lines - ((first.end_lineno or 0) - first.lineno + 1 if documented else 0)


def read_sources(checkout: Path) -> list[Source]:
    """All files of the package in a checkout, by path."""
    root = checkout / PACKAGE
    sources = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        module = ".".join((PACKAGE, *Path(relative).with_suffix("").parts)).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        sources.append(Source(relative, module, text, ast.parse(text)))
    return sources


# Imports


def imported_names(source: Source) -> set[str]:
    """Absolute dotted names of all that a file imports when it runs, wherever in it the import stands."""
    package = source.module.split(".")
    package = package if source.path.endswith("__init__.py") else package[:-1]
    names: set[str] = set()
    for node in _running_nodes(source.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def _running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, without what stands under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from (other, *_running_nodes(other))
        else:
            yield child
            yield from _running_nodes(child)


def import_graph(sources: list[Source]) -> dict[str, set[str]]:
    """The modules of the package that each of them imports."""
    modules = {source.module for source in sources}
    graph: dict[str, set[str]] = {}
    for source in sources:
        names = set() if source.path == "__init__.py" else imported_names(source)
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[source.module] = (targets & modules) - {source.module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            at = stack.index(module)
            groups.append(sorted(stack[at:]))
            del stack[at:]

    for module in graph:
        if module not in order:
            visit(module)
    return sorted(group for group in groups if len(group) > 1)


def part_arrows(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Pairs of different parts of the package (``formats``, ``linalg``, …) of which the first imports the second."""
    arrows = {(_part(module), _part(other)) for module, others in graph.items() for other in others}
    return {(here, there) for here, there in arrows if here != there}


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def read_layers(checkout: Path) -> list[set[str]]:
    """The layers that a checkout gives itself: ``LAYERS`` of its tests/test_architecture.py, the lowest first."""
    tree = ast.parse((checkout / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "LAYERS" and node.value is not None:
            layers: list[set[str]] = ast.literal_eval(node.value)
            return layers
    return []


def upward_imports(graph: dict[str, set[str]], layers: list[set[str]]) -> list[str]:
    """Imports of a part of the package in the same layer or a higher one; ``import rankscope`` (its version) may be."""
    level = {part: at for at, parts in enumerate(layers) for part in parts}
    return [
        f"{module} imports {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if _part(module) in level and _part(other) not in {_part(module), PACKAGE}
        if level.get(_part(other), len(layers)) >= level[_part(module)]
    ]


def computed_imports(sources: list[Source]) -> list[str]:
    """Calls of ``import_module`` and ``__import__`` whose module is not written out; without ``LAZY_TABLES``."""
    return [
        f"{source.path}:{node.lineno} {ast.unparse(node)}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}
        and not (node.args and isinstance(node.args[0], ast.Constant))
        and source.path not in LAZY_TABLES
    ]


# Sizes and names


def functions(source: Source) -> list[Function]:
    """Every function of a file, nested ones too."""
    result = []

    def visit(node: ast.AST, outer: tuple[str, ...], nested: bool) -> None:
        for child in ast.iter_child_nodes(node):
            names, within = outer, nested
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names = (*outer, child.name)
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                result.append(Function(source, ".".join(names), child, nested))
                within = True
            visit(child, names, within)

    visit(source.tree, (), False)
    return result


def long_files(sources: list[Source]) -> list[str]:
    """Files over 400 lines."""
    counts = {source.path: source.text.count("\n") for source in sources}
    return [f"{path} {count}" for path, count in counts.items() if count > LONGEST_FILE]


def long_functions(sources: list[Source], code_alone: bool = False) -> list[str]:
    """Functions over 60 lines; ``code_alone`` leaves the docstring out of the count."""
    every = [function for source in sources for function in functions(source)]
    counts = [(function, function.code_lines if code_alone else function.lines) for function in every]
    return [f"{function} {count}" for function, count in counts if count > LONGEST_FUNCTION]


def is_bare_participle(name: str) -> bool:
    """Whether a name is a past participle that no noun follows: ``measured``, ``_told``, ``taken_apart``."""
    first, *rest = name.strip("_").split("_")
    participle = first in IRREGULAR_PARTICIPLES or (first.endswith("ed") and first not in NOT_PARTICIPLES)
    return participle and set(rest) <= PARTICLES


def bare_participles(sources: list[Source]) -> list[str]:
    """Functions and methods that are named by a bare participle."""
    every = [function for source in sources for function in functions(source)]
    return [
        str(function)
        for function in every
        if is_bare_participle(function.node.name) and function.name not in EXEMPT_PARTICIPLES
    ]


def namesake_modules(sources: list[Source]) -> list[str]:
    """Modules of one name, except those that each line of evidence has."""
    paths: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        stem = Path(source.path).stem
        if stem not in {"__init__", "__main__", *ROOM_MODULES}:
            paths[stem].append(source.path)
    return _shared_names(paths)


def namesake_classes(sources: list[Source]) -> list[str]:
    """Classes of one name."""
    paths: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                paths[node.name].append(source.path)
    return _shared_names(paths)


def _shared_names(paths: dict[str, list[str]]) -> list[str]:
    return [f"{name}: {', '.join(places)}" for name, places in sorted(paths.items()) if len(places) > 1]


def count_word(sources: list[Source], word: str) -> int:
    """How often a word stands in the package's text."""
    return sum(len(re.findall(rf"\b{word}\b", source.text)) for source in sources)


def count_parameters(sources: list[Source], word: str) -> int:
    """How many parameters of functions have this name."""
    nodes = (node for source in sources for node in ast.walk(source.tree))
    return sum(isinstance(node, ast.arg) and node.arg == word for node in nodes)


def tensor_functions(sources: list[Source]) -> list[Function]:
    """Public functions, and methods of public classes, that take a tensor, or a tuple or None in its place."""
    return [
        function
        for source in sources
        for function in functions(source)
        if not any(part.startswith("_") for part in function.name.split("."))
        and not function.nested
        and any(_is_tensor(node.annotation) for node in ast.walk(function.node.args) if isinstance(node, ast.arg))
    ]


def _is_tensor(annotation: ast.expr | None) -> bool:
    if isinstance(annotation, ast.BinOp):
        return _is_tensor(annotation.left) or _is_tensor(annotation.right)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "tuple":
        return any(_is_tensor(node) for node in ast.walk(annotation.slice) if isinstance(node, ast.expr))
    return annotation is not None and ast.unparse(annotation) in {"Tensor", "torch.Tensor"}


def shapeless_functions(sources: list[Source]) -> list[str]:
    """Those of ``tensor_functions`` whose docstring has no shape in it, as ``(out, r)``."""
    every = tensor_functions(sources)
    return [str(function) for function in every if not SHAPE.search(ast.get_docstring(function.node) or "")]


# The page


def main() -> None:
    checkout = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    sources = read_sources(checkout)
    graph = import_graph(sources)
    every = [function for source in sources for function in functions(source)]
    print(f"files: {len(sources)}")
    print(f"lines: {sum(source.text.count(chr(10)) for source in sources)}")
    print(f"functions: {len(every)}")
    print(f"imports between modules: {sum(map(len, graph.values()))}")
    print(f"arrows between packages and modules of the top level: {len(part_arrows(graph))}")
    print(f'the word "found": {count_word(sources, "found")}, as a parameter: {count_parameters(sources, "found")}')
    print(f"public functions with tensor arguments: {len(tensor_functions(sources))}")
    groups = circles(graph)
    places = {
        "circles of imports": [f"{len(group)} modules: {', '.join(group)}" for group in groups],
        "imports that run upward by the checkout's own layers": upward_imports(graph, read_layers(checkout)),
        "modules looked up by a computed name": computed_imports(sources),
        f"files over {LONGEST_FILE} lines": long_files(sources),
        f"functions over {LONGEST_FUNCTION} lines": long_functions(sources),
        f"functions over {LONGEST_FUNCTION} lines without the docstring": long_functions(sources, code_alone=True),
        "functions named by a bare participle": bare_participles(sources),
        "modules of one name": namesake_modules(sources),
        "classes of one name": namesake_classes(sources),
        "public functions with tensor arguments that say no shape": shapeless_functions(sources),
    }
    for title, offenders in places.items():
        print("\n".join([f"{title}: {len(offenders)}", *(f"    {offender}" for offender in offenders)]))


if __name__ == "__main__":
    main()
