"""lab/study/models.py against the heart's own update."""

import dataclasses

import grpo
import losses
from lab.study import coupled, models
from tests.test_answers import cot
from tests.test_grpo import Scripted, items, settings, update_gradients  # noqa: F401 (two are fixtures)


def test_the_study_s_gradients_are_those_of_the_update(items, model, settings):  # noqa: F811
    """lab/study/models.py::one_draw measures three losses of the same CoTs; each is what `update` would step along."""
    plain = dataclasses.replace(settings, max_grad_norm=1e9, bt_coef=0.0, length_low=0, length_high=1)
    tokenizer, name = model.processor.tokenizer, "backbone.model.language_model.layers.0.mlp.up_proj.weight"
    texts = [cot(**{"style": n % 3, "subject": n % 2}).replace("3.5", f"{1 + n * 7 % 5}.{n % 10}") for n in range(12)]

    def step(rewards, **changes):
        batch = grpo.generate(items, Scripted(tokenizer, texts), plain, 0)
        for rollouts in batch:
            rollouts.rule_rewards = rewards(rollouts, tokenizer, plain)
            rollouts.advantages = losses.group_advantages(rollouts.totals())
        return update_gradients(model, batch, dataclasses.replace(plain, **changes))[0][name].flatten()

    expected = {"GRPO, rules": step(grpo.rule_rewards), "GRPO, preference": step(coupled.preference_rewards)}
    expected["BT"] = step(grpo.rule_rewards, bt_coef=1.0) - expected["GRPO, rules"]
    parameters = [dict(model.named_parameters())[name]]
    found = models.one_draw(model, items, Scripted(tokenizer, texts), plain, parameters, draw=0)
    assert found.keys() == expected.keys()
    for kind, gradient in found.items():
        assert expected[kind].norm() > 0, kind
        assert (gradient - expected[kind]).norm() <= 1e-4 * expected[kind].norm() + 1e-8, kind
    assert (found["GRPO, rules"] - found["GRPO, preference"]).norm() > 0.1 * found["GRPO, rules"].norm()
