"""Tied embeddings, as in Qwen3-VL-2B and 4B: one matrix is word embedding and lm_head. Every path, tiny weights."""

import copy
import json
import shutil

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

import cold_start
import grpo
import parallel
import rollout
import toy.base_model
from layout import lay_out
from model import DeScore
from plumbing import logs
from plumbing.checkpoint import open_model, read_tensors, save_tensors
from plumbing.settings import InputError
from tests.conftest import TINY, fresh_model, run
from tests.test_parallel import same_metrics

EMBEDDING = "model.language_model.embed_tokens.weight"
COTS = [[[70, 71], [80]], [[90, 91, 92], [75]]]


def is_tied(backbone) -> bool:
    return backbone.lm_head.weight is backbone.get_input_embeddings().weight


@pytest.fixture(scope="module")
def base(tmp_path_factory, processor):
    """A plain Qwen3-VL folder with tied embeddings."""
    folder = tmp_path_factory.mktemp("tied_base")
    model = toy.base_model.build_model(processor, **TINY, tied=True)
    assert is_tied(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert "lm_head.weight" not in read_tensors(str(folder / "model.safetensors"))
    return str(folder)


@pytest.fixture
def tied(base):
    """A fresh DeScore on it, with a head whose rewards differ visibly."""
    return fresh_model(base, 0)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """A DeScore checkpoint folder with tied embeddings."""
    path = str(tmp_path_factory.mktemp("tied"))
    fresh_model(base, 1).save_pretrained(path)
    return path


def move(model):
    """As training does: every trained parameter becomes another."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("train", ["lora", "full", "head"])
def test_save_and_load(tied, prefixes, tmp_path, train):
    """One matrix on disk; ours and transformers' own loader open it as one, and nothing has changed."""
    tied.make_trainable(train, vision=False, lora_r=4)
    move(tied.eval())
    batch = lay_out(tied.backbone, prefixes[:2], COTS)
    with torch.no_grad():
        before = tied(batch)
    tied.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] and "lm_head.weight" not in read_tensors(str(tmp_path / "model.safetensors"))
    for how in ({}, {"empty": True}):
        again = open_model(DeScore, str(tmp_path), **how)
        again = parallel.shard(again, parallel.Ranks())
        assert is_tied(again.backbone)
        with torch.no_grad():
            after = again(batch)
        assert torch.allclose(before.rewards, after.rewards, atol=1e-5)
        assert torch.allclose(before.log_probs, after.log_probs, atol=1e-5)
    plain = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    assert is_tied(plain) and torch.equal(plain.lm_head.weight, again.backbone.lm_head.weight)


