"""README, docs/ and scripts/ stay true: every name, path, link, flag, command, make target and metric exists.

Without lab/ all of this runs, too; what a page says of the shelf is then not looked at.
"""

import dataclasses
import importlib
import re
import shlex
import subprocess

import pytest

import cold_start
import grpo
from plumbing import formats, logs
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "lab").glob("*/*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
TEXT = "\n".join(TEXTS.values())
SHELF = (ROOT / "lab").exists()
SCRIPTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "scripts").glob("*.sh")))


def gone(path: str) -> bool:
    """A place on the shelf, where the shelf has been taken away."""
    return not SHELF and bool(re.search(r"(?:^|/)lab[/.]", path))


FOREIGN_FLAGS = {  # of torchrun, pip, hf, vllm and docker
    "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--shutdown_timeout", "--index-url",
    "--local-dir", "--repo-type", "--shm-size", "--tensor-parallel-size", "--media-io-kwargs",
}


def test_readme_is_short():
    size = len(TEXTS["README.md"].encode())
    assert size <= 12 * 1024, f"{size} bytes: move a subject to docs/"


def named(text):
    found = sorted(set(re.findall(r"`([a-z_/]+\.py)::([\w.]+)", text)))
    return [(file, name) for file, name in found if not gone(file)]


@pytest.mark.parametrize("file, name", named(TEXT))
def test_every_name_exists(file, name):
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        module = getattr(module, part)


@pytest.mark.parametrize("file, words", re.findall(r'`(tests/\w+\.py) -k "?([\w ]+)"?`', TEXT))
def test_every_exercise_has_tests(file, words):
    tests = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert all(any(word in name for name in tests) for word in words.split(" or "))


def anchor(heading: str) -> str:
    """A heading -> its anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_and_path_leads_somewhere(name):
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXTS[name]):
        if gone(target):
            continue
        path, _, place = target.partition("#")
        page = folder / path if path else ROOT / name
        assert page.exists(), target
        headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE) if place else []
        assert not place or place in map(anchor, headings), target
    for path in re.findall(r"`((?:[\w.]+/)*[\w.-]+\.(?:py|toml|cff|diff|yml|txt))`|`(scripts/\w+\.sh)`", TEXTS[name]):
        path = "".join(path)
        assert (ROOT / path).exists() or (folder / path).exists() or gone(path), path


@pytest.mark.parametrize("name", TEXTS)
def test_every_page_renders(name):
    """A row with a cell too few shifts a table, a marker without its end hides the rest of what is measured."""
    begins, ends = (len(re.findall(f"^<!-- {word}", TEXTS[name], flags=re.MULTILINE)) for word in ("FROM", "END"))
    assert begins == ends, "<!-- FROM ... --> and <!-- END --> come in pairs"
    for table in re.findall(r"(?:^\|.*\n)+", TEXTS[name], flags=re.MULTILINE):
        cells = {len(re.sub(r"`[^`]*`", "", row).strip().strip("|").split("|")) for row in table.strip().split("\n")}
        assert len(cells) == 1, table
    assert TEXTS[name].count("```") % 2 == 0


def test_every_page_of_docs_is_linked_from_readme():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in TEXTS["README.md"], page.name


def file_of(module: str) -> str:
    """What `python -m module` runs."""
    path = module.replace(".", "/")
    return f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"


def commands():
    """(script, its flags) of every command line, in a block of its own or between backticks."""
    joined = f"{TEXT}\n{SCRIPTS}".replace("\\\n", " ")
    lines = re.findall(r"^[ (]*((?:python|torchrun) .*)$", joined, flags=re.MULTILINE)
    lines += re.findall(r"`((?:python|torchrun) [^`]+)`", joined) + re.findall(r"FROM \w+: (python .*?) ;", joined)
    for line in lines:
        words = [w for w in shlex.split(line.split("  #")[0], comments=True) if w != "-m"]
        words = [file_of(word) if re.fullmatch(r"(lab|toy)(\.\w+)*", word) else word for word in words]
        script = next((word for word in words if word.endswith(".py")), None)
        if script and words[1] != "pytest" and not gone(script):
            yield script, [word for word in words[words.index(script) + 1 :] if word.startswith("--")]


def flags_of(script: str) -> set[str]:
    """All flags that a script knows: those of its dataclass, or those that stand in its source."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    settings = getattr(module, "Settings", getattr(module, "Plan", None))
    if settings is None:
        return set(re.findall(r'"(--[a-z][\w-]*)"', (ROOT / script).read_text(encoding="utf-8"))) | {"--help"}
    names = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(settings)}
    return names | {name.replace("--", "--no-", 1) for name in names} | {"--help"}


