"""Word times in cuts: an ``AlignmentItem`` counts from the beginning of its recording, as in Lhotse's recipes and
``trim_to_alignments``; truncating and appending cuts leave it as it is. Here words are relative to the cut.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from lhotse.cut import Cut, MixedCut
from lhotse.supervision import AlignmentItem, SupervisionSegment

from nemo_mtbi.data.rendering import TimedWord

WORDS = "word"  # kind of alignment
BEYOND_SECONDS = 0.5  # by which the last word may end after the audio, as aligners round


def utterances(cut: Cut) -> list[tuple[SupervisionSegment, list[TimedWord]]]:
    """The supervisions of a cut in order of time, each with its timed words, all relative to the cut. (Those of a mixed
    cut are copies.)

    A word that lies outside the cut has no times: it was cut off, or its times are those of another recording.
    """
    found = []
    for part, offset in _parts(cut):
        for supervision in part.supervisions:
            words = _words(supervision, part.start, offset, cut.duration)
            found.append((supervision.with_offset(offset) if offset else supervision, words))
    return sorted(found, key=lambda own: own[0].start)


def transcript(cut: Cut) -> str:
    """The text of all supervisions of a cut, in order of time."""
    return " ".join(s.text.strip() for s in sorted(cut.supervisions, key=lambda s: s.start) if s.text).strip()


def _parts(cut: Cut) -> Iterator[tuple[Cut, float]]:
    """What a cut is mixed of, with the place of each in it."""
    if isinstance(cut, MixedCut):
        for track in cut.tracks:
            if hasattr(track.cut, "recording"):  # no padding
                yield track.cut, track.offset
    else:
        yield cut, 0.0


def _words(supervision: SupervisionSegment, begin: float, offset: float, duration: float) -> list[TimedWord]:
    """Timed words of a supervision.

    Args:
        begin: of its part of the cut, in that part's recording.
        offset: of that part in the whole.
        duration: of the whole.
    """
    items = (supervision.alignment or {}).get(WORDS, [])
    shift = offset - _origin(items, supervision, begin)
    words = []
    for item in items:
        if not item.symbol.strip():  # a silence, as Lhotse's parse_alignments keeps them
            continue
        start, end = round(item.start + shift, 8), round(item.end + shift, 8)
        inside = start >= -BEYOND_SECONDS and end <= duration + BEYOND_SECONDS
        words.append(TimedWord(item.symbol, start, end) if inside else TimedWord(item.symbol))
    return words


def _origin(items: list[AlignmentItem], supervision: SupervisionSegment, begin: float) -> float:
    """The beginning of the cut; 0 for times that fit its utterance only if they count from there, as we once wrote."""
    if not items or not begin:
        return begin
    first, last = min(w.start for w in items), max(w.end for w in items)

    def outside(origin: float) -> float:
        return max(0.0, supervision.start - (first - origin), (last - origin) - supervision.end)

    return begin if outside(begin) <= max(outside(0.0), BEYOND_SECONDS) else 0.0


def set_words(supervision: SupervisionSegment, words: Iterable[TimedWord], begin: float) -> None:
    """Give a supervision of a cut that begins at ``begin`` of its recording the times of words, relative to the cut."""
    timed = [
        AlignmentItem(w.text, round(w.start_seconds + begin, 8), round(w.end_seconds - w.start_seconds, 8))
        for w in words
        if w.start_seconds is not None and w.end_seconds is not None
    ]
    supervision.alignment = {**(supervision.alignment or {}), WORDS: timed}


def from_its_beginning(cut: Cut) -> Cut:
    """A cut whose audio is about to become a recording of its own: words count from its beginning."""
    if not cut.start:
        return cut
    moved = []
    for supervision in cut.supervisions:
        alignment = {}
        for kind, items in (supervision.alignment or {}).items():
            origin = _origin(items, supervision, cut.start)
            alignment[kind] = [item.with_offset(-origin) for item in items]
        moved.append(replace(supervision, alignment=alignment or None))
    cut.supervisions = moved
    return cut
