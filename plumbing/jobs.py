"""Working through many videos, resumable: one line per finished item, appended at once, shared out over the ranks."""

import contextlib
import glob
import hashlib
import json
import math
import os
import typing

import numpy as np

from plumbing.settings import InputError, first_line, write_json, write_jsonl
from plumbing.video import Unsupported


def task_seed(*parts) -> int:
    """A seed from anything that names a sample, e.g. (seed, video, prompt, k); the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


class Item(typing.NamedTuple):
    """A video, its prompt, and the CSV line that asks for it first. The key of everything kept is item[:2].

    change: what is done to the frames first; only lab/study/sanity.py asks for that.
    """

    video: str
    prompt: str
    line: int
    change: str = ""


def read_log(out: str, name: str) -> dict[tuple[str, str], dict]:
    """All ranks' lines of a phase, {(video, prompt): record}. A last line cut short by a kill is left out."""
    records = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(out), f"{name}*.jsonl"))):
        with open(path, "rb") as file:
            for count, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    try:
                        record = json.loads(line)
                        records[record["video"], record["prompt"]] = record
                    except (ValueError, KeyError, TypeError) as error:
                        raise InputError(f"{path}, line {count}: is damaged; delete it and run again.") from error
    return records


def open_log(out: str, name: str, rank: int):
    """This rank's file, to append to. A half-written last line is cut off, or the next would be glued to it."""
    file = open(os.path.join(out, f"{name}.rank{rank}.jsonl" if rank else f"{name}.jsonl"), "ab+")
    file.seek(0)
    file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
    return file


class Phase:
    """Thinking, or scoring, over many items: what is done, what is to do, and the file that grows.

        phase = Phase("rewards", items, out, skip, ranks)        COLLECTIVE
        if phase.to_do:
            model = ...
            for batch in phase.batches(8):
                phase.write(record) or phase.refuse(item, error), for each item of the batch
        records, skipped = phase.finish()                        COLLECTIVE

    to_do: the items that no file holds yet, THE SAME LIST ON EVERY RANK. What all ranks must open together, as they
    must a vLLM engine, has to be decided by it and not by a rank's own share, which may be empty.
    """

    def __init__(self, name: str, items: list[Item], out: str, skip: bool, ranks):
        self.name, self.out, self.skip, self.ranks = name, out, skip, ranks
        self.done, self.skipped, self.new = read_log(out, name), [], []
        ranks.barrier()  # nobody may append before everybody has read, or the ranks would share out different lists
        self.to_do = [item for item in items if item[:2] not in self.done]

    def batches(self, size: int):
        """Yields this rank's items, `size` at a time: equally often on every rank, so at the end perhaps none."""
        mine = self.ranks.share(self.to_do)
        most = math.ceil(len(self.to_do) / self.ranks.world)  # that any rank has
        with (
            open_log(self.out, self.name, self.ranks.rank) as self.file,
            self.ranks.progress(total=len(mine), desc=self.name) as self.bar,
        ):
            for start in range(0, most, size):
                yield mine[start : start + size]

    def write(self, record: dict) -> None:
        """Keeps one result. Flushed at once, so a kill loses only what is under way."""
        if not np.isfinite(record.get("reward", 0.0)):
            raise InputError(f"{record['video']}: reward {record['reward']}; the checkpoint is broken.")
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()
        self.new.append(record)
        self.bar.update(1)

    def refuse(self, item: Item, error: InputError) -> None:
        """A bad item: left out and listed with --skip-bad-videos, else the end, with its line named."""
        if not self.skip:
            raise InputError(f"line {item.line}: {error}") from error
        unsupported = isinstance(error, Unsupported)
        self.skipped.append({**item._asdict(), "error": str(error), "unsupported": unsupported})
        self.bar.update(1)

    def finish(self) -> tuple[dict, list[dict]]:
        """COLLECTIVE: all ranks' {(video, prompt): record}, those of other runs included, and what was skipped."""
        new = self.ranks.gather_objects(self.new)
        self.done.update({(record["video"], record["prompt"]): record for record in new})
        return self.done, self.ranks.gather_objects(self.skipped)


def write_skipped(out: str, skipped: list[dict], ranks) -> None:
    """OUT/skipped.jsonl: what this run left out."""
    if ranks.is_main:
        write_jsonl(os.path.join(out, "skipped.jsonl"), skipped)
        if count := sum(record["unsupported"] for record in skipped):
            print(f"{count} of {len(skipped)} skipped videos are unsupported by the reader, not broken")


