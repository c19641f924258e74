"""Speech-text interleaving (arXiv 2505.18644): which words of an utterance the LLM reads as text. Pure functions.

The timeline of an utterance is cut at the boundaries between words, so that every word, and every moment of the speech
with it, belongs to exactly one unit; a unit is given either as speech or as text. Where a boundary is unknown (a word
without times) or a token spans it, the words around it stay in one unit.
"""

import math
import random
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from nemo_mtbi.errors import ConfigError

OVERLAP_SECONDS = 0.2  # of two words that follow each other, as aligners round


@dataclass(frozen=True)
class Word:
    """One word of the transcript.

    Attributes:
        token_begin, token_end: its tokens in the rendered prompt (half-open).
        start_seconds, end_seconds: its time in the utterance; None if it was not aligned.
        splits_token: the last token of this word also covers the beginning of the next one.
    """

    token_begin: int
    token_end: int
    start_seconds: float | None = None
    end_seconds: float | None = None
    splits_token: bool = False


@dataclass(frozen=True)
class Unit:
    """Consecutive words that are speech together or text together. ``token_*`` index the rendered prompt."""

    token_begin: int
    token_end: int
    start_seconds: float
    end_seconds: float
    words: int


def timeline(words: list[Word], duration_seconds: float) -> list[Unit]:
    """Cut an utterance of ``duration_seconds`` into the smallest units that are known in both time and tokens.

    The boundary between two words lies halfway between the end of all before it and the start of all after it, which
    settles gaps and small overlaps. There is none beside a word without times, whose speech aligners give to its
    neighbours, where the speech of both sides lies mixed (people who talk at once, a word that an aligner misplaced),
    nor outside the audio. The first unit starts at 0, the last ends with the audio.
    """
    if not words:
        return []
    units: list[Unit] = []
    first, start = 0, 0.0
    ends = list(accumulate((-math.inf if w.end_seconds is None else w.end_seconds for w in words), max))
    backwards = (math.inf if w.start_seconds is None else w.start_seconds for w in reversed(words))
    starts = list(accumulate(backwards, min))[::-1]
    for index, (word, following) in enumerate(pairwise(words)):
        if ends[index] > starts[index + 1] + OVERLAP_SECONDS:
            continue
        untimed = word.end_seconds is None or following.start_seconds is None
        if untimed or word.splits_token or word.token_end != following.token_begin:
            continue
        boundary = (ends[index] + starts[index + 1]) / 2
        if not start < boundary < duration_seconds:
            continue
        units.append(Unit(words[first].token_begin, word.token_end, start, boundary, index + 1 - first))
        first, start = index + 1, boundary
    units.append(Unit(words[first].token_begin, words[-1].token_end, start, duration_seconds, len(words) - first))
    return units


@dataclass(frozen=True)
class Schedule:
    """Piecewise-linear factor on the probability of interleaving over training steps, e.g. ``{0: 1.0, 2000: 0.2}``."""

    points: dict[int, float] = field(default_factory=lambda: {0: 1.0})

    def __post_init__(self) -> None:
        if not self.points or any(step < 0 or not 0 <= value <= 1 for step, value in self.points.items()):
            raise ConfigError(f"interleaving.schedule={dict(self.points)}: steps must be >= 0 and factors in [0, 1].")

    def __call__(self, step: int) -> float:
        steps = sorted(self.points)
        right = bisect_right(steps, step)
        if right == 0 or right == len(steps):
            return self.points[steps[max(0, right - 1)]]
        low, high = steps[right - 1], steps[right]
        weight = (step - low) / (high - low)
        return (1 - weight) * self.points[low] + weight * self.points[high]


