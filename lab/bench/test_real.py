"""lab.bench.real in miniature: it runs each stage's own update at the layers asked for, and what it counts is right."""

import json
import shutil

import pytest
import torch

import parallel
from lab.bench import real
from layout import lay_out
from plumbing import checkpoint
from tests.conftest import refuses


@pytest.mark.parametrize("case", real.CASES)
def test_a_case_runs_and_writes_its_row(base_dir, tiny_clips, tmp_path, case):
    real.main(["--model", base_dir, "--out", str(tmp_path), "--cases", case, "--rollouts", "2", "--cot-tokens", "5",
               "--text-layers", "1", "--vision-layers", "1", "--clips", *tiny_clips[:2]])
    (row,) = json.loads((tmp_path / "real.json").read_text())["cases"]
    group = 1 if case == "stage1-lora" else 2
    assert row["tokens"] == 2 * (row["P"] + group * 6) and row["G"] == group and row["C"] == 5
    assert row["tokens/s"] == pytest.approx(row["tokens"] / row["seconds"][0])
    assert row["peak GB"] > row["weights GB"] > 0 and row["plan GB"] > 0 and "MFU" not in row
    assert row["|g| head"] > 0 and row["|g| llm"] >= 0 and ("|g| vision" in row) == (case == "stage1-lora")


def test_flops_of_an_update_by_hand(model, prefixes):
    """Full: forward 1 + backward 2 + reference 1 = 4 of everything; LoRA has no gradients of frozen weights: 3, but
    attention, where a backward is two forwards in any case. Stage 1: no reference, no lm_head, the tower is trained."""
    one = real.forward_flops(model, prefixes[0], [5, 5])
    cases = (2, "full"), (2, "lora"), (1, "lora")
    flops = {case: real.update_flops(model, prefixes[:1], [[5, 5]], *case) for case in cases}
    both = one["linear"] + one["lm_head"]
    assert flops[2, "full"] == pytest.approx(4 * both + 4 * one["attention"] + one["vision"])
    assert flops[2, "lora"] == pytest.approx(3 * both + 4 * one["attention"] + one["vision"])
    assert flops[1, "lora"] == pytest.approx(2 * one["linear"] + 3 * one["attention"] + 3 * one["vision"])


def test_layers_are_cut(base_dir, tmp_path):
    for flag, layers in (("1", (1, 1)), ("all", (2, 2))):
        settings = real.Settings(model=base_dir, text_layers=flag, vision_layers=flag)
        real.cut_copy(settings, str(tmp_path / flag))
        loaded = real.load(str(tmp_path / flag), settings, real.parallel.Ranks(), "lora", 2)
        tower = loaded.backbone.model
        assert (len(tower.language_model.layers), len(tower.visual.blocks)) == layers
        assert not any(p.is_meta for p in loaded.parameters()) and torch.is_tensor(loaded.query)


def test_bad_flags_are_one_sentence(base_dir, tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    refuses(capsys, real.main, "--model", tmp_path, *out, says="no config.json")
    refuses(capsys, real.main, "--model", base_dir, "--text-layers", "3", *out, says="--text-layers 3: give 1 to 2")
    layers = "--text-layers", "1", "--vision-layers", "1"
    refuses(capsys, real.main, "--model", base_dir, *layers, "--clips", "a.mp4", *out, says="a pair needs two")


def test_random_weights_need_no_file_and_is_the_same_on_every_rank(base_dir, prefixes, tmp_path):
    folder = shutil.copytree(base_dir, tmp_path / "sizes", ignore=shutil.ignore_patterns("*.safetensors"))
    models = [real.random_model(str(folder), torch.float32) for _ in "ab"]
    for one in models:
        checkpoint.load_empty(one, one, "cpu")
    a, b = (one.backbone.state_dict() for one in models)
    assert all(torch.equal(a[name], b[name]) for name in a)
    with torch.no_grad():
        rewards = models[0](lay_out(models[0].backbone, prefixes[:1], [[[5, 6, 7]]])).rewards
    assert torch.isfinite(rewards).all()


def test_random_weights_are_tied_too(base_dir, tmp_path):
    folder = shutil.copytree(base_dir, tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    model = real.random_model(str(folder), torch.float32)
    model.make_trainable("full", vision=False)
    model = parallel.shard(model, parallel.Ranks())
    assert model.backbone.lm_head.weight is model.backbone.get_input_embeddings().weight
    assert not any(p.is_meta for p in model.parameters())
