"""Files of published data sets: JSON, parquet, folders of videos; and a tally of the rows that cannot be used.

A download may be half there, a listed video missing, a row broken: a file that cannot be read is one sentence, a row
that cannot be used is counted and named.
"""

import json
import os

import data
from plumbing.settings import InputError, first_line
from plumbing.video import Unsupported

VIDEO_TYPES = (".mp4", ".webm", ".mov", ".avi", ".mkv", ".gif")


class Tally:
    """Rows that were dropped: {reason: names of the rows}. Nothing leaves a set without a line in the report."""

    def __init__(self):
        self.read, self.dropped = 0, {}

    def drop(self, reason: str, name: str) -> None:
        """Counts a row that is left out, and why."""
        self.dropped.setdefault(reason, []).append(name)

    def report(self) -> str:
        """How many rows were read and dropped, by reason, with three names of each."""
        lines = [f"  read {self.read} rows"]
        for reason, names in self.dropped.items():
            more = ", ..." if len(names) > 3 else ""
            lines.append(f"  dropped {len(names)}: {reason} ({', '.join(names[:3])}{more})")
        return "\n".join(lines)


def read_json(path: str) -> list:
    """A JSON file that holds a list. InputError: no such file, half a download, another shape."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; lab/road/README.md has the download commands.")
    with open(path, "rb") as file:
        text = file.read()
    if text.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a Git LFS pointer, not the file; fetch it with `hf download`.")
    try:
        rows = json.loads(text)
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise InputError(f"{path}: is not whole JSON ({first_line(error)}); download it again.") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: holds a {type(rows).__name__} where a list of rows is published.")
    return rows


def read_parquet(paths: list[str], columns: tuple[str, ...]):
    """Yields (name of the row, {column: value}) of parquet files; only `columns` are read. InputError as read_json."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError("parquet files need pyarrow: pip install -r requirements-road.txt.") from None
    for path in paths:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; lab/road/README.md has the download commands.")
        try:
            have = parquet.read_schema(path).names
            lacking = [column for column in columns if column not in have]
            if lacking:
                raise InputError(f"{path}: has no column {', '.join(lacking)}; its columns: {', '.join(have)}.")
            rows = parquet.read_table(path, columns=list(columns)).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: is not whole parquet ({first_line(error)}); download it again.") from error
        for number, row in enumerate(rows, 1):
            yield f"{os.path.basename(path)} row {number}", row


SPLITS = {"train", "val", "validation", "test"}  # names of folders


class Videos:
    """Finds the videos that a set lists in the folder where its archives were unpacked.

    Listed are paths, bare names or URLs, and archives unpack with or without a folder of their own. So the file name
    decides; and the name of its folder, where two files share one, where a folder of that name is there, or if it is
    a split. No file is taken for two that are listed.
    """

    def __init__(self, folder: str, check: bool):
        self.folder, self.check = os.path.abspath(folder), check
        self.by_name, self.folders = {}, set()  # {file name: paths}; the names of the folders inside
        self.taken = {}  # {path: as what it was listed}
        if not os.path.isdir(folder):
            raise InputError(f"--videos {folder}: no such folder; unpack the set's video archives there.")
        archives = []
        for place, _, names in os.walk(folder):
            archives += [name for name in names if name.endswith((".zip", ".tar", ".gz"))]
            for name in names:
                if name.lower().endswith(VIDEO_TYPES):
                    self.by_name.setdefault(name, []).append(os.path.join(place, name))
                    self.folders |= {os.path.basename(place)} if place != folder else set()
        if not self.by_name:
            found = f"only archives ({', '.join(archives[:3])}): unpack them" if archives else "no video: is it empty"
            raise InputError(f"--videos {folder}: holds {found}{'' if archives else ', or another folder?'}")

    def find(self, listed: str) -> tuple[str | None, str]:
        """-> (path, "") or (None, why not)."""
        parts = listed.split("?")[0].replace("\\", "/").split("/")
        found = self.by_name.get(parts[-1], [])
        if not found:
            return None, "video listed but not there"
        here = [path for path in found if path.replace(os.sep, "/").split("/")[-2:] == parts[-2:]]
        if len(found) > 1 and len(here) != 1:
            return None, "several videos of that name"
        # wan/0.mp4 is there, sora/0.mp4 is listed, and other files of sora's are there; or it is of another split.
        place = os.path.relpath(found[0], os.path.dirname(self.folder)).split(os.sep)
        splits = SPLITS & set(parts), SPLITS & set(place)
        if not here and (self.folders & set(parts[-2:-1]) or (all(splits) and splits[0] != splits[1])):
            return None, "video listed but not there"
        found = here or found
        if self.taken.setdefault(found[0], parts[-2:]) != parts[-2:]:
            return None, "one video for two that are listed"
        if os.path.getsize(found[0]) == 0:
            return None, "video file is empty"
        if self.check:
            try:
                data.sample_frames(found[0], decode=False)
            except Unsupported:
                return None, "video is unsupported, not broken"
            except InputError:
                return None, "video cannot be read"
        return found[0], ""


def text_of(value) -> str:
    """A cell as text; "" if it is none. Half a character (a lone surrogate, which JSON can hold) becomes "?"."""
    return value.strip().encode(errors="replace").decode() if isinstance(value, str) else ""
