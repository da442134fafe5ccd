"""The page: the paper line by line, and each file of the heart with its prose left and its code right.

    README.md (map, eight steps), lab/page/paper.md, the sources, figures/method.svg  ->  OUT/index.html, a page a file

    python -m lab.page --out build

Static HTML and MathML: no server, no script, no network. It is made from the tree it stands in, so a student's copy
has a page of its own, without the bodies that are taken out there.
"""

import argparse
import html
import pathlib
import re
import string

from lab.page.source import MarkdownIt, Source, linked, prose
from plumbing.settings import InputError, cli, writable

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = "lab/page/"
NAME = re.compile(r"`([\w/]+\.py)(?:::([\w.]+))?`")  # `file.py::name`, as README's tables have them
MAP, STEPS = (("README.md", rf"^\| {word}.*\n(?:\|.*\n)+") for word in ("paper", "step"))
DRAWING = "layout.py", r"(?:^ .*\n)*^ +p +x \. \..*\n(?:^ .*\n)*"
FIGURE = "figures/method.svg", r"<svg(?:.|\n)*"


def part(root: pathlib.Path, place: tuple[str, str]) -> str:
    """What the page takes from another file. InputError if it is not there."""
    found = re.search(place[1], (root / place[0]).read_text(encoding="utf-8"), flags=re.MULTILINE)
    if not found:
        raise InputError(f"{place[0]} has no part of the form {place[1]!r}; lab/page shows it.")
    return found[0]


def sources(root: pathlib.Path) -> dict[str, Source]:
    """{path: Source} of the heart in README's reading order, and what else its tables name, tests too."""
    order = re.findall(r"\]\((\w+\.py)\)", (root / "README.md").read_text(encoding="utf-8"))
    order += sorted(path.name for path in root.glob("*.py") if path.name != "my_tests.py")
    order += [file for file, _ in NAME.findall(part(root, STEPS) + part(root, MAP))]
    places = {}
    return {file: Source(file, (root / file).read_text(encoding="utf-8"), places)
            for file in dict.fromkeys(order) if (root / file).exists()}


def lines_html(file: Source | None, path: str, name: str) -> str:
    """The lines of `path::name`, open if they are few. Of a test, what it says of its worked case is seen first.

    InputError: README names a place that is not there.
    """
    place = f"{path}::{name}".strip(":")
    if not file:  # a student's copy has no test that names an exercise
        return f"<p><code>{place}</code></p>"
    link = f'<a href="{file.page}#{name}"><code>{place}</code></a>'
    if not name:
        return f"<p>{link}</p>"
    if name not in file.definitions:
        raise InputError(f"README's map names {place}, which is not there.")
    lines, is_test = file.definitions[name], path.startswith("tests/")
    code = [k for k in lines if k not in file.said or file.lines[k - 1].lstrip().startswith("#")]
    worked = html.escape("\n".join(file.said[k] for k in lines if k in file.said).strip()) if is_test else ""
    return (f'<div class="worked"><b>Worked in the test</b><pre>{worked}</pre></div>' * bool(worked) +
            f"<details{' open' * (not is_test and len(code) <= 32)}><summary>{link}, lines {lines[0]} to {lines[-1]}"
            f"</summary>{file.code(code, anchors=False)}</details>")


def index_html(root: pathlib.Path, files: dict[str, Source]) -> str:
    """The figure, the contents, the eight steps, who sees whom, and the rows of the map, each with its statement.

    InputError: the map and paper.md have other rows.
    """
    intro, *parts = re.split(r"^## ", (root / HERE / "paper.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    said = dict(one.split("\n", 1) for one in parts)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in part(root, MAP).splitlines()[2:]]
    if odd := {row[0] for row in rows} ^ set(said):
        raise InputError(f"README's map and {HERE}paper.md must have the same rows; only one has: {sorted(odd)}.")
    contents, body, find = "", "", files["layout.py"].find
    for k, (first, code, test) in enumerate(rows, 1):
        title = prose(first, block=False)
        right = "".join(lines_html(files.get(file), file, name) for file, name in NAME.findall(code + test))
        contents += f'<li><a href="#row-{k}">{title}</a>'
        body += (f'<section class="row" id="row-{k}"><h2>{title}</h2><div><div>{prose(said[first])}</div>'
                 f"<div>{right}</div></div></section>\n")
    return f"""{prose(intro)}<figure>{part(root, FIGURE)}</figure><ol class="contents">{contents}</ol>
<h2 id="steps">Stage 2 in eight steps</h2>{linked(prose(part(root, STEPS)), find)}
<h2 id="who-sees-whom">Who sees whom</h2>
<p>From {linked("layout.py", find)}:</p><pre>{html.escape(part(root, DRAWING))}</pre>
{body}"""


def build(root: pathlib.Path) -> dict[str, str]:
    """{file name: HTML} of the site of a tree. InputError where README, paper.md and the sources do not fit."""
    if MarkdownIt is None:
        raise InputError("lab.page needs latex2mathml, markdown-it-py, Pygments: pip install -r requirements-page.txt.")
    frame = string.Template((root / HERE / "page.html").read_text(encoding="utf-8"))
    files, pages = sources(root), {}
    bodies = {"the paper": ("index.html", index_html(root, files))}
    bodies |= {path: (one.page, f"<h1>{path}</h1>{one.columns()}") for path, one in files.items()}
    for title, (name, body) in bodies.items():
        links = [f"<b>{path}</b>" if path == title else f'<a href="{at}">{path}</a>' for path, (at, _) in bodies.items()
                 if path == title or not path.startswith("tests/")]
        pages[name] = frame.substitute(title=title, links=" ".join(links), body=body)
    return pages


def main(argv=None) -> None:
    """Writes the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="build", help="the folder to write")
    out, pages = pathlib.Path(parser.parse_args(argv).out), build(ROOT)
    writable([str(out)])
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")
    print(f"wrote {out / 'index.html'} and the pages of {len(pages) - 1} files")


if __name__ == "__main__":
    cli(main)
