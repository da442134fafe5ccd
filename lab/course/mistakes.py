"""The usual mistakes, each with the lesson that must name it; and right code written otherwise.

A mistake is a change of the reference. test_proof.py grades them all as submissions. Not part of a student's copy: a
mistake is the answer but for one word.
"""

import ast
import dataclasses
import functools
import pathlib
import textwrap
import types

from lab.course.copies import split_body
from lab.course.exercises import EXERCISES, MY_TESTS

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A mistake in one function: each `changes` pair (right, wrong) replaces text that its file holds once or more.

    lesson: the lesson that must fail first. test: the name under which exercise 10 uses it.
    """

    place: str
    what: str
    lesson: str
    changes: tuple
    test: str = ""

    @property
    def file(self) -> str:
        return self.place.split("::")[0]


def _m(place, what, lesson, *changes, test=""):
    return Mistake(place, what, lesson, changes, test)


BT, BTT, MASK = "losses.py::bt_loss", "losses.py::btt_loss", "losses.py::draw_cot_mask"
ADVANTAGES, KL, GRPO = "losses.py::group_advantages", "losses.py::kl_to_reference", "losses.py::grpo_loss"
ANSWERS, QUALITY = "rules.py::well_formed", "rules.py::quality_reward"
LENGTH, ROLLOUT = "rules.py::length_reward", "rules.py::rollout_reward"
HITS, CURVE, TIES = "metrics.py::_hits_by_ties", "metrics.py::accuracy_curve", "metrics.py::accuracy_with_ties"
ATTENTION, BEHIND = "layout.py::shared_prefix_attention", "layout.py::attend_behind"

MISTAKES = (
    _m(BT, "the sign", "winner_first",
       ("reward_chosen.float() - reward_rejected", "reward_rejected.float() - reward_chosen")),
    _m(BT, "no log", "minus_log_probability", ("-F.logsigmoid(reward_chosen", "-torch.sigmoid(reward_chosen")),
    _m(BT, "mean over pairs, sum over rollouts", "mean_over_all_elements", ("losses.numel()", "len(losses)")),
    _m(BT, "micro-batch mean", "denominator_of_the_whole_batch", ("(denominator or losses.numel())", "losses.numel()")),
    _m(BT, "log of sigmoid", "log_sigma_in_one",
       ("-F.logsigmoid(reward_chosen.float() - reward_rejected.float())",
        "-torch.sigmoid(reward_chosen.float() - reward_rejected.float()).log()")),
    _m(BT, "in bf16", "in_fp32",
       ("reward_chosen.float() - reward_rejected.float()", "reward_chosen - reward_rejected")),
    _m(BTT, "ln k added", "a_win_needs_a_margin", ("margin - math.log(k)", "margin + math.log(k)")),
    _m(BTT, "a tie is B's win", "a_tie_is_an_outcome", ("torch.where(label < 0, log_p_b, log_p_tie)", "log_p_b")),
    _m(BTT, "k² − 1 left out", "probabilities_sum_to_one", ("math.log(k * k - 1) + ", "")),
    _m(BTT, "1 − P − P", "ties_far_apart",
       ("math.log(k * k - 1) + log_p_a + log_p_b", "torch.log(1 - log_p_a.exp() - log_p_b.exp())")),
    _m(MASK, "a draw per video", "one_coin_for_each_pair", ("torch.rand(num_pairs,", "torch.rand(2 * num_pairs,")),
    _m(MASK, "1 − p", "true_means_masked", ("< probability", "> probability")),
    _m(MASK, "the global generator", "the_given_generator", ("(num_pairs, generator=generator)", "(num_pairs)")),
    _m(MASK, "a fixed number", "independent_coins",
       ("torch.rand(num_pairs, generator=generator) < probability",
        "torch.randperm(num_pairs, generator=generator) < round(probability * num_pairs)")),
    _m(ADVANTAGES, "population std", "bessel", (".std(dim=1, keepdim=True)", ".std(dim=1, keepdim=True, correction=0)"),
       test="population_std"),
    _m(ADVANTAGES, "the whole batch", "rows_are_groups", ("rewards.mean(dim=1, keepdim=True)", "rewards.mean()"),
       ("rewards.std(dim=1, keepdim=True)", "rewards.std()"), test="whole_batch"),
    _m(ADVANTAGES, "nan at G = 1", "a_group_of_one", ("if flat.all():", "if False:"),
       ("torch.where(flat, 0.0,", "torch.where(flat & (rewards.shape[1] > 1), 0.0,"), test="nan_at_one"),
    _m(ADVANTAGES, "equal rewards by subtracting", "equal_rewards_say_nothing",
       ("torch.where(flat, 0.0, centred / (rewards.std(dim=1, keepdim=True) + epsilon))",
        "centred / (rewards.std(dim=1, keepdim=True) + epsilon)"), ("if flat.all():", "if rewards.shape[1] == 1:"),
       test="flat_group"),
    _m(ADVANTAGES, "ε left out", "epsilon_in_the_denominator", ("keepdim=True) + epsilon)", "keepdim=True))")),
    _m(KL, "k1", "never_negative", ("return log_ratio.exp() - 1 - log_ratio", "return -log_ratio")),
    _m(KL, "ratio upside down", "reference_over_policy",
       ("(ref_log_probs.detach().float() - log_probs.float())",
        "(log_probs.float() - ref_log_probs.detach().float())")),
    _m(KL, "reference not detached", "reference_is_a_constant", ("ref_log_probs.detach()", "ref_log_probs")),
    _m(KL, "no bound", "kl_stays_finite",
       ("log_probs.float()).clamp(-20, 20)\n    return", "log_probs.float())\n    return")),
    _m(GRPO, "the sign", "good_tokens_become_likelier",
       ("advantage = advantages.float()", "advantage = -advantages.float()")),
    _m(GRPO, "min for max", "the_larger_loss", ("torch.maximum(-advantage", "torch.minimum(-advantage")),
    _m(GRPO, "one clip for both sides", "two_clips", ("1 + clip_high))", "1 + clip_low))")),
    _m(GRPO, "no dual clip", "dual_clip",
       ("losses = torch.where(advantage < 0, torch.minimum", "_ = torch.where(advantage < 0, torch.minimum")),
    _m(GRPO, "mask ignored", "padding_counts_for_nothing", ("(losses * mask).sum()", "losses.sum()")),
    _m(GRPO, "mean per CoT", "mean_over_all_tokens",
       ("    return (losses * mask).sum() / (denominator or mask.sum().clamp(min=1))",
        "    if denominator is None:\n        return ((losses * mask).sum(1) / mask.sum(1)).mean()\n"
        "    return (losses * mask).sum() / denominator")),
    _m(GRPO, "micro-batch mean", "grpo_denominator",
       ("(denominator or mask.sum().clamp(min=1))", "mask.sum().clamp(min=1)")),
    _m(ANSWERS, "search for fullmatch", "nothing_around_the_blocks", ("LAYOUT.fullmatch(text)", "LAYOUT.search(text)")),
    _m(ANSWERS, "any verdict will do", "verdicts_on_all_dimensions",
       ("len(read_verdicts(text)) == len(DIMENSIONS)", "bool(read_verdicts(text))")),
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
    _m(HITS, "equal scores are a tie", "untied_ties_are_wrong",
       ("right(labels, margins)[order]", "(np.sign(margins) == labels)[order]")),
    _m(CURVE, "\"nothing is tied\" missing", "nothing_is_tied",
       ("np.append(NOTHING_TIED, sizes[ends]), np.append(hits[0], hits[ends + 1]) / len(labels)",
        "sizes[ends], hits[ends + 1] / len(labels)"), test="nothing_tied_missing"),
    _m(CURVE, "cuts inside equal runs", "no_cut_inside_a_run",
       ("np.flatnonzero(np.append(np.diff(sizes) > 0, True))", "np.arange(len(sizes))"),
       test="cut_inside_a_run"),
    _m(TIES, "the largest of equals", "smallest_of_equals",
       ("int(np.argmax(accuracies))", "len(accuracies) - 1 - int(np.argmax(accuracies[::-1]))")),
    _m(HITS, "each threshold on all pairs", "one_sort_one_sum",
       ("decided.sum() + np.cumsum(np.append(0, human_tie.astype(int) - decided))",
        "np.array([human_tie[:k].sum() + decided[k:].sum() for k in range(len(decided) + 1)])")),
    _m(ATTENTION, "bidirectional prefix", "prefix_is_causal", ("is_causal=True", "is_causal=False")),
    _m(ATTENTION, "a CoT sees the one before it", "cots_do_not_see_each_other",
       ("    for s, (prefix, cots) in enumerate(spans):", "    for s, (prefix, cots) in enumerate(spans):\n"
        "        cots = [(prefix, sum(n for _, n in cots))] if cots else []")),
    _m(BEHIND, "upper left corner", "lower_right_corner",
       ("attn_mask=causal_lower_right(n, prefix + n)", "is_causal=True")),
    _m(ATTENTION, "in order of length", "in_the_order_of_positions",
       ("for start in sorted(outputs)", "for start in outputs")),
    _m(ATTENTION, "heads in turn", "heads_in_groups",
       ("    rows = []\n    for s, (prefix, cots)",
        "    key, value = (x.repeat(1, query.shape[1] // x.shape[1], 1, 1) for x in (key, value))\n"
        "    rows = []\n    for s, (prefix, cots)")),
    _m(ATTENTION, "no scaling", "scaling_is_used", ('{"scale": scaling, ', "{")),
    _m(BEHIND, "prefix detached", "gradient_reaches_the_prefix",
       ("x[:, :, :prefix].expand", "x[:, :, :prefix].detach().expand")),
)

# Right code, written otherwise: a grader that refuses these tests style, not the method.
REWRITES = {
    BT: """
        margin = reward_chosen.to(torch.float32) - reward_rejected.to(torch.float32)
        total = F.softplus(-margin).sum()
        return total / margin.numel() if denominator is None else total / denominator
    """,
    BTT: """
        margin, log_k = (reward_a - reward_b).float(), math.log(k)
        cost_a, cost_b = F.softplus(log_k - margin), F.softplus(log_k + margin)
        cost = cost_a + cost_b - math.log(k**2 - 1)
        cost[label == 1], cost[label == -1] = cost_a[label == 1], cost_b[label == -1]
        return cost.sum() / (len(cost) if denominator is None else denominator)
    """,
    MASK: """
        return torch.empty(num_pairs).bernoulli_(probability, generator=generator).bool()
    """,
    ADVANTAGES: """
        result = torch.zeros(rollout_rewards.shape)
        for row, group in zip(result, rollout_rewards.float()):
            if len(set(group.tolist())) > 1:
                spread = (group - group.mean()).square().sum().div(len(group) - 1).sqrt()
                row.copy_((group - group.mean()) / (spread + epsilon))
        return result
    """,
    KL: """
        log_ratio = torch.clamp(ref_log_probs.float().detach() - log_probs.float(), max=20)
        return torch.expm1(log_ratio) - log_ratio
    """,
    GRPO: """
        a = advantages.float().unsqueeze(1)
        ratio = policy_ratio(log_probs, old_log_probs, mask)
        gain = torch.minimum(a * ratio, a * torch.clip(ratio, 1 - clip_low, 1 + clip_high))
        gain = torch.where(a < 0, gain.maximum(a * clip_dual), gain)
        return -(gain * mask).sum() / (mask.sum() if denominator is None else denominator)
    """,
    ANSWERS: """
        if not LAYOUT.fullmatch(text):
            return False
        return set(read_verdicts(text)) == set(DIMENSIONS)
    """,
    QUALITY: """
        said, right = read_verdicts(text), 0
        for dimension in annotation:
            right += said.get(dimension, "nothing") == annotation[dimension]
        return right / len(annotation)
    """,
    LENGTH: """
        if num_tokens <= low:
            return 0.0
        return 1.0 if num_tokens >= high else (num_tokens - low) / (high - low)
    """,
    ROLLOUT: """
        q, f, l = quality_reward(text, annotation), format_reward(text), length_reward(num_tokens, *length_range)
        return RolloutReward(weights[0] * q + weights[1] * f + weights[2] * l, q, f, l)
    """,
    HITS: """
        labels, margins = np.asarray(labels), np.asarray(margins, float)
        order = np.argsort(abs(margins), kind="stable")
        labels, margins = labels[order], margins[order]
        ties = np.concatenate([[0], np.cumsum(labels == 0)])
        won = np.concatenate([[0], np.cumsum(labels * margins > 0)])
        return abs(margins), ties + won[-1] - won
    """,
    CURVE: """
        labels, margins = checked(labels, margins)
        sizes, hits = _hits_by_ties(labels, margins)
        values, counts = np.unique(sizes, return_counts=True)
        return np.array([-1, *values]), hits[[0, *np.cumsum(counts)]] / len(labels)
    """,
    TIES: """
        pairs = zip(*accuracy_curve(labels, margins))
        accuracy, threshold = max((a, -t) for t, a in pairs)
        return float(accuracy), -float(threshold)
    """,
    ATTENTION: """
        if spans is None:
            kwargs = {"scaling": scaling, "dropout": dropout, **more}
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        query, key = query.to(value.dtype), key.to(value.dtype)
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        allowed = torch.zeros(len(query), 1, length, length, dtype=torch.bool)
        used = torch.zeros(len(query), 1, length, 1, dtype=torch.bool)
        for b, (prefix, cots) in enumerate(spans):
            for start, n in [(0, prefix), *cots]:
                allowed[b, 0, start : start + n, :prefix] = allowed[b, 0, start : start + n, start : start + n] = True
                used[b, 0, start : start + n] = True
        mask = allowed.tril() | torch.eye(length, dtype=torch.bool)
        out = scaled_dot_product_attention(query, key, value, mask.to(query.device), scale=scaling, dropout_p=dropout)
        return (out * used.to(query.device)).transpose(1, 2), None
    """,
}

TWO_TESTS = {  # exercise 10, solved
    "test_group_advantages": """
        got = group_advantages(torch.tensor([[0.0, 1.0], [0.0, 100.0]]))  # std sqrt(.5) and 70.7: the same A
        assert torch.allclose(got, torch.tensor([[-0.7071, 0.7071]] * 2), atol=0.01)
        assert group_advantages(torch.tensor([[0.7]])).tolist() == [[0.0]]
        assert not group_advantages(torch.tensor([[0.86] * 8, [0.1, 0.2] * 4]))[0].any()
    """,
    "test_accuracy_with_ties": """
        assert accuracy_with_ties([1, 0, -1], [2, 0.5, -1]) == (1.0, 0.5)
        assert accuracy_with_ties([1, -1], [1, -2]) == (1.0, -1.0)  # nothing is tied
        assert accuracy_with_ties([0, 1, 1], [1, 1, 1])[0] < 0.67  # no cut inside the run: at most two of three
    """,
}


# ---------------------------------------------------------------------------------------------------------------
# A file with a change, and its functions
# ---------------------------------------------------------------------------------------------------------------
def source(file: str) -> str:
    return MY_TESTS if file == "my_tests.py" else (ROOT / file).read_text(encoding="utf-8")


def with_changes(place: str, changes) -> str:
    """The file's text with the changes made inside one function. ValueError where one no longer fits the reference."""
    file, name = place.split("::")
    before, function, after = cut_out(source(file), name)
    for right, wrong in changes:
        if right not in function:
            raise ValueError(f"{place} no longer holds {right!r}: make the mistake anew in lab/course/mistakes.py")
        function = function.replace(right, wrong)
    return before + function + after


