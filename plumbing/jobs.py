"""Working through many videos, resumable: one line per finished item, appended at once, shared out over the ranks."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import math
import os
import time
import typing

import numpy as np

from plumbing.hub import local_folder
from plumbing.settings import InputError, flag_of, write_json, write_jsonl
from plumbing.video import Unsupported


def task_seed(*parts) -> int:
    """A seed from anything that names a sample, e.g. (seed, video, prompt, k); the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


class Item(typing.NamedTuple):
    """A video, its prompt, and the CSV line that asks for it first."""

    video: str
    prompt: str
    line: int

    @property
    def key(self) -> tuple[str, str]:
        """What all that is kept of it is found by."""
        return self.video, self.prompt


def items_of(pairs: list) -> list[Item]:
    """Each (video, prompt) of the pairs once, however many pairs it is in."""
    items = {}
    for pair in pairs:
        for video in pair.videos:
            items.setdefault((video, pair.prompt), Item(video, pair.prompt, pair.line))
    return list(items.values())


def content_of(path: str) -> str | None:
    """A hash of all that a file holds: another clip under an old name is another clip. None: it cannot be read."""
    try:
        info = os.stat(path)
        return _hash_of(path, info.st_size, info.st_mtime_ns)
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return None


@functools.lru_cache(maxsize=None)  # both phases ask; a file that was written again in between is read again
def _hash_of(path: str, size: int, time_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def read_log(out: str, name: str) -> dict[tuple[str, str], dict]:
    """All ranks' lines of a phase, {(video, prompt): record}. A last line cut short by a kill is left out.

    Where a clip was replaced, there may be several records of one name: the one of the clip that is there now is given;
    where none is there any more, the last that was written.
    InputError: a damaged line before the last; two clips of a name that is gone, in files of two ranks.
    """
    records, written_in = {}, {}
    for path in sorted(glob.glob(os.path.join(glob.escape(out), f"{name}*.jsonl"))):
        with open(path, "rb") as file:
            for count, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    try:
                        record = json.loads(line)
                        key = record["video"], record["prompt"]
                    except (ValueError, KeyError, TypeError) as error:
                        raise InputError(f"{path}, line {count}: is damaged; delete it and run again.") from error
                    now = content_of(record["video"]) if key in records else None
                    if key in records and now is None and path != written_in[key]:  # the order of files is not of time
                        if records[key].get("content") != record.get("content"):
                            raise InputError(f"{path}, line {count}: {record['video']} is gone, and which of two clips "
                                             "of that name was the last is not known; put it back and run again.")
                    if now in (None, record.get("content")):
                        records[key], written_in[key] = record, path
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
                phase.write(item, fields) or phase.refuse(item, error), for each item of the batch
        records, skipped = phase.finish()                        COLLECTIVE

    to_do: the items that have no result yet, THE SAME LIST ON EVERY RANK. What all ranks must open together, as they
    must a vLLM engine, has to be decided by it and not by a rank's own share, which may be empty.
    A result belongs to what its video holds and to `made_from` ({item.key: what else it was made from}): if either is
    another one now, the item is to be done anew. (A video that is no longer there contradicts nothing: a finished run
    can be read without it.)
    """

    def __init__(self, name: str, items: list[Item], out: str, skip: bool, ranks, made_from: dict | None = None):
        self.name, self.out, self.skip, self.ranks, self.made_from = name, out, skip, ranks, made_from or {}
        self.skipped, self.new = [], []
        mine = ranks.share(sorted({item.video for item in items}))
        self.content = dict(ranks.gather_objects([(video, content_of(video)) for video in mine]))
        self.done = {key: record for key, record in read_log(out, name).items() if self.is_current(record)}
        ranks.barrier()  # all must have read before one appends, or the ranks would share out different lists
        self.to_do = [item for item in items if item.key not in self.done]

    def is_current(self, record: dict) -> bool:
        """Was it made from what is there now?"""
        video, rest = self.content.get(record["video"]), self.made_from.get((record["video"], record["prompt"]))
        return video in (None, record.get("content")) and rest in (None, record.get("made_from"))

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

    def write(self, item: Item, fields: dict) -> None:
        """Keeps one result. Flushed at once, so a kill loses only what is under way.

        InputError: a reward that is not finite.
        """
        if not np.isfinite(fields.get("reward", 0.0)):
            raise InputError(f"{item.video}: reward {fields['reward']}; the checkpoint is broken.")
        what = {"content": self.content.get(item.video), "made_from": self.made_from.get(item.key)}
        record = {"video": item.video, "prompt": item.prompt, **fields, **what}
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()
        self.new.append(record)
        self.bar.update(1)

    def refuse(self, item: Item, error: InputError) -> None:
        """A bad item: left out and listed with --skip-bad-videos, else InputError, with its line named."""
        if not self.skip:
            raise InputError(f"line {item.line}: {error} (--skip-bad-videos leaves it out)") from error
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


def fingerprint(model: str) -> str:
    """What tells a model from another.

    A hub name: the name and the commit that it resolves to here. A folder, wherever it lies: a hash of all that its
    weights and configuration hold; checkpoints of one run may differ in the middle of a file alone. The files of an 8B
    are read once for it, several at a time: they will be read again, then from memory, when the model is opened.
    """
    if not os.path.isdir(model):
        return f"{model} at {os.path.basename(local_folder(model))}"  # .../snapshots/COMMIT
    patterns = ("*.safetensors", "*/*.safetensors", "*config.json", "descore.json", "tokenizer.json", "*.jinja")
    paths = [path for p in patterns for path in sorted(glob.glob(os.path.join(glob.escape(model), p)))]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # hashing works outside Python's lock
        hashes = list(pool.map(content_of, paths))
    return hashlib.sha256(repr([(os.path.relpath(p, model), h) for p, h in zip(paths, hashes)]).encode()).hexdigest()


def require_shared(out: str, ranks, seconds: int = 90) -> None:
    """COLLECTIVE: InputError on every rank if they do not all see ONE folder under this name.

    On nodes with a folder each, a checkpoint would be cut in pieces that no rank can read again, and ranks would go on
    from different places. A network's folder shows new files late, so each rank looks for so many seconds.
    """
    if ranks.world == 1:
        return
    path, (token,) = os.path.join(out, ".shared"), ranks.gather_objects([os.urandom(8).hex()] * ranks.is_main)
    if ranks.is_main:
        write_json(path, token)
    ranks.barrier()
    seen, until = False, time.monotonic() + seconds
    while not seen and time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            seen = json.load(file) == token
        time.sleep(0 if seen else 0.5)
    everywhere = all(ranks.gather_objects([seen]))
    if ranks.is_main:
        os.remove(path)
    if not everywhere:
        raise InputError(f"{out}: is not the same folder on every node; all need one that they share.")


def require_same_settings(out: str, s, names: tuple[str, ...], wording: str, ranks) -> None:
    """COLLECTIVE: InputError if the folder's results are of another model, wording or setting: they must not be mixed.

    names: the settings that decide on results. OUT/settings.json keeps all of s beside them.
    """
    if ranks.is_main:
        path, before = os.path.join(out, "settings.json"), {}
        now = {"model": fingerprint(s.model), "wording": wording} | {name: getattr(s, name) for name in names}
        if read_log(out, "thoughts") or read_log(out, "rewards"):
            with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
                before = json.load(file).get("made_with", {})
            changed = [name for name in now if before.get(name, "unknown") != now[name]]
            if changed:
                raise InputError(f"{out}: holds results made with another {', '.join(changed)}; give another --out.")
        write_json(path, {"made_with": now, "settings": dataclasses.asdict(s)})
    require_shared(out, ranks)


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
    records = [{"video": path, "reason": why, "unsupported": kind} for path, (why, kind) in sorted(bad.items())]
    unsupported = sum(record["unsupported"] for record in records)
    kept = [pair for pair in pairs if not bad.keys() & set(pair.videos)]
    what = f"{len(pairs) - len(kept)} pairs with {len(bad)} bad videos ({unsupported} unsupported, not broken)"
    return _checked(kept, records, what, "no pair is left with two readable videos.", settings, ranks)


def lengths_of(pairs: list, processor, settings, ranks, sequence_lengths) -> dict[int, int]:
    """COLLECTIVE: line -> tokens of the pair's longer sequence. InputError names the line."""
    lengths = []
    for pair in ranks.progress(ranks.share(pairs), desc="checking lengths"):
        try:
            lengths.append((pair.line, max(sequence_lengths(processor, pair, settings.fps, settings.max_pixels))))
        except InputError as error:
            raise InputError(f"line {pair.line}: {str(error).removeprefix(f'line {pair.line}: ')}") from error
    return dict(sorted(ranks.gather_objects(lengths)))


def fitting_pairs(
    pairs: list, processor, settings, ranks, sequence_lengths, setting: str = "max_length", more: int = 0
) -> tuple[list, int]:
    """COLLECTIVE: (the pairs whose sequences fit into --max-length, tokens of the longest): so training need not stop.

    An InputError that names the first line that does not; with --skip-bad-videos such pairs are left out and listed.
    setting: another limit; more: tokens that each will have besides, and that the longest is told without.
    """
    lengths = lengths_of(pairs, processor, settings, ranks, sequence_lengths)
    flag, limit = flag_of(setting), getattr(settings, setting)
    long = {line: length + more for line, length in lengths.items() if length + more > limit}
    if long and not settings.skip_bad_videos:
        line, length = next(iter(long.items()))
        raise InputError(f"line {line}: {length} tokens of video, prompt and CoT exceed {flag} {limit} ({len(long)} of "
                         f"{len(pairs)} lines do); raise it, lower --fps, or leave them out with --skip-bad-videos.")
    records = [{"line": line, "reason": f"{length} tokens"} for line, length in long.items()]
    kept = [pair for pair in pairs if pair.line not in long]
    none = f"no pair fits into {flag} {limit}."
    kept = _checked(kept, records, f"{len(long)} pairs over {flag}", none, settings, ranks)
    return kept, max(length for line, length in lengths.items() if line not in long)


def fitting_prompts(pairs: list, processor, settings, ranks, sequence_lengths) -> tuple[list, int]:
    """COLLECTIVE: `fitting_pairs` for stage 2: prompts that leave --engine-max-len room for a CoT of --max-new-tokens.

    Not with the CoTs of a CSV, which stage 2 writes anew, and without the query, which the engine never sees.
    """
    pairs = [pair.without_cots() for pair in pairs]
    more = settings.max_new_tokens - 1  # the query is counted by `sequence_lengths`
    return fitting_pairs(pairs, processor, settings, ranks, sequence_lengths, "engine_max_len", more)


def _checked(kept, records, what, none, settings, ranks):
    """Lists what was left out, and returns what was kept; InputError with the sentence `none` if that is nothing."""
    if ranks.is_main and records:
        write_jsonl(os.path.join(settings.out, "skipped.jsonl"), records, add=True)
        print(f"skipped {what}; see {settings.out}/skipped.jsonl")
    if not kept:
        raise InputError(none)
    return kept
