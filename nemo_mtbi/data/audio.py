"""Waveforms: of a file, of a cut, of a batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lhotse import Recording
from lhotse.audio import AudioLoadingError
from lhotse.cut import Cut
from torch import Tensor

from nemo_mtbi.errors import DataError

MIN_AUDIO_SECONDS = 0.05


def load_waveform(path: str | Path, sampling_rate: int) -> np.ndarray:
    """A file as float32 mono at ``sampling_rate``; any rate, channel count and format that Lhotse reads.

    Raises:
        DataError: the file is missing, unreadable or shorter than 50 ms.
    """
    if not Path(path).is_file():
        raise DataError(f"There is no audio file {path}.")
    try:
        recording = Recording.from_file(path)
        samples = recording.resample(sampling_rate).load_audio().mean(0)
    except (AudioLoadingError, RuntimeError, ValueError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as audio ({str(error).splitlines()[0]}). Is it a complete audio file?"
        ) from error
    except Exception as error:  # decoders raise their own types
        raise DataError(f"{path} cannot be read as audio ({type(error).__name__}: {error}).") from error
    if len(samples) < MIN_AUDIO_SECONDS * sampling_rate:
        raise DataError(
            f"{path} lasts {len(samples) / sampling_rate:.3f} s; at least {MIN_AUDIO_SECONDS} s are needed."
        )
    return np.ascontiguousarray(samples, dtype=np.float32)


def mono_samples(cut: Cut, sampling_rate: int) -> np.ndarray:
    """float32 samples (S,) of a cut at ``sampling_rate``, channels averaged; raises what the audio backend raises."""
    audio = (cut if cut.sampling_rate == sampling_rate else cut.resample(sampling_rate)).load_audio()
    return np.ascontiguousarray(audio.mean(0), dtype=np.float32)


def collate_waveforms(waveforms: Sequence[np.ndarray | Tensor]) -> tuple[Tensor, Tensor]:
    """Waveforms (S_i,) -> (B, S) zero-padded on the right, lengths (B,)."""
    tensors = [torch.as_tensor(w, dtype=torch.float32) for w in waveforms]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True), torch.tensor([len(t) for t in tensors])
