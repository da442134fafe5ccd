"""lab/look.py: the frames and the prompt as the model gets them."""

from conftest import refuses, run
from lab import look


def test_show(world, base_dir, tmp_path):
    done = run(
        "lab.look", "--show", 2, "--data", world["train_rl"], "--model", base_dir, "--out", tmp_path / "frames.png"
    )
    assert done.stdout.count("<Reward>") == 4 and "video tokens" in done.stdout
    assert (tmp_path / "frames.png").stat().st_size > 5000


def test_command_line_errors(tmp_path, capsys):
    refuses(capsys, look.main, "--data", tmp_path / "no.csv", says="no such file")
    refuses(capsys, look.main, "--data", "x", "--colour", "red", says="unrecognized arguments")
