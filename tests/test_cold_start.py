"""Stage 1: masking only in training and once per pair, ties, limits, resume bit for bit, and the script."""

import csv
import dataclasses
import json
import os
import pickle
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import cold_start
import data
import grpo
import parallel
from model import DeScore
from plumbing import logs, resume
from plumbing.settings import InputError
from rules import parse_literal
from tests.conftest import refuses, write_csv


@pytest.fixture
def pairs(world):
    """Pairs with CoTs."""
    pairs = data.read_pairs(world["train_cold_start"])
    return [
        dataclasses.replace(p, cot_a=f"<think>one {i}</think>", cot_b=f"<think>two {i}</think>")
        for i, p in enumerate(pairs)
    ]


@pytest.fixture
def settings(world, tmp_path):
    return cold_start.Settings(data=world["train_cold_start"], out=str(tmp_path), workers=0)


def items(pairs, processor, count=2):
    return list(data.take(data.EncodedPairs(pairs[:count], processor), list(range(count))))


def text_of(processor, token):
    return processor.tokenizer.decode([token])


def test_one_mask_draw_per_pair_and_a_masked_cot_is_absent(pairs, model, processor, settings, monkeypatch):
    seen = []
    real = cold_start.lay_out
    monkeypatch.setattr(cold_start, "lay_out", lambda b, p, cots: seen.append(cots) or real(b, p, cots))
    monkeypatch.setattr(cold_start, "draw_cot_mask", lambda *_: torch.tensor([True, False]))
    sampled = [dataclasses.replace(pair, cot_a_tokens=[70], cot_b_tokens=[71], cot_a=text_of(processor, 70),
                                   cot_b=text_of(processor, 71)) for pair in pairs[:2]]  # the ids go, too
    drawn = cold_start.draw(sampled, Epochs(1, 2), settings)
    masked = cold_start.score_pairs(model, items(drawn, processor))
    assert [[bool(ids) for ids in row] for row in seen[0]] == [[False], [False], [True], [True]]  # A and B alike
    prefixes = [prefix for _, both in items(drawn, processor) for prefix in both]
    reference = model.score(prefixes, [None, None, [70], [71]]).view(2, 2).T
    assert torch.allclose(torch.stack(masked), reference, atol=1e-6)
    unmasked = cold_start.score_pairs(model, items(sampled, processor))
    assert not torch.allclose(unmasked[0][0], masked[0][0], atol=1e-4) and torch.allclose(
        unmasked[0][1], masked[0][1], atol=1e-5
    )


def test_each_video_is_scored_with_its_own_cot(pairs, model, processor, settings):
    """A's CoT stands behind A's video: stage 1 scores as `DeScore.score` does when the model is used."""
    (r_a,), (r_b,) = cold_start.score_pairs(model, items(pairs, processor, 1))
    pair = pairs[0]
    prefixes, cots = model.encode(pair.videos, [pair.prompt] * 2), pair.cot_ids(processor.tokenizer)
    expected, crossed = model.score(prefixes, cots), model.score(prefixes, cots[::-1])
    assert [r_a.item(), r_b.item()] == pytest.approx(expected.tolist(), abs=1e-5)
    assert not torch.allclose(expected, crossed, atol=1e-3)


def test_validation_never_masks(pairs, model, processor, settings, monkeypatch):
    shown = []
    real = cold_start.score_pairs
    monkeypatch.setattr(cold_start, "score_pairs", lambda m, items: shown.extend(items) or real(m, items))
    settings = dataclasses.replace(settings, mask_probability=1.0, micro_pairs=2)
    accuracy = cold_start.validate(model, data.EncodedPairs(pairs, processor), settings, parallel.Ranks())
    assert model.training  # it goes on training afterwards, with dropout
    assert [pair for pair, _ in shown] == pairs and all(all(pair.cots) for pair in pairs)
    right = sum(
        ((a - b) * p.label > 0).item()
        for p in pairs
        if p.label
        for a, b in [real(model, items([p], processor, 1))]
    )
    assert accuracy == pytest.approx(right / sum(p.label != 0 for p in pairs))


