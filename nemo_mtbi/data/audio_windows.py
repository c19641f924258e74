"""Audio beyond the encoder's window, cut where it is quiet: the same cuts in the feature cache, in training and in use.

Letters: S samples, N windows.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WINDOW_SECONDS = 30  # of an encoder, unless it is configured otherwise: what Whisper saw in training
PAUSE_SECONDS = 0.2  # what has to be quiet around a cut
EARLIEST_SHARE = 2 / 3  # of a window, before which it is not cut
LEAST_SHARE = 1 / 4  # of a window, that the last one has


@dataclass(frozen=True)
class Window:
    """Samples (S,) of an audio from its sample ``begin`` on."""

    begin: int
    samples: np.ndarray


@dataclass(frozen=True)
class Windows:
    """Whose windows the rows of a batch are.

    Attributes:
        owners: utterance of each of the N rows, in order.
        begins: encoder frame of its utterance at which each row begins.
    """

    owners: list[int]
    begins: list[int]

    @classmethod
    def of(cls, begins: Sequence[Sequence[int]]) -> "Windows | None":
        """From the frames at which the windows of each utterance begin; None where each utterance is one window."""
        if all(len(own) == 1 for own in begins):
            return None
        owners = [owner for owner, own in enumerate(begins) for _ in own]
        return cls(owners, [begin for own in begins for begin in own])

    @property
    def starts(self) -> list[bool]:
        """Whether each row begins its utterance."""
        return [begin == 0 for begin in self.begins]

    @property
    def firsts(self) -> list[int]:
        """The first row of each utterance."""
        return [row for row, start in enumerate(self.starts) if start]

    @property
    def alone(self) -> list[bool]:
        """Of each utterance, whether it is one window."""
        rows = Counter(self.owners)
        return [rows[owner] == 1 for owner in range(len(rows))]


def audio_windows(blocks: Iterable[np.ndarray], sampling_rate: int, longest: int, grid: int) -> Iterator[Window]:
    """The audio in windows of at most ``longest`` samples.

    A cut is made in the middle of the quietest 0.2 s of the last third of a window; audio that fits has one window.
    Nothing depends on how the audio comes in blocks, and no more than a window and a quarter, and a block, is held.

    Args:
        blocks: the audio, float32 (S_i,) each.
        sampling_rate: in Hz.
        longest: samples of a window; a multiple of ``grid``.
        grid: samples of an encoder frame; cuts are multiples of it.
    """
    source, ended = iter(blocks), False
    held, begin = np.zeros(0, np.float32), 0
    ahead = longest + round(longest * LEAST_SHARE)
    while True:
        while not ended and len(held) <= ahead:
            block = next(source, None)
            ended = block is None
            if block is not None:
                held = np.concatenate([held, block])
        if len(held) <= longest:
            yield Window(begin, held)
            return
        end = quiet_place(held, min(longest, len(held) - round(longest * LEAST_SHARE)), sampling_rate, grid)
        yield Window(begin, held[:end])
        held, begin = held[end:], begin + end


def quiet_place(samples: np.ndarray, latest: int, sampling_rate: int, grid: int) -> int:
    """The last of the quietest places of (S,) in the last third before ``latest``, a multiple of ``grid``."""
    half = round(PAUSE_SECONDS / 2 * sampling_rate)
    places = np.arange(-(-int(latest * EARLIEST_SHARE) // grid), latest // grid + 1) * grid
    first = max(0, int(places[0]) - half)
    energy = np.square(samples[first : places[-1] + half], dtype=np.float64).cumsum()
    total = np.concatenate([[0.0], energy])
    begins, ends = (np.clip(places - first + side, 0, len(energy)) for side in (-half, half))
    means = (total[ends] - total[begins]) / (ends - begins)
    return int(places[len(places) - 1 - means[::-1].argmin()])
