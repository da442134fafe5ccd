"""The proof of the grader: each submission below is made, graded as a student's would be, and must come out as told.

    blank           0 points
    the reference   all points, and so does each function written otherwise
    each mistake    fails in the lesson that names it, and in no lesson before

A mistake that survives is a finding: the lesson is too weak. Whoever changes exercise 4 asks:

    python -m lab.course.test_proof 4
"""

import subprocess
import sys

import pytest

from lab.course import __main__ as course
from lab.course import copies, mistakes
from lab.course.exercises import EXERCISES
from lab.course.mistakes import (ADVANTAGES, ANSWERS, ATTENTION, BEHIND, BT, BTT, CURVE, GRPO, HITS, KL, LENGTH, MASK,
                                 QUALITY, REWRITES, ROLLOUT, TIES)
from lab.course.mistakes import _m  # (place, what, lesson, (right, wrong), ...)

PAPER, OWN = 0, 7  # variants that are proved
DEFAULTS = {2: "default_k", 4: "epsilon_in_the_denominator", 6: "default_clips", 7: "default_rules"}

# ---- The usual mistakes, each with the lesson that must name it ---------------------------------------------------

MISTAKES = (
    _m(BT, "the sign", "winner_first",
       ("reward_chosen.float() - reward_rejected", "reward_rejected.float() - reward_chosen")),
    _m(BT, "no log", "minus_log_probability", ("-F.logsigmoid(reward_chosen", "-torch.sigmoid(reward_chosen")),
    _m(BT, "mean over pairs, sum over rollouts", "mean_over_all_elements", ("losses.numel()", "len(losses)")),
    _m(BT, "micro-batch mean", "denominator_of_the_whole_batch", ("(denominator or losses.numel())", "losses.numel()")),
    _m(BT, "mean over rollouts, then the denominator", "denominator_of_the_whole_batch",
       ("losses.sum()", "(losses.mean(dim=1) if losses.ndim > 1 and denominator else losses).sum()")),
    _m(BT, "log of sigmoid", "log_sigma_in_one",
       ("-F.logsigmoid(reward_chosen.float() - reward_rejected.float())",
        "-torch.sigmoid(reward_chosen.float() - reward_rejected.float()).log()")),
    _m(BT, "in bf16", "in_fp32",
       ("reward_chosen.float() - reward_rejected.float()", "reward_chosen - reward_rejected")),
    _m(BT, "computed in bf16, returned in fp32", "in_fp32",
       ("reward_chosen.float() - reward_rejected.float()", "(reward_chosen - reward_rejected).float()")),
    _m(BT, "the loser detached", "trains_both_rewards",
       ("reward_rejected.float()", "reward_rejected.detach().float()")),
    _m(BTT, "k is always 5", "a_win_needs_a_margin", ("math.log(k)", "math.log(5)"), ("k * k - 1", "24")),
    _m(BTT, "the sum for the mean", "mean_over_pairs", ("(denominator or losses.numel())", "(denominator or 1)")),
    _m(BTT, "the first pair's label for all", "mean_over_pairs", ("label > 0", "label[0] > 0"),
       ("label < 0", "label[0] < 0")),
    _m(BTT, "ln k added", "a_win_needs_a_margin", ("margin - math.log(k)", "margin + math.log(k)")),
    _m(BTT, "a tie is B's win", "a_tie_is_an_outcome", ("torch.where(label < 0, log_p_b, log_p_tie)", "log_p_b")),
    _m(BTT, "k² − 1 left out", "probabilities_sum_to_one", ("math.log(k * k - 1) + ", "")),
    _m(BTT, "1 − P − P", "ties_far_apart",
       ("math.log(k * k - 1) + log_p_a + log_p_b", "torch.log(1 - log_p_a.exp() - log_p_b.exp())")),
    _m(BTT, "B's win by 1 − P − P", "ties_far_apart", ("torch.where(label < 0, log_p_b, log_p_tie)",
       "torch.where(label < 0, torch.log(1 - log_p_a.exp() - log_p_tie.exp()), log_p_tie)")),
    _m(BTT, "the factor of k = 5 for each k", "probabilities_sum_to_one", ("k * k - 1", "24")),
    _m(BTT, "B detached", "mean_over_pairs", ("reward_b.float()", "reward_b.detach().float()")),
    _m(BTT, "the tie detached", "mean_over_pairs",
       ("math.log(k * k - 1) + log_p_a + log_p_b", "math.log(k * k - 1) + (log_p_a + log_p_b).detach()")),
    _m(BTT, "ties in bf16", "ties_in_fp32", ("reward_a.float() - reward_b.float()", "(reward_a - reward_b).float()")),
    _m(MASK, "a draw per video", "one_coin_for_each_pair", ("torch.rand(num_pairs,", "torch.rand(2 * num_pairs,")),
    _m(MASK, "1 − p", "true_means_masked", ("< probability", "> probability")),
    _m(MASK, "the global generator", "the_given_generator", ("(num_pairs, generator=generator)", "(num_pairs)")),
    _m(MASK, "a fixed number", "independent_coins",
       ("torch.rand(num_pairs, generator=generator) < probability",
        "torch.randperm(num_pairs, generator=generator) < round(probability * num_pairs)")),
    _m(ADVANTAGES, "ε left out", "epsilon_in_the_denominator", ("keepdim=True) + epsilon)", "keepdim=True))")),
    _m(ADVANTAGES, "no division by G − 1 at all", "bessel", ("rewards.std(dim=1", "centred.norm(dim=1")),
    _m(ADVANTAGES, "the median for the mean", "bessel",
       ("rewards.mean(dim=1, keepdim=True)", "rewards.quantile(0.5, dim=1, keepdim=True)")),
    _m(KL, "k1", "never_negative", ("return log_ratio.exp() - 1 - log_ratio", "return -log_ratio")),
    _m(KL, "ratio upside down", "reference_over_policy",
       ("(ref_log_probs.detach().float() - log_probs.float())",
        "(log_probs.float() - ref_log_probs.detach().float())")),
    _m(KL, "reference not detached", "reference_is_a_constant", ("ref_log_probs.detach()", "ref_log_probs")),
    _m(KL, "no bound", "kl_stays_finite",
       ("log_probs.float()).clamp(-20, 20)\n    return", "log_probs.float())\n    return")),
    _m(KL, "a bound behind the exp", "kl_stays_finite", (".clamp(-20, 20)\n", "\n"),
       ("log_ratio.exp()", "log_ratio.exp().clamp(max=1e6)")),
    _m(KL, "a bound where tokens are", "kl_stays_finite", (".clamp(-20, 20)", ".clamp(-2, 2)")),
    _m(GRPO, "the sign", "good_tokens_become_likelier",
       ("advantage = advantages.float()", "advantage = -advantages.float()")),
    _m(GRPO, "min for max", "the_larger_loss", ("torch.maximum(-advantage", "torch.minimum(-advantage")),
    _m(GRPO, "one clip for both sides", "two_clips", ("1 + clip_high))", "1 + clip_low))")),
    _m(GRPO, "the paper's clips, written in", "two_clips", ("1 - clip_low, 1 + clip_high", "0.8, 1.3")),
    _m(GRPO, "the dual clip not times −A", "dual_clip",
       ("-advantage * clip_dual", "torch.full_like(losses, clip_dual)")),
    _m(GRPO, "no dual clip", "dual_clip",
       ("losses = torch.where(advantage < 0, torch.minimum", "_ = torch.where(advantage < 0, torch.minimum")),
    _m(GRPO, "mask ignored", "padding_counts_for_nothing", ("(losses * mask).sum()", "losses.sum()")),
    _m(GRPO, "mean per CoT", "mean_over_all_tokens",
       ("    return (losses * mask).sum() / (denominator or mask.sum().clamp(min=1))",
        "    if denominator is None:\n        return ((losses * mask).sum(1) / mask.sum(1)).mean()\n"
        "    return (losses * mask).sum() / denominator")),
    _m(GRPO, "micro-batch mean", "grpo_denominator",
       ("(denominator or mask.sum().clamp(min=1))", "mask.sum().clamp(min=1)")),
    _m(GRPO, "the mean, then the denominator", "grpo_denominator",
       ("(denominator or mask.sum().clamp(min=1))", "mask.sum().clamp(min=1) / (denominator or 1)")),
    _m(GRPO, "mask ignored with a denominator", "grpo_denominator",
       ("(losses * mask).sum()", "(losses.sum() if denominator else (losses * mask).sum())")),
    _m(GRPO, "mean per CoT, then the denominator", "grpo_denominator",
       ("(losses * mask).sum()", "((losses * mask).sum(1) / (mask.sum(1) if denominator else 1)).sum()")),
    _m(GRPO, "a ratio of its own, without bound", "padding_counts_for_nothing",
       ("policy_ratio(log_probs, old_log_probs, mask)", "(log_probs.float() - old_log_probs.float()).exp()")),
    _m(ANSWERS, "search for fullmatch", "nothing_around_the_blocks", ("LAYOUT.fullmatch(text)", "LAYOUT.search(text)")),
    _m(ANSWERS, "the two ends alone", "nothing_around_the_blocks", ("LAYOUT.fullmatch(text) is not None",
       "text.startswith('<think>') and '</think>' in text and text.endswith('</answer>')")),
    _m(ANSWERS, "any verdict will do", "verdicts_on_all_dimensions",
       ("len(read_verdicts(text)) == len(DIMENSIONS)", "bool(read_verdicts(text))")),
    _m(ANSWERS, "any value is a verdict", "verdicts_on_all_dimensions",
       ("len(read_verdicts(text)) == len(DIMENSIONS)",
        "set((extract_answer(text) or {}).get('dimensional_scores', ())) == set(DIMENSIONS)")),
    _m(QUALITY, "divided by all five", "annotated_dimensions_only",
       ("annotation.items()) / len(annotation)", "annotation.items()) / 5")),
    _m(QUALITY, "only what is said counts", "left_out_is_wrong",
       ("annotation.items()) / len(annotation)", "annotation.items()) / max(1, len(verdicts.keys() & annotation))")),
    _m(LENGTH, "a step", "linear_in_between",
       ("min(1.0, max(0.0, (num_tokens - low) / (high - low)))", "float(num_tokens >= high)")),
    _m(LENGTH, "no bounds", "bounded_in_length",
       ("min(1.0, max(0.0, (num_tokens - low) / (high - low)))", "(num_tokens - low) / (high - low)")),
    _m(ROLLOUT, "characters for tokens", "tokens_not_characters",
       ("length_reward(num_tokens, *length_range)", "length_reward(len(text), *length_range)")),
    _m(ROLLOUT, "parts in another order", "parts_in_their_places",
       ("quality_reward(text, annotation), format_reward(text),",
        "format_reward(text), quality_reward(text, annotation),")),
    _m(ROLLOUT, "the paper's weights, written in", "parts_in_their_places",
       ("zip(weights, parts", "zip((0.7, 0.1, 0.2), parts")),
    _m(ROLLOUT, "the paper's lengths, written in", "parts_in_their_places",
       ("num_tokens, *length_range", "num_tokens, 500, 2000")),
    _m(ROLLOUT, "each text has the right form", "parts_in_their_places", ("format_reward(text)", "1.0")),
    _m(ROLLOUT, "an ill-formed text earns nothing", "parts_in_their_places",
       ("sum(w * part", "well_formed(text) * sum(w * part")),
    _m(HITS, "equal scores are a tie", "untied_ties_are_wrong",
       ("right(labels, margins)[order]", "(np.sign(margins) == labels)[order]")),
    _m(HITS, "equal scores are right for B", "untied_ties_are_wrong",
       ("right(labels, margins)[order]", "np.where(margins > 0, labels > 0, labels < 0)[order]")),
    _m(HITS, "equal scores are right for A", "untied_ties_are_wrong",
       ("right(labels, margins)[order]", "np.where(margins >= 0, labels > 0, labels < 0)[order]")),
    _m(CURVE, "nothing checked", "what_has_no_accuracy",
       ("checked(labels, margins)", "np.array(labels), np.array(margins)")),
    _m(TIES, "the largest of equals", "smallest_of_equals",
       ("int(np.argmax(accuracies))", "len(accuracies) - 1 - int(np.argmax(accuracies[::-1]))")),
    _m(HITS, "each threshold on all pairs", "one_sort_one_sum",
       ("untied.sum() + np.cumsum(np.append(0, human_tie.astype(int) - untied))",
        "np.array([human_tie[:k].sum() + untied[k:].sum() for k in range(len(untied) + 1)])")),
    _m(ATTENTION, "bidirectional prefix", "prefix_is_causal", ("is_causal=True", "is_causal=False")),
    _m(ATTENTION, "a CoT sees the one before it", "cots_do_not_see_each_other",
       ("    for s, (prompt, cots) in enumerate(spans):", "    for s, (prompt, cots) in enumerate(spans):\n"
        "        cots = [(prompt, sum(n for _, n in cots))] if cots else []")),
    _m(ATTENTION, "a prefix alone is forgotten", "prefix_is_causal",
       ("for _, n in cots[:1])", "for _, n in (cots[0],))")),
    _m(ATTENTION, "the newest token sees the first key only", "without_spans",
       ("    if spans is None and query.shape[2] == 1:\n"
        "        return attend_once(query, key, value, attention_mask, scaling), None\n", ""),
       ("        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)",
        "        return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None")),
    _m(ATTENTION, "mask and scaling ignored without spans", "without_spans",
       ("value, attention_mask, scaling)", "value, None, None)"),
       ("        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)",
        "        return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None")),
    _m(ATTENTION, "one query without its mask", "without_spans",
       ("(query, key, value, attention_mask,", "(query, key, value, None,")),
    _m(ATTENTION, "one query without scaling", "without_spans", ("attention_mask, scaling)", "attention_mask, None)")),
    _m(ATTENTION, "no dropout", "scaling_is_used", ('"dropout_p": dropout', '"dropout_p": 0.0')),
    _m(BEHIND, "no dropout behind the prefix", "scaling_is_used", ("**options)", "**options | {'dropout_p': 0.0})")),
    _m(BEHIND, "the prefix's keys detached", "gradient_reaches_the_prefix",
       ("for x in prefix)", "for x in (prefix[0].detach(), prefix[1]))")),
    _m(BEHIND, "a CoT's own keys and values detached", "gradient_reaches_the_prefix",
       ("(own_keys, own_values))", "(own_keys.detach(), own_values.detach()))")),
    _m(BEHIND, "queries detached", "gradient_reaches_the_prefix",
       ("scaled_dot_product_attention(q, ", "scaled_dot_product_attention(q.detach(), ")),
    _m(BEHIND, "upper left corner", "lower_right_corner",
       ("attn_mask=causal_lower_right(n, keys.shape[2])", "is_causal=True")),
    _m(ATTENTION, "in order of length", "in_the_order_of_positions",
       ("for start in sorted(outputs)", "for start in outputs")),
    _m(ATTENTION, "the first row's prefix in each row", "in_the_order_of_positions",
       ("(k[0, :, :prompt], v[0, :, :prompt])", "(key[0, :, :prompt], value[0, :, :prompt])")),
    _m(ATTENTION, "heads in turn", "heads_in_groups",
       ("    rows = []\n    for s, (prompt, cots)",
        "    key, value = (x.repeat(1, query.shape[1] // x.shape[1], 1, 1) for x in (key, value))\n"
        "    rows = []\n    for s, (prompt, cots)")),
    _m(ATTENTION, "no scaling", "scaling_is_used", ('{"scale": scaling, ', "{")),
    _m(BEHIND, "prefix detached", "gradient_reaches_the_prefix",
       ("x.expand(len(starts)", "x.detach().expand(len(starts)")),
    *mistakes.MISTAKES,
)

