"""A student's copy: the functions of the table lose their bodies, and nothing else in the copy shows one.

The bodies are taken out by `ast`: the reference carries no markers. Signature, docstring and leading asserts stay.
"""

import ast
import functools
import json
import pathlib
import re
import textwrap

from lab.course.exercises import EXERCISES, MY_TESTS, Exercise, constants
from plumbing.settings import InputError, writable

ROOT = pathlib.Path(__file__).resolve().parents[2]
COPIED = ("*.py", "plumbing/*.py", "toy/*.py", "lab/*.py", "lab/*/*.py", "tests/__init__.py", "tests/conftest.py",
          "tests/test_*.py", "docs/*.md", "lab/*/*.md", "lab/*/*.html",
          "figures/*.svg", "scripts/*.sh", "Makefile", "pyproject.toml", "requirements*.txt", "README.md", "LICENSE",
          "CITATION.cff")
# What shows bodies, or is the lecturer's. Tests that name an exercise's function go as well: some hold its naive twin.
LEFT_OUT = ("lab/course/mistakes.py", "lab/course/test_proof.py", "lab/course/README.md", "docs/change.md",
            "lab/course/test_course.py", "lab/course/test_notebook.py", "tests/test_docs.py",
            "tests/test_change_one_thing.py")
RUN = ("*.py", "plumbing/*.py")  # what a submission's process needs
# Lines of bodies that functions beside them hold, too: calls of helpers that are given, and "take the best".
SHARED = {"ratio=policy_ratio(log_probs,old_log_probs,mask)", "labels,margins=checked(labels,margins)",
          "best=int(np.argmax(accuracies))"}
VARIANT = "variant.txt"


# ---------------------------------------------------------------------------------------------------------------
# The student's copy
# ---------------------------------------------------------------------------------------------------------------
def without_bodies(file: str, text: str, variant: int = 0, blank: bool = True) -> str:
    """The source of `file` with its exercises' bodies replaced; signature, docstring and leading asserts stay.

    blank False: the bodies stay as well, and only a variant's constants are written into the signatures.
    """
    lines, names = text.splitlines(), {}
    for exercise in EXERCISES:
        names |= {place.split("::")[1]: exercise for place in exercise.places if place.startswith(file + "::")}
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            kept = split_body(node)[0]
            changed = variant and set_defaults(lines, node, constants(variant))
            if blank:
                lines[kept[-1].end_lineno : node.end_lineno] = stub(names[node.name], variant if changed else 0)
    return "\n".join(lines) + "\n"


def split_body(node: ast.FunctionDef) -> tuple[list, list]:
    """A function's statements: docstring and leading asserts, and the rest, which is the work."""
    count = 1 if ast.get_docstring(node) is not None else 0
    while count < len(node.body) and isinstance(node.body[count], ast.Assert):
        count += 1
    return node.body[:count], node.body[count:]


def stub(exercise: Exercise, variant: int) -> list[str]:
    """The lines that stand where the body was."""
    text = f"Exercise {exercise.number} ({exercise.minutes} min): {exercise.hint}"
    if variant:
        text += f" Variant {variant}: the defaults above count, worked numbers in docstrings are the paper's."
    parts = textwrap.wrap(text, 90, drop_whitespace=False)
    parts = [f"        {json.dumps(part, ensure_ascii=False)}" for part in parts]
    return ["    raise NotImplementedError(", *parts, "    )"]


def set_defaults(lines: list[str], node: ast.FunctionDef, values: dict) -> bool:
    """Writes a variant's constants into a signature, without moving a line. Were there any?"""
    values = values | {"low": values["length_range"][0], "high": values["length_range"][1]}
    arguments = node.args.args[len(node.args.args) - len(node.args.defaults) :]
    found = [(a, d) for a, d in zip(arguments, node.args.defaults, strict=True) if a.arg in values]
    for argument, default in reversed(found):  # from the right: what stands left of it keeps its columns
        line = lines[default.lineno - 1]
        new = repr(values[argument.arg])
        lines[default.lineno - 1] = line[: default.col_offset] + new + line[default.end_col_offset :]
    return bool(found)


