"""The feature cache."""

import gzip
import json
import os
import shutil

import numpy as np
import pytest
import soundfile
import torch
from filelock import FileLock
from lhotse import CutSet
from nemo.collections.common.tokenizers import AutoTokenizer
from omegaconf import OmegaConf

from nemo_mtbi import registration as registration
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.feature_cache import AUDIO_FIELD, FEATURES_FIELD, load_array
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.preparation import cache_features as caching
from nemo_mtbi.preparation import feature_shards
from nemo_mtbi.preparation.cache_features import cache_features
from nemo_mtbi.preparation.frozen_encoder import FrozenEncoder
from tests.unit.data_helpers import conversations

pytestmark = pytest.mark.unit


def encoder_config(tiny_config, **perception):
    config = {k: v for k, v in tiny_config.items() if k != "imitation"}
    return OmegaConf.create({**config, "perception": {**config["perception"], **perception}})


def test_cached_features_are_the_encoders_and_only_its(manifest, tiny_config, smollm2, tmp_path):
    encoder = FrozenEncoder(encoder_config(tiny_config))
    report = cache_features(encoder, manifest)
    assert (report.encoded, report.cached, report.skipped) == (3, 0, 0) and report.bytes > 0
    again = cache_features(encoder, manifest)
    assert (again.encoded, again.cached) == (0, 3)
    tokenizer = AutoTokenizer(smollm2, use_fast=True)
    batch = MTBIDataset(tokenizer, "chatml", cached_features=True, encoder_key=encoder.key)[
        CutSet(conversations(manifest))
    ]
    assert batch["encoder_features"].dtype == torch.bfloat16
    audio = MTBIDataset(tokenizer, "chatml")[CutSet(conversations(manifest))]
    expected, lengths = encoder.encode(audio["audios"], audio["audio_lens"])
    assert batch["encoder_feature_lens"].tolist() == lengths.tolist()
    torch.testing.assert_close(batch["encoder_features"].float(), expected.bfloat16().float())
    other = FrozenEncoder(encoder_config(tiny_config, round_seconds=3.0))
    assert other.key != encoder.key
    with pytest.raises(DataError, match="another encoder or input length"):
        MTBIDataset(tokenizer, "chatml", cached_features=True, encoder_key=other.key)[CutSet(conversations(manifest))]
    assert cache_features(other, manifest).encoded == 3
    soundfile.write(tmp_path / "0.wav", 0.1 * np.ones(16000), 16000)  # changed audio is refused, and encoded again
    with pytest.raises(DataError, match="The audio of utt0 has changed since"):
        MTBIDataset(tokenizer, "chatml", cached_features=True, encoder_key=other.key)[CutSet(conversations(manifest))]
    assert cache_features(other, manifest).encoded == 1
    resampled = CutSet([c.resample(8000) for c in CutSet.from_file(manifest)])
    assert all(len(load_array(c, FEATURES_FIELD, other.key)) for c in resampled)  # as NeMo's reader hands them on
    (tmp_path / "cuts.features" / "000000.bin").rename(tmp_path / "elsewhere.bin")
    with pytest.raises(DataError, match="are gone: there is no .*cuts.features/000000.bin.*folder in which"):
        load_array(resampled[0], FEATURES_FIELD, other.key)
    (tmp_path / "elsewhere.bin").rename(tmp_path / "cuts.features" / "000000.bin")
    (tmp_path / "2.wav").write_text("broken")
    assert cache_features(encoder, manifest).skipped == 1
    before = manifest.read_bytes()
    for i in range(2):
        (tmp_path / f"{i}.wav").write_text("broken")
    with pytest.raises(DataError, match="no cut could be encoded, so it stays as it was"):
        cache_features(encoder, manifest)
    assert manifest.read_bytes() == before