TWO_TESTS = {  # exercise 10, solved
    "test_group_advantages": """
        got = group_advantages(torch.tensor([[0.0, 1.0], [0.0, 100.0]]))  # std sqrt(.5) and 70.7: the same A
        assert torch.allclose(got, torch.tensor([[-0.7071, 0.7071]] * 2), atol=0.01)
        assert group_advantages(torch.tensor([[0.7]])).tolist() == [[0.0]]
        import pytest
        assert group_advantages(torch.zeros(0, 8)).shape == (0, 8)
        if group_advantages(torch.tensor([[0.86] * 8, [0.1, 0.2] * 4]))[0].any():
            pytest.fail("equal rewards")
        with pytest.raises(AssertionError):  # the assert that stands in the copy
            group_advantages(torch.zeros(3))
    """,
    "test_accuracy_with_ties": """
        assert accuracy_with_ties([1, 0, -1], [2, 0.5, -1]) == (1.0, 0.5)
        assert accuracy_with_ties([1, -1], [1, -2]) == (1.0, -1.0)  # nothing is tied
        assert accuracy_with_ties([0, 1, 1], [1, 1, 1])[0] < 0.67  # no cut inside the run: at most two of three
        import pytest
        from plumbing.settings import InputError
        with pytest.raises(InputError):
            accuracy_with_ties([], [])
    """,
}
UNWRITTEN = "raise NotImplementedError('Exercise 10 (60 min): ')"  # a test as it is handed out


