"""Wrong keys of later steps are found before the first step is run."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit


def mtbi(folder, *arguments):
    command = [sys.executable, "-m", "nemo_mtbi.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("key", "step", "named"),
    [
        ("train.trainer.max_step=3", "train", "max_step"),
        ("evaluate.llm_dtyp=float32", "evaluate", "llm_dtyp"),
        ("targets.top_k=[3]", "text LLM answers (targets)", "top_k"),
        ("train.speech_llm@model=offlne_dense", "train", "offlne_dense"),
    ],
)
def test_quickstart(tmp_path, key, step, named):
    done = mtbi(tmp_path, "quickstart", "output_dir=q", key)
    assert done.returncode == 1
    assert f"Error: Step {step!r}" in done.stderr + done.stdout
    assert named in done.stderr + done.stdout
    assert "===" not in done.stdout  # no step was begun
    assert not (tmp_path / "q" / "prepared.jsonl").exists()


@pytest.mark.parametrize(
    ("key", "step", "named"),
    [
        ("++variants.full.train={trainer.max_step: 3}", "train full, seed 0", "max_step"),
        ("+benchmark.max_new_token=3", "benchmark", "max_new_token"),
        ("++benchmark.baseline=nobody", None, "baseline=nobody is none of the systems"),
    ],
)
def test_ablate(tmp_path, key, step, named):
    target = {"task": "repeat", "prompt": "Repeat.", "response": "a"}
    line = {"id": "a", "start": 0, "duration": 1.0, "custom": {"targets": [target]}}
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    targets, cuts = "targets={train: train.jsonl, validation: held_out.jsonl}", "cuts={held_out: held_out.jsonl}"
    done = mtbi(tmp_path, "ablate", "output_dir=a", targets, cuts, "only=[full]", "seeds={full: [0]}", key)
    assert done.returncode == 1
    assert f"Error: Step {step!r}" in done.stderr + done.stdout or step is None
    assert named in done.stderr + done.stdout
    assert "===" not in done.stdout
