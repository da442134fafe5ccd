"""What only shows when FSDP2 casts: two gloo ranks in bf16."""

import json

import pytest

from conftest import ROOT, run


@pytest.mark.parametrize("train", ["lora", "full"])
def test_both_stages_under_mixed_precision(world, tiny_model_dir, train):
    """FSDP hands the forward a cast copy of its arguments, so features must travel through Output, not through the batch.
    Three passes over a pair, one look. Policy and reference have the same weights: KL 0 and ratio 1, in bf16 too."""
    done = run("tests/bf16_ranks.py", tiny_model_dir, world["train_rl"], train, ranks=2, env={"PYTHONPATH": str(ROOT)})
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["looks"] == 1 and not rank["kept"]
        assert rank["kl"] == pytest.approx(0.0, abs=1e-6) and rank["ratio"] == pytest.approx(1.0, abs=1e-3)
        assert 0 < rank["norm"] < 1e3
        # Hidden states are bf16; the vision tower's rotary tables are not cast with them.
        assert rank["types"] == [["text", "torch.bfloat16"], ["vision", "torch.bfloat16", "torch.float32"]]
        parts = ("grad_norm_llm", "grad_norm_vision", "grad_norm_head")
        assert all(0 < rank["stage 1"][part] < 1e4 for part in parts)
    # The same pair on both ranks: with LoRA's dropout their losses differ, without adapters they are equal.
    losses = [rank["stage 1"]["loss"] for rank in ranks]
    assert (losses[0] != losses[1]) == (train == "lora")
