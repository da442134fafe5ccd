"""What only shows when FSDP2 casts: two gloo ranks in bf16."""

import json

import pytest
import torch

from tests.conftest import ROOT, fresh_model, run


@pytest.fixture(scope="module")
def lines(world, base_dir, tmp_path_factory):
    """What each rank has seen, {train: [rank 0's, rank 1's]}; one start of the ranks for both ways to train.

    The folder is one of a stage with LoRA, which stands beside its base here."""
    ways, folder = ("lora", "full"), str(tmp_path_factory.mktemp("lora"))
    model = fresh_model(base_dir, 1)
    model.make_trainable("lora", vision=False, lora_r=4)
    for layer in model.lora_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    model.save_pretrained(folder)
    done = run("tests/bf16_ranks.py", folder, world["train_rl"], *ways, ranks=2, env={"PYTHONPATH": str(ROOT)})
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {train: [line for line in found if line["train"] == train] for train in (*ways, "copies")}


@pytest.mark.parametrize("train", ["lora", "full"])
def test_both_stages_under_mixed_precision(lines, train):
    """FSDP hands a forward a cast copy of its arguments: what `read` finds travels in what it returns.

    Three passes over a pair, two looks: one for the old log-probs, one for reference and policy.
    Policy and reference have the same weights: KL 0 and ratio 1, in bf16 too. Gradients are those of one process in
    fp32, up to bf16's rounding (one is .004)."""
    ranks = lines[train]
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["looks"] == 2
        assert rank["kl"] == pytest.approx(0.0, abs=1e-6) and rank["ratio"] == pytest.approx(1.0, abs=1e-3)
        assert 0 < rank["norm"] < 1e3 and rank["away"] < 0.03
        # Hidden states are bf16; the vision tower's rotary tables are not cast with them.
        assert rank["types"] == [["text", "torch.bfloat16"], ["vision", "torch.bfloat16", "torch.float32"]]
        assert rank["opened"] == [1, 1, 5]  # a layer: its hidden states, not all layers' prefixes, as the whole model
        parts = ("grad_norm_llm", "grad_norm_vision", "grad_norm_head")
        assert all(0 < rank["stage 1"][part] < 1e4 for part in parts)
    # The same pair on both ranks: with LoRA's dropout their losses differ, without adapters they are equal.
    losses = [rank["stage 1"]["loss"] for rank in ranks]
    assert (losses[0] != losses[1]) == (train == "lora")


def test_every_group_waits_as_long(lines):
    """torch gives the groups of a mesh 10 minutes with NCCL, 30 with gloo, whatever the first one has."""
    (found,) = lines["copies"]
    assert len(found["hours"]) >= 2 and set(found["hours"]) == {24.0}
