"""What a card computes, against the CPU: `make test-gpu`, one CUDA GPU. All other tests hide GPUs.

A GPU gives no bit-equality: it computes in bf16 under autocast, sums in another order, and its random numbers are its
own. Tolerances are of the norm of what is compared; bf16 has 8 bits, so one rounding is .004.
"""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

import cold_start
import data
import grpo
import parallel
from layout import lay_out
from losses import bt_loss
from model import DeScore, to_device
from plumbing import logs
from plumbing.adapters import gather_full
from prefix_once import lay_out_behind
from rollout import TransformersEngine, sample_cots
from tests.conftest import ROOT, judge, run
from tests.kills import kill_all

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU: make test-gpu")]
CLOSE = 0.05


def gradients(model):
    return {name: gather_full(p.grad).float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def require_close(found, expected, bound=CLOSE):
    """All gradients together as one vector: its distance, as a share of its norm."""
    assert found.keys() == expected.keys()
    square = lambda x: sum(float(g.double().square().sum()) for g in x.values())  # noqa: E731
    away = square({name: found[name] - expected[name] for name in expected}) ** 0.5
    assert away <= bound * square(expected) ** 0.5, away / square(expected) ** 0.5


def opened(path: str, train: str, ranks) -> DeScore:
    """As a run opens it: behind LoRA the card has a base in bf16. On the CPU the same numbers, in fp32."""
    dtype = parallel.load_dtype(train, parallel.Ranks())
    model = DeScore.from_pretrained(path, dtype=dtype)
    return model.float() if ranks.device.type == "cpu" else model


@pytest.fixture
def on_cpu():
    """One process on the CPU, though there is a GPU."""
    ranks = parallel.Ranks()
    ranks.device = torch.device("cpu")
    return ranks


@pytest.fixture(params=["autocast", "FSDP2", "FSDP2 and --cpu-offload"])
def on_gpu(request):
    """(ranks, how to shard) on the card: alone, or FSDP2 on a mesh of one, as torchrun --nproc_per_node 1 makes it."""
    ranks, sharded = parallel.Ranks(), "FSDP2" in request.param
    if sharded:
        backends = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
        torch.distributed.init_process_group(backends, store=torch.distributed.HashStore(), rank=0, world_size=1)
    ranks.sharded = sharded
    yield ranks, {"cpu_offload": "offload" in request.param}
    if sharded:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("train", ["lora", "full"])
def test_stage_1_has_the_cpu_s_gradients(world, tiny_model_dir, on_cpu, on_gpu, train):
    items = [data.EncodedPairs(data.read_pairs(world["train_cold_start"]), DeScore.from_pretrained(
        tiny_model_dir).processor)[i] for i in range(2)]
    found = []
    for ranks, how in ((on_cpu, {}), on_gpu):
        torch.manual_seed(0)
        model = opened(tiny_model_dir, train, ranks)
        model.make_trainable(train, vision=True, lora_r=4, lora_dropout=0.0, lm_head=False)
        model = parallel.shard(model, ranks, **how).train()
        with ranks.autocast():
            bt_loss(*cold_start.score_pairs(model, items)).backward()
        found.append(gradients(model))
    require_close(found[1], found[0])


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_stage_2_has_the_cpu_s_gradients(world, tiny_model_dir, on_cpu, on_gpu, train, size):
    """One pair with G = 3, its CoTs one or three at a time; then the update, whose norms are the CPU's too."""
    settings = grpo.Settings(rollouts=3, batch_pairs=1, mini_pairs=1, micro_rollouts=size, kl_coef=0.01, bt_coef=0.5)
    found, norms = [], []
    for ranks, how in ((on_cpu, {}), on_gpu):
        torch.manual_seed(0)
        model = opened(tiny_model_dir, train, ranks)
        pair, prefixes = data.EncodedPairs(data.read_pairs(world["train_rl"]), model.processor)[0]
        cots = [[[70, 71, 72], [80] * 20, [90]], [[75], [76, 77] * 9, [78, 79]]]
        rollouts = grpo.PairRollouts(pair, prefixes, cots, advantages=torch.tensor([[1.0, -0.5, -0.5], [0.2, -1, 0.8]]))
        model.make_trainable(train, vision=False, lora_r=4, lora_dropout=0.0)
        reference = DeScore.from_pretrained(tiny_model_dir).requires_grad_(False) if train == "full" else None
        model = parallel.shard(model, ranks, **how).train()
        reference = reference and parallel.shard(reference, ranks, frozen=True, **how)
        grpo.backward_pair(model, reference, rollouts, settings, ranks, {"tokens": rollouts.num_tokens, "bt": 3},
                           logs.Sums())
        found.append(gradients(model))
        norms.append(parallel.take_step(model, parallel.make_optimizer(model, settings), [], settings, ranks))
    require_close(found[1], found[0])
    assert norms[1] == pytest.approx(norms[0], rel=CLOSE)


def test_a_prefix_once_equals_a_row_per_cot(world, tiny_model_dir):
    """Rewards and log-probs of the card's kernels: packed into a row, behind prefixes read before, and alone."""
    model = DeScore.from_pretrained(tiny_model_dir, parallel.Ranks().device).eval()
    _, prefixes = data.EncodedPairs(data.read_pairs(world["train_rl"]), model.processor)[0]
    cots = [[[70, 71, 72], [80] * 20], [[75], [76, 77] * 9]]
    place = lambda batch: to_device(batch, model.query.device)  # noqa: E731
    with torch.no_grad():
        found = [model(place(lay_out(model.backbone, prefixes, cots)))]
        past = model.read(place(lay_out(model.backbone, prefixes, [[], []])))
        found.append(model(place(lay_out_behind(model.backbone, prefixes, cots)), past=past))
        rows = [p for p in prefixes for _ in (0, 1)], [[cot] for row in cots for cot in row]
        alone = model(place(lay_out(model.backbone, *rows)))
    for output in found:
        assert torch.allclose(output.rewards, alone.rewards, atol=1e-3)
        assert torch.allclose(output.log_probs, alone.log_probs, atol=1e-3)


def test_a_cot_does_not_depend_on_its_batch_mates(world, tiny_model_dir):
    model = DeScore.from_pretrained(tiny_model_dir, parallel.Ranks().device).eval()
    prefixes = [data.EncodedPairs(data.read_pairs(world["train_rl"]), model.processor)[i][1][0] for i in range(3)]
    together = sample_cots(model.backbone, model.processor, prefixes, [[1, 2], [3], [4, 5]], 12)
    assert sample_cots(model.backbone, model.processor, prefixes[1:2], [[3]], 12) == [together[1]]
    assert together[0][0] != together[0][1]


def test_compiled_sampling_draws_the_same(world, tiny_model_dir):
    """Traced with inductor; other kernels round otherwise, so of ten CoTs most are equal, and each begins the same."""
    model = DeScore.from_pretrained(tiny_model_dir, parallel.Ranks().device).eval()
    prefixes = [data.EncodedPairs(data.read_pairs(world["train_rl"]), model.processor)[i][1][0] for i in range(2)]
    plain, found = (sum(sample_cots(model.backbone, model.processor, prefixes, [[*range(5)], [*range(5, 10)]], 12,
                                    compiled=compiled), []) for compiled in (False, True))
    assert sum(a == b for a, b in zip(plain, found)) >= 6 and [a[0] for a in plain] == [b[0] for b in found]


def test_rewards_are_the_cpu_s(world, tiny_model_dir):
    videos = [path for pair in data.read_pairs(world["train_rl"])[:2] for path in pair.videos]
    rewards = []
    for device in ("cpu", parallel.Ranks().device):
        model = DeScore.from_pretrained(tiny_model_dir, device).eval()
        prefixes = model.encode(videos, ["a red ball"] * 4)
        rewards.append(model.score(prefixes, [[70, 71]] * 4).cpu())
        rows = to_device(lay_out(model.backbone, prefixes, [[[70, 71]]] * 4), model.query.device)
        assert torch.allclose(model(rows).rewards.cpu(), rewards[-1], atol=1e-3)
    assert torch.allclose(*rewards, atol=2e-3)


def stage_2_flags(world, model, out, *more):
    return ["grpo.py", "--model", model, "--data", world["train_rl"], "--out", str(out), "--rollouts", "2",
            "--batch-pairs", "2", "--mini-pairs", "1", "--max-new-tokens", "8", "--length-low", "1", "--length-high",
            "9", "--epochs", "9", "--max-steps", "4", "--save-every", "1", "--workers", "0", *more]


@pytest.mark.parametrize("sharded", [[], ["--shard-ranks", "1"], ["--cpu-offload"]])
def test_the_pipeline_runs_and_a_killed_run_goes_on(world, tiny_model_dir, tmp_path, sharded):
    """Stage 1, stage 2 killed in the middle and resumed, evaluation: all on the card. Same sums as without the kill.

    Compiled in one of the three: compiling takes longer than all else here.
    """
    sharded = [*sharded, "--no-compile"] if sharded else []
    ranks, torchrun = (1, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]) if sharded else (0, [])
    run("cold_start.py", "--model", tiny_model_dir, "--data", world["train_cold_start"], "--mask-probability", "1",
        "--batch-pairs", "2", "--max-steps", "2", "--workers", "0", "--out", str(tmp_path / "one"), *sharded,
        ranks=ranks)
    start = str(tmp_path / "one" / "model")
    run(*stage_2_flags(world, start, tmp_path / "whole", *sharded), ranks=ranks)
    command = stage_2_flags(world, start, tmp_path / "cut", *sharded)
    process = subprocess.Popen([sys.executable, *torchrun, *command], cwd=ROOT, start_new_session=True)
    deadline = time.time() + 120
    while not (tmp_path / "cut/checkpoints/step-000002").is_dir() and time.time() < deadline:
        time.sleep(0.05)
    kill_all(process)
    run(*command, "--resume", ranks=ranks)
    whole, cut = (logs.read_metrics(str(tmp_path / name)) for name in ("whole", "cut"))
    assert [row["step"] for row in whole] == [row["step"] for row in cut] == [1, 2, 3, 4]
    for name in ("rollout_reward", "bt_loss", "grad_norm_llm"):
        assert cut[-1][name] == pytest.approx(whole[-1][name], rel=0.1, abs=1e-3), name
    run("evaluate.py", "--model", str(tmp_path / "cut/model"), "--data", world["test_in_domain"],
        "--max-new-tokens", "8", "--out", str(tmp_path / "eval"))
    assert json.loads(next((tmp_path / "eval").rglob("report.json")).read_text())


