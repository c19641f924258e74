"""Recordings that are read as they are needed, so that hours of audio never stand in memory; gaps are named, not fatal.

Letters: S samples.
"""

import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import soxr

from nemo_mtbi.data.audio import LOUDEST, load_waveform, mean_energies, mono
from nemo_mtbi.data.audio_length import with_length
from nemo_mtbi.errors import DataError

BLOCK_SECONDS, SMALL_BLOCK_SECONDS = 30.0, 1.0  # the second where the first cannot be decoded
STREAMED_FROM_SECONDS = 120.0  # shorter recordings are read at once
PART_TOLERANCE_SECONDS = 0.1  # by which a part may end after its file
PROBES = 30
FAILING_BLOCKS = 3  # seconds in a row, before one looks further on


@dataclass(frozen=True)
class Gap:
    """A part of a recording that cannot be read; silence stands for it."""

    begin_seconds: float
    end_seconds: float
    reason: str

    def __str__(self) -> str:
        return f"{self.begin_seconds:.1f} s to {self.end_seconds:.1f} s ({self.reason})"


@dataclass
class AudioStream:
    """A recording as blocks (S_i,) of float32 mono; each iteration reads it from its beginning.

    Channels are averaged block by block (:func:`nemo_mtbi.data.audio.mono`), the rate is changed across blocks. What
    cannot be decoded is silence of the same length, and noted in ``gaps``; DataError if nothing can, or if the part
    begins beyond the audio's end.

    Attributes:
        source: a file, or its bytes.
        sampling_rate: of the blocks.
        offset_seconds, duration_seconds: the part that is read; None: to the end.
        gaps: of the last iteration.
    """

    source: Path | bytes
    sampling_rate: int
    offset_seconds: float = 0.0
    duration_seconds: float | None = None
    gaps: list[Gap] = field(default_factory=list)

    def open(self) -> soundfile.SoundFile:
        """
        Raises:
            DataError: it is no audio that soundfile reads, or has gone.
        """
        try:
            # As bytes, since a name need not be UTF-8.
            return soundfile.SoundFile(
                io.BytesIO(self.source) if isinstance(self.source, bytes) else os.fsencode(self.source)
            )
        except (soundfile.SoundFileError, RuntimeError, TypeError, OSError) as error:
            reason = str(getattr(error, "error_string", error)).strip(" .")
            raise DataError(f"The audio cannot be opened ({reason}).") from error

    def __iter__(self) -> Iterator[np.ndarray]:
        self.gaps = []
        file = self.open()
        try:
            rate, channels = file.samplerate, file.channels
            change = None if rate == self.sampling_rate else soxr.ResampleStream(rate, self.sampling_rate, 1)
            place, end, read = round(self.offset_seconds * rate), file.frames, 0
            if place >= end:
                raise DataError(f"The part from {self.offset_seconds:g} s on is beyond the audio's {end / rate:.1f} s.")
            if self.duration_seconds is not None:
                wished = place + round(self.duration_seconds * rate)
                if wished - end > PART_TOLERANCE_SECONDS * rate:
                    self._note(end / rate, wished / rate, "the audio ends before")
                end = min(end, wished)
            size, probed, failed = round(BLOCK_SECONDS * rate), False, 0
            while place < end:
                if failed >= FAILING_BLOCKS:  # each costs a new decoder, and its way there
                    begin = place
                    place = self._next(place, end, rate)
                    if place > begin:
                        self._note(begin / rate, place / rate, "nothing can be read there")
                        yield from _silence(place - begin, rate, change)
                    failed = 0
                    continue
                wanted = min(size, end - place)
                block, reason = _read(file, place, wanted)
                found = len(block)
                if reason is not None:  # a decoder that lost its place seldom finds it again: a new one
                    file.close()
                    if not read and not found and not probed and not self._anywhere(place, end, rate):
                        raise DataError(f"Nothing of the audio can be read ({reason}).")
                    file, probed = self.open(), True
                    if wanted > SMALL_BLOCK_SECONDS * rate:
                        size = round(SMALL_BLOCK_SECONDS * rate)
                        continue
                    failed += 1
                    self._note((place + len(block)) / rate, (place + wanted) / rate, reason)
                    block = np.concatenate([block, np.zeros((wanted - len(block), channels), np.float32)])
                else:
                    failed = 0
                place, read = place + wanted, read + found
                samples = mono(block.T)
                yield samples if change is None else change.resample_chunk(samples)
            if change is not None:
                yield change.resample_chunk(np.zeros(0, np.float32), last=True)
        finally:
            file.close()

    def _anywhere(self, begin: int, end: int, rate: int) -> bool:
        """Whether a second can be read at one of a few places, so that a file without audio is not read to its end."""
        return self._next(begin, end, rate) < end

    def _next(self, begin: int, end: int, rate: int) -> int:
        """Where it can be read again, whole seconds after ``begin``, if it can at one of a few places; else the end."""
        last = max(0, (end - begin) // rate - 1)  # second that can be tried

        def readable(second: int) -> bool:
            with self.open() as file:  # a decoder that has failed once finds nothing any more
                return len(_read(file, begin + second * rate, min(end - begin, rate))[0]) > 0

        near = [own for own in (0, *(2**n for n in range(12))) if own <= last]  # soon again, or at one of a few places
        before = -1
        for second in sorted({*near, *np.linspace(0, last, PROBES).astype(int).tolist()}):
            if readable(second):
                while second - before > 1:
                    middle = (before + second) // 2
                    before, second = (before, middle) if readable(middle) else (middle, second)
                return begin + second * rate
            before = second
        return end

    @property
    def seconds(self) -> float:
        """Of what is read, by the file's header."""
        with self.open() as file:
            left = file.frames / file.samplerate - self.offset_seconds
        return left if self.duration_seconds is None else min(left, self.duration_seconds)

    def _note(self, begin: float, end: float, reason: str) -> None:
        """The reason of a long gap is that of its beginning."""
        last = self.gaps[-1] if self.gaps else None
        if last is not None and last.end_seconds == begin:
            self.gaps[-1] = Gap(last.begin_seconds, end, last.reason)
        else:
            self.gaps.append(Gap(begin, end, reason))


def _silence(samples: int, rate: int, change: soxr.ResampleStream | None) -> Iterator[np.ndarray]:
    """Blocks of so many samples, changed as the others are."""
    size = round(BLOCK_SECONDS * rate)
    for begin in range(0, samples, size):
        zeros = np.zeros(min(size, samples - begin), np.float32)
        yield zeros if change is None else change.resample_chunk(zeros)


def _read(file: soundfile.SoundFile, place: int, wanted: int) -> tuple[np.ndarray, str | None]:
    """``wanted`` samples (S, C) from ``place`` on, or fewer and why."""
    block = np.zeros((0, file.channels), np.float32)
    try:
        if file.tell() != place:
            file.seek(place)
        block = file.read(wanted, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:  # ValueError: the decoder is past the end
        return block, str(getattr(error, "error_string", error)).strip(" .").removeprefix("Error : ")
    energies = mean_energies(block.T)
    if not np.isfinite(energies).all():
        return block[:0], "samples that are no numbers"
    if (energies > LOUDEST**2).any():
        return block[:0], "samples of another type"
    return block, None if len(block) == wanted else "it ends before what its header announces"


AudioBlocks = AudioStream | Sequence[np.ndarray]  # an audio, float32 (S_i,) each


def open_audio(
    path: str | Path,
    sampling_rate: int,
    offset_seconds: float = 0.0,
    duration_seconds: float | None = None,
    longest: float = math.inf,
) -> AudioBlocks:
    """A recording in blocks: streamed if it is long and of a format that can be, else read at once, as
    :func:`nemo_mtbi.data.audio.load_waveform` does.

    ``longest``: seconds beyond which the length of one that does not say it is not counted, and of which no more are
    read at once.

    Raises:
        DataError: as :func:`nemo_mtbi.data.audio.load_waveform`.
    """
    source = with_length(Path(path), longest)
    stream = AudioStream(source, sampling_rate, offset_seconds, duration_seconds)
    if isinstance(source, bytes) or (Path(path).is_file() and _is_long(stream)):
        return stream
    return [load_waveform(path, sampling_rate, offset_seconds, duration_seconds, longest)]


def _is_long(stream: AudioStream) -> bool:
    try:
        return stream.seconds > STREAMED_FROM_SECONDS
    except DataError:  # of another format, or broken: Lhotse says what it is
        return False


def gaps_of(audio: AudioBlocks) -> list[Gap]:
    """The parts of an audio that could not be read, once it was."""
    return audio.gaps if isinstance(audio, AudioStream) else []


def seconds_of(audio: AudioBlocks, sampling_rate: int) -> float:
    """Duration of what :func:`open_audio` gave."""
    return audio.seconds if isinstance(audio, AudioStream) else sum(map(len, audio)) / sampling_rate


def bytes_of(audio: AudioBlocks) -> int:
    """Memory that an audio takes while it waits."""
    if isinstance(audio, AudioStream):
        return len(audio.source) if isinstance(audio.source, bytes) else 0
    return sum(block.nbytes for block in audio)
