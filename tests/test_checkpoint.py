"""Every folder's round trip: LoRA, merged, fp32, part by part; strict loading; a kill while saving."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import grpo
from layout import lay_out
from model import DeScore
from plumbing import checkpoint
from plumbing.adapters import Survival
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


@pytest.mark.parametrize("vision", [True, False])  # False: the backbone's first parameter, and so its dtype, is bf16
def test_what_was_trained_is_saved_in_fp32(base_dir, prefixes, tmp_path, vision):
    """LoRA on a bf16 base, as on a GPU: one type for all; an update below half a step of bf16 is not rounded away."""
    model = DeScore.from_pretrained(base_dir, dtype=torch.bfloat16, new_head=True)
    model.make_trainable("lora", vision=vision, lora_r=2, lora_alpha=2)
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
    assert "base with layers 36" in broken("other depth", lambda f: edit_json(f, layers=36))  # of the same width
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
    refuses(capsys, grpo.main, *flags, "--out", tmp_path / "out", says="no reward head; give OUT/model of")


def test_the_wrong_folder_says_what_to_type(base_dir, tiny_model_dir, tmp_path, world, capsys):
    """A base model where a DeScore is needed, and --out of a stage in place of its model."""
    for script, data_flag in ((grpo, world["train_rl"]), (evaluate, world["test_in_domain"])):
        flags = ["--data", data_flag, "--out", tmp_path / "out"]
        train = f"so no reward head; train one: python cold_start.py --model {base_dir} --data PAIRS.csv --out OUT"
        refuses(capsys, script.main, "--model", base_dir, *flags, says=train)
        shutil.copytree(tiny_model_dir, tmp_path / "stage1" / "model", dirs_exist_ok=True)
        refuses(capsys, script.main, "--model", tmp_path / "stage1", *flags, says=f"give {tmp_path}/stage1/model")


def test_an_empty_model_is_read_part_by_part_and_equals_the_whole(model, tiny_model_dir, tmp_path):
    """What sharded loading builds on: nothing is in memory before `load_empty`, which reads one part only."""
    model.make_trainable("lora", vision=True, lora_r=4, lora_alpha=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01 * parameter.requires_grad)  # the vision tower too
    model.save_pretrained(str(tmp_path))
    for folder in (tiny_model_dir, str(tmp_path)):
        whole = DeScore.from_pretrained(folder).state_dict()
        empty = checkpoint.open_model(DeScore, folder, empty=True)
        on_disk = [p for name, p in empty.named_parameters() if name.startswith("backbone.") and ".lora_" not in name]
        assert on_disk and all(p.is_meta for p in on_disk)
        block = empty.backbone.model.language_model.layers[0]
        checkpoint.load_empty(empty, block, "cpu")
        assert not any(p.is_meta for p in block.parameters()) and sum(p.is_meta for p in on_disk) == len(on_disk)
        checkpoint.load_empty(empty, empty, "cpu")
        for name, value in empty.state_dict().items():
            assert torch.equal(value, whole[name]), name
    query = checkpoint.open_model(DeScore, tiny_model_dir, new_head=True, empty=True).query
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
            checkpoint.open_model(DeScore, str(folder), empty=True)


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


ROWS, WIDTH, RANK = 256, 4096, 64


@pytest.mark.parametrize("size, cosine, lost", [(2e-4, 0.63, 0.77), (1e-3, 0.95, 0.32)])
def test_what_bf16_leaves_of_lora_at_the_width_of_the_8b(size, cosine, lost):
    """256 rows of a layer of 4,096 (std .03) with LoRA of rank 64 and |B| as after some 100 and 500 Adam steps at 2e-6:
    merged in bf16 most of its weights are the base's again. What Survival says is what the layer's outputs say."""
    torch.manual_seed(0)
    base = (torch.randn(ROWS, WIDTH) * 0.03).bfloat16().float()
    a = (torch.rand(RANK, WIDTH) * 2 - 1) / WIDTH**0.5  # as a linear layer's start
    b = size * torch.randn(ROWS, RANK).sign()
    change = 2 * b @ a  # alpha / r = 2
    kept = Survival()
    kept.add("layers.0.mlp.up_proj", base + change, change)
    x = torch.randn(ROWS, WIDTH)
    rounded = (base + change).bfloat16().float()
    outputs = torch.nn.functional.cosine_similarity((x @ (rounded - base).T).flatten(), (x @ change.T).flatten(), dim=0)
    assert kept.cosines()["mlp"] == pytest.approx(outputs.item(), abs=0.02) == pytest.approx(cosine, abs=0.03)
    assert (rounded == base).float().mean().item() == pytest.approx(lost, abs=0.03)


def small_lora(model, seed, size=2e-4):
    """LoRA as a short run leaves it: B of a size whose changes are below half a step of bf16."""
    model.make_trainable("lora", vision=False, lora_r=4, lora_alpha=8, lora_dropout=0.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.lora_layers().values():
            weight = layer.lora_B["default"].weight
            weight.copy_(size * torch.randn(weight.shape, generator=generator).sign())
    return model.eval()


def rewards_and_log_probs(model, prefixes):
    """In the unit that small changes need: fp32 sums over bf16 hidden states."""
    with torch.no_grad():
        out = model(lay_out(model.backbone, prefixes[:2], [[[70, 71, 72]], [[80, 81]]]))
    return torch.cat([out.rewards, out.log_probs.flatten()])


@pytest.mark.parametrize("empty", [False, True])
def test_lora_opened_in_bf16_is_the_model_that_was_trained(base_dir, prefixes, tmp_path, capsys, empty):
    """docs/differences.md, row 25: bit for bit the adapters, and the base that they were trained beside. The folder
    opened as a plain model in bf16 is another one, and the save says so."""
    torch.manual_seed(0)
    trained = small_lora(DeScore.from_pretrained(base_dir, dtype=torch.bfloat16, new_head=True), 0)
    trained.save_pretrained(str(tmp_path))
    assert "WARNING: under .9" in capsys.readouterr().out
    assert all(0 < v < 0.9 for v in json.loads((tmp_path / "descore.json").read_text())["lora_cosine_in_bf16"].values())
    again = checkpoint.open_model(DeScore, str(tmp_path), dtype=torch.bfloat16, empty=empty)
    if empty:
        checkpoint.load_empty(again, again, "cpu")
    for name, layer in trained.lora_layers().items():
        twin = again.get_submodule(name)
        assert torch.equal(twin.base_layer.weight, layer.base_layer.weight)
        assert torch.equal(twin.lora_B["kept"].weight, 2 * layer.lora_B["default"].weight)
    want = rewards_and_log_probs(trained, prefixes)
    assert torch.equal(rewards_and_log_probs(again, prefixes), want)
    merged = checkpoint.open_model(DeScore, str(tmp_path), dtype=torch.bfloat16, merged=True)
    assert not merged.lora_layers() and not torch.equal(rewards_and_log_probs(merged, prefixes), want)


@pytest.mark.parametrize("second", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_chain_of_stages_loses_no_lora(base_dir, prefixes, tmp_path, second, train):
    """Stage 1 with LoRA in bf16, stage 2 with LoRA or in full, in bf16 or (merged) in fp32: the KL's reference is stage
    1's model, and the last folder, opened in bf16, has the base and both stages' changes."""
    torch.manual_seed(0)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    first = small_lora(DeScore.from_pretrained(base_dir, dtype=torch.bfloat16, new_head=True), 0)
    first.save_pretrained(one)
    stage2 = DeScore.from_pretrained(one, dtype=second)
    start = rewards_and_log_probs(stage2, prefixes)
    if train == "lora":
        small_lora(stage2, 1)
        assert not torch.equal(rewards_and_log_probs(stage2, prefixes), start)
        with stage2.reference_policy():
            assert torch.equal(rewards_and_log_probs(stage2, prefixes), start)
        assert stage2.parameter_groups()["llm"] and all(
            ".kept." not in name for name, p in stage2.named_parameters() if p.requires_grad)
    else:
        stage2.make_trainable("full", vision=False)
        with torch.no_grad():
            stage2.backbone.model.language_model.norm.weight.add_(0.01)
    stage2.eval().save_pretrained(two)
    last = DeScore.from_pretrained(two, dtype=torch.bfloat16)
    for name, layer in first.lora_layers().items():
        twin, b = last.get_submodule(name), layer.lora_B["default"].weight
        assert torch.equal(twin.base_layer.weight, layer.base_layer.weight), name
        assert torch.equal(twin.lora_B["kept"].weight[:, :4], 2 * b)
        assert twin.lora_A["kept"].weight.shape[0] == (8 if train == "lora" else 4)
    want = rewards_and_log_probs(stage2, prefixes)
    noise = 0.05 if second == torch.float32 or train == "full" else 0.02
    assert torch.allclose(rewards_and_log_probs(last, prefixes), want, atol=noise)


def test_a_foreign_adapter_is_one_sentence(base_dir, prefixes, tmp_path):
    torch.manual_seed(0)
    small_lora(DeScore.from_pretrained(base_dir, dtype=torch.bfloat16, new_head=True), 0).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter" / "lora.safetensors"
    tensors = load_file(file)
    name, a = next((name, a) for name, a in tensors.items() if name.endswith(".A"))
    for broken in ({**tensors, "more.A": torch.zeros(1), "more.B": torch.zeros(1)},
                   dict(list(tensors.items())[1:]), {**tensors, name: a[:, 1:].contiguous()}):  # of a narrower model
        save_file(broken, file)
        with pytest.raises(InputError, match="is not this model's LoRA"):
            DeScore.from_pretrained(str(tmp_path))
