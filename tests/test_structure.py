"""The rules of the house: who imports whom, and that importing does nothing."""

import ast
import re

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
FILES = sorted(path for place in ("", "models/", "experiment/", "examples/**/") for path in ROOT.glob(f"{place}*.py"))


def imports(tree: ast.Module) -> set[str]:
    """The first part of the name of every module that is imported."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_keeps_the_rules(path):
    """At the top level stand definitions, constants and the call of main, no loops, no with, no bare calls."""
    tree = ast.parse(path.read_text())
    found = imports(tree)
    assert not found & set(SCRIPTS), "no script is imported"
    if path.parent.name == "models":
        assert "experiment" not in found, "models stand alone"
    if path.name != "plots.py":
        assert "matplotlib" not in found, "experiment/plots.py alone draws"
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If, ast.Expr)
    for node in tree.body:
        assert isinstance(node, allowed), f"line {node.lineno}"
        assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)), f"line {node.lineno}"
    assert ast.get_docstring(tree), "a module opens by saying what it is"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_open_with_commands_that_run_them(script):
    doc = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    assert re.search(rf"^ *python {script}.py", doc, re.MULTILINE)