def identity(model: str) -> str:
    """What tells a model from another.

    A hub name: the name and the commit that it resolves to here. A folder, wherever it lies: a hash of its files'
    names, sizes and both ends (all of an 8B would take a minute).
    """
    if not os.path.isdir(model):
        from transformers.utils import cached_file

        try:  # .../snapshots/COMMIT/config.json; from the cache where there is no network
            return f"{model} at {os.path.basename(os.path.dirname(cached_file(model, 'config.json')))}"
        except (OSError, ValueError) as error:
            raise InputError(f"{model}: is no folder, nor a model on the hub ({first_line(error)}).") from error
    digest = hashlib.sha256()
    patterns = ("*.safetensors", "*/*.safetensors", "*config.json", "descore.json", "tokenizer.json", "*.jinja")
    for pattern in patterns:
        for file_path in sorted(glob.glob(os.path.join(glob.escape(model), pattern))):
            with open(file_path, "rb") as file:
                size = os.path.getsize(file_path)
                digest.update(f"{os.path.basename(file_path)} {size}".encode() + file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read())
    return digest.hexdigest()


def claim_out(out: str, s, ranks) -> None:
    """COLLECTIVE: refuses a folder that holds results of another model or other settings; they must not be mixed."""
    names = ("think", "thoughts", "max_new_tokens", "temperature", "engine", "fps", "reader", "max_pixels", "dtype",
             "seed")
    now, path = {"model": identity(s.model)} | {n: getattr(s, n) for n in names}, os.path.join(out, "settings.json")
    if ranks.is_main:
        if read_log(out, "thoughts") or read_log(out, "rewards"):
            before = {}
            with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
                before = json.load(file)
            changed = [name for name in now if before.get(name, "unknown") != now[name]]
            if changed:
                raise InputError(f"{out}: holds results made with another {', '.join(changed)}; give another --out.")
        write_json(path, now)
    ranks.barrier()


def readable_pairs(pairs: list, settings, ranks, sample_frames) -> list:
    """COLLECTIVE: the pairs whose videos exist; with --skip-bad-videos, whose videos decode (each is tried once).

    Skipped ones are counted and listed in OUT/skipped.jsonl. Without the flag a missing file is an InputError now, a
    broken one when its turn comes.
    """
    paths = sorted({path for pair in pairs for path in pair.videos})
    bad = {path: ("no such file", False) for path in paths if not os.path.isfile(path)}
    if not settings.skip_bad_videos:
        for pair in pairs:
            if path := next((path for path in pair.videos if path in bad), None):
                raise InputError(f"line {pair.line}: {path}: no such video; fix the path, or use --skip-bad-videos.")
        return pairs
    found = []
    for path in ranks.progress(ranks.share([path for path in paths if path not in bad]), desc="checking videos"):
        try:
            sample_frames(path, settings.fps, settings.max_pixels)
        except InputError as error:
            found.append((path, (str(error), isinstance(error, Unsupported))))
    bad.update(ranks.gather_objects(found))
    kept = [pair for pair in pairs if not bad.keys() & set(pair.videos)]
    if ranks.is_main and bad:
        records = [{"video": path, "reason": why, "unsupported": kind} for path, (why, kind) in sorted(bad.items())]
        write_jsonl(os.path.join(settings.out, "skipped.jsonl"), records, add=True)
        print(f"skipped {len(pairs) - len(kept)} pairs with {len(bad)} bad videos ({sum(k for _, k in bad.values())} "
              f"unsupported, not broken); see {settings.out}/skipped.jsonl")
    if not kept:
        raise InputError("no pair is left with two readable videos.")
    return kept


def fitting_pairs(pairs: list, processor, settings, ranks, sequence_lengths) -> list:
    """COLLECTIVE: the pairs whose sequences fit into --max-length, so that training need not stop half-way.

    An InputError that names the first line that does not; with --skip-bad-videos such pairs are left out and listed.
    """
    long = []
    for pair in ranks.progress(ranks.share(pairs), desc="checking lengths"):
        try:
            length = max(sequence_lengths(processor, pair, settings.fps, settings.max_pixels))
        except InputError as error:
            raise InputError(f"line {pair.line}: {str(error).removeprefix(f'line {pair.line}: ')}") from error
        if length > settings.max_length:
            long.append((pair.line, length))
    long = dict(sorted(ranks.gather_objects(long)))
    if long and not settings.skip_bad_videos:
        line, length = next(iter(long.items()))
        raise InputError(
            f"line {line}: {length} tokens of video, prompt and CoT exceed --max-length {settings.max_length} "
            f"({len(long)} of {len(pairs)} lines do); raise it, lower --fps, or leave them out with --skip-bad-videos."
        )
    kept = [pair for pair in pairs if pair.line not in long]
    if ranks.is_main and long:
        records = [{"line": line, "reason": f"{length} tokens"} for line, length in long.items()]
        write_jsonl(os.path.join(settings.out, "skipped.jsonl"), records, add=True)
        print(f"skipped {len(long)} pairs over --max-length; see {settings.out}/skipped.jsonl")
    if not kept:
        raise InputError(f"no pair fits into --max-length {settings.max_length}.")
    return kept
