"""The rules of the house: who imports whom, and that importing does nothing."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(p.name for p in ROOT.glob("*.py"))
FILES = sorted(
    [*ROOT.glob("*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("experiment/*.py"), *ROOT.glob("examples/**/*.py")]
)


def imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_keep_the_rules(path):
    found = imports(path)
    roots = {name.split(".")[0] for name in found}
    scripts = {name.removesuffix(".py") for name in SCRIPTS}
    assert not roots & scripts, "no script is imported"
    if path.parent.name == "models":
        assert "experiment" not in roots, "models stand alone"
    if path.name != "plots.py":
        assert "matplotlib" not in roots, "experiment/plots.py alone draws"
    if path.stem in ("parameters", "script", "sampling", "errors", "files") or path.name.startswith("img_sampler"):
        assert "torch" not in roots


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_importing_does_nothing(path):
    """At the top level stand definitions, constants and the call of main, no loops, no with, no bare calls."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If, ast.Expr)
    for node in ast.parse(path.read_text()).body:
        assert isinstance(node, allowed), f"line {node.lineno}"
        assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)), f"line {node.lineno}"
    assert ast.get_docstring(ast.parse(path.read_text())), "a module opens by saying what it is"


def test_experiment_stays_small():
    assert len([p for p in ROOT.glob("experiment/*.py") if p.name != "__init__.py"]) <= 10


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_open_with_commands_that_run_them(script):
    doc = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    assert re.search(rf"^ *python {script}", doc, re.MULTILINE)


def test_help_is_printed():
    result = subprocess.run(
        [sys.executable, "img_sampler_train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and "--overwrite" in result.stdout
