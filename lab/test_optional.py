"""What only requirements-*.txt installs: no module needs it to be imported, and who starts one without it is told."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

MODULES = sorted(path for folder in ("", "plumbing/", "toy/", "lab/*/") for path in ROOT.glob(f"{folder}*.py")
                 if not path.name.startswith("test_"))


def packages(name: str) -> set[str]:
    """The packages of a requirements file, as Python imports them."""
    lines = re.findall(r"^([\w-]+)[=!]=", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {line.lower().replace("-", "_").removesuffix("_py") for line in lines}


OPTIONAL = set().union(*map(packages, (path.name for path in ROOT.glob("requirements-*.txt"))))



@pytest.mark.parametrize("module, needs", [
    ("lab.page", "page"), ("lab.course.notebook", "page"), ("lab.serve", "serve"), ("lab.road", "road")])
def test_a_module_without_its_packages_is_one_sentence(module, needs, tmp_path):
    """In a process that has none of the optional packages, whatever is installed here."""
    assert {"latex2mathml", "markdown_it", "aiohttp", "diffusers", "pyarrow", "openai"} <= OPTIONAL
    flags = ["--out", str(tmp_path / "out")] if module != "lab.serve" else ["--model", "x"]
    script = f"""import runpy, sys
sys.modules.update(dict.fromkeys({sorted(OPTIONAL)}))  # None: it cannot be imported
sys.argv = ["x", *{flags}]
runpy.run_module("{module}", run_name="__main__", alter_sys=False)"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {module} needs "), done.stderr
    assert done.stderr.endswith(f": pip install -r requirements-{needs}.txt.\n"), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_optional_package_is_imported_at_the_top(path):
    """At the top it would be a traceback, also for those who only read the flags; `try` or a function is fine."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & OPTIONAL
