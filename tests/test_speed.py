"""What makes a GPU faster must change no result: casts left out, parts compiled, no read of a tensor inside a step.

On a CPU, where kernels can be counted and the same numbers expected; how much faster a GPU gets, only a GPU tells.
"""

import collections
import copy
import dataclasses
import os
import re
import shutil
import traceback
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl import modeling_qwen3_vl

import cold_start
import data
import grpo
import parallel
import rollout
from losses import bt_loss
from model import DeScore
from plumbing import decoder, gpu, logs, settings
from plumbing.settings import InputError
from rollout import sample_cots
from tests.conftest import ROOT, refuses


class Calls(TorchDispatchMode):
    """Counts the kernels that run inside."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def items(world, processor):
    """Two pairs with CoTs, as the loader gives them."""
    pairs = [dataclasses.replace(pair, cot_a="<think>one</think>", cot_b="<think>two two</think>")
             for pair in data.read_pairs(world["train_cold_start"])[:2]]
    dataset = data.EncodedPairs(pairs, processor)
    return [dataset[0], dataset[1]]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- peft's casts ---------------------------------------------------------------------------------------------
def lora_model(base_dir, dropout=0.0):
    """As on a GPU: the base in bf16, adapters in fp32, B not 0."""
    model = DeScore.from_pretrained(base_dir, new_head=True, dtype=torch.bfloat16)
    model.make_trainable("lora", vision=False, lora_r=4, lora_dropout=dropout)
    generator = torch.Generator().manual_seed(0)
    for layer in model.lora_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1, generator=generator)
    torch.nn.init.normal_(model.head.weight, std=0.5, generator=generator)
    return model.train()


def cast_step(model, items):
    """A step of stage 1 under autocast: (loss, gradients, number of casts)."""
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    with Calls() as calls:
        with torch.autocast("cpu", torch.bfloat16):
            rewards = cold_start.score_pairs(model, items)
        loss = bt_loss(*rewards)
        loss.backward()
    return loss.item(), gradients(model), calls.found["_to_copy"]


def test_casts_that_autocast_undoes_are_left_out(base_dir, items):
    """Bit for bit what peft's own cast gives, with fewer kernels: of each of 14 adapters a cast up and one back down,
    in the forward, when a block is computed again, and in the backward."""
    ours, theirs = lora_model(base_dir), lora_model(base_dir)
    for layer in theirs.lora_layers().values():
        del layer._cast_input_dtype  # peft's own again
    loss, found, casts = cast_step(ours, items)
    expected_loss, expected, more_casts = cast_step(theirs, items)
    assert loss == expected_loss and all(torch.equal(found[name], expected[name]) for name in expected)
    assert any("lora_A" in name and grad.any() for name, grad in found.items())
    assert more_casts - casts == 14 * 2 * 3, (casts, more_casts)


def test_without_autocast_the_cast_is_there(base_dir, items):
    """`think` on a GPU runs without: a bf16 input meets fp32 adapters. And fp32 all through has nothing to cast."""
    with torch.no_grad():
        rewards = cold_start.score_pairs(lora_model(base_dir).eval(), items)
    assert all(torch.isfinite(reward).all() for reward in rewards)


# ---- --compile ------------------------------------------------------------------------------------------------
@pytest.fixture
def compiling(monkeypatch):
    """Compiles a model's parts; afterwards transformers' rotary embedding is its own again."""
    monkeypatch.setattr(modeling_qwen3_vl, "apply_rotary_pos_emb", modeling_qwen3_vl.apply_rotary_pos_emb)
    torch._dynamo.reset()
    yield lambda model, backend: gpu.compile_parts(model, True, torch.device("cpu"), backend)
    torch._dynamo.reset()


def stage_2_gradients(model, world):
    """One pair with G = 2, one CoT of each video at a time, and the reference without adapter: (sums, gradients)."""
    settings = grpo.Settings(rollouts=2, batch_pairs=1, mini_pairs=1, micro_rollouts=1, kl_coef=0.01, bt_coef=0.5)
    pair, prefixes = data.EncodedPairs(data.read_pairs(world["train_rl"]), model.processor)[0]
    cots = [[[70, 71, 72], [80] * 9], [[75], [76, 77] * 9]]
    rollouts = grpo.PairRollouts(pair, prefixes, cots, advantages=torch.tensor([[1.0, -0.5], [0.2, -1.0]]))
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    sums = logs.Sums()
    grpo.backward_pair(model.train(), None, rollouts, settings, parallel.Ranks(), {"tokens": 31, "bt": 2}, sums)
    return sums.totals(), gradients(model)


@pytest.mark.slow
def test_compiled_parts_compute_the_same(model, world, compiling, tmp_path, monkeypatch):
    """LoRA, the reference with the adapter off, gradient checkpointing; names and files as before.

    Behind a step's other passes: sampling, old log-probs. No part may run out of traces and go on uncompiled.

    By the backend that traces and differentiates as inductor does, and leaves out its minutes of C++. With inductor on
    a CPU, once by hand: losses to 2e-6, gradients to 6e-6 of their norm.
    """
    model.make_trainable("lora", vision=False, lora_r=4, lora_dropout=0.0)
    for layer in model.lora_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    plain, names = copy.deepcopy(model), list(model.state_dict())
    expected, wanted = stage_2_gradients(plain, world)
    assert compiling(model, "aot_eager")
    pair, prefixes = data.EncodedPairs(data.read_pairs(world["train_rl"]), model.processor)[0]
    sample_cots(model.backbone, model.processor, prefixes, [[1, 2], [3, 4]], 3)
    rollouts = grpo.PairRollouts(pair, prefixes, [[[70, 71], [80]], [[75], [76]]], advantages=torch.ones(2, 2))
    grpo.log_probs_now(model.train(), rollouts, grpo.Settings(rollouts=2), parallel.Ranks())
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        sums, found = stage_2_gradients(model, world)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    assert all(sums[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6) for name in expected)
    assert all((found[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm() for name in wanted)
    assert list(model.state_dict()) == names
    for one, folder in ((plain, tmp_path / "plain"), (model, tmp_path / "compiled")):
        one.save_pretrained(str(folder))
    a, b = (DeScore.from_pretrained(str(tmp_path / name)).state_dict() for name in ("plain", "compiled"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_sampling_draws_the_same(model, world, compiling, monkeypatch, traced, autocast):
    """The same CoTs as with a cache that grows: for other numbers of rows and lengths, and after an update, by two
    traces in all. Under autocast the cache takes keys in fp32 and values in bf16, and keeps both in bf16.

    By the backend that leaves out C++. On a trained toy with inductor, by hand: equal, in .64 of the time.
    """
    monkeypatch.setattr(gpu.DECODING, "_compile_all_devices", traced)  # False: the cache alone, on a CPU
    model.make_trainable("lora", vision=False, lora_r=4, lora_dropout=0.0)
    pairs = data.EncodedPairs(data.read_pairs(world["train_rl"]), model.processor)
    prefixes = [prefix for i in range(2) for prefix in pairs[i].prefixes]
    monkeypatch.setattr(gpu.DECODING, "backend", "aot_eager")
    monkeypatch.setattr(gpu.DECODING, "fullgraph", True)  # no break in the trace
    caches, fixed = [], rollout.fixed_cache
    monkeypatch.setattr(rollout, "fixed_cache", lambda *args: caches.append(fixed(*args)) or caches[-1])
    torch._dynamo.utils.counters.clear()
    for some, seeds in ((prefixes, [[1], [2, 3], [4], [5]]), (prefixes[:2], [[6], [7]]), (prefixes[1:], [[8]] * 3)):
        for layer in model.lora_layers().values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)  # an update
        with torch.autocast("cpu", torch.bfloat16, autocast):
            plain, found = (sample_cots(model.train().backbone, model.processor, some, seeds, 8, compiled=compiled)
                            for compiled in (False, True))
        first = [[cot[0] for row in cots for cot in row] for cots in (found, plain)]
        assert found == plain or autocast and first[0] == first[1]  # in bf16 a later token may be a near tie
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * traced  # the second's rows are a symbol
    layer = caches[0].layers[0]
    assert layer.keys.dtype == layer.values.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert layer.keys.shape[2] == 64


def test_compile_is_for_gpus_unless_asked(model, monkeypatch, compiling):
    """And only where what it needs is there: no run may end at its first step because of a default."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert not gpu.compile_parts(model, None, cpu) and not gpu.compile_parts(model, False, cuda)
    layer = model.backbone.model.language_model.layers[0]
    assert layer.mlp._compiled_call_impl is None
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert not gpu.compile_parts(model, None, cuda)
        with pytest.raises(InputError, match="--compile: needs a C compiler"):
            gpu.compile_parts(model, True, cuda)
    assert gpu.compile_parts(model, None, cuda) and layer.mlp._compiled_call_impl is not None


