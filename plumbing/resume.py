"""Stopping and going on: checkpoints of trained weights, optimizer, random states and step; Ctrl-C; non-finite losses."""

import json
import os
import random
import shutil
import signal
import sys
import warnings

import numpy as np
import torch

from plumbing.settings import InputError


def require_finite(value: float, what: str, rows: list[dict], settings, ranks) -> None:
    """InputError if `value` is inf or nan, before any weight is touched; OUT/not_finite.jsonl then holds the rows.

    rows: what this rank fed to the model, each with at least its "line" in the CSV. The last checkpoint stays good.
    """
    if np.isfinite(value):
        return
    path = os.path.join(settings.out, f"not_finite.rank{ranks.rank}.jsonl" if ranks.rank else "not_finite.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    lines = ", ".join(sorted({str(row["line"]) for row in rows}, key=int))
    raise InputError(
        f"{settings.data}: the {what} is {value} at line {lines} (kept in {path}); look at them or lower --lr, then go "
        "on with --resume."
    )


def save_checkpoint(
    out: str, step: int, model, optimizer, ranks, keep: int = 2, more: dict | None = None
) -> str:
    """COLLECTIVE: writes OUT/checkpoints/step-N. Complete or absent: it gets its name only when all of it is on disk.

    Weights and optimizer go through torch.distributed.checkpoint, so another number of ranks can load them. The last
    `keep` stay.
    """
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: said on every save
    folder = os.path.join(out, "checkpoints", f"step-{step:06d}")
    temporary = folder + ".tmp"
    if ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
    ranks.barrier()
    dcp.save(
        _training_state(model, optimizer), checkpoint_id=os.path.join(temporary, "state"), no_dist=ranks.world == 1
    )
    random_state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    torch.save(random_state, os.path.join(temporary, f"random-{ranks.rank}.pt"))
    ranks.barrier()
    if ranks.is_main:
        with open(os.path.join(temporary, "step.json"), "w", encoding="utf-8") as file:
            json.dump({"step": step, "world": ranks.world, **(more or {})}, file)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        for old in _checkpoints(out)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    ranks.barrier()
    return folder


def load_checkpoint(out: str, model, optimizer, ranks) -> dict:
    """COLLECTIVE: loads the newest complete checkpoint under OUT in place. Returns its step.json, {"step": 0} if
    none."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    found = _checkpoints(out)
    if not found:
        return {"step": 0}
    folder = found[-1]
    state = _training_state(model, optimizer)
    dcp.load(state, checkpoint_id=os.path.join(folder, "state"), no_dist=ranks.world == 1)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),  # frozen weights are not in the checkpoint
    )  # fmt: skip
    with open(os.path.join(folder, "step.json"), encoding="utf-8") as file:
        position = json.load(file)
    own_random = os.path.join(folder, f"random-{ranks.rank}.pt")
    if position["world"] == ranks.world:  # another number of ranks goes on, but not bit for bit
        states = torch.load(own_random, weights_only=False)  # our own file: Python's and NumPy's states are tuples
        random.setstate(states["python"]), np.random.set_state(states["numpy"]), torch.set_rng_state(states["torch"])
        if "cuda" in states and ranks.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], ranks.device)
    ranks.print(f"resumed from {folder}")
    return position


def _training_state(model, optimizer):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    weights, states = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": weights, "optimizer": states}


def _checkpoints(out):
    folder = os.path.join(out, "checkpoints")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if name.startswith("step-") and not name.endswith(".tmp")]


class StopSignal:
    """Ctrl-C (or SIGTERM) asks for a stop at the end of the step, so that a checkpoint can be saved; twice stops at
    once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step; again to stop at once", file=sys.stderr, flush=True)
