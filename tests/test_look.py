"""toy/look.py: the frames and the prompt as the model gets them."""

import toy.look
from tests.conftest import refuses, run_here


def test_show(world, base_dir, tmp_path, monkeypatch, capsys):
    flags = ["--show", 2, "--data", world["train_rl"], "--model", base_dir, "--out", tmp_path / "frames.png"]
    run_here(monkeypatch, "toy/look.py", *flags)
    text = capsys.readouterr().out
    assert text.count("<Reward>") == 4 and "video tokens" in text
    assert (tmp_path / "frames.png").stat().st_size > 5000


def test_command_line_errors(tmp_path, capsys):
    refuses(capsys, toy.look.main, "--data", tmp_path / "no.csv", says="no such file")
    refuses(capsys, toy.look.main, "--data", "x", "--colour", "red", says="unrecognized arguments")