@pytest.mark.parametrize("empty", [False, True])
def test_a_second_lm_head_must_be_the_same(base, tmp_path, empty):
    """Some programs write the one matrix twice: fine. If they differ config.json is wrong: saving would lose one."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    tensors = read_tensors(str(tmp_path / "model.safetensors"))
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    save_tensors(tensors, str(tmp_path / "model.safetensors"))
    model = open_model(DeScore, str(tmp_path), new_head=True, empty=empty)
    assert is_tied(model.backbone)
    tensors["lm_head.weight"][0] += 1
    save_tensors(tensors, str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="tie_word_embeddings true, but lm_head.weight is not the embedding"):
        open_model(DeScore, str(tmp_path), new_head=True, empty=empty)


def test_an_empty_model_has_the_parameters_of_a_full_one(base):
    """FSDP shards what is there while the model is empty: two matrices would be sharded and trained apart."""
    full, empty = DeScore.from_pretrained(base, new_head=True), open_model(DeScore, base, new_head=True, empty=True)
    assert [name for name, _ in full.named_parameters()] == [name for name, _ in empty.named_parameters()]


@pytest.mark.parametrize("train, lm_head, trained", [
    ("lora", True, False), ("lora", False, False), ("head", True, False), ("full", True, True), ("full", False, True),
])
def test_what_is_trained(tied, train, lm_head, trained):
    """With all of the LLM the matrix is trained, once, as the embedding, also where lm_head by itself would rest; with
    LoRA it is frozen."""
    tied.make_trainable(train, vision=False, lora_r=4, lm_head=lm_head)
    assert is_tied(tied.backbone) and tied.backbone.lm_head.weight.requires_grad == trained
    parameters = [p for group in tied.parameter_groups().values() for p in group]
    assert sum(p is tied.backbone.lm_head.weight for p in parameters) == trained
    assert len({id(p) for p in parameters}) == len(parameters)


def test_the_gradient_is_the_sum_of_both_uses(tied, prefixes):
    """Against a twin with two matrices of equal values: as embedding, and as lm_head."""
    twin = copy.deepcopy(tied)
    twin.backbone.lm_head.weight = torch.nn.Parameter(tied.backbone.lm_head.weight.detach().clone())
    for model in (tied, twin):
        model.make_trainable("full", vision=False)
        output = model(lay_out(model.backbone, prefixes[:2], COTS))
        (output.rewards.sum() + output.log_probs.sum()).backward()
    words, head = twin.backbone.get_input_embeddings().weight.grad, twin.backbone.lm_head.weight.grad
    assert words.any() and head.any()
    assert torch.allclose(tied.backbone.lm_head.weight.grad, words + head, atol=1e-4)
    assert torch.allclose(tied.query.grad, twin.query.grad, atol=1e-5)
    assert torch.allclose(tied.head.weight.grad, twin.head.weight.grad, atol=1e-5)


def test_the_query_is_no_row_of_the_matrix(tied, prefixes):
    """At the start the average row; then its own parameter, bit-equal to a row with its values, and lm_head's without
    it."""
    words = tied.backbone.get_input_embeddings()
    assert torch.allclose(tied.query, words.weight.mean(dim=0))
    batch = lay_out(tied.backbone, prefixes[:1], [[[70, 71, 72]]])
    with torch.no_grad():
        before = tied(batch)
        tied.query.add_(1.0)
        after = tied(batch)
    assert torch.equal(before.log_probs, after.log_probs) and not torch.equal(before.rewards, after.rewards)


def test_sync_hands_over_one_matrix_and_both_uses_follow(tied, base, prefixes, processor):
    """What the trainer sends after an update, into an engine's own copy: the next CoTs are the trainer's."""
    engine = rollout.make_engine("transformers", base, processor, parallel.Ranks())
    tied.make_trainable("full", vision=False)
    move(tied)
    names = [name for name, _ in parallel.trained_weights(tied)]
    assert EMBEDDING in names and "lm_head.weight" not in names
    stale = engine.generate(prefixes, [[1]] * 4, 12)
    engine.sync(parallel.trained_weights(tied))
    own = rollout.make_engine("transformers", base, processor, parallel.Ranks(), tied.backbone)
    assert is_tied(engine.backbone) and torch.equal(engine.backbone.lm_head.weight, tied.backbone.lm_head.weight)
    assert stale != engine.generate(prefixes, [[1]] * 4, 12) == own.generate(prefixes, [[1]] * 4, 12)


STAGE_1 = ["--batch-pairs", 4, "--lr", "1e-3", "--workers", 0, "--mask-probability", 1, "--lora-r", 4,
           "--lora-dropout", 0, "--epochs", 9, "--save-every", 1]
STAGE_2 = ["--batch-pairs", 2, "--mini-pairs", 2, "--rollouts", 2, "--max-new-tokens", 10, "--lr", "1e-3",
           "--workers", 0, "--length-low", 1, "--length-high", 9, "--kl-coef", 0.01, "--epochs", 9, "--save-every", 1]


def weights(out):
    model = DeScore.from_pretrained(str(out / "model"))
    assert is_tied(model.backbone)
    return model.state_dict()


def lose_the_last_step(out):
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-000002")


@pytest.mark.parametrize("train", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "head"))])
def test_stage_1_goes_on_bit_for_bit(world, base, tmp_path, train):
    """lm_head is frozen in stage 1, tied or not; but a tied matrix is trained as the embedding and has Adam state."""
    flags = ["--model", base, "--data", world["train_cold_start"], "--train", train, *STAGE_1, "--max-steps", 2]
    flags = [*map(str, flags), "--out", str(tmp_path)]
    cold_start.main(flags)
    through = weights(tmp_path)
    lose_the_last_step(tmp_path)
    cold_start.main([*flags, "--resume"])
    resumed = weights(tmp_path)
    assert all(torch.equal(through[name], resumed[name]) for name in through)
    words, before = "backbone." + EMBEDDING, DeScore.from_pretrained(base, new_head=True).state_dict()
    assert torch.equal(through[words], before[words]) == (train != "full")


@pytest.mark.slow
def test_two_ranks_equal_one(world, folder, tmp_path):
    """Stage 2 with all of the LLM trained. FSDP2 shards the matrix once, for both uses; the engine beside the shards
    gets it whole; after the last step is lost, --resume on two ranks ends where the run that went through did."""
    flags = ["--model", folder, "--data", world["train_rl"], *STAGE_2, "--max-steps", 2]
    grpo.main([*map(str, flags), "--out", str(tmp_path / "one")])
    flags += ["--out", tmp_path / "two"]
    run("grpo.py", *flags, ranks=2)
    one, two = (logs.read_metrics(str(tmp_path / name)) for name in ("one", "two"))
    names = ["rollout_reward", "cot_tokens", "grpo_loss", "bt_loss", "kl", "grad_norm_llm", "grad_norm_head"]
    same_metrics(one[:1], two[:1], names, 2e-4)
    same_metrics(one[1:], two[1:], ["rollout_reward", "cot_tokens", "bt_loss"], 2e-3)  # CoTs of the updated weights
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(a[name], b[name], atol=2e-4) for name in a)
    lose_the_last_step(tmp_path / "two")
    run("grpo.py", *flags, "--resume", ranks=2)
    c = weights(tmp_path / "two")
    assert all(torch.equal(b[name], c[name]) for name in b)


@pytest.mark.vllm
@pytest.mark.parametrize("train", ["lora", "full"])
def test_vllm_follows_the_trainer(folder, tiny_clips, train):
    """Several syncs into a real engine: its log-probs stay the trainer's, so its lm_head follows the embedding."""
    from tests.test_vllm_engine import SCRIPT, run_script  # skips where there is no vllm

    report = run_script(SCRIPT.replace('make_trainable("lora"', f'make_trainable("{train}"'), folder, *tiny_clips[:2])
    assert "vLLM did not take" in report["refused"]
    assert all(r["same_seed_same_cot"] and r["difference"] < 1e-3 for r in report["rounds"]), report
    cots = [r["cots"] for r in report["rounds"]]
    assert cots[0] != cots[1] != cots[2]
