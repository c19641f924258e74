"""What can be measured of a voice in a recording: rate, pitch, level, pauses, noise. librosa computes; no labels here.

Letters: S samples.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import librosa
import numpy as np

from nemo_mtbi.preparation.compiled import require_compiled

PITCH_HZ = (60.0, 500.0)
PITCH_FRAME, PITCH_HOP, PITCH_RESOLUTION = 1024, 320, 0.2  # samples at 16 kHz; in semitones
LEVEL_FRAME, LEVEL_HOP = 400, 160
PAUSE_SECONDS = 0.25  # shorter gaps between words are not heard as pauses
ROUNDING = 1e-6
FILLERS = re.compile(r"\b(?:uh+|um+|er+m*|hm+|ah+)\b", re.IGNORECASE)
FLOOR_DB = -100.0
DIGITAL_SILENCE = 1e-10  # power of frames in which nothing was recorded: padding, a gate
NOISE_SECONDS = 0.2  # between words; where there is less than that, of longer utterances:
NOISE_PERCENTILE, PERCENTILE_SECONDS = 5, 2.0
VERSION = 3  # of the measures: another one measures again

Words = Sequence[tuple[float, float] | None]  # begin and end in seconds, in the order of the transcript; None: unknown
Stretch = tuple[float, float]

MEASURES = {
    "seconds": "duration of the utterance",
    "words_per_second": "words by the time from the first to the last, of two words or more whose times are known",
    "pitch_hz": "median fundamental frequency of voiced frames (pYIN)",
    "pitch_range_semitones": "distance of its 10th and 90th percentile",
    "level_db": "root mean square of the frames in which words are, dB of full scale",
    "noise_db": "median of the frames between words; where there are few, the 5th percentile of all, if those are 2 s "
    "or more, and no gate has cut out what is between words; without digital silence",
    "snr_db": "level_db - noise_db",
    "pauses": "gaps between words of 0.25 s or more",
    "pause_share": "of the time from the first to the last word",
    "fillers": "uh, um and the like in the transcript",
}


def measure(
    samples: np.ndarray, rate: int, words: Words, text: str, clean: np.ndarray | None = None
) -> dict[str, float]:
    """Measures of an utterance by the names of ``MEASURES``, without those that cannot be taken of it.

    Args:
        samples: (S,) float32 mono at 16 kHz.
        rate: of the samples.
        words: times of the words; of some, or of all, they may be unknown.
        text: transcript.
        clean: (S,) the voice before noise was mixed under it; its pitch is measured there.
    """
    require_compiled()
    found: dict[str, float] = {"seconds": len(samples) / rate, "fillers": len(FILLERS.findall(text))}
    known = [word for word in words if word is not None]
    if len(known) == len(words):
        words = sorted(known)
    timed = [place for place, word in enumerate(words) if word is not None]
    if timed:
        spoken = max(max(end for _, end in known) - min(begin for begin, _ in known), 1 / rate)
        gaps = [gap for gap in _between(words) if gap >= PAUSE_SECONDS - ROUNDING]
        found |= {"pauses": len(gaps), "pause_share": sum(gaps) / spoken}
        if len(timed) > 1:  # one word is as fast as it is short
            found["words_per_second"] = (timed[-1] - timed[0] + 1) / spoken
    found |= _pitch(samples if clean is None else clean, rate)
    found |= _levels(samples, rate, words)
    return {name: round(float(value), 3) for name, value in found.items() if np.isfinite(value)}


def _between(words: Words) -> Iterator[float]:
    """Seconds in which no word is, between neighbours whose times are known."""
    spoken_to = -np.inf
    for before, after in pairwise(words):
        spoken_to = max(spoken_to, before[1] if before is not None else -np.inf)
        if before is not None and after is not None:
            yield after[0] - spoken_to


def _pitch(samples: np.ndarray, rate: int) -> dict[str, float]:
    if len(samples) < 4 * PITCH_FRAME:
        return {}
    low, high = PITCH_HZ
    pitch, voiced, _ = librosa.pyin(
        samples,
        fmin=low,
        fmax=high,
        sr=rate,
        frame_length=PITCH_FRAME,
        hop_length=PITCH_HOP,
        resolution=PITCH_RESOLUTION,
    )
    pitch = pitch[voiced & np.isfinite(pitch)]
    if len(pitch) < 5:
        return {}
    semitones = 12 * np.log2(np.percentile(pitch, [10, 90]))
    return {"pitch_hz": np.median(pitch), "pitch_range_semitones": semitones[1] - semitones[0]}


def _levels(samples: np.ndarray, rate: int, words: Words) -> dict[str, float]:
    if len(samples) < LEVEL_FRAME or not samples.any():
        return {}
    power = librosa.feature.rms(y=samples, frame_length=LEVEL_FRAME, hop_length=LEVEL_HOP, center=False)[0] ** 2
    times = (np.arange(len(power)) * LEVEL_HOP + LEVEL_FRAME / 2) / rate
    inside = outside = np.ones(len(power), bool)
    if known := [word for word in words if word is not None]:
        inside, half = _within(times, known), LEVEL_FRAME / 2 / rate
        spoken = [*known, *_unknown(words, len(samples) / rate)]
        outside = ~_within(times, [(begin - half, end + half) for begin, end in spoken])  # without a part of a word
    else:
        outside = ~inside
    recorded = power > DIGITAL_SILENCE
    gated = known and (outside & ~recorded & (times > known[0][1]) & (times < known[-1][0])).any()
    between, all_frames = power[outside & recorded], power[recorded]
    level = _db(power[inside].mean() if inside.any() else power.mean())
    if len(between) * LEVEL_HOP >= NOISE_SECONDS * rate:
        noise = _db(np.median(between))
    elif not gated and len(all_frames) * LEVEL_HOP >= PERCENTILE_SECONDS * rate:
        noise = _db(np.percentile(all_frames, NOISE_PERCENTILE))
    else:
        return {"level_db": level}
    return {"level_db": level, "noise_db": noise, "snr_db": level - noise}


def _within(times: np.ndarray, stretches: Sequence[Stretch]) -> np.ndarray:
    """Which of (T,) times lie in one of the stretches."""
    begins, ends = np.array(stretches).reshape(-1, 2).T
    return np.any((times[:, None] >= begins) & (times[:, None] < ends), axis=1)


def _unknown(words: Words, seconds: float) -> list[Stretch]:
    """Stretches in which words are whose times are unknown."""
    found, begin, unknown = [], 0.0, False
    for word in [*words, (seconds, seconds)]:
        if word is None:
            unknown = True
            continue
        if unknown and begin < word[0]:
            found.append((begin, word[0]))
        begin, unknown = word[1], False
    return found


def _db(power: float) -> float:
    return max(FLOOR_DB, 10 * float(np.log10(max(power, 1e-12))))
