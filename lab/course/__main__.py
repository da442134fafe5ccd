"""The course: a student's copy with functions to write, and a grader that says what is wrong.

    python -m lab.course OUT --variant 7         a student's copy in the new folder OUT; OUT/sheet.md is the sheet
    python -m lab.course --check 3               in the copy: is exercise 3 right? Without a number: all of them
    python -m lab.course --grade SUBMISSION --json results.json --variant 7
    python -m lab.course --gradescope autograder.zip --variant 7

The instructor's page is lab/course/README.md. That the grader is right (blank fails, the reference passes, each usual
mistake is named) is what test_proof.py shows.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import tempfile
import time
import zipfile

import torch

from lab.course import copies, rules
from lab.course.checks import Ended, Raised, Wrong
from lab.course.exercises import EXERCISES, Exercise, constants
from lab.course.process import Submission
from plumbing.settings import InputError, cli, writable, write_json

try:
    from lab.course.mistakes import implementations
except ImportError:  # a student's copy, which has no mistakes
    implementations = None

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 30.0  # that one exercise of one submission may take
LARGEST = 2**20  # bytes of a file handed in


# ---------------------------------------------------------------------------------------------------------------
# Grading: one exercise, one process
# ---------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of one exercise. failed: the name of the first lesson that fails, None if all pass."""

    exercise: Exercise
    passed: int
    failed: str | None
    message: str

    def __post_init__(self):
        """A message may hold what the submission sent: cut short, and nothing that cannot be printed."""
        text = self.message[:2000].encode("utf-8", "replace").decode()
        object.__setattr__(self, "message", text)

    @property
    def points(self) -> float:
        """The share of the lessons before the first that fails, in whole halves of a point, rounded down."""
        return int(2 * self.exercise.points * self.passed / len(self.exercise.lessons)) / 2

    def line(self) -> str:
        """Number, points, title, and the message below."""
        e = self.exercise
        return f"{e.number:2d}  {self.points:4g} of {e.points:2d}  {e.title}\n      {self.message}"


def taught(lesson) -> str:
    """What a lesson says when it fails."""
    return " ".join(lesson.__doc__.split())


def load_what_is_slow(exercises) -> None:
    """Imports the big packages once, here: a process that is made from this one has them already."""
    torch.set_num_threads(1)  # a fork keeps no threads
    if any(file == "layout.py" for e in exercises for file in e.files):
        import transformers.integrations.sdpa_attention  # noqa: F401
        import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401
        import transformers.models.qwen3_vl.processing_qwen3_vl  # noqa: F401


def handed_in(folder: pathlib.Path, exercise: Exercise) -> dict[str, bytes]:
    """{path: content} of an exercise's files in a submission. Wrong where one is missing, a link, or too large."""
    found = {}
    for name in exercise.files:
        path = folder / name
        if not os.path.lexists(path):
            raise Wrong(f"{name} was not handed in")
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()) or path.stat().st_size > LARGEST:
            raise Wrong(f"{name} must be a file of its own, of at most {LARGEST // 2**10} KB")
        found[name] = path.read_bytes()
    return found


