"""CSV files: the published formats of preference pairs, recognised by their columns, and the CoTs of stage 0."""

import csv
import json
import os
import re

from plumbing.settings import InputError, write_csv
from rules import DIMENSIONS, extract_answer, parse_literal

LABELS = {
    "a": 1, "video 1 is better": 1, "leftvote": 1, "left": 1,
    "b": -1, "video 2 is better": -1, "rightvote": -1, "right": -1,
    "same": 0, "tie": 0, "tievote": 0, "bothbad_vote": 0, "bothbad": 0,
    "invalid": None,  # annotators could not judge: the row is dropped. NOT "same" (docs/differences.md, row 9)
    "": None,  # nobody judged this dimension: VideoAlign's sheets have such cells
}


def open_table(path: str, need: tuple[str, ...] = ()):
    """The one CSV opener: UTF-8, with or without a byte order mark. Returns (columns, iterator of (line, row)).

    line counts records, the header being 1, as a spreadsheet does: a CoT of many lines in one cell counts once.
    row is {column: text}. InputError: no such file, a missing column of `need`, one that is there twice, broken text, a
    record with more or fewer cells than the header, a quote that is not closed or holds other records. Cut to the
    header's length instead, a prompt would end at its first comma.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file.")
    csv.field_size_limit(2**31 - 1)  # a CoT can be longer than csv's default of 131,072 characters

    def records():
        """(number of the record, the header being 1; its cells, none of them None)."""
        line = 1
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                for line, row in enumerate(filter(None, csv.reader(file, strict=True)), 1):  # [] is an empty line
                    where = f"{path}, line {line}"
                    if len(row) != len(columns):
                        raise InputError(f"{where}: has {len(row)} cells, but the header {len(columns)}; a text with a "
                                         'comma needs "quotes".')
                    if line > 1:
                        _refuse_swallowed(where, row)
                        yield line, dict(zip(columns, row))
        except UnicodeDecodeError as error:
            raise not_utf8(path) from error
        except csv.Error as error:
            raise InputError(f"{path}: the record after line {line} is not CSV ({error}).") from error

    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            columns = [name.strip() for name in next(filter(None, csv.reader(file, strict=True)), [])]
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    except csv.Error as error:
        raise InputError(f"{path}: its header is not CSV ({error}).") from error
    if not columns:
        raise InputError(f"{path}: is empty; a header and rows are needed (docs/data.md has one of each format).")
    if len(columns) == 1 and (other := next((mark for mark in ";\t" if mark in columns[0]), None)):
        raise InputError(f"{path}: its cells are separated by {other!r}; save it with commas.")
    if twice := sorted({column for column in columns if column and columns.count(column) > 1}):
        raise InputError(f"{path}: has the column {twice[0]} {columns.count(twice[0])} times; rename or remove one.")
    lacking = [column for column in need if column not in columns]
    if lacking:
        raise InputError(f"{path}: has no column {', '.join(lacking)}; its columns: {columns}.")
    return columns, records()


def not_utf8(path: str) -> InputError:
    """What to type for a text file in another encoding; spreadsheets write two others."""
    with open(path, "rb") as file:
        mark = file.read(2)
    guess = "UTF-16" if mark in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
    return InputError(f"{path}: is not UTF-8; if it is {guess}: iconv -f {guess} -t UTF-8 {path} > utf8.csv")


VIDEO = re.compile(r"\.(mp4|m4v|mov|mkv|webm|avi|gif)\b", re.IGNORECASE)


def _refuse_swallowed(where: str, row: list[str]) -> None:
    """InputError if a cell holds lines that are records: a quote was opened in one and closed in another.

    Only a line with a video's name just where this record has one counts: a CoT may have many lines and commas.
    """
    for k, cell in enumerate(row):
        if not VIDEO.search(cell):
            continue
        first, *lines = (next(csv.reader([line]), []) for line in cell.splitlines())
        for i, cells in enumerate(lines):
            whole = len(cells) == (k + 1 if i == len(lines) - 1 else len(row))  # the last one goes on behind the quote
            if whole and any(VIDEO.search(a) and VIDEO.search(b) for a, b in zip(cells, [*row[:k], *first])):
                raise InputError(f"{where}: a quote opens in it and closes {i + 1} lines later, in another record; "
                                 'write a quote inside a cell as "".')


def read_records(csv_path: str, dimension: str, root: str):
    """Yields {field of data.PreferencePair: value} for each record of a CSV of pairs; None: it has no verdict."""
    columns, records = open_table(csv_path)
    read_row = _format_of(csv_path, columns, dimension)
    for line, row in records:
        yield _read_row(csv_path, line, row, read_row, root)


def _format_of(csv_path, columns, dimension):
    """Columns -> a function row -> (path_a, path_b, prompt, label text, more fields of PreferencePair)."""
    have = set(columns)

    def cold_start(row):
        cots = {"cot_a": row.get("CoT_A"), "cot_b": row.get("CoT_B")}
        ids = {f"cot_{side.lower()}_tokens": _ids(row.get(f"CoT_{side}_tokens", "")) for side in "AB"}
        return *_two(row["videos"]), row["prompt"], row["GSB"], cots | ids

    def reinforcement(row):
        label, more = _read_answer(row["answer"])
        return *_two(row["videos"]), row.get("prompt") or prompt_in(row["problem"]), label, more

    def in_domain(row):
        label, more = _read_answer(row["answer"])
        return row["video_A"], row["video_B"], row["prompt"], label, more

    def video_align(row):
        return row["path_A"], row["path_B"], row["prompt"], row[dimension], {}

    def genai_bench(row):
        left, right = (row.get(f"{side}_video") or row.get(f"{side}_video_path") for side in ("left", "right"))
        return left, right, row["prompt"], row["vote_type"], {}

    if {"path_A", "path_B", "prompt"} <= have:
        if dimension not in have:
            options = ", ".join(c for c in ("TA", "VQ", "MQ", "Overall") if c in have) or "none"
            raise InputError(f"{csv_path}: has no label column {dimension}; --dimension can be one of: {options}.")
        return video_align
    for need, reader in (
        ({"videos", "prompt", "GSB"}, cold_start),
        ({"videos", "problem", "answer"}, reinforcement),
        ({"videos", "prompt", "answer"}, reinforcement),
        ({"video_A", "video_B", "prompt", "answer"}, in_domain),
        ({"left_video", "right_video", "prompt", "vote_type"}, genai_bench),
        ({"left_video_path", "right_video_path", "prompt", "vote_type"}, genai_bench),
    ):
        if need <= have:
            return reader
    raise InputError(f"{csv_path}: columns {sorted(have)} fit none of the known formats, which need e.g. path_A, "
                     "path_B, prompt and a label column (docs/data.md).")


def _ids(text):
    value = parse_literal(text) if text.strip() else []
    if not (isinstance(value, list) and all(type(i) is int for i in value)):
        raise ValueError("CoT_A_tokens / CoT_B_tokens are not lists of token ids")
    return value


def tidy_prompt(prompt: str) -> str:
    """The prompt as the model is told it. Its line ends, and blanks around it, would move the reward; and what is one
    prompt to the model must be one name in logs, one group, one stream of random numbers."""
    return re.sub(r"\r\n?", "\n", prompt).strip()


def prompt_in(problem: str) -> str:
    """A `problem` cell that is a prompt alone. ValueError: it is a whole instruction, as in the authors' own sheets,
    whose reader cuts it at <video>; all of it would be told to the model as the prompt of the video."""
    if "<video>" in problem:
        raise ValueError("`problem` is a whole instruction; put the video's prompt alone into a column `prompt`")
    return problem


def _two(text):
    value = parse_literal(text)
    if not (isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, str) for v in value)):
        raise ValueError("`videos` is not a list of two paths")
    return value


def _read_answer(text):
    """RL `answer` cell: a label alone, or `<answer>` JSON with gsb_result and the two videos' true verdicts."""
    answer = extract_answer(text)
    if answer is None:
        return re.sub(r"</?answer>", "", text), {}
    truth = {f"annotation_{side}": answer.get(f"video_{n}_scores") for side, n in (("a", 1), ("b", 2))}
    for scores in truth.values():
        if scores is not None and not isinstance(scores, dict):
            raise ValueError("video_1_scores / video_2_scores are not objects")
    truth = {k: {d: str(v).strip().upper() for d, v in s.items()} if s else None for k, s in truth.items()}
    return str(answer.get("gsb_result", "")), truth


