"""Noise under a share of the recordings."""

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.preparation.noisy import NOISE_FIELD, NoiseConfig, with_noise
from nemo_mtbi.preparation.prepare import Preparation, PrepareConfig
from nemo_mtbi.preparation.sources import SourceConfig

pytestmark = pytest.mark.unit
RATE = 16_000


def tone(seconds=1.0):
    return (0.2 * np.sin(2 * np.pi * 220 * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def a_cut(tmp_path, name, samples):
    soundfile.write(tmp_path / f"{name}.wav", samples, RATE, subtype="FLOAT")
    recording = Recording.from_file(tmp_path / f"{name}.wav", recording_id=name)
    return MonoCut(f"odd/{name}", 0.0, recording.duration, 0, recording=recording)


def test_a_share_is_mixed_at_the_ratio_that_is_noted(tmp_path):
    config, found = NoiseConfig(share=0.5, snr_db=[5.0, 10.0]), []
    for index in range(24):
        cut = a_cut(tmp_path, str(index), tone())
        noisy, samples = with_noise(cut, tone(), RATE, config, tmp_path / "noisy")
        again, same = with_noise(cut, tone(), RATE, config, tmp_path / "again")
        assert np.array_equal(samples, same) and (noisy is cut) == (again is cut)
        if noisy is cut:
            continue
        snr, added = noisy.custom[NOISE_FIELD], samples - tone()
        ratio = 10 * np.log10(np.mean(np.square(tone())) / np.mean(np.square(added)))
        assert 5 <= snr <= 10 and ratio == pytest.approx(snr, abs=0.02) and noisy.id == cut.id
        assert np.abs(noisy.load_audio()[0] - samples).max() < 1e-4 and noisy.duration == cut.duration
        found.append(snr)
    assert 6 <= len(found) <= 18 and len(set(found)) == len(found)


def test_several_channels_become_one(tmp_path):
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone(), 0.5 * tone()], 1), RATE)
    cut = Recording.from_file(tmp_path / "stereo.wav").to_cut()
    cut.supervisions = [SupervisionSegment("s", cut.recording_id, 0.0, 1.0, channel=[0, 1], text="hello")]
    mono = cut.load_audio().mean(0)
    noisy, samples = with_noise(cut, mono, RATE, NoiseConfig(share=1.0), tmp_path / "noisy")
    assert isinstance(noisy, MonoCut) and NOISE_FIELD in noisy.custom and noisy.num_channels == 1
    assert noisy.supervisions[0].channel == 0 and noisy.supervisions[0].recording_id == noisy.recording_id
    assert np.abs(noisy.load_audio()[0] - samples).max() < 1e-4


def test_loud_recordings_are_not_clipped_and_silent_ones_stay(tmp_path):
    config = NoiseConfig(share=1.0, snr_db=[0.0, 0.0])
    loud = 4.9 * tone()
    _, mixed = with_noise(a_cut(tmp_path, "loud", loud), loud, RATE, config, tmp_path / "noisy")
    assert np.abs(mixed).max() == pytest.approx(1.0)
    silent = np.zeros(RATE, np.float32)
    cut = a_cut(tmp_path, "silent", silent)
    assert with_noise(cut, silent, RATE, config, tmp_path / "noisy")[0] is cut


@pytest.mark.slow
def test_prepare_keeps_word_times_and_describes_the_noisy_copy(tmp_path):
    (tmp_path / "transcripts.tsv").write_text(
        "path\ttranscript\n" + "".join(f"{i}.wav\thello there\n" for i in range(6))
    )
    for i in range(6):
        gap = 1e-3 * np.random.default_rng(i).standard_normal(8000)
        soundfile.write(tmp_path / f"{i}.wav", np.concatenate([tone(1.0), gap, tone(1.0)]), RATE)
    source = SourceConfig("tsv", path=str(tmp_path / "transcripts.tsv"))
    config = PrepareConfig(str(tmp_path / "out"), [source], aligner="none", noise=NoiseConfig(0.5, [0.0, 3.0], 1))
    config.describe.enabled = True
    config.split.shares = {"train": 1.0}
    cuts = list(CutSet.from_file(Preparation(config).run()["train"]))
    noisy = [NOISE_FIELD in (cut.custom or {}) for cut in cuts]
    assert len(cuts) == 6 and any(noisy) and not all(noisy)
    for cut, has_noise in zip(cuts, noisy, strict=True):
        (supervision,) = cut.supervisions
        assert supervision.text == "hello there" and (supervision.custom["voice"]["snr_db"] < 15) == has_noise
        assert supervision.custom["description"]["background noise"] == ("noisy" if has_noise else "clean")
    before = [cut.to_dict() for cut in cuts]
    assert [cut.to_dict() for cut in CutSet.from_file(Preparation(config).run()["train"])] == before  # from the journal
    config.noise = NoiseConfig(0.0)
    again = CutSet.from_file(Preparation(config).run()["train"])
    assert not any(NOISE_FIELD in (cut.custom or {}) for cut in again)


@pytest.mark.parametrize(
    ("config", "message"),
    [(NoiseConfig(1.5), r"noise.share=1.5"), (NoiseConfig(0.5, [9.0, 3.0]), r"noise.snr_db=\[9.0, 3.0\]")],
)
def test_wrong_settings_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        config.check()
