"""The page: the paper line by line, and each file of the heart with its prose left and its code right.

    README.md (map, eight steps), lab/page/paper.md, the sources, figures/method.svg  ->  OUT/index.html, a page a file

    python -m lab.page --out build

Static HTML and MathML: no server, no script, no network. It is made from the tree it stands in, so a student's copy
has a page of its own, without the bodies that are taken out there.
"""

import argparse
import ast
import html
import pathlib
import re

from lab.page import source
from lab.page.source import Source, prose
from plumbing.settings import InputError, cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = "lab/page/"
NAME = re.compile(r"`([\w/]+\.py)(?:::([\w.]+))?`")  # `file.py::name`, as README's tables have them


def table(text: str, head: str, path: str = "README.md") -> list[list[str]]:
    """The rows of the Markdown table whose first line begins with `head`, as cells. InputError if there is none."""
    lines = iter(text.splitlines())
    if not any(line.startswith(head) for line in lines):
        raise InputError(f"{path} has no table that begins with {head!r}; lab/page reads it.")
    rows = []
    for line in list(lines)[1:]:  # behind the head: |---|---|
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def statements(text: str) -> dict[str, str]:
    """{first cell of the map's row: its part of paper.md}."""
    return dict(part.split("\n", 1) for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:])


def sources(root: pathlib.Path, readme: str) -> dict[str, Source]:
    """{path: Source} of the heart in README's reading order, and what else its tables name."""
    order = re.findall(r"\]\((\w+\.py)\)", readme) + sorted(path.name for path in root.glob("*.py"))
    cells = [cell for row in table(readme, "| paper") + table(readme, "| step") for cell in row[:2]]
    order += [file for cell in cells for file, _ in NAME.findall(cell)]
    found = {file: Source(file, (root / file).read_text(encoding="utf-8"))
             for file in dict.fromkeys(order) if (root / file).exists() and file != "my_tests.py"}
    for one in found.values():
        one.link(found)
    return found


def row_html(number: int, cells: list[str], said: str, files: dict[str, Source], root: pathlib.Path) -> str:
    """One row of the map: statement and equation left, the lines that implement it and its test's worked case right."""
    first, code, test = cells
    shown = "".join(code_html(files[file], name) for file, name in NAME.findall(code))
    shown += "".join(test_html(root, file, name) for file, name in NAME.findall(test))
    left = f"<div>{prose(said)}</div>"
    return (f'<section class="row" id="row-{number}"><h2>{prose(first, block=False)}</h2>'
            f"<div>{left}<div>{shown}</div></div></section>")


def code_html(file: Source, name: str) -> str:
    """The lines of a definition, without its docstring; open if they are few. Its place is a link."""
    if name not in file.definitions:
        raise InputError(f"README's map names {file.path}::{name}, which is not there.")
    node = file.definitions[name]
    first, last = source.first_line(node), node.end_lineno
    hidden = source.docstring_lines(node)
    lines = [k for k in range(first, last + 1) if k not in hidden]
    place = f'<a href="{file.page}#{name}">{file.path}::{name}</a>, lines {first} to {last}'
    return (f"<details{' open' if len(lines) <= 32 else ''}><summary><code>{place}</code></summary>"
            f"{file.code(lines, anchors=False)}</details>")


def test_html(root: pathlib.Path, path: str, name: str) -> str:
    """What a test says of its worked case: its docstring and first comments; below them the test itself."""
    if not (root / path).exists():  # a student's copy has no test that names an exercise
        return f"<p><code>{path}{'::' + name if name else ''}</code></p>"
    test = Source(path, (root / path).read_text(encoding="utf-8"))
    if not name:
        tests = "".join(f"<li><code>{t}</code></li>" for t in test.definitions if t.startswith("test_"))
        return f"<details><summary>tests: <code>{path}</code></summary><ul>{tests}</ul></details>"
    node = test.definitions[name]
    lines = test.lines[node.lineno : node.end_lineno]
    comments = [line.strip()[2:] for line in lines if line.strip().startswith("# ")]
    words = [part for part in (ast.get_docstring(node), "\n".join(comments)) if part]
    worked = "".join(f"<pre>{html.escape(part)}</pre>" for part in words)
    shown = test.code(list(range(source.first_line(node), node.end_lineno + 1)), anchors=False)
    worked = worked and f'<div class="worked"><b>Worked in the test</b>{worked}</div>'
    return f"{worked}<details><summary>test: <code>{path}::{name}</code></summary>{shown}</details>"