@pytest.mark.parametrize("rank, counted", [(0, [0, 2]), (1, [1])])
def test_a_round_that_repeats_a_pair_counts_it_once(pairs, processor, settings, monkeypatch, rank, counted):
    """Three pairs on two ranks: rank 1 scores the last pair too, so that all ranks do as many forwards."""
    told, scored = [], []

    class Two(parallel.Ranks):
        def gather_objects(self, items):
            told.extend(items)
            return items

    ranks = Two()
    ranks.world, ranks.rank = 2, rank

    def score(model, items):
        numbers = [pairs.index(pair) for pair, _ in items]
        scored.extend(numbers)
        return torch.tensor([float(n) for n in numbers]), torch.zeros(len(numbers))

    monkeypatch.setattr(cold_start, "score_pairs", score)
    model = torch.nn.Linear(1, 1)
    cold_start.validate(model, data.EncodedPairs(pairs[:3], processor), settings, ranks)
    assert len(scored) == 2 and [int(margin) for _, margin in told] == counted and model.training


class Epochs:
    """A run of `count` epochs, each of all pairs in file order."""

    def __init__(self, count, size):
        self.count, self.size = count, size

    def draws(self):
        return [(epoch, list(range(self.size))) for epoch in range(self.count)]


def test_coins_differ_from_epoch_to_epoch_and_not_from_run_to_run(settings):
    pairs = [data.PreferencePair("a", "b", "p", 1, "one", "two")] * 64

    def toss(settings):
        drawn = cold_start.draw(pairs, Epochs(3, 64), settings)
        assert all(pair.cots in (("one", "two"), (None, None)) for pair in drawn)
        return torch.tensor([pair.cots == (None, None) for pair in drawn]).view(3, 64)

    coins, again, other = toss(settings), toss(settings), toss(dataclasses.replace(settings, seed=1))
    assert torch.equal(coins, again) and not torch.equal(coins, other)
    assert not torch.equal(coins[0], coins[1]) and not torch.equal(coins[1], coins[2])
    assert 60 < coins.sum() < 132  # 192 tosses at .5


@pytest.mark.slow
def test_micro_batches_of_btt_are_the_batch(with_cots, base_dir, tmp_path):
    """The loss is divided by the whole batch's pairs, so it does not matter in how many forwards they come."""
    logs_of = []
    for size in (1, 2):
        out = tmp_path / str(size)
        cold_start.main(arguments(with_cots, base_dir, out, max_steps=1, loss="btt", micro_pairs=size, lora_dropout=0))
        logs_of.append(logs.read_metrics(str(out))[0])
    for name in ("loss", "grad_norm_llm", "grad_norm_head"):
        assert logs_of[0][name] == pytest.approx(logs_of[1][name], rel=1e-3), name


def arguments(world, base_dir, out, **more):
    flags = {"model": base_dir, "data": world["train_cold_start"], "out": out, "batch_pairs": 2, "lr": 1e-3,
             "workers": 0, "mask_probability": 0.5, "epochs": 2, "lora_r": 4, "lora_alpha": 8, "max_steps": 4, **more}
    return [str(x) for name, value in flags.items() for x in ("--" + name.replace("_", "-"), value)]


@pytest.fixture(scope="module")
def with_cots(world, tmp_path_factory):
    """The training CSV with some text in CoT_A and CoT_B."""
    path = tmp_path_factory.mktemp("cots") / "train.csv"
    rows = list(csv.DictReader(open(world["train_cold_start"], encoding="utf-8")))
    root = world["train_cold_start"].rsplit("/", 1)[0]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            paths = [f"{root}/{v}" for v in parse_literal(row["videos"])]
            writer.writerow(
                {**row, "videos": repr(paths), "CoT_A": "<think>one</think>", "CoT_B": "<think>two two</think>"}
            )
    return {"train_cold_start": str(path)}


@pytest.fixture(scope="module")
def two_steps(with_cots, base_dir, tmp_path_factory):
    """--out of a run of two steps: `go_on(two_steps, folder)` gives a test its own."""
    out = tmp_path_factory.mktemp("two_steps")
    cold_start.main(arguments(with_cots, base_dir, out, max_steps=2))
    return out


def go_on(run, folder):
    return shutil.copytree(run, folder, dirs_exist_ok=True)


