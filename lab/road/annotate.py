"""Verdicts on the five dimensions, per video, from any OpenAI-compatible endpoint: stage 2's truth.

    vllm serve Qwen/Qwen3-VL-32B-Instruct --media-io-kwargs '{"video": {"fps": 2}}'
    python -m lab.road.annotate --data pairs.csv --out train_rl.csv --model Qwen/Qwen3-VL-32B-Instruct --limit 20

Each reply is appended to OUT.jsonl at once, and a second run asks only for what is missing. A failure (an error, a
reply that was cut off, anything but five known verdicts) is kept as a failure, asked again in the next run, and never
becomes a verdict. OUT has the pairs whose two videos have verdicts. The paper asked Gemini-2.5-Pro. Needs
requirements-road.txt; the key is read from OPENAI_API_KEY.

With --send video the server samples the frames: vLLM 0.32 takes 2 a second for Qwen3-VL, older ones 32 of any video.
So the prompt tokens that a run prints must grow with a video's length. vLLM lets no request ask for another rate.
"""

import collections
import concurrent.futures
import dataclasses
import json
import os

import numpy as np

import data
from lab.road.annotator import Question, ask, make_question, open_client
from lab.road.datasets import LABELS, Pair, write_pairs
from metrics import bootstrap_interval
from plumbing.jobs import open_log
from plumbing.settings import InputError, arg, cli, parse, require, writable


@dataclasses.dataclass
class Settings:
    """Asking an annotator."""

    data: str = arg(None, "preference pairs, a CSV in any known format: their videos are annotated")
    out: str = arg(None, "CSV to write, in stage 2's columns; OUT.jsonl keeps every reply")
    model: str = arg(None, "name of the model at the endpoint; an Instruct one: Thinking models do not keep to JSON")
    base_url: str = arg("http://localhost:8000/v1", "the endpoint")
    send: str = arg("video", "video: the file itself (vLLM); frames: pictures with their times (most endpoints)",
                    choices=["video", "frames"])
    fps: float = arg(2.0, "frames per second of --send frames", above=0)
    max_pixels: int = arg(448 * 448, "pixels per frame at most of --send frames", at_least=1024)
    dimension: str = arg("TA", "label column where the CSV has several: TA, VQ, MQ or Overall")
    limit: int = arg(0, "videos that this run asks for at most; 0: all", at_least=0)
    max_tokens_total: int = arg(
        0, "ask no more once OUT.jsonl has used this many tokens, prompts and answers; 0: no budget. Requests that are "
        "under way then, at most --workers, still come in", at_least=0)
    max_answer_tokens: int = arg(256, "tokens of an answer at most: JSON can loop on blanks", at_least=1)
    workers: int = arg(16, "requests at a time", at_least=1)
    timeout: float = arg(120.0, "seconds for one request", above=0)
    retries: int = arg(4, "further tries after 429, 5xx or a timeout; Retry-After is kept", at_least=0)
    max_errors: int = arg(8, "stop after this many failures in a row", at_least=1)
    agreement: str | None = arg(None, "CSV with human verdicts on videos of --data, to compare with")


def read_replies(path: str) -> list[dict]:
    """The records of OUT.jsonl; a last line cut short by a kill is left out.

    InputError: a damaged line before the last.
    """
    records = []
    if os.path.isfile(path):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.endswith(b"\n"):
                        records.append(json.loads(line))
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: is damaged; delete the line and run again.") from error
    return records


def tokens(record: dict) -> int:
    """Tokens that were paid for."""
    return sum(record.get("usage", {}).values())


def ask_all(questions: list[Question], records: list[dict], s: Settings) -> str:
    """Asks, --workers at a time, and appends to `records` and OUT.jsonl. -> why it stopped early, or ""."""
    client, failures, stop, spent = open_client(s), 0, "", sum(map(tokens, records))
    to_do, under_way = iter(questions), {}
    folder, name = os.path.split(os.path.abspath(s.out))
    with open_log(folder, name, 0) as log, concurrent.futures.ThreadPoolExecutor(s.workers) as pool:
        try:
            while True:
                if s.max_tokens_total and spent >= s.max_tokens_total:
                    stop = stop or f"--max-tokens-total {s.max_tokens_total} is reached: {spent} tokens used"
                while not stop and len(under_way) < s.workers and (question := next(to_do, None)):
                    under_way[pool.submit(ask, client, question, s)] = question
                if not under_way:
                    return stop
                done, _ = concurrent.futures.wait(under_way, return_when="FIRST_COMPLETED")
                for future in done:
                    del under_way[future]
                    record = future.result()
                    write(record, log, records)
                    spent, failures = spent + tokens(record), failures + 1 if "error" in record else 0
                    if failures == s.max_errors:
                        stop = f"{failures} failures in a row, the last: {record['error']}"
        finally:  # Ctrl-C: what was asked is paid for, so it is waited for and kept
            for future in concurrent.futures.as_completed(under_way):
                write(future.result(), log, records)


def write(record: dict, log, records: list[dict]) -> None:
    """Keeps a reply, in the list and in OUT.jsonl, flushed at once."""
    records.append(record)
    log.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    log.flush()


def questions_of(pairs: list[data.PreferencePair], s: Settings) -> tuple[dict, list[str]]:
    """-> ({(video, prompt): Question}, videos that cannot be read). A video in many pairs is asked about once."""
    questions, unreadable = {}, set()
    for pair in pairs:
        for video in pair.videos:
            try:
                if (video, pair.prompt) not in questions:
                    questions[video, pair.prompt] = make_question(video, pair.prompt, s)
            except OSError:
                unreadable.add(video)
    return questions, sorted(unreadable)


