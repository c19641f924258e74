"""Audio as it is found, through every door by which it comes in."""

import io

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording
from nemo.collections.common.data.lhotse.dataloader import resample as nemo_resample

from nemo_mtbi.data.audio import CANCELLED, DC_OFFSET, load_waveform, mean_energies, mono, mono_samples, resample
from nemo_mtbi.errors import DataError
from nemo_mtbi.preparation.sources import utterance_cut
from nemo_mtbi.serving.audio import decode_audio

pytestmark = pytest.mark.unit
RATE = 16_000


def speech(seconds=1.0, rate=RATE, level=0.1):
    """A 300 Hz tone whose level moves as speech does."""
    t = np.arange(round(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * 300 * t) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))).astype(np.float32)


def by_file(path, rate):
    return load_waveform(path, rate)


def by_cut(path, rate):
    return mono_samples(utterance_cut("u", path, "text", None, None), rate)


def by_data_loader(path, rate):
    """NeMo's loader notes the rate on every cut before our dataset sees it."""
    return mono_samples(nemo_resample(utterance_cut("u", path, "text", None, None), rate), rate)


def by_server(path, rate):
    (samples,) = decode_audio(path.read_bytes(), rate, 60)
    return samples


DOORS = pytest.mark.parametrize("door", [by_file, by_cut, by_data_loader, by_server])


@DOORS
@pytest.mark.parametrize("rate", [4_000, 7_919, 8_000, 11_025, 15_991, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_any_sampling_rate(tmp_path, door, rate):
    soundfile.write(tmp_path / "a.wav", speech(rate=rate), rate)
    heard, wanted = door(tmp_path / "a.wav", RATE), speech()
    assert heard.dtype == np.float32 and abs(len(heard) - RATE) <= 2
    inner = slice(800, len(wanted) - 800)
    assert np.abs(heard[inner] - wanted[inner]).max() < 2e-3


@DOORS
@pytest.mark.parametrize(
    "channels, gain",
    [
        ([1, 1], 1.0),  # averaged
        ([1, 0], 0.5),
        ([1, -1], 1.0),  # cancels: the louder one
        ([-1, 1], -1.0),
        ([0.5, -1], -1.0),
        ([1, -1, 1, -1], 1.0),
        ([1, -1, 0], 1.0),
        ([1, 1, 1, -1], 0.5),
    ],
)
@pytest.mark.parametrize("rate", [RATE, 15_991])
def test_channels(tmp_path, door, channels, gain, rate):
    soundfile.write(tmp_path / "a.wav", np.outer(speech(rate=rate), channels), rate, subtype="FLOAT")
    heard = door(tmp_path / "a.wav", RATE)[800:15_000]
    assert np.abs(heard - gain * speech()[800:15_000]).max() < 2e-3


@DOORS
@pytest.mark.parametrize("offsets", [(0.3,), (-0.5,), (0.3, 0.0), (0.3, -0.3)])
def test_a_dc_offset_is_subtracted(tmp_path, door, offsets):
    soundfile.write(tmp_path / "a.wav", np.stack([speech() + o for o in offsets], 1), RATE, subtype="FLOAT")
    assert np.abs(door(tmp_path / "a.wav", RATE) - speech()).max() < 2e-3


def test_clean_audio_keeps_its_bits_and_defects_are_noticed():
    noticed: list[str] = []
    assert np.array_equal(mono(speech()[None], noticed), speech()) and noticed == []
    noise = np.random.default_rng(0).standard_normal((2, RATE)).astype(np.float32)
    assert np.array_equal(mono(noise, noticed), noise.mean(0)) and noticed == []
    assert not mono(np.zeros((2, 100), np.float32), noticed).any() and noticed == []
    mono(np.stack([speech() + 1, -speech()]), noticed)
    assert noticed == [DC_OFFSET, CANCELLED]
    assert mono(np.zeros((2, 0), np.float32)).shape == resample(np.zeros(0, np.float32), 8000, RATE).shape == (0,)


@DOORS
def test_samples_that_are_no_numbers_are_refused(tmp_path, door):
    samples = speech()
    samples[100] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(DataError, match="no numbers"):
        door(tmp_path / "a.wav", RATE)


@pytest.mark.parametrize("rate", [1, 3_999, 192_001, 2**31 - 1])
def test_the_server_names_the_rates_that_it_takes(rate):
    file = io.BytesIO()
    soundfile.write(file, speech(), rate, format="WAV")
    with pytest.raises(DataError, match="4,000 to 192,000 Hz"):
        decode_audio(file.getvalue(), RATE, 60)


@pytest.mark.parametrize("rate", [8_000, 15_991, 44_100])
def test_a_part_of_a_resampled_cut(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", speech(3.0, rate), rate)
    whole = Recording.from_file(tmp_path / "a.wav").to_cut()
    parts = [
        whole.resample(RATE).truncate(offset=1.0, duration=0.7),
        whole.truncate(offset=1.0, duration=0.7).resample(RATE),
    ]
    stored = CutSet.from_dicts([parts[0].to_dict()])[0]  # its transforms are dictionaries
    for part in (*parts, stored):
        heard = mono_samples(part, RATE)
        assert abs(len(heard) - 0.7 * RATE) <= 2
        assert np.abs(heard[200:11_000] - speech(3.0)[RATE + 200 : RATE + 11_000]).max() < 5e-3


@pytest.mark.parametrize("channels, samples", [(1, 0), (2, 0), (1, 1), (1, 2**16), (2, 2**16 + 1), (3, 500_000)])
def test_energies_are_those_of_float64_sums(channels, samples):
    audio = np.random.default_rng(0).standard_normal((samples, channels)).astype(np.float32).T  # as decoders give it
    expected = (audio.astype(np.float64) ** 2).sum(1) / max(1, samples)
    assert mean_energies(audio) == pytest.approx(expected, rel=1e-5)
    if samples:
        loud, broken = audio * np.float32(1e25), audio * np.float32("nan")
        assert mean_energies(loud) == pytest.approx(expected * 1e50, rel=1e-5)
        assert np.isnan(mean_energies(broken)).all()


def test_samples_of_another_byte_order_are_refused():
    swapped = np.array([0.1, -0.2, 0.3], np.float32).byteswap().view(np.float32)
    loud = np.where(np.isfinite(swapped), swapped, 1e25)[None] + np.float32(1e20)
    with pytest.raises(DataError, match="another type or byte order"):
        mono(loud)
    assert len(mono(np.array([[20000.0, -32768.0]]))) == 2  # floats in the scale of integers are speech
