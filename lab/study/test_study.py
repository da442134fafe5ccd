"""The study: verdicts on synthetic data, corrupted CoTs, noise by hand, commands that change what they say, and pages
that hold no number of their own."""

import collections
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import torch

import cold_start
import collect_cots
import data
import evaluate
import grpo
import toy.world
from lab.study import __main__ as study
from lab.study import coupled as coupled_model
from lab.study import cells, measures, models, pages
from lab.study.verdict import (
    CANNOT_TELL,
    MARGIN,
    NOT_RUN,
    NOT_SEEN,
    SEEN,
    interquartile_mean,
    interval,
    interval_of_seeds,
    pooled,
    summary,
    summary_of_seeds,
    verdict,
    weakest,
)
from model import DeScore
from plumbing import formats
from plumbing.settings import parse
from rules import read_verdicts, well_formed
from tests.conftest import ROOT


# -- verdicts -------------------------------------------------------------------------------------
def differences(rng, effect, n=300, seeds=3, spread=0.0):
    """Paired differences of hits in {-1, 0, 1} whose mean is `effect` in the long run, in three sets of each seed."""
    values = {}
    for seed in range(seeds):
        shift = effect + spread * rng.standard_normal()
        drawn = rng.choice([-1, 0, 1], (3, n), p=[0.2 - shift / 2, 0.6, 0.2 + shift / 2])
        values[seed] = dict(zip("abc", drawn))
    return values


def test_verdicts_of_effects_that_are_known():
    rng = np.random.default_rng(0)
    assert verdict(summary(differences(rng, 0.2))) == SEEN
    assert verdict(summary(differences(rng, -0.1))) == NOT_SEEN  # the opposite is not the claim
    assert verdict(summary(differences(rng, 0.0, n=3000))) == NOT_SEEN  # so many pairs rule an effect of .03 out
    assert verdict(summary(differences(rng, 0.0, n=40))) == CANNOT_TELL
    three_that_disagree = {0: {"a": np.full(900, 0.1)}, 1: {"a": np.full(900, -0.1)}, 2: {"a": np.full(900, 0.1)}}
    assert verdict(summary(three_that_disagree)) == CANNOT_TELL  # however sure each of them is
    nothing = summary({0: {"a": np.ones(5), "b": np.array([])}})  # five values, all alike: no interval
    assert nothing["mean"] is None and nothing["n"] == 5 and verdict(nothing) == CANNOT_TELL


def test_verdict_rules_by_hand():
    row = {"mean": 0.0, "low": 0.01, "high": 0.02}
    assert verdict(row) == SEEN  # small, but there
    assert verdict(row | {"low": -0.02}) == NOT_SEEN and MARGIN == 0.03
    assert verdict(row | {"low": -0.02, "high": 0.03}) == CANNOT_TELL
    assert weakest([SEEN, SEEN]) == SEEN and weakest([SEEN, CANNOT_TELL]) == CANNOT_TELL
    assert weakest([CANNOT_TELL, NOT_SEEN, SEEN]) == NOT_SEEN


def test_means_by_hand():
    values = {0: {"a": np.array([1.0, 0.0]), "b": np.array([1.0])}, 1: {"a": np.array([0.0, 0.0]), "b": np.array([])}}
    assert pooled(values) == pytest.approx((0.75 + 0) / 2)  # a set of one pair counts as much as one of two
    assert interquartile_mean([0, 1, 2, 3, 100]) == 2.0  # 5 // 4 = 1 at each end
    assert interquartile_mean([1, 2, 3]) == 2.0


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """95 % within chance; pairs alone (one seed), and seeds that really differ (with 8 of them; few are too few)."""
    rng, inside, many = np.random.default_rng(1), 0, 0
    for _ in range(60):
        low, high = interval(differences(rng, 0.1, n=80, seeds=1), draws=200)
        inside += low <= 0.1 <= high
        low, high = interval(differences(rng, 0.1, n=40, seeds=8, spread=0.1), draws=200)
        many += low <= 0.1 <= high
    assert inside >= 52 and many >= 48
    same = {0: {"a": np.zeros(50)}, 1: {"a": np.ones(50)}}
    assert interval(same) == (0.0, 1.0)  # between seeds, not only between pairs


