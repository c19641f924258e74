"""What a run shows, and what its log keeps."""

import os
import subprocess
import sys

import pytest

from nemo_mtbi import console

pytestmark = pytest.mark.unit

SCRIPT = """
import logging, os, sys, warnings
from pathlib import Path
from nemo_mtbi import console
with console.redirected(None if sys.argv[1] == "-" else Path(sys.argv[1])):
    print("theirs"); warnings.warn("theirs"); os.system("echo theirs"); os.system("echo theirs >&2")
    for i in range(int(os.environ.get("WARNINGS", 20))):
        logging.getLogger("nemo_mtbi.data").warning(f"ours {i}")
    console.say("answer")
    if sys.argv[2:] == ["exit"]:
        sys.exit(3)
    if sys.argv[2:]:
        raise RuntimeError("broken")
"""


def console_run(*arguments, **environment):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return run.stdout, run.stderr


def test_only_our_lines_are_shown(tmp_path):
    log = tmp_path / "logs" / "x.log"
    out, err = console_run(log)
    assert out == "answer\n" and "theirs" not in err
    assert err.count("ours") == console.SHOWN_WARNINGS and str(log) in err
    assert log.read_text().count("theirs") == 4
    out, err = console_run(log, **{console.VERBOSE: "1"})
    assert out == "answer\n" and err.count("theirs") == 4
    out, err = console_run(log, "fail")
    assert "RuntimeError: broken" in err and f"Log: {log}" in err


def test_a_temporary_log_stays_only_with_something_to_say(tmp_path):
    console_run("-", TMPDIR=str(tmp_path), WARNINGS="2")
    assert not list(tmp_path.iterdir())
    for way in ("fail", "exit"):
        _, err = console_run("-", way, TMPDIR=str(tmp_path), WARNINGS="2")
        [log] = tmp_path.iterdir()
        assert f"Log: {log}" in err and "theirs" in log.read_text()
        log.unlink()
    _, err = console_run("-", TMPDIR=str(tmp_path))  # more than is shown
    assert f"more of them are in {next(tmp_path.iterdir())}" in err
