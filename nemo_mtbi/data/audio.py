"""Waveforms: of a file, of a cut, of a batch. All audio that is read becomes mono by :func:`mono`.

Letters: C channels, S samples, B utterances.
"""

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from lhotse import Recording
from lhotse.audio import AudioLoadingError
from lhotse.augmentation import AudioTransform, Resample, Speed
from lhotse.cut import Cut
from lhotse.cut.data import DataCut
from lhotse.utils import compute_num_samples, fastcopy
from torch import Tensor

from nemo_mtbi.errors import DataError

log = logging.getLogger(__name__)
AUDIO_SUFFIXES = {f".{name}" for name in "wav flac mp3 ogg opus m4a aac aif aiff au caf sph w64 webm wma".split()}
MIN_AUDIO_SECONDS = 0.05
SUMMED_TOGETHER = 2**16  # samples
LOUDEST = 1e6  # mean level of a channel; floats in the scale of 16-bit integers reach 32768
# A recording's mean is noticed above this share of its own level (recorded speech lies far below).
DC_SHARE = 0.1
# Channels cancel if their average has less than this share of the energy that unrelated channels would leave.
CANCELLED_SHARE = 0.25
DC_OFFSET, CANCELLED = "DC offset subtracted", "channels cancel each other: the louder one is used"


def mono(audio: np.ndarray, noticed: list[str] | None = None) -> np.ndarray:
    """Channels averaged, without a DC offset; where averaging would cancel the speech, the louder channel.

    Args:
        audio: (C, S).
        noticed: takes DC_OFFSET and CANCELLED where they apply.

    Returns:
        (S,) float32.

    Raises:
        DataError: samples that are no numbers, or no audio.
    """
    audio = np.asarray(audio, dtype=np.float32)
    if not audio.size:
        return np.zeros(0, np.float32)
    means = audio.mean(1, keepdims=True, dtype=np.float64)
    energies = mean_energies(audio)
    if not np.isfinite(energies).all():
        raise DataError("The audio holds samples that are no numbers.")
    if (energies > LOUDEST**2).any():
        raise DataError(
            f"The audio's level is {float(np.sqrt(energies.max())):.1e} (full scale is 1): its samples are of another "
            "type or byte order than its header says."
        )
    levels = np.sqrt(np.maximum(energies[:, None] - means**2, 0))
    if (np.abs(means) > DC_SHARE * levels).any():
        _notice(noticed, DC_OFFSET)
        audio = audio - means.astype(np.float32)
    if len(audio) == 1:
        return np.ascontiguousarray(audio[0])
    average = audio.mean(0)
    unrelated = float((levels**2).sum()) / len(audio) ** 2
    if float(average.var(dtype=np.float64)) < CANCELLED_SHARE * unrelated:
        _notice(noticed, CANCELLED)
        average = audio[int(levels.argmax())]
    return np.ascontiguousarray(average, dtype=np.float32)


def waveform(samples: Any) -> np.ndarray:
    """Samples as programs hold them (S,), or with one channel in two dimensions; integers of any width are scaled.

    Returns:
        (S,) float32, see :func:`mono`.

    Raises:
        DataError: several channels, another type, samples that are no numbers.
    """
    own = torch.as_tensor(samples).detach().cpu().numpy()
    own = own.reshape(-1) if own.ndim == 2 and 1 in own.shape else own
    if own.ndim != 1:
        raise DataError(f"A waveform of shape {own.shape}: give one channel, (samples,).")
    if np.issubdtype(own.dtype, np.signedinteger):
        own = own / -float(np.iinfo(own.dtype).min)
    if not np.issubdtype(own.dtype, np.floating):
        raise DataError(f"A waveform of {own.dtype}: give floats with a full scale of 1, or signed integers.")
    return mono(own[None])


def _notice(noticed: list[str] | None, what: str) -> None:
    if noticed is not None:
        noticed.append(what)


def resample(samples: np.ndarray, from_rate: float, to_rate: float) -> np.ndarray:
    """(S,) at another rate. SoX's resampler takes any pair of rates; Lhotse's tabulates its filter, which for rates
    that have little in common (15,991 and 16,000 Hz) takes gigabytes."""
    if from_rate == to_rate or not len(samples):
        return samples
    return np.ascontiguousarray(soxr.resample(samples, from_rate, to_rate), dtype=np.float32)


def audio_files(folder: Path) -> list[Path]:
    """The recordings in a folder and those below it, sorted.

    Raises:
        DataError: there is none.
    """
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise DataError(f"No audio file ({', '.join(sorted(AUDIO_SUFFIXES))}) under {folder}.")
    return files


