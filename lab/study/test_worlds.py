"""The second world: cells that run once, and again when they must; verdicts of made-up runs with known answers."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import cold_start
import data
import toy.world
from lab.study import __main__ as study
from lab.study import cells, coupled, models, pages, second, worlds
from lab.study.sanity import change_frames
from lab.study.test_study import N, made_up  # noqa: F401 (a fixture)
from lab.study.verdict import NOT_RUN, NOT_SEEN, SEEN, verdict, weakest
from model import DeScore
from plumbing.jobs import content_of
from plumbing.logs import read_metrics
from plumbing.settings import InputError, parse
from rules import read_verdicts, well_formed
from tests.conftest import ROOT, refuses
from tests.kills import alive


# -- cells ------------------------------------------------------------------------------------------------------
def cell(folder, name, code, *needs):
    """Runs `code`, and writes what it prints to `name`."""
    path = str(folder / name)
    script = folder / f"{name}.{len(list(folder.glob(f'{name}.*.py')))}.py"
    script.write_text(f"open({path!r}, 'w').write(str({code})); open({path!r} + '.ran', 'a').write('x')")
    return cells.Cell(path, [str(script)], path, tuple(str(folder / need) for need in needs), 1.0)


def ran(folder) -> dict:
    return {path.stem: len(path.read_text()) for path in folder.glob("*.ran")}


def test_a_finished_cell_is_never_run_again_and_a_damaged_one_is(tmp_path):
    first, second_ = cell(tmp_path, "a", "1"), cell(tmp_path, "b", "2", "a")
    assert cells.run_all([first, second_], 2, "abc") == [] and ran(tmp_path) == {"a": 1, "b": 1}
    record = json.loads((tmp_path / "b.cell.json").read_text())
    assert record["commit"] == "abc" and record["core_minutes"] > 0
    assert record["made_from"] == [[first.command, content_of(first.done)]]
    cells.run_all([first, second_], 2, "abc")
    assert ran(tmp_path) == {"a": 1, "b": 1}
    (tmp_path / "b").write_text("cut sho")  # its last file is not as it was left
    cells.run_all([first, second_], 2, "abc")
    assert ran(tmp_path) == {"a": 1, "b": 2} and (tmp_path / "b").read_text() == "2"
    (tmp_path / "a.cell.json").write_text('{"command": [')  # a kill while writing
    cells.run_all([first, second_], 2, "abc")
    assert ran(tmp_path) == {"a": 2, "b": 2}  # it wrote the same, so what was made from it stands
    cells.run_all([cell(tmp_path, "a", "7"), second_], 2, "abc")
    assert ran(tmp_path) == {"a": 3, "b": 3}  # another command, another file: what was made from it is stale
    cells.run_all([cell(tmp_path, "a", "6 + 1"), second_], 2, "abc")
    assert ran(tmp_path) == {"a": 4, "b": 4}  # its last file is the same, but others that it wrote may not be


def test_a_killed_cell_begins_from_nothing(tmp_path):
    path = str(tmp_path / "out")
    (tmp_path / "half.py").write_text(f"open({path + '/done'!r}, 'w')")
    half = cells.Cell(path, [str(tmp_path / "half.py")], f"{path}/done", (), 1.0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/left.txt").write_text("of the killed one")
    assert len(cells.run_all([half], 1, "abc")) == 1  # the folder was removed, and this command does not make it
    assert not (tmp_path / "out").exists()
    both = half._replace(path=str(tmp_path / "train.csv"), done=str(tmp_path / "val.csv"))  # as `World.think` does
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv.thoughts").mkdir()  # of another base: collect_cots.py refuses to go on with them
    cells.run_all([both], 1, "abc")
    assert not list(tmp_path.glob("*.thoughts"))


def test_nothing_goes_on_behind_a_killed_study(tmp_path):
    """A cell that wrote on would share its files with the next study's same cell."""
    (tmp_path / "slow.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")
    start = f"import subprocess; from lab.study.cells import child; subprocess.run(child(['{tmp_path}/slow.py']))"
    parent = subprocess.Popen([sys.executable, "-c", start], cwd=ROOT)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(pid))


def wait_for(condition, seconds=30):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.1)