def _read_row(csv_path, line, row, read_row, root):
    where = f"{csv_path}, line {line}"
    try:
        path_a, path_b, prompt, label, more = read_row(row)
        label, path_a, path_b, prompt = label.strip(), path_a.strip(), path_b.strip(), tidy_prompt(prompt)
    except ValueError as error:
        raise InputError(f"{where}: cannot be read ({error}).") from error
    if label.lower() not in LABELS:
        raise InputError(f"{where}: unknown label {label[:40]!r}; known: {', '.join(filter(None, LABELS))}.")
    if LABELS[label.lower()] is None:
        return None
    if not prompt:
        raise InputError(f"{where}: the prompt is empty; a reward needs the prompt the video was made from.")
    if not path_a or not path_b:
        raise InputError(f"{where}: a video path is empty.")
    more = {key: value or None for key, value in more.items()}
    filled = [bool((more.get(f"cot_{side}") or "").strip() or more.get(f"cot_{side}_tokens")) for side in "ab"]
    if filled[0] != filled[1]:  # tokens alone: one that was sampled as nothing but its end
        raise InputError(f"{where}: only one of CoT_A and CoT_B is filled; a pair needs both, or neither.")
    _check_annotations(where, more)
    extra = {k: v for k, v in row.items() if k.endswith("_model")}
    path_a, path_b = (os.path.normpath(os.path.join(root, path)) for path in (path_a, path_b))
    return {"video_a": path_a, "video_b": path_b, "prompt": prompt, "label": LABELS[label.lower()], "line": line,
            "extra": extra, **more}


