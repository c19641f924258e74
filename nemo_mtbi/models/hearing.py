"""Audio of any length to what the LLM reads of it, in bounded memory: the use of what ``models/speech.py`` trains.

Letters: B audios, S samples, N windows, P connector positions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from nemo_mtbi.data.audio import collate_waveforms
from nemo_mtbi.data.audio_stream import AudioBlocks, seconds_of
from nemo_mtbi.data.audio_windows import Window, Windows, audio_windows
from nemo_mtbi.data.time_marks import marks
from nemo_mtbi.errors import DataError
from nemo_mtbi.models.speech import connect_windows, encode, frame_times, fused
from nemo_mtbi.modules.connectors.base import SpeechEmbeddings, frame_mask
from nemo_mtbi.modules.connectors.windows import concatenated, whole_utterances
from nemo_mtbi.modules.fusion import contents
from nemo_mtbi.modules.perception import encoder_frame_seconds, window_samples

PASS_SECONDS = 240.0  # of audio that is encoded and connected together


@dataclass(frozen=True)
class Heard:
    """What the LLM reads of B audios, and their seconds."""

    speech: SpeechEmbeddings
    seconds: list[float]

    def rows(self, indices: list[int]) -> "Heard":
        """Those audios, in that order."""
        own: dict[str, Any] = {f.name: getattr(self.speech, f.name) for f in fields(SpeechEmbeddings)}
        chosen: dict[str, Any] = {name: None if values is None else values[indices] for name, values in own.items()}
        return Heard(SpeechEmbeddings(**chosen), [self.seconds[index] for index in indices])


@torch.no_grad()
def hear(
    perception: Any,
    audios: Sequence[AudioBlocks],
    device: torch.device,
    on_heard: Callable[[float], None] = lambda seconds: None,
    marks_seconds: float | None = None,
) -> Heard:
    """What the LLM reads of audios: ``connect`` and ``fused`` of :mod:`nemo_mtbi.models.speech`.

    No more than ``PASS_SECONDS`` of audio and its features are held at once, nor, with a budget, more of an audio's
    positions than ``Fusion.held``.

    Args:
        perception: encoder and connector.
        audios: B audios, read as they are needed.
        device: where encoder and connector are.
        on_heard: called after each pass with the seconds of audio that are done.
        marks_seconds: nothing is fused across multiples of it (:mod:`nemo_mtbi.data.time_marks`).

    Raises:
        DataError: an audio without samples.
    """
    rate, longest, frame = window_samples(perception)
    seconds, held = [0.0] * len(audios), 0
    group: list[tuple[int, Window]] = []
    positions = HeldPositions(perception, [seconds_of(audio, rate) for audio in audios], marks_seconds)

    def connected() -> None:
        samples, lengths = collate_waveforms([window.samples for _, window in group])
        features = encode(perception, samples.to(device), lengths.to(device))
        speech = connect_windows(perception, *features, [window.begin == 0 for _, window in group])
        positions.add(speech, [(row, w.begin, len(w.samples)) for row, w in group])
        on_heard(sum(seconds))

    for row, blocks in enumerate(audios):
        for window in audio_windows(blocks, rate, longest, frame):
            if group and held + len(window.samples) > PASS_SECONDS * rate:
                connected()
                group, held = [], 0
            group.append((row, window))
            held += len(window.samples)
            seconds[row] = (window.begin + len(window.samples)) / rate
        if not seconds[row]:
            raise DataError("There are no samples in the audio.")
    connected()
    cuts = [positions.cuts(s) for s in seconds]
    return Heard(fused(perception, positions.whole(), seconds, cuts), seconds)


class HeldPositions:
    """What a connector gave for windows so far.

    As soon as an audio has more positions than :meth:`Fusion.held` allows, each of its windows keeps no more than its
    share of them by time, so that what is held grows no further; an audio below that is left as it is.

    Args:
        perception: encoder and connector.
        totals: seconds of each of the B audios.
        marks_seconds: as for :func:`hear`.
    """

    def __init__(self, perception: Any, totals: list[float], marks_seconds: float | None) -> None:
        self.perception, self.totals, self.marks_seconds = perception, totals, marks_seconds
        self.rate, _, self.frame = window_samples(perception)
        fusion = getattr(perception, "fusion", None)
        self.limits: list[int | None] = [None] * len(totals) if fusion is None else fusion.held(totals)
        self.counts, self.over = [0] * len(totals), set[int]()
        self.parts: list[tuple[SpeechEmbeddings, list[tuple[int, int, int]]]] = []

    def add(self, speech: SpeechEmbeddings, windows: list[tuple[int, int, int]]) -> None:
        """Windows of a pass: of each its audio, its first sample and its samples."""
        speech = replace(speech, ctc_log_probs=None, ctc_lengths=None)  # nothing reads them in use
        if any(limit is not None for limit in self.limits):
            speech = replace(speech, content=contents(speech, frame_mask(speech.lengths, speech.embeddings.shape[1])))
        for (row, _, _), count in zip(windows, speech.lengths.tolist(), strict=True):
            self.counts[row] += count
        known = len(self.over)
        self.over |= {r for r, limit in enumerate(self.limits) if limit is not None and self.counts[r] > limit}
        if len(self.over) > known:  # what was held before has to shrink too
            self.parts = [(self._within(*part), part[1]) for part in self.parts]
        self.parts.append((self._within(speech, windows), windows))

    def _within(self, speech: SpeechEmbeddings, windows: list[tuple[int, int, int]]) -> SpeechEmbeddings:
        if not any(row in self.over for row, _, _ in windows):
            return speech
        seconds, cuts, budgets = [], [], list[int | None]()
        for row, begin, size in windows:
            first, own, limit = begin / self.rate, size / self.rate, self.limits[row]
            seconds.append(own)
            share = own / max(self.totals[row], first + own)
            budgets.append(math.ceil(limit * share) if row in self.over and limit is not None else None)
            cuts.append(self.cuts(own, first))
        return fused(self.perception, speech, seconds, cuts, budgets)

    def cuts(self, seconds: float, begin: float = 0.0) -> list[float]:
        """Time marks within the ``seconds`` of an audio from ``begin`` on, in frames from there; they stay apart."""
        if self.marks_seconds is None:
            return []
        inner = [mark - begin for mark in marks(begin + seconds, self.marks_seconds)[1:] if mark > begin]
        return frame_times(inner, encoder_frame_seconds(self.perception))

    def whole(self) -> SpeechEmbeddings:
        """The positions of the B audios; nothing is held any longer."""
        begins: list[list[int]] = [[] for _ in self.totals]
        for row, begin, _ in (window for _, windows in self.parts for window in windows):
            begins[row].append(begin // self.frame)
        parts, self.parts = [speech for speech, _ in self.parts], []
        return whole_utterances(concatenated(parts), Windows.of(begins))
