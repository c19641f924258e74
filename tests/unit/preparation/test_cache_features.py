"""The feature cache."""

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet
from nemo.collections.common.tokenizers import AutoTokenizer
from omegaconf import OmegaConf

from nemo_mtbi import registration as registration
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.feature_cache import FEATURES_FIELD, load_array
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.preparation.cache_features import FrozenEncoder, cache_features
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
    (tmp_path / "cuts.features.bin").rename(tmp_path / "elsewhere.bin")
    with pytest.raises(DataError, match="are gone: there is no .*cuts.features.bin.*folder in which"):
        load_array(resampled[0], FEATURES_FIELD, other.key)
    (tmp_path / "elsewhere.bin").rename(tmp_path / "cuts.features.bin")
    (tmp_path / "2.wav").write_text("broken")
    assert cache_features(encoder, manifest).skipped == 1


def test_cache_refuses_features_that_change(tiny_config):
    augment = {"_target_": "nemo.collections.asr.modules.SpectrogramAugmentation", "freq_masks": 1, "time_masks": 1}
    with pytest.raises(ConfigError, match="spec_augment"):
        FrozenEncoder(encoder_config(tiny_config, spec_augment=augment))
    config = encoder_config(tiny_config)
    config.prevent_freeze_params = [r"^perception\.encoder.+$"]
    with pytest.raises(ConfigError, match="the encoder is trained"):
        FrozenEncoder(config)