def test_every_command_has_a_script_and_known_flags():
    found = list(commands())
    assert len(found) >= 15 and {"cold_start.py", "grpo.py", "evaluate.py"} <= {script for script, _ in found}
    for script, flags in found:
        assert (ROOT / script).exists(), script
        assert not set(flags) - flags_of(script), (script, flags)


@pytest.mark.skipif(not SHELF, reason="pages name flags of the shelf")
def test_every_flag_that_is_named_exists():
    scripts = [path for pattern in ("*.py", "toy/*.py", "lab/*/*.py") for path in ROOT.glob(pattern)]
    scripts = [str(path.relative_to(ROOT)) for path in scripts if "def main" in path.read_text(encoding="utf-8")]
    known = FOREIGN_FLAGS.union(*map(flags_of, scripts))
    text = re.sub(r"<!--|-->", "", TEXT)
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known
    assert not unknown, unknown


def test_every_row_of_a_csv_that_a_page_shows_can_be_read(tmp_path):
    """README's row, which people copy first, and what docs/data.md calls columns."""
    block = next(b for b in re.findall(r"```text\n(videos,.*?)```", TEXTS["README.md"], flags=re.DOTALL))
    (tmp_path / "pairs.csv").write_text(block)
    (found,) = formats.read_records(str(tmp_path / "pairs.csv"), "TA", "")
    assert found["label"] == 1 and found["prompt"] == "A red circle rises."
    heads = re.findall(r"^\S.*?  +((?:\w+,){2,}[\w,]+)(?:\[([,\w]+)\])?", TEXTS["docs/data.md"], flags=re.MULTILINE)
    assert len(heads) >= 5
    for head, more in heads:
        for columns in {head, head + more}:
            formats._format_of("page.csv", columns.split(","), "TA")  # InputError: fits none


def test_every_metric_is_in_the_glossary_and_every_name_there_is_a_metric(world, base_dir, tiny_model_dir, tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    cold_start.main(["--model", base_dir, "--data", world["train_cold_start"], "--val", world["val_cold_start"],
                     "--out", str(one), "--batch-pairs", "2", "--max-steps", "1", "--mask-probability", "1",
                     "--lora-r", "4", "--workers", "0"])
    grpo.main(["--model", tiny_model_dir, "--data", world["train_rl"], "--out", str(two), "--rollouts", "2",
               "--batch-pairs", "1", "--mini-pairs", "1", "--max-new-tokens", "4", "--workers", "0",
               "--max-steps", "1"])
    logged = set(logs.read_metrics(str(one))[0]) | set(logs.read_metrics(str(two))[0])
    rows = re.findall(r"^\| (`.*?) \|", TEXTS["docs/metrics.md"], flags=re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert logged - told == {"step", "seconds"}
    assert told - logged == {"engine_gap"}  # only vLLM tells the log-probs it sampled with


def test_make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([\w-]+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("script", ["demo.sh", "8b.sh"])
def test_every_command_of_a_script_is_read(script):
    """So that its flags are checked: each line with python or torchrun begins with it."""
    text = (ROOT / "scripts" / script).read_text(encoding="utf-8")
    lines = [line.strip(" (") for line in text.splitlines() if re.search(r"^[^#]*\b(?:python|torchrun) ", line)]
    assert len(lines) >= 5 and all(line.startswith(("python ", "torchrun ")) for line in lines)
    assert subprocess.run(["bash", "-n", ROOT / "scripts" / script]).returncode == 0


def test_sources_point_to_places_that_exist():
    headings = set(re.findall(r"^#+ (.*)$", TEXT, flags=re.MULTILINE)) | set(re.findall(r"\[([^]]+)\]\(", TEXT))
    headings |= set(re.findall(r"^\*\*(.*?)\*\*", TEXT, flags=re.MULTILINE))
    numbers = set(re.findall(r"^\| (\d+)(?: \*)? \|", TEXTS["docs/differences.md"], flags=re.MULTILINE))
    places = ("*.py", "plumbing/*.py", "toy/*.py", "lab/*/*.py", "Makefile")
    sources = [path for pattern in places for path in ROOT.glob(pattern)]
    for path in [path for path in sources if not path.name.startswith("test_")]:
        text = path.read_text(encoding="utf-8")
        for _, place in re.findall(r"README,\s+([\"'])(.*?)\1", re.sub(r"\n\s*#? *", " ", text)):
            assert place in headings, (path.name, place)
        for number in re.findall(r"(?:\bdifference|differences\.md, row) (\d+)\b", text):
            assert number in numbers, (path.name, number)
        for name in re.findall(r"\b(?:docs|lab/\w+)/\w+\.md\b", text):
            assert (ROOT / name).exists() or gone(name), (path.name, name)
        for name in re.findall(r"\b([A-Z]{4,}\.md)\b", text):
            assert (ROOT / name).exists(), (path.name, name)
