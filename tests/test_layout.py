"""The layout of the package: imports go one way, and files are short."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "paligemma"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 260  # lines


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it: at the top, in a function, or for types
    only."""
    module, found = name_of(file), set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = package.split(".")
            parents = parents[: len(parents) - node.level + 1]
            base = ".".join([*parents, node.module] if node.module else parents)
            names = [f"{base}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else base for name in names}
    return found - {module}


MODULES = {name_of(file) for file in FILES}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except ValueError as error:  # graphlib.CycleError
        return error.args[1]
    return []


def test_imports_go_one_way():
    graph = {name_of(file): imported(file) for file in FILES}
    assert len(graph) > 60
    assert graph["paligemma.gemma"] >= {"paligemma.ops", "paligemma.layers"}
    assert circle(graph) == []
    assert circle(graph | {"paligemma.ops": graph["paligemma.ops"] | {"paligemma.gemma"}})


def test_kernels_are_chosen_in_five_places():
    users = {name_of(file) for file in FILES if any(".kernels." in module for module in imported(file))}
    choosing = {name for name in users if ".kernels" not in name}
    places = ("ops", "fused", "cpu_linear", "cpu_step", "checkpoint.quantize")
    assert choosing == {"paligemma." + name for name in places}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_is_short(file):
    assert len(file.read_text().splitlines()) <= LONGEST