@dataclass(frozen=True)
class InterleavingPolicy:
    """How much of the speech is given as text.

    Attributes:
        probability: share of the examples that are interleaved; the others are plain behavior imitation.
        text_share: expected share of words given as text in an interleaved example. 0: none, 1: all.
        span_words: mean number of words in a text span; more where the share needs it.
        span_distribution: ``geometric``, ``uniform`` (1 .. 2 * mean - 1, the mean met) or ``fixed``.
        level: ``embedding`` encodes the whole utterance once and slices the connector's output; ``waveform`` cuts the
            audio and encodes each piece by itself.
        schedule: factor on ``probability`` over training steps.
        seed: together with the example's key and visit number it decides the plan.

    Raises:
        ConfigError: a value out of range.
    """

    probability: float = 0.5
    text_share: float = 0.5
    span_words: float = 3.0
    span_distribution: str = "geometric"
    level: str = "embedding"
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and 0 <= self.text_share <= 1):
            raise ConfigError(
                f"interleaving: probability={self.probability} and text_share={self.text_share} must lie in [0, 1]."
            )
        if self.span_words < 1:
            raise ConfigError(f"interleaving.span_words={self.span_words} must be >= 1.")
        if self.span_distribution not in ("geometric", "uniform", "fixed"):
            raise ConfigError(
                f"interleaving.span_distribution={self.span_distribution!r}: geometric, uniform or fixed."
            )
        if self.level not in ("embedding", "waveform"):
            raise ConfigError(f"interleaving.level={self.level!r}: embedding or waveform.")

    def plan(self, units: list[Unit], key: str, visit: int, step: int) -> list[bool]:
        """For each unit, whether it is text. The same (seed, key, visit, step's schedule value) gives the same plan.

        Spans of text and speech alternate; with mean text span ``m`` and share ``s`` the mean speech span is
        ``m (1 - s) / s``, so the expected share of words is ``s``.
        """
        rng = random.Random(f"{self.seed}/{key}/{visit}")
        if self.text_share < 1 and len(units) == 1:  # nothing known inside the utterance: it stays speech
            return [False]
        if not units or self.text_share == 0 or rng.random() >= self.probability * self.schedule(step):
            return [False] * len(units)
        if self.text_share == 1:
            return [True] * len(units)
        speech = self.span_words * (1 - self.text_share) / self.text_share
        text = self.span_words
        if speech < 1:  # a speech span has at least one word, so text spans must be longer
            speech, text = 1.0, self.text_share / (1 - self.text_share)
        mean = {True: min(text, 1e6), False: min(speech, 1e6)}
        is_text = rng.random() < self.text_share
        plan: list[bool] = []
        remaining = self._rest_of_span(rng, mean[is_text])
        for unit in units:
            while remaining <= 0:
                is_text = not is_text
                remaining += self._span(rng, mean[is_text])
            plan.append(is_text)
            remaining -= unit.words
        return plan

    def _rest_of_span(self, rng: random.Random, mean: float) -> int:
        """What is left of the span in which an utterance begins: as if it stood anywhere in a long alternation."""
        if self.span_distribution == "geometric":  # has no memory
            return self._span(rng, mean)
        if self.span_distribution == "fixed":
            short, share = self._fixed(mean)
            lengths, often = [short, short + 1], [1 - share, share]
        else:
            longest, share = self._fixed(2 * mean - 1)
            lengths = list(range(1, longest + 2))
            often = [(1 - share) / longest + share / (longest + 1)] * longest + [share / (longest + 1)]
        return rng.randint(1, rng.choices(lengths, [n * m for n, m in zip(lengths, often, strict=True)])[0])

    @staticmethod
    def _fixed(mean: float) -> tuple[int, float]:
        """Words of a span (of ``uniform``: of the longest one), and how often it has one more, so that the mean is
        met."""
        short = max(1, math.floor(mean))
        return short, max(0.0, mean - short)

    def _span(self, rng: random.Random, mean: float) -> int:
        if mean <= 1:
            return 1
        if self.span_distribution == "fixed":
            short, share = self._fixed(mean)
            return short + (rng.random() < share) if share else short
        if self.span_distribution == "uniform":
            longest, share = self._fixed(2 * mean - 1)
            return rng.randint(1, longest + (rng.random() < share) if share else longest)
        return max(1, math.ceil(math.log(1 - rng.random()) / math.log(1 - 1 / mean)))


@dataclass(frozen=True)
class SpeechSpan:
    """A stretch of one audio of the batch that stands in the LLM's input as speech."""

    audio: int
    start_seconds: float
    end_seconds: float


def merge(units: list[Unit], plan: list[bool], audio: int) -> list[tuple[int, int] | SpeechSpan]:
    """Neighbouring units of one kind become one piece: a token range of the rendered prompt, or a speech span."""
    pieces: list[tuple[int, int] | SpeechSpan] = []
    for unit, is_text in zip(units, plan, strict=True):
        last = pieces[-1] if pieces else None
        if is_text:
            begin = unit.token_begin
            if isinstance(last, tuple):
                begin = last[0]
                pieces.pop()
            pieces.append((begin, unit.token_end))
        elif isinstance(last, SpeechSpan):
            pieces[-1] = SpeechSpan(audio, last.start_seconds, unit.end_seconds)
        else:
            pieces.append(SpeechSpan(audio, unit.start_seconds, unit.end_seconds))
    return pieces