def test_pairs_without_cots_are_named_and_count_as_masked(with_cots, base_dir, tmp_path, capsys):
    """CoTs in one of seven pairs are no cold start with thinking: it is said, and masked_share says 6/7."""
    rows = list(csv.DictReader(open(with_cots["train_cold_start"], encoding="utf-8")))
    for row in rows[1:]:
        row["CoT_A"] = row["CoT_B"] = ""
    few = {"train_cold_start": write_csv(tmp_path / "few.csv", list(rows[0]), [list(row.values()) for row in rows])}
    how = {"batch_pairs": 7, "max_steps": 1, "mask_probability": 0, "loss": "btt", "epochs": 1}
    cold_start.main(arguments(few, base_dir, tmp_path / "out", **how))
    assert "6 of 7 pairs have no CoTs" in capsys.readouterr().out
    (line,) = logs.read_metrics(str(tmp_path / "out"))
    assert line["masked_share"] == pytest.approx(6 / 7)


def test_a_cot_sampled_as_nothing_but_its_end_is_a_cot(with_cots, base_dir, processor, tmp_path, capsys):
    """Its text is empty, its token EOS stands before the query: not masked, so not counted as masked."""
    rows = list(csv.DictReader(open(with_cots["train_cold_start"], encoding="utf-8")))
    for row in rows:
        row |= {"CoT_A": "", "CoT_A_tokens": f"[{processor.tokenizer.eos_token_id}]", "CoT_B_tokens": "[]"}
    ends = write_csv(tmp_path / "ends.csv", list(rows[0]), [list(row.values()) for row in rows])
    how = {"max_steps": 1, "mask_probability": 0}
    cold_start.main(arguments({"train_cold_start": ends}, base_dir, tmp_path / "out", **how))
    assert "have no CoTs" not in capsys.readouterr().out
    assert logs.read_metrics(str(tmp_path / "out"))[0]["masked_share"] == 0


def test_more_epochs_do_not_begin_the_warm_up_again(with_cots, base_dir, tmp_path):
    """A warm-up of both of 2 steps. Resumed with 4 steps in sight, step 3 has the full rate, not 3/4 of it."""
    how = {"warmup": 1, "batch_pairs": 4, "loss": "btt", "max_steps": 8}
    cold_start.main(arguments(with_cots, base_dir, tmp_path, epochs=2, **how))
    cold_start.main([*arguments(with_cots, base_dir, tmp_path, epochs=4, **how), "--resume"])
    rates = [line["lr"] for line in logs.read_metrics(str(tmp_path))]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("flags", [["--cpu-offload"], ["--shard-ranks", "2"]])
def test_one_process_shards_nothing(tmp_path, capsys, flags):
    for script in (cold_start, grpo):
        refuses(capsys, script.main, "--data", "x.csv", "--model", "m", "--out", tmp_path, *flags, says=flags[0])


def weights(folder):
    return DeScore.from_pretrained(str(folder / "model")).state_dict()


@pytest.mark.curves
def test_four_steps_are_two_and_resume_and_two(with_cots, base_dir, two_steps, tmp_path):
    cold_start.main(arguments(with_cots, base_dir, tmp_path / "whole", val=with_cots["train_cold_start"]))
    go_on(two_steps, tmp_path / "parts")
    # a kill while saving leaves a folder without its final name: it must not be taken for a checkpoint
    shutil.copytree(tmp_path / "parts/checkpoints/step-000002", tmp_path / "parts/checkpoints/step-000003.tmp")
    cold_start.main([*arguments(with_cots, base_dir, tmp_path / "parts"), "--resume"])
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)  # bit for bit, LoRA dropout and masks included
    steps = logs.read_metrics(str(tmp_path / "whole"))
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["loss"] for line in steps] == [line["loss"] for line in logs.read_metrics(str(tmp_path / "parts"))]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=0.05)  # ln 2: rewards start about equal
    assert 0 <= steps[-1]["val_accuracy"] <= 1
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 5000
    start = DeScore.from_pretrained(base_dir, new_head=True).state_dict()
    changed = {name for name in start if not torch.equal(start[name], one[name])}
    assert (
        {"query", "head.weight"} <= changed
        and any(".visual." in n for n in changed)
        and any("q_proj" in n for n in changed)
    )
    assert not any("lm_head" in n or "embed_tokens" in n for n in changed)  # LoRA's targets only


def test_learning_and_btt(with_cots, base_dir, tmp_path):
    cold_start.main(
        arguments(
            with_cots, base_dir, tmp_path, epochs=6, max_steps=18, lr=1e-3, loss="btt", mask_probability=0, train="full"
        )
    )
    steps = logs.read_metrics(str(tmp_path))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1 and steps[-1]["masked_share"] == 0


