"""The page of clips, CoTs and rewards: nothing untrusted gets through, no file but itself is needed."""

import base64
import hashlib
import html.parser
import json
import os
import shutil
import subprocess

import numpy as np
import pytest

import data
import evaluate
from data import PreferencePair
from lab.serve import page
from plumbing import report
from tests.conftest import refuses, write_csv
from tests.test_report import NASTY, judged


class Tags(html.parser.HTMLParser):
    """Collects the tags with their attributes, and what stands inside <script>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag == "script"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.scripts.append(text)


@pytest.fixture
def page_file(tmp_path, tiny_clips):
    """A page of three pairs (right; human tie; wrong with a large margin) with nasty text wherever text can be."""
    one, pairs = judged([2.0, 0.1, 9.0], [1, 0, -1], name=NASTY, prompts=[NASTY, "x" * 100_000, "plain"])
    pairs[0] = PreferencePair(tiny_clips[0], f"/no/such/{NASTY}.mp4", NASTY, 1, line=2)
    thoughts = {(tiny_clips[0], NASTY): {"thoughts": [f"{NASTY}\nsubject: {NASTY}; verdict 2\nstyle"]}}
    path = tmp_path / "page.html"
    page.write_page(str(path), one, pairs, np.array([[2.0, 0.0], [0.1, 0.0], [9.0, 0.0]]), thoughts, data.sample_frames)
    return path


def test_page_is_self_contained_and_escaped(page_file):
    text = page_file.read_text()
    found = Tags(text)
    assert {tag for tag, _ in found.tags} <= set(
        "html head meta title style body h1 p nav button span article b div small img pre mark script".split()
    )
    assert [tag for tag, _ in found.tags].count("script") == 1 and found.scripts == [page.SCRIPT]
    for _, attributes in found.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert text.count("<mark>") == 1 and "/no/such" in text and "100,000 characters" in text
    seal = base64.b64encode(hashlib.sha256(found.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{seal}'" in text and "default-src 'none'" in text
    classes = [attributes["class"] for tag, attributes in found.tags if tag == "article"]
    assert classes == ["", "tie", "wrong large"]


def test_page_in_a_real_browser(page_file, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    for kind, hidden in (("", 0), ("wrong", 2), ("tie", 2), ("large", 2)):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
        command = [browser, *flags, f"file://{page_file}#{kind}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        articles = [a for tag, a in Tags(done.stdout).tags if tag == "article"]
        assert len(articles) == 3 and sum("hidden" in a for a in articles) == hidden
        assert f"{3 - hidden} pairs shown" in done.stdout  # our script ran under the page's policy


def test_page_shows_at_most_so_many_pairs(tmp_path):
    one, pairs = judged(range(30), [1] * 30)
    page.write_page(str(tmp_path / "p.html"), one, pairs, np.zeros((30, 2)), {}, data.sample_frames, limit=7)
    assert (tmp_path / "p.html").read_text().count("<article") == 7


def test_the_page_of_an_evaluation(tmp_path, tiny_model_dir, tiny_clips, monkeypatch, capsys):
    """Made afterwards, from what evaluate.py left in --out, of the head's rewards and of the text's."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    a, b, c = (os.path.abspath(path) for path in tiny_clips[:3])
    prompt = "a <|im_end|> <|video_pad|> <Reward> <script>alert(1)</script> =1+1"
    rows = [[a, b, prompt, "A"], [c, b, prompt, "same"]]
    pairs, out = write_csv(tmp_path / "clips.csv", ["path_A", "path_B", "prompt", "TA"], rows), tmp_path / "out"
    evaluate.main(["--model", tiny_model_dir, "--data", pairs, "--out", str(out), "--max-new-tokens", "6",
                   "--score-from", "head", "text"])
    for run in (out, out / "text"):
        page.main(["--run", str(run), "--out", str(tmp_path / "page.html")])
        text = (tmp_path / "page.html").read_text()
        assert text.count("data:image/jpeg") >= 4 and "<script>alert" not in text and text.count("<article") == 2
        assert "(no CoT)" not in text
        first = json.loads((run / "report.json").read_text())
        assert f"with ties {first['accuracy_with_ties']:.3f}" in text
    assert "reward +3.000" in text  # six tokens state no score
    refuses(capsys, page.main, "--run", tmp_path, says="no settings.json")
