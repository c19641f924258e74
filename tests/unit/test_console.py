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


def test_a_reader_that_has_enough_ends_no_run():
    script = "from nemo_mtbi import console\nfor i in range(20000): console.say(f'line {i}')\nconsole.tell('done')"
    run = subprocess.run(f'{sys.executable} -c "{script}" | head -1', shell=True, capture_output=True, text=True)
    assert run.stdout == "line 0\n" and run.stderr == "done\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(tmp_path, closed):
    script = (
        "from nemo_mtbi import console; from pathlib import Path; import sys\n"
        f"with console.redirected(Path('{tmp_path}/log')):\n"
        " console.say('x'); console.tell('y'); print('z'); sys.stdin.read()\n"
        f"Path('{tmp_path}/done').touch()"
    )
    (tmp_path / "s.py").write_text(script)
    code = subprocess.run(f"{sys.executable} {tmp_path}/s.py {closed}", shell=True, stdin=subprocess.DEVNULL).returncode
    assert code == 0 and (tmp_path / "done").exists() and "z" in (tmp_path / "log").read_text()