# ---- The submissions ----------------------------------------------------------------------------------------------
def submissions(exercises):
    """(exercise, what it is, its files, the lesson that must fail first or None, variant)."""
    for exercise in exercises:
        first, own = exercise.lessons[0].__name__, {file: mistakes.source(file) for file in exercise.files}
        yield exercise, "blank", {f: copies.without_bodies(f, text) for f, text in own.items()}, first, PAPER
        if exercise.number == 10:
            yield from weak_and_strong_tests(exercise)
            continue
        yield exercise, "the reference", own, None, PAPER
        bodies = {p: REWRITES[p] for p in exercise.places if p in REWRITES}
        rewritten = {f: mistakes.with_bodies(f, {p: b for p, b in bodies.items() if p.startswith(f)}) for f in own}
        yield exercise, "written otherwise", rewritten, None, PAPER
        for m in MISTAKES:
            if m.place in exercise.places:
                yield exercise, m.what, own | {m.file: mistakes.with_changes(m.place, m.changes)}, m.lesson, PAPER
        if exercise.number in DEFAULTS:
            variant = {f: copies.without_bodies(f, text, OWN, blank=False) for f, text in own.items()}
            yield exercise, "a variant's own", variant, None, OWN
            yield exercise, "the public file in a variant", own, DEFAULTS[exercise.number], OWN


