"""Imports run one way, lab -> toy -> top level -> plumbing, and in no circle; all that is public has a docstring.

Read from the source, by ast.
"""

import ast

import pytest

from tests.conftest import ROOT

FOLDERS = ("", "plumbing/", "toy/", "lab/", "lab/*/")
PATHS = [path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}*.py")) if path.name != "conftest.py"]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PATHS}
LEAVES = {"losses", "rules"}  # pure: plumbing may import them
RANK = {"plumbing": 0, "toy": 2, "lab": 3}  # a module at the top has rank 1


def imported(path) -> set[str]:
    """All of ours that a file imports, in functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{name.name}" for name in node.names} & set(MODULES)
            found |= inside or {node.module}  # `from toy import look` is toy.look, `from toy.look import x` as well
    return found & set(MODULES)


EDGES = {name: imported(path) for name, path in MODULES.items()}


def rank(module: str) -> int:
    return RANK.get(module.split(".")[0], 1)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module):
    upwards = {other for other in EDGES[module] if rank(other) > rank(module)}
    assert not upwards - (LEAVES if rank(module) == 0 else set()), f"{module} imports what stands above it"


def test_the_leaves_import_nothing_of_ours_but_leaves():
    assert all(EDGES[leaf] <= LEAVES for leaf in LEAVES)


def test_no_circles():
    """Modules that import nothing of ours are taken away, again and again; those of a circle stay."""
    left = {name: set(others) for name, others in EDGES.items()}
    while free := {name for name, others in left.items() if not others & set(left)}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_scripts_never_import_each_other():
    """Run as `python a.py`, a script is `__main__`: imported from another, its module would stand in memory twice."""
    scripts = {name for name in MODULES if rank(name) == 1 and "cli(main)" in MODULES[name].read_text("utf-8")}
    assert not {name: EDGES[name] & scripts for name in scripts if EDGES[name] & scripts}


# ---- Docstrings -----------------------------------------------------------------------------------------------
def public(node):
    """Functions and classes of a module, and methods; not what stands inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            yield child
            yield from public(child) if isinstance(child, ast.ClassDef) else ()


@pytest.mark.parametrize("module", sorted(name for name in MODULES if "test_" not in name and ".lessons" not in name))
def test_everything_public_has_a_docstring_that_names_its_error(module):
    """A script's `main` raises for the person who typed: `plumbing.settings.cli` makes a sentence of it."""
    for node in public(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        text = ast.get_docstring(node)
        assert text, f"{module}.{node.name} has no docstring"
        raised = any(isinstance(n, ast.Raise) and "InputError(" in ast.unparse(n) for n in ast.walk(node))
        if raised and node.name != "main" and not isinstance(node, ast.ClassDef):
            assert "InputError" in text, f"{module}.{node.name} raises InputError and does not say so"