# ---- Reads of tensors -----------------------------------------------------------------------------------------
class OnCard(torch.Tensor):
    """What came through `to_device`, and all that is computed from it: Python that reads it waits for the GPU."""

    reads = collections.Counter()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu"):
            frames = traceback.extract_stack()[:-1]
            ours = [f for f in frames if "site-packages" not in f.filename and f.filename.startswith(str(ROOT))]
            inside = [f.name for f in frames if "qwen3_vl" in f.filename]
            where = f"{os.path.basename(ours[-1].filename)}:{ours[-1].name}" if not inside else f"qwen3_vl:{inside[-1]}"
            cls.reads[where] += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def reads_of_a_step(base_dir, csv, out, micro_pairs, monkeypatch):
    """Who reads tensors in a step of stage 1 with four pairs."""
    with monkeypatch.context() as patch:
        move = cold_start.to_device
        patch.setattr(cold_start, "to_device", lambda batch, device: {
            name: value.as_subclass(OnCard) if torch.is_tensor(value) else value
            for name, value in move(batch, device).items()})
        OnCard.reads.clear()
        cold_start.main(["--model", base_dir, "--data", csv, "--out", str(out), "--batch-pairs", "4", "--workers", "0",
                         "--micro-pairs", str(micro_pairs), "--max-steps", "1", "--mask-probability", "1", "--lora-r",
                         "4"])
    return dict(OnCard.reads)


