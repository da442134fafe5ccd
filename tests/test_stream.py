"""Reading ahead in other processes: the order asked for, and bad rows in one sentence."""

import pytest

import data
from plumbing.settings import InputError


def test_loader_workers_report_bad_rows_in_one_sentence(world, processor, tmp_path):
    pairs = data.read_pairs(world["train_rl"])[:2]
    bad = data.PreferencePair(str(tmp_path / "no.mp4"), pairs[0].video_b, "x", 1, line=7)
    dataset = data.EncodedPairs([*pairs, bad], processor)
    assert [item[0].line for item in data.take(dataset, [1, 0], workers=1)] == [pairs[1].line, pairs[0].line]
    with pytest.raises(InputError, match="^line 7: .*no such video"):
        list(data.take(dataset, [2], workers=1))
