"""Every published CSV format, and every kind of bad file: one sentence that names the line."""

import json
import subprocess

import pytest

import data
from plumbing.formats import open_table, refuse_outside
from plumbing.jobs import items_of
from plumbing.settings import InputError
from rules import DIMENSIONS
from tests.conftest import write_csv


def write_rows(path, rows):
    """Rows as dicts that share their columns."""
    return write_csv(path, list(rows[0]), [list(row.values()) for row in rows])


TRUTH = {d: "2" for d in DIMENSIONS}
ANSWER = json.dumps(
    {"video_1_scores": TRUTH, "video_2_scores": {**TRUTH, "style": 0}, "gsb_result": "Video 1 is better"}
)
FORMATS = {
    "cold start": ({"videos": "['a.mp4', 'b.mp4']", "problem": "?", "durations": "[5, 5]", "prompt": "a cat",
                    "CoT_A": "<think>a</think>", "CoT_B": "<think>b</think>", "GSB": "B"}, -1),
    "rl": ({"videos": '["a.mp4", "b.mp4"]', "problem": "a cat", "answer": f"<answer>{ANSWER}</answer>"}, 1),
    "videoalign": ({"path_A": "a.mp4", "path_B": "b.mp4", "prompt": "a cat", "VQ": "A", "MQ": "A", "TA": "same",
                    "fps_A": "8", "num_frames_A": "49", "fps_B": "8", "num_frames_B": "49"}, 0),
    "videogen": ({"path_A": "a.mp4", "path_B": "b.mp4", "A_model": "gen2", "B_model": "pika", "prompt": "a cat",
                  "VQ": "A", "MQ": "A", "TA": "B", "Overall": "A"}, -1),
    "genai": ({"prompt": "a cat", "left_model": "x", "right_model": "y", "left_video": "a.mp4", "right_video": "b.mp4",
               "vote_type": "bothbad_vote"}, 0),
    "genai paths": ({"prompt": "a cat", "left_video_path": "a.mp4", "right_video_path": "b.mp4",
                     "vote_type": "leftvote"}, 1),
    "in-domain": ({"video_A": "a.mp4", "video_B": "b.mp4", "prompt": "a cat", "answer": "Video 2 is better"}, -1),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_published_format(name, tmp_path):
    row, label = FORMATS[name]
    (pair,) = data.read_pairs(write_rows(tmp_path / "x.csv", [row]))
    assert (pair.label, pair.prompt, pair.line) == (label, "a cat", 2)
    assert pair.videos == (str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"))


def test_format_details(tmp_path):
    (pair,) = data.read_pairs(write_rows(tmp_path / "a.csv", [FORMATS["cold start"][0]]))
    assert pair.cots == ("<think>a</think>", "<think>b</think>")
    empty = {**FORMATS["cold start"][0], "CoT_A": "", "CoT_B": ""}
    assert data.read_pairs(write_rows(tmp_path / "a.csv", [empty]))[0].cots == (None, None)
    with pytest.raises(InputError, match="line 2: only one of CoT_A and CoT_B is filled"):
        data.read_pairs(write_rows(tmp_path / "a.csv", [{**empty, "CoT_A": "<think>a</think>"}]))
    (pair,) = data.read_pairs(write_rows(tmp_path / "b.csv", [FORMATS["rl"][0]]))
    assert pair.annotation_a == TRUTH and pair.annotation_b["style"] == "0"  # 0 and "0" are the same verdict
    (pair,) = data.read_pairs(write_rows(tmp_path / "c.csv", [FORMATS["videogen"][0]]), dimension="Overall")
    assert pair.label == 1 and pair.extra == {"A_model": "gen2", "B_model": "pika"}


@pytest.mark.parametrize("raw, says", [
    (b"", "is empty; a header and rows are needed"), (b"\n\n", "is empty; a header"),
    (b"path_A,path_B,prompt,TA\n", "holds no usable pair, only a header"),
    ("path_A,path_B,prompt,TA\na.mp4,b.mp4,un café,A\n".encode("latin-1"), "iconv -f WINDOWS-1252 -t UTF-8 "),
    (b"path_A,path_B,prompt,TA\n" + b"a.mp4,b.mp4,a cat,A\n" * 9999 + b"a.mp4,b.mp4,\xe9,A\n", "iconv -f WINDOWS"),
    ("path_A,path_B,prompt,TA\na.mp4,b.mp4,un café,A\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8 "),
    (b"path_A;path_B;prompt;TA\na.mp4;b.mp4;a cat;A\n", "separated by ';'"),
    (b"path_A\tpath_B\tprompt\tTA\na.mp4\tb.mp4\ta cat\tA\n", r"separated by '\\t'"),
])
def test_a_file_that_a_spreadsheet_wrote_otherwise_says_what_to_type(tmp_path, raw, says):
    """Far behind the header, too, where the reader has long begun."""
    path = tmp_path / "a.csv"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=says):
        data.read_pairs(str(path))


def test_what_it_says_to_type_is_right(tmp_path):
    for name, encoding in (("a.csv", "cp1252"), ("b.csv", "utf-16")):
        text = "path_A,path_B,prompt,TA\na.mp4,b.mp4,un “café”,A\n"
        (tmp_path / name).write_bytes(text.encode(encoding))
        with pytest.raises(InputError) as told:
            data.read_pairs(str(tmp_path / name))
        subprocess.run(["bash", "-c", str(told.value).split(": ")[-1]], cwd=tmp_path, check=True)
        assert data.read_pairs(str(tmp_path / "utf8.csv"))[0].prompt == "un “café”"


def test_blanks_around_a_column_s_name_do_not_count(tmp_path):
    (tmp_path / "a.csv").write_text("path_A, path_B ,\tprompt, TA\na.mp4,b.mp4,a cat,B\n")
    (pair,) = data.read_pairs(str(tmp_path / "a.csv"))
    assert (pair.video_b, pair.prompt, pair.label) == (str(tmp_path / "b.mp4"), "a cat", -1)


def test_same_is_a_tie_and_invalid_is_dropped(tmp_path, capsys):
    """docs/differences.md, row 9: `same` must not be read as `invalid`."""
    rows = [{**FORMATS["cold start"][0], "GSB": label} for label in ("same", "invalid", "A", " ")]
    pairs = data.read_pairs(write_rows(tmp_path / "x.csv", rows))
    assert [p.label for p in pairs] == [0, 1]
    assert "left out 2 lines" in capsys.readouterr().err
    with pytest.raises(InputError, match="no usable pair"):  # a column that nobody filled
        data.read_pairs(write_rows(tmp_path / "x.csv", rows[3:]))


def test_bom_crlf_long_cells(tmp_path):
    path = tmp_path / "x.csv"
    text = 'path_A,path_B,prompt,TA\r\na.mp4,b.mp4,"' + "long, " * 50_000 + '",A\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(data.read_pairs(str(path))[0].prompt) > 200_000


def bad_csv(tmp_path, says, dimension="TA", **changes):
    row = {**FORMATS["videoalign"][0], **changes}
    row = {k: v for k, v in row.items() if v is not None}
    with pytest.raises(InputError, match=says):
        data.read_pairs(write_rows(tmp_path / "x.csv", [row]), dimension)


def test_bad_csv_names_the_place(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        data.read_pairs(str(tmp_path / "none.csv"))
    bad_csv(tmp_path, "line 2: unknown label 'C'", TA="C")
    bad_csv(tmp_path, "line 2: the prompt is empty", prompt="  ")
    bad_csv(tmp_path, "fit none of the known formats", path_B=None)
    bad_csv(tmp_path, "can be one of: TA, VQ, MQ", dimension="Overall")
    asked = {**FORMATS["rl"][0], "problem": "You are an expert. Text Prompt: a cat. Video: <video>. Judge it."}
    with pytest.raises(InputError, match="line 2: .*whole instruction; put the video's prompt alone"):
        data.read_pairs(write_rows(tmp_path / "x.csv", [asked]))
    assert data.read_pairs(write_rows(tmp_path / "x.csv", [{**asked, "prompt": "a cat"}]))[0].prompt == "a cat"
    code = {**FORMATS["rl"][0], "videos": "__import__('os').system('x')"}
    with pytest.raises(InputError, match="line 2"):
        data.read_pairs(write_rows(tmp_path / "x.csv", [code]))
    (tmp_path / "latin.csv").write_bytes("path_A,path_B,prompt,TA\na,b,caf\xe9,A\n".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        data.read_pairs(str(tmp_path / "latin.csv"))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match="is empty"):
        data.read_pairs(str(tmp_path / "empty.csv"))


@pytest.mark.parametrize("scores, says", [
    ({**TRUTH, "colour": "2"}, "line 2: unknown dimension 'colour'"),
    ({**TRUTH, "style": "good"}, "line 2: the verdict on style is 'GOOD'"),
])
def test_annotations_that_no_cot_could_match(tmp_path, scores, says):
    answer = json.dumps({"video_1_scores": TRUTH, "video_2_scores": scores, "gsb_result": "A"})
    row = {**FORMATS["rl"][0], "answer": f"<answer>{answer}</answer>"}
    with pytest.raises(InputError, match=says):
        data.read_pairs(write_rows(tmp_path / "x.csv", [row]))


# -- what is no table -----------------------------------------------------------------------------------------------
HEAD = "path_A,path_B,prompt,TA\n"
GOOD = "a.mp4,b.mp4,a cat,A\n"


@pytest.mark.parametrize("text, says", [
    (HEAD + GOOD + "a.mp4,b.mp4,a cat, running,A\n", "line 3: has 5 cells, but the header 4"),
    (HEAD + "a.mp4,b.mp4,a cat\n", "line 2: has 3 cells, but the header 4"),
    ("path_A,path_B,prompt,TA,TA\na.mp4,b.mp4,a cat,A,B\n", "has the column TA 2 times"),
    ("path_A,path_B,prompt,TA, prompt\na.mp4,b.mp4,a cat,A,a dog\n", "has the column prompt 2 times"),
    (HEAD + GOOD + 'a.mp4,b.mp4,"a cat,A\n' + GOOD, "the record after line 2 is not CSV"),  # never closed
    (HEAD + 'a.mp4,b.mp4,"a cat,A\n' + GOOD + 'a.mp4,b.mp4,a cat",A\n', "line 2: a quote opens in it and closes 1"),
    (HEAD + GOOD + 'a.mp4,b.mp4,"a cat,A\na.mp4,b.mp4,a cat",A\n', "line 3: a quote opens in it and closes 1"),
    (HEAD + '"a.mp4,b.mp4,a cat,A\n' + GOOD + 'a.mp4",b.mp4,a cat,A\n', "line 2: a quote opens in it and closes 1"),
    (HEAD + 'a.mp4,b.mp4,"the "old" cat",A\n', "the record after line 1 is not CSV"),
])
def test_what_is_no_table_is_named_with_its_line(tmp_path, text, says):
    """Read as far as it goes, each of these gives a finite, plausible, wrong label or prompt."""
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        data.read_pairs(str(path))
    with pytest.raises(InputError, match=says):
        list(open_table(str(path))[1])


def test_long_texts_with_commas_quotes_and_file_names_are_cells(tmp_path):
    cot = 'one, two, three, four\n"quoted", like x.mp4, in, many\n\na, b, c, d\r\nlast.mp4'
    rows = [{**FORMATS["cold start"][0], "CoT_A": cot, "CoT_B": cot}]
    (pair,) = data.read_pairs(write_rows(tmp_path / "x.csv", rows))
    assert pair.cot_a == cot
    prompts = [{**FORMATS["videoalign"][0], "prompt": cot}, {**FORMATS["videoalign"][0], "prompt": '"'}]
    assert [pair.prompt for pair in data.read_pairs(write_rows(tmp_path / "x.csv", prompts))] == [
        cot.replace("\r\n", "\n"), '"']  # a CoT is kept as it was sampled, a prompt as the model is told it
    (tmp_path / "blank.csv").write_text(HEAD + "\n" + GOOD + "\n\n" + GOOD + "\n")  # empty lines are no records
    assert [pair.line for pair in data.read_pairs(str(tmp_path / "blank.csv"))] == [2, 3]


def test_a_prompt_with_blanks_around_it_is_no_second_item(tmp_path):
    """To the model it is the same prompt: a second item would get other random numbers, and be a group of its own."""
    rows = [{**FORMATS["videoalign"][0], "prompt": prompt} for prompt in ("a cat", "a cat ", "\ta cat\r\n")]
    assert len(items_of(data.read_pairs(write_rows(tmp_path / "x.csv", rows)))) == 2  # a.mp4, b.mp4


def test_only_files_inside_the_root_are_opened(tmp_path):
    """`root-secret` beside `root` begins with the same letters."""
    root = tmp_path / "root"
    for folder in (root, tmp_path / "root-secret"):
        folder.mkdir()
        (folder / "x.mp4").write_bytes(b"x")
    (root / "link.mp4").symlink_to(tmp_path / "root-secret" / "x.mp4")
    refuse_outside(str(root), str(root / "x.mp4"), 2)
    refuse_outside(str(root), str(root / ".." / "root" / "x.mp4"), 2)
    secret = tmp_path / "root-secret" / "x.mp4"
    for path in (secret, root / ".." / "root-secret" / "x.mp4", root / "link.mp4", "/x", "a\0"):
        with pytest.raises(InputError, match="line 2: .* is outside --root"):
            refuse_outside(str(root), str(path), 2)