def test_too_long_a_cot_names_its_row(with_cots, base_dir, tmp_path, capsys):
    """Before the first step, not when its turn comes."""
    flags = arguments(with_cots, base_dir, tmp_path, max_length=9)
    assert re.search(r"line \d+: \d+ tokens", refuses(capsys, cold_start.main, *flags, says="exceed --max-length 9"))
    assert not logs.read_metrics(str(tmp_path))


@pytest.mark.parametrize("cots", [{"CoT_A_tokens": "[1]"}, {"CoT_A": "five " * 3000}])
def test_with_every_cot_masked_none_is_looked_at(with_cots, base_dir, tmp_path, cots):
    """--mask-probability 1: no CoT is too long, and no tokens are of another tokenizer."""
    rows = [row | cots for row in csv.DictReader(open(with_cots["train_cold_start"], encoding="utf-8"))]
    odd = write_csv(tmp_path / "odd.csv", list(rows[0]), [list(row.values()) for row in rows])
    how = {"mask_probability": 1, "max_steps": 1, "max_length": 2000}
    cold_start.main(arguments({"train_cold_start": odd}, base_dir, tmp_path / "out", **how))
    assert logs.read_metrics(str(tmp_path / "out"))[0]["masked_share"] == 1


def test_bad_input(world, with_cots, base_dir, tmp_path, capsys):
    with pytest.raises(InputError, match="no CoT_A / CoT_B"):
        cold_start.main(arguments(world, base_dir, tmp_path))
    with pytest.raises(InputError, match="--batch-pairs"):
        cold_start.main(arguments(with_cots, base_dir, tmp_path, batch_pairs=64))
    with pytest.raises(InputError, match="loss is nan at line"):
        cold_start.main(arguments(with_cots, base_dir, tmp_path, lr=1e30, max_steps=5))
    refuses(capsys, cold_start.main, "--data", tmp_path / "no.csv", "--out", tmp_path / "b", says="no such file")


def test_skip_bad_videos_counts_and_lists(with_cots, base_dir, tmp_path, capsys):
    text = open(with_cots["train_cold_start"], encoding="utf-8").read()
    first = next(p for p in data.read_pairs(with_cots["train_cold_start"]) if p.label).video_a
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "x.csv").write_text(text.replace(first, str(tmp_path / "bad.mp4")))
    bad = {"train_cold_start": str(tmp_path / "x.csv")}
    with pytest.raises(InputError, match="bad.mp4"):
        cold_start.main(arguments(bad, base_dir, tmp_path / "a", epochs=1, max_steps=99, batch_pairs=1))
    cold_start.main([*arguments(bad, base_dir, tmp_path / "b", max_steps=1), "--skip-bad-videos"])
    assert "skipped 1 pairs with 1 bad videos" in capsys.readouterr().out
    assert "bad.mp4" in (tmp_path / "b" / "skipped.jsonl").read_text()


def test_no_worker_is_forked_while_a_checkpoint_is_written(with_cots, base_dir, tmp_path, monkeypatch):
    """A fork copies the locks that the writing thread holds: seen once, a worker that waited for one for hours."""
    write, writing, seen = resume._write, [], []

    def slow(*args):
        writing.append(True)
        time.sleep(0.5)
        write(*args)
        writing.clear()

    monkeypatch.setattr(resume, "_write", slow)
    monkeypatch.setattr(cold_start, "validate", lambda *_: seen.append(bool(writing)) or 0.5)
    due = {"max_steps": 2, "save_every": 1, "val_every": 1, "val": with_cots["train_cold_start"]}
    cold_start.main(arguments(with_cots, base_dir, tmp_path / "out", **due))
    assert seen == [False, False]


