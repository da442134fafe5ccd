"""Collecting CoTs: resumable, each (video, prompt) once, by what the video holds; stage 1 gets the sampled ids."""

import dataclasses
import json
import os
import shutil

import pytest
import torch

import cold_start
import collect_cots
import data
from plumbing import formats
from plumbing.jobs import read_log
from tests.conftest import refuses, run, write_csv


def test_collecting_cots_writes_a_cold_start_csv_and_resumes(world, base_dir, tmp_path, capsys):
    out = tmp_path / "sub" / "cots.csv"
    flags = ["--model", base_dir, "--data", world["train_cold_start"], "--out", str(out), "--max-new-tokens", "6"]
    collect_cots.main([*flags, "--batch-size", "4"])
    first = out.read_text()
    pairs, source = data.read_pairs(str(out)), data.read_pairs(world["train_cold_start"])
    assert [(p.videos, p.prompt, p.label) for p in pairs] == [(p.videos, p.prompt, p.label) for p in source]
    assert all(p.cot_a for p in pairs)
    # cut the file as a kill would: half a line lost, the rest kept, nothing thought twice, the same result
    thoughts = out.parent / "cots.csv.thoughts" / "thoughts.jsonl"
    lines = thoughts.read_text().splitlines(keepends=True)
    thoughts.write_text("".join(lines[:5]) + lines[5][:20])
    capsys.readouterr()
    collect_cots.main([*flags, "--batch-size", "3"])  # another batch size: seeds belong to the task
    assert "thoughts: 100%" in capsys.readouterr().err
    assert thoughts.read_text().startswith("".join(lines[:5]))  # those stay as they were
    assert out.read_text() == first
    known = [json.loads(line)["video"] for line in thoughts.read_text().splitlines()]
    assert len(known) == len(set(known)) == 14


@pytest.fixture
def val_csv(world, monkeypatch):
    """A CSV by a relative path: its videos' names, which name the random streams, are then the same in every run."""
    folder, name = os.path.split(world["val_cold_start"])
    monkeypatch.chdir(folder)
    return name


def of_video(path, prompt):
    """What tells a thought, however its video's path is written."""
    return os.path.realpath(path), prompt


def test_what_is_kept_of_a_thought(val_csv, base_dir, tmp_path):
    """thoughts.jsonl tells which CoT of which video, how many TOKENS, and whether EOS came before the limit."""
    out, more, flags = {}, {}, ["--model", base_dir, "--data", val_csv, "--max-new-tokens", "6"]
    runs = {"sampled": [], "again": [], "seed 1": ["--seed", "1"], "greedy": ["--temperature", "0"]}
    for name, flag in runs.items():
        collect_cots.main([*flags, *flag, "--out", str(tmp_path / f"{name}.csv")])
        lines = (tmp_path / f"{name}.csv.thoughts" / "thoughts.jsonl").read_text().splitlines()
        out[name] = {of_video(r["video"], r["prompt"]): r["thoughts"][0] for r in map(json.loads, lines)}
        more[name] = [(r["tokens"][0], r["ended"][0], len(r["thoughts"][0])) for r in map(json.loads, lines)]
    assert out["sampled"] == out["again"] and out["seed 1"] != out["sampled"] != out["greedy"]
    for pair in data.read_pairs(str(tmp_path / "sampled.csv")):
        assert pair.cots == tuple(out["sampled"][of_video(video, pair.prompt)] for video in pair.videos)
    # random weights hardly ever say EOS: all six tokens, cut off, and far more characters than tokens
    assert {tokens for tokens, _, _ in more["sampled"]} == {6} and not any(ended for _, ended, _ in more["sampled"])
    assert max(characters for _, _, characters in more["sampled"]) > 6


