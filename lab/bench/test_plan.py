"""lab.bench.plan: its sizes are the real class's, the table says what `--plan` says, docs/machines.md has both."""

import os
import re
import shlex
import types

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

import cold_start
import collect_cots
import evaluate
import grpo
import parallel
from lab.bench import plan, real
from model import DeScore
from plumbing import gpu, settings, training
from plumbing.adapters import cast_input
from prefix_once import Past
from plumbing.settings import evaluation_flags, grpo_flags, collecting_flags
from tests.conftest import ROOT

PAGE = (ROOT / "docs/machines.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", plan.SIZES)
def test_parameters_of_the_real_class(name):
    """On the meta device, so that nothing is allocated; a tied matrix counts once."""
    size, config = plan.SIZES[name], plan.model_config(name)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == size.parameters
    words, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert (words is head) == size.tied and words.shape == (151_936, size.hidden)
    entries = sum(value.numel() for value in model.state_dict().values())  # both names of the matrix
    assert entries - size.parameters == size.tied * words.numel()
    counts = plan.count_parameters(config, 64)
    assert counts["llm"] + counts["vision"] == size.parameters


@pytest.mark.real
def test_the_8b_is_the_published_one(real_processor):
    published, ours = AutoConfig.from_pretrained(os.environ["QWEN3_VL"]), plan.model_config("8B")
    for part, names in (("text_config", ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                                         "num_key_value_heads", "head_dim", "vocab_size")),
                        ("vision_config", ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size",
                                           "deepstack_visual_indexes", "num_position_embeddings"))):
        for field in names:
            assert getattr(getattr(published, part), field) == getattr(getattr(ours, part), field), field
    assert published.tie_word_embeddings == ours.tie_word_embeddings


def test_head_only_holds_the_llm_in_bf16_and_nothing_else(base_dir):
    """Byte for byte against a model that is loaded so."""
    model = DeScore.from_pretrained(base_dir, new_head=True, dtype=torch.bfloat16)
    model.make_trainable("head", vision=False)
    backbone = [p for name, p in model.named_parameters() if name not in ("query", "head.weight")]
    assert not any(p.requires_grad for p in backbone)
    wanted = plan.Plan(plan=base_dir, stage=1, train="head", train_vision=False, gpus=1)
    weights, gradients, adam, copies = list(plan.plan_memory(plan.model_config(base_dir), wanted).values())[:4]
    assert weights == sum(p.nbytes for p in backbone) and gradients == adam == copies == 0


def test_the_reference_of_lab_real_is_held_as_the_plan_counts_it(base_dir):
    """With --bf16: in bf16, as grpo.py loads it on a GPU; what is trained in fp32."""
    s = real.Settings(model=base_dir, bf16=True)
    held = {train: real.load(base_dir, s, parallel.Ranks(), train, 2).backbone.dtype for train in ("head", "full")}
    assert held == {"head": torch.bfloat16, "full": torch.float32}


def test_a_gpu_too_small_for_vllm_is_told():
    """8B: 17.5 GB of weights are more than 40 % of 24 GB, whatever the trainer holds; of four GPUs each holds 4.4."""
    config = plan.model_config("8B")
    n = plan.count_parameters(config, 64)
    small = plan.Plan(train="lora", gpus=8, gpu_gb=24.0)
    memory = plan.plan_memory(config, small, n)
    assert not plan.judge(memory, small, 8.77e9, config.text_config).fits_sampling
    small.engine_tp = 4
    assert plan.judge(memory, small, 8.77e9, config.text_config).fits_sampling
    one = plan.plan_time(config, plan.Plan())["rollouts"]
    assert plan.plan_time(config, plan.Plan(engine_tp=8))["rollouts"] < one  # a GPU reads an eighth of the weights


def test_the_page_shows_the_table():
    assert plan.table(plan.Plan()) in PAGE


