"""The Hugging Face hub: a name/repo in its cache, and a run's model card, README.md with the YAML head it reads."""

import dataclasses
import json
import os
import re
import subprocess

from huggingface_hub import snapshot_download

from plumbing.settings import InputError, atomic_write, flag_of


def local_folder(path: str, revision: str | None = None) -> str:
    """A folder as it is; for "name/repo" or "name/repo@revision", its snapshot in the hub's cache, fetched if need be.

    InputError: neither.
    """
    if revision is None and not os.path.isdir(path):
        path, _, revision = str(path).partition("@")
        revision = revision or None
    if os.path.isdir(path):
        if revision is not None:
            raise InputError(f"{path}: is a folder here, and has no revision {revision}; leave that out.")
        return str(path)
    try:
        return snapshot_download(str(path), revision=revision)
    except OSError as error:
        fetch = f"hf download {path}" + f" --revision {revision}" * (revision is not None)
        raise InputError(f"{path}: is no folder here, and the hub's cache does not have it ({type(error).__name__}); "
                         f"train one with cold_start.py, or get it with: {fetch}") from error
    except ValueError as error:  # not a name that a repository can have
        raise InputError(f"{path}: is no folder here, nor a name/repo of the hub; see what there is with: "
                         f"ls {os.path.dirname(path) or '.'}") from error


CARD = """---
library_name: transformers
pipeline_tag: video-text-to-text
language: en
tags:
- reward-model
- video
- arxiv:2605.05922
{head}---
# A DeScore video reward model ({stage})

It reads a video and its prompt, writes down what it sees, and gives one number: *Think, then Score*, [arXiv
2605.05922](https://arxiv.org/abs/2605.05922), by the code "DeScore, readable" (not the authors').

- Base model: {base}
- Training: {stage}; steps done: {steps}
- Commit of the code: {commit}

## Metrics

Of the run's last step. A training batch is no test: such numbers say that the run was sound, not how good the model is.

| metric | value | measured on |
|---|---|---|
{metrics}

## Flags that differ from the defaults

```text
{flags}
```

## Use

```python
from model import DeScore  # in a folder with the code

scorer = DeScore.from_pretrained("NAME/REPO")  # or this folder; .to("cuda") where there is a GPU
prompts = ["a red circle rises"] * 2
rewards, thoughts = scorer.reward(["a.mp4", "b.mp4"], prompts, with_thoughts=True)
better = rewards[0] > rewards[1]
```

## Limits

- Only the difference of two rewards for the same prompt means anything: a reward has no unit and no zero.
- The instruction around the prompt is English; prompts in other languages were not tested.
- Nothing was tested but what the table above names.
{limits}
To publish it, in this folder: `hf upload NAME/REPO .`
"""
LORA = """- LoRA is merged into the weights and lies beside them in `adapter/`. In bf16 `from_pretrained` takes it from
  there: rounded with the weights, much of it would be lost.
"""


def write_card(folder: str, trained: dict, settings, lines: list[dict], panels: dict, title: str) -> None:
    """Writes the card. Of files it tells names, never paths: it is made to be given away.

    trained: descore.json; lines: metrics.jsonl; panels: as draw_curves has them, those metrics are shown.
    """
    base, last = without_path(trained.get("base_model", "unknown")), lines[-1]
    base = base if base.count("/") == 1 else os.path.basename(base)
    on_hub, licence = "/" in base, re.fullmatch(r"Qwen/Qwen3-VL-[\w.]+-Instruct", base) and "apache-2.0"
    head = f"base_model: {json.dumps(base)}\n" * on_hub + f"license: {licence}\n" * bool(licence)
    told = f"`{base}`" + ", a folder of whoever trained it" * (not on_hub)
    told += f"; its licence: {licence}" if licence else "; its licence is not known here, so none is given"
    sets = {True: f"the pairs of `{without_path(getattr(settings, 'val', None))}` that have a winner",
            False: f"the step's training batch, {settings.batch_pairs} pairs of `{without_path(settings.data)}`"}
    names = [name for names in panels.values() for name in names if last.get(name) is not None and "grad_" not in name]
    metrics = [f"| {n} | {last[n]:.4g} | {sets[n.startswith('val_')]} |" for n in names if "seconds" not in n]
    given = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)
             if getattr(settings, f.name) != f.default and f.name not in ("out", "resume", "overwrite")}
    flags = [f"{flag_of(n)} {json.dumps(without_path(v), ensure_ascii=False)}" for n, v in given.items()]
    limits = ""
    if os.path.isdir(os.path.join(folder, "adapter")):
        limits += LORA
    if trained.get("score") == "text":
        limits += "- The head is not trained: the score is in the text (`evaluate.py --score-from text`).\n"
    if os.path.isfile(os.path.join(settings.out, "changes.jsonl")):
        limits += "- The flags are the last command's: some were changed on the way, by --resume.\n"
    with atomic_write(os.path.join(folder, "README.md")) as file:
        file.write(CARD.format(head=head, stage=title, base=told, steps=last["step"], commit=commit(), limits=limits,
                               metrics="\n".join(metrics), flags="\n".join(flags)))


def without_path(value):
    """A file or folder -> its name; all else as it is, a name/repo of the hub too."""
    if isinstance(value, str) and (os.path.exists(value) or os.path.isabs(value) or value.startswith((".", "~"))):
        return os.path.basename(os.path.abspath(value))
    return value


def commit() -> str:
    """Of the code that runs, with "-dirty" if it was changed since; "unknown" outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
