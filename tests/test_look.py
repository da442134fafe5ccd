"""toy/look.py: the frames and the prompt as the model gets them."""

import toy.look
from data import sample_frames
from tests.conftest import refuses, run_here


def test_show(world, base_dir, tmp_path, monkeypatch, capsys):
    flags = ["--show", 2, "--data", world["train_rl"], "--model", base_dir, "--out", tmp_path / "frames.png"]
    run_here(monkeypatch, "toy/look.py", *flags)
    text = capsys.readouterr().out
    assert text.count("<Reward>") == 4 and "video tokens" in text
    assert (tmp_path / "frames.png").stat().st_size > 5000


def test_a_name_with_dollars_is_no_formula(tiny_clips, tmp_path):
    toy.look.draw_frames([("cost_$5_$6.mp4", sample_frames(tiny_clips[0]))], str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").stat().st_size > 2000


def test_command_line_errors(tmp_path, capsys):
    refuses(capsys, toy.look.main, "--data", tmp_path / "no.csv", says="no such file")
    refuses(capsys, toy.look.main, "--data", "x", "--show", "0", says="--show 0: at least 1 pair")
    refuses(capsys, toy.look.main, "--data", "x", "--colour", "red", says="unrecognized arguments")
