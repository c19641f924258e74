"""The ``mtbi`` command."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

from nemo_mtbi.cli import COMMANDS, CONF, main
from nemo_mtbi.examples._overrides import as_typed
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


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("prepare", ("max_words_per_second: transcripts", "by: speaker")),
        ("targets", ("tasks_per_cut: how many", "concurrency: 16")),
        ("plan", ("utilization: of", "per_second: 4.0")),
        ("train", ("w_ctc", "llm_dtype")),
    ],
)
def test_help_says_what_the_keys_are(command, keys, capsys):
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert all(key in told for key in keys)


def test_exit_codes(capsys):
    assert main(["sing"]) == 2 and "Commands: prepare" in capsys.readouterr().err
    run = Started("cli", ["evaluate", "run=/nowhere", "cuts={a: /nowhere.jsonl}"])
    assert "There is no manifest /nowhere.jsonl" in run.communicate()[0] and run.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "output_dir, trainer.max_steps"),
        (["benchmark"], "no value given. What they are: "),
        (["report", "2026"], "2026 is not a training run"),
        (["report", "runs/lr=1e-4"], "runs/lr=1e-4 is not a training run"),
        (["prepare", "output_dir=x", "sources=[{kind: tsv, path: M\u00fcller/t (1).tsv}]"], "need quotes inside"),
    ],
)
def test_what_strangers_type_first_is_answered_in_a_line(arguments, message, tmp_path):
    run = Started("cli", arguments, cwd=tmp_path)
    said = run.communicate()[0]
    assert run.returncode == 1 and message in said and "Traceback" not in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["benchmark", "output_dir=x", "cuts=a.jsonl", "systems={a: b}"], "cuts={NAME: a.jsonl}"),
        (["benchmark", "output_dir=x", "cuts={a: b}", "systems={}"], "systems={} names nothing"),
        (["evaluate", "run=x", "cuts={}"], "cuts={} names nothing"),
        (["evaluate", "x", "cuts={a: b}", "batch_size=many"], "batch_size=many: give a whole number"),
        (["evaluate", "run=null", "cuts={a: b}"], "run is null: it needs a value"),
        (["prepare", "output_dir=", "sources=[{kind: tsv, path: x}]"], "output_dir is empty"),
        (
            ["ablate", "output_dir=x", "cuts={a: b}", "targets={train: a, validation: b}", "only=[]"],
            "only=[] names nothing",
        ),
        (["cache", "manifests=[]"], "manifests=[] names nothing"),
        (["cache", "manifests=gone.jsonl"], "There is no manifest gone.jsonl"),
        (["serve", "m.nemo", "port=abc"], "port=abc: give a whole number"),
        (["serve", "model=m.nemo", "page=maybe"], "page=maybe: true or false"),
        (["train", "output_dir=x", "alignment_stage=false"], "alignment_stage"),
        (["inspect", "setup.cfg"], "setup.cfg"),
    ],
)
def test_values_of_another_kind_are_said_before_anything_is_loaded(arguments, message, tmp_path):
    started = Started("cli", arguments, tmp_path)
    printed, _ = started.communicate()
    assert started.returncode != 0 and message in printed and "Traceback" not in printed, printed[-2000:]


def test_folders_may_be_called_like_numbers(tmp_path):
    assert as_typed("output_dir=2026_12_01") == 'output_dir="2026_12_01"' and as_typed("run=1e3") == 'run="1e3"'
    assert as_typed("seed=1_000") == "seed=1_000" and as_typed("output_dir=runs/a") == "output_dir=runs/a"


def test_lightning_starts_other_ranks_with_the_launchers_module(monkeypatch):
    from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd

    launcher, commands = importlib.import_module("nemo_mtbi.examples.plan"), []
    monkeypatch.setattr(launcher, "main", lambda: commands.append(list(_basic_subprocess_cmd())))
    before = sys.modules["__main__"].__spec__
    assert main(["plan", "gpus=8"]) == 0
    assert commands == [[sys.executable, "-m", "nemo_mtbi.examples.plan", "gpus=8"]]
    assert sys.modules["__main__"].__spec__ is before
