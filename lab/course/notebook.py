"""The course's notebook: first_hour.py, a plain script with cell marks, is converted and run.

    python -m lab.course.notebook      lab/course/first_hour.py -> lab/course/first_hour.ipynb, with its outputs

Edit the script, never the notebook. A student's copy has the script alone: run there, the notebook is that copy's own,
and ends at the first exercise that is not solved.
"""

import argparse
import pathlib

from plumbing.settings import InputError, atomic_write, cli

try:
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
except ImportError:  # optional requirements; `run` says so
    jupytext = None

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "lab/course/first_hour.py"


def run(script: pathlib.Path, root: pathlib.Path = ROOT, timeout: int = 1800):
    """A script with cell marks -> its notebook, executed in `root`. InputError: a package is missing, a cell fails."""
    if jupytext is None:
        raise InputError("lab.course.notebook needs jupytext, nbclient: pip install -r requirements-page.txt.")
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells, 1):  # jupytext draws ids anew: each conversion would differ
        cell.id = f"cell-{number}"
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    client = NotebookClient(notebook, timeout=timeout, record_timing=False, resources={"metadata": {"path": str(root)}})
    try:
        client.execute()
    except CellExecutionError as error:
        raise InputError(f"{script.name}: a cell fails: {error.ename}: {error.evalue}") from None
    for cell in notebook.cells:  # progress bars are of no use in a file
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    return notebook


def main(argv=None) -> None:
    """Runs the script's cells and writes them with their outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(SCRIPT.with_suffix(".ipynb")), help="the notebook to write")
    out = pathlib.Path(parser.parse_args(argv).out)
    notebook = run(SCRIPT)
    with atomic_write(str(out)) as file:
        file.write(nbformat.writes(notebook) + "\n")
    print(f"wrote {out}, {len(notebook.cells)} cells")


if __name__ == "__main__":
    cli(main)
