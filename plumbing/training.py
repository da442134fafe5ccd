"""A training run: whose --out it is, which steps are left, what follows a step, Ctrl-C.

Rates and other settings are not in a checkpoint (plumbing/resume.py): those are the command's, and `claim_run` decides
which of them may differ from the run's first command.
"""

import dataclasses
import fcntl
import glob
import hashlib
import os
import shutil
import signal
import sys
import time

import numpy as np
import torch
from safetensors import SafetensorError

from plumbing.hub import write_card
from plumbing.checkpoint import save_model
from plumbing.jobs import fingerprint, require_shared, task_seed
from plumbing.logs import Log, draw_curves, read_metrics, read_numbers, reward_scale
from plumbing.resume import Background, checkpoints_of, load_checkpoint, read_json, save_checkpoint
from plumbing.settings import InputError, first_line, flag_of, writable, write_json, write_jsonl

# What a run writes into --out; --overwrite removes this and nothing else.
WRITTEN = ("checkpoints", "model", "model.tmp", "model.old", "settings.json", "changes.jsonl", "metrics.jsonl",
           "samples.jsonl", "skipped.jsonl.old", "not_finite*.jsonl", "curves.png")

# What --resume may be given anew. All other settings decide what is learned and from what: a run whose second half has
# others could not be described by one settings.json, so they are refused. Reasons, group by group:
MAY_CHANGE = {
    "lr", "lr_vision", "lr_head", "max_grad_norm",  # size of a step: what a loss that is not finite asks for
    "epochs", "max_steps",  # how long it trains
    "max_length", "skip_bad_videos",  # limits that an error in mid-training asks to change
    "data", "val", "video_root", "frame_cache", "frame_cache_gb",  # where files lie; --data's content is checked below
    "out", "val_every", "save_every", "keep", "resume", "overwrite",  # what is written, and how often
    "workers", "micro_pairs", "micro_rollouts", "rows_per_batch", "gradient_checkpointing", "compile",  # speed, memory
    "engine", "engine_memory", "engine_tp", "engine_max_len", "shard_ranks", "cpu_offload",  # who computes, and where
}
CONTENT = {"data": "data_sha256", "model": "model_fingerprint"}  # what settings.json keeps beside a path
DRAWS = "task_seed"  # how order and masks are drawn: by other code than the first half's, pairs would come twice


def claim_run(settings, ranks) -> None:
    """COLLECTIVE: makes --out this run's; InputError on every rank if it must not be.

    A new run needs an --out without a run, or --overwrite. --resume needs the settings of the run that it goes on with,
    but for MAY_CHANGE, and data and model of the same content. A run that is there stays as it is until `Run` knows
    that this one begins: most bad input is told between the two.
    """
    problems = []
    if ranks.is_main:  # one looks and decides, all hear of it: others could see other files
        try:
            _claim(settings)
        except InputError as error:
            problems = [str(error)]
    if problems := ranks.gather_objects(problems):
        raise InputError(problems[0])
    require_shared(settings.out, ranks)


def _claim(settings):
    out, saved = settings.out, checkpoints_of(settings.out)
    if settings.resume and settings.overwrite:
        raise InputError("--resume goes on with the run in --out, --overwrite removes it; give one of them.")
    if not (settings.overwrite or settings.resume):
        names = ("checkpoints", "metrics.jsonl", "model")
        if held := [name for name in names if os.path.exists(os.path.join(out, name))]:
            raise InputError(f"{out}: holds a run ({', '.join(held)}); --resume goes on with it, --overwrite removes "
                             "it, or give another --out.")
    if settings.resume and not saved and os.path.isdir(os.path.join(out, "model")):
        raise InputError(f"{out}: holds a model but no checkpoint to go on from; --overwrite starts anew.")
    now = _now(settings)
    writable([out])
    _hold(out)
    if settings.resume and saved:
        _compare(out, now)
    if settings.overwrite and _written(settings) and os.path.exists(skipped := os.path.join(out, "skipped.jsonl")):
        if os.path.exists(f"{skipped}.old"):  # the run's: this one is a refused command's
            os.remove(skipped)
        else:
            os.replace(skipped, f"{skipped}.old")  # the checks to come write one


