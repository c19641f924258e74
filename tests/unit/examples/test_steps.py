"""Launchers in processes that are forked from one with NeMo: exit codes, output, memory."""

import os
import signal
import sys

import pytest

from nemo_mtbi.errors import MTBIError
from nemo_mtbi.examples import _launcher, _steps

pytestmark = pytest.mark.unit


@pytest.mark.skipif(sys.platform != "linux", reason="forked on Linux alone")
def test_exit_codes_output_and_memory_come_back(capfd):
    assert _steps.run_launcher("evaluate", ["run=/nowhere", "cuts={a: /nowhere.jsonl}"]) == 1
    assert "There is no manifest /nowhere.jsonl" in capfd.readouterr().err
    assert 0.2 < _steps.peak_gib() < 12 and len(_steps._peaks) == 1
    assert _steps.run_launcher("nemo_script", []) == 2


@pytest.mark.parametrize(
    ("code", "message"), [(-9, r"ended by SIGKILL \(out of memory\?\)"), (1, "its message is above")]
)
def test_how_a_step_ended_is_said(monkeypatch, code, message):
    monkeypatch.setattr(_launcher, "run_launcher", lambda *_: code)
    with pytest.raises(MTBIError, match=message):
        _launcher.run_step("train", "train", {})


@pytest.mark.skipif(sys.platform != "linux", reason="forked on Linux alone")
def test_a_step_that_is_killed_has_its_signal_for_a_code(monkeypatch):
    monkeypatch.setattr(_steps, "_main", killed)
    assert _steps.run_launcher("evaluate", []) == -signal.SIGKILL


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