def weak_and_strong_tests(exercise):
    """Exercise 10: two tests, and those two with one weakness."""
    solved = {f"my_tests.py::{name}": body for name, body in TWO_TESTS.items()}
    yield exercise, "two tests", {"my_tests.py": mistakes.with_bodies("my_tests.py", solved)}, None, PAPER
    # Variant 7 has ε = .001: .5 / (.707107 + .001) = .706108, and 50 / (70.7107 + .001) = .707097.
    numbers = "[[-0.7071, 0.7071]] * 2), atol=0.01", "[[-0.70611, 0.70611], [-0.7071, 0.7071]]), atol=1e-4"
    own = mistakes.with_bodies("my_tests.py", solved | {OF_ADVANTAGES: solved[OF_ADVANTAGES].replace(*numbers)})
    yield exercise, "two tests, a variant's numbers", {"my_tests.py": own}, None, OWN
    yield exercise, "a variant's numbers without a variant", {"my_tests.py": own}, "right_code_is_accepted", PAPER
    half = mistakes.with_bodies("my_tests.py", solved | {OF_TIES: UNWRITTEN})
    yield exercise, "one test, the other not written", {"my_tests.py": half}, "catches_cut_inside_a_run", PAPER
    for lesson, change in WEAKENED.items():
        place, (old, new) = change
        assert old in solved[place], lesson
        bodies = solved | {place: solved[place].replace(old, new)}
        text = mistakes.with_bodies("my_tests.py", bodies)
        yield exercise, f"a test without {lesson}", {"my_tests.py": text}, lesson, PAPER