def named_places() -> list[tuple[str, str]]:
    """(function, file) of all that loses its body."""
    return [tuple(reversed(place.split("::"))) for exercise in EXERCISES for place in exercise.places]


@functools.lru_cache
def student_files(variant: int = 0, patterns: tuple[str, ...] = COPIED) -> dict[str, str]:
    """{path: text} of a student's copy."""
    files, names = {"my_tests.py": without_bodies("my_tests.py", MY_TESTS)}, [name for name, _ in named_places()]
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        named = "/test_" in name and any(re.search(rf"\b{word}\b", text) for word in names)
        if name not in LEFT_OUT and not named and name != "my_tests.py":
            files[name] = without_bodies(name, text, variant) if name.endswith(".py") else text
    files[VARIANT] = f"{variant}\n"
    return files


def body_lines(file: str) -> set[str]:
    """The lines of the exercises' bodies in a file, without spaces and comments; short ones are no leak."""
    text, found = (ROOT / file).read_text(encoding="utf-8"), set()
    names = [name for name, place in named_places() if place == file]
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            rest = split_body(node)[1]
            found |= {bare(line) for line in text.splitlines()[rest[0].lineno - 1 : node.end_lineno]}
    return {line for line in found if len(line) >= 20}


def bare(line: str) -> str:
    """A line of a diff without its sign, comment and spaces: equal for equal code."""
    return re.sub(r"\s", "", line.split("  #")[0].strip().lstrip("+-"))


def leaks(files: dict[str, str]) -> list[str]:
    """"path: line" wherever a line of a body stands in a copy."""
    known = {line for _, file in named_places() if (ROOT / file).exists() for line in body_lines(file)} - SHARED
    lines = [(path, line.strip()) for path, text in files.items() for line in text.splitlines()]
    return [f"{path}: {line}" for path, line in lines if bare(line) in known]


def write(files: dict[str, str], folder: pathlib.Path) -> None:
    """{path: text} below a folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def make_copy(out: str, variant: int) -> None:
    """A student's copy in a new folder. InputError where a body would leak."""
    folder = pathlib.Path(out)
    if folder.is_file():
        raise InputError(f"{out} is a file; name a new folder.")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{out} is not empty; name a new folder.")
    files = student_files(variant)
    if found := leaks(files):
        raise InputError(f"the copy would show a body: {found[0]}; add its file to LEFT_OUT in lab/course.")
    writable([out])
    write({**files, "sheet.md": sheet(variant)}, folder)
    print(f"wrote {out}: {len(named_places())} functions to write; {out}/sheet.md tells how to begin")


def sheet(variant: int) -> str:
    """sheet.md of the copy: the exercises as a table."""
    rows = []
    for e in EXERCISES:
        rows.append(f"| {e.number} | {e.title} | {e.points} | {e.minutes} | {', '.join(f'`{p}`' for p in e.places)} |")
    return SHEET.format(rows="\n".join(rows), variant=variant, points=sum(e.points for e in EXERCISES))


SHEET = """# Write the method: {points} points by the grader

Variant {variant}. Each function below has its signature, its docstring and its asserts; its body is yours.
Read the docstring and the paper (arXiv 2605.05922), work one case out by hand, write it, and ask:

    python -m lab.course --check 3        exercise 3, a few seconds; without a number: all

The first lesson that fails tells what is wrong. The share of the lessons before it is your share of the points.
Exercise 10 is tried on your own functions here, and on mistakes when it is graded.

| | | points | minutes | write |
|---|---|---|---|---|
{rows}

Then measure, for 30 points more: lab/course/exercises.md. Hand in the files named above, with their folders, and
your report.
The reference is public. Copying it teaches nothing, and the measurements on your own seed cannot be copied.
"""
