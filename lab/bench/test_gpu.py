"""The shelf on a card: `make test-gpu`. The server, and one update of each stage with its compiled parts."""

import base64
import json
import subprocess
import sys
import urllib.request

import pytest
import torch

import data
from lab.bench import real
from model import DeScore
from tests.conftest import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_the_server_gives_the_model_s_rewards(tiny_model_dir, tiny_clips):
    """Over a socket, in bf16 on the card, beside fp32 on the CPU."""
    pytest.importorskip("aiohttp", reason="pip install -r requirements-serve.txt")
    with open(tiny_clips[0], "rb") as file:
        body = {"prompt": "a red circle", "video": base64.b64encode(file.read()).decode()}
    command = [sys.executable, "-m", "lab.serve", "--model", tiny_model_dir, "--no-think", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split(" ")[0]
            request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            answer = json.load(urllib.request.urlopen(request, timeout=120))
        finally:
            server.kill()
    model = DeScore.from_pretrained(tiny_model_dir)
    expected = model.reward([data.sample_frames(tiny_clips[0])], ["a red circle"], think=False).item()
    assert answer["rewards"][0] == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
@pytest.mark.parametrize("case", real.CASES)
def test_an_update_of_each_stage(base_dir, tiny_clips, tmp_path, case, compiled):
    real.main(["--model", base_dir, "--out", str(tmp_path), "--cases", case, "--rollouts", "2", "--cot-tokens", "5",
               "--text-layers", "1", "--vision-layers", "1", "--clips", *tiny_clips[:2], compiled])
    (row,) = json.loads((tmp_path / "real.json").read_text())["cases"]
    assert row["MFU"] > 0 and row["|g| head"] > 0 and row["peak GB"] > row["weights GB"] > 0
