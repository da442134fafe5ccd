"""Flags: every number has bounds, and what lies outside is refused in one sentence before anything is opened."""

import dataclasses
import importlib.util
import os
import typing

import pytest

import cold_start
import collect_cots
import evaluate
import grpo
import toy.__main__
import toy.look
from plumbing import settings
from tests.conftest import ROOT, refuses, run

CLASSES = [cold_start.Settings, grpo.Settings, collect_cots.Settings, evaluate.Settings]


@pytest.mark.parametrize("settings_class", CLASSES, ids=lambda c: c.__module__)
def test_every_number_has_bounds_that_its_default_keeps(settings_class):
    for field in dataclasses.fields(settings_class):
        kind = typing.get_type_hints(settings_class)[field.name]
        kinds = {kind, *typing.get_args(kind)}
        if kinds & {int, float} and not field.metadata["choices"]:
            assert field.metadata["bounds"], (settings_class, field.name)
            settings.check_range(field, field.default)


@pytest.mark.parametrize("script, flags, says", [
    (cold_start, ["--fps", "nan"], "--fps nan: must be above 0"),
    (cold_start, ["--fps", "inf"], "--fps inf: must be above 0"),
    (cold_start, ["--batch-pairs", "0"], "--batch-pairs 0: must be at least 1"),
    (cold_start, ["--lr", "-1"], "--lr -1.0: must be at least 0"),
    (cold_start, ["--mask-probability", "1.5"], "--mask-probability 1.5: must be at least 0 and at most 1"),
    (cold_start, ["--lora-r", "0"], "--lora-r 0: must be at least 1"),
    (cold_start, ["--seed", str(2**64)], f"--seed {2**64}: must be at least 0 and at most {2**63}"),
    (evaluate, ["--seed", str(2**64)], f"--seed {2**64}: must be at least 0 and at most {2**63}"),
    (grpo, ["--rollouts", "0"], "--rollouts 0: must be at least 2"),
    (grpo, ["--temperature", "-1"], "--temperature -1.0: must be above 0"),
    (grpo, ["--clip-dual", "1"], "--clip-dual 1.0: must be above 1"),
    (grpo, ["--data", "x", "--model", "y", "--length-low", "50", "--length-high", "50"],
     "--length-low 50 must be below"),
    (collect_cots, ["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    (evaluate, ["--thoughts", "0"], "--thoughts 0: must be at least 1"),
])
def test_a_number_out_of_range_is_one_sentence(script, flags, says, capsys):
    refuses(capsys, script.main, *flags, says=says)


@pytest.mark.parametrize("version", [pytest.param("4.46.3", marks=pytest.mark.slow), "5.17.0"])
def test_an_old_transformers_is_one_sentence_in_every_script(tmp_path, version):
    """Told by what is installed, before it is imported: the oldest have no Qwen3-VL and would end in a traceback."""
    installed = tmp_path / f"transformers-{version}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
    for script in ("grpo.py", "toy"):
        done = run(script, env={"PYTHONPATH": str(tmp_path)}, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: transformers {version}: ")
        assert done.stderr.endswith("is needed: pip install -r requirements.txt\n")
    (tmp_path / "theirs.py").write_text("import model")
    done = run(tmp_path / "theirs.py", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, check=False)
    assert done.returncode == 1 and f"ImportError: transformers {version}: " in done.stderr


@pytest.mark.parametrize("script, flags", [
    (collect_cots, ["--engine", "vllm"]), (grpo, ["--engine", "vllm"]), (evaluate, ["--engine", "vllm"]),
    (cold_start, ["--reader", "decord"])])
def test_a_package_that_is_not_there_is_told_at_once(script, flags, capsys, monkeypatch):
    """Before --data is looked at, which is not there either, or a model of minutes is opened."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == flags[1] else find(name))
    told = refuses(capsys, script.main, "--data", "none.csv", "--model", "x", *flags, says=f"{' '.join(flags)}: ")
    assert "is not installed; pip install -r requirements" in told


@pytest.mark.parametrize("command", ["cold_start", "grpo", "toy data", "toy base", "toy.look"])
def test_an_out_that_is_a_file_is_told_before_any_work(command, world, tiny_model_dir, tmp_path, capsys):
    """Or minutes of training would be lost with it."""
    file, pairs = tmp_path / "file", ["--data", world["train_rl"]]
    file.write_text("mine")
    script, flags = {
        "cold_start": (cold_start, ["--model", tiny_model_dir, *pairs, "--mask-probability", "1", "--out", file]),
        "grpo": (grpo, ["--model", tiny_model_dir, *pairs, "--out", file / "deeper"]),
        "toy data": (toy.__main__, ["data", "--out", file]), "toy base": (toy.__main__, ["base", "--out", file]),
        "toy.look": (toy.look, ["--model", tiny_model_dir, *pairs, "--out", file / "frames.png"]),
    }[command]
    refuses(capsys, script.main, *flags, says=f"{file}")
    assert file.read_text() == "mine"


def test_settings_and_flags():
    @dataclasses.dataclass
    class Some:
        """Settings."""

        rate: float = settings.arg(0.5, "a rate of 5 %")
        name: str | None = settings.arg(None, "a name")
        deep: bool = settings.arg(True, "deep")
        files: list[str] = settings.arg(None, "files")

    parse = lambda *argv: settings.parse(Some, "doc", argv)
    assert parse() == Some(0.5, None, True, None)
    assert parse("--rate", "2", "--name", "x", "--no-deep", "--files", "a", "b") == Some(2.0, "x", False, ["a", "b"])
    with pytest.raises(SystemExit) as error:
        parse("--rat", "x")
    assert error.value.code == 2


SCRIPTS = [path for pattern in ("*.py", "toy/*.py", "lab/*/*.py") for path in sorted(ROOT.glob(pattern))
           if "\ndef main(argv" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_script_ends_with_cli(script):
    """So that what `refuses` sees in this process is what a user sees."""
    assert script.read_text(encoding="utf-8").endswith('if __name__ == "__main__":\n    cli(main)\n')


@pytest.mark.slow
def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = run("toy.look", "--data", tmp_path / "nowhere.csv", env={}, check=False)  # no fork: what imports print shows
    assert done.returncode == 2 and done.stderr.splitlines() == [done.stderr.strip()], done.stderr
    assert done.stderr.startswith("error: ") and "nowhere.csv: no such file" in done.stderr
