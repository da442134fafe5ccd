"""lab/plan.py: the bytes it counts are those that training holds, as far as a small model shows them."""

import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

from lab import plan
from model import DeScore


def test_plan_counts_what_training_holds(base_dir):
    """The states of the plan, byte for byte against a model after one update; and the 8B has its published size."""
    wanted = plan.Plan(plan=base_dir, stage=1, train="full", gpus=1)
    model = DeScore.from_pretrained(base_dir, new_head=True)
    model.make_trainable("full", vision=True)
    trained = [p for name, p in model.named_parameters() if name not in ("query", "head.weight")]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    weights, gradients, adam = list(plan.plan_memory(plan.model_config(base_dir), wanted).values())[:3]
    assert (weights, gradients, adam) == (size(trained), size(p.grad for p in trained), size(moments))
    model.make_trainable("lora", vision=False, lora_r=4)
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert plan.count_parameters(model.backbone.config, 4)["lora"] == adapters
    sizes = plan.count_parameters(plan.model_config("8B"), 64)
    assert round((sizes["llm"] + sizes["vision"]) / 1e9, 2) == 8.77


def test_plan_counts_what_a_block_keeps_for_backward():
    """The bytes that one real text block saves per token, as autograd's own hooks see them: within 5 %."""
    text = plan.model_config("8B").text_config
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
             "intermediate_size": 1536}
    text.update({**sizes, "_attn_implementation": "sdpa"})
    block = Qwen3VLTextDecoderLayer(text, 0).bfloat16()
    weights, saved = {parameter.data_ptr() for parameter in block.parameters()}, {}

    def note(tensor):
        if tensor.data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    states = torch.randn(1, 256, 512, dtype=torch.bfloat16, requires_grad=True)
    rotary = torch.randn(1, 256, 64).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(states, position_embeddings=(rotary, rotary), attention_mask=None, position_ids=None)
    measured = sum(size for _, size in saved.values()) / 256
    assert plan.block_bytes(text, 256, 0, 1) == pytest.approx(measured, rel=0.05)


def test_plan_moves_the_right_way(capsys):
    config, total = plan.model_config("8B"), {}
    for gpus in (1, 8):
        for train in ("lora", "full"):
            wanted = plan.Plan(gpus=gpus, train=train)
            total[gpus, train] = sum(plan.plan_memory(config, wanted).values())
    assert total[1, "full"] > total[1, "lora"] > total[8, "lora"] and total[8, "full"] < total[1, "full"] / 3
    slow, fast = (plan.plan_time(config, plan.Plan(gpus=n)) for n in (1, 8))
    assert slow["update"] == pytest.approx(8 * fast["update"])
    plan.main(["--plan", "8B", "--gpus", "1", "--train", "full"])
    assert "DOES NOT FIT" in capsys.readouterr().out