def test_a_cell_that_fails_stops_only_what_needs_it(tmp_path):
    three = [cell(tmp_path, "bad", "1 / 0"), cell(tmp_path, "child", "1", "bad"), cell(tmp_path, "other", "1")]
    wrong = cells.run_all(three, 1, "abc")
    assert ran(tmp_path) == {"other": 1} and len(wrong) == 2
    assert "bad: ended with code 1" in wrong[0] and "ZeroDivision" in (tmp_path / "bad.cell.log").read_text()
    assert "needs a cell that failed" in wrong[1]


def test_the_plan():
    cells = worlds.plan("runs/x", list(worlds.SEEDS), None)
    known, by = set(), {cell.path.removeprefix("runs/x/"): cell for cell in cells}
    for cell_ in cells:
        assert set(cell_.needs) <= known, cell_.path  # in an order that can be followed
        known.add(cell_.path)
    assert "runs/x/seed0/base" in by["seed0/weights/stage1"].command  # one base for today's world and the weights'
    assert "runs/x/seed0/base_unspoken" in by["seed0/both/stage1"].command
    assert {"--weights", "--unspoken"} <= set(by["seed1/both/data"].command)
    assert not {"--weights", "--unspoken"} & set(by["seed1/today/data"].command)
    assert by["seed2/base_unspoken"].command.count("--unspoken") == 1
    masks = {path for path in by if path.startswith("seed0/looking/mask") and not path.endswith("at")}
    assert masks == {f"seed0/looking/mask{m}_{n}" for m, n in [
        (m, n) for n in (360, 1440, 2880) for m in (0, 50, 100)] + [(25, 2880), (75, 2880)]}
    order = [worlds.plan("runs/x", [stage], None)[-1].path for stage in ("grid", "cost", "looking")]
    places = [[cell.path for cell in cells].index(path) for path in order]
    assert places == sorted(places)


def test_trainings_are_the_demo_s():
    """The last of a flag given twice counts; scripts/demo.sh is read, so a change there is a change here."""
    commands = worlds.demo("R", 4)
    assert {"data", "base", "data/train_cots.csv", "discriminative", "stage1", "stage2"} <= commands.keys()
    s = study_settings(commands["stage1"])
    assert s.model == "R/base" and s.seed == 4 and s.epochs == 3 and s.mask_probability == 0.5
    by = {cell.path: cell for cell in worlds.plan("R", ["looking"], None)}
    s = study_settings(by["R/seed0/looking/mask25_2880"].command)
    assert (s.mask_probability, s.max_steps, s.lr, s.batch_pairs) == (0.25, 720, 5e-4, 8)
    assert s.out == "R/seed0/looking/mask25_2880" and s.val.endswith("val_cots.csv")
    assert study_settings(by["R/seed0/looking/mask100_360"].command).val.endswith("val_cold_start.csv")


def study_settings(command):
    return parse(cold_start.Settings, "", command[1:])


# -- what cells compute -------------------------------------------------------------------------------------------
def test_prose_says_nothing_and_changes_no_verdict(processor):
    rng, write = np.random.default_rng(0), second.prose(1, 0)
    wish = toy.world.random_wish(rng)
    seen = toy.world.random_clip(rng, wish)
    plain, long = toy.world.cot_text(wish, seen), write(wish, seen)
    assert well_formed(long) and read_verdicts(long) == toy.world.annotate(wish, seen)
    assert [line for line in long.split("\n") if not line.endswith(".")] == plain.split("\n")
    assert write(wish, seen) != long and second.prose(1, 0)(wish, seen) == long  # drawn anew, but by the seed
    counts = [np.mean([len(data.encode_cot(processor.tokenizer, w(wish, seen))) for _ in range(20)])
              for w in (toy.world.cot_text, second.prose(1, 0), second.prose(2, 0))]
    assert counts == pytest.approx(list(worlds.LONG), abs=25)


