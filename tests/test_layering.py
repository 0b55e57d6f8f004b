"""The module table of docs/architecture.md holds: who may import whom, downward only, and what must stay light.

The table is read from the document, so that the two cannot drift apart.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ticketfind"
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
LIGHT = (
    "rundir", "results", "recipe", "layers", "readers", "specs", "files", "terminal", "views", "outlook", "options",
)  # fmt: skip
COMMANDS = ("cli", "judging")
"""Their functions may import anything."""


@dataclass(frozen=True)
class Row:
    """One module's row of the table; names are of ticketfind's modules and of third-party packages."""

    place: int
    top: frozenset[str]
    inside: frozenset[str]
    """May be imported in functions only."""
    never: frozenset[str]


def _read_table() -> dict[str, Row]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = text[text.index("| module | may import | must not know |") :].splitlines()
    rows = {}
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        module, may, never = (cell.strip() for cell in line.strip("|").split("|"))
        top, _, inside = may.partition("in functions:")
        (name,) = _names(module)
        assert name not in rows, f"{name} has two rows"
        rows[name] = Row(len(rows), _names(top), _names(inside), _names(never))
    return rows


def _names(cell: str) -> frozenset[str]:
    return frozenset(re.findall(r"`(\w+)`", cell))


TABLE = _read_table()


@dataclass(frozen=True)
class Import:
    """`name`: a module of ticketfind or a third-party package."""

    name: str
    line: int
    in_function: bool


def _imports(source: str) -> Iterator[Import]:
    """What a module imports, standard library, the package itself and TYPE_CHECKING blocks left out."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, in_function)
            return
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in _targets(node):
                yield Import(name, node.lineno, in_function)
        in_function = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function)

    yield from visit(ast.parse(source), False)


def _targets(node: ast.Import | ast.ImportFrom) -> set[str]:
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        assert node.module is not None
        dotted = {f"{node.module}.{alias.name}" for alias in node.names}
    else:
        dotted = {alias.name for alias in node.names}
    found = set()
    for name in dotted:
        first, *rest = name.split(".")
        if first == "ticketfind":
            found |= {rest[0]} & MODULES.keys() if rest else set()
        elif first not in sys.stdlib_module_names:
            found.add(first)
    return found


IMPORTS = {name: list(_imports(path.read_text(encoding="utf-8"))) for name, path in MODULES.items()}


def _reach(name: str) -> set[str]:
    """Everything that importing a module imports."""
    reached: set[str] = set()
    todo = [name]
    while todo:
        new = {i.name for i in IMPORTS.get(todo.pop(), []) if not i.in_function} - reached
        reached |= new
        todo += new
    return reached


def test_every_module_has_a_row() -> None:
    assert TABLE.keys() == MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_what_its_row_names_and_no_more(name: str) -> None:
    row = TABLE[name]
    top = {i.name for i in IMPORTS[name] if not i.in_function}
    inside = {i.name for i in IMPORTS[name] if i.in_function} - top
    assert top == row.top, "at the top of the file"
    if name not in COMMANDS:
        assert inside == row.inside, "in functions"


def test_imports_run_downward() -> None:
    for name, row in TABLE.items():
        upward = [other for other in row.top | row.inside if other in TABLE and TABLE[other].place <= row.place]
        assert not upward, f"{name} imports {upward} from above"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_that_it_must_not_know(name: str) -> None:
    never = TABLE[name].never
    direct = {i.name for i in IMPORTS[name] if name not in COMMANDS or not i.in_function}
    assert not direct & never
    assert not _reach(name) & never & {"torch", "timm"}, "through another module"


def test_no_cycle() -> None:
    """In functions too: a cycle there is a design fault that Python happens to bear."""
    edges = {name: {i.name for i in found if i.name in MODULES} for name, found in IMPORTS.items()}
    while edges:
        leaves = {name for name, others in edges.items() if not others & edges.keys()}
        assert leaves, f"cycle among {sorted(edges)}"
        edges = {name: others for name, others in edges.items() if name not in leaves}


@pytest.mark.parametrize("name", LIGHT + COMMANDS)
def test_light_modules_import_no_torch(name: str) -> None:
    assert not _reach(name) & {"torch", "timm", "numpy", "safetensors"}


def test_only_models_and_images_import_timm() -> None:
    assert [name for name in MODULES if any(i.name == "timm" for i in IMPORTS[name])] == ["images", "models"]


def test_the_package_itself_imports_nothing_heavy() -> None:
    found = list(_imports((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
    assert not [i for i in found if not i.in_function]


def test_imports_are_told_apart() -> None:
    source = """
import os
import torch.nn
from typing import TYPE_CHECKING
from ticketfind import TicketfindError, masks
from ticketfind.batches import Split
if TYPE_CHECKING:
    from ticketfind.search import Plan
class A:
    def f(self):
        import numpy as np
        from ticketfind import ticket
"""
    found = [(i.name, i.in_function) for i in _imports(source)]
    assert found == [("torch", False), ("masks", False), ("batches", False), ("numpy", True), ("ticket", True)]
