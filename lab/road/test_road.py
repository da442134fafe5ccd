"""lab/road/README.md: `make road` runs its commands; here, that it can run all of them and says so where it cannot."""

import re
import shlex

import pytest

from lab.road import __main__ as road
from lab.road import datasets
from plumbing.settings import InputError
from tests.conftest import refuses

LINES = road.commands_of(road.PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("line", LINES)
def test_every_command_of_the_page_can_be_run_here(line):
    words = shlex.split(line)
    if words[:2] == ["hf", "download"]:
        assert words[2] in road.DOWNLOADS and "--local-dir" in words
    elif words[0] not in ("pip", "vllm"):
        road.smaller(line, 80)


def test_the_page_is_the_whole_road():
    text = "\n".join(LINES)
    steps = ("hf download", "lab.road.datasets", "collect_cots.py", "lab.road.annotate", "cold_start.py", "grpo.py",
             "evaluate.py", "--benchmark mj-bench-video", "lab.road.pointwise")
    places = [text.index(step) for step in steps]
    assert places == sorted(places)
    assert set(datasets.COMMANDS) == set(re.findall(r"lab\.road\.datasets (\S+)", text))
    assert {"v1", "v2"} == set(re.findall(r"lab\.road\.videoscore (\S+)", text))


def test_comments_and_continued_lines():
    page = ("```bash\n# why\npython -m lab.bench.plan --plan 8B \\\n  --gpus 8  # a remark\n```\n"
            "```text\npython no.py\n```\n")
    assert road.commands_of(page) == ["python -m lab.bench.plan --plan 8B    --gpus 8"]
    line = road.smaller("python -m lab.road.annotate --out x", 80)
    assert line.endswith("lab.road.annotate --out x --base-url http://127.0.0.1:80/v1")
    with pytest.raises(InputError, match="has no rule for the command 'curl x'"):
        road.smaller("curl x", 80)


def test_a_folder_of_something_else_is_not_removed(tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    refuses(capsys, road.main, "--out", tmp_path, says="exists, and is not from an earlier run")
    assert (tmp_path / "mine").exists()