def test_the_interval_s_width_by_hand():
    """100 hits, half of them right: the mean's standard error is .05. Two such seeds, each drawn anew: .05 / √2."""
    half = np.repeat([0.0, 1.0], 50)
    for seeds in (1, 2, 3):  # a seed drawn twice but not redrawn would give .75 of the variance of one seed, not half
        low, high = interval({seed: {"a": half} for seed in range(seeds)}, draws=20_000)
        assert (high - low) / 2 == pytest.approx(1.96 * 0.05 / seeds**0.5, rel=0.04)  # 90 % would be 16 % narrower


def test_the_interval_of_seeds_alone_is_student_s():
    low, high = interval_of_seeds([0.071, 0.032, 0.013])  # mean .0387, s .0296: 4.303 * .0296 / √3 = .0734
    assert (low, high) == pytest.approx((-0.0348, 0.1121), abs=2e-4)
    assert interval_of_seeds([0.1]) is None and verdict(summary_of_seeds([0.1])) == CANNOT_TELL
    rng = np.random.default_rng(0)
    inside = [low <= 0 <= high for low, high in map(interval_of_seeds, rng.standard_normal((4000, 3)))]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)
    row = summary({seed: {"a": np.full(20, seed / 10)} for seed in range(3)})
    assert row["by_seed"] == pytest.approx([0, 0.1, 0.2])


def test_cosines_share_their_draws():
    """Values of the kernel (a + b) / 2 of 32 draws: the mean over pairs is the draws' mean, whose standard error is
    s / sqrt 32; each draw's mean over the others lies half as far out, so that a bootstrap of those would halve it."""
    draws = np.random.default_rng(0).normal(size=32)
    others = (draws.sum() - draws) / 31
    values = measures.of_draws((draws + others) / 2)
    assert values.mean() == pytest.approx(draws.mean())
    assert values.std() == pytest.approx(draws.std(), rel=0.05)


def test_cosines_have_no_margin_of_accuracies():
    (claim,) = [claim for claim in study.CLAIMS if "cosine" in claim.decides[0]]
    assert claim.margin == 0 and {c.margin for c in study.CLAIMS if c is not claim} == {MARGIN}
    row = {"mean": 0.0, "low": -0.01, "high": 0.02}
    assert verdict(row, claim.margin) == CANNOT_TELL and verdict(row) == NOT_SEEN
    assert verdict(row | {"high": -0.005}, claim.margin) == NOT_SEEN


# -- measurements -------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", range(6))
def test_corrupted_cots_are_wrong_where_they_should_be_and_agree_with_themselves(wrong):
    rng = np.random.default_rng(wrong)
    for _ in range(30):
        wish = toy.world.random_wish(rng)
        seen = toy.world.random_clip(rng, wish)
        claimed = models.corrupt(wish, seen, wrong, rng)
        truth, told = toy.world.annotate(wish, seen), toy.world.annotate(wish, claimed)
        asked = sum(value is not None for value in wish.values())
        assert sum(truth[n] != told[n] for n in truth) == min(wrong, asked)
        text = toy.world.cot_text(wish, claimed, told)
        assert well_formed(text) and read_verdicts(text) == told and toy.world.cot_text(wish, claimed) == text


def test_any_dimension_may_be_the_wrong_one():
    rng, count, wishes = np.random.default_rng(0), collections.Counter(), 300
    for _ in range(wishes):
        wish = toy.world.random_wish(rng)
        seen = toy.world.random_clip(rng, wish)
        claimed = models.corrupt(wish, seen, 1, rng)
        asked = [name for name in seen if wish[name]]
        count.update({name: len(asked) for name in seen if claimed[name] != seen[name]})
    assert all(count[name] / wishes == pytest.approx(1, abs=0.5) for name in toy.world.DIMENSIONS), count


def test_gradients_are_taken_at_stage_1_s_model(world, tiny_model_dir, tmp_path):
    """Its folder holds no other model. Half of the CoTs of a random model are rubbish, and that will do."""
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1/model").symlink_to(tiny_model_dir)
    (tmp_path / "data").symlink_to(pathlib.Path(world["train_rl"]).parent)
    (tmp_path / "study").mkdir()
    (tmp_path / "stage2").mkdir()
    own = grpo.Settings(batch_pairs=1, rollouts=2, max_new_tokens=4)
    (tmp_path / "stage2/settings.json").write_text(json.dumps(vars(own)))
    models.gradients(str(tmp_path), draws=2)
    rows = measures.load(str(tmp_path), "gradients.json")
    assert "BT" in rows and len(rows) == 3 and all(len(row["cosine"]) == 2 for row in rows.values())