def test_features_of_copied_audio_are_used_and_of_other_audio_are_not(manifest, tiny_config, tmp_path):
    """A copy has another time of change; the time alone says nothing of what is inside."""
    encoder = FrozenEncoder(encoder_config(tiny_config))
    cache_features(encoder, manifest)
    cuts, file = CutSet.from_file(manifest).to_eager(), tmp_path / "0.wav"
    cut, content, written = cuts["utt0"], file.read_bytes(), file.stat()

    def refused(own=cut):
        with pytest.raises(DataError, match="has changed since its features were cached"):
            load_array(own, FEATURES_FIELD, encoder.key)

    expected = load_array(cut, FEATURES_FIELD, encoder.key)
    file.unlink()
    file.write_bytes(content)
    os.utime(file, ns=(0, 1))
    assert torch.equal(load_array(cut, FEATURES_FIELD, encoder.key), expected)
    for place in (0, len(content) // 2, len(content) - 1):  # of the same size, changed in one place
        changed = bytearray(content)
        changed[place] ^= 255
        file.write_bytes(bytes(changed))
        refused()
    file.write_bytes(content[:-2])
    refused()
    file.write_bytes(content)
    os.utime(file, ns=(0, 1))
    size, time, _ = cut.custom[AUDIO_FIELD].split("/")
    old = cut.with_custom(AUDIO_FIELD, f"{size}/{time}")  # of before the content was noted
    refused(old)
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert torch.equal(load_array(old, FEATURES_FIELD, encoder.key), expected)
    file.unlink()  # elsewhere: nothing can be said
    assert torch.equal(load_array(cut, FEATURES_FIELD, encoder.key), expected)


def as_cached(manifest):
    """Features by cut, and the order of the cuts."""
    return [(cut.id, cut.load_custom(FEATURES_FIELD).tolist()) for cut in CutSet.from_file(manifest)]


def test_shards_and_workers_give_the_same(manifest, tiny_config, tmp_path, monkeypatch):
    config, found = encoder_config(tiny_config), {}
    original = manifest.read_bytes()
    for name, shard_cuts, workers in (("whole", 4096, 1), ("shards", 1, 1), ("workers", 1, 2)):
        monkeypatch.setattr(caching, "SHARD_CUTS", shard_cuts)
        manifest.write_bytes(original)
        shutil.rmtree(tmp_path / "cuts.features", ignore_errors=True)
        report = cache_features(config, manifest, batch_seconds=1.0, workers=workers)  # a cut a batch: no padding
        assert (report.encoded, report.cached, report.skipped) == (3, 0, 0)
        found[name] = as_cached(manifest)
        assert len(list((tmp_path / "cuts.features").glob("*.bin"))) == (1 if name == "whole" else 3)
        assert not list((tmp_path / "cuts.features").glob("*.cuts.jsonl"))
    assert found["whole"] == found["shards"] == found["workers"]


def test_features_are_found_again_where_lines_have_moved(manifest, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "SHARD_CUTS", 1)
    encoder = FrozenEncoder(encoder_config(tiny_config))
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[1:]))
    assert cache_features(encoder, manifest).encoded == 2
    features = dict(as_cached(manifest))
    manifest.write_text("".join(lines))  # as prepare writes it again, with one more in front
    report = cache_features(encoder, manifest)
    assert (report.encoded, report.cached) == (1, 2)
    again = dict(as_cached(manifest))
    assert list(again) == ["utt0", "utt1", "utt2"] and features.items() <= again.items()


def test_what_was_cached_before_there_were_shards_serves(manifest, tiny_config, tmp_path):
    encoder = FrozenEncoder(encoder_config(tiny_config))
    original = manifest.read_bytes()
    cache_features(encoder, manifest)
    expected, folder = as_cached(manifest), tmp_path / "cuts.features"
    records = (folder / "000000.records.jsonl").read_text().replace("cuts.features/000000.bin", "cuts.features.bin")
    (tmp_path / "cuts.features.jsonl").write_text(records)
    (folder / "000000.bin").rename(tmp_path / "cuts.features.bin")
    shutil.rmtree(folder)
    manifest.write_bytes(original)
    assert cache_features(encoder, manifest).cached == 3
    assert as_cached(manifest) == expected


