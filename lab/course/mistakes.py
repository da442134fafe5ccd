"""Right code written otherwise, of each exercise, and exercise 10's code to be judged: the reference with one mistake.

The usual mistakes of the other exercises are in test_proof.py. Neither is part of a student's copy: a mistake is the
answer but for one word.
"""

import ast
import dataclasses
import functools
import pathlib
import textwrap
import types

from lab.course.copies import split_body, without_bodies
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
        """The file of `place`."""
        return self.place.split("::")[0]


def _m(place, what, lesson, *changes, test=""):
    return Mistake(place, what, lesson, changes, test)


BT, BTT, MASK = "losses.py::bt_loss", "losses.py::btt_loss", "losses.py::draw_cot_mask"
ADVANTAGES, KL, GRPO = (f"losses.py::{name}" for name in ("group_advantages", "kl_to_reference", "grpo_loss"))
ANSWERS, QUALITY = "rules.py::well_formed", "rules.py::quality_reward"
LENGTH, ROLLOUT = "rules.py::length_reward", "rules.py::rollout_reward"
ATTENTION, BEHIND = "layout.py::shared_prefix_attention", "layout.py::attend_behind"
HITS, CURVE, TIES = "metrics.py::_hits_by_ties", "metrics.py::accuracy_curve", "metrics.py::accuracy_with_ties"

MISTAKES = (
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
    _m(CURVE, "\"nothing is tied\" missing", "nothing_is_tied",
       ("np.append(NOTHING_TIED, sizes[ends]), np.append(hits[0], hits[ends + 1]) / len(labels)",
        "sizes[ends], hits[ends + 1] / len(labels)"), test="nothing_tied_missing"),
    _m(CURVE, "cuts inside equal runs", "no_cut_inside_a_run",
       ("np.flatnonzero(np.append(np.diff(sizes) > 0, True))", "np.arange(len(sizes))"),
       test="cut_inside_a_run"),
)

# Right code, written otherwise: a grader that refuses these tests style, not the method.
REWRITES = {
    ADVANTAGES: """
        result = torch.zeros(rollout_rewards.shape)
        for row, group in zip(result, rollout_rewards.float()):
            if len(set(group.tolist())) > 1:
                spread = (group - group.mean()).square().sum().div(len(group) - 1).sqrt()
                row.copy_((group - group.mean()) / (spread + epsilon))
        return result
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
    BT: """
        margin = reward_chosen.to(torch.float32) - reward_rejected.to(torch.float32)
        total = F.softplus(-margin).sum()
        return total / margin.numel() if denominator is None else total / denominator
    """,
    BTT: """
        margin, log_k = reward_a.float() - reward_b.float(), math.log(k)
        cost_a, cost_b = F.softplus(log_k - margin), F.softplus(log_k + margin)
        cost_tie = cost_a + cost_b - math.log(k**2 - 1)
        cost = torch.stack([cost_b, cost_tie, cost_a])[label + 1, torch.arange(len(label))]
        return cost.sum() / (len(cost) if denominator is None else denominator)
    """,
    MASK: """
        return torch.empty(num_pairs).bernoulli_(probability, generator=generator).bool()
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
    ATTENTION: """
        if spans is None:
            kwargs = {"scaling": scaling, "dropout": dropout, **more}
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        allowed = torch.zeros(len(query), 1, length, length, dtype=torch.bool)
        used = torch.zeros(len(query), 1, length, 1, dtype=torch.bool)
        for b, (prefix, cots) in enumerate(spans):
            for start, n in [(0, prefix), *cots]:
                allowed[b, 0, start : start + n, :prefix] = allowed[b, 0, start : start + n, start : start + n] = True
                used[b, 0, start : start + n] = True
        mask = allowed.tril() | torch.eye(length, dtype=torch.bool)
        scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        weights = scores.masked_fill(~mask.to(query.device), -torch.inf).softmax(-1)  # by hand, in fp32
        out = torch.dropout(weights, dropout, train=True).to(value.dtype) @ value
        return (out * used.to(query.device)).transpose(1, 2), None
    """,
}


# ---------------------------------------------------------------------------------------------------------------
# A file with a change, and its functions
# ---------------------------------------------------------------------------------------------------------------
def source(file: str) -> str:
    """The text of a file of the project; my_tests.py has the tests of exercise 10's solution."""
    return MY_TESTS if file == "my_tests.py" else (ROOT / file).read_text(encoding="utf-8")


def with_changes(place: str, changes) -> str:
    """The file's text with the changes made inside one function. ValueError where one no longer fits the reference."""
    file, name = place.split("::")
    before, function, after = cut_out(source(file), name)
    for right, wrong in changes:
        if right not in function:
            raise ValueError(f"{place} no longer holds {right!r}: make the mistake anew")
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
def implementations(place: str, variant: int = 0) -> dict:
    """{"right", "rewritten" or a mistake's test name: function}, for exercise 10. Ours, so they run in this process.

    With the defaults of the student's variant: an ε of .001 shows in the fourth digit that their test expects.
    """
    file, name = place.split("::")
    places = next(e.places for e in EXERCISES if place in e.places)
    texts = {"right": source(file), "rewritten": with_bodies(file, {p: REWRITES[p] for p in places})}
    texts |= {m.test: with_changes(m.place, m.changes) for m in MISTAKES if m.test and m.place in places}
    found = {}
    for key, text in texts.items():
        module = types.ModuleType(key)
        exec(compile(without_bodies(file, text, variant, blank=False), file, "exec"), vars(module))
        found[key] = getattr(module, name)
    return found