def grade_one(exercise, submitted: dict[str, bytes], base: dict[str, str], variant=0, seconds=SECONDS, quiet=True):
    """Only the submitted files over `base`, in a folder and a process of their own; then the lessons, in order.

    An error in a lesson is a message in the Result.
    """
    passed, lesson, submission = 0, None, None
    with tempfile.TemporaryDirectory(prefix="course-") as folder:
        folder = pathlib.Path(folder)
        copies.write(base, folder)
        for name, content in submitted.items():
            (folder / name).write_bytes(content)
        folder.chmod(0o755)  # for another user, see process.py
        try:
            ours = implementations and functools.partial(implementations, variant=variant)
            submission = Submission(folder, exercise.places, constants(variant), seconds, quiet, ours)
            for place, file in submission.open().items():
                if file != place.split("::")[0]:
                    raise Ended(f"{place} comes from {file}, not from the file that was handed in")
            for lesson in exercise.lessons:
                if lesson in rules.ON_OTHERS and not implementations:
                    text = (f"lesson {passed} of {len(exercise.lessons)} holds, on your own functions; the others, on "
                            "right code of ours and on mistakes, come when it is graded"
                            + "".join(f"; {test} is not written yet" for test in submission.unwritten))
                    return Result(exercise, passed, "not tried here", text)
                lesson(submission)
                passed += 1
        except Wrong as error:
            if lesson is None or isinstance(error, Ended):
                return Result(exercise, passed, "does not run", str(error))
            name, count = lesson.__name__, len(exercise.lessons)
            if str(error).startswith("Exercise "):
                own = str(error).startswith(f"Exercise {exercise.number} ")
                return Result(exercise, passed, name, f"not written yet: {exercise.hint if own else error}")
            text = str(error) if isinstance(error, Raised) else f"{taught(lesson)} ({error})"
            return Result(exercise, passed, name, f"lesson {passed + 1} of {count}, {name}: {text}")
        except Exception as error:  # a reply in right form, but no value of this kind: a forgotten return, or forged
            what = f"({type(error).__name__}: {str(error)[:200]})"
            if lesson is None:
                return Result(exercise, passed, "does not run", f"the process sent something that is no answer {what}")
            text = (f"lesson {passed + 1} of {len(exercise.lessons)}, {lesson.__name__}, could not use what the "
                    f"function returned {what}. Does it return what its docstring says, a tensor say, on every path?")
            return Result(exercise, passed, lesson.__name__, text)
        finally:
            if submission:
                submission.close()
    return Result(exercise, passed, None, f"all {passed} lessons")


def grade(folder: str, variant=0, exercises=EXERCISES, seconds=SECONDS) -> list[Result]:
    """A folder that was handed in, over a blank copy. InputError: no such folder."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; --grade takes the folder that was handed in.")
    base, results = copies.student_files(variant, copies.RUN), []
    for exercise in exercises:
        try:
            submitted = handed_in(pathlib.Path(folder), exercise)
        except Wrong as error:
            results.append(Result(exercise, 0, "not handed in", str(error)))
            continue
        load_what_is_slow([exercise])
        results.append(grade_one(exercise, submitted, base, variant, seconds))
    return results


def chosen(number: str) -> list[Exercise]:
    """"3" -> that exercise; "all". InputError: another word."""
    found = [e for e in EXERCISES if number in ("all", str(e.number))]
    if not found:
        raise InputError(f"exercise {number}: there are exercises 1 to {len(EXERCISES)}.")
    return found


def own_variant() -> int:
    """The variant of this copy. InputError: variant.txt holds no number."""
    path = ROOT / copies.VARIANT
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else "0"
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{copies.VARIANT}: holds {text[:20]!r}; write the number of sheet.md there.") from error


def own_text(path: pathlib.Path) -> str:
    """A file of this copy. InputError: the first line that is not UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path.name}, line {line}: is not UTF-8; save the file as UTF-8.") from error


def check(number: str, variant: int | None = None) -> list[Result]:
    """The exercises of this copy as they stand, prints included. InputError: another variant than the copy's."""
    own = own_variant()
    if variant not in (None, own):
        raise InputError(f"--variant {variant}: this copy has variant {own}, in {copies.VARIANT}; leave the flag out.")
    exercises = chosen(number)
    load_what_is_slow(exercises)
    paths = [path for pattern in copies.RUN for path in ROOT.glob(pattern)]
    base = {path.relative_to(ROOT).as_posix(): own_text(path) for path in paths}
    base.setdefault("my_tests.py", copies.MY_TESTS)
    return [grade_one(e, {}, base, own, quiet=False) for e in exercises]


