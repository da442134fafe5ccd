"""lab/study/compare.py: several runs, or several seeds, in one table."""

import json

import pytest

from lab.study import compare
from plumbing.settings import InputError


def test_several_runs_in_one_table(tmp_path):
    numbers = {"benchmark": "genai-bench", "data": "x.csv", "accuracy_without_ties": 0.75, "accuracy_with_ties": 0.5,
               "accuracy_without_ties_interval": [0.6, 0.9]}
    for name, value in (("a", 0.75), ("b", 0.25)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(numbers | {"accuracy_without_ties": value}))
    compare.main(["--runs", f"one={tmp_path}/a/*.json", f"two={tmp_path}/b/*.json", "--out", str(tmp_path / "out")])
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert lines[0] == "| model | genai-bench w/o ties | genai-bench w/ ties |"
    assert lines[2:] == ["| one | 0.750 | 0.500 |", "| two | 0.250 | 0.500 |"]
    assert (tmp_path / "out" / "results.png").stat().st_size > 5000
    with pytest.raises(InputError, match="no such report"):
        compare.main(["--runs", "x=/nowhere/*.json", "--out", str(tmp_path)])


def test_several_seeds_give_mean_and_standard_deviation(tmp_path):
    base = {"sampled valid format": 1.0, "always 2": 0.5, "sampled accuracy": 0.7, "greedy accuracy": 0.8}
    for seed, value in enumerate((0.75, 0.25)):
        folder = tmp_path / f"seed{seed}"
        for part in ("base", "stage1", "discriminative", "stage2", "eval"):
            (folder / part).mkdir(parents=True)
        numbers = {"benchmark": "genai-bench", "accuracy_without_ties": value, "accuracy_with_ties": None}
        (folder / "eval" / "report.json").write_text(json.dumps(numbers))
        (folder / "base" / "measured.json").write_text(json.dumps(base))
        for part in ("stage1", "discriminative"):
            (folder / part / "metrics.jsonl").write_text(
                '{"step": 1, "val_accuracy": 0.5}\n{"step": 2, "val_accuracy": 0.75}\n'
            )
        quality = [0.5] * 5 + [0.9] * 5 + [0.6 + 0.1 * seed] * 10
        lines = [{"step": k, "quality": q, "pair_accuracy": 0.8} for k, q in enumerate(quality)]
        (folder / "stage2" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = [str(tmp_path / f"seed{seed}") for seed in (0, 1)]
    runs = ["--runs", f"one={tmp_path}/seed*/eval/report.json", "--out", str(tmp_path / "out")]
    compare.main([*runs, "--training", *folders])
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| one | 0.500 ± 0.354 | - |" in text  # .25 * sqrt(2)
    assert "| stage 2: rise of quality | 0.100 | 0.200 | 0.150 ± 0.071 |" in text
    assert "| stage 1: validation accuracy | 0.750 | 0.750 | 0.750 ± 0.000 |" in text
    with pytest.raises(InputError, match="give folders that `make demo` wrote"):
        compare.main([*runs, "--training", str(tmp_path)])
