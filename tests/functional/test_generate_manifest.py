"""``mtbi generate`` on a manifest as it is found, through the launcher."""

import json

import numpy as np
import pytest
import soundfile
import torch

from nemo_mtbi.checkpoints.archive import save_directory
from nemo_mtbi.models import MTBISALM
from tests.launching import launch

pytestmark = pytest.mark.functional


def test_each_line_is_answered_for_its_part_and_broken_lines_are_named(tmp_path, tiny_llm, tiny_whisper):
    torch.manual_seed(0)
    adapter = {"_target_": "nemo_mtbi.modules.connectors.StackMLPConnector", "factor": 5, "hidden_dim": 32}
    config = {
        "pretrained_llm": tiny_llm,
        "pretrained_asr": tiny_whisper,
        "prompt_format": "chatml",
        "perception": {"input_length": "own", "round_seconds": 1.0, "modality_adapter": adapter},
    }
    model = MTBISALM(config)
    folder = save_directory(model, tmp_path / "tiny")
    samples = 0.1 * np.random.default_rng(0).standard_normal(48_000)
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    rows = [
        json.dumps({"audio_filepath": "a.wav", "offset": 0, "duration": 1.0}),
        "",
        "broken",
        json.dumps({"audio_filepath": "a.wav", "offset": 1.5, "duration": None, "text": None}),
    ]
    manifest = tmp_path / "m.json"
    manifest.write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")
    shared = (f"model={folder}", "prompt=Say it.", "max_new_tokens=5", "device=cpu")
    out = launch("generate", *shared, f"audio={manifest}", f"output={tmp_path}/answers.jsonl")
    assert f"{manifest}, line 3: no JSON" in out
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(r.get("offset"), r.get("duration")) for r in records] == [(None, 1.0), (1.5, None)]
    heard, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    for record, part in zip(records, (heard[:16_000], heard[24_000:]), strict=True):
        assert record["answer"] == model.eval().chat(part, "Say it.", max_new_tokens=5, do_sample=False)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no audio")
    broken = [tmp_path / name for name in ("absent.wav", "empty.wav", "text.wav")]
    mixed = ", ".join(map(str, [*broken, tmp_path / "a.wav"]))
    out = launch("generate", *shared, f"audio=[{mixed}]", f"output={tmp_path}/answers.jsonl")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1 and "1 answers, 3 left out" in out
    reasons = ("There is no audio file", "(the file is empty)", "(Format not recognised)")
    for path, reason in zip(broken, reasons, strict=True):
        assert any(str(path) in line and reason in line for line in out.splitlines()), out
    manifest.write_text("broken\nbroken too\n")
    out = launch("generate", *shared, f"audio={manifest}", ok=False)
    assert "None of the 2 recordings" in out and "Traceback" not in out