def test_the_table_says_what_plan_says(capsys):
    """Two places of it, by the command for one size."""
    rows = [row.strip("| ").split(" | ") for row in plan.table(plan.Plan()).split("\n")]
    cells = {(size, run): places for size, run, *places in rows}
    for flags, place in (("--plan 8B --gpus 8", ("8B", "2, full", 3)),
                         ("--plan 2B --gpus 1 --gpu-gb 24 --stage 1 --train lora", ("2B", "1, LoRA and vision", 0))):
        plan.main(flags.split())
        text = capsys.readouterr().out
        assert cells[place[:2]][place[2]] == max(re.findall(r"([\d.]+) GiB  (?:in all|while)", text), key=float)
        assert "DOES NOT FIT" not in text


def lines():
    """Every command of the page: (script, flags, ranks)."""
    joined = PAGE.replace("\\\n", " ")
    found = re.findall(r"^(?:python|torchrun) .*$", joined, flags=re.MULTILINE)
    for line in found + re.findall(r"`((?:python|torchrun) [^`]+)`", joined):
        words = shlex.split(line.split("  #")[0])
        ranks = 1
        for flag in {"--nproc_per_node", "--nnodes"} & set(words):
            ranks *= int(words[words.index(flag) + 1])
        at = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("lab."))
        yield words[at], words[at + 1 :], ranks


CLASSES = {"cold_start.py": cold_start.Settings, "grpo.py": grpo.Settings, "collect_cots.py": collect_cots.Settings,
           "evaluate.py": evaluate.Settings, "lab.bench.plan": plan.Plan, "lab.bench.real": real.Settings}


def test_every_line_of_the_page_is_taken_by_its_script(monkeypatch):
    """By the real parser, and by the checks that compare flags with each other and with the number of ranks."""
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: name)  # as on a machine that has vLLM
    seen = set()
    for script, flags, ranks in lines():
        found = settings.parse(CLASSES[script], "", flags)
        world = types.SimpleNamespace(world=ranks)
        if script == "grpo.py":
            grpo_flags(found, world)
        if script in ("grpo.py", "cold_start.py"):
            training.divide(10**6, found, world)
        if script == "collect_cots.py":
            collecting_flags(found)
        if script == "evaluate.py":
            evaluation_flags(found)
        seen.add(script)
    assert seen == set(CLASSES)


@pytest.mark.parametrize("flags", [
    "--plan 2B --gpus 1 --gpu-gb 24 --stage 1 --train lora --cot-tokens 2048",
    "--plan 2B --gpus 1 --gpu-gb 24 --stage 1 --train head --no-train-vision --cot-tokens 2048",
    "--plan 2B --gpus 1 --gpu-gb 24 --train lora --cot-tokens 2048",
    "--plan 2B --gpus 1 --gpu-gb 24 --train lora --cot-tokens 4096 --rollouts 4",
    "--plan 2B --gpus 1 --train full --cot-tokens 4096",
    "--plan 8B --gpus 1 --stage 1 --train lora --cot-tokens 4096",
    "--plan 8B --gpus 1 --train lora --cot-tokens 4096",
    "--plan 8B --gpus 8 --train full --cot-tokens 4096",
    "--plan 32B --gpus 8 --train lora --cot-tokens 2048 --engine-tp 2 --engine-memory 0.5",
])
def test_what_the_page_recommends_fits(flags, capsys):
    """With CoTs as long as its lines allow, not as long as they are on average."""
    plan.main(flags.split())
    assert "DOES NOT FIT" not in capsys.readouterr().out


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


@pytest.fixture
def text():
    """A small LLM's configuration."""
    found = plan.model_config("8B").text_config
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
             "intermediate_size": 1536}
    found.update({**sizes, "_attn_implementation": "shared_prefix"})
    return found


def kept_bytes(block, states, **more) -> float:
    """What a block's forward keeps for its backward, as autograd's own hooks see it, per token."""
    weights, saved = {parameter.data_ptr() for parameter in block.parameters()}, {}

    def note(tensor):
        if tensor.data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    rotary = torch.randn(1, states.shape[1], 64).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(states, position_embeddings=(rotary, rotary), attention_mask=None, position_ids=None, **more)
    return sum(size for _, size in saved.values()) / states.shape[1]