def test_a_second_run_in_the_same_folder(with_cots, base_dir, two_steps, tmp_path, capsys):
    """Refused; --overwrite removes what a run wrote and nothing else, and not what the new run reads."""
    out, flags = tmp_path / "out", lambda **more: arguments(with_cots, base_dir, tmp_path / "out", **more)
    before = weights(go_on(two_steps, out))
    refuses(capsys, cold_start.main, *flags(max_steps=1), says="holds a run (checkpoints, metrics.jsonl, model)")
    refuses(capsys, cold_start.main, *flags(max_steps=1), "--resume", "--overwrite", says="give one of them")
    refuses(capsys, cold_start.main, *flags(model=out / "model"), "--overwrite", says="lies in what --overwrite would")
    for wrong in ({"model": "typo"}, {"data": "typo.csv"}):
        refuses(capsys, cold_start.main, *flags(max_steps=1, **wrong), "--overwrite", says="typo")
    assert all(torch.equal(before[name], value) for name, value in weights(out).items())
    (out / "notes.txt").write_text("mine")
    cold_start.main([*flags(max_steps=1), "--overwrite"])
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000001"] and (out / "notes.txt").exists()
    assert [line["step"] for line in logs.read_metrics(str(out))] == [1]
    shutil.rmtree(out / "checkpoints")
    refuses(capsys, cold_start.main, *flags(), "--resume", says="a model but no checkpoint")


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_command_that_is_refused_leaves_the_run_in_its_folder_as_it_is(
    world, with_cots, base_dir, two_steps, tmp_path, capsys
):
    """Told late: by the CSV, the lengths, the division into batches. Neither --overwrite nor --resume has begun yet."""
    go_on(two_steps, tmp_path)
    (tmp_path / "skipped.jsonl").write_text('{"video": "of the first run"}\n')
    before = files_of(tmp_path)
    for flag, wrong, says in (
        ("--resume", {"micro_pairs": 3, "lr": 1}, "not a multiple"),
        ("--resume", {"max_length": 9}, "exceed --max-length"),
        ("--overwrite", {"data": world["train_cold_start"]}, "has no CoT_A"),
        ("--overwrite", {"val": "typo.csv"}, "typo.csv: no such file"),
        ("--overwrite", {"batch_pairs": 64}, "do not fill one batch"),
        ("--overwrite", {"max_length": 9}, "exceed --max-length"),
    ):
        refuses(capsys, cold_start.main, *arguments(with_cots, base_dir, tmp_path, **wrong), flag, says=says)
        after = files_of(tmp_path)
        after = {str(path).removesuffix(".old"): content for path, content in after.items()}
        assert after == {str(path): content for path, content in before.items()}, wrong
        if flag == "--overwrite":
            (tmp_path / "skipped.jsonl").write_text('{"video": "of the refused one"}\n')
    cold_start.main([*arguments(with_cots, base_dir, tmp_path, max_steps=1), "--overwrite"])
    assert not list(tmp_path.glob("skipped*")) and len(logs.read_metrics(str(tmp_path))) == 1
    assert json.loads((tmp_path / "settings.json").read_text())["max_steps"] == 1


def test_a_kill_between_saving_and_logging_loses_no_line(with_cots, base_dir, two_steps, tmp_path):
    """The step's metrics lie in the checkpoint too: tests/kills.py found their line missing after a resume."""
    path = go_on(two_steps, tmp_path) / "metrics.jsonl"
    before = logs.read_metrics(str(tmp_path))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    cold_start.main([*arguments(with_cots, base_dir, tmp_path, max_steps=2), "--resume"])
    after = logs.read_metrics(str(tmp_path))
    assert [line["step"] for line in after] == [1, 2] and after[1]["loss"] == before[1]["loss"]


def test_a_kill_during_a_validation_loses_no_accuracy(with_cots, base_dir, tmp_path, monkeypatch):
    """The last one's is what the model card tells; its step is saved before, and no step is left for a resume."""
    due = {"val": with_cots["train_cold_start"], "max_steps": 2, "val_every": 1, "save_every": 1, "workers": 1}
    cold_start.main(arguments(with_cots, base_dir, tmp_path / "whole", **due))
    for killed in (1, 2):
        calls, real = [], cold_start.validate

        def validate(*args, killed=killed, calls=calls, real=real):
            calls.append(1)
            if len(calls) == killed:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cold_start, "validate", validate)
            cold_start.main(arguments(with_cots, base_dir, tmp_path / str(killed), **due))
        cold_start.main([*arguments(with_cots, base_dir, tmp_path / str(killed), **due), "--resume"])
        whole, cut = (logs.read_metrics(str(tmp_path / name)) for name in ("whole", str(killed)))
        for name in ("step", "loss", "val_accuracy"):
            assert [line.get(name) for line in cut] == [line[name] for line in whole], name
        assert "val_accuracy" in (tmp_path / str(killed) / "model/README.md").read_text()