# ---------------------------------------------------------------------------------------------------------------
# What people and services read
# ---------------------------------------------------------------------------------------------------------------
def as_json(results: list[Result], seconds: float) -> dict:
    """results.json as Gradescope reads it (its "Autograder Specifications", "Output format")."""
    points, most = sum(r.points for r in results), sum(r.exercise.points for r in results)
    tests = [
        {"name": r.exercise.title, "number": str(r.exercise.number), "score": r.points, "max_score": r.exercise.points,
         "status": "failed" if r.failed else "passed", "output": r.message, "output_format": "text",
         "tags": [r.failed] if r.failed else [], "visibility": "visible"}
        for r in results
    ]
    output = f"{points:g} of {most} points by the grader; the report is read by a person."
    return {"output": output, "output_format": "text", "stdout_visibility": "hidden",
            "execution_time": round(seconds), "tests": tests}


SETUP = """#!/usr/bin/env bash
# Runs once, as root, when the image is built. Take an image with Python 3.11 or newer.
set -e
apt-get update && apt-get install -y python3-venv
python3 -m venv /opt/course
/opt/course/bin/pip install -r "$(dirname "$0")/requirements.txt"
"""
RUN_AUTOGRADER = """#!/usr/bin/env bash
# Lies in /autograder, beside source/ (this zip), submission/ and results/.
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "$here/results"
chmod 700 "$here/source" "$here/results"
cd "$here/source"
OMP_NUM_THREADS=1 "${{PYTHON:-/opt/course/bin/python}}" -m lab.course --grade "$here/submission" \\
    --json "$here/results/results.json" --variant {variant}
"""


def write_autograder(out: str, variant: int) -> None:
    """The zip that is uploaded: setup.sh and run_autograder at its root, and the code that grades."""
    files = {"setup.sh": SETUP, "run_autograder": RUN_AUTOGRADER.format(variant=variant)}
    for pattern in (*copies.RUN, "lab/__init__.py", "lab/course/*.py", "requirements.txt"):
        files |= {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in sorted(ROOT.glob(pattern))}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o755 if name in ("setup.sh", "run_autograder") else 0o644) << 16
            archive.writestr(info, text)
    print(f"wrote {out}: {len(files)} files, variant {variant}")


def report(results: list[Result]) -> None:
    """Prints a line for each exercise, and the sum."""
    for result in results:
        print(result.line())
    print(f"\n{sum(r.points for r in results):g} of {sum(r.exercise.points for r in results)} points")


def file_to_be(flag: str, path: str | None) -> None:
    """Makes its folder, before minutes of grading. InputError where no file can stand."""
    if path and os.path.isdir(path):
        raise InputError(f"{flag} {path}: is a folder; name a file in it.")
    if path:
        writable([os.path.dirname(path)])


def main(argv=None) -> None:
    """Writes a copy, checks it, grades a submission, or builds the zip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", help="write a student's copy into this new folder")
    parser.add_argument("--variant", type=int, help="constants of this variant; 0: the paper's (default 0)")
    parser.add_argument("--check", nargs="?", const="all", metavar="N", help="check exercise N of this copy, or all")
    parser.add_argument("--grade", metavar="SUBMISSION", help="grade a folder that was handed in")
    parser.add_argument("--json", metavar="FILE", help="with --grade: the results, as Gradescope reads them")
    parser.add_argument("--gradescope", metavar="ZIP", help="write an autograder for Gradescope")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.out, args.check, args.grade, args.gradescope))) != 1:
        raise InputError("say one of OUT, --check, --grade and --gradescope; see --help.")
    if args.json and not args.grade:
        raise InputError("--json goes with --grade; leave it out.")
    for flag in ("json", "gradescope"):
        file_to_be(f"--{flag}", getattr(args, flag))
    start, variant = time.monotonic(), args.variant or 0
    if args.out:
        copies.make_copy(args.out, variant)
    elif args.check:
        report(check(args.check, args.variant))
    elif args.grade:
        results = grade(args.grade, variant)
        report(results)
        if args.json:
            write_json(args.json, as_json(results, time.monotonic() - start))
    else:
        write_autograder(args.gradescope, variant)


if __name__ == "__main__":
    cli(main)
