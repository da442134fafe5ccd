"""Converts a checkpoint of the authors' code (a `<Reward>` row and rm_head.pth) into a DeScore folder.

    python -m lab.road.import_released --dir DIR --out runs/released
"""

import argparse
import os
import pickle

import torch

from model import DeScore
from plumbing.checkpoint import load_backbone, read_processor
from plumbing.settings import InputError, cli, first_line, writable


def import_released(path: str) -> DeScore:
    """Opens a checkpoint of the authors' code: a Hugging Face folder with a `<Reward>` row, and `rm_head.pth` beside
    it.

    The row becomes our query, rm_head.weight our head. Nothing is unpickled but plain tensors (weights_only). Their
    prompt and the place of the CoT differ from ours, so rewards will be near theirs, not equal.
    InputError: a file is missing or of another shape.
    """
    file = os.path.join(path, "rm_head.pth")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"{file}: missing, or more than plain tensors ({first_line(error)}); --dir needs a checkpoint "
                         "of the authors' code, with config.json and rm_head.pth.") from error
    state = state.get("model", state) if isinstance(state, dict) else {}
    weights = [v for k, v in state.items() if k in ("rm_head.weight", "base_model.model.rm_head.weight")]
    backbone = load_backbone(path, torch.float32)
    processor = read_processor(path)
    row = processor.tokenizer.get_added_vocab().get("<Reward>")
    model = DeScore(backbone, processor, {"base_model": os.path.basename(os.path.abspath(path))})
    if len(weights) != 1 or weights[0].shape != model.head.weight.shape or row is None:
        raise InputError(
            f"{path}: needs one rm_head.weight of shape {tuple(model.head.weight.shape)} and a <Reward> token."
        )
    with torch.no_grad():
        model.query.copy_(backbone.get_input_embeddings().weight[row])
        model.head.weight.copy_(weights[0])
    return model.eval()


def main(argv=None) -> None:
    """Converts a checkpoint of the authors' code into a DeScore folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dir", required=True, metavar="DIR", help="folder with config.json and rm_head.pth"
    )
    parser.add_argument("--out", required=True, help="DeScore folder to write")
    args = parser.parse_args(argv)
    writable([args.out])
    import_released(args.dir).save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)
