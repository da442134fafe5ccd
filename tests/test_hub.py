"""A run's model card, and models opened by their names from the hub's cache, without a network."""

import json
import os
import pathlib
import shutil

import huggingface_hub
import pytest
import torch

import cold_start
import evaluate
import grpo
from layout import lay_out
from model import DeScore
from plumbing.hub import write_card
from plumbing.settings import InputError
from tests.conftest import ROOT, refuses, write_csv

COMMITS = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def lora_dir(base_dir, tmp_path_factory):
    """A DeScore folder with LoRA in it."""
    torch.manual_seed(0)
    model, folder = DeScore.from_pretrained(base_dir, new_head=True), str(tmp_path_factory.mktemp("lora"))
    model.make_trainable("lora", vision=False, lora_r=2, lora_alpha=4)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, lora_dir, tiny_model_dir, monkeypatch):
    """The hub's cache as huggingface_hub lays it out: blobs, snapshots of links to them, a file for each ref."""
    repo = tmp_path / "hub" / "models--someone--descore"
    for commit, ref, folder in zip(COMMITS, ("main", "v1"), (lora_dir, tiny_model_dir)):
        for path in (path for path in pathlib.Path(folder).rglob("*") if path.is_file()):
            blob = repo / "blobs" / f"{ref}-{path.name}"
            link = repo / "snapshots" / commit / path.relative_to(folder)
            for place in (blob, link):
                place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_name_opens_from_the_cache(cache, lora_dir, tiny_model_dir, prefixes):
    for revision, folder in ((None, lora_dir), ("v1", tiny_model_dir), (COMMITS[1], tiny_model_dir)):
        named, local = DeScore.from_pretrained("someone/descore", revision=revision), DeScore.from_pretrained(folder)
        assert named.settings == local.settings
        batch = lay_out(local.backbone, prefixes[:1], [[[70, 71]]])
        assert torch.equal(named(batch).rewards, local(batch).rewards)
    in_bf16 = DeScore.from_pretrained("someone/descore", dtype=torch.bfloat16)
    assert in_bf16.backbone.beside, "the adapter of the snapshot was not found"


def test_a_name_that_no_cache_has(cache, capsys):
    says = "hf download someone/else"
    refuses(capsys, evaluate.main, "--model", "someone/else", "--video", "a.mp4", "--prompt", "a", says=says)
    with pytest.raises(InputError, match="hf download someone/descore --revision v9"):
        DeScore.from_pretrained("someone/descore", revision="v9")
    with pytest.raises(InputError, match="hf download someone/descore --revision v9"):
        DeScore.from_pretrained("someone/descore@v9")
    with pytest.raises(InputError, match="no folder here, nor a name/repo of the hub; see what there is with: ls r/s"):
        DeScore.from_pretrained("r/s/model")
    with pytest.raises(InputError, match="has no revision v1"):
        DeScore.from_pretrained(str(cache), revision="v1")


def test_a_script_takes_a_name_and_a_revision(cache, tiny_clips, tmp_path):
    a, b = (os.path.abspath(path) for path in tiny_clips[:2])
    pairs = write_csv(tmp_path / "pairs.csv", ["path_A", "path_B", "prompt", "TA"], [[a, b, "a red circle rises", "A"]])
    evaluate.main(["--model", "someone/descore@v1", "--data", pairs, "--out", str(tmp_path / "out"),
                   "--max-new-tokens", "6"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "descore@v1" in json.dumps(report) and COMMITS[1] not in json.dumps(report)
    made = json.loads((tmp_path / "out" / "settings.json").read_text())["made_with"]["model"]
    assert made == f"someone/descore@v1 at {COMMITS[1]}"  # another commit of the same name is another model


# ---------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------
def read_card(out):
    """Its YAML head as the hub reads it, and its text; no path of this machine is in it."""
    path = out / "model" / "README.md"
    card = huggingface_hub.ModelCard.load(path)
    text = path.read_text(encoding="utf-8")
    for folder in {str(ROOT), *map(str, [out, *list(out.parents)[:-1]])}:
        assert folder not in text, f"names {folder}"
    assert not os.path.exists(f"{path}.tmp") and card.data.library_name == "transformers"
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Metrics", "## Flags that differ from the defaults", "## Use", "## Limits"]
    assert "arxiv.org/abs/2605.05922" in text and "`hf upload NAME/REPO .`" in text and "from_pretrained" in text
    return card.data.to_dict(), text


def test_both_stages_leave_a_card(world, base_dir, tmp_path):
    few = ["--workers", "0", "--max-steps", "1", "--batch-pairs", "2"]
    lora = ["--lora-r", "2", "--lora-alpha", "4"]
    cold_start.main(["--model", base_dir, "--data", world["train_cold_start"], "--val", world["val_cold_start"], *few,
                     *lora, "--mask-probability", "1", "--out", str(tmp_path / "one")])
    head, text = read_card(tmp_path / "one")
    last = json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "base_model" not in head and "license" not in head and "its licence is not known" in text
    assert f"`{os.path.basename(base_dir)}`" in text and "Training: Stage 1: cold start; steps done: 1" in text
    assert f"| loss | {last['loss']:.4g} | the step's training batch, 2 pairs of `train_cold_start.csv` |" in text
    value = f"{last['val_accuracy']:.4g}"
    assert f"| val_accuracy | {value} | the pairs of `val_cold_start.csv` that have a winner |" in text
    assert '\n--lora-r 2\n' in text and '\n--data "train_cold_start.csv"\n' in text and "--epochs" not in text
    assert "LoRA is merged" in text
    assert os.path.dirname(base_dir) not in (tmp_path / "one" / "model" / "descore.json").read_text()

    grpo.main(["--model", str(tmp_path / "one" / "model"), "--data", world["train_rl"], *few, "--mini-pairs", "2",
               "--rollouts", "2", "--max-new-tokens", "6", "--kl-coef", "0", "--out", str(tmp_path / "two")])
    head, text = read_card(tmp_path / "two")
    last = json.loads((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "Training: Stage 2: GRPO + BT; steps done: 1" in text and f"`{os.path.basename(base_dir)}`" in text
    assert f"| bt_loss | {last['bt_loss']:.4g} | the step's training batch, 2 pairs of `train_rl.csv` |" in text


def test_base_licence_and_commit(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    settings, lines = cold_start.Settings(data="/a/b/train.csv", out=str(tmp_path)), [{"step": 3, "loss": 0.5}]

    def card(base):
        write_card(str(tmp_path / "model"), {"base_model": base}, settings, lines, {"loss": ["loss"]}, "Stage 1")
        return read_card(tmp_path)

    head, text = card("Qwen/Qwen3-VL-8B-Instruct")
    assert (head["base_model"], head["license"]) == ("Qwen/Qwen3-VL-8B-Instruct", "apache-2.0")
    head, text = card("someone/else")
    assert head["base_model"] == "someone/else" and "license" not in head and "not known" in text
    head, text = card("/home/someone/models/base")
    assert "base_model" not in head and "`base`" in text and "someone" not in text and "/a/b" not in text
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert "Commit of the code: unknown" in card("someone/else")[1]