@pytest.mark.parametrize("behind", [False, True])
def test_plan_counts_what_a_block_keeps_for_backward(text, behind):
    """Of a prefix of 256 tokens, which is kept, and of 4 CoTs of 64 behind it: within 5 %."""
    block, past = Qwen3VLTextDecoderLayer(text, 0).bfloat16(), Past()
    states = torch.randn(1, 256, 512, dtype=torch.bfloat16, requires_grad=True)
    measured = kept_bytes(block, states, spans=[(256, [])], keep=past.keep)
    if behind:
        cots = [(64 * i, 64) for i in range(4)]
        measured = kept_bytes(block, states, spans=[(256, cots)], past=past.layers.__getitem__)
    assert gpu.block_bytes(text, 256, 64 if behind else 0) == pytest.approx(measured, rel=0.05)


def test_plan_counts_what_lora_s_dropout_keeps(text):
    """To the byte, but that a CPU's masks have two bytes and a GPU's one; without dropout LoRA keeps less than full."""
    found, states = [], torch.randn(1, 256, 512, dtype=torch.bfloat16, requires_grad=True)
    for dropout in (0.0, 0.05):
        block = Qwen3VLTextDecoderLayer(text, 0).bfloat16().requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=4, lora_dropout=dropout, target_modules=r".*_proj"), block)
        for layer in block.modules():
            layer._cast_input_dtype = cast_input
        with torch.autocast("cpu", torch.bfloat16):
            found.append(kept_bytes(block.train(), states, spans=[(256, [])]))
    more = gpu.block_bytes(text, dropout=True) - gpu.block_bytes(text)
    assert found[1] - found[0] == more + 5 * 512 + 512 + 1536 and found[0] < gpu.block_bytes(text)


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


def test_a_step_of_stage_2_has_all_of_its_passes():
    """grpo.train: old log-probs unless on-policy, the reference unless --kl-coef 0. What the tower saw for the
    reference serves the policy, not the pass before the update."""
    config = plan.model_config("8B")
    def update(stage=2, **more):
        return plan.plan_time(config, plan.Plan(train="full", stage=stage, **more))["update"]

    forward = update(kl=True, mini_pairs=128) - update(kl=False, mini_pairs=128)
    old = update() - update(mini_pairs=128)
    tower = old - forward
    assert update() == pytest.approx(6 * forward + 2 * tower, rel=0.01)  # forward, recomputed, 2 backward; old; KL's
    assert update(gradient_checkpointing=False) == pytest.approx(update() - forward)
    with_tower = [update(1, train_vision=True, gradient_checkpointing=g) for g in (False, True)]
    without = [update(1, train_vision=False, gradient_checkpointing=g) for g in (False, True)]
    shares = [(a - b) / (with_tower[1] - without[1]) for a, b in zip(with_tower, without)]
    assert shares == pytest.approx([2 / 3, 1])  # 3 forwards' worth and 4, less the one that a frozen tower needs


def test_who_samples_decides_how_long_it_takes():
    """transformers: so many CoTs at a time as --rows-per-batch says; vLLM: as many as its memory holds."""
    config = plan.model_config("8B")
    def rollouts(**more):
        return plan.plan_time(config, plan.Plan(**more))["rollouts"]

    few, many = (rollouts(engine="transformers", rows_per_batch=rows) for rows in (8, 64))
    assert few > 3 * many and many == rollouts(engine="transformers", engine_memory=0.9)
    assert rollouts() == rollouts(rows_per_batch=8) > rollouts(engine_memory=0.9)


def test_vllm_samples_when_the_copies_of_an_update_are_gone():
    """On one GPU autocast holds the trained weights in bf16 while it is on; transformers' engine samples under it."""
    s = plan.Plan(gpus=1, train="full", gpu_gb=141.0)
    config = plan.model_config("4B")
    memory, n = plan.plan_memory(config, s), plan.count_parameters(config, s.lora_r)
    states = sum(size for use, size in memory.items() if use.startswith(("weights", "gradients", "AdamW", "reference")))
    verdict = plan.judge(memory, s, n["llm"] + n["vision"], config.text_config)
    assert verdict.sampling == pytest.approx(states + 0.4 * 141e9) and verdict.fits
