"""`mtbi quickstart` with its real speech and recognizer, but few utterances, few steps and a tiny LLM."""

import json

import numpy as np
import pytest

from nemo_mtbi.examples._overrides import override
from nemo_mtbi.models import MTBISALM
from nemo_mtbi.preparation.sources import SourceConfig, read_tsv
from tests.launching import launch

pytestmark = pytest.mark.functional
FIELDS = {"wall_seconds", "step_seconds", "peak_memory_gib", "train_examples_seen", "export", "no_speech"}
SCORES = ("token_agreement", "kl_per_token", "repeat_wer", "transcribe_wer", "nothing_heard")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, tiny_llm, whisper):
    root = tmp_path_factory.mktemp("quickstart")
    entries = list(
        read_tsv(SourceConfig("tsv", "pkg://nemo_mtbi/samples/librispeech/transcripts.tsv", split_column="split"))
    )
    rows = ["path\ttranscript\tspeaker\tsplit"]
    for split, count in (("train", 8), ("validation", 2), ("held_out", 8)):
        for entry in [e for e in entries if e.split == split][::4][:count]:
            audio = entry.load().recording.sources[0].source
            rows.append(f"{audio}\t{entry.text}\t{entry.speaker}\t{split}")
    (root / "some.tsv").write_text("\n".join(rows) + "\n")
    sources = [
        {"kind": "tsv", "path": str(root / "some.tsv"), "split_column": "split"},
        {"kind": "no_speech", "options": {"counts": {"train": 2, "no_speech": 5}, "seconds": [0.3, 3.0]}},
    ]
    values = {
        "output_dir": root / "out",
        "evaluated_splits": ["held_out"],
        "prepare.sources": sources,
        "prepare.aligner": "none",
        "targets.llm": tiny_llm,
        "targets.tasks_per_cut": {"train": 2, "held_out": 2},
        "targets.filters": ["empty"],
        "targets.max_new_tokens": 8,
        "train.model.pretrained_llm": tiny_llm,
        "train.alignment_stage.trainer.max_steps": 2,
        "train.alignment_stage.trainer.val_check_interval": 1,
        "train.trainer.max_steps": 2,
        "train.trainer.val_check_interval": 1,
        "train.data.train_ds.batch_size": 4,
        "train.data.train_ds.num_workers": 1,
    }
    printed = launch("quickstart", *(override(k, v) for k, v in values.items()))
    return root / "out", printed


def test_the_summary_says_all(quickstart):
    folder, _ = quickstart
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == FIELDS | {"held_out"}
    held_out = summary["held_out"]
    assert all(key in held_out for key in (*SCORES, "cascade", "cascade_normalized"))
    for key in ("token_agreement", "kl_per_token", "transcribe_wer"):
        assert {"untrained", "warm_start", "trained"} <= set(held_out[key])
    assert summary["export"]["round_trip_max_abs_diff"] < 1e-4
    assert 0.7 < summary["peak_memory_gib"] < 12  # NeMo alone takes 0.7
    assert list(summary["step_seconds"]) == [
        "prepare speech and word times",
        "cache encoder features",
        "text LLM answers (targets)",
        "train",
        "evaluate",
        "export",
    ]


def test_real_speech_is_understood_and_silence_noticed(quickstart):
    summary = json.loads((quickstart[0] / "summary.json").read_text())
    assert summary["held_out"]["transcribe_wer"]["trained"] <= 0.15
    assert summary["held_out"]["nothing_heard"]["trained"] == 0 and summary["no_speech"]["trained"] == 1


def test_it_is_quiet(quickstart):
    folder, printed = quickstart
    lines = printed.splitlines()
    assert len(lines) <= 60, printed
    assert not any(word in printed for word in ("Warning", "[NeMo", "W0", "OneLogger"))
    assert "NeMo" in (folder / "logs" / "quickstart.log").read_text()


def test_the_exported_model_answers(quickstart, tmp_path):
    folder, printed = quickstart
    assert f"{folder}/model.nemo" in printed
    model = MTBISALM.restore_from(folder / "model.nemo")
    assert model.cfg.prompt_format == "chat_template"
    assert model.chat(np.zeros(16_000, np.float32), "What is this?") == "I did not hear any speech."
