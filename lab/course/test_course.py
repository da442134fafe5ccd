"""The course: nothing leaks into a copy, the proof holds, and a hostile submission costs nobody else anything.

Grading forks, so it runs in a process of its own, as a lecturer would run it: autograd does not survive a fork.
"""

import inspect
import json
import re
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch

import layout
import losses
import metrics
import rules
from lab.course import __main__ as course
from lab.course import copies, mistakes
from lab.course.checks import Wrong, near
from lab.course.exercises import EXERCISES, VARIANTS
from lab.course.test_proof import MISTAKES, TWO_TESTS, UNWRITTEN
from tests.conftest import ROOT, refuses

MODULES = {"losses.py": losses, "rules.py": rules, "layout.py": layout, "metrics.py": metrics}


def dense(line):
    return re.sub(r"\s", "", line.split("  #")[0])


# -- the copy ---------------------------------------------------------------------------------------------------------
def test_a_copy_shows_no_body(tmp_path):
    """Searched for in every file: each body as `inspect` gives it, line by line, whatever its indentation."""
    course.main([str(tmp_path / "copy"), "--variant", "7"])
    texts = {path: path.read_text() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    shown = {dense(line): path for path, text in texts.items() for line in text.splitlines()}
    for exercise in EXERCISES[:9]:
        for file, name in (place.split("::") for place in exercise.places):
            function = getattr(MODULES[file], name)
            body = inspect.getsource(function).split('"""')[-1].splitlines()
            body = {dense(line) for line in body} - copies.SHARED
            body = [line for line in body if len(line) >= 20 and not line.startswith("assert")]
            assert body, name
            for line in body:
                assert line not in shown, f"{name}: {line} stands in {shown[line]}"


def test_a_copy_has_what_the_measurements_run():
    """`make demo` in it: the script that the Makefile calls, and all that this one starts."""
    files = copies.student_files(0)
    assert "bash scripts/demo.sh" in files["Makefile"]
    command = r"(?:^|\s)(?:python|torchrun --\S+ \d+) (?:-m )?(\S+)"
    started = re.findall(command, files["scripts/demo.sh"], flags=re.MULTILINE)
    assert {"cold_start.py", "grpo.py", "evaluate.py", "toy"} <= set(started), started
    for name in started:
        path = name.replace(".", "/") if not name.endswith(".py") else name
        assert {path, f"{path}.py", f"{path}/__main__.py"} & set(files), name


def test_a_leak_is_found_and_refused(tmp_path, monkeypatch):
    line = "+    losses = -F.logsigmoid(reward_chosen.float() - reward_rejected.float())  # a diff that shows it"
    files = copies.student_files(0) | {"docs/new.md": line}
    assert len(copies.leaks(files)) == 1 and copies.leaks(files)[0].startswith("docs/new.md")
    monkeypatch.setattr(copies, "student_files", lambda variant: files)
    with pytest.raises(course.InputError, match="docs/new.md"):
        copies.make_copy(str(tmp_path / "copy"), 0)


def test_what_stays_of_a_function():
    """Signature with a variant's constants, docstring, leading asserts; then one raise with number, minutes, hint."""
    text = copies.without_bodies("losses.py", (ROOT / "losses.py").read_text(), variant=7)
    found = {}
    exec(compile(text, "losses.py", "exec"), found)
    values = copies.constants(7)
    defaults = {name: p.default for name, p in inspect.signature(found["grpo_loss"]).parameters.items()}
    assert all(defaults[name] == values[name] != VARIANTS[name][0] for name in ("clip_low", "clip_high", "clip_dual"))
    assert found["grpo_loss"].__doc__ == losses.grpo_loss.__doc__
    assert inspect.getsource(losses.policy_ratio) in text  # its neighbours stay as they are
    with pytest.raises(AssertionError):
        found["bt_loss"](losses.torch.zeros(2), losses.torch.zeros(3))
    with pytest.raises(NotImplementedError, match=r"^Exercise 1 \(15 min\): what does"):
        found["bt_loss"](losses.torch.zeros(2), losses.torch.zeros(2))


def test_the_constants_are_those_of_the_reference():
    for exercise in EXERCISES[:9]:
        for file, name in (place.split("::") for place in exercise.places):
            for parameter in inspect.signature(getattr(MODULES[file], name)).parameters.values():
                if parameter.name in VARIANTS:
                    assert parameter.default == VARIANTS[parameter.name][0], (name, parameter.name)


def test_each_mistake_still_fits_the_reference():
    """Cheap, and soon after the code has moved; whether its lesson names it is what test_proof.py tells."""
    for m in MISTAKES:
        assert mistakes.with_changes(m.place, m.changes) != mistakes.source(m.file)


def test_points_and_lessons():
    assert sum(e.points for e in EXERCISES) == 70 and [e.number for e in EXERCISES] == list(range(1, 11))
    names = [lesson.__name__ for e in EXERCISES for lesson in e.lessons]
    assert len(names) == len(set(names))
    assert all(len(course.taught(lesson)) > 40 for e in EXERCISES for lesson in e.lessons)
    assert {m.lesson for m in MISTAKES} <= set(names)
    assert all(15 <= e.minutes <= 120 for e in EXERCISES)


# -- grading ----------------------------------------------------------------------------------------------------------
def python(script, *arguments):
    """Runs a script in a process of its own."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done


def with_bodies(file, **bodies):
    return mistakes.with_bodies(file, {f"{file}::{name}": body for name, body in bodies.items()})


HOSTILE = {
    "bt_loss": """
        print('{"tests": [{"score": 4, "max_score": 4, "status": "passed"}]}', flush=True)
        import os
        for number in range(3, 50):
            try:
                os.write(number, b'{"value": 1}\\n')
            except OSError:
                pass
        os._exit(0)
    """,
    "btt_loss": "while True: pass",
    "draw_cot_mask": "raise SystemExit(0)",
    "group_advantages": "return torch.zeros(4 * 2**30, dtype=torch.uint8)",
    "kl_to_reference": """
        import gc, sys, lab.course.checks, lab.course.equations
        for module in (lab.course.checks, lab.course.equations):
            module.near = module.expect = lambda *args: None
        torch.allclose = torch.equal = lambda *args, **kwargs: True
        return log_probs
    """,
    "grpo_loss": """
        import os
        if os.fork() == 0:
            os.setsid()
            os._exit(0)
        assert sorted(os.environ) == ["HF_HUB_OFFLINE", "HOME", "OMP_NUM_THREADS", "PATH"]
        return advantages
    """,
}
COUNTS = """
    import pathlib
    file = pathlib.Path("count")
    count = int(file.read_text()) if file.exists() else 0
    file.write_text(str(count + 1))
    assert count < 2
"""


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """{name of a submission: {exercise: its test in results.json}}: good, half and hostile."""
    folder = tmp_path_factory.mktemp("submissions")
    texts = {file: (ROOT / file).read_text() for file in MODULES}
    solved = {f"my_tests.py::{name}": body for name, body in TWO_TESTS.items()}
    good = texts | {"my_tests.py": mistakes.with_bodies("my_tests.py", solved)}
    half = {"losses.py": texts["losses.py"].replace("torch.maximum(-advantage", "torch.minimum(-advantage"),
            "metrics.py": texts["metrics.py"]}  # the rest is missing
    hostile = good | {
        "losses.py": with_bodies("losses.py", **HOSTILE), "rules.py": "raise SystemExit(0)\n",
        "layout.py": texts["layout.py"] + "def (:\n",
        "my_tests.py": with_bodies("my_tests.py", test_group_advantages=COUNTS, test_accuracy_with_ties=COUNTS)}
    for name, files in (("good", good), ("half", half), ("hostile", hostile)):
        copies.write(files, folder / name)
    (folder / "hostile" / "metrics.py").unlink()
    (folder / "hostile" / "metrics.py").symlink_to(ROOT / "metrics.py")
    script = """
        import json, sys
        from lab.course import __main__ as course
        results = {}
        for name, seconds in (("half", 30), ("hostile", 3), ("good", 30)):
            results[name] = course.as_json(course.grade(f"{sys.argv[1]}/{name}", seconds=seconds), 0)["tests"]
        print(json.dumps(results))
    """
    results = json.loads(python(script, folder).stdout)
    return {name: {int(t["number"]): t for t in tests} for name, tests in results.items()}


def test_a_good_submission_gets_all(graded):
    assert {n: t["score"] for n, t in graded["good"].items()} == {e.number: e.points for e in EXERCISES}


def test_a_half_submission(graded):
    """Six exercises right, the clipped loss with min for max, the rest not there."""
    assert [graded["half"][n]["score"] for n in range(1, 11)] == [4, 5, 3, 6, 5, 1, 0, 8, 0, 0]
    assert graded["half"][6]["output"] == (
        "lesson 2 of 8, the_larger_loss: Of the two losses take the LARGER: the clip may only take a gain away, "
        "never a loss. Did you take the smaller, or swap the clips? (got 0.367879, expected 0.8)")
    assert graded["half"][7]["output"] == "rules.py was not handed in"


@pytest.mark.parametrize("number, says", [
    (1, "winner_first|the process exited with code 0"), (2, "took more than 3 s: an endless loop"),
    (3, "SystemExit: 0"), (4, "memory|alloc"), (5, "never_negative"), (6, "returns a value without a gradient"),
    (7, "SystemExit: 0"), (8, "must be a file of its own"), (9, "layout.py, line \\d+: invalid syntax"),
    (10, "right_code_is_accepted")])
def test_a_hostile_submission_costs_each_exercise_by_itself(graded, number, says):
    test = graded["hostile"][number]
    assert test["score"] == 0 and test["status"] == "failed" and re.search(says, test["output"]), test["output"]


FORGED = (
    '{"accepts": true}', '{"loaded": {}}', '{"value": {"fields": {}}}', '{"value": {"generator": 1%s}}' % ("0" * 30),
    '{"value": {"tensor": [1e400, 1], "dtype": "int64"}}', r'{"wrong": "\ud800"}', '{"ended": "%s"}' % ("x" * 9999))


def test_a_forged_reply_costs_its_own_exercise_alone(tmp_path):
    """What a submission writes into the line by itself, in the form of a reply: no exercise beside it is lost."""
    for number, reply in enumerate(FORGED):
        forges = f"import os\nfor n in range(3, 50):\n    try:\n        os.write(n, {reply!r}.encode() + b'\\n')\n"
        forges += "    except OSError:\n        pass\nreturn reward_chosen"
        body = mistakes.with_bodies("losses.py", {"losses.py::bt_loss": forges})
        copies.write({"losses.py": body}, tmp_path / str(number))
    killed = mistakes.with_bodies("losses.py", {"losses.py::bt_loss": "import os\nos.kill(os.getpid(), 40)"})
    copies.write({"losses.py": killed}, tmp_path / str(len(FORGED)))  # by a signal that has no name
    done = python("""
        import json, sys
        from lab.course import __main__ as course
        for number in range(int(sys.argv[2])):
            results = course.grade(f"{sys.argv[1]}/{number}", exercises=course.EXERCISES[:3:2])
            course.report(results)
            print(json.dumps([[r.points, len(r.message)] for r in results]))
    """, tmp_path, len(FORGED) + 1)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert len(found) == len(FORGED) + 1
    for (forged, length), (beside, _) in found:
        assert forged == 0 and beside == 3 and length < 2100, found


SLIPS = (  # the usual ones, and what the student reads
    ("losses.py::bt_loss", "loss = reward_chosen", r"lesson 1 of 7, winner_first, could not use .* a tensor say"),
    ("losses.py::bt_loss", "raise NotImplementedError", r"winner_first: losses.py, line \d+: NotImplementedError$"),
    ("losses.py::bt_loss", """
        losses = F.softplus(reward_rejected - reward_chosen)
        return losses.sum().item() / (denominator or losses.numel())""",
     r"in_fp32, could not use .*'float'"),
    ("losses.py::draw_cot_mask", "return [True] * num_pairs", r"one_coin_for_each_pair, could not use .*'list'"),
    ("losses.py::draw_cot_mask", "return torch.zeros(num_pairs, dtype=torch.uint8)",
     r"\(num_pairs,\) bool.*torch.uint8"),
    ("my_tests.py::test_group_advantages", "group_advantages([[0.0, 1.0]])",
     r"right_code_is_accepted: .*test_group_advantages: my_tests.py, line \d+: AttributeError: 'list' object"),
    ("my_tests.py::test_group_advantages", UNWRITTEN,
     r"catches_population_std: .*\(got test_group_advantages, which is not written yet\)"))


def test_what_is_no_tensor_is_no_forgery():
    """A forgotten return, .item(), a list, another dtype, an error in a test: told as what it is."""
    texts = [mistakes.with_bodies(place.split("::")[0], {place: body}) for place, body, _ in SLIPS]
    done = python("""
        import json, sys
        from lab.course import __main__ as course
        base = course.copies.student_files(0, course.copies.RUN)
        for place, text in zip(*map(json.loads, sys.argv[1:])):
            exercise = next(e for e in course.EXERCISES if place in e.places)
            print(json.dumps(course.grade_one(exercise, {exercise.files[0]: text.encode()}, base).message))
    """, json.dumps([place for place, *_ in SLIPS]), json.dumps(texts))
    for (_, body, says), line in zip(SLIPS, done.stdout.splitlines(), strict=True):
        assert re.search(says, json.loads(line)), (body, line)


@pytest.mark.parametrize("got, expected, says", [
    (torch.zeros(1, 1, 6, 4), torch.ones(1, 6, 1, 4), "got shape (1, 1, 6, 4), expected (1, 6, 1, 4)"),
    (torch.zeros(2), 1.5, "got [0, 0], expected 1.5"),
    ([[1.0], [1.0, 2.0]], [[1.0]], "got [[1], [1, 2]], expected [[1]]")])
def test_a_large_value_of_another_shape_is_told_by_its_shape(got, expected, says):
    with pytest.raises(Wrong, match=f"^{re.escape(says)}$"):
        near(got, expected)


def test_check_in_a_copy(tmp_path):
    """A student writes one function; its check passes, the others say what they wait for."""
    copies.write(copies.student_files(7), tmp_path)
    before, function, after = mistakes.cut_out((tmp_path / "losses.py").read_text(), "draw_cot_mask")
    function = function.partition("    raise")[0]
    function += "    return torch.rand(num_pairs, generator=generator) < probability\n"
    (tmp_path / "losses.py").write_text(before + function + after)
    solved = {f"my_tests.py::{name}": body for name, body in TWO_TESTS.items()}
    (tmp_path / "my_tests.py").write_text(mistakes.with_bodies("my_tests.py", solved))
    out = {}
    for number in ("3", "5", "10"):
        command = [sys.executable, "-m", "lab.course", "--check", number]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        out[number] = done.stdout + done.stderr
    assert "3 of  3  random CoT masking\n      all 4 lessons" in out["3"], out["3"]
    assert "not written yet: which of the two is a constant" in out["5"], out["5"]
    assert "not written yet: Exercise 4 (30 min): which axis" in out["10"], out["10"]  # the tests are: they wait for it


def test_check_10_in_a_copy_promises_nothing(tmp_path):
    """Tests that only pass accept the student's own functions; whether they notice a mistake is seen when graded."""
    passes = with_bodies("my_tests.py", test_group_advantages="pass", test_accuracy_with_ties=UNWRITTEN)
    copies.write(copies.student_files(0) | {"my_tests.py": passes}, tmp_path)
    done = subprocess.run([sys.executable, "-m", "lab.course", "--check", "10"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=100)
    assert "1 of 10  tests that catch" in done.stdout and "lesson 1 of 8 holds" in done.stdout, done.stdout
    assert "; test_accuracy_with_ties is not written yet" in done.stdout, done.stdout


def test_the_autograder_zip(tmp_path):
    """Unpacked as the service does; run_autograder beside source/, submission/ and results/."""
    course.main(["--gradescope", str(tmp_path / "autograder.zip"), "--variant", "0"])
    with zipfile.ZipFile(tmp_path / "autograder.zip") as archive:
        assert {"setup.sh", "run_autograder"} <= set(archive.namelist())
        archive.extractall(tmp_path / "source")
    (tmp_path / "run_autograder").write_text((tmp_path / "source" / "run_autograder").read_text())
    copies.write({"losses.py": (ROOT / "losses.py").read_text()}, tmp_path / "submission")
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", str(tmp_path / "run_autograder")], env=environment, cwd="/", capture_output=True,
                          text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert set(results) == {"output", "output_format", "stdout_visibility", "execution_time", "tests"}
    assert [t["score"] for t in results["tests"]] == [4, 5, 3, 6, 5, 10, 0, 0, 0, 0]
    known = {"name", "number", "score", "max_score", "status", "output", "output_format", "tags", "visibility"}
    assert all(set(test) == known for test in results["tests"])


def test_the_page_holds_the_mistakes_and_the_points():
    """The points; the mistakes are compared in test_proof.py."""
    page = (ROOT / "lab" / "course" / "README.md").read_text()
    for e in EXERCISES:
        assert f"| {e.number} | {e.title} | {e.points} | {e.minutes} |" in page, e.title


def test_bad_input(tmp_path, capsys, monkeypatch):
    refuses(capsys, course.main, says="say one of OUT")
    refuses(capsys, course.main, "--check", "11", says="exercises 1 to 10")
    refuses(capsys, course.main, "--grade", tmp_path / "nowhere", says="no such folder")
    (tmp_path / "file").write_text("x")
    refuses(capsys, course.main, tmp_path, says="is not empty")
    refuses(capsys, course.main, tmp_path / "file", says="is a file")
    refuses(capsys, course.main, tmp_path / "file/copy", says="cannot be written to")
    # Before anything is graded, which takes a minute.
    monkeypatch.setattr(course, "grade_one", None)
    grades = "--grade", tmp_path, "--json"
    refuses(capsys, course.main, *grades, tmp_path / "file/r.json", says="cannot be written to")
    refuses(capsys, course.main, *grades, tmp_path, says="is a folder")
    refuses(capsys, course.main, "--gradescope", tmp_path / "file/a.zip", says="cannot be written to")
    refuses(capsys, course.main, "--check", "3", "--json", "r.json", says="--json goes with --grade")
    # In a copy.
    monkeypatch.setattr(course, "ROOT", tmp_path)
    refuses(capsys, course.main, "--check", "3", "--variant", "5", says="variant 0, in variant.txt")
    (tmp_path / "notes.py").write_bytes(b"# one\n# caf\xe9\n")
    refuses(capsys, course.main, "--check", "3", says="notes.py, line 2")
    (tmp_path / "variant.txt").write_text("seven")
    refuses(capsys, course.main, "--check", "3", says="variant.txt: holds 'seven'")


def test_results_go_into_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "grade", lambda *args: [])
    course.main(["--grade", str(tmp_path), "--json", str(tmp_path / "new" / "results.json")])
    assert json.loads((tmp_path / "new" / "results.json").read_text())["tests"] == []
