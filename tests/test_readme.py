"""README stays true: every name, path, flag and command in it exists; the metric glossary is complete."""

import dataclasses
import importlib
import re
import shlex
import types

import pytest

from lab import best_of, bench, plan
from plumbing import logs
import cold_start
import evaluate
import grpo
import rollout
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {
    "cold_start.py": cold_start,
    "grpo.py": grpo,
    "evaluate.py": evaluate,
    "rollout.py": rollout,
    "lab/bench.py": bench,
    "lab/best_of.py": best_of,
    "lab/plan.py": types.SimpleNamespace(Settings=plan.Plan),
}


def flags_of(settings):
    names = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(settings)}
    return names | {name.replace("--", "--no-", 1) for name in names} | {"--help"}


@pytest.mark.parametrize("file, name", sorted(set(re.findall(r"`([a-z_/]+\.py)::([\w.]+)`", TEXT))))
def test_every_name_in_the_map_exists(file, name):
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        module = getattr(module, part)
    assert callable(module)


@pytest.mark.parametrize("file, words", re.findall(r'`(tests/\w+\.py) -k "?([\w ]+)"?`', TEXT))
def test_every_exercise_has_tests(file, words):
    tests = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert all(any(word in name for name in tests) for word in words.split(" or "))


def test_every_file_exists():
    for path in re.findall(r"\]\((?!http)([\w./-]+)\)", TEXT) + re.findall(r"`((?:\w+/)?[a-z_]+\.py)`", TEXT):
        assert (ROOT / path).exists(), path


def commands():
    joined = TEXT.replace("\\\n", " ")
    for line in re.findall(r"^(?:python|torchrun) .*$", joined, flags=re.MULTILINE) + re.findall(
        r"`((?:python|torchrun) [^`]+)`", joined
    ):
        words = shlex.split(line.split("  #")[0], comments=True)
        words = [f"{w.replace('.', '/')}.py" if w.startswith("lab.") else w for w in words if w != "-m"]
        script = next((word for word in words if word.endswith(".py")), None)
        if script:
            yield script, words[words.index(script) + 1 :]


def test_every_command_has_a_script_and_known_flags():
    found = list(commands())
    assert len(found) >= 8
    for script, words in found:
        assert (ROOT / script).exists(), script
        if script in SCRIPTS:
            SCRIPTS[script].Settings  # noqa: B018
            known = flags_of(SCRIPTS[script].Settings)
            assert not {w for w in words if w.startswith("--")} - known, (script, words)
        else:
            source = (ROOT / script).read_text(encoding="utf-8")
            assert all(f'"{w}"' in source for w in words if w.startswith("--")), (script, words)


def test_every_flag_that_is_named_exists():
    known = set().union(*(flags_of(m.Settings) for m in SCRIPTS.values())) | {
        "--show",
        "--index-url",
        "--dir",
        "--make-pairs",
        "--runs",
        "--local-dir",
        "--repo-type",
    }
    known |= {
        "--nproc_per_node",
        "--nnodes",
        "--rdzv_backend",
        "--rdzv_endpoint",
        "--local-dir",
        "--repo-type",
        "--quick",
        "--only",
        "--plan",
    }
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)) - known


def test_every_logged_metric_is_in_the_glossary(world, tiny_model_dir, tmp_path):
    grpo.main(["--model", tiny_model_dir, "--data", world["train_rl"], "--out", str(tmp_path), "--rollouts", "2", "--batch-pairs", "1",
               "--mini-pairs", "1", "--max-new-tokens", "4", "--workers", "0", "--max-steps", "1"])  # fmt: skip
    glossary = TEXT[TEXT.index("## What the metrics mean") : TEXT.index("## Data formats")]
    for name in logs.read_metrics(str(tmp_path))[0]:
        short = re.sub(r"^grad_norm(_\w+)$", r"\1", name)
        assert f"`{name}`" in glossary or f"`{short}`" in glossary or name in ("step", "seconds", "reward_std"), name


def test_make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make (\w+)", TEXT):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for script, words in [
        (m, re.findall(r"--[a-z][\w-]*", line))
        for line in makefile.splitlines()
        for m in re.findall(r"(\w+\.py)", line)
    ]:
        if script in SCRIPTS:
            assert not set(words) - flags_of(SCRIPTS[script].Settings), (script, words)


def test_sources_name_no_file_that_is_not_here():
    for path in ROOT.glob("*.py"):
        for name in re.findall(r"\b([A-Z]{4,}\.md)\b", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), (path.name, name)
