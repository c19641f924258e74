"""Long recordings, read block by block; half files."""

import io

import numpy as np
import pytest
import soundfile

from nemo_mtbi.data.audio import load_waveform
from nemo_mtbi.data.audio_length import with_length
from nemo_mtbi.data.audio_stream import AudioStream, gaps_of, open_audio, seconds_of
from nemo_mtbi.errors import DataError
from nemo_mtbi.serving.audio import TooLong, decode_audio

pytestmark = pytest.mark.unit
SECONDS = 150


def tone(rate, channels=1, seconds=SECONDS):
    time = np.arange(seconds * rate) / rate
    samples = 0.3 * np.sin(2 * np.pi * (200 + time) * time)
    return np.stack([samples * (1 - 0.2 * c) for c in range(channels)], 1).astype(np.float32)


def read(audio):
    return np.concatenate(list(audio))


@pytest.mark.parametrize(
    ("name", "rate", "channels"), [("a.wav", 16_000, 1), ("a.flac", 44_100, 2), ("a.ogg", 8_000, 1)]
)
def test_a_stream_is_the_whole_recording(tmp_path, name, rate, channels):
    soundfile.write(tmp_path / name, tone(rate, channels), rate)
    stream = open_audio(tmp_path / name, 16_000)
    assert isinstance(stream, AudioStream)
    found, expected = read(stream), load_waveform(tmp_path / name, 16_000)
    assert len(found) == pytest.approx(len(expected), abs=2)
    size = min(len(found), len(expected))
    assert np.abs(found[:size] - expected[:size]).max() < 2e-3
    assert np.array_equal(read(stream), found) and gaps_of(stream) == []  # again


def test_a_part_and_bytes(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000, seconds=300), 16_000)
    expected = load_waveform(tmp_path / "a.wav", 16_000, 7.5, 130.0)
    assert np.array_equal(read(open_audio(tmp_path / "a.wav", 16_000, 7.5, 130.0)), expected)
    data = (tmp_path / "a.wav").read_bytes()
    assert np.array_equal(read(AudioStream(data, 16_000, 7.5, 130.0)), expected)


def test_short_recordings_are_read_at_once(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000, seconds=5), 16_000)
    (samples,) = open_audio(tmp_path / "a.wav", 16_000)
    assert np.array_equal(samples, load_waveform(tmp_path / "a.wav", 16_000))
    with pytest.raises(DataError, match="There is no audio file"):
        open_audio(tmp_path / "b.wav", 16_000)