def steps_html(readme: str, files: dict[str, Source]) -> str:
    """The eight steps of stage 2, each a link to its function."""
    lines = []
    for step, code, equation in table(readme, "| step"):
        file, name = NAME.findall(code)[0]
        lines.append(f'<tr><td><a href="{files[file].page}#{name}">{prose(step, block=False)}</a></td>'
                     f"<td><code>{file}::{name}</code></td><td>{prose(equation, block=False)}</td></tr>")
    return f"<table><tr><th>step<th>function<th>equation</tr>{''.join(lines)}</table>"


def drawing(text: str, file: str) -> str:
    """The drawing of who sees whom, from the file's docstring: its block of lines with x and dots."""
    blocks = re.split(r"\n\n(?=\S)|(?<=\S)\n\n(?= )", ast.get_docstring(ast.parse(text)) or "")
    found = [block for block in blocks if re.search(r"^ +p +x \. \.", block, flags=re.MULTILINE)]
    if not found:
        raise InputError(f"{file}: no drawing of who sees whom in its docstring; lab/page shows it.")
    return f"<pre>{html.escape(found[0])}</pre>"


def index_html(root: pathlib.Path, readme: str, files: dict[str, Source]) -> str:
    said = statements((root / HERE / "paper.md").read_text(encoding="utf-8"))
    rows = table(readme, "| paper")
    if odd := {row[0] for row in rows} ^ set(said):
        raise InputError(f"README's map and {HERE}paper.md must have the same rows; only one has: {sorted(odd)}.")
    contents = "".join(f'<li><a href="#row-{k}">{prose(row[0], block=False)}</a></li>' for k, row in enumerate(rows, 1))
    body = "".join(row_html(k, row, said[row[0]], files, root) for k, row in enumerate(rows, 1))
    figure = re.sub(r"^.*?(?=<svg)", "", (root / "figures/method.svg").read_text(encoding="utf-8"), flags=re.DOTALL)
    return f"""<h1>The paper, line by line</h1>
<p class="wide"><i>Think, then Score: Decoupled Reasoning and Scoring for Video Reward Modeling</i>
(<a href="https://arxiv.org/abs/2605.05922">arXiv 2605.05922</a>), beside the code that implements it. Statements are in
our words; equations without a number are not numbered here. Not the authors' code.</p>
<figure>{figure}</figure>
<ol class="wide">{contents}</ol>
<h2 id="steps">Stage 2 in eight steps</h2>{steps_html(readme, files)}
<h2 id="who-sees-whom">Who sees whom</h2>
<p class="wide">From <a href="{files["layout.py"].page}"><code>layout.py</code></a>:</p>
{drawing(files["layout.py"].text, "layout.py")}{body}"""


def page(title: str, body: str, files: dict[str, Source], style: str) -> str:
    pages = {"the paper": "index.html"} | {one.path: one.page for one in files.values()}
    links = [f"<b>{name}</b>" if name == title else f'<a href="{at}">{name}</a>' for name, at in pages.items()]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title} · DeScore, readable</title><style>{style}</style></head>
<body><nav class="files">{" ".join(links)}</nav>
{body}</body></html>
"""


def build(root: pathlib.Path) -> dict[str, str]:
    """{file name: HTML} of the site of a tree. InputError where README, paper.md and the sources do not fit."""
    if source.MarkdownIt is None:
        raise InputError("lab.page needs latex2mathml, markdown-it-py, Pygments: pip install -r requirements-page.txt.")
    readme = (root / "README.md").read_text(encoding="utf-8")
    style = (root / HERE / "style.css").read_text(encoding="utf-8")
    files = sources(root, readme)
    pages = {"index.html": page("the paper", index_html(root, readme, files), files, style)}
    for one in files.values():
        pages[one.page] = page(one.path, f"<h1>{one.path}</h1>{one.columns()}", files, style)
    return pages


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="build", help="the folder to write")
    out, pages = pathlib.Path(parser.parse_args(argv).out), build(ROOT)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder.")
    out.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")
    print(f"wrote {out / 'index.html'} and the pages of {len(pages) - 1} files")


if __name__ == "__main__":
    cli(main)
