"""Checkpoints: what --resume goes on from. One process writes them beside its training, many ranks together.

OUT/checkpoints/step-N holds the trained weights, the optimizer's states, each rank's random state, and step.json. It
has its name only when all of it is on disk, so a kill at any moment leaves it whole or absent, and the one before it.
"""

import concurrent.futures
import json
import os
import pickle
import random
import shutil
import warnings

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.utils._pytree import tree_map_only

from plumbing.settings import InputError, first_line, write_json


class Background:
    """Runs one function at a time in a thread. What it raises is raised here, by `look` or `wait`: nothing is lost."""

    def __init__(self):
        self.pool, self.running = concurrent.futures.ThreadPoolExecutor(1), None

    def begin(self, work) -> None:
        """Starts it, after the one before has ended."""
        self.wait()
        self.running = self.pool.submit(work)

    def look(self) -> None:
        """Once a step: raises what it ended with."""
        if self.running and self.running.done():
            self.wait()

    def wait(self) -> None:
        """Until it has ended. (Python too waits for it before a process ends, unless that is killed.)"""
        running, self.running = self.running, None
        if running:
            running.result()


def save_checkpoint(
    out: str, step: int, model, optimizer, ranks, keep: int = 2, more: dict | None = None, begin=None
) -> None:
    """COLLECTIVE: writes OUT/checkpoints/step-N; InputError if the disk does not take it. The last `keep` stay.

    Weights and optimizer go through torch.distributed.checkpoint, so another number of ranks can load them. more: what
    step.json is to hold beside step and world. begin: `Background.begin`, to go on while a copy is written, made now in
    the host's memory: 12 bytes for each trained number. Shards (FSDP2) are written before this returns: their ranks
    wait for each other, and such messages of a thread would need a process group of their own.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: said on every save
    weights, adam = _training_state(model, optimizer)
    # Tensors only, so without the optimizer's rates: those are settings, and a resumed run's are its own command's.
    state, states = {"model": weights, "optimizer": adam["state"]}, _random_state(ranks.device)
    arguments = out, step, state, states, ranks, keep, {"step": step, "world": ranks.world, **(more or {})}
    if begin is None or ranks.sharded:
        _write(*arguments)
    else:
        copied = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
        begin(lambda: _write(out, step, copied, *arguments[3:]))


def _write(out, step, state, states, ranks, keep, position):
    folder = os.path.join(out, "checkpoints", f"step-{step:06d}")
    temporary = folder + ".tmp"
    try:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
        ranks.barrier()
        dcp.save(state, checkpoint_id=os.path.join(temporary, "state"), no_dist=not ranks.sharded)
        torch.save(states, os.path.join(temporary, f"random-{ranks.rank}.pt"))
        ranks.barrier()
        if ranks.is_main:
            write_json(os.path.join(temporary, "step.json"), position)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
            for old in checkpoints_of(out)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        ranks.barrier()
    except (OSError, RuntimeError, CheckpointException) as error:  # the last is a BaseException, with each rank's own
        first = _first_of(error)
        if not isinstance(first, (OSError, RuntimeError)):
            raise  # a bug
        # torch tells of a full disk as "unexpected pos 704 vs 598"
        raise InputError(f"{folder}: could not be written ({first_line(first)}); is the disk full? --resume goes on "
                         "from the checkpoint before.") from error


def _first_of(error):
    """What one rank ended with, of a CheckpointException that holds each rank's own."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def load_checkpoint(out: str, model, optimizer, ranks) -> dict:
    """COLLECTIVE: loads the newest complete checkpoint under OUT in place; the optimizer keeps its own rates.

    Returns its step.json, {"step": 0} if there is none. With another number of ranks it goes on, but not bit for bit.
    InputError: it is damaged.
    """
    if not checkpoints_of(out):
        return {"step": 0}
    folder = checkpoints_of(out)[-1]
    weights, adam = _training_state(model, optimizer)
    state = {"model": weights, "optimizer": adam["state"]}
    try:
        position = read_json(folder, "step.json")
        same = position["world"] == ranks.world
        states = torch.load(os.path.join(folder, f"random-{ranks.rank}.pt"), weights_only=True) if same else None
        _refuse_foreign_index(os.path.join(folder, "state", ".metadata"))
        dcp.load(state, checkpoint_id=os.path.join(folder, "state"), no_dist=not ranks.sharded)
    except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError, CheckpointException) as error:
        first = _first_of(error)
        if isinstance(first, torch.OutOfMemoryError):
            raise first from None
        raise InputError(f"{folder}: is damaged, or no checkpoint of this code ({first_line(first)}); delete this "
                         "folder, and --resume goes on from the one before.") from error
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=adam,
        options=StateDictOptions(ignore_frozen_params=True, strict=False))  # frozen weights are not in the checkpoint
    if same:
        _set_random_state(states, ranks.device)
    ranks.print(f"resumed from {folder}")
    return position


def _training_state(model, optimizer):
    return get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))


def read_json(folder: str, name: str):
    """A file of a checkpoint, or of OUT."""
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return json.load(file)


def _random_state(device):
    """Numbers and tensors only, so that `weights_only=True` reads it: nothing in a checkpoint can run as code."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state, device):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


class _Index(pickle.Unpickler):
    """Reads the index that torch.distributed.checkpoint pickles, and nothing that could run as code."""

    KNOWN = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
            "StorageMeta", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float32", "bfloat16"},
        "pathlib": {"PosixPath"}, "pathlib._local": {"PosixPath"},
    }

    def find_class(self, module, name):
        """The classes of an optimizer's state, and no other: UnpicklingError names it."""
        if name not in self.KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _refuse_foreign_index(path):
    """UnpicklingError before torch unpickles an index that holds more than names, sizes and places of tensors."""
    with open(path, "rb") as file:
        _Index(file).load()


def checkpoints_of(out: str) -> list[str]:
    """Folders of the complete ones, the newest last."""
    folder = os.path.join(out, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = sorted((int(name[5:]), name) for name in names if name.startswith("step-") and name[5:].isdigit())
    return [os.path.join(folder, name) for _, name in steps]  # by number: "step-1000000" sorts before "step-999999"
