"""What a run shows while it trains."""

import json
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_mtbi.training.monitor import SampleAnswers

pytestmark = pytest.mark.unit


def test_answers_reach_tensorboard_wandb_and_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    board = TensorBoardLogger(tmp_path, name="board")
    wandb = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    answers = SampleAnswers(tmp_path, count=1, max_new_tokens=4)
    row = {
        "step": 2,
        "set": "held_out",
        "id": "u",
        "task": "about",
        "prompt": "about-01",
        "transcript": "a | b",
        "teacher": "It is about\nb.",
        "answer": "It is about a.",
    }
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