def test_resume_with_other_settings(with_cots, base_dir, two_steps, tmp_path, capsys):
    """What decides what is learned is refused by name; a new rate is used, printed and kept."""
    flags = lambda **more: [*arguments(with_cots, base_dir, tmp_path, **more), "--resume"]
    go_on(two_steps, tmp_path)
    says = "begun with --batch-pairs 2, --mask-probability 0.5, --seed 0"
    refuses(capsys, cold_start.main, *flags(seed=1, batch_pairs=1, mask_probability=1), says=says)
    other = tmp_path / "other.csv"
    other.write_text(open(with_cots["train_cold_start"]).read().replace("one", "another"))
    refuses(capsys, cold_start.main, *flags(data=other), says="other.csv: is not what the run in")
    kept = weights(tmp_path)
    cold_start.main(flags(max_steps=3, lr=0, micro_pairs=2))
    assert "--lr was 0.001, from here on 0.0" in capsys.readouterr().out
    assert logs.read_metrics(str(tmp_path))[-1]["lr"] == 0
    assert all(torch.equal(kept[name], value) for name, value in weights(tmp_path).items())  # rate 0: nothing moved
    (line,) = (tmp_path / "changes.jsonl").read_text().splitlines()
    changed = json.loads(line)
    assert changed["after_step"] == 2 and changed["lr"] == [0.001, 0.0] and "seed" not in changed


def test_another_model_under_the_same_name_is_not_resumed(with_cots, base_dir, two_steps, tmp_path, capsys):
    """Stage 1 run again with --overwrite, or a hub name whose main branch moved: a checkpoint holds what is trained
    alone, so old adapters would go on over another base."""
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    flags = arguments(with_cots, base, tmp_path / "out", max_steps=2)
    path = go_on(two_steps, tmp_path / "out") / "settings.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"model": str(base)}))  # its content is the same
    cold_start.main([*flags, "--resume"])
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "visual" in name)
    save_file({**tensors, name: tensors[name] + 1}, base / "model.safetensors", {"format": "pt"})
    refuses(capsys, cold_start.main, *flags, "--resume", says="base: is not what the run in")


def test_pairs_that_come_or_go_between_two_halves_are_told(with_cots, base_dir, two_steps, tmp_path, capsys):
    """A clip that could be read at the start, and cannot any more: --skip-bad-videos then shuffles other pairs."""
    step = go_on(two_steps, tmp_path) / "checkpoints/step-000002/step.json"
    held = json.loads(step.read_text())
    assert held["num_pairs"] == 6  # a tie is left out
    step.write_text(json.dumps(held | {"num_pairs": 7}))
    cold_start.main([*arguments(with_cots, base_dir, tmp_path, max_steps=2), "--resume"])
    assert "6 pairs, 7 until step 2" in capsys.readouterr().out
    changes = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    assert {"after_step": 2, "num_pairs": [7, 6]} in changes


def test_as_many_other_pairs_between_two_halves_are_told(with_cots, base_dir, tmp_path, capsys):
    """A clip is back, another is gone: six pairs less one as before, but not the same five."""
    text = open(with_cots["train_cold_start"], encoding="utf-8").read()
    first, second = [pair.video_a for pair in data.read_pairs(with_cots["train_cold_start"]) if pair.label][:2]
    text = text.replace(first, str(tmp_path / "0.mp4")).replace(second, str(tmp_path / "1.mp4"))
    (tmp_path / "x.csv").write_text(text)
    shutil.copy(first, tmp_path / "0.mp4")
    flags = lambda **more: [*arguments({"train_cold_start": str(tmp_path / "x.csv")}, base_dir, tmp_path / "out",
                                       **more), "--skip-bad-videos"]
    cold_start.main(flags(max_steps=1))
    cold_start.main([*flags(max_steps=2), "--resume"])
    assert "are shuffled anew" not in capsys.readouterr().out
    os.rename(tmp_path / "0.mp4", tmp_path / "1.mp4")
    cold_start.main([*flags(max_steps=3), "--resume"])
    assert "5 pairs, 5 until step 2: others can be read" in capsys.readouterr().out
    step = tmp_path / "out/checkpoints/step-000003/step.json"
    held = json.loads(step.read_text())
    del held["pairs"]
    step.write_text(json.dumps(held))  # as code wrote it that counted them alone
    cold_start.main([*flags(max_steps=4), "--resume"])
    assert "are shuffled anew" not in capsys.readouterr().out