OF_ADVANTAGES, OF_TIES = "my_tests.py::test_group_advantages", "my_tests.py::test_accuracy_with_ties"
WEAKENED = {
    "right_code_is_accepted": (OF_ADVANTAGES, ("[[-0.7071, 0.7071]]", "[[-1.0, 1.0]]")),
    "another_way_to_write_it": (OF_ADVANTAGES, (
        "import pytest", "assert group_advantages(torch.tensor([[0.5, 0.9, 0.5]]))[0, 1] == 1.1546956300735474\n"
        "        import pytest")),
    "catches_population_std": (OF_ADVANTAGES, ("atol=0.01", "atol=0.5")),
    "catches_whole_batch": (OF_ADVANTAGES, ("[[0.0, 1.0], [0.0, 100.0]]", "[[0.0, 1.0]]")),
    "catches_nan_at_one": (OF_ADVANTAGES, (".tolist() == [[0.0]]", ".shape == (1, 1)")),
    "catches_flat_group": (OF_ADVANTAGES, ("[0.86] * 8", "[0.5] * 8")),
    "catches_cut_inside_a_run": (OF_TIES, ("accuracy_with_ties([0, 1, 1], [1, 1, 1])[0] < 0.67", "True")),
    "catches_nothing_tied_missing": (OF_TIES, ("== (1.0, -1.0)", "!= ()")),
}