def test_a_killed_run_continues_and_compressed_manifests_stay_so(manifest, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "SHARD_CUTS", 2)
    encoder = FrozenEncoder(encoder_config(tiny_config))
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(manifest.read_bytes()))
    encode, calls = feature_shards._encode, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(feature_shards, "_encode", killed)
    before = packed.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        cache_features(encoder, packed, batch_seconds=1.0)
    assert packed.read_bytes() == before
    report = cache_features(encoder, packed, batch_seconds=1.0)
    assert (report.encoded, report.cached) == (1, 2)
    assert gzip.decompress(packed.read_bytes()).count(b"\n") == 3 and len(as_cached(packed)) == 3


def test_less_at_once_where_memory_does_not_suffice(manifest, tiny_config, monkeypatch):
    encoder = FrozenEncoder(encoder_config(tiny_config))
    encode = encoder.encode

    def small_memory(audios, lengths):
        if len(audios) > 1:
            raise torch.OutOfMemoryError("too much")
        return encode(audios, lengths)

    monkeypatch.setattr(encoder, "encode", small_memory)
    report = cache_features(encoder, manifest)
    assert (report.encoded, report.skipped) == (3, 0)


def test_what_is_left_out_has_a_reason_and_lost_arrays_are_made_again(manifest, tiny_config, tmp_path):
    encoder, folder = FrozenEncoder(encoder_config(tiny_config)), tmp_path / "cuts.features"
    original, sound = manifest.read_bytes(), (tmp_path / "1.wav").read_bytes()
    (tmp_path / "1.wav").write_text("broken")
    assert cache_features(encoder, manifest).skipped == 1
    assert cache_features(encoder, manifest).skipped == 0  # the manifest has it no more
    left_out = json.loads((folder / "left_out.jsonl").read_text())
    assert left_out["id"] == "utt1" and left_out["reason"]
    lines = [json.loads(line) for line in original.splitlines()]
    assert left_out["cut"] in lines and len(manifest.read_text().splitlines()) == len(lines) - 1
    (tmp_path / "1.wav").write_bytes(sound)
    manifest.write_bytes(original)
    assert cache_features(encoder, manifest).skipped == 0 and not (folder / "left_out.jsonl").read_text()  # it is back
    whole = (folder / "000000.bin").read_bytes()
    (folder / "000000.bin").write_bytes(whole[: len(whole) // 2])  # a copy that was cut off
    (tmp_path / "1.wav").write_bytes(sound)
    manifest.write_bytes(original)
    assert cache_features(encoder, manifest).encoded >= 2
    again = dict(as_cached(manifest))
    shutil.rmtree(folder)
    manifest.write_bytes(original)
    cache_features(encoder, manifest)
    for name, features in as_cached(manifest):
        torch.testing.assert_close(torch.tensor(again[name]), torch.tensor(features), atol=4, rtol=0)


def test_a_manifest_that_changes_meanwhile_is_not_replaced(manifest, tiny_config, monkeypatch):
    encoder = FrozenEncoder(encoder_config(tiny_config))
    encode = encoder.encode

    def meanwhile(*arguments):
        manifest.write_text(manifest.read_text() + "\n")
        return encode(*arguments)

    monkeypatch.setattr(encoder, "encode", meanwhile)
    with pytest.raises(DataError, match="has changed while it was worked on"):
        cache_features(encoder, manifest)
    assert manifest.read_text().endswith("\n\n")


def test_one_command_at_a_time(manifest, tiny_config, tmp_path):
    (tmp_path / "cuts.features").mkdir()
    with (
        FileLock(tmp_path / "cuts.features" / "cache.lock"),
        pytest.raises(DataError, match=r"Another command fills .*cuts.features"),
    ):
        cache_features(encoder_config(tiny_config), manifest)
    with pytest.raises(ConfigError, match="executor='slurm': use local or ray"):
        cache_features(encoder_config(tiny_config), manifest, executor="slurm")


def test_cache_refuses_features_that_change(tiny_config):
    augment = {"_target_": "nemo.collections.asr.modules.SpectrogramAugmentation", "freq_masks": 1, "time_masks": 1}
    with pytest.raises(ConfigError, match="spec_augment"):
        FrozenEncoder(encoder_config(tiny_config, spec_augment=augment))
    config = encoder_config(tiny_config)
    config.prevent_freeze_params = [r"^perception\.encoder.+$"]
    with pytest.raises(ConfigError, match="the encoder is trained"):
        FrozenEncoder(config)
