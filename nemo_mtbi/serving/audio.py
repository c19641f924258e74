"""Audio from the network: decoded with limits, whatever its header says."""

import io
from typing import Any

import soundfile

from nemo_mtbi.data.audio import MIN_AUDIO_SECONDS, mono, resample
from nemo_mtbi.data.audio_length import with_length
from nemo_mtbi.data.audio_stream import STREAMED_FROM_SECONDS, AudioBlocks, AudioStream
from nemo_mtbi.errors import DataError

MIN_RATE, MAX_RATE = 4_000, 192_000
MAX_CHANNELS = 16
LARGEST_AT_ONCE = round(STREAMED_FROM_SECONDS * 48_000 * 2)  # samples that are decoded together


class TooLong(DataError):
    """Audio of more seconds than a request may have."""

    def __init__(self, max_seconds: float, before: float) -> None:
        beside = f" together with the {before:g} s before it" if before else ""
        super().__init__(f"The audio is longer than {max_seconds:g} s{beside}, which is the limit here.")


def decode_audio(data: bytes, sampling_rate: int, max_seconds: float, before: float = 0.0) -> AudioBlocks:
    """WAV, FLAC, OGG/Opus or MP3 as blocks (S_i,) of float32 mono at ``sampling_rate``.

    Long audio stays encoded and is decoded as it is heard; :func:`nemo_mtbi.data.audio_stream.seconds_of` tells its
    length.

    Args:
        max_seconds: of all audio of a request, of which there are ``before`` already.

    Raises:
        DataError: no audio, or too short.
        TooLong: longer than what is left of ``max_seconds``; nothing beyond that is decoded.
    """
    left = max_seconds - before
    try:
        _check_form(soundfile.info(io.BytesIO(data)))
        data = bytes(with_length(data, left))
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, limit = file.samplerate, int(left * file.samplerate)
            seconds = file.frames / rate
            if seconds > left:
                raise TooLong(max_seconds, before)
            if seconds > STREAMED_FROM_SECONDS or file.frames * file.channels > LARGEST_AT_ONCE:
                return AudioStream(data, sampling_rate)
            samples = file.read(limit + 1, dtype="float32", always_2d=True)
    except DataError:
        raise
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")  # without the name of our buffer
        raise DataError(f"The audio cannot be decoded ({reason}). Send WAV, FLAC, OGG or MP3.") from error
    if len(samples) > limit:
        raise TooLong(max_seconds, before)
    if len(samples) < MIN_AUDIO_SECONDS * rate:
        raise DataError(f"The audio lasts {len(samples) / rate:.3f} s; at least {MIN_AUDIO_SECONDS} s are needed.")
    return [resample(mono(samples.T), rate, sampling_rate)]


def _check_form(header: Any) -> None:
    """
    Raises:
        DataError: another rate than is taken here, or more channels.
    """
    if not MIN_RATE <= header.samplerate <= MAX_RATE:
        raise DataError(f"The audio's sampling rate is {header.samplerate:,} Hz; send {MIN_RATE:,} to {MAX_RATE:,} Hz.")
    if header.channels > MAX_CHANNELS:
        raise DataError(f"The audio has {header.channels} channels; send up to {MAX_CHANNELS}.")
