"""One HTML page with the clips: frames, CoTs, rewards and labels of each pair. It needs no network.

    python -m lab.serve.page --run runs/eval/stage2/in-domain --out page.html

--run: what evaluate.py wrote for one set of pairs, its --out (OUT/NAME of several benchmarks, OUT/text of text scores).
"""

import base64
import dataclasses
import hashlib
import html
import io
import json
import os
import re

import numpy as np

import data
import evaluate
from lab.study.compare import read_scores
from plumbing.jobs import read_log
from plumbing.report import Agreement, shown
from plumbing.settings import InputError, arg, cli, parse, require, writable


@dataclasses.dataclass
class Settings:
    """The flags."""

    run: str = arg(None, "folder that evaluate.py wrote")
    out: str = arg("page.html", "page to write")
    pairs: int = arg(200, "pairs on the page at most, spread evenly over the data", at_least=1)


STYLE = """
body {font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1em; background: #f4f4f2}
nav {position: sticky; top: 0; background: #f4f4f2; padding: .6em 0}
button {font: inherit; padding: .25em .8em; margin-right: .4em}
button[aria-pressed=true] {background: #222; color: #fff}
article {background: #fff; border-radius: 8px; padding: .8em 1em; margin: 1em 0} article[hidden] {display: none}
.pair {display: grid; grid-template-columns: 1fr 1fr; gap: 1em} .pair > div {min-width: 0}
.frames {display: flex; gap: 3px; flex-wrap: wrap} .frames img {height: 80px}
.prompt, pre {white-space: pre-wrap; overflow-wrap: anywhere; overflow: auto; max-height: 22em}
.prompt {max-height: 6em; font-weight: 600; margin: .4em 0} pre {background: #f8f8f6; padding: .6em; font-size: 13px}
mark {background: #ffe9a8} .ok {color: #17692b} .no {color: #b3261e}"""
SCRIPT = """
function show(kind) {
  let count = 0;
  for (const a of document.querySelectorAll("article")) {
    a.hidden = kind && !a.classList.contains(kind);
    count += !a.hidden;
  }
  document.getElementById("count").textContent = count + " pairs shown";
  for (const b of document.querySelectorAll("button")) b.setAttribute("aria-pressed", b.dataset.kind === kind);
}
for (const b of document.querySelectorAll("button")) b.onclick = () => location.hash = b.dataset.kind;
onhashchange = () => show(location.hash.slice(1));
onhashchange();"""


def frames_html(path: str, sample_frames, count: int = 6) -> str:
    """A clip's sampled frames as <img> with the JPEG inside; a sentence instead if it cannot be read."""
    from PIL import Image

    try:
        frames = sample_frames(path, 2.0, 192 * 192).frames  # (F, H, W, 3)
    except InputError as error:
        return f"<p>{html.escape(str(error))}</p>"
    images = []
    for k in np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int)):
        buffer = io.BytesIO()
        Image.fromarray(frames[k]).save(buffer, "JPEG", quality=80)
        images.append(f'<img alt="frame" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">')
    return f'<div class="frames">{"".join(images)}</div>'


def thought_html(text: str | None) -> str:
    """A CoT, escaped, with the lines that hold a verdict or the answer marked."""
    if not text:
        return "<p>(no CoT)</p>"
    lines = [html.escape(line) for line in text.splitlines()]
    marked = [f"<mark>{x}</mark>" if re.search("verdict|dimensional_scores", x, re.I) else x for x in lines]
    return "<pre>" + "\n".join(marked) + "</pre>"