def report(questions: dict, records: list[dict], unreadable: list[str]) -> str:
    """What was asked, what it cost, what failed and why, and about what the rest will cost."""
    keys = {question.key for question in questions.values()}
    last = {record["key"]: record for record in records if record["key"] in keys}  # a later reply replaces a failure
    good = sum("verdicts" in record for record in last.values())
    used = [record["usage"] for record in records if "usage" in record]
    prompts = [record["usage"]["prompt"] for record in last.values() if "usage" in record]
    lines = [
        f"{len(keys)} videos: {good} have verdicts, {len(last) - good} failed, {len(keys) - len(last)} not asked yet",
        f"tokens so far: {sum(u['prompt'] for u in used)} of prompts, {sum(u['answer'] for u in used)} of answers",
    ]
    if prompts:
        rest = np.mean(prompts) * (len(keys) - good)
        lines.append(f"prompt tokens of a video: {np.mean(prompts):.0f} on average, {min(prompts)} to {max(prompts)}; "
                     f"the {len(keys) - good} without verdicts will take about {rest:.0f}")
    reasons = collections.Counter(record["error"][:100] for record in last.values() if "error" in record)
    lines += [f"failed {count}: {reason}" for reason, count in reasons.most_common(5)]
    if unreadable:
        lines.append(f"cannot be read {len(unreadable)}: {', '.join(unreadable[:3])}")
    return "\n".join(lines)


def agreement(path: str, verdicts: dict[tuple[str, str], dict], s: Settings) -> str:
    """Humans' verdicts against the annotator's, per dimension. verdicts: {(absolute path, prompt): those of a video}.

    Intervals: 95 % bootstrap over prompts. Beside them what always giving the humans' commonest verdict would reach:
    most human labels are "as asked", so a high share alone says little.
    InputError: humans and annotator have no video in common.
    """
    rows, seen = collections.defaultdict(list), set()
    for pair in data.read_pairs(path, s.dimension):
        for video, human in zip(pair.videos, (pair.annotation_a, pair.annotation_b)):
            key = os.path.abspath(video), pair.prompt
            if human and key in verdicts and key not in seen:
                seen.add(key)
                for dimension, verdict in human.items():
                    rows[dimension].append((verdict, verdicts[key][dimension], pair.prompt))
    if not rows:
        raise InputError(f"--agreement {path}: has no human verdict on a video of --data that was annotated.")
    lines = ["dimension     videos   agree                  commonest verdict   agree where neither says N/A"]
    for dimension, row in rows.items():
        human, model, prompts = map(np.array, zip(*row))
        low, high = bootstrap_interval(human == model, prompts)
        both = (human != "N/A") & (model != "N/A")
        common, count = collections.Counter(human.tolist()).most_common(1)[0]
        asked = f"{np.mean(human[both] == model[both]):.3f} of {both.sum()}" if both.any() else "-"
        lines.append(f"{dimension:12s} {len(row):7d}   {np.mean(human == model):.3f} [{low:.3f}, {high:.3f}]   "
                     f"{count / len(row):.3f} ({common:>3s})         {asked}")
    return "\n".join(lines)


def check(s: Settings) -> None:
    """InputError for settings that cannot go together; before anything is asked, and paid for."""
    require(s, data="a CSV of preference pairs", out="a CSV to write", model="the name of the model at the endpoint")
    if os.path.exists(s.out) and not os.path.exists(s.out + ".jsonl"):
        raise InputError(f"--out {s.out}: exists, and is not ours ({s.out}.jsonl is missing); name another file.")
    writable([os.path.dirname(s.out)])
    if s.agreement and not os.path.isfile(s.agreement):
        raise InputError(f"--agreement {s.agreement}: no such file.")


def main(argv=None) -> None:
    """Asks for what is missing, writes the pairs that are complete, and reports."""
    s = parse(Settings, __doc__, argv)
    check(s)
    pairs = data.read_pairs(s.data, s.dimension)
    questions, unreadable = questions_of(pairs, s)
    records = read_replies(s.out + ".jsonl")
    failed, done = ({r["key"] for r in records if word in r} for word in ("error", "verdicts"))
    missing = list({q.key: q for q in questions.values() if q.key not in done}.values())
    missing.sort(key=lambda question: question.key in failed)  # else those that always fail would block the others
    stop = ask_all(missing[: s.limit or None], records, s) if missing else ""
    print(report(questions, records, unreadable))

    found = {record["key"]: record["verdicts"] for record in records if "verdicts" in record}
    verdicts = {item: found[question.key] for item, question in questions.items() if question.key in found}
    complete = []
    for pair in pairs:
        truth = [verdicts.get((video, pair.prompt)) for video in pair.videos]
        if all(truth):
            complete.append(Pair(*pair.videos, pair.prompt, LABELS[pair.label], tuple(truth)))
    if complete:
        write_pairs(complete, s.out)
    elif os.path.exists(s.out):  # of an earlier run, with other pairs or another annotator
        stop = stop or f"{s.out} is an earlier run's: now no pair has verdicts on both videos; move it away"
    print(f"{len(complete)} of {len(pairs)} pairs have verdicts on both videos")
    if s.agreement:
        print(agreement(s.agreement, {(os.path.abspath(v), p): truth for (v, p), truth in verdicts.items()}, s))
    if stop:
        raise InputError(f"stopped early: {stop}. The replies are kept in {s.out}.jsonl; run again to go on.")


if __name__ == "__main__":
    cli(main)