def _check_annotations(where, more):
    for truth in (more.get("annotation_a") or {}, more.get("annotation_b") or {}):
        for dimension, verdict in truth.items():
            if dimension not in DIMENSIONS:
                raise InputError(f"{where}: unknown dimension {dimension[:40]!r}; known: {', '.join(DIMENSIONS)}.")
            if verdict not in ("0", "1", "2", "N/A"):
                raise InputError(f"{where}: the verdict on {dimension} is {verdict[:40]!r}; known: 0, 1, 2, N/A.")


def refuse_outside(root: str, path: str, line: int) -> None:
    """A downloaded CSV must not make us open, and show on the page, files elsewhere: `..`, absolute, symlinks.

    InputError: it lies outside `root`.
    """
    try:
        inside = os.path.commonpath([os.path.realpath(root), os.path.realpath(path)]) == os.path.realpath(root)
    except ValueError:  # a path with a zero byte
        inside = False
    if not inside:
        raise InputError(f"line {line}: the video {path!r} is outside --root {root}; it is not opened.")


def write_cots(path: str, pairs: list, thoughts: dict) -> None:
    """Pairs and their CoTs in DeScore's cold-start columns: what collect_cots.py collected, as stage 1 reads it.

    thoughts: {(video, prompt): record of phases.Workers.think}. The tokens go along: stage 1 then trains on what was
    sampled.
    """
    label, rows = {1: "A", -1: "B", 0: "same"}, []
    for pair in pairs:
        videos = [os.path.relpath(video, os.path.dirname(os.path.abspath(path))) for video in pair.videos]
        records = [thoughts[video, pair.prompt] for video in pair.videos]
        texts = [record["thoughts"][0] for record in records]
        ids = [json.dumps(record["token_ids"][0]) for record in records]
        rows.append([json.dumps(videos), pair.prompt, pair.prompt, *texts, *ids, label[pair.label]])
    write_csv(path, ["videos", "problem", "prompt", "CoT_A", "CoT_B", "CoT_A_tokens", "CoT_B_tokens", "GSB"], rows)
