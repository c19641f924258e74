"""Speed perturbation of training speech, from audio and from the cache."""

import resource

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.supervision import AlignmentItem
from nemo.collections.common.tokenizers import AutoTokenizer
from omegaconf import OmegaConf

from nemo_mtbi import registration as registration
from nemo_mtbi.data.audio import mono_samples
from nemo_mtbi.data.conversation import ConversationIterator, TargetSelection, spoken_part
from nemo_mtbi.data.cut_lines import Share
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.perturbation import SpeedPerturbation, perturbed, speed_factors
from nemo_mtbi.errors import ConfigError, DataError
from nemo_mtbi.preparation.cache_features import cache_features
from nemo_mtbi.preparation.frozen_encoder import FrozenEncoder

pytestmark = pytest.mark.unit
FACTORS = [0.9, 1.1]


def visits(manifest, count, factors=FACTORS):
    """``count`` passes over a manifest."""
    config = OmegaConf.create({"audio_locator_tag": "<|audio|>", "force_finite": True, "perturb_speed": factors})
    stream = ConversationIterator(Share(CutSet.from_file(manifest)), TargetSelection(seed=3), config)
    cuts = list(CutSet.from_file(manifest))
    return [[c for cut in cuts for c in stream.conversations(cut, visit)] for visit in range(count)]


def test_every_speed_comes_once_in_three_visits(manifest):
    plain = {c.source_id: c.cut.duration for c in visits(manifest, 1, None)[0]}
    passes = visits(manifest, 6)
    for row in zip(*passes, strict=True):
        assert len({c.source_id for c in row}) == 1
        ratios = [round(plain[c.source_id] / c.cut.duration, 2) for c in row]
        assert sorted(ratios[:3]) == sorted(ratios[3:]) == [0.9, 1.0, 1.1]
    assert [c.cut.duration for c in passes[0]] == [c.cut.duration for c in visits(manifest, 1)[0]]


def test_words_keep_their_place(manifest):
    cut = next(iter(CutSet.from_file(manifest)))
    cut.supervisions[0].alignment = {"word": [AlignmentItem("one", 0.1, 0.2), AlignmentItem("two", 0.5, 0.3)]}
    slow, plain = spoken_part(perturbed(cut, 0.5)), spoken_part(cut)
    assert slow.transcript == plain.transcript and len(slow.words) == len(plain.words) == 3
    for a, b in zip(slow.words[:2], plain.words[:2], strict=True):
        assert a.start_seconds == pytest.approx(2 * b.start_seconds, abs=1e-3)
    assert slow.duration_seconds == pytest.approx(2 * plain.duration_seconds, abs=1e-3)


def test_cached_features_are_those_of_the_perturbed_audio(manifest, tiny_config, smollm2):
    encoder = FrozenEncoder(OmegaConf.create({k: v for k, v in tiny_config.items() if k != "imitation"}))
    tokenizer = AutoTokenizer(smollm2, use_fast=True)
    cached = MTBIDataset(tokenizer, "chatml", cached_features=True, encoder_key=encoder.key)
    cache_features(encoder, manifest)
    with pytest.raises(DataError, match="no cached encoder features at this speed.*perturb_speed"):
        [cached[CutSet(row)] for row in visits(manifest, 3)]
    report = cache_features(encoder, manifest, perturb_speed=FACTORS)
    assert (report.encoded, report.cached) == (6, 3)
    for row in visits(manifest, 3):
        batch, audio = cached[CutSet(row)], MTBIDataset(tokenizer, "chatml")[CutSet(row)]
        expected, lengths = encoder.encode(audio["audios"], audio["audio_lens"])
        assert batch["encoder_feature_lens"].tolist() == lengths.tolist()
        torch.testing.assert_close(batch["encoder_features"].float(), expected.bfloat16().float())
    assert cache_features(encoder, manifest).cached == 3  # and takes the other speeds out
    with pytest.raises(DataError, match="no cached encoder features at this speed"):
        [cached[CutSet(row)] for row in visits(manifest, 3)]


def test_no_wording_always_comes_at_the_same_speed(manifest):
    speed = SpeedPerturbation(FACTORS)
    cut = next(iter(CutSet.from_file(manifest)))
    met = {(visit % 3, round(cut.duration / speed(cut, visit).duration, 1)) for visit in range(90)}
    assert len(met) == 9


@pytest.mark.parametrize("rate", [8000, 15_991, 16_000, 44_100])
@pytest.mark.parametrize("part", [False, True])
def test_speed_and_rate_change_in_one_resampling_of_bounded_size(tmp_path, rate, part):
    time = np.arange(2 * rate) / rate
    soundfile.write(tmp_path / "a.wav", 0.4 * np.sin(2 * np.pi * 440 * time), rate)
    cut = Recording.from_file(tmp_path / "a.wav").to_cut()
    cut = cut.truncate(offset=0.5, duration=1.0) if part else cut
    fast = perturbed(cut, 1.1).resample(16_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples = mono_samples(fast, 16_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    assert len(samples) == pytest.approx(cut.duration / 1.1 * 16_000, abs=3)
    inner = slice(800, -800)
    place = 0.5 if part else 0.0
    expected = 0.4 * np.sin(2 * np.pi * 440 * (place + 1.1 * np.arange(len(samples)) / 16_000))
    one_sample = 0.4 * 2 * np.pi * 440 / rate  # parts begin at whole samples
    np.testing.assert_allclose(samples[inner], expected[inner], atol=0.01 + one_sample)


@pytest.mark.parametrize("factors", [0.9, "0.9", [0], [-1.1], [3], ["fast"], [None], [float("nan")], True])
def test_impossible_factors_are_named(factors):
    with pytest.raises(ConfigError, match="perturb_speed=.*0.5 to 2"):
        speed_factors(factors)


def test_the_recordings_own_speed_is_no_factor():
    assert speed_factors(["1.1", 1, 0.9, 0.9]) == (1.1, 0.9) and speed_factors(None) == speed_factors([]) == ()
