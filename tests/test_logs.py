"""metrics.jsonl after a kill."""

import json

from plumbing import logs


def test_half_a_metrics_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert logs.read_metrics(str(tmp_path)) == [{"step": 1}]