def test_checkpoints_become_the_models_that_they_were(world, base_dir, tmp_path):  # noqa: F811
    """The last one is the model that the run saved, and the others are not."""
    common = ["--rollouts", "2", "--batch-pairs", "1", "--mini-pairs", "1", "--max-new-tokens", "6"]
    plain = ["--workers", "0", "--max-steps", "2", "--save-every", "1", "--keep", "9"]
    coupled.main(["--model", base_dir, "--data", world["train_rl"], "--out", str(tmp_path / "c"), "--lr", "1e-2",
                  "--bt-coef", "1", *common, *plain])
    cold_start.main(["--model", base_dir, "--data", world["train_cold_start"], "--out", str(tmp_path / "s"),
                     "--batch-pairs", "2", "--mask-probability", "1", "--lr", "1e-2", *plain])
    for run in ("c", "s"):
        second.unpack(str(tmp_path / run), str(tmp_path / run / "at"))
        at = (f"{tmp_path}/{run}/{place}" for place in ("model", "at/2", "at/1"))
        whole, *steps = (DeScore.from_pretrained(path).state_dict() for path in at)
        assert all(torch.allclose(whole[name], steps[0][name], atol=1e-6) for name in whole), run
        assert any(not torch.allclose(whole[name], steps[1][name], atol=1e-6) for name in whole), run
    before = json.loads((tmp_path / "c/at/done").read_text())
    assert {"1/model.safetensors", "2/model.safetensors"} <= before.keys() and len(set(before.values())) == len(before)
    settings = [json.loads((tmp_path / run / "at/1/descore.json").read_text()) for run in ("c", "s")]
    assert settings[0]["score"] == "text" and "score" not in settings[1]


