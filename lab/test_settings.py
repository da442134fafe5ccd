"""The shelf's flags have bounds like those of the heart (tests/test_settings.py)."""

import pytest

from lab.bench import __main__ as bench
from lab.bench import plan, real
from lab.post_training import __main__ as post_training
from lab.post_training import best_of
from lab.road import annotate, datasets, import_released, videoscore
from tests import test_settings
from tests.conftest import refuses, run


@pytest.mark.parametrize("settings_class", [best_of.Settings, plan.Plan, bench.Settings, real.Settings],
                         ids=lambda c: c.__module__)
def test_every_number_has_bounds_that_its_default_keeps(settings_class):
    test_settings.test_every_number_has_bounds_that_its_default_keeps(settings_class)


@pytest.mark.parametrize("script, flags, says", [
    (plan, ["--gpus", "0"], "--gpus 0: must be at least 1"),
    (bench, ["--ratios", "1", "0"], "--ratios 0.0: must be above 0"),
])
def test_a_number_out_of_range_is_one_sentence(script, flags, says, capsys):
    refuses(capsys, script.main, *flags, says=says)


def test_an_out_that_is_a_file_is_told_before_any_work(tmp_path, world, tiny_model_dir, capsys):
    """Before an annotator is paid, or a minute is trained."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "rows.json").write_text("[]")
    pairs, inside = ["--data", world["test_in_domain"]], tmp_path / "file" / "x"
    for script, *flags in (
        (datasets, "join", *pairs, "--out", inside), (annotate, *pairs, "--model", "m", "--out", inside),
        (videoscore, "v2", "--json", tmp_path / "rows.json", "--videos", tmp_path, "--out", inside),
        (import_released, "--dir", tiny_model_dir, "--out", inside), (bench, "--quick", "--out", inside),
        (real, "--model", tiny_model_dir, "--out", inside), (post_training, "base", "--out", inside),
    ):
        refuses(capsys, script.main, *flags, says="file")
    assert (tmp_path / "file").read_text() == "mine"


def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = run("lab.study.compare", "--runs", "x=/nowhere/*.json", "--out", tmp_path, env={}, check=False)
    assert done.returncode == 2 and done.stderr.splitlines() == [done.stderr.strip()], done.stderr
    assert done.stderr.startswith("error: ") and "no such report" in done.stderr