def test_a_step_reads_its_numbers_once(base_dir, world, tmp_path, monkeypatch):
    """However many forwards it has; and no layer of the tower reads where its frames end, as 27 would, three times."""
    one, four = (reads_of_a_step(base_dir, world["train_cold_start"], tmp_path / str(n), n, monkeypatch)
                 for n in (4, 1))
    ours = {where: count for where, count in four.items() if not where.startswith("qwen3_vl")}
    assert ours and ours == {where: count for where, count in one.items() if not where.startswith("qwen3_vl")}, four
    assert set(ours) == {"logs.py:read_numbers"} and sum(ours.values()) <= 3, ours
    inside = one.get("qwen3_vl:forward", 0) + one.get("qwen3_vl:<listcomp>", 0)  # of its lists
    assert inside <= 1, one  # all else is read before the layers, once


# ---- The optimizer --------------------------------------------------------------------------------------------
def test_the_optimizer_of_gpus_computes_the_same(model, monkeypatch):
    """Fused, as on a GPU, against one parameter after the other; gradients clipped together, to the bit."""
    model.make_trainable("full", vision=True)
    found = []
    for on_gpu in (False, True):
        one = copy.deepcopy(model)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
            optimizer = parallel.make_optimizer(one, cold_start.Settings(lr=1e-3, weight_decay=0.1))
        assert optimizer.defaults["fused"] == on_gpu
        parallel.set_learning_rate(optimizer, 1, 1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for parameter in one.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            parallel.take_step(one, optimizer, [], cold_start.Settings(out="."), parallel.Ranks())
        found.append(one.state_dict())
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


# ---- Memory ---------------------------------------------------------------------------------------------------
GIB = 2**30


@pytest.fixture(scope="module")
def config():
    """The 8B's."""
    text = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936}
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24],
              "num_heads": 16, "out_hidden_size": 4096, "num_position_embeddings": 2304}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


LORA = gpu.Load(stage=2, train="lora", gpus=1, video_tokens=1289, cot_tokens=1289)


@pytest.mark.parametrize("card, recompute", [(141, False), (48, True)])
def test_gradient_checkpointing_where_the_plan_does_not_fit_without(config, card, recompute):
    """8B, LoRA, stage 2: 18 GiB of weights and some 80 of activations that need not be kept."""
    chosen, text = gpu.choose(config, LORA, card * GIB)
    assert chosen == recompute and "out of memory" not in text
    assert ("without gradient" in text) != recompute and f"planned of {card}.0" in text
    for wanted in (True, False):  # as told, whatever the card
        assert gpu.choose(config, LORA, card * GIB, wanted)[0] == wanted


def test_a_card_too_small_is_told_what_would_fit(config):
    """Activations may be fewer than planned, so that is a warning; states are exact, so those end the run."""
    _, text = gpu.choose(config, dataclasses.replace(LORA, micro_rollouts=8), 26 * GIB)
    assert "it may run out of memory; --micro-rollouts 1 would take" in text
    with pytest.raises(InputError, match="not even the weights.*--train lora would take .*docs/machines.md"):
        gpu.choose(config, dataclasses.replace(LORA, train="full"), 80 * GIB)
    with pytest.raises(InputError, match="--micro-rollouts 1, torchrun --nproc_per_node 4 would take"):
        gpu.choose(config, LORA, 15 * GIB)
    assert "out of memory" not in gpu.choose(
        config, dataclasses.replace(LORA, train="full", cpu_offload=True), 80 * GIB)[1]


