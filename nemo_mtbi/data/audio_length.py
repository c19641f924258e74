"""Recordings that do not say how long they are, as ones that do.

libsndfile takes a FLAC that was written to a pipe for one of 2**63 samples, and guesses the length of an MP3 without a
header by its first bit rate; it reads no more than that.
"""

import io
import math
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import soundfile

from nemo_mtbi.data.audio import mono

TOTAL_SAMPLES, LOW_36_BITS = slice(18, 26), (1 << 36) - 1  # of a FLAC's STREAMINFO: the bytes whose low bits they are
WAV_CHUNKS = (b"", b"LIST", b"id3 ", b"ID3 ", b"fact", b"cue ", b"bext", b"smpl", b"JUNK", b"iXML")  # behind no samples
MP3_HEADERS = (b"Xing", b"Info", b"VBRI")
ID3_BYTES, LOOKED_AT = 10, 4096


def with_length(source: Path | bytes, max_seconds: float = math.inf) -> Path | bytes:
    """A recording with its length in its header.

    Args:
        source: a file or its bytes; most are returned as they are.
        max_seconds: beyond which it is not counted.

    Returns:
        The source, or other bytes: a FLAC with a header that says its length (up to 10 ms less), a WAV whose size was
        0, or an MP3 without a header as FLAC, of one channel.
    """
    start = _part(source, 0, TOTAL_SAMPLES.stop)
    if len(start) < TOTAL_SAMPLES.stop:
        return source
    if start[:4] == b"fLaC" and not int.from_bytes(start[TOTAL_SAMPLES]) & LOW_36_BITS:
        return _counted(_part(source, 0, None), max_seconds)
    if start[:4] == b"RIFF" and start[8:12] == b"WAVE":  # written to a pipe: a size of 0
        beginning = _part(source, 0, LOOKED_AT)
        at = beginning.find(b"data", 12)
        piped = at > 0 and beginning[at + 4 : at + 8] == bytes(4) and beginning[at + 8 : at + 12] not in WAV_CHUNKS
        return _with_size(_part(source, 0, None), at) if piped else source
    begin = 0
    if start[:3] == b"ID3":  # four times seven bits
        begin = ID3_BYTES + sum(byte << (7 * place) for place, byte in enumerate(reversed(start[6:10])))
    head = _part(source, begin, begin + LOOKED_AT)
    if len(head) < 2 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2 or any(own in head for own in MP3_HEADERS):
        return source
    return _decoded(_part(source, begin, None), max_seconds)


def _part(source: Path | bytes, begin: int, end: int | None) -> bytes:
    if isinstance(source, bytes):
        return source[begin:end]
    try:
        with open(source, "rb") as file:
            file.seek(begin)
            return file.read(-1 if end is None else end - begin)
    except OSError:  # who opens it says so
        return b""


def _counted(data: bytes, max_seconds: float) -> bytes:
    """A FLAC whose samples are counted."""
    whole = _read_frames(data, 1.0, 0, max_seconds)
    # What is lost at most: libsndfile cannot seek behind the last block.
    frames = _read_frames(data, 0.01, whole, max_seconds)
    field = int.from_bytes(data[TOTAL_SAMPLES]) | frames
    return data[: TOTAL_SAMPLES.start] + field.to_bytes(8) + data[TOTAL_SAMPLES.stop :]


def _read_frames(data: bytes, seconds: float, begin: int, max_seconds: float) -> int:
    """Frames that can be read in blocks of so many seconds, after the whole seconds within the first ``begin`` ones."""
    frames = 0
    with suppress(soundfile.SoundFileError, RuntimeError, ValueError), soundfile.SoundFile(io.BytesIO(data)) as file:
        rate = file.samplerate
        while frames <= max_seconds * rate:
            found = len(file.read(rate if frames + rate <= begin else round(seconds * rate), dtype="int16"))
            if not found:
                break
            frames += found
    return frames


def _with_size(data: bytes, at: int) -> bytes:
    """A WAV whose chunk of samples, which begins ``at`` a byte, goes to the end."""
    size = min(len(data) - at - 8, 0xFFFFFFFF)
    return data[: at + 4] + size.to_bytes(4, "little") + data[at + 8 :]


def _decoded(data: bytes, max_seconds: float) -> bytes:
    """What libsndfile reads of an MP3 that comes through a pipe, as FLAC; the bytes, if it reads nothing."""
    buffer, out = io.BytesIO(), None
    with suppress(soundfile.SoundFileError, RuntimeError, OSError):
        for rate, block in _piped(data, max_seconds):
            out = out or soundfile.SoundFile(buffer, "w", rate, 1, format="FLAC")
            out.write(mono(block.T).clip(-1, 1))
    if out is None:
        return data
    out.close()
    return buffer.getvalue()


def _piped(data: bytes, max_seconds: float) -> Iterator[tuple[int, np.ndarray]]:
    """Sampling rate and blocks (S, C)."""
    reading, writing = os.pipe()

    def feed() -> None:
        with suppress(BrokenPipeError), os.fdopen(writing, "wb") as pipe:
            pipe.write(data)

    threading.Thread(target=feed, daemon=True).start()
    with soundfile.SoundFile(reading, closefd=True) as file:
        left = max_seconds + 1
        while left > 0 and len(block := file.read(file.samplerate, dtype="float32", always_2d=True)):
            yield file.samplerate, block
            left -= 1