def test_stage_1_trains_on_what_was_sampled(val_csv, base_dir, model, tmp_path, capsys):
    """Ids from sampling to stage 1's forward: no EOS where the CoT was cut off, and not what the text encodes to."""
    out, tokenizer = tmp_path / "cots.csv", model.processor.tokenizer
    collect_cots.main(["--model", base_dir, "--data", val_csv, "--out", str(out), "--max-new-tokens", "9"])
    records = {of_video(*key): record for key, record in read_log(f"{out}.thoughts", "thoughts").items()}
    pairs = data.read_pairs(str(out))
    for pair in pairs:
        sampled = [records[of_video(video, pair.prompt)] for video in pair.videos]
        assert list(pair.cot_ids(tokenizer)) == [record["token_ids"][0] for record in sampled]
        assert not any(record["ended"][0] for record in sampled)  # all cut off: no EOS, though encode_cot would add one
        assert all(ids[-1] != tokenizer.eos_token_id for ids in pair.cot_ids(tokenizer))
    word = tokenizer("circle", add_special_tokens=False)["input_ids"]
    letters = [i for letter in "circle" for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert word != letters  # the same text, sampled letter by letter
    assert data.encode_cot(tokenizer, "circle", letters) == letters
    assert data.encode_cot(tokenizer, "circle", [*letters, tokenizer.eos_token_id])[:-1] == letters
    assert data.encode_cot(tokenizer, "circle") == [*word, tokenizer.eos_token_id]
    for wrong in ([*letters, 70], [10**6], [-1]):  # edited text, or another tokenizer's ids
        with pytest.raises(data.InputError, match="line 7: the CoT's tokens do not spell"):
            dataclasses.replace(pairs[0], line=7, cot_a="circle", cot_a_tokens=wrong).cot_ids(tokenizer)
    pair = dataclasses.replace(pairs[0], cot_a="circle", cot_b="circle", cot_a_tokens=letters, cot_b_tokens=None)
    items = [data.Drawn(pair, model.encode(pair.videos, [pair.prompt] * 2))]
    rewards = torch.cat(cold_start.score_pairs(model, items))
    ids = [letters, [*word, tokenizer.eos_token_id]]
    assert torch.allclose(rewards, model.score(items[0][1], ids), atol=1e-5)


@pytest.mark.slow
def test_two_ranks_collect_the_same(world, base_dir, tmp_path, capsys):
    """Two ranks as one process; and several files with one engine as each by itself."""
    flags = ["--model", base_dir, "--max-new-tokens", "6"]
    names, one, two = ("train_cold_start", "val_cold_start"), [], []
    for name in names:
        one, two = [*one, tmp_path / f"one_{name}.csv"], [*two, tmp_path / f"two_{name}.csv"]
        collect_cots.main([*flags, "--data", world[name], "--out", str(one[-1])])
    run("collect_cots.py", *flags, "--data", *(world[name] for name in names), "--out", *two, ranks=2)
    assert [path.read_text() for path in one] == [path.read_text() for path in two]
    refuses(capsys, collect_cots.main, *flags, "--data", *(world[name] for name in names), says="as many --out")
    flags = [*flags, "--data", world[names[0]], "--out", one[0] / "inside_a_file.csv"]
    refuses(capsys, collect_cots.main, *flags, says="cannot be written")


def test_a_clip_replaced_under_its_name_is_thought_about_anew(tmp_path, base_dir, tiny_clips):
    names = [str(tmp_path / f"{side}.mp4") for side in "ab"]
    for path, name in zip(tiny_clips, names):
        shutil.copy(path, name)
    source = write_csv(tmp_path / "pairs.csv", ["path_A", "path_B", "prompt", "TA"], [[*names, "a red circle", "A"]])
    flags = ["--model", base_dir, "--data", source, "--max-new-tokens", "12", "--temperature", "0"]
    collect_cots.main([*flags, "--out", str(tmp_path / "cots.csv")])
    shutil.copy(tiny_clips[2], names[1])
    collect_cots.main([*flags, "--out", str(tmp_path / "cots.csv")])  # on what is there
    collect_cots.main([*flags, "--out", str(tmp_path / "fresh.csv")])
    assert (tmp_path / "cots.csv").read_text() == (tmp_path / "fresh.csv").read_text()
    lines = (tmp_path / "cots.csv.thoughts" / "thoughts.jsonl").read_text().splitlines()
    assert [os.path.basename(json.loads(line)["video"]) for line in lines] == ["a.mp4", "b.mp4", "b.mp4"]


def test_a_cot_that_is_nothing_but_its_end_can_be_trained_on(world, processor, tmp_path):
    """Sampled as [EOS], its text is empty; one in thousands would make stage 1 refuse the whole CSV."""
    pairs, eos = data.read_pairs(world["train_cold_start"])[:1], processor.tokenizer.eos_token_id
    cots = [("", [eos]), ("a", [*processor.tokenizer("a")["input_ids"], eos])]
    thoughts = {(video, pairs[0].prompt): {"thoughts": [text], "token_ids": [ids]}
                for video, (text, ids) in zip(pairs[0].videos, cots)}
    formats.write_cots(str(tmp_path / "cots.csv"), pairs, thoughts)
    (pair,) = data.read_pairs(str(tmp_path / "cots.csv"))
    assert [list(ids) for ids in pair.cot_ids(processor.tokenizer)] == [ids for _, ids in cots]


def test_the_input_is_not_written_over(world, base_dir, tmp_path, capsys):
    path = shutil.copy(world["train_cold_start"], tmp_path / "pairs.csv")
    link = tmp_path / "link.csv"
    link.symlink_to(path)
    before = open(path).read()
    refuses(capsys, collect_cots.main, "--model", base_dir, "--data", path, "--out", link, says="is one of --data")
    assert open(path).read() == before