def load_waveform(
    path: str | Path,
    sampling_rate: int,
    offset_seconds: float = 0.0,
    duration_seconds: float | None = None,
    longest: float = math.inf,
) -> np.ndarray:
    """A file, or a part of it, as float32 mono (S,) at ``sampling_rate``; any rate, channel count and format that
    Lhotse reads.

    Raises:
        DataError: the file is missing, unreadable, shorter than the part or than 50 ms, or announces more than
            ``longest`` seconds, of which none is decoded then.
    """
    if not Path(path).is_file():
        raise DataError(f"There is no audio file {path}.")
    noticed: list[str] = []
    try:
        cut = Recording.from_file(path).to_cut()
        if offset_seconds or duration_seconds is not None:
            cut = part_of(cut, offset_seconds, duration_seconds)
        if cut.duration > longest:
            raise DataError(f"{cut.duration:.0f} s of audio; the limit here is {longest:.0f} s.")
        samples = mono_samples(cut, sampling_rate, noticed)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (AudioLoadingError, RuntimeError, ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as audio ({_reason(path, error)}). Is it a complete file?") from error
    except Exception as error:  # decoders raise their own types
        raise DataError(f"{path} cannot be read as audio ({type(error).__name__}: {error}).") from error
    if len(samples) < MIN_AUDIO_SECONDS * sampling_rate:
        raise DataError(
            f"{path} lasts {len(samples) / sampling_rate:.3f} s; at least {MIN_AUDIO_SECONDS} s are needed."
        )
    for what in noticed:
        log.warning(f"{path}: {what}.")
    return samples


def _reason(path: str | Path, error: Exception) -> str:
    """What a person can use of an error of the audio backends, in a few words."""
    if Path(path).stat().st_size == 0:
        return "the file is empty"
    text = str(error)
    if found := re.search(r"LibsndfileError'>: (?:Error opening .*: )?(.+?)\.?$", text, re.MULTILINE):
        return found[1]
    if found := re.search(r"diff=(\d+).*?sampling_rate=(\d+)", text, re.DOTALL):  # Lhotse, of declared and read samples
        return f"{int(found[1]) / int(found[2]):.1f} s of what its header announces are missing"
    return (text.splitlines() or [type(error).__name__])[0].removesuffix(" Details:")


def part_of(cut: Cut, offset_seconds: float, duration_seconds: float | None, tolerance_seconds: float = 0.1) -> Cut:
    """A part of a cut, under the same id; the whole where it is no more than ``tolerance_seconds`` shorter.

    Raises:
        DataError: the part is not inside the audio.
    """
    wanted = cut.duration - offset_seconds if duration_seconds is None else duration_seconds
    if offset_seconds >= cut.duration:
        raise DataError(f"offset = {offset_seconds:.2f} s, but the audio lasts {cut.duration:.2f} s")
    if offset_seconds + wanted > cut.duration + tolerance_seconds:
        raise DataError(
            f"offset + duration = {offset_seconds + wanted:.2f} s, but the audio lasts {cut.duration:.2f} s"
        )
    if not offset_seconds and wanted >= cut.duration - tolerance_seconds:
        return cut
    return cut.truncate(offset=offset_seconds, duration=min(wanted, cut.duration - offset_seconds), preserve_id=True)


def mean_energies(audio: np.ndarray) -> np.ndarray:
    """(C, S) -> (C,), without a copy of the audio: float64 sums of short float32 ones, a tenth of the time of
    float64 ones alone."""
    if not (length := audio.shape[1]):
        return np.zeros(len(audio))
    blocks = [audio[:, begin : begin + SUMMED_TOGETHER] for begin in range(0, length, SUMMED_TOGETHER)]
    with np.errstate(over="ignore"):
        sums = np.array([sum(float(np.dot(row, row)) for row in rows) for rows in zip(*blocks, strict=True)])
    if not np.isfinite(sums).all():  # beyond float32, or no numbers
        sums = np.einsum("cs,cs->c", audio, audio, dtype=np.float64)
    return sums / length


def mono_samples(cut: Cut, sampling_rate: int, noticed: list[str] | None = None) -> np.ndarray:
    """float32 samples (S,) of a cut at ``sampling_rate``, see :func:`mono`; raises what the audio backend raises."""
    cut, speed = _before_resampling(cut)
    return resample(mono(cut.load_audio(), noticed), cut.sampling_rate * speed, sampling_rate)


def _before_resampling(cut: Cut) -> tuple[Cut, float]:
    """The cut without its last changes of rate and speed, and that speed.

    NeMo's data loader asks every cut for its rate, which Lhotse notes as the recording's last transform; speed
    perturbation is a change of rate too. :func:`resample` does both at once.
    """
    speed = 1.0
    while (last := _last_transform(cut)) is not None:
        if isinstance(last, Resample):
            cut = _with_rate(cut, last.source_sampling_rate)
        elif isinstance(last, Speed):
            speed *= last.factor
            cut = _with_speed_undone(cut, last.factor)
        else:
            break
    return cut, speed


def _last_transform(cut: Cut) -> AudioTransform | None:
    recording = cut.recording if isinstance(cut, DataCut) and cut.has_recording else None
    if recording is None or not recording.transforms:
        return None
    last = recording.transforms[-1]
    return last if isinstance(last, AudioTransform) else AudioTransform.from_dict(last)


def _with_rate(cut: Cut, rate: int) -> Cut:
    recording = cut.recording
    samples = compute_num_samples(recording.duration, rate)
    before = fastcopy(recording, sampling_rate=rate, num_samples=samples, transforms=recording.transforms[:-1])
    return fastcopy(cut, recording=before)


def _with_speed_undone(cut: Cut, factor: float) -> Cut:
    recording = cut.recording
    samples = round(recording.num_samples * factor)
    seconds = samples / recording.sampling_rate
    before = fastcopy(recording, num_samples=samples, duration=seconds, transforms=recording.transforms[:-1])
    start = min(cut.start * factor, seconds)
    return fastcopy(cut, recording=before, start=start, duration=min(cut.duration * factor, seconds - start))


def collate_waveforms(waveforms: Sequence[np.ndarray | Tensor]) -> tuple[Tensor, Tensor]:
    """Waveforms (S_i,) -> (B, S) zero-padded on the right, lengths (B,)."""
    tensors = [torch.as_tensor(w, dtype=torch.float32) for w in waveforms]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True), torch.tensor([len(t) for t in tensors])
