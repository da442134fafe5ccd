"""The notebook: as its script says, with outputs; run again, what must be equal is equal; a copy's shows no body."""

import json
import pathlib

import pytest

from lab.course import copies, notebook
from plumbing.settings import InputError
from tests.conftest import ROOT

jupytext = pytest.importorskip("jupytext", reason="pip install -r requirements-page.txt")
SAVED = notebook.SCRIPT.with_suffix(".ipynb")


def printed(cells):
    """{source: text} of the cells whose output is the same on every machine and with every base model."""
    return {cell["source"]: "".join(one["text"] for one in cell["outputs"])
            for cell in cells if "same" in cell["metadata"].get("tags", ())}


def with_a_toy(root, world, base_dir):
    """A small world and a tiny base model, where `make demo` would leave them."""
    (root / "runs").mkdir()
    (root / "runs/data").symlink_to(pathlib.Path(world["train_rl"]).parent)
    (root / "runs/base").symlink_to(base_dir)
    return root


def test_the_saved_notebook_is_the_script_with_small_outputs():
    saved, script = json.loads(SAVED.read_text(encoding="utf-8"))["cells"], jupytext.read(notebook.SCRIPT).cells
    assert ["".join(cell["source"]) for cell in saved] == [cell.source for cell in script], "run `make notebook`"
    code = [cell for cell in saved if cell["cell_type"] == "code"]
    assert 12 <= len(code) <= 20 and [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(one["output_type"] != "error" for cell in code for one in cell["outputs"])
    assert SAVED.stat().st_size < 300_000


def test_run_again_it_prints_the_same(tmp_path, world, base_dir):
    import nbformat

    for path in ROOT.iterdir():  # the repository, by links: nothing is written into it
        if path.name not in ("runs", ".git", ".venv"):
            (tmp_path / path.name).symlink_to(path)
    saved = nbformat.read(SAVED, as_version=4)
    again = printed(notebook.run(notebook.SCRIPT, with_a_toy(tmp_path, world, base_dir)).cells)
    assert len(again) == 7 and again == printed(saved.cells)
    assert "False" not in "".join(again.values()).replace("b's reward moves: False", "")


def test_a_student_s_copy_has_the_script_alone_and_its_notebook_ends_at_an_exercise(tmp_path, world, base_dir):
    files = copies.student_files(0)
    assert "lab/course/first_hour.py" in files and not [name for name in files if name.endswith(".ipynb")]
    assert not copies.leaks(files)
    copies.write(files, tmp_path)
    with pytest.raises(InputError, match="^first_hour.py: a cell fails: NotImplementedError: Exercise 9 "):
        notebook.run(tmp_path / "lab/course/first_hour.py", with_a_toy(tmp_path, world, base_dir))