@pytest.mark.parametrize("flags", [{"loss": "bt"}, {"loss": "btt", "val": "same"}])
def test_ties_alone_are_told_before_a_model_is_opened(with_cots, base_dir, tmp_path, capsys, monkeypatch, flags):
    rows = list(csv.DictReader(open(with_cots["train_cold_start"], encoding="utf-8")))
    same = write_csv(tmp_path / "same.csv", list(rows[0]), [list((row | {"GSB": "same"}).values()) for row in rows])
    ties = {"train_cold_start": same}
    flags = {name: same if value == "same" else value for name, value in flags.items()}
    monkeypatch.setattr(cold_start.checkpoint, "open_on_rank", None)
    refuses(capsys, cold_start.main, *arguments(ties, base_dir, tmp_path / "out", **flags), says="ties alone")


@pytest.mark.parametrize("left_out", [{"CoT_A": "five " * 900}, {"videos": "['gone.mp4', 'gone.mp4']"}])
def test_validation_pairs_that_become_ties_alone_are_told_before_the_first_step(
    with_cots, base_dir, tmp_path, capsys, left_out
):
    """--skip-bad-videos leaves the only pair with a winner out."""
    rows = list(csv.DictReader(open(with_cots["train_cold_start"], encoding="utf-8")))[:3]
    rows = [row | {"GSB": "same"} for row in rows[1:]] + [rows[0] | {"GSB": "A"} | left_out]
    val = write_csv(tmp_path / "val.csv", list(rows[0]), [list(row.values()) for row in rows])
    flags = arguments(with_cots, base_dir, tmp_path / "out", loss="btt", val=val, max_length=2000)
    refuses(capsys, cold_start.main, *flags, "--skip-bad-videos", says="val.csv: in no pair that --skip-bad")
    assert not logs.read_metrics(str(tmp_path / "out"))


def test_a_run_of_code_that_drew_otherwise_is_not_resumed(with_cots, base_dir, two_steps, tmp_path, capsys):
    """Its second half would draw pairs that the first half had, and leave others out, without a word."""
    flags = arguments(with_cots, base_dir, tmp_path, max_steps=2)
    path = go_on(two_steps, tmp_path) / "settings.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in saved.items() if name != "draws"}))  # as before 5956bef
    refuses(capsys, cold_start.main, *flags, "--resume", says="was begun by code that drew pairs and masks otherwise")
    path.write_text(json.dumps(saved))
    cold_start.main([*flags, "--resume"])


def test_nothing_in_a_checkpoint_can_run(with_cots, base_dir, two_steps, tmp_path, capsys):
    """Random states are numbers and tensors; an index that names more than torch's own classes is refused unread."""
    folder = go_on(two_steps, tmp_path) / "checkpoints" / "step-000002"
    assert set(torch.load(folder / "random-0.pt", weights_only=True)) == {"python", "numpy", "torch"}

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (folder / "state" / ".metadata").write_bytes(pickle.dumps(Evil()))
    flags = [*arguments(with_cots, base_dir, tmp_path), "--resume"]
    refuses(capsys, cold_start.main, *flags, says="no checkpoint of this code")
    assert not (tmp_path / "ran").exists()


def test_full_training_resumes_bit_for_bit(with_cots, base_dir, tmp_path):
    """Stage 1 leaves lm_head alone: nothing of its loss reaches it, so there would be no Adam state to go on with."""
    cold_start.main(arguments(with_cots, base_dir, tmp_path / "whole", train="full", max_steps=2))
    cold_start.main(arguments(with_cots, base_dir, tmp_path / "parts", train="full", max_steps=1))
    cold_start.main([*arguments(with_cots, base_dir, tmp_path / "parts", train="full", max_steps=2), "--resume"])
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)
    start = DeScore.from_pretrained(base_dir, new_head=True).state_dict()
    changed = {name for name in start if not torch.equal(start[name], one[name])}
    assert any("embed_tokens" in name for name in changed) and not any("lm_head" in name for name in changed)


def test_validation_without_cots_is_said(with_cots, world, base_dir, tmp_path, capsys):
    cold_start.main(arguments(with_cots, base_dir, tmp_path, max_steps=1, val=world["train_cold_start"]))
    assert "validation is without thinking" in capsys.readouterr().out
