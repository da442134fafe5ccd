"""Files are written whole or not at all."""

import json

import pytest

from plumbing import settings


def test_a_kill_while_writing_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "report.json"
    settings.write_json(str(path), {"accuracy": 0.5})
    with pytest.raises(InterruptedError):
        with settings.atomic_write(str(path)) as file:
            file.write('{"accuracy": 0.')
            file.flush()
            raise InterruptedError
    assert json.loads(path.read_text()) == {"accuracy": 0.5}
    settings.write_json(str(path), {"accuracy": 0.75})  # what the kill left is no obstacle
    assert json.loads(path.read_text()) == {"accuracy": 0.75} and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_lines_are_added_only_if_asked_for(tmp_path):
    path = tmp_path / "skipped.jsonl"
    for record, add in (("a", False), ("b", True)):
        settings.write_jsonl(str(path), [record], add=add)
    assert path.read_text() == '"a"\n"b"\n'
    settings.write_jsonl(str(path), ["c"])
    assert path.read_text() == '"c"\n'
