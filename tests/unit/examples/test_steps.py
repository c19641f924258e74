"""Launchers in processes that are forked from one with NeMo: exit codes, output, memory."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from nemo_mtbi.errors import MTBIError
from nemo_mtbi.examples import _launcher, _steps
from tests.unit.preparation_helpers import tone

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


@pytest.mark.skipif(sys.platform != "linux", reason="forked on Linux alone")
def test_a_step_ends_with_the_launcher_that_is_killed(tmp_path):
    """The same command would run it a second time beside itself."""

    def here():
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(tmp_path) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    def until(holds):
        end = time.time() + 100
        while not holds() and time.time() < end:
            time.sleep(0.1)
        assert holds()

    for i in range(500):
        tone(tmp_path / "in" / f"{i}.wav", 2.0).with_suffix(".txt").write_text("one two three")
    arguments = ["output_dir=q", "sources=[{kind: folder, path: in}]", "describe.enabled=true"]
    code = "from nemo_mtbi.examples import _steps; _steps.PRELOADED = []; "
    code += f"_steps.run_launcher('prepare_data', {arguments})"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL)
    until(lambda: (tmp_path / "q" / "prepared.jsonl").exists())
    assert len(here()) >= 2  # it and its step
    launcher.kill()
    launcher.wait()
    until(lambda: not here())
