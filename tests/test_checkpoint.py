"""Every folder's round trip: LoRA, merged, fp32, part by part; strict loading; a kill while saving."""

import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import grpo
from layout import lay_out
from model import DeScore
from plumbing import checkpoint
from plumbing.settings import InputError
from tests.conftest import refuses


def disturb(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.02)


def test_lora_round_trip(model, prefixes, tmp_path):
    model.make_trainable("lora", vision=True, lora_r=4, lora_alpha=8)
    disturb(model)
    batch = lay_out(model.backbone, prefixes[:1], [[[70, 71]]])
    expected = model.eval()(batch)
    model.save_pretrained(str(tmp_path))
    again = DeScore.from_pretrained(str(tmp_path))
    assert torch.allclose(again(batch).rewards, expected.rewards, atol=1e-5)
    assert torch.allclose(again(batch).log_probs, expected.log_probs, atol=1e-4)


@pytest.mark.parametrize("file_bytes", [4 << 30, 200_000])
def test_merged_folder_is_a_plain_qwen3_vl(model, prefixes, tmp_path, monkeypatch, file_bytes):
    """In one file of weights or in several, with an index."""
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    model.make_trainable("lora", vision=True, lora_r=4, lora_alpha=8)
    disturb(model)
    monkeypatch.setattr(checkpoint, "FILE_BYTES", file_bytes)
    model.save_pretrained(str(tmp_path))
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 4 if file_bytes < 1e6 else [file.name for file in files] == ["model.safetensors"]
    plain, info = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = lay_out(plain, prefixes[:1], [[[70, 71]]])
    assert torch.allclose(DeScore(plain)(batch).log_probs, model.eval()(batch).log_probs, atol=1e-4)
    AutoProcessor.from_pretrained(tmp_path)
    assert torch.allclose(DeScore.from_pretrained(str(tmp_path))(batch).rewards, model(batch).rewards, atol=1e-5)


def test_what_was_trained_is_saved_in_fp32(base_dir, prefixes, tmp_path):
    """LoRA on a bf16 base, as on a GPU: one type for all; an update below half a step of bf16 is not rounded away."""
    model = DeScore.from_pretrained(base_dir, dtype=torch.bfloat16, new_head=True)
    model.make_trainable("lora", vision=True, lora_r=2, lora_alpha=2)
    name = "backbone.model.language_model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    base = layer.base_layer.weight.detach().float()
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1e-3)
        layer.lora_B["default"].weight.fill_(1e-3)
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == "float32"
    update = saved[f"{name.removeprefix('backbone.')}.weight"] - base
    assert torch.allclose(update, torch.full_like(update, 2e-6), atol=1e-7)  # alpha / r * B A = 1 * (2 * 1e-3 * 1e-3)
    assert ((base + 2e-6).bfloat16().float() == base).float().mean() > 0.9  # in bf16 nearly all of it would be gone


def test_a_second_stage_keeps_the_first(model, prefixes, tmp_path):
    """docs/differences.md, row 17: stage 2 must start from stage 1's weights, not from the base model's."""
    model.make_trainable("lora", vision=False, lora_r=4, lora_alpha=8)
    disturb(model)
    batch = lay_out(model.backbone, prefixes[:1], [[[70, 71]]])
    expected = model.eval()(batch).rewards
    model.save_pretrained(str(tmp_path / "stage1"))
    second = DeScore.from_pretrained(str(tmp_path / "stage1"))
    second.make_trainable("lora", vision=False, lora_r=4, lora_alpha=8)
    assert torch.allclose(second.eval()(batch).rewards, expected, atol=1e-5)
    second.save_pretrained(str(tmp_path / "stage2"))
    assert torch.allclose(DeScore.from_pretrained(str(tmp_path / "stage2"))(batch).rewards, expected, atol=1e-5)