def test_what_sampling_holds_is_planned(config):
    """64 CoTs of 2,134 + 4,096 tokens, of 2 x 36 layers x 8 heads x 128 numbers in bf16: 54.7 GiB beside the weights,
    where an update takes less. Named is what lowers the peak that is too high; recomputing depends on the other."""
    load = dataclasses.replace(LORA, engine="transformers", video_tokens=2134, cot_tokens=4096)
    update = float(gpu.choose(config, dataclasses.replace(load, engine="vllm"), 75 * GIB, True)[1].split()[2])
    _, text = gpu.choose(config, load, 75 * GIB, True)
    states = 17.0 + 0.65 + 1.3 + 0.33  # as docs/machines.md has them, and the adapters' copies in bf16
    assert float(text.split()[2]) == pytest.approx(states + 54.7, abs=0.2) and update < 31
    assert "while sampling" in text and f"it may run out of memory; --rows-per-batch 8 would take {update:.1f}" in text
    assert gpu.choose(config, load, 75 * GIB)[0] and not gpu.choose(config, load, 400 * GIB)[0]
    short = dataclasses.replace(load, cot_tokens=64, rows_per_batch=200)
    assert not gpu.choose(config, short, 60 * GIB)[0]  # 80 GiB while sampling; an update fits without recomputing
    _, text = gpu.choose(config, dataclasses.replace(load, micro_rollouts=8), 30 * GIB)
    assert "--micro-rollouts 1, --rows-per-batch 8 would take" in text
    many = dataclasses.replace(load, rows_per_batch=400)
    both = re.findall(r"[0-9.]+(?= GiB planned| without)", gpu.choose(config, many, 900 * GIB, wanted=True)[1])
    assert both[0] == both[1]  # recomputing does not lower what sampling takes
    assert "sampling" not in gpu.choose(config, dataclasses.replace(load, rows_per_batch=8), 75 * GIB)[1]


def test_the_plan_of_a_run_is_made_from_its_settings():
    ranks = types.SimpleNamespace(world=4)
    one = gpu.load_of(cold_start.Settings(micro_pairs=3, lora_dropout=0), ranks, 2000)
    assert one == gpu.Load(stage=1, train="lora", gpus=4, video_tokens=1999, cot_tokens=0, micro_pairs=3,
                           lora_dropout=0)
    two = gpu.load_of(grpo.Settings(max_new_tokens=77, kl_coef=0, shard_ranks=2), ranks, 500)
    assert two == gpu.Load(stage=2, gpus=4, shard_ranks=2, video_tokens=500, cot_tokens=77, kl=False,
                           engine="transformers")
    more = gpu.load_of(grpo.Settings(cpu_offload=True, rows_per_batch=5), ranks, 500)
    assert more.cpu_offload and more.rows_per_batch == 5
    few = gpu.load_of(grpo.Settings(rollouts=4, batch_pairs=8, mini_pairs=8), ranks, 500)
    assert few.rows_per_batch == 16  # two pairs a rank, four CoTs for each of their videos: never more at a time


@pytest.mark.parametrize("gpus, offload", [(1, False), (8, False), (1, True)])
def test_a_copy_that_samples_beside_shards_is_counted(config, gpus, offload):
    """An unsharded 8B in bf16 is 16.3 GiB, as much as all shards' states of eight GPUs together on one of them."""
    def planned(engine):
        return sum(gpu.plan_memory(config, gpu.Load(gpus=gpus, cpu_offload=offload, engine=engine)).values()) / GIB

    more = planned("transformers") - planned("vllm")
    assert more == pytest.approx(16.33 if gpus > 1 or offload else 0.0, abs=0.01)


def test_a_full_gpu_names_the_flags_that_help(capsys):
    """And where a tensor did not fit; no traceback, exit code 2."""
    def full(argv):
        settings.parse(cold_start.Settings, "", argv)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    line = refuses(capsys, full, "--micro-pairs", "4", "--no-gradient-checkpointing", says="the GPU's memory is full")
    assert "Tried to allocate 2.00 GiB" in line and "--gradient-checkpointing, or a lower --micro-pairs (now 4)" in line
    with pytest.raises(RuntimeError, match="another"):
        settings.cli(lambda: (_ for _ in ()).throw(RuntimeError("another")))


# ---- Workers --------------------------------------------------------------------------------------------------
CASES = [(1, None, 2), (2, None, 2), (6, None, 4), (64, None, 8), (64, 0, 0)]


@pytest.mark.parametrize("cores, wanted, started", CASES)
def test_workers_by_the_cores_at_hand(monkeypatch, cores, wanted, started):
    loaders = []
    monkeypatch.setattr(data, "CORES", cores)
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *_, num_workers, **__: loaders.append(num_workers) or [])
    assert list(data.take([1], [0], wanted)) == [] and loaders == [started]
    assert cold_start.Settings().workers is None and decoder.CORES >= 1
