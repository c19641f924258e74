"""Samples of a cut."""

import numpy as np
from lhotse.cut import Cut


def mono_samples(cut: Cut, sampling_rate: int) -> np.ndarray:
    """float32 samples (S,) of a cut at ``sampling_rate``, channels averaged; raises what the audio backend raises."""
    audio = (cut if cut.sampling_rate == sampling_rate else cut.resample(sampling_rate)).load_audio()
    return np.ascontiguousarray(audio.mean(0), dtype=np.float32)
