"""The coupled generative model of Fig. 1a: its score is text, and is trained by the policy gradient alone. Not DeScore.

    python -m lab.study.coupled --model runs/base --data runs/data/train_rl.csv --out runs/coupled ...

What grpo.py does, with another R_qual: a CoT is rewarded for stating a score that ranks the pair as people did, so the
pairs need labels and no verdicts. --model may be a base model; BT has no weight, the head is never trained, and the
checkpoint says that its score is the text's. The paper does not say how its baseline was rewarded.
"""

import dataclasses
import os

import grpo
from plumbing.checkpoint import SETTINGS_FILE
from plumbing.hub import local_folder
from plumbing.settings import arg, cli, parse
from rollout import decode_cot
from rules import RolloutReward, format_reward, length_reward, overall_score


@dataclasses.dataclass
class Settings(grpo.Settings):
    """Those of stage 2, but for two."""

    model: str = arg(None, "a base model, or a DeScore folder")
    bt_coef: float = arg(0.0, "weight of BT over rollouts; 0: the score is the text's", at_least=0)


def win_shares(own: list[float], other: list[float]) -> list[float]:
    """For each of `own` the share of `other` that it exceeds; equal counts 1/2. [4, 2], [3, 2] -> [1, .25]."""
    return [sum((s > o) + 0.5 * (s == o) for o in other) / len(other) for s in own]


def preference_rewards(rollouts: grpo.PairRollouts, tokenizer, settings) -> list[list[RolloutReward]]:
    """Step 3: [2][G] rewards. Only R_qual is not that of rules.py:

        R_qual = S_i R_fmt,  S_i = 1/G Σ_j [1(s_i^w > s_j^l) + ½ 1(s_i^w = s_j^l)]

    for the winner's rollout i, mirrored for the loser's; s is the `overall_score` that a CoT states (none: 3, and
    R_fmt is 0). For a human tie S is ½ for all, and teaches nothing.
    """
    texts = [[decode_cot(tokenizer, cot) for cot in row] for row in rollouts.cots]
    # Times the label: a winner wants the higher score, a loser the lower one, so that its -s exceeds the winner's.
    a, b = ([rollouts.pair.label * overall_score(text) for text in row] for row in texts)
    shares = win_shares(a, b), win_shares([-s for s in b], [-s for s in a])
    rewards = []
    for row, cots, wins in zip(texts, rollouts.cots, shares, strict=True):
        rewards.append([])
        for text, cot, share in zip(row, cots, wins, strict=True):
            well, length = format_reward(text), length_reward(len(cot), settings.length_low, settings.length_high)
            total = settings.weight_quality * share * well + settings.weight_format * well
            rewards[-1].append(RolloutReward(total + settings.weight_length * length, share * well, well, length))
    return rewards


def main(argv=None) -> None:
    """As grpo.main: reads the data, opens the model, trains, saves."""
    settings = parse(Settings, __doc__, argv)
    ranks, pairs = grpo.begin(settings)
    from_base = not os.path.isfile(os.path.join(local_folder(settings.model), SETTINGS_FILE))
    model = grpo.open_policy(settings, ranks, new_head=from_base)
    if from_base and settings.bt_coef == 0:  # its score is in the text, and nothing trains the head
        model.settings["score"] = "text"
    grpo.run(model, pairs, settings, ranks, preference_rewards)


if __name__ == "__main__":
    cli(main)
