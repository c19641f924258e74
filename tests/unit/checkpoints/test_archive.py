"""Exports: complete, readable, and refused where damaged, foreign or hostile."""

import io
import json
import tarfile

import pytest
import torch

from nemo_mtbi.checkpoints.archive import save_directory
from nemo_mtbi.checkpoints.round_trip import max_abs_logit_difference, require_same_logits
from nemo_mtbi.errors import CheckpointError
from nemo_mtbi.losses.vocabulary import VocabularyShard
from nemo_mtbi.models import MTBISALM

pytestmark = pytest.mark.unit


def test_exports_need_nothing_else_and_compute_the_same(exported):
    model, nemo, hf = exported
    for source in (nemo, hf):
        other = MTBISALM.restore_from(source)
        assert max_abs_logit_difference(model, other) < 1e-5
        assert other.perception.modality_adapter.vocabulary.token_ids == list(range(300, 309))
        assert other.encoder_key == model.encoder_key
    assert max_abs_logit_difference(model, MTBISALM.from_pretrained(str(hf))) < 1e-5
    assert not any(f.suffix in (".bin", ".pt", ".ckpt", ".pkl") for f in hf.rglob("*"))


def test_damaged_and_foreign_archives_are_refused(exported, tmp_path):
    _, nemo, hf = exported
    data = nemo.read_bytes()
    (tmp_path / "cut.nemo").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.nemo").write_text("hello")
    with tarfile.open(tmp_path / "asr.nemo", "w") as tar:
        tar.add(hf / "config.json", "model_config.yaml")
    for name, message in (
        ("cut", "damaged|truncated"),
        ("text", "damaged"),
        ("asr", "another kind"),
        ("none", "no file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            MTBISALM.restore_from(tmp_path / f"{name}.nemo")
    with pytest.raises(CheckpointError, match="not empty"):
        save_directory(exported[0], hf)


@pytest.mark.parametrize("name", ["../escape.txt", "/tmp/escape_mtbi.txt", "link", "inner", "hard", "device"])
def test_hostile_archives_write_nothing_outside(exported, tmp_path, name):
    _, nemo, _ = exported
    evil = tmp_path / "evil.nemo"
    with tarfile.open(nemo) as source, tarfile.open(evil, "w") as tar:
        for member in source.getmembers():
            tar.addfile(member, source.extractfile(member))
        info = tarfile.TarInfo(name)
        kinds = {"link": tarfile.SYMTYPE, "inner": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
        if name in kinds:  # a link within the folder too: a chain of them leads outside
            info.type, info.linkname = kinds[name], "/etc/passwd" if name == "link" else "model.safetensors"
            tar.addfile(info)
        else:
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(CheckpointError, match="unsafe"):
        MTBISALM.restore_from(evil)
    assert not (tmp_path / "escape.txt").exists()


def test_an_export_cannot_ask_for_remote_code(exported, tmp_path):
    import shutil

    shutil.copytree(exported[2], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "trust_remote_code": True}))
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        MTBISALM.restore_from(tmp_path / "hf")


def test_a_difference_of_logits_fails_and_so_does_what_is_no_number():
    own = torch.tensor([[1.0, -20.0, 3.0]])
    assert require_same_logits(own, own + 0.1, "it") == pytest.approx(0.1, rel=1e-4)
    for other in (own + 0.3, own * torch.nan):
        with pytest.raises(CheckpointError, match="it: the logits differ by"):
            require_same_logits(own, other, "it")


def test_a_rank_has_no_whole_model_to_save(exported, tmp_path, monkeypatch):
    model, _, _ = exported
    monkeypatch.setattr(model, "vocabulary_shard", VocabularyShard(0, 8, object()))
    with pytest.raises(CheckpointError, match="spread over tensor-parallel ranks"):
        model.save_to(tmp_path / "part.nemo")
    assert not (tmp_path / "part.nemo").exists()
