"""The ``no_speech`` source: recordings in which nothing is said, made on the spot, with empty transcripts."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from lhotse.cut import Cut

from nemo_mtbi.corpus.failures import require_room
from nemo_mtbi.data.target import NO_SPEECH
from nemo_mtbi.errors import ConfigError
from nemo_mtbi.io.typed import typed
from nemo_mtbi.preparation.sources import Entry, SourceConfig, utterance_cut

RATE = 16_000
SEMITONE = 2 ** (1 / 12)
LOWEST_NOISE_HZ = 50.0  # below it nearly all power of brown noise would be, where nobody hears it


@dataclass
class NoSpeechOptions:
    """``options`` of a ``no_speech`` source.

    Attributes:
        counts: recordings by split.
        seconds: shortest and longest.
        seed: of the draws.
    """

    counts: dict[str, int] = field(default_factory=lambda: {"train": 30})
    seconds: list[float] = field(default_factory=lambda: [0.3, 10.0])
    seed: int = 0


def zeros(size: int, rng: np.random.Generator) -> np.ndarray:
    """Digital silence, or a constant offset."""
    return np.full(size, rng.choice([0.0, 0.0, 0.05]))


def noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of power 1 / f^a from ``LOWEST_NOISE_HZ`` on (a: 0 white, 1 pink, 2 brown), from faint to loud."""
    spectrum = np.fft.rfft(rng.standard_normal(size))
    hertz = np.fft.rfftfreq(size, 1 / RATE)
    spectrum /= np.maximum(LOWEST_NOISE_HZ, hertz) ** (rng.choice([0, 1, 2]) / 2)
    spectrum[hertz < LOWEST_NOISE_HZ] = 0
    samples = np.fft.irfft(spectrum, size)
    return samples / max(1e-9, float(np.abs(samples).max())) * 10 ** rng.uniform(-4, -0.3)


def hum(size: int, rng: np.random.Generator) -> np.ndarray:
    """The mains, with harmonics."""
    time, frequency = np.arange(size) / RATE, rng.choice([50, 60])
    tones = [np.sin(2 * np.pi * frequency * k * time) / k**2 for k in range(1, 6)]
    return np.sum(tones, axis=0) * 10 ** rng.uniform(-3, -0.7)


def music(size: int, rng: np.random.Generator) -> np.ndarray:
    """Plucked chords, two a second."""
    time, samples = np.arange(size) / RATE, np.zeros(size)
    for begin in np.arange(0, size / RATE, 0.5):
        since = np.maximum(0, time - begin)
        for step in rng.integers(0, 36, 3):
            frequency = 110 * SEMITONE**step
            tone = sum(np.sin(2 * np.pi * frequency * k * since) / k for k in (1, 2, 3))
            samples += (time >= begin) * np.exp(-4 * since) * tone
    return samples / max(1e-9, float(np.abs(samples).max())) * 10 ** rng.uniform(-2, -0.3)


def clicks(size: int, rng: np.random.Generator) -> np.ndarray:
    """Short knocks in faint noise."""
    samples = 1e-3 * rng.standard_normal(size)
    for place in rng.integers(0, size, max(1, size // RATE)):
        length = min(400, size - place)
        samples[place : place + length] += rng.standard_normal(length) * np.exp(-np.arange(length) / 60) * 0.3
    return samples


SOUNDS: tuple[Callable[[int, np.random.Generator], np.ndarray], ...] = (zeros, noise, hum, music, clicks)


def write_flac(path: Path, samples: np.ndarray, rate: int) -> None:
    """(S,) or (S, channels) as a FLAC file, complete or absent; its folder is made.

    Raises:
        OSError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        soundfile.write(temporary, samples, rate, format="FLAC")
    except soundfile.LibsndfileError:  # says "system error" of a full disk
        temporary.unlink(missing_ok=True)
        require_room(path.parent, samples.nbytes)
        raise
    temporary.replace(path)


def read_no_speech(config: SourceConfig, output_dir: Path) -> Iterator[Entry]:
    """
    Raises:
        ConfigError: unknown options.
    """
    options = typed(NoSpeechOptions, config.options, "sources.options of kind no_speech")
    shortest, longest = options.seconds if len(options.seconds) == 2 else (0.0, 0.0)
    if not 0 < shortest <= longest < math.inf:
        raise ConfigError(f"sources.options of kind no_speech: seconds={options.seconds} must be [shortest, longest].")
    for split, count in options.counts.items():
        for index in range(count):
            name = f"no-speech-{options.seed}-{split}-{index}"
            seconds = random.Random(name).uniform(shortest, longest)

            def load(name: str = name, seconds: float = seconds, sound: int = index % len(SOUNDS)) -> Cut:
                path = output_dir / "audio" / f"{name}-{seconds:.3f}s-{LOWEST_NOISE_HZ:g}Hz.flac"
                if not path.exists():
                    rng = np.random.default_rng(list(name.encode()))
                    write_flac(path, SOUNDS[sound](round(seconds * RATE), rng), RATE)
                return utterance_cut(name, path, "", None, config.language, {NO_SPEECH: True})

            yield Entry(name, load, None, "", split, silent=True, about=(seconds, config.language, LOWEST_NOISE_HZ))