def test_corrupted_texts_start_with_the_true_cot(world):
    pairs = data.read_pairs(world["test_in_domain"])
    texts = models.corrupted_texts(world["test_in_domain"].replace(".csv", ".truth.jsonl"), 0)
    for pair in pairs:
        assert [read_verdicts(text) for text in texts[pair.line][0]] == [pair.annotation_a, pair.annotation_b]
        assert all(read_verdicts(text) != pair.annotation_a for text, _ in texts[pair.line][1:])


def test_signal_and_noise_by_hand():
    # mean (1, 1); noise = (1 + 1) / 1 = 2; signal = 2 - 2 / 2 = 1; cosine of (1, 0) and (1, 2) = 1 / sqrt 5
    found = models.signal_and_noise(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    assert (found["noise"], found["signal"], found["noise_to_signal"]) == pytest.approx((2, 1, 2))
    assert found["cosine"] == pytest.approx([5**-0.5] * 2)
    opposite = models.signal_and_noise(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert opposite["noise_to_signal"] is None and opposite["cosine"] == pytest.approx([-1, -1])
    drawn = 3 * torch.eye(1, 200) + torch.randn(4000, 200, generator=torch.Generator().manual_seed(0))
    assert models.signal_and_noise(drawn)["noise_to_signal"] == pytest.approx(200 / 9, rel=0.05)


def test_scores_of_a_set_are_the_model_s_own(world, tiny_model_dir):
    pairs = data.read_pairs(world["test_in_domain"])[:2]
    pairs = [dataclasses.replace(pair, cot_a="seen left", cot_b="seen right, twice") for pair in pairs]
    model = DeScore.from_pretrained(tiny_model_dir)
    found = models.score_set({"m": model}, pairs, None, chunk=2)
    encode = lambda cot: data.encode_cot(model.processor.tokenizer, cot)  # noqa: E731
    assert found["kinds"] == ["own", "absent", "swapped"]
    for pair, rewards in zip(pairs, np.array(found["rewards"]["m"])):
        for kind, cots in enumerate((pair.cots, (None, None), pair.cots[::-1])):
            expected = model.score(model.encode(pair.videos, [pair.prompt] * 2), [encode(cot) for cot in cots])
            assert rewards[:, kind] == pytest.approx(expected.tolist(), abs=1e-4), found["kinds"][kind]


def test_step_to_step_spread_by_hand():
    assert measures.step_to_step([1.0, 2.0, 3.0]) == 0.0  # a trend is no noise
    assert measures.step_to_step([0.0, 1.0, 0.0]) == pytest.approx(2**-0.5)
    rng = np.random.default_rng(0)
    curve = np.linspace(0, 5, 4000) + 0.3 * rng.standard_normal(4000)  # noise that is known, on a trend
    assert measures.step_to_step(curve) == pytest.approx(0.3, rel=0.05)


def test_minutes_name_the_commit_that_ran(tmp_path):
    (tmp_path / "one.py").write_text(f"open({str(tmp_path / 'study/eval/one')!r}, 'w')")
    assert cells.run_all([study.cell(str(tmp_path), "eval/one", [str(tmp_path / "one.py")])], 1, "abc1234") == []
    found = measures.minutes({0: str(tmp_path)})
    assert list(found) == ["eval_one"] and found["eval_one"]["commits"] == ["abc1234"]
    (spent,) = found["eval_one"]["minutes"]
    assert 0 < spent < 1


def test_calibration_slope():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 20_000)
    labels = np.where(rng.random(20_000) < 1 / (1 + np.exp(-0.5 * margins)), 1, -1)  # margins twice too large
    rewards = np.stack([margins, np.zeros(20_000)], 1)
    assert measures.calibration_slope(labels, rewards) == pytest.approx(0.5, abs=0.03)


# -- claims ---------------------------------------------------------------------------------------
N, LABELS = 20, np.array([1, -1] * 10)  # decided pairs of each made-up test set; one more is a tie


WIDTH = dict(zip(models.SETS, (1, 2, 4)))  # of the margins without BT: a calibration slope of its own in each set


def scores_of(right: int, equal: int = 0) -> np.ndarray:
    """(N, 2) scores of which the first `right` are right, the next `equal` equal, the others wrong."""
    sign = np.array([1] * right + [0] * equal + [-1] * (N - right - equal)) * LABELS
    return np.stack([3 + 0.25 * sign, 3 - 0.25 * sign], 1)


def write_log(folder, pairs, heads=None, texts=None):
    """What an evaluation leaves: rewards.jsonl, thoughts.jsonl, report.json. The tie's videos get 9 and 1."""
    folder.mkdir(parents=True)
    for name, scores in (("rewards", heads), ("thoughts", texts)):
        if scores is None:
            continue
        lines = []
        for pair, row in zip(pairs, [*scores.tolist(), (9, 1)]):
            for video, score in zip(pair.videos, row):
                said = {"reward": score} if name == "rewards" else {"thoughts": [f'<answer>{{"dimensional_scores": '
                        f'{{"style": "0"}}, "overall_score": {min(score, 5):.2f}}}</answer>']}
                lines.append(json.dumps({"video": str(video), "prompt": pair.prompt} | said) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "report.json").write_text("{}")


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A finished study whose numbers are known: of N pairs in each set so many are right."""
    run = tmp_path_factory.mktemp("study") / "seed0"
    sets = {}
    (run / "data").mkdir(parents=True)
    for name, csv_name in models.CSVS.items():
        rows = [f"{name}/{k}a.mp4,{name}/{k}b.mp4,prompt {k % 7},{'A' if k < N and LABELS[k] > 0 else 'B'}"
                for k in range(N)] + [f"{name}/ta.mp4,{name}/tb.mp4,prompt 3,same"]
        (run / f"data/{csv_name}.csv").write_text("path_A,path_B,prompt,TA\n" + "\n".join(rows) + "\n")
        sets[name] = data.read_pairs(f"{run}/data/{csv_name}.csv")
        for folder, heads, texts in (
            ("eval/discriminative", scores_of(10), None), ("eval/stage1", scores_of(15), None),
            ("eval/stage2", scores_of(17), scores_of(12, equal=4)),
            ("study/eval/no_anchor", scores_of(14) * WIDTH[name], None),
            ("study/eval/coupled", scores_of(0), scores_of(13, equal=2)),
        ):
            write_log(run / folder / name, sets[name], heads, texts)
    right = {"discriminative": (4, 11, 9), "stage1": (16, 12, 5), "mask_0": (15, 9, 3), "stage1_4": (14, 8, 7),
             "stage2": (17, 13, 6)}  # own, absent, swapped
    found = {}
    for name in sets:
        kinds, wrong = ["own", "absent", "swapped"], [19, 14, 12, 8, 5, 2] if name == "in-domain" else []
        rewards = {model: np.stack([scores_of(k) for k in (*counts, *wrong)], 2).tolist()
                   for model, counts in right.items()}
        found[name] = {"kinds": kinds + [f"wrong {k}" for k in range(len(wrong))], "labels": LABELS.tolist(),
                       "rewards": rewards}
    found["in-domain"]["stated"] = np.stack([scores_of(k) for k in (20, 15, 9, 9, 3, 1)], 2).tolist()
    (run / "study/heads.json").write_text(json.dumps(found))
    cosines = {"BT": 0.5, "GRPO, rules": 0.125, "GRPO, preference": 0.25}
    (run / "study/gradients.json").write_text(json.dumps(
        {name: {"cosine": [c] * 32, "noise_to_signal": 1 / c} for name, c in cosines.items()}))
    for folder in ("stage1", "discriminative", "stage2", "study/coupled", "study/no_anchor"):
        (run / folder).mkdir(parents=True, exist_ok=True)
        line = dict.fromkeys(("accuracy", "pair_accuracy", "quality", "reward_mean", "reward_std"), 0.5)
        (run / folder / "metrics.jsonl").write_text("".join(json.dumps(line | {"step": k}) + "\n" for k in range(12)))
    place, pairs = run / "study/sanity/sanity", sets["in-domain"]
    write_log(place / "as_it_is", pairs, scores_of(18))
    unrelated = [dataclasses.replace(pair, prompt=prompt)
                 for pair, prompt in zip(pairs, measures.sanity.unrelated_prompts(pairs))]
    for change, anew, kept in (("unrelated prompt", 9, 17), ("shuffled frames", 16, 18), ("frozen clip", 12, 15),
                               ("black clip", 10, 13), ("videos swapped", None, 4)):
        changed = unrelated if change == "unrelated prompt" else pairs
        if change == "videos swapped":
            changed = [dataclasses.replace(pair, video_a=pair.video_b, video_b=pair.video_a) for pair in pairs]
        else:
            write_log(place / change.replace(" ", "_"), changed, scores_of(anew))
        write_log(place / change.replace(" ", "_") / "kept", changed, scores_of(kept))
    return {0: str(run)}


EXPECTED = {  # what decides, and what stands beside it: in pairs of N
    1: {"DeScore - discriminative": 17 - 10, "DeScore - coupled generative": 17 - 14,
        "DeScore - DeScore's own text": 17 - 14, "coupled generative - discriminative": 14 - 10,
        "DeScore - coupled generative, equal scores wrong": 17 - 13,
        "DeScore - DeScore's own text, equal scores wrong": 17 - 12},
    2: {"cosine: BT - GRPO, rules": 0.375 * N, "cosine: BT - GRPO, preference": 0.25 * N},
    3: {"own CoT: p .5 - p 0": 1, "absent CoT: p .5 - p 0": 3, "swapped CoT: p .5 - p 0": 2},
    4: {"BT .05 - BT 0": 17 - 14},
    5: {"stage 1 on a quarter - discriminative on all": 14 - 11},
    6: {"head - text, 1 wrong": 14 - 15, "head - text, 2 wrong": 12 - 9, "head - text, 3 wrong": 8 - 9},
    8: {"lost by: unrelated prompt, thought anew": 18 - 9, "lost by: shuffled frames, thought anew": 18 - 16,
        "lost by: frozen clip, thought anew": 18 - 12, "lost by: black clip, thought anew": 18 - 10,
        "lost by: videos swapped, thought anew": 18 - 2, "lost by: unrelated prompt, CoT kept": 18 - 17,
        "lost by: shuffled frames, CoT kept": 0, "lost by: frozen clip, CoT kept": 18 - 15,
        "lost by: black clip, CoT kept": 18 - 13, "lost by: videos swapped, CoT kept": 18 - 4},
}


def test_where_both_trainings_began_stands_beside_them(made_up, tmp_path):
    """The untrained base's greedy text, on the same pairs: a training that only fell behind it has taught nothing."""
    run = tmp_path / "seed0"
    shutil.copytree(made_up[0], run)
    (run / "study/cots").mkdir()
    said = '<answer>{{"dimensional_scores": {{"style": "0"}}, "overall_score": {:.2f}}}</answer>'
    for csv_name in models.CSVS.values():
        pairs = data.read_pairs(f"{run}/data/{csv_name}.csv")
        thoughts = {(video, pair.prompt): {"thoughts": [said.format(score)], "token_ids": [[1]]}
                    for pair, row in zip(pairs, [*scores_of(16).tolist(), (5, 1)])
                    for video, score in zip(pair.videos, row)}
        formats.write_cots(f"{run}/study/cots/{csv_name}.csv", pairs, thoughts)
    parts = study.judge(study.CLAIMS[0], {0: str(run)})["parts"]
    found = {name: row["mean"] * N for name, row in parts.items() if "untrained" in name}
    assert found == pytest.approx({"DeScore - the untrained base's text": 17 - 16,
                                   "coupled generative - the untrained base's text": 14 - 16,
                                   "DeScore's own text - the untrained base's text": 14 - 16})


@pytest.mark.parametrize("claim", [claim for claim in study.CLAIMS if claim.number in EXPECTED],
                         ids=lambda claim: claim.number)
def test_a_claim_measures_what_it_says(made_up, claim):
    """Signs, models, kinds of CoT: each count of right pairs is another, so a mix-up changes a number."""
    values, _ = claim.measure(made_up)
    assert {name: pooled(v) * N for name, v in values.items()} == pytest.approx(EXPECTED[claim.number])
    assert set(claim.decides) <= values.keys()


def test_the_calibration_slope_is_the_mean_of_all_sets(made_up):
    """14 of 20 right with margins of .5, 1 and 2: b = ln(.7 / .3) / margin in each set."""
    weights = measures.reward_drift(made_up)[1]["weights"]
    slope = np.log(14 / 6)
    assert weights["0"]["calibration_slope"] == pytest.approx([slope * (2 + 1 + 0.5) / 3], rel=1e-3)
    assert weights["0.05"]["calibration_slope"] == pytest.approx([2 * np.log(17 / 3)], rel=1e-3)


def test_fine_grained_looks_at_equal_stated_scores_only(made_up):
    """The texts are equal on pairs 12 to 15, of which the head has all right: it is right on the first 17."""
    values, more = measures.fine_grained(made_up)
    two = values["head - 1/2, stated scores equal to two digits"]
    assert pooled(two) == 0.5 and {len(array) for array in two[0].values()} == {4}
    whole = values["head - 1/2, stated scores equal when rounded to 1-5"]  # 3.25 and 2.75 are both 3: all pairs
    assert pooled(whole) == pytest.approx(17 / N - 0.5)
    assert more["equal to two digits"]["pairs"] == {name: [4] for name in models.SETS}


def test_ladder_and_curves(made_up):
    rungs = {rung: pooled(values) * N for rung, values in measures.ladder(made_up).items()}
    assert list(rungs.values()) == pytest.approx([10, 15, 14, 17])

    def counts(curve):
        return {x: {kind: round(values[0] * N) for kind, values in row.items()} for x, row in curve.items()}

    assert counts(measures.masking(made_up)[1]["curve"]) == {
        p: dict(zip(("own", "absent", "swapped"), numbers))
        for p, numbers in (("0", (15, 9, 3)), ("0.5", (16, 12, 5)), ("1", (4, 11, 9)))}
    assert counts(measures.data_efficiency(made_up)[1]["curve"]) == {
        "stage 1": {"4": 14, "1": 16}, "discriminative": {"1": 11}}
    more = measures.error_tolerance(made_up)[1]
    assert [values[0] * N for values in more["head"]] == pytest.approx([19, 14, 12, 8, 5, 2])
    assert more["meets_no_think_at"] == 2 and more["no_think"] == pytest.approx([0.65])  # 12 of 20 is below 13


# -- commands -------------------------------------------------------------------------------------
@pytest.fixture
def finished(tmp_path):
    """As far as the commands go: the settings and the number of steps of a demo's trainings."""
    run = tmp_path / "seed0"
    kinds = {"stage1": cold_start.Settings, "discriminative": cold_start.Settings, "stage2": grpo.Settings}
    for stage, kind in kinds.items():
        (run / stage).mkdir(parents=True)
        own = kind(data="x/data/train.csv", model="x/base", out="x", seed=7, lr=0.3, gradient_checkpointing=False)
        if stage == "discriminative":
            own.mask_probability = 1.0
        (run / stage / "settings.json").write_text(json.dumps(vars(own) | {"data_sha256": "0", "draws": "x"}))
        (run / stage / "metrics.jsonl").write_text("{}\n" * 7)
    (run / "data").mkdir()
    (run / "data/train_cots.csv").write_text("".join(f"{k}\n" for k in range(17)))
    return str(run)


SCRIPTS = {"cold_start.py": cold_start.Settings, "grpo.py": grpo.Settings, "evaluate.py": evaluate.Settings,
           "collect_cots.py": collect_cots.Settings, "lab.study.coupled": coupled_model.Settings,
           "lab.study.sanity": evaluate.Settings}


def test_every_variant_is_the_demo_s_run_but_for_what_it_says(finished):
    for name, (stage, changes, _) in study.VARIANTS.items():
        command = study.again(finished, name, None).command
        command = command[1:] if command[0] == "-m" else command
        kind = SCRIPTS[command[0]]
        got, own = parse(kind, "", command[1:]), models.settings_of(f"{finished}/{stage}", kind)
        differ = {f.name for f in dataclasses.fields(kind) if getattr(got, f.name) != getattr(own, f.name)}
        places = {"data", "video_root", "model", "out", "overwrite", "workers", "frame_cache", "max_steps", "val"}
        assert differ <= places | changes.keys(), name
        for key, value in changes.items():
            assert getattr(got, key) == (value.format(run=finished) if isinstance(value, str) else value), (name, key)
        assert got.max_steps == changes.get("max_steps", 7)
        start = "stage1/model" if stage == "stage2" else "base"  # where the demo's own stage started
        assert got.model == changes.get("model", f"{finished}/{start}").format(run=finished), name
    assert study.again(finished, "coupled", 2).command[-1] != "60"


def test_variants_are_what_their_names_say():
    changes = {name: changed for name, (_, changed, _) in study.VARIANTS.items()}
    assert [changes[f"mask_{p}"]["mask_probability"] for p in (0, 25, 75)] == [0, 0.25, 0.75]
    assert changes["no_anchor"] == {"bt_coef": 0} and changes["anchor_paper"] == {"bt_coef": grpo.Settings().bt_coef}
    coupled = changes["coupled"]  # the policy gradient alone, from the base
    assert coupled["bt_coef"] == 0 and coupled["model"] == "{run}/base" and coupled["max_steps"] == 60
    assert f"it gets {coupled['max_steps']}\nsteps" in (ROOT / "lab/study/README.md").read_text(encoding="utf-8")
    for share in (8, 4, 2):  # the demo reads all pairs three times: enough of the fewer ones for as many steps
        assert {changes[f"{stage}_{share}"]["epochs"] > 3 * share for stage in ("stage1", "discriminative")} == {True}


def test_every_claim_s_tasks_exist_and_every_command_is_known(finished):
    wanted = {name for claim in study.CLAIMS for name in claim.needs}
    named, known = study.commands(finished, True, wanted, None), set()
    assert named.keys() == wanted | {"cots"}
    for cell in named.values():
        command = cell.command[1:] if cell.command[0] == "-m" else cell.command
        if command[0] != "lab.study.models":
            parse(SCRIPTS[command[0]], "", command[1:])
        own = {need for need in cell.needs if not need.endswith("model.safetensors")}
        assert not cells.is_done(cell) and own <= known  # in an order that can be followed
        known.add(cell.path)
    later = study.commands(finished, False, wanted, None).keys()
    assert named.keys() - later == {"mask_25", "mask_75", "anchor_paper", "eval_anchor_paper"}  # on the first seed only
    rows = open(f"{finished}/study/train_cots_8.csv").read().split()
    assert rows == ["0", "1", "2"]  # the header, and 16 // 8 rows


def test_a_demo_that_was_made_anew_is_studied_anew(tmp_path):
    (tmp_path / "one.py").write_text(f"open({str(tmp_path / 'study/one')!r}, 'w')")
    one = study.cell(str(tmp_path), "one", [str(tmp_path / "one.py")])
    assert cells.run_all([one], 1, "abc1234") == [] and cells.is_done(one)
    (tmp_path / "stage2/model").mkdir(parents=True)
    (tmp_path / "stage2/model/model.safetensors").write_text("another one")
    assert not cells.is_done(one)


# -- pages -------------------------------------------------------------------------------------
RESULT = pages.read(ROOT / "lab/study/study.json")


@pytest.mark.parametrize("page", pages.PAGES)
def test_what_a_page_shows_stands_in_study_json(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert pages.MARK.search(text), "nothing is marked"
    assert pages.filled(text, RESULT) == text, "run `python -m lab.study --publish`"


def test_readme_counts_the_verdicts_right():
    """Three seeds' verdicts, and six seeds' where those have run (claims 18 to 20 of the second world)."""
    three, six = ({claim["number"]: claim["verdict"] for claim in pages.read(ROOT / f"lab/study/{name}.json")["claims"]}
                  for name in ("study", "worlds"))
    latest = three | {old: six[new] for old, new in ((1, 18), (3, 19), (7, 20)) if six[new] != NOT_RUN}
    found, more = collections.Counter(latest.values()), sum(latest[k] == SEEN != three[k] for k in three)
    word = dict(enumerate("none one two three four five six seven eight".split()))
    said = "Of {} claims {} are seen here, {} of them only with six seeds; {} is not, {} can't be told."
    counts = (word[n] for n in (found.total(), found[SEEN], more, found[NOT_SEEN], found[CANNOT_TELL]))
    assert said.format(*counts) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_study_json_belongs_to_this_code():
    assert (ROOT / "lab/study/study.json").stat().st_size < 100_000
    for claim, found in zip(study.CLAIMS, RESULT["claims"], strict=True):
        known = study.entry(claim)
        assert [found[key] for key in ("number", "claim", "paper", "rule", "decides", "margin")] == [
            known[key] for key in ("number", "claim", "paper", "rule", "decides", "margin")]
        if not found["parts"]:
            assert found["verdict"] == NOT_RUN
            continue
        assert not found["trial"] and found["commit"] != "unknown"
        for row in found["parts"].values():
            assert row["verdict"] == verdict(row, claim.margin)
            assert np.mean(row.get("by_seed", row["mean"])) == pytest.approx(row["mean"], abs=2e-4)
        assert found["verdict"] == weakest([found["parts"][name]["verdict"] for name in claim.decides])