def write_page(
    path: str, one: Agreement, pairs: list, rewards: np.ndarray, thoughts: dict, sample_frames, limit: int = 200
) -> None:
    """Writes the page: per pair frames, prompt, both CoTs, rewards, human label, right or wrong; buttons filter.

    rewards (n, 2); thoughts {(video, prompt): record}. Of more than `limit` pairs, evenly spaced ones are shown. The
    page's policy forbids the network, and all scripts but ours, whose hash it names: a second wall behind the escaping.
    """
    words = {1: "A is better", -1: "B is better", 0: "the same"}
    large = np.quantile(np.abs(one.margins), 0.9)
    articles, seal = [], base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    for i in np.unique(np.linspace(0, len(pairs) - 1, min(limit, len(pairs))).round().astype(int)):
        pair, margin = pairs[i], one.margins[i]
        is_right = one.hits["with_ties"][i]
        said = 0 if abs(margin) <= one.numbers["threshold"] else np.sign(margin)
        kinds = ["wrong"] * (not is_right) + ["tie"] * (pair.label == 0) + ["large"] * bool(abs(margin) >= large)
        sides = []
        for name, video, reward in zip("AB", pair.videos, rewards[i]):
            texts = thoughts.get((video, pair.prompt), {"thoughts": [None]})["thoughts"]
            head = f"<b>{name}: reward {reward:+.3f}</b> <small>{html.escape(os.path.basename(video))}</small>"
            sides.append(f"<div>{head}{frames_html(video, sample_frames)}{''.join(map(thought_html, texts))}</div>")
        prompt, size = pair.prompt, len(pair.prompt)
        prompt = prompt if size <= 4000 else f"{prompt[:4000]}... ({size:,} characters)"
        articles.append(
            f'<article class="{" ".join(kinds)}">line {pair.line}: people say <b>{words[pair.label]}</b>, the model '
            f'says <b class="{"ok" if is_right else "no"}">{words[int(said)]}</b> (margin {margin:+.3f})'
            f'<div class="prompt">{html.escape(prompt)}</div><div class="pair">{"".join(sides)}</div></article>'
        )
    buttons = "".join(f'<button data-kind="{kind}">{text}</button>' for kind, text in (
        ("", "all"), ("wrong", "wrong"), ("tie", "human ties"), ("large", "large margins (top 10 %)")))
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{seal}'"
    n = one.numbers
    title = html.escape(f"{n['name']} on {n['data']}")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title>',
        f"<style>{STYLE}</style></head>",
        f"<body><h1>{title}</h1><p>{len(articles)} of {len(pairs)} pairs. Accuracy without ties ",
        f"{shown(n['accuracy_without_ties'])}, with ties {shown(n['accuracy_with_ties'])}.",
        f'</p><nav>{buttons}<span id="count"></span></nav>{"".join(articles)}<script>{SCRIPT}</script></body></html>',
    ]
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(parts))


def page_of(run: str, path: str, limit: int) -> None:
    """The page of an evaluation, from its settings.json, scores.csv and thoughts.jsonl; its CSV is read again.

    InputError: no settings.json.
    """
    home = os.path.dirname(os.path.normpath(run)) if os.path.basename(os.path.normpath(run)) == "text" else run
    try:
        with open(os.path.join(home, "settings.json"), encoding="utf-8") as file:
            s = evaluate.Settings(**json.load(file)["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--run {run}: has no settings.json of evaluate.py; give a folder that it wrote.") from error
    test = evaluate.read_test_set(s, s.benchmark and s.benchmark[0])
    rewards = read_scores(os.path.join(run, "scores.csv"), test.path, test.pairs, test.root)  # (n, 2)
    complete = evaluate.complete_pairs(test, [rewards], s.skip_bad_videos)
    kept = [pair for pair, keep in zip(test.pairs, complete) if keep]
    one = evaluate.measure_set(test, os.path.basename(os.path.normpath(s.model)), rewards, complete)
    write_page(path, one, kept, rewards[complete], read_log(home, "thoughts"), data.sample_frames, limit)


def main(argv=None) -> None:
    """Writes the page of one evaluation."""
    s = parse(Settings, __doc__, argv)
    require(s, run="a folder that evaluate.py wrote")
    writable([os.path.dirname(s.out) or "."])
    page_of(s.run, s.out, s.pairs)
    print(f"wrote {s.out}")


if __name__ == "__main__":
    cli(main)
