"""Audio from the network: decoded with limits, whatever its header says."""

import io
import math

import numpy as np
import soundfile
from lhotse.augmentation.torchaudio import get_or_create_resampler
from torch import from_numpy

from nemo_mtbi.data.audio import MIN_AUDIO_SECONDS
from nemo_mtbi.errors import DataError

MAX_RATIO_TERM = 1000


def decode_audio(data: bytes, sampling_rate: int, max_seconds: float) -> np.ndarray:
    """WAV, FLAC, OGG/Opus or MP3 as float32 mono (S,) at ``sampling_rate``.

    Raises:
        DataError: no audio, too short, or longer than ``max_seconds`` (nothing beyond that is decoded).
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, limit = file.samplerate, int(max_seconds * file.samplerate)
            # A rate that has little in common with ours would need a resampling filter of gigabytes.
            if rate <= 0 or max(rate, sampling_rate) // math.gcd(rate, sampling_rate) > MAX_RATIO_TERM:
                raise DataError(
                    f"The audio's sampling rate is {rate} Hz; send 8,000, 16,000, 22,050, 44,100 or 48,000 Hz."
                )
            if file.channels > 16:
                raise DataError(f"The audio has {file.channels} channels; send mono or stereo.")
            samples = file.read(limit + 1, dtype="float32", always_2d=True).mean(1)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise DataError(f"The audio cannot be decoded ({error}). Send WAV, FLAC, OGG or MP3.") from error
    if len(samples) > limit:
        raise DataError(f"The audio is longer than {max_seconds:g} s, which is the limit here.")
    if len(samples) < MIN_AUDIO_SECONDS * rate:
        raise DataError(f"The audio lasts {len(samples) / rate:.3f} s; at least {MIN_AUDIO_SECONDS} s are needed.")
    if not np.isfinite(samples).all():
        raise DataError("The audio holds samples that are no numbers.")
    if rate != sampling_rate:
        samples = get_or_create_resampler(rate, sampling_rate)(from_numpy(samples)).numpy()
    return samples
