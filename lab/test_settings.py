"""The shelf's flags have bounds like those of the heart (tests/test_settings.py)."""

import pytest

from lab.bench import __main__ as bench
from lab.bench import plan, real
from lab.post_training import best_of
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


def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = run("lab.study.compare", "--runs", "x=/nowhere/*.json", "--out", tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.splitlines() == [done.stderr.strip()], done.stderr
    assert done.stderr.startswith("error: ") and "no such report" in done.stderr
