"""The page about a run of target generation."""

import json

import pytest

from nemo_mtbi.targets.report import write_report

pytestmark = pytest.mark.unit


def test_targets_report_is_one_escaped_page(tmp_path):
    target = {"task": "about", "prompt": "What?", "response": "<script>alert(1)</script>", "response_ids": [1, 2]}
    cut = {"supervisions": [{"text": "a & b"}], "custom": {"targets": [target]}}
    (tmp_path / "train.jsonl").write_text(json.dumps(cut) + "\n")
    rejected = {"filter": "refusal", "task": "about", "reason": "says 'sorry'", "response": "Sorry"}
    (tmp_path / "rejected.jsonl").write_text(json.dumps(rejected) + "\n")
    manifest = {
        "targets": 1,
        "response_tokens": 2,
        "teacher": {"name": "llm", "fingerprint": "f", "prompt_format": "chatml"},
        "decoding": {"method": "greedy", "engine": "hf", "dtype": "bfloat16"},
        "top_k": 0,
        "targets_by_task_and_prompt": {"about": {"a-1": 1}},
        "rejected": {"refusal": 1},
        "versions": {"torch": "2"},
        "worker_seconds": 1.0,
    }
    write_report(tmp_path / "r.html", manifest, {"train": tmp_path / "train.jsonl"}, [tmp_path / "rejected.jsonl"])
    page = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "a &amp; b" in page and "Sorry" in page
    assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")
