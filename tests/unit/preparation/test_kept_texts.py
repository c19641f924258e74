"""What a frozen recognizer writes, kept with the cached features."""

import copy
import logging

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from omegaconf import OmegaConf

from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.feature_cache import FEATURES_FIELD, load_array, windows_of, written_of
from nemo_mtbi.data.perturbation import perturbed
from nemo_mtbi.evaluation.systems import EvaluationSet
from nemo_mtbi.models.speech import batch_features, transcribe
from nemo_mtbi.modules.perception import writing_key
from nemo_mtbi.preparation import cache_features as caching
from nemo_mtbi.preparation.cache_features import cache_features
from nemo_mtbi.preparation.frozen_encoder import FrozenEncoder
from tests.helpers import assert_same, build, gradients, two_channel
from tests.unit.data_helpers import conversations

pytestmark = pytest.mark.unit
PARTS = ("llm", "embed_tokens", r"perception\.encoder", r"perception\.modality_adapter\.(?!acoustic)")
FROZEN = [rf"^{part}.+$" for part in PARTS]


@pytest.fixture
def config(tiny_config):
    return two_channel(tiny_config) | {"freeze_params": FROZEN}


@pytest.fixture
def model(config):
    model = build(config)
    model.perception.modality_adapter.begin_imitation()
    return model


def cached(config, manifest, **options):
    encoder = FrozenEncoder(OmegaConf.create({k: v for k, v in config.items() if k != "imitation"}))
    return encoder, cache_features(encoder, manifest, **options)


def read(model, manifest, key):
    dataset = MTBIDataset(
        model.tokenizer, "chatml", cached_features=True, encoder_key=model.encoder_key, writing_key=key
    )
    return dataset[CutSet(conversations(manifest))]


@pytest.mark.parametrize("residual", [False, True])
def test_training_reads_what_the_recognizer_writes(config, model, manifest, monkeypatch, residual):
    """With the text alone the decoder does not run at all; a residual reads its states."""
    if residual:
        torch.nn.init.normal_(model.perception.modality_adapter.residual.weight)
        model.bind_connector()
    encoder, _ = cached(config, manifest)
    key = writing_key(model.perception)
    assert key == encoder.writing_key is not None
    plain, kept = read(model, manifest, None), read(model, manifest, key)
    assert "written" not in plain
    features, lengths, _, written = batch_features(model.perception, kept)
    connector = model.perception.modality_adapter
    assert any(written) and connector.write(features.float(), lengths) == written
    assert transcribe(model.perception, *batch_features(model.perception, kept)) == transcribe(
        model.perception, features, lengths
    )
    expected = gradients(model, [copy.deepcopy(plain)])
    monkeypatch.setattr(type(connector), "_write" if residual else "_encode", None)
    found = gradients(model, [kept])
    assert any("acoustic" in name for name in found)
    assert_same(found, expected)
    with torch.no_grad():
        model.student(kept, interleave=False)
    with pytest.raises(TypeError):
        gradients(model, [plain])


def test_texts_come_to_features_that_are_there(config, model, manifest, tmp_path, caplog, monkeypatch):
    trained = config | {"freeze_params": FROZEN[:3]}
    encoder, _ = cached(trained, manifest)
    assert encoder.writing_key is None and writing_key(build(trained).perception) is None
    key, size = writing_key(model.perception), (tmp_path / "cuts.features" / "000000.bin").stat().st_size
    dataset = EvaluationSet(model, CutSet.from_file(manifest), cached_features=True).dataset
    assert dataset.writing_key == key
    with caplog.at_level(logging.INFO, "nemo_mtbi"):
        for _ in range(2):
            assert "written" not in dataset[CutSet(conversations(manifest))]
    assert sum("is not in the feature cache" in r.message for r in caplog.records) == 1
    _, report = cached(config, manifest)
    assert (report.encoded, report.cached) == (0, 3) and (
        tmp_path / "cuts.features" / "000000.bin"
    ).stat().st_size == size
    assert len(dataset[CutSet(conversations(manifest))]["written"]) == 3
    _, report = cached(config, manifest)
    assert (report.encoded, report.cached) == (0, 3)
    before = manifest.read_bytes()
    cached(trained, manifest)  # keeps what is there
    assert manifest.read_bytes() == before
    lines = before.splitlines(keepends=True)
    manifest.write_bytes(b"".join(reversed(lines)))
    monkeypatch.setattr(caching, "SHARD_CUTS", 1)  # each elsewhere, where the index knows of both records
    monkeypatch.setattr(FrozenEncoder, "encode", None)
    monkeypatch.setattr(FrozenEncoder, "write", None)
    _, report = cached(config, manifest)
    assert (report.cached, report.skipped) == (3, 0) and manifest.read_bytes() == b"".join(reversed(lines))


@pytest.mark.slow
def test_another_recognizers_texts_are_not_read(config, model, manifest):
    cached(config, manifest)
    connector = model.perception.modality_adapter
    key = connector.writing_key()
    assert copy.deepcopy(connector).bfloat16().writing_key() == key
    for change in (
        lambda c: setattr(c, "no_speech_threshold", 0.1),
        lambda c: setattr(c, "max_tokens_per_second", 3.0),
        lambda c: c.suppressed[0].fill_(-torch.inf),
        lambda c: c.decoder.layer_norm.weight.data.mul_(2),
        lambda c: setattr(c, "silence", c.silence[1:]),
    ):
        other = copy.deepcopy(connector)
        change(other)
        assert other.writing_key() != key
        assert "written" not in read(model, manifest, other.writing_key())
    connector.residual.requires_grad_(True)
    assert connector.writing_key() == key  # decides nothing
    connector.decoder.layer_norm.requires_grad_(True)
    assert connector.writing_key() is None


def test_each_speed_and_window_has_its_own(config, model, tmp_path):
    rng = np.random.default_rng(0)
    cuts = []
    for index, seconds in enumerate((33.0, 2.0)):
        soundfile.write(tmp_path / f"{index}.wav", 0.1 * rng.standard_normal(round(seconds * 16000)), 16000)
        cuts.append(Recording.from_file(tmp_path / f"{index}.wav").to_cut())
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    encoder, _ = cached(config, tmp_path / "cuts.jsonl", perturb_speed=[0.9])
    connector = model.perception.modality_adapter
    for cut, windows in zip(CutSet.from_file(tmp_path / "cuts.jsonl"), (2, 1), strict=True):
        for speed in (1.0, 0.9):
            own = perturbed(cut, speed)
            rows = load_array(own, FEATURES_FIELD, encoder.key).float().tensor_split(windows_of(own).rows[1:])
            assert len(rows) == windows
            expected = [connector.write(row[None], torch.tensor([len(row)]))[0] for row in rows]
            assert written_of(own, encoder.writing_key) == expected and all(expected)
        assert written_of(perturbed(cut, 1.1), encoder.writing_key) is None
