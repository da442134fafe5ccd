"""The proof of the grader: each submission below is made, graded as a student's would be, and must come out as told.

    blank           0 points
    the reference   all points, and so does each function written otherwise
    each mistake    fails in the lesson that names it, and in no lesson before

A mistake that survives is a finding: the lesson is too weak. Whoever changes exercise 4 asks:

    python -m lab.course.test_proof 4
"""

import subprocess
import sys

import pytest

from lab.course import __main__ as course
from lab.course import copies, mistakes
from lab.course.exercises import EXERCISES

PAPER, OWN = 0, 7  # variants that are proved
DEFAULTS = {2: "default_k", 4: "epsilon_in_the_denominator", 6: "default_clips", 7: "default_rules"}


def submissions(exercises):
    """(exercise, what it is, its files, the lesson that must fail first or None, variant)."""
    for exercise in exercises:
        first, own = exercise.lessons[0].__name__, {file: mistakes.source(file) for file in exercise.files}
        yield exercise, "blank", {f: copies.without_bodies(f, text) for f, text in own.items()}, first, PAPER
        if exercise.number == 10:
            yield from weak_and_strong_tests(exercise)
            continue
        yield exercise, "the reference", own, None, PAPER
        bodies = {p: mistakes.REWRITES[p] for p in exercise.places if p in mistakes.REWRITES}
        rewritten = {f: mistakes.with_bodies(f, {p: b for p, b in bodies.items() if p.startswith(f)}) for f in own}
        yield exercise, "written otherwise", rewritten, None, PAPER
        for m in mistakes.MISTAKES:
            if m.place in exercise.places:
                yield exercise, m.what, own | {m.file: mistakes.with_changes(m.place, m.changes)}, m.lesson, PAPER
        if exercise.number in DEFAULTS:
            variant = {f: copies.without_bodies(f, text, OWN, blank=False) for f, text in own.items()}
            yield exercise, "a variant's own", variant, None, OWN
            yield exercise, "the public file in a variant", own, DEFAULTS[exercise.number], OWN


def weak_and_strong_tests(exercise):
    """Exercise 10: two tests, and those two with one weakness."""
    solved = {f"my_tests.py::{name}": body for name, body in mistakes.TWO_TESTS.items()}
    yield exercise, "two tests", {"my_tests.py": mistakes.with_bodies("my_tests.py", solved)}, None, PAPER
    for lesson, change in WEAKENED.items():
        place, (old, new) = change
        assert old in solved[place], lesson
        bodies = solved | {place: solved[place].replace(old, new)}
        text = mistakes.with_bodies("my_tests.py", bodies)
        yield exercise, f"a test without {lesson}", {"my_tests.py": text}, lesson, PAPER


ADVANTAGES, TIES = "my_tests.py::test_group_advantages", "my_tests.py::test_accuracy_with_ties"
WEAKENED = {
    "right_code_is_accepted": (ADVANTAGES, ("[[-0.7071, 0.7071]]", "[[-1.0, 1.0]]")),
    "another_way_to_write_it": (ADVANTAGES, (
        "assert not", "assert group_advantages(torch.tensor([[0.5, 0.9, 0.5]]))[0, 1] == 1.1546956300735474\n"
        "        assert not")),
    "catches_population_std": (ADVANTAGES, ("atol=0.01", "atol=0.5")),
    "catches_whole_batch": (ADVANTAGES, ("[[0.0, 1.0], [0.0, 100.0]]", "[[0.0, 1.0]]")),
    "catches_nan_at_one": (ADVANTAGES, (".tolist() == [[0.0]]", ".shape == (1, 1)")),
    "catches_flat_group": (ADVANTAGES, ("[0.86] * 8", "[0.5] * 8")),
    "catches_cut_inside_a_run": (TIES, ("accuracy_with_ties([0, 1, 1], [1, 1, 1])[0] < 0.67", "True")),
    "catches_nothing_tied_missing": (TIES, ("== (1.0, -1.0)", "!= ()")),
}


def prove(exercises) -> int:
    """Prints a line for each submission; 0 if all came out as told, else 1."""
    course.load_what_is_slow(exercises)
    wrong = count = 0
    for exercise, what, files, lesson, variant in submissions(exercises):
        base = copies.student_files(variant, copies.RUN)
        result = course.grade_one(exercise, {name: text.encode() for name, text in files.items()}, base, variant)
        points = {"blank": 0}.get(what, result.points) if lesson else exercise.points
        as_told = result.failed == lesson and result.points == points
        count, wrong = count + 1, wrong + (not as_told)
        print(f"{'ok   ' if as_told else 'WRONG'} {exercise.number:2d} {what}: {result.failed or 'passes'}", flush=True)
        if not as_told:
            print(f"      must be: {lesson or 'passes'}; {result.message}")
    print(f"{count} submissions, {wrong} not as they must be")
    return int(wrong > 0)


@pytest.mark.parametrize("number", [str(e.number) for e in EXERCISES])
def test_blank_fails_the_reference_passes_and_each_mistake_is_named(number):
    done = in_a_process("-m", "lab.course.test_proof", number)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_the_proof_and_that_it_finds_a_weak_lesson():
    """With a lesson taken out, its mistake survives."""
    done = in_a_process("-c", """if True:
        import dataclasses
        from lab.course import test_proof
        row = test_proof.EXERCISES[3]
        without = tuple(lesson for lesson in row.lessons if lesson.__name__ != "a_group_of_one")
        assert test_proof.prove([row]) == 0
        assert test_proof.prove([dataclasses.replace(row, lessons=without)]) == 1
    """)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "10 submissions, 0 not as they must be" in done.stdout, done.stdout
    assert "WRONG  4 nan at G = 1: passes\n      must be: a_group_of_one" in done.stdout, done.stdout


def in_a_process(*command):
    """Grading forks, and autograd, which this process has used, does not survive a fork."""
    return subprocess.run([sys.executable, *command], cwd=copies.ROOT, capture_output=True, text=True, timeout=200)


def test_the_page_holds_the_mistakes():
    """The page's table: exercise, mistake, and what the student reads."""
    page = (copies.ROOT / "lab/course/README.md").read_text(encoding="utf-8")
    for exercise in EXERCISES:
        told = {lesson.__name__: course.taught(lesson) for lesson in exercise.lessons}
        for m in mistakes.MISTAKES:
            row = f"| {exercise.number} | {m.what} | {told.get(m.lesson)} |"
            assert m.place not in exercise.places or row in page, f"put this row into the page: {row}"


if __name__ == "__main__":
    sys.exit(prove(course.chosen(sys.argv[1])))
