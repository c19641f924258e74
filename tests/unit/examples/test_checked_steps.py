"""Wrong keys of later steps are found before the first step is run."""

import json

import pytest

from tests.launching import launch

pytestmark = pytest.mark.unit


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
    told = launch("quickstart", "output_dir=q", key, ok=False, cwd=tmp_path)
    assert f"Error: Step {step!r}" in told and named in told
    assert "===" not in told  # no step was begun
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
    own = ["output_dir=a", targets, cuts, "only=[full]", "seeds={full: [0]}", key]
    told = launch("ablate", *own, ok=False, cwd=tmp_path)
    assert (step is None or f"Error: Step {step!r}" in told) and named in told
    assert "===" not in told
