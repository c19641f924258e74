"""Launchers in processes that are forked from one with NeMo: exit codes, output, memory."""

import sys

import pytest

from nemo_mtbi.examples import _steps

pytestmark = pytest.mark.unit


@pytest.mark.skipif(sys.platform != "linux", reason="forked on Linux alone")
def test_exit_codes_output_and_memory_come_back(capfd):
    assert _steps.run_launcher("evaluate", ["run=/nowhere", "cuts={a: /nowhere.jsonl}"]) == 1
    assert "There is no manifest /nowhere.jsonl" in capfd.readouterr().err
    assert 0.2 < _steps.peak_gib() < 12 and len(_steps._peaks) == 1
    assert _steps.run_launcher("nemo_script", []) == 2
