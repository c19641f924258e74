"""The batch contract: audio, cached features, teacher, refusals."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from lhotse import CutSet
from nemo.collections.common.tokenizers import AutoTokenizer
from omegaconf import OmegaConf

from nemo_mtbi import registration as registration
from nemo_mtbi.data.conversation import read_mtbi
from nemo_mtbi.data.dataset import MTBIDataset, filled
from nemo_mtbi.data.target import IMPOSSIBLE
from nemo_mtbi.errors import DataError
from nemo_mtbi.io.array_storage import RawChunkyWriter
from nemo_mtbi.preparation.cache_features import cache_features
from nemo_mtbi.preparation.frozen_encoder import FrozenEncoder
from nemo_mtbi.targets.config import TargetsConfig
from nemo_mtbi.targets.generate import TargetGenerator
from tests.helpers import two_channel
from tests.unit.data_helpers import conversations, target

pytestmark = pytest.mark.unit


def test_batch_contract_and_a_broken_recording(manifest, smollm2, tmp_path):
    dataset = MTBIDataset(AutoTokenizer(smollm2, use_fast=True), "chatml")
    items = conversations(manifest)
    batch = dataset[CutSet(items)]
    assert batch["audios"].shape == (3, 35200) and batch["audio_lens"].tolist() == [16000, 24000, 35200]
    assert [e.transcript for e in batch["examples"]] == ["one two three"] * 3
    (tmp_path / "1.wav").write_text("no audio any more")
    batch = dataset[CutSet(items)]
    assert [e.id.split("/")[0] for e in batch["examples"]] == ["utt0", "utt2"] and batch["audios"].shape[0] == 2


def test_same_cut_with_several_targets_in_one_batch(manifest, smollm2):
    dataset = MTBIDataset(AutoTokenizer(smollm2, use_fast=True), "chatml")
    batch = dataset[CutSet(conversations(manifest, every_target=True))]
    assert len(batch["examples"]) == 6 == batch["audios"].shape[0]


def test_targets_as_shar_give_the_same_batches(manifest, tiny_llm, tmp_path):
    """Audio, targets and the teacher's top-k from Lhotse Shar as from the manifest; a broken recording stays out."""
    config = TargetsConfig(
        cuts={"train": str(manifest)},
        output_dir=str(tmp_path / "targets"),
        llm=tiny_llm,
        dtype="float32",
        prompt_format="chatml",
        task_names=["repeat", "about"],
        filters=["empty"],
        max_new_tokens=6,
        top_k=4,
        shar_dir=str(tmp_path / "shar"),
        shar_size=2,
    )
    (tmp_path / "1.wav").write_text("no audio")
    written = TargetGenerator(config).run()["train"]

    def batch(**source):
        entry = {"every_target": True, "audio_locator_tag": "<|audio|>", "force_finite": True, **source}
        items = list(read_mtbi(OmegaConf.create(entry))[0])
        dataset = MTBIDataset(AutoTokenizer(tiny_llm, use_fast=True), "chatml", teacher_temperature=1.0)
        return dataset[CutSet(sorted(items, key=lambda c: c.id))]

    from_manifest, from_shar = batch(cuts_path=str(written)), batch(shar_path=str(tmp_path / "shar" / "train"))
    assert [e.id for e in from_shar["examples"]] == [e.id for e in from_manifest["examples"]]
    assert len(from_shar["examples"]) == 4
    for key in ("audio_lens", "teacher_ids", "teacher_log_probs"):
        assert torch.equal(from_shar[key], from_manifest[key]), key
    assert torch.allclose(from_shar["audios"], from_manifest["audios"], atol=1e-4)


def test_shar_holds_cached_features(manifest, tiny_config, tiny_llm, tmp_path):
    """At every speed, as the manifest has them, and of cuts that begin within their recording."""
    CutSet([c.truncate(offset=0.25, preserve_id=True) for c in CutSet.from_file(manifest)]).to_file(manifest)
    frozen = {"freeze_params": [r"^(llm|embed_tokens|perception)\..+$"]}
    config = OmegaConf.create({k: v for k, v in two_channel(tiny_config).items() if k != "imitation"} | frozen)
    encoder = FrozenEncoder(config)
    cache_features(encoder, manifest, perturb_speed=[0.9])
    settings = {"dtype": "float32", "prompt_format": "chatml", "filters": ["empty"], "max_new_tokens": 4}
    folders = {"output_dir": str(tmp_path / "targets"), "shar_dir": str(tmp_path / "shar")}
    own = TargetsConfig({"train": str(manifest)}, llm=tiny_llm, task_names=["repeat"], **settings, **folders)
    written = TargetGenerator(own).run()["train"]
    keys = {"encoder_key": encoder.key, "writing_key": encoder.writing_key}
    dataset = MTBIDataset(AutoTokenizer(tiny_llm, use_fast=True), "chatml", cached_features=True, **keys)

    def batch(visit, **source):
        entry = {"audio_locator_tag": "<|audio|>", "perturb_speed": [0.9]}
        items = list(islice(read_mtbi(OmegaConf.create({**entry, **source}))[0], 3 * visit, 3 * visit + 3))
        assert {item.visit for item in items} == {visit}
        return dataset[CutSet(sorted(items, key=lambda c: c.id))]

    for visit in (0, 1):
        expected, found = batch(visit, cuts_path=str(written)), batch(visit, shar_path=str(tmp_path / "shar" / "train"))
        assert torch.equal(found["encoder_feature_lens"], expected["encoder_feature_lens"])
        assert torch.equal(found["encoder_features"], expected["encoder_features"])
        assert found["written"] == expected["written"] and any(found["written"])


def test_teacher_of_another_temperature_or_length_is_refused(manifest, smollm2, tmp_path):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    writer = RawChunkyWriter(tmp_path / "t.bin")
    for row in rows:
        row["custom"]["targets"] = [target("repeat", 1, teacher_begin=0, teacher_temperature=1.0).to_dict()]
        for name, value in (
            ("teacher_ids", np.zeros((2, 4), np.int32)),
            ("teacher_log_probs", np.zeros((2, 4), np.float16)),
        ):
            row["custom"][name] = writer.store_array("", value).to_dict()
    writer.close()
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = AutoTokenizer(smollm2, use_fast=True)
    with pytest.raises(DataError, match="stored at temperature 1.0"):
        MTBIDataset(tokenizer, "chatml", teacher_temperature=2.0)[CutSet(conversations(manifest))]
    with pytest.raises(DataError, match=r"utt0/.*\(2 rows\) belong to another answer than its 3"):
        MTBIDataset(tokenizer, "chatml", teacher_temperature=1.0)[CutSet(conversations(manifest))]


def test_answers_given_under_another_rendering_are_refused(manifest, smollm2):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        row["custom"]["targets"] = [target("repeat", 1, rendering="llama3/after/abc").to_dict()]
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match="given under llama3/after/abc.*this model has chatml/after/def"):
        MTBIDataset(AutoTokenizer(smollm2, use_fast=True), "chatml", llm_key="def")[CutSet(conversations(manifest))]


def test_teachers_with_fewer_entries_are_filled_with_impossible_ones():
    ids, log_probs = np.array([[0, 3], [2, 1]]), np.log([[0.5, 0.25], [0.5, 0.25]]).astype(np.float32)
    more, theirs = filled(ids, log_probs, 4)
    assert more[:, :2].tolist() == ids.tolist() and np.array_equal(theirs[:, :2], log_probs)
    assert all(len(set(row)) == 4 for row in more.tolist()) and (theirs[:, 2:] == IMPOSSIBLE).all()
    assert filled(ids, log_probs, 2)[0] is ids