def _begin(settings, step, ranks):
    """Now that nothing refuses the run: removes the one that --overwrite gives up, and writes settings.json; says what
    --resume changes, and keeps it in changes.jsonl with `step`, after which it counts."""
    now = _now(settings)
    for path in _written(settings) if settings.overwrite else []:
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    if step and (told := _compare(settings.out, now)):
        for name, (old, new) in told.items():
            ranks.print(f"{flag_of(name)} was {old}, from here on {new}")
        write_jsonl(os.path.join(settings.out, "changes.jsonl"), [{"after_step": step, **told}], add=True)
    write_json(os.path.join(settings.out, "settings.json"), now)


def _now(settings):
    return {**dataclasses.asdict(settings), "draws": DRAWS, "data_sha256": _sha256(settings.data),
            "model_fingerprint": fingerprint(settings.model)}


HELD = []  # files whose lock this process holds until it ends


def _hold(out):
    """InputError if another process trains into `out`: for minutes nothing lies there that would tell, and two would
    write into one log, and remove each other's checkpoints. A lock of POSIX: gone when the process is, however it ends,
    and not inherited by loader workers. Where the file system has none the run goes on without."""
    try:
        HELD.append(open(os.path.join(out, ".lock"), "w"))
        fcntl.lockf(HELD[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{out}: another run is under way in it; wait for it, or give another --out.") from error
    except OSError:
        pass


def _compare(out, now):
    """{name: [old, new]} of what differs from the run's settings.json; InputError if it must not."""
    try:
        before = read_json(out, "settings.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{out}/settings.json: is missing or damaged; --overwrite starts anew.") from error
    before.setdefault("model_fingerprint", now["model_fingerprint"])  # begun by code that did not keep it
    if before.get("draws") != DRAWS:
        raise InputError(f"{out}: was begun by code that drew pairs and masks otherwise; give another --out.")
    changed = {name: [before.get(name), now[name]] for name in now if before.get(name) != now[name]}
    fixed = sorted(changed.keys() - MAY_CHANGE)
    for what, content in CONTENT.items():  # under the same name: a checkpoint holds no more than what is trained
        if content in fixed and what not in fixed:
            raise InputError(f"{now[what]}: is not what the run in {out} was begun with; give another --out.")
    if fixed:
        was = ", ".join(f"{flag_of(name)} {before.get(name)}" for name in fixed if name not in CONTENT.values())
        raise InputError(f"{out}: was begun with {was}, which --resume cannot change; give another --out.")
    return {name: values for name, values in changed.items() if name not in ("resume", "overwrite", "out")}


def _sha256(path):
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file.")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _written(settings):
    """What of WRITTEN is there; InputError if this run reads from it."""
    found = [path for name in WRITTEN for path in glob.glob(os.path.join(glob.escape(settings.out), name))]
    for path in found:
        for read in (settings.data, settings.model):
            real, own = os.path.realpath(path), os.path.realpath(read)
            if os.path.exists(read) and os.path.commonpath([real, own]) == real:
                raise InputError(f"{read}: lies in what --overwrite would remove; give another --out.")
    return found


def divide(num_pairs: int, settings, ranks) -> tuple[int, int]:
    """(updates per epoch, pairs per update on each rank). The last, incomplete batch of an epoch is left out.

    InputError: ranks do not divide a batch, or the pairs do not fill one.
    """
    micro_pairs = getattr(settings, "micro_pairs", 1)  # pairs per forward; stage 2 has one pair, that is 2 G CoTs
    if settings.batch_pairs % (ranks.world * micro_pairs):
        raise InputError(f"--batch-pairs {settings.batch_pairs} is not a multiple of {ranks.world} ranks x "
                         f"--micro-pairs {micro_pairs}; change one of them.")
    if num_pairs < settings.batch_pairs:
        raise InputError(f"{settings.data}: {num_pairs} pairs do not fill one batch; lower --batch-pairs "
                         f"({settings.batch_pairs}).")
    return num_pairs // settings.batch_pairs, settings.batch_pairs // ranks.world


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """A shuffle that depends on (seed, epoch) alone, so that every rank, and a resumed run, sees the same order."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(task_seed("order", seed, epoch))).tolist()


class Run:
    """One training run: where it stands, what each step draws, and how a step ends.

    Attributes: total steps; first, the number of steps done before a resume; steps_per_epoch; local_pairs, this rank's
    pairs per step; warmup_steps.
    """

    def __init__(self, name: str, model, optimizer, pairs: list, settings, ranks):
        """COLLECTIVE. name: "stage 1" or "stage 2". Loads the newest checkpoint if --resume was given; --out changes
        only then, when nothing refuses the command any more."""
        self.name, self.model, self.optimizer, self.settings, self.ranks = name, model, optimizer, settings, ranks
        self.num_pairs = num_pairs = len(pairs)
        self.pairs = task_seed(*(pair.line for pair in pairs))  # --skip-bad-videos may keep as many, but others
        self.steps_per_epoch, self.local_pairs = divide(num_pairs, settings, ranks)
        self.total = min(settings.max_steps or 10**9, settings.epochs * self.steps_per_epoch)
        if settings.max_steps and self.total < settings.max_steps:
            ranks.print(f"{name}: {self.total} steps, not --max-steps {settings.max_steps}: --epochs {settings.epochs} "
                        f"over {num_pairs} pairs, --batch-pairs {settings.batch_pairs} at a time, give no more")
        self.warmup_steps = max(1, round(settings.warmup * self.total))
        position = load_checkpoint(settings.out, model, optimizer, ranks) if settings.resume else {"step": 0}
        # The run's own: with more --epochs a share of the new total would begin the warm-up again.
        self.warmup_steps = position.get("warmup_steps", self.warmup_steps)
        self.first, before = position["step"], position.get("num_pairs", num_pairs)
        same = before == num_pairs and position.get("pairs", self.pairs) == self.pairs
        if ranks.is_main:
            _begin(settings, self.first, ranks)
        if not same:
            ranks.print(f"{num_pairs} pairs, {before} until step {self.first}: others can be read or are left out now; "
                        "they are shuffled anew, so some come twice in this epoch, and some not at all")
            if ranks.is_main:
                change = {"after_step": self.first, "num_pairs": [before, num_pairs]}
                write_jsonl(os.path.join(settings.out, "changes.jsonl"), [change], add=True)
        self.log, self.stop, self.began = Log(settings.out, ranks, position), StopSignal(), time.time()
        self.background = Background()  # writes checkpoints

    def draws(self):
        """Yields (epoch, this rank's indices of pairs) for each step that is left."""
        for step in range(self.first, self.total):
            epoch, place = divmod(step, self.steps_per_epoch)
            order, size = epoch_order(self.num_pairs, self.settings.seed, epoch), self.settings.batch_pairs
            yield epoch, self.ranks.share(order[place * size : (place + 1) * size])

    def steps(self):
        """Yields the numbers of the steps that are left, the first being 1, with a progress bar; starts the clock."""
        left = range(self.first + 1, self.total + 1)
        for step in self.ranks.progress(left, desc=self.name, initial=self.first, total=self.total):
            self.background.look()
            self.began = time.time()
            yield step
        self.background.wait()

    def seconds(self) -> float:
        """Since this step began."""
        return time.time() - self.began

    def is_due(self, step: int, every: int) -> bool:
        """At every `every`-th step and at the last; `every` 0: only at the last."""
        return step == self.total or (every > 0 and step % every == 0)

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """COLLECTIVE: a checkpoint if one is due, or after Ctrl-C.

        The step's metrics go along: a kill between saving and logging would lose their line.
        """
        self.stopping, s = self.ranks.sum({"stop": self.stop.requested})["stop"] > 0, self.settings
        if self.stopping or self.is_due(step, s.save_every):
            more = {"metrics": metrics, "warmup_steps": self.warmup_steps}
            more |= {"num_pairs": self.num_pairs, "pairs": self.pairs}
            begin = self.background.begin
            save_checkpoint(s.out, step, self.model, self.optimizer, self.ranks, s.keep, more, begin)

    def finish_step(self, step: int, metrics: dict[str, float], line: str) -> None:
        """Logs the step; after Ctrl-C ends the run. `line` is what the screen shows. KeyboardInterrupt then."""
        self.log.step(step, metrics, f"step {step:5d}/{self.total}  {line}  {self.seconds():.1f} s")
        if self.stopping:
            self.background.wait()
            self.ranks.print(f"stopped after step {step}; the same command with --resume goes on")
            raise KeyboardInterrupt


def save_run(model, settings, ranks, panels: dict[str, list[str]], title: str) -> None:
    """COLLECTIVE: what a finished run leaves in --out, OUT/model (with a model card) and OUT/curves.png.

    The rewards' mean and spread go along, for a rough common scale: DeScore.reward(normalize=True).
    InputError: the model cannot be written.
    """
    model.settings.update(reward_scale(settings.out))
    path = os.path.join(settings.out, "model")
    try:
        save_model(model, path, ranks, lambda folder: write_card(
            folder, model.settings, settings, read_metrics(settings.out), panels, title))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: could not be written ({first_line(error)}); free space, then --resume writes "
                         "it: no step is lost.") from error
    if ranks.is_main:
        draw_curves(settings.out, panels, os.path.join(settings.out, "curves.png"), title)
    ranks.print(f"wrote {settings.out}/model, metrics.jsonl and curves.png")


def require_finite(found: list[tuple], what: str, settings, ranks) -> None:
    """InputError for the first value that is inf or nan, before any weight is touched; OUT/not_finite.jsonl then holds
    its rows. The last checkpoint stays good.

    found: (value, rows); rows: what this rank fed to the model for it, each with at least its "line" in the CSV.
    """
    values = read_numbers([value for value, _ in found])
    value, rows = next(((v, rows) for v, (_, rows) in zip(values, found) if not np.isfinite(v)), (None, None))
    if rows is None:
        return
    path = os.path.join(settings.out, f"not_finite.rank{ranks.rank}.jsonl" if ranks.rank else "not_finite.jsonl")
    write_jsonl(path, rows)
    lines = ", ".join(sorted({str(row["line"]) for row in rows}, key=int))
    raise InputError(f"{settings.data}: the {what} is {value} at line {lines} (kept in {path}); look at them or lower "
                     "--lr, then go on with --resume.")


class StopSignal:
    """Ctrl-C (or SIGTERM) asks for a stop at the end of the step, with a checkpoint; Ctrl-C again stops at once.

    SIGTERM does not: sent to torchrun and its ranks together (systemd, slurm's time limit), each rank gets two.
    """

    def __init__(self):
        self.requested = 0  # the number of the first signal
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        first, self.requested = self.requested, self.requested or number
        if first and signal.SIGINT in (number, first):  # torchrun hands on the second Ctrl-C as SIGTERM
            raise KeyboardInterrupt
        if first or os.environ.get("RANK", "0") != "0":
            return  # all ranks get the signal: one message is enough
        text = "stopping after this step; Ctrl-C now stops at once"
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, not this process, decides how long a step may still take
            text += " (torchrun kills after 30 s by default; longer steps need torchrun --shutdown-timeout SECONDS)"
        print("\n" + text, file=sys.stderr, flush=True)