def test_early_stopping_takes_the_first_of_the_best(tmp_path):
    lines = [{"step": k, "loss": 1, **({"val_accuracy": v} if v else {})} for k, v in
             enumerate([None, 0.5, None, 0.8, 0.8, 0.7], 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert second.early(str(tmp_path)) == (4, 6)


def test_a_black_clip_is_black_and_the_cot_stays(world, tiny_model_dir):  # noqa: F811
    pairs = data.read_pairs(world["test_in_domain"])[:2]
    pairs = [data.PreferencePair(**{**vars(pair), "cot_a": "seen left", "cot_b": "seen right"}) for pair in pairs]
    model = DeScore.from_pretrained(tiny_model_dir)
    found = np.array(models.score_set({"m": model}, pairs, None, change="black clip")["rewards"]["m"])
    plain = np.array(models.score_set({"m": model}, pairs, None)["rewards"]["m"])
    for pair, rewards, as_it_is in zip(pairs, found, plain):
        videos = [data.sample_frames(path) for path in pair.videos]
        black = [data.Video(change_frames(v.frames, "black clip", "x"), *list(vars(v).values())[1:]) for v in videos]
        cots = [data.encode_cot(model.processor.tokenizer, cot) for cot in pair.cots]
        expected = model.score(model.encode(black, [pair.prompt] * 2), cots)
        assert rewards[:, 0] == pytest.approx(expected.tolist(), abs=1e-4)
        assert abs(rewards - as_it_is).max() > 1e-3


def test_flops_by_hand(tmp_path, monkeypatch):
    """(2 x 3) @ (3 x 4) is 2 * 24 FLOPs; five of them in two steps. A batch of products is attention's: not counted."""
    (tmp_path / "five.py").write_text("import torch\ndef main(argv):\n    assert argv[-2] == '--out'\n"
                                      "    for _ in range(5): torch.ones(2, 3) @ torch.ones(3, 4)\n"
                                      "    torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(second.layout, "causal_lower_right", second.layout.causal_lower_right)
    second.flops(str(tmp_path / "f.json"), 2, ["five"])
    assert second.load(tmp_path, "f.json")["each step"] == 5 * 48 / 2


def test_both_trainings_can_be_counted(world, base_dir, tmp_path, monkeypatch):  # noqa: F811
    """The counter works below autograd, where stage 2's causal mask of the CoTs behind a prefix cannot be made.
    Counting changes no number."""
    monkeypatch.setattr(second.layout, "causal_lower_right", second.layout.causal_lower_right)
    flags = ["--model", base_dir, "--data", world["train_rl"], "--rollouts", "2", "--batch-pairs", "1", "--mini-pairs",
             "1", "--max-new-tokens", "6", "--workers", "0", "--max-steps", "1", "--bt-coef", "1"]
    coupled.main([*flags, "--out", str(tmp_path / "plain")])
    second.flops(str(tmp_path / "f.json"), 1, ["lab.study.coupled", *flags])
    plain, counted = (read_metrics(str(tmp_path / run))[0] for run in ("plain", "f.json.run"))
    assert counted["grad_norm_total"] == pytest.approx(plain["grad_norm_total"], rel=1e-4)
    model = DeScore.from_pretrained(base_dir, new_head=True)
    layers = [m for m in model.backbone.model.language_model.modules() if isinstance(m, torch.nn.Linear)]
    token = 2 * sum(layer.weight.numel() for layer in layers)
    assert second.load(tmp_path, "f.json")["each step"] > 5 * token * 2 * 60  # two prefixes of over 60 tokens, 5 passes


# -- verdicts of made-up runs ---------------------------------------------------------------------------------------
def claim(number: int) -> tuple[str, study.Claim]:
    return next((stage, c) for stage, some in worlds.claims().items() for c in some if c.number == number)


def mark(folder, *cells, minutes=1.0):
    for name in cells:
        (folder / f"{name}.cell.json").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.cell.json").write_text(json.dumps({"core_minutes": minutes}))


def judge(number, tmp_path, seeds=(0, 1, 2)):
    stage, one = claim(number)
    return worlds.judged(one, {seed: str(tmp_path / f"seed{seed}") for seed in seeds}, stage)


def test_nothing_is_judged_before_it_has_run(tmp_path):
    for some in worlds.claims().values():
        for one in some:
            found = judge(one.number, tmp_path)
            assert found["verdict"] == NOT_RUN and found["parts"] == {}, one.number
            assert study.judge(one, {seed: str(tmp_path / f"seed{seed}") for seed in range(3)})["verdict"] == NOT_RUN


def test_a_head_against_its_text_in_each_world(made_up, tmp_path):  # noqa: F811
    """The made-up study has 17 of 20 pairs right by the head, 14 by its text and by the coupled model."""
    for seed in (0, 1, 2):
        for world_ in ("today", "weights", "unspoken"):
            folder = tmp_path / f"seed{seed}/{world_}"
            shutil.copytree(made_up[0], folder)
            if (seed, world_) != (2, "unspoken"):
                mark(folder, *second.JUDGED)
    found = judge(10, tmp_path)
    assert found["verdict"] == NOT_RUN and found["seeds"] == 2  # the third seed of one world is not judged yet
    assert found["parts"]["weights: DeScore - DeScore's own text"]["mean"] == pytest.approx(3 / N)
    mark(tmp_path / "seed2/unspoken", *second.JUDGED)
    found = judge(10, tmp_path)
    assert found["verdict"] == SEEN and judge(11, tmp_path)["verdict"] == SEEN
    assert found["more"]["accuracy"]["today"]["DeScore"] == pytest.approx([17 / N] * 3)
    assert "both: DeScore - DeScore's own text" not in found["parts"]


def hits(right: int) -> list[float]:
    return [1.0] * right + [0.0] * (100 - right)


def test_when_a_head_looks(tmp_path):
    """Of 100 pairs in a set: own CoT 80, black clip 60 under p .5 and 80 under p 0; absent 70 and 50; and so on."""
    right = {50: {"own": 80, "absent": 70, "swapped": 30, "black clip": 60, "wrong 2": 50},
             0: {"own": 80, "absent": 50, "swapped": 20, "black clip": 80, "wrong 2": 50},
             100: {"own": 10, "absent": 90, "swapped": 10, "black clip": 10, "wrong 2": 10}}
    for kinds in right.values():
        kinds["wrong 0"] = 90
    for seed in (0, 1, 2):
        folder = tmp_path / f"seed{seed}/looking"
        for mask, kinds in right.items():
            (folder / f"mask{mask}_2880").mkdir(parents=True)
            lines = [json.dumps({"step": 120 * k, "val_accuracy": v}) for k, v in ((1, .6), (2, .7), (3, .7), (4, .5))]
            (folder / f"mask{mask}_2880/metrics.jsonl").write_text("\n".join(lines) + "\n")
            row = {kind: hits(k) for kind, k in kinds.items()}
            sets = {name: {"model early": row, "model last": {k: v[::-1] for k, v in row.items()},
                           "text": {"own": hits(75), "wrong 0": hits(85), "wrong 2": hits(55)}}
                    for name in models.SETS}
            (folder / f"look_mask{mask}_2880.json").write_text(json.dumps(sets))
            mark(folder, f"look_mask{mask}_2880.json")
    expected = {12: (0.2, SEEN), 13: (0.2, SEEN), 14: (-0.05, NOT_SEEN), 15: (-0.1, NOT_SEEN)}
    for number, (mean, said) in expected.items():
        found = judge(number, tmp_path)
        assert found["parts"][found["decides"][0]]["mean"] == pytest.approx(mean), number
        assert found["verdict"] == said, number
    found = judge(12, tmp_path)
    parts = found["parts"]
    assert parts["own CoT + swapped CoT - 1: p 0.5, 2880 pairs"]["mean"] == pytest.approx(0.1)
    assert parts["own CoT + swapped CoT - 1: p 0, 2880 pairs"]["mean"] == pytest.approx(0)  # it turns with the text
    assert parts["the same, minus head - text, 0 wrong: p 0.5, 2880 pairs"]["mean"] == pytest.approx(-0.05 - 0.05)
    assert found["more"]["stopped at"]["p 0.5, 2880 pairs"] == [240] * 3
    assert parts["with CoT - the stated score: p 0.5, 2880 pairs"]["mean"] == pytest.approx(0.05)  # 80 - 75
    assert parts["black clip costs: p 0, 2880 pairs"]["mean"] == 0 and "black clip costs: p 0.5, 360 pairs" not in parts
    assert parts["absent CoT, - p 0: p 1, 2880 pairs"]["mean"] == pytest.approx(0.4)


def efficiency_run(folder, bt: dict, own: dict, made_up, minutes):  # noqa: F811
    """A run of 4 steps of BT and 2 of the coupled model with known costs; `bt`, `own`: {step: right of N}."""
    shutil.copytree(made_up, folder)
    sets = {name: {str(step): {"own": [1.0] * k + [0.0] * (N - k)} for step, k in bt.items()} |
            {"text": {"own": [1.0] * own[0] + [0.0] * (N - own[0])}} for name in models.SETS}
    (folder / "study/curve.json").write_text(json.dumps(sets))
    for step, k in own.items():
        if step:
            place = folder / f"study/eval/coupled{'_at_1' * (step == 1)}"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(pathlib.Path(made_up) / "eval/stage2", place)
            rewrite(place, k)
            mark(folder, f"study/eval/{place.name}")
    thoughts = folder / "data/train_cots.csv.thoughts"
    thoughts.mkdir()
    lines = [{"video": f"{k}.mp4", "prompt": "p", "thoughts": ["x"], "tokens": [50]} for k in range(10)]
    (thoughts / "thoughts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, steps, settings, more in (("stage1", 4, {"batch_pairs": 8}, {}), (
            "study/coupled", 2, {"batch_pairs": 6, "rollouts": 8}, {"cot_tokens": 50.0})):
        (folder / name / "metrics.jsonl").write_text("".join(
            json.dumps({"step": k, "loss": 1.0, **more}) + "\n" for k in range(1, steps + 1)))
        (folder / name / "settings.json").write_text(json.dumps(settings))
    for name, each in (("train_cots", 100.0), ("stage1", 10.0), ("coupled", 1000.0)):
        (folder / f"study/flops_{name}.json").write_text(json.dumps({"each step": each}))
        mark(folder, f"study/flops_{name}.json")
    for name, spent in minutes.items():
        mark(folder, name, minutes=spent)
    mark(folder, "study/curve.json")


def rewrite(place, right: int):
    """`right` of the N pairs of each set are told apart by the texts of an evaluation, the others the wrong way."""
    for path in place.glob("*/thoughts.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for k in range(N):
            a_is_better = (k % 2 == 0) == (k < right)
            for line, score in zip(lines[2 * k : 2 * k + 2], (4.0, 2.0) if a_is_better else (2.0, 4.0)):
                line["thoughts"] = [f'<answer>{{"overall_score": {score}}}</answer>']
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_equal_budgets_by_hand(made_up, tmp_path):  # noqa: F811
    """BT: 500 tokens for the base's CoTs, then none; 100 FLOPs, then 10 a step; 1 core-minute, then .5 a step.
    The coupled model: 6 * 2 * 8 * 50 = 4,800 tokens, 1,000 FLOPs and 10 core-minutes a step. The cheaper run is BT's
    but for pairs (32 against 12), so its budget buys BT's last model and the base's own text; with 12 pairs BT is at
    step 1 of 8 pairs (10 of 20 right), the coupled model at its last (18 of 20). Rounded up, the other budgets buy the
    coupled model's step 1 (15 of 20)."""
    minutes = {"data/train_cots.csv": 1.0, "stage1": 2.0, "study/coupled": 20.0}
    for seed in (0, 1, 2):
        folder = tmp_path / f"seed{seed}/today"
        efficiency_run(folder, {1: 10, 2: 12, 4: 17}, {0: 13, 1: 15, 2: 18}, made_up[0], minutes)
    run = str(tmp_path / "seed0/today")
    spent = second.costs(run, {"train_cots": 100, "stage1": 10, "coupled": 1000})
    assert spent["BT"][0] == [0, 500, 100, 60] and spent["BT"][4] == [32, 500, 140, 180]
    assert spent["coupled"][2] == [12, 9600, 2000, 1200]
    assert {who: {step: round(second.mean(sets) * N) for step, sets in steps.items()}
            for who, steps in second.curves(run).items()} == {"BT": {0: 10, 1: 10, 2: 12, 4: 17},
                                                              "coupled": {0: 13, 1: 15, 2: 18}}
    found = judge(9, tmp_path)
    means = {name: row["mean"] for name, row in found["parts"].items()}
    assert means == pytest.approx({"BT - coupled, equal pairs": (10 - 18) / N} | {
        f"BT - coupled, equal {unit}": (17 - 13) / N for unit in second.UNITS[1:]} | {
        f"BT - coupled, equal {unit}, coupled rounded up": (17 - 15) / N for unit in second.UNITS[1:]})
    assert found["more"]["bought"] == {"pairs": [[1, 2, 2]] * 3, **{u: [[4, 0, 1]] * 3 for u in second.UNITS[1:]}}
    assert found["verdict"] == SEEN and not any("pairs" in name for name in found["decides"])
    reached = found["more"]["reaches"]
    assert reached["BT: FLOPs"] == [None] * 3 and reached["coupled: FLOPs"] == [2000] * 3


def test_a_base_that_cannot_judge_ends_its_cell(tmp_path, monkeypatch, capsys):
    """Else malformed or guessed texts, whose groups are flat, would pass for a noisy gradient."""
    found = {"2 or N/A": 0.6, "greedy accuracy": 0.69}
    monkeypatch.setattr(second.toy.__main__, "main", lambda *_: (tmp_path / "measured.json").write_text(
        json.dumps(found)))
    words = ["base", "1", "0", "--seed", "0", "--out", str(tmp_path)]
    refuses(capsys, second.main, *words, says="no claim can be asked of it")
    second.main([*words[:-2], "--pool", "64", *words[-2:]])  # a trial
    found["greedy accuracy"] = 0.71
    second.main(words)


def test_length_and_noise(tmp_path):
    for seed in (0, 1, 2):
        for tokens, cosine in (("today", 0.4), ("long1", 0.4), ("long2", 0.1 + 0.01 * seed)):
            folder = tmp_path / f"seed{seed}/{tokens}"
            (folder / "study").mkdir(parents=True)
            rows = {name: {"cosine": [cosine] * 32} for name in ("GRPO, preference", "GRPO, rules", "BT")}
            (folder / "study/gradients.json").write_text(json.dumps(rows))
            mark(folder, "study/gradients.json")
            base = tmp_path / f"seed{seed}/base{'' if tokens == 'today' else '_' + tokens}"
            base.mkdir()
            (base / "measured.json").write_text(json.dumps({"greedy accuracy": 0.8, "sampled valid format": 0.9}))
    found = judge(16, tmp_path)
    assert found["more"]["base"]["440"] == {"greedy accuracy": [0.8] * 3, "sampled valid format": [0.9] * 3}
    assert found["verdict"] == SEEN and found["margin"] == 0
    assert found["parts"]["cosine of GRPO, preference: 55 - 440 tokens"]["mean"] == pytest.approx(0.29)
    assert found["parts"]["cosine of BT: 55 - 250 tokens"]["mean"] == 0
    assert found["parts"]["cosine: BT - GRPO, rules, 440 tokens"]["mean"] == 0


def test_six_seeds_are_six(made_up, tmp_path):  # noqa: F811
    for seed in range(6):
        shutil.copytree(made_up[0], tmp_path / f"seed{seed}/today")
        mark(tmp_path / f"seed{seed}/today", *second.JUDGED, *["study/heads.json"] * (seed < 5))
    found = judge(18, tmp_path, range(6))
    assert found["verdict"] == NOT_RUN and found["seeds"] == 5
    mark(tmp_path / "seed5/today", "study/heads.json")
    found = judge(18, tmp_path, range(6))
    assert found["verdict"] == SEEN and found["planned"] == 6 and len(found["parts"]["DeScore - discriminative"][
        "by_seed"]) == 6
    assert judge(19, tmp_path, range(6))["parts"] and judge(20, tmp_path, range(6))["parts"]


def test_the_whole_report_of_a_run_that_has_just_begun(tmp_path, capsys, monkeypatch):
    """Rules first, in a file, too; a report of nothing says so."""
    monkeypatch.setattr(worlds, "run_all", lambda cells, jobs, now: ["one is missing."])
    with pytest.raises(InputError, match="1 cells are missing"):
        worlds.main(["--runs", str(tmp_path / "r"), "--only", "grid"])
    rules = json.loads((tmp_path / "r/rules.json").read_text())
    assert [rule["number"] for rule in rules["rules"]] == [10, 11, 9, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    assert all(rule["verdict"] == NOT_RUN and rule["rule"] for rule in rules["rules"])
    said = capsys.readouterr().out
    assert said.index("rule:") < said.index("core-hours") < said.index("0 of 363 cells done")
    claims = json.loads((tmp_path / "r/worlds.json").read_text())["claims"]
    assert {(c["stage"], c["cells"]["done"]) for c in claims} == {(stage, 0) for stage in worlds.SEEDS}
    assert (tmp_path / "r/worlds.png").is_file()


def test_a_run_keeps_its_rules(tmp_path, monkeypatch):
    monkeypatch.setattr(worlds, "run_all", lambda *_: [])
    flags = ["--runs", str(tmp_path), "--only", "grid"]
    worlds.main(flags)
    first = (tmp_path / "rules.json").read_text()
    monkeypatch.setattr(study, "commit", lambda: "another")
    worlds.main(flags)
    assert (tmp_path / "rules.json").read_text() == first  # of the commit under which the first cell ran
    (tmp_path / "rules.json").write_text(first.replace("both above 0", "one above 0"))
    with pytest.raises(InputError, match="rules.json: its cells ran under other rules"):
        worlds.main(flags)


def test_a_cell_of_another_command_is_not_judged(tmp_path):
    plan = {c.path: c for c in worlds.plan(str(tmp_path), ["grid"], None)}
    runs, names = {0: str(tmp_path / "seed0")}, ("base", "data", "eval/stage2")
    for name in names:
        one = plan[str(tmp_path / f"seed0/{'today/' * (name != 'base')}{name}")]
        pathlib.Path(one.done).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(one.done).write_text("{}")
        more = ["--bt-coef", "9"] * (name == "eval/stage2")
        record = cells.stamp(one) | {"commit": "abc", "core_minutes": 1.0}
        pathlib.Path(one.record).write_text(json.dumps(record | {"command": one.command + more}))
    worlds.main(["--runs", str(tmp_path), "--only", "grid", "--report"])
    done = {c["stage"]: c["cells"]["done"] for c in json.loads((tmp_path / "worlds.json").read_text())["claims"]}
    assert done == {"grid": 2, "cost": 2, "looking": 0, "long": 2, "seeds": 2}  # the stages share today's cells
    assert second.ready(runs, "today", "data") and not second.ready(runs, "today", "data", "eval/stage2")
    second.STALE = set()
    worlds.main(["--runs", str(tmp_path), "--only", "looking", "--report"])  # claims of other stages are judged, too
    assert not second.ready(runs, "today", "eval/stage2")
    second.STALE = set()


def test_what_was_made_from_a_stale_cell_is_not_judged(tmp_path):
    """Seen: two seeds' gradients of an old base stood beside the third's of a new one, and gave a verdict."""
    plan = {os.path.relpath(c.path, tmp_path): c for c in worlds.plan(str(tmp_path), ["grid"], None)}
    for name in ("base", "today/data", "today/data/train_cots.csv", "today/stage1"):
        one = plan[f"seed0/{name}"]
        pathlib.Path(one.done).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(one.done).write_text("{}")
        record = cells.stamp(one) | {"commit": "abc", "core_minutes": 1.0}
        pathlib.Path(one.record).write_text(json.dumps(record))
    for gone, left in ((None, 4), (plan["seed0/base"].record, 1)):
        if gone:
            os.remove(gone)  # as where its command is another now, and ended without success
        worlds.main(["--runs", str(tmp_path), "--only", "grid", "--report"])
        claims = json.loads((tmp_path / "worlds.json").read_text())["claims"]
        assert claims[0]["cells"]["done"] == left  # data alone
    assert not second.ready({0: str(tmp_path / "seed0")}, "today", "stage1")
    second.STALE = set()


# -- pages ----------------------------------------------------------------------------------------------------------
PUBLISHED = pages.read(ROOT / "lab/study/worlds.json")


def test_what_the_page_shows_stands_in_worlds_json():
    text = (ROOT / "lab/study/README.md").read_text(encoding="utf-8")
    assert text.count("<!-- FROM WORLDS: ") >= 4
    assert pages.filled(text, PUBLISHED, "WORLDS") == text, "run `python -m lab.study --runs RUNS --publish`"


def test_a_claim_that_waits_for_seeds_is_not_published(tmp_path, monkeypatch):
    """Its rows are of the seeds that happen to be there; the run's own report has them. What an earlier run has
    published stays: a run of one stage, perhaps in a folder of its own, does not take the others away."""
    for page in pages.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    old = {claim["number"]: claim for claim in PUBLISHED["claims"]}
    here = {number: {"verdict": NOT_RUN, "parts": {"some": old[9]["parts"]}} for number in (10, 11)}
    claims = [claim | here.get(claim["number"], {}) for claim in PUBLISHED["claims"]]
    (tmp_path / "worlds.json").write_text(json.dumps(PUBLISHED | {"claims": claims}))

    def published():
        pages.publish(str(tmp_path))
        return {claim["number"]: claim for claim in pages.read(tmp_path / "lab/study/worlds.json")["claims"]}

    kept = published()  # nothing was there before
    assert kept[10]["parts"] == kept[10]["more"] == {} and kept[9] == old[9]
    other = [old[10], old[11] | {"rule": "another"}]
    (tmp_path / "lab/study/worlds.json").write_text(json.dumps(PUBLISHED | {"claims": other}))
    kept = published()
    assert kept[10] == old[10] and kept[11]["parts"] == {} and kept[9] == old[9]  # another rule: another question


def test_what_decides_runs_first_in_all_seeds():
    paths = [cell.path for cell in worlds.plan("R", ["looking"], None)]
    order = [re.search(r"seed(\d)/looking/look_mask(\d+)_(\d+)", path) for path in paths]
    found = [tuple(map(int, m.groups())) for m in order if m]
    first, last = [(seed, p, 2880) for seed in range(3) for p in (0, 50, 100)], [(0, 25, 2880), (0, 75, 2880)]
    assert found[:12] == first + [(seed, 50, 360) for seed in range(3)]  # and the contrast to it
    assert found[-2:] == last and len(set(found)) == len(found) == 29
    paths = [cell.path for cell in worlds.plan("R", ["long"], None)]
    noise = [path.split("/")[1:3] for path in paths if "gradients" in path]
    assert noise[:6] == [[f"seed{seed}", world] for seed in range(3) for world in ("today", "long2")]


def test_a_row_that_two_claims_share_is_shown_and_counted_once():
    row = {"mean": 0.1, "low": 0.05, "high": 0.2, "n": 90, "seeds": 3, "by_seed": [0.1, 0.11, 0.09], "verdict": SEEN}
    other = row | {"mean": 0.2}
    both = {"x": row, "y": other}
    claims = [{"number": k, "stage": stage, "margin": 0.03, "decides": decides, "parts": parts}
              for k, stage, decides, parts in ((1, "a", ["x"], both), (2, "a", ["y"], both), (3, "b", [], {"x": row}))]
    lines = pages.parts({"claims": claims}).splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [["| 1, 2", "**x**"], ["| 1, 2", "**y**"], ["| 3", "x"]]
    assert pages.many({"claims": claims}).startswith("3 intervals")
    assert lines[0].endswith(f"| {SEEN} |")
    both["x, not stopped early"] = row  # in the JSON alone
    assert len(pages.parts({"claims": claims}).splitlines()[2:]) == len(lines)
    both["x"] = row | {"seeds": 1, "by_seed": [0.1]}
    assert pages.parts({"claims": claims}).splitlines()[2].endswith("| one seed | 90 | - |")  # and no verdict


def test_worlds_json_belongs_to_this_code():
    """The rules are those of the code, and a verdict follows from its rows, all of whose seeds have run."""
    now = [(stage, study.entry(one)) for stage, some in worlds.claims().items() for one in some]
    for (stage, known), found in zip(now, PUBLISHED["claims"], strict=True):
        keys = ("number", "claim", "paper", "rule", "decides", "margin")
        assert [found[key] for key in keys] == [known[key] for key in keys] and found["stage"] == stage
        for row in found["parts"].values():
            assert row["verdict"] == verdict(row, found["margin"])
        rows = [found["parts"][name] for name in found["decides"] if name in found["parts"]]
        whole = len(rows) == len(found["decides"]) and min(row["seeds"] for row in rows) == len(worlds.SEEDS[stage])
        assert found["verdict"] == (weakest([row["verdict"] for row in rows]) if whole else NOT_RUN), found["number"]
    assert PUBLISHED["trial"] is None
