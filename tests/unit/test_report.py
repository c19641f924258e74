"""Reports that people look at."""

import json
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_mtbi.evaluation.report import markdown, plot
from nemo_mtbi.evaluation.score import Scores, normalize, word_error_rate
from nemo_mtbi.targets.report import write_report
from nemo_mtbi.training.monitor import SampleAnswers

pytestmark = pytest.mark.unit


def test_targets_report_is_one_escaped_page(tmp_path):
    target = {"task": "about", "prompt": "What?", "response": "<script>alert(1)</script>", "response_ids": [1, 2]}
    cut = {"supervisions": [{"text": "a & b"}], "custom": {"targets": [target]}}
    (tmp_path / "train.jsonl").write_text(json.dumps(cut) + "\n")
    rejected = {"filter": "refusal", "task": "about", "reason": "says 'sorry'", "response": "Sorry"}
    (tmp_path / "rejected.jsonl").write_text(json.dumps(rejected) + "\n")
    manifest = {
        "targets": 1, "response_tokens": 2, "teacher": {"name": "llm", "fingerprint": "f", "prompt_format": "chatml"},
        "decoding": {"method": "greedy", "engine": "hf", "dtype": "bfloat16"}, "top_k": 0,
        "targets_by_task_and_prompt": {"about": {"a-1": 1}},
        "rejected": {"refusal": 1}, "versions": {"torch": "2"}, "worker_seconds": 1.0,
    }  # fmt: skip
    write_report(tmp_path / "r.html", manifest, {"train": tmp_path / "train.jsonl"}, [tmp_path / "rejected.jsonl"])
    page = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "a &amp; b" in page and "Sorry" in page
    assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")


def test_scores_and_their_tables(tmp_path):
    scores = Scores()
    scores.tokens["about"], scores.agreed["about"], scores.kl["about"] = 4, 3.0, 2.0
    scores.tokens["repeat"], scores.agreed["repeat"], scores.kl["repeat"] = 6, 6.0, 0.0
    scores.repeats = [("The cat sat.", "the cat sat", "the cat sat"), ("a dog", "a big dog", "a big dog ran")]
    summary = scores.summary()
    assert summary["token_agreement"] == pytest.approx(0.9) and summary["kl_per_token"] == pytest.approx(0.2)
    assert summary["repeat_wer"] == pytest.approx(1 / 6) and summary["repeat_wer_to_transcript"] == pytest.approx(2 / 7)
    text = markdown({"held_out": {"imitation": summary}}, "python x")
    assert "| imitation | 0.900 | 0.200 | 0.167 | 0.286 |" in text
    plot({"held_out": {"imitation": summary}, "other": {"imitation": summary}}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_normalization_and_word_error_rate():
    assert normalize("It's  HERE, isn't it?") == "it's here isn't it"
    assert word_error_rate(["", "a b"], ["noise", "a c"]) == 0.5
    assert word_error_rate([], []) == 0.0


def test_answers_reach_tensorboard_wandb_and_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    board = TensorBoardLogger(tmp_path, name="board")
    wandb = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    answers = SampleAnswers(tmp_path, count=1, max_new_tokens=4)
    row = {"step": 2, "set": "held_out", "id": "u", "task": "about", "prompt": "about-01", "transcript": "a | b",
           "teacher": "It is about\nb.", "answer": "It is about a."}  # fmt: skip
    answers._rows = [row]
    trainer = SimpleNamespace(is_global_zero=True, loggers=[board, wandb], global_step=2)
    answers.on_validation_end(trainer, None)
    wandb.experiment.finish()
    board.finalize("success")
    events = EventAccumulator(board.log_dir)
    events.Reload()
    (text,) = events.Tensors("answers/text_summary")
    assert r"| about | a \| b | It is about b. | It is about a. |" in text.tensor_proto.string_val[0].decode()
    (table,) = tmp_path.rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [list(row.values())]
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [row]