def test_loading_is_strict(tiny_model_dir, base_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(tiny_model_dir, folder)
        change(folder)
        with pytest.raises(InputError) as error:
            DeScore.from_pretrained(str(folder))
        return str(error.value)

    def edit(folder, file, change):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    def edit_json(folder, **values):
        settings = json.loads((folder / "descore.json").read_text())
        (folder / "descore.json").write_text(json.dumps(settings | values))

    assert "query" in broken("no query", lambda f: edit(f, "reward_head/head.safetensors", lambda t: t.pop("query")))
    assert "extra" in broken(
        "extra", lambda f: edit(f, "reward_head/head.safetensors", lambda t: t.update(more=torch.ones(1)))
    )
    assert "base model" in broken(
        "size", lambda f: edit(f, "reward_head/head.safetensors", lambda t: t.update(query=torch.ones(8)))
    )
    assert "hidden_size" in broken("other base", lambda f: edit_json(f, hidden_size=4096))
    assert "missing keys" in broken("hole", lambda f: edit(f, "model.safetensors", lambda t: t.pop(sorted(t)[3])))
    assert "unexpected keys" in broken(
        "odd", lambda f: edit(f, "model.safetensors", lambda t: t.update(odd=torch.ones(1)))
    )
    with pytest.raises(InputError, match="no reward head"):
        DeScore.from_pretrained(base_dir)
    with pytest.raises(InputError, match="cannot be opened"):
        DeScore.from_pretrained(str(tmp_path), new_head=True)


def test_a_directory_that_is_no_checkpoint_is_one_sentence(tmp_path, world, capsys):
    flags = ["--model", tmp_path, "--data", world["train_rl"], "--batch-pairs", 2, "--mini-pairs", 2]
    refuses(capsys, grpo.main, *flags, "--out", tmp_path / "out", says="no reward head")


def test_an_empty_model_is_read_part_by_part_and_equals_the_whole(model, tiny_model_dir, tmp_path):
    """What sharded loading builds on: nothing is in memory before `fill`, and `fill` of a part reads that part only."""
    model.make_trainable("lora", vision=True, lora_r=4, lora_alpha=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01 * parameter.requires_grad)  # the vision tower too
    model.save_pretrained(str(tmp_path))
    for folder in (tiny_model_dir, str(tmp_path)):
        whole = DeScore.from_pretrained(folder).state_dict()
        empty = DeScore.from_pretrained(folder, empty=True)
        on_disk = [p for name, p in empty.named_parameters() if name.startswith("backbone.") and ".lora_" not in name]
        assert on_disk and all(p.is_meta for p in on_disk)
        block = empty.backbone.model.language_model.layers[0]
        checkpoint.fill(empty, block, "cpu")
        assert not any(p.is_meta for p in block.parameters()) and sum(p.is_meta for p in on_disk) == len(on_disk)
        checkpoint.fill(empty, empty, "cpu")
        for name, value in empty.state_dict().items():
            assert torch.equal(value, whole[name]), name
    query = DeScore.from_pretrained(tiny_model_dir, new_head=True, empty=True).query
    assert torch.equal(query, DeScore.from_pretrained(tiny_model_dir).query)


def test_empty_loading_is_strict(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    file = str(folder / "model.safetensors")
    tensors, name = load_file(file), "model.language_model.norm.weight"
    for broken, says in (
        ({k: v for k, v in tensors.items() if k != name}, "1 missing keys"),
        ({**tensors, "more": torch.zeros(1)}, "1 unexpected keys, e.g. more"),
        ({**tensors, name: torch.zeros(3)}, "1 mismatched keys"),
    ):
        save_file(broken, file)
        with pytest.raises(InputError, match=says):
            DeScore.from_pretrained(str(folder), empty=True)


def test_saved_weights_are_readable_as_the_umask_says(model, tmp_path):
    before = os.umask(0o022)
    try:
        model.save_pretrained(str(tmp_path))
        assert os.umask(0o022) == 0o022  # and the umask is left as it was
    finally:
        os.umask(before)
    for file in tmp_path.rglob("*.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o644, file


def test_a_damaged_file_of_weights_is_one_sentence(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be opened as a Qwen3-VL"):
        DeScore.from_pretrained(str(tmp_path / "m"))


def test_a_transformers_that_would_drop_the_video_is_refused(base_dir, monkeypatch):
    monkeypatch.setattr(transformers.Qwen3VLModel, "forward", lambda self, input_ids, **kwargs: None)
    for empty in (False, True):
        with pytest.raises(InputError, match="would not see the video; 5.18 or newer"):
            DeScore.from_pretrained(base_dir, new_head=True, empty=empty)


def test_replacing_a_folder_is_atomic(tmp_path):
    path = str(tmp_path / "model")
    with checkpoint.replacing(path) as folder:
        open(os.path.join(folder, "new"), "w").close()
    with pytest.raises(RuntimeError):
        with checkpoint.replacing(path) as folder:
            open(os.path.join(folder, "half"), "w").close()
            raise RuntimeError("killed while saving")
    assert os.listdir(path) == ["new"]  # the old folder is untouched
    with checkpoint.replacing(path) as folder:
        open(os.path.join(folder, "newer"), "w").close()
    assert os.listdir(path) == ["newer"]
    os.rename(path, path + ".old")  # killed between the two renames: the next save starts from the only good folder
    with pytest.raises(RuntimeError):
        with checkpoint.replacing(path):
            raise RuntimeError("killed again")
    assert os.listdir(path) == ["newer"]
