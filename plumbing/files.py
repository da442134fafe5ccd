"""One way to write a file: whole, or not at all."""

import contextlib
import csv
import json
import os


@contextlib.contextmanager
def written_whole(path: str, mode: str = "w"):
    """Opens a file beside `path` that takes its name once all is written: a kill leaves the old file or the new one."""
    temporary = f"{path}.tmp"
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    with open(temporary, mode, **text) as file:
        yield file
    os.replace(temporary, path)


def write_json(path: str, value) -> None:
    """A file that people read, too."""
    with written_whole(path) as file:
        json.dump(value, file, indent=1)


def write_jsonl(path: str, records, add: bool = False) -> None:
    """One line per record; `add` appends to what is there."""
    with open(path, "a", encoding="utf-8") if add else written_whole(path) as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def write_csv(path: str, head: list[str], rows) -> None:
    """A header and its rows, as plumbing.formats reads them."""
    with written_whole(path) as file:
        csv.writer(file).writerows([head, *rows])
