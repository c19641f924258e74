"""The ``mtbi`` command."""

import importlib.util
import subprocess
import sys

import pytest

from nemo_mtbi.cli import COMMANDS, CONF, main
from tests.launching import Started

pytestmark = pytest.mark.unit


def test_every_command_has_a_launcher_and_a_yaml(capsys):
    for command, (module, config, _) in COMMANDS.items():
        assert importlib.util.find_spec(f"nemo_mtbi.examples.{module}") and (CONF / f"{config}.yaml").is_file()
        assert main([command, "--help"]) == 0 and "key=value" in capsys.readouterr().out


def test_help_fits_a_screen_and_imports_nothing_heavy():
    script = (
        "import sys; from nemo_mtbi.cli import main; code = main(['--help']); "
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'nemo', 'transformers', 'hydra')))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0 and len(run.stdout.splitlines()) < 24


def test_exit_codes(capsys):
    assert main(["sing"]) == 2 and "Commands: prepare" in capsys.readouterr().err
    run = Started("cli", ["evaluate", "run=/nowhere", "cuts={a: /nowhere.jsonl}"])
    assert "There is no manifest /nowhere.jsonl" in run.communicate()[0] and run.returncode == 1