def test_mini_runs(world, base_dir, tmp_path, monkeypatch, capsys):
    import mini

    (tmp_path / "base").symlink_to(base_dir)
    (tmp_path / "data").symlink_to(world["train_rl"].rsplit("/", 1)[0])
    monkeypatch.setattr(mini, "TOKENS", 8)
    mini.main(str(tmp_path), steps=(2, 1), pool=5)
    assert "stage 2, step  1" in capsys.readouterr().out


def test_what_is_held_does_not_grow_with_the_rollouts(world, tiny_model_dir):
    """By the card's own count: G = 4 and 16, one CoT of each video at a time."""
    ranks, peaks = parallel.Ranks(), []
    model = parallel.shard(DeScore.from_pretrained(tiny_model_dir), ranks).train()
    model.make_trainable("full", vision=False)
    pair, prefixes = data.EncodedPairs(data.read_pairs(world["train_rl"]), model.processor)[0]
    for count in (4, 16):
        settings = grpo.Settings(rollouts=count, batch_pairs=1, mini_pairs=1, micro_rollouts=1, kl_coef=0)
        rollouts = grpo.PairRollouts(pair, prefixes, [[[70] * 200] * count] * 2, advantages=torch.ones(2, count))
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grpo.backward_pair(model, None, dataclasses.replace(rollouts), settings, ranks,
                           {"tokens": rollouts.num_tokens, "bt": count}, logs.Sums())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 1.1 * peaks[0], peaks


def test_a_step_of_stage_2_in_this_process(world, tiny_model_dir):
    """A whole step by the loop's own functions: sampled on the card, judged, updated; all numbers finite."""
    ranks = parallel.Ranks()
    model = DeScore.from_pretrained(tiny_model_dir)
    model.make_trainable("full", vision=False)
    model = parallel.shard(model, ranks).train()
    settings = grpo.Settings(rollouts=2, batch_pairs=1, mini_pairs=1, max_new_tokens=8, kl_coef=0, length_low=1,
                             length_high=9)
    item = data.EncodedPairs(data.read_pairs(world["train_rl"]), model.processor)[0]
    (rollouts,) = grpo.generate([item], TransformersEngine(model.backbone, model.processor, shared=True), settings, 1)
    judge(rollouts, model.processor.tokenizer, settings)
    done = grpo.update(model, None, parallel.make_optimizer(model, settings), [rollouts], settings, ranks)
    assert all(value == value and abs(value) < 1e6 for value in done.values())
