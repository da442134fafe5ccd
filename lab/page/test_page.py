"""The page: built, opened in a real browser, every link followed; and what a student's copy shows of it."""

import html
import html.parser
import pathlib
import re
import shutil
import subprocess
import time

import pytest

pytest.importorskip("latex2mathml", reason="pip install -r requirements-page.txt")

from lab.course import copies
from lab.page.__main__ import MAP, build, main, part
from plumbing.settings import InputError
from tests.conftest import ROOT

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Links(html.parser.HTMLParser):
    """.ids, .hrefs of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.hrefs = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.hrefs += [value for name, value in attrs if name in ("href", "src")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("build")
    begin = time.process_time()
    main(["--out", str(out)])
    assert time.process_time() - begin < 10, "built in under 10 s on one core"
    return out


def browse(page, *flags):
    """A page in the browser, without a network -> (the DOM after loading, what the browser logged)."""
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
                           "--host-resolver-rules=MAP * ~NOTFOUND", *flags, page.as_uri()],
                          capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


def test_no_link_is_dead(site):
    pages = {path.name: Links(path.read_text(encoding="utf-8")) for path in site.glob("*.html")}
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), name
        for href in page.hrefs:
            file, _, anchor = href.partition("#")
            if href != "data:," and not href.startswith("https://arxiv.org/"):
                assert file == "" or file in pages, f"{name}: {href}"
                assert not anchor or anchor in pages[file or name].ids, f"{name}: {href}"
    assert len(pages["model.html"].hrefs) > 100 and "losses.html#bt_loss" in pages["grpo.html"].hrefs


def test_every_page_is_small_and_needs_nothing_from_elsewhere(site):
    for path in site.iterdir():
        text = path.read_text(encoding="utf-8")
        assert len(text.encode()) < 300_000, path.name
        assert not re.search(r"<script|\bsrc=|@import|url\((?!#)", text), path.name


def test_every_row_of_the_map_with_equation_lines_and_worked_case(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    rows = re.findall(r'<section class="row".*?</section>', text, flags=re.DOTALL)
    known = part(ROOT, MAP).splitlines()[2:]
    assert len(rows) == len(known) > 10
    for shown, row in zip(rows, known, strict=True):
        named = re.findall(r"`([\w/]+\.py)(?:::([\w.]+))?`", row)
        assert any(name for _, name in named)
        for file, name in named:
            assert f"{file}::{name}</code></a>, lines " in shown if name else f"<code>{file}</code></a>" in shown
    bt = html.unescape(next(row for row in rows if "Eq. 3, Bradley-Terry" in row))
    worked = re.search(r'<div class="worked">.*?</div>', bt, flags=re.DOTALL)[0]  # the test's comments
    assert "<math" in bt and "-ln sigma(2) = ln(1 + e^-2) = ln 1.135335 = 0.126928" in worked
    assert text.count("<math") > 20 and "b does not see a" in text and "<svg" in text


def test_code_and_prose_of_a_file_are_all_there(site):
    """Each line of losses.py stands on its page once: in the code by its number, or in the prose."""
    text = (site / "losses.html").read_text(encoding="utf-8")
    code = dict(re.findall(r'data-n="(\d+)"[^>]*></a>(.*)', text))
    lines = (ROOT / "losses.py").read_text(encoding="utf-8").splitlines()
    plain = {int(n): html.unescape(re.sub(r"<[^>]+>", "", line)) for n, line in code.items()}
    assert all(lines[n - 1] == line.removesuffix("</pre></div>") for n, line in plain.items())
    left = [line for n, line in enumerate(lines, 1) if n not in plain and line.strip()]
    words = re.sub(r"\W+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))
    for line in left:
        assert all(word in words for word in re.findall(r"\w+", line)), line


@pytest.mark.skipif(not BROWSER, reason="no chromium or chrome here")
def test_a_browser_opens_it_without_an_error(site, tmp_path):
    names = sorted(page.name for page in site.glob("*.html"))
    script = "<script>console.log('WIDTH', document.documentElement.scrollWidth, innerWidth)</script>"
    for name in names:  # a copy of the page measures itself, as wide as a phone
        (tmp_path / name).write_text((site / name).read_text(encoding="utf-8") + script, encoding="utf-8")
    frames = "".join(f'<iframe src="{at / name}" width="390"></iframe>' for name in names for at in (site, tmp_path))
    (tmp_path / "frames.html").write_text("<!doctype html>" + frames, encoding="utf-8")
    _, log = browse(tmp_path / "frames.html", "--dump-dom", "--allow-file-access-from-files")
    said = [line for line in log.splitlines() if "CONSOLE" in line]
    widths = [tuple(map(int, found)) for line in said for found in re.findall(r"WIDTH (\d+) (\d+)", line)]
    assert len(widths) == len(said) == len(names), said  # nothing else was said, so no error
    assert all(wide <= window <= 390 for wide, window in widths), widths
    dom, _ = browse(site / "index.html", "--dump-dom")
    assert dom.count("<math") > 20
    browse(site / "index.html", "--window-size=1280,2000", f"--screenshot={tmp_path / 'page.png'}")
    assert (tmp_path / "page.png").stat().st_size > 50_000
    browse(site / "index.html", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def plain_text(pages):
    return {name: html.unescape(re.sub(r"<[^>]+>", "", text)) for name, text in pages.items()}


def test_a_student_s_page_shows_no_body(tmp_path):
    """Made in the copy, from what is there. The page of the reference shows bodies: the search would find them."""
    copies.write(copies.student_files(0), tmp_path)
    assert not copies.leaks(plain_text(build(tmp_path)))
    assert len(copies.leaks(plain_text(build(ROOT)))) > 50


def test_a_row_without_a_statement_is_named(tmp_path):
    for name in ("README.md", "lab/page/paper.md", "lab/page/page.html", "figures/method.svg",
                 *(p.name for p in ROOT.glob("*.py")), "plumbing/logs.py", "tests/test_model.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    readme = pathlib.Path(tmp_path / "README.md")
    readme.write_text(readme.read_text(encoding="utf-8").replace("| Eq. 3, Bradley-Terry |", "| Eq. 3, new words |"))
    with pytest.raises(InputError, match="Eq. 3, new words"):
        build(tmp_path)
