"""Shared pieces: a small toy world on disk, the real processor, tiny random Qwen3-VLs. No downloads, no mocks."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread costs more than it helps
if os.environ.get("DESCORE_TEST_GPU") != "1":  # `make test-gpu`. All other tests compare to the bit: no GPU for them
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import collections
import copy
import csv
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch
from transformers import AutoProcessor

import data
import grpo
import toy.base_model
import toy.world
from losses import group_advantages
from model import DeScore
from plumbing import settings, training
from tests import forks

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {"train_cold_start": 8, "val_cold_start": 3, "train_rl": 6, "test_in_domain": 6, "test_genai_bench": 4,
         "test_videogen_rewardbench": 4}


# Those that take longest, all with few tests: a worker that begins one of them last works on alone.
LONG = [f"test_{name}.py" for name in ("parallel", "settings", "speed", "mixed_precision", "resume", "evaluate", "tied",
                                       "toy", "change_one_thing", "cold_start", "grpo")]


def pytest_collection_modifyitems(items):
    """Long files first, then by number of tests; `make test` gives a worker a file at a time, in this order."""
    tests = collections.Counter(item.path for item in items)
    rank = lambda path: LONG.index(path.name) if path.name in LONG else len(LONG)
    items.sort(key=lambda item: (rank(item.path), -tests[item.path], str(item.path)))


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Some 60 runs end with a figure of six panels; those of a test marked `curves` are drawn."""
    if not request.node.get_closest_marker("curves"):
        monkeypatch.setattr(training, "draw_curves", lambda *_: None)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """{split: CSV path} of a small toy world."""
    return toy.world.make_data(tmp_path_factory.mktemp("world"), seed=3, sizes=SIZES, progress=False)


@pytest.fixture(scope="session")
def tiny_clips(world):
    """A few mp4 paths."""
    return [path for pair in data.read_pairs(world["train_rl"]) for path in pair.videos]


@pytest.fixture(scope="session")
def processor():
    return toy.base_model.build_processor()


@pytest.fixture(scope="session")
def real_processor():
    """The published processor and tokenizer of Qwen3-VL-8B-Instruct; for tests marked `real`."""
    if not os.environ.get("QWEN3_VL"):
        pytest.skip("QWEN3_VL names no folder with the published files of Qwen3-VL-8B-Instruct")
    return AutoProcessor.from_pretrained(os.environ["QWEN3_VL"])


TINY = {"hidden": 64, "layers": 2, "heads": 2, "vision_hidden": 48, "vision_layers": 2}


def fresh_model(base: str, seed: int) -> DeScore:
    """A DeScore on a plain Qwen3-VL folder, with a head whose rewards differ visibly."""
    torch.manual_seed(seed)
    model = DeScore.from_pretrained(base, new_head=True)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.eval()


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory, processor):
    """A plain Hugging Face folder: a tiny Qwen3-VL with random weights."""
    folder = tmp_path_factory.mktemp("base")
    toy.base_model.build_model(processor, **TINY).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def opened(base_dir):
    """A DeScore on the tiny base, and torch's random state behind it: to open a folder takes longer than most tests."""
    return fresh_model(base_dir, 0), torch.get_rng_state()


@pytest.fixture
def model(opened):
    """A fresh DeScore on the tiny base, with a head whose rewards differ visibly; only the processor is everyone's."""
    one, random_state = opened
    torch.set_rng_state(random_state)
    return copy.deepcopy(one, {id(one.processor): one.processor})


@pytest.fixture(scope="session")
def tiny_model_dir(base_dir, tmp_path_factory):
    """A DeScore checkpoint folder."""
    folder = str(tmp_path_factory.mktemp("descore"))
    fresh_model(base_dir, 1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prefixes(processor, world):
    """Encoded prompts of the first two pairs: four videos, of different prompt lengths."""
    pairs = data.read_pairs(world["train_rl"])[:2]
    return [data.encode_prompt(processor, data.sample_frames(v), p.prompt) for p in pairs for v in p.videos]


@pytest.fixture
def pairs_csv(tmp_path):
    """Five pairs in VideoAlign's columns, one of them invalid, one a tie."""
    labels = ["A", "B", "invalid", "same", "A"]
    rows = [[f"{k}a.mp4", f"{k}b.mp4", f"prompt {k}", label] for k, label in enumerate(labels)]
    return write_csv(tmp_path / "pairs.csv", ["path_A", "path_B", "prompt", "TA"], rows)


def write_csv(path, head, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return str(path)


def judge(rollouts, tokenizer, settings):
    """Steps 3 and 4 of stage 2: rollout rewards by the rules, and advantages within each group."""
    rollouts.rule_rewards = grpo.rule_rewards(rollouts, tokenizer, settings)
    rollouts.advantages = group_advantages(rollouts.totals())


def run(*command, env=None, ranks=0, check=True):
    """Runs one of our scripts as a user would, in a fork (forks.py); with `env`, {} too, by a new Python or torchrun.
    Returns the finished process."""
    command = [*([] if str(command[0]).endswith(".py") or ranks else ["-m"]), *map(str, command)]
    if env is None:
        done = forks.run(command, str(ROOT), ranks)
    else:  # a new Python: libraries read their environment when they are imported
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        done = subprocess.run([sys.executable, *start, *command], cwd=ROOT, env={**os.environ, **env},
                              capture_output=True, text=True, timeout=240)
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def run_here(monkeypatch, script, *flags):
    """What `python script flags` does, as __main__, but in this process: a new one takes four seconds to import."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    runpy.run_path(str(ROOT / script), run_name="__main__")


def refuses(capsys, main, *flags, says):
    """Bad input, as a user meets it: exit code 2, no traceback, and one `error:` line with `says`, which is returned.

    In this process, through what each script ends with, cli(main): a new process takes four seconds.
    """
    with pytest.raises(SystemExit) as end:
        settings.cli(lambda: main([str(flag) for flag in flags]))
    text = capsys.readouterr().err
    message = [line for line in text.splitlines() if "error:" in line]
    assert end.value.code == 2 and "Traceback" not in text and len(message) == 1 and says in message[0], text
    return message[0]
