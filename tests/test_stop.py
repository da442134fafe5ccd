"""Ctrl-C: what the user is told, and that the step is asked to end rather than broken off."""

import signal

import pytest

from plumbing.resume import StopSignal


@pytest.fixture
def stop():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield StopSignal()
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_ctrl_c_asks_once_and_tells_of_torchruns_limit(stop, under_torchrun, monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    signal.raise_signal(signal.SIGINT)
    assert stop.requested
    text = capsys.readouterr().err
    assert "stopping after this step" in text
    assert ("torchrun --shutdown-timeout SECONDS" in text) == under_torchrun
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_other_ranks_stop_silently(stop, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    signal.raise_signal(signal.SIGINT)
    assert stop.requested and not capsys.readouterr().err