def prove(exercises) -> int:
    """Prints a line for each submission; 0 if all came out as told, else 1."""
    course.load_what_is_slow(exercises)
    wrong = count = 0
    for exercise, what, files, lesson, variant in submissions(exercises):
        base = copies.student_files(variant, copies.RUN)
        result = course.grade_one(exercise, {name: text.encode() for name, text in files.items()}, base, variant)
        points = {"blank": 0}.get(what, result.points) if lesson else exercise.points
        as_told = result.failed == lesson and result.points == points
        count, wrong = count + 1, wrong + (not as_told)
        print(f"{'ok   ' if as_told else 'WRONG'} {exercise.number:2d} {what}: {result.failed or 'passes'}", flush=True)
        if not as_told:
            print(f"      must be: {lesson or 'passes'}; {result.message}")
    print(f"{count} submissions, {wrong} not as they must be")
    return int(wrong > 0)


@pytest.mark.parametrize("number", [str(e.number) for e in EXERCISES])
def test_blank_fails_the_reference_passes_and_each_mistake_is_named(number):
    done = in_a_process("-m", "lab.course.test_proof", number)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_the_proof_and_that_it_finds_a_weak_lesson():
    """With a lesson taken out, its mistake survives."""
    done = in_a_process("-c", """if True:
        import dataclasses
        from lab.course import test_proof
        row = test_proof.EXERCISES[3]
        without = tuple(lesson for lesson in row.lessons if lesson.__name__ != "a_group_of_one")
        assert test_proof.prove([row]) == 0
        assert test_proof.prove([dataclasses.replace(row, lessons=without)]) == 1
    """)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "12 submissions, 0 not as they must be" in done.stdout, done.stdout
    assert "WRONG  4 nan at G = 1: passes\n      must be: a_group_of_one" in done.stdout, done.stdout


def in_a_process(*command):
    """Grading forks, and autograd, which this process has used, does not survive a fork."""
    return subprocess.run([sys.executable, *command], cwd=copies.ROOT, capture_output=True, text=True, timeout=200)


def test_the_page_holds_the_mistakes():
    """The page's table: exercise, mistake, and what the student reads."""
    page = (copies.ROOT / "lab/course/README.md").read_text(encoding="utf-8")
    for exercise in EXERCISES:
        told = {lesson.__name__: course.taught(lesson) for lesson in exercise.lessons}
        for m in MISTAKES:
            row = f"| {exercise.number} | {m.what} | {told.get(m.lesson)} |"
            assert m.place not in exercise.places or row in page, f"put this row into the page: {row}"


if __name__ == "__main__":
    sys.exit(prove(course.chosen(sys.argv[1])))