def cut_out(text: str, name: str) -> tuple[str, str, str]:
    """The text before a top-level function, the function, and the text behind it."""
    lines = text.splitlines(keepends=True)
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name)
    parts = lines[: node.lineno - 1], lines[node.lineno - 1 : node.end_lineno], lines[node.end_lineno :]
    return tuple("".join(part) for part in parts)


def with_bodies(file: str, bodies: dict[str, str]) -> str:
    """The file's text with other bodies in some functions; {place: body}."""
    text = source(file)
    for place, body in bodies.items():
        before, function, after = cut_out(text, place.split("::")[1])
        kept = split_body(ast.parse(function).body[0])[0]
        body = textwrap.indent(textwrap.dedent(body).strip(), "    ")
        text = before + "\n".join([*function.splitlines()[: kept[-1].end_lineno], body]) + "\n" + after
    return text


@functools.lru_cache
def implementations(place: str) -> dict:
    """{"right", "rewritten" or a mistake's test name: function}, for exercise 10. Ours, so they run in this process."""
    file, name = place.split("::")
    places = next(e.places for e in EXERCISES if place in e.places)
    texts = {"right": source(file), "rewritten": with_bodies(file, {p: REWRITES[p] for p in places})}
    texts |= {m.test: with_changes(m.place, m.changes) for m in MISTAKES if m.test and m.place in places}
    found = {}
    for key, text in texts.items():
        module = types.ModuleType(key)
        exec(compile(text, file, "exec"), vars(module))
        found[key] = getattr(module, name)
    return found