def broken(kind, path):
    """A recording of 150 s of which something is missing; -> between which seconds."""
    buffer, samples = io.BytesIO(), tone(16_000)
    if kind == "beginning":
        soundfile.write(buffer, samples, 16_000, format="FLAC")
        data = bytearray(buffer.getvalue())
        data[len(data) // 100 : len(data) // 10] = bytes(len(data) // 10 - len(data) // 100)
        path.write_bytes(data)
        return 0, 30
    if kind == "numbers":
        samples[70 * 16_000] = np.nan
        soundfile.write(path, samples, 16_000, format="WAV", subtype="FLOAT")
        return 70, 71
    if kind == "header":  # promises more than there is
        soundfile.write(buffer, samples, 16_000, format="FLAC")
        path.write_bytes(buffer.getvalue()[: int(0.6 * len(buffer.getvalue()))])
        return 60, 150
    soundfile.write(buffer, samples, 16_000, format="FLAC")
    data = bytearray(buffer.getvalue())
    data[len(data) // 2 : len(data) // 2 + 20_000] = bytes(20_000)
    path.write_bytes(data)
    return 60, 90


@pytest.mark.parametrize("kind", ["numbers", "header", "middle", "beginning"])
def test_what_cannot_be_read_is_a_named_gap(tmp_path, kind):
    path = tmp_path / "a.audio"
    low, high = broken(kind, path)
    stream = AudioStream(path, 16_000)
    found, expected = read(stream), tone(16_000)[:, 0]
    assert len(found) == len(expected)
    (gap,) = gaps_of(stream)
    assert low <= gap.begin_seconds < gap.end_seconds <= high and gap.reason
    begin, end = (round(s * 16_000) for s in (gap.begin_seconds, gap.end_seconds))
    assert not found[begin:end].any()
    kept = np.ones(len(found), bool)
    kept[begin:end] = False
    assert np.abs(found - expected)[kept].max() < 1e-3


def test_a_part_beyond_the_end_is_named_or_refused(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(16_000), 16_000)
    part = AudioStream(tmp_path / "a.flac", 16_000, offset_seconds=SECONDS - 20, duration_seconds=30)
    assert len(read(part)) == 20 * 16_000
    assert [str(gap) for gap in part.gaps] == ["150.0 s to 160.0 s (the audio ends before)"]
    for offset in (SECONDS, SECONDS + 5):
        with pytest.raises(DataError, match=rf"from {offset} s on is beyond the audio's 150.0 s"):
            read(AudioStream(tmp_path / "a.flac", 16_000, offset_seconds=offset))


def test_files_without_audio_are_refused_at_once(tmp_path, monkeypatch):
    """Gone, no audio, or a header that announces hours of nothing."""
    with pytest.raises(DataError, match="cannot be opened"):
        read(AudioStream(tmp_path / "gone.flac", 16_000))
    with pytest.raises(DataError, match="cannot be opened"):
        read(AudioStream(b"no audio", 16_000))
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(16_000), 16_000, format="FLAC")
    header = bytearray(buffer.getvalue()[:200])
    samples = 3600 * 16_000  # of the stream, in the last 36 bits before the checksum of its first block
    header[21] = header[21] & 0xF0 | samples >> 32
    header[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    reads = []
    monkeypatch.setattr(AudioStream, "_note", lambda *gap: reads.append(gap))
    with pytest.raises(DataError, match="Nothing of the audio can be read"):
        read(AudioStream(bytes(header[:86]) + bytes(2000), 16_000))
    assert not reads


@pytest.mark.parametrize("seconds", [0.4, 3.0])
def test_a_flac_that_was_piped_has_a_length(tmp_path, seconds):
    """Its header says none, so libsndfile takes it for one of 2**63 samples."""
    samples = (0.1 * np.random.default_rng(0).standard_normal(round(seconds * 16000))).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16000, format="FLAC")
    data = bytearray(buffer.getvalue())
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # total samples: unknown
    file = tmp_path / "piped.flac"
    file.write_bytes(data)
    assert soundfile.info(file).frames > 2**62
    for blocks in (open_audio(file, 16000), decode_audio(bytes(data), 16000, 3600)):
        heard = np.concatenate(list(blocks))
        assert len(samples) - 160 <= len(heard) <= len(samples)
        np.testing.assert_allclose(heard, samples[: len(heard)], atol=1e-4)
        assert seconds_of(blocks, 16000) == pytest.approx(seconds, abs=0.02) and not gaps_of(blocks)
    with pytest.raises(TooLong):
        decode_audio(bytes(data), 16000, 0.2)
    for size in (26, 30):  # of which nothing is left but the beginning of the header
        file.write_bytes(data[:size])
        with pytest.raises(DataError):
            list(open_audio(file, 16000))
        with pytest.raises(DataError):
            decode_audio(bytes(data[:size]), 16000, 3600)
    whole = tmp_path / "whole.flac"
    whole.write_bytes(buffer.getvalue())
    assert with_length(whole) == whole and with_length(tmp_path / "absent.flac") == tmp_path / "absent.flac"


def test_an_mp3_without_a_header_is_read_to_its_end(tmp_path):
    """Of changing bit rates: by the first of them it would be taken for a fifth of what it is."""
    seconds, rng = np.arange(90 * 16000) / 16000, np.random.default_rng(0)
    loud = seconds % 20 >= 10
    samples = 0.3 * np.sin(2 * np.pi * 300 * seconds) * ~loud + 0.2 * rng.standard_normal(len(seconds)) * loud
    buffer = io.BytesIO()
    options = {"subtype": "MPEG_LAYER_III", "bitrate_mode": "VARIABLE", "compression_level": 0.5}
    soundfile.write(buffer, samples.astype(np.float32), 16000, format="MP3", **options)
    data = buffer.getvalue()
    cut = data[data.index(data[:2], 40) :]  # from its second frame on, as a stream is recorded
    assert b"Xing" in data[:200] and b"Xing" not in cut
    file = tmp_path / "a.mp3"
    file.write_bytes(cut)
    assert soundfile.info(file).duration < 60
    tag = b"ID3\x03\x00\x00\x00\x00\x01\x02" + bytes(130)
    for blocks in (open_audio(file, 16000), decode_audio(cut, 16000, 3600), decode_audio(tag + cut, 16000, 3600)):
        assert sum(map(len, blocks)) == pytest.approx(90 * 16000, rel=0.01) and not gaps_of(blocks)
    with pytest.raises(TooLong):
        decode_audio(cut, 16000, 80)
    file.write_bytes(data)
    assert (
        with_length(file) == file
        and with_length(b"no audio at all, but some bytes") == b"no audio at all, but some bytes"
    )


def test_much_audio_is_decoded_in_blocks():
    """A little FLAC of silence holds hundreds of megabytes of samples."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((96_000 * 40, 4), np.int16), 96_000, format="FLAC")
    blocks = decode_audio(buffer.getvalue(), 16000, 120)
    assert isinstance(blocks, AudioStream)
    assert sum(map(len, blocks)) == pytest.approx(40 * 16000, abs=160)


def test_a_wild_sample_is_a_gap_too(tmp_path):
    samples = 0.1 * np.random.default_rng(0).standard_normal(16_000 * 150).astype(np.float32)
    samples[16_000 * 70] = 1e10
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    stream = open_audio(tmp_path / "a.wav", 16_000)
    assert len(read(stream)) == len(samples)
    (gap,) = gaps_of(stream)
    assert gap.begin_seconds <= 70 < gap.end_seconds <= gap.begin_seconds + 2
