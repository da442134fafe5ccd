"""lab/road/import_released.py: a released checkpoint becomes one of ours, with the same reward."""

import copy

import pytest
import torch

import data
import rollout
from lab.road import import_released
from layout import lay_out
from model import DeScore
from plumbing.settings import InputError
from tests.test_tied import base, is_tied, tied  # noqa: F401


def test_import_of_a_released_checkpoint(model, prefixes, processor, tmp_path):
    """A Hugging Face folder with a `<Reward>` row plus rm_head.pth: row -> query, rm_head -> head, the same reward."""
    released = copy.deepcopy(processor)
    released.tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<Reward>"]}, replace_extra_special_tokens=False
    )
    row = released.tokenizer.convert_tokens_to_ids("<Reward>")
    batch = lay_out(model.backbone, prefixes[:1], [[[70, 71]]])
    expected = model(batch).rewards
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight[row] = model.query
    folder = str(tmp_path / "released")
    model.backbone.save_pretrained(folder)
    released.save_pretrained(folder)
    torch.save({"model": {"base_model.model.rm_head.weight": model.head.weight.data}}, f"{folder}/rm_head.pth")
    import_released.main(["--dir", folder, "--out", str(tmp_path / "ours")])
    ours = DeScore.from_pretrained(str(tmp_path / "ours"))
    assert ours.settings["base_model"] == "released"  # a name: the folder may be given away
    assert torch.allclose(ours(batch).rewards, expected, atol=1e-5)
    assert row in rollout.banned_tokens(ours.processor.tokenizer, row + 1)
    assert row not in data.encode_text(ours.processor.tokenizer, "<Reward>")
    torch.save({"rm_head.weight": torch.ones(1, 8)}, f"{folder}/rm_head.pth")
    with pytest.raises(InputError, match="rm_head.weight of shape"):
        import_released.import_released(folder)

    torch.save(torch.ones(1, 8), f"{folder}/rm_head.pth")  # no dict
    with pytest.raises(InputError, match="rm_head.weight of shape"):
        import_released.import_released(folder)
    open(f"{folder}/rm_head.pth", "wb").close()  # a copy that broke off
    with pytest.raises(InputError, match="rm_head.pth: missing, or"):
        import_released.import_released(folder)

    class Evil:
        def __reduce__(self):
            return print, ("pickled code ran",)

    torch.save({"rm_head.weight": Evil()}, f"{folder}/rm_head.pth")
    with pytest.raises(InputError, match="more than plain tensors"):
        import_released.import_released(folder)


def test_import_of_a_released_checkpoint_that_is_tied(tied, prefixes, processor, tmp_path):  # noqa: F811
    released = copy.deepcopy(processor)
    tokens = {"additional_special_tokens": ["<Reward>"]}
    released.tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)
    row = released.tokenizer.convert_tokens_to_ids("<Reward>")
    batch = lay_out(tied.backbone, prefixes[:1], [[[70, 71]]])
    with torch.no_grad():
        tied.backbone.get_input_embeddings().weight[row] = tied.query
        expected = tied(batch)
    source = tmp_path / "released"
    tied.backbone.save_pretrained(source)
    released.save_pretrained(source)
    torch.save({"rm_head.weight": tied.head.weight.data}, source / "rm_head.pth")
    import_released.main(["--dir", str(source), "--out", str(tmp_path / "ours")])
    ours = DeScore.from_pretrained(str(tmp_path / "ours"))
    with torch.no_grad():
        found = ours(batch)
    assert is_tied(ours.backbone) and torch.allclose(found.rewards, expected.rewards, atol=1e-5)
    assert torch.allclose(found.log_probs, expected.log_probs, atol=1e-5)
